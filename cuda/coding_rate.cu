/* coding_rate.cu - coding rate of groups of points, each on its smaller side, on the GPU.
 *
 *     a    = d / (m eps)                      m points Z of a group, d features
 *     X    = a Z Z'  (m <= d)   or  a Z' Z    s x s, the upper half
 *     U'U  = I + X                            in place, with h = 1/2 log det(I + X)
 *     rate = sum m/n h
 *     dZ   = drate m/n a (I + a Z Z')^-1 Z = drate m/n a Z (I + a Z' Z)^-1, by two triangular solves
 *
 * All in double, so that no group has to start over: finding out would stall the stream. Where the factorisation fails
 * the rate and the gradient are NaN. How many groups there are, and how large, only the device knows: blocks take
 * turns at all the groups there could be. Nothing of the forward is kept: its factor is filled with zeros.
 */
#include "cuda.cuh"

enum { SIDE = 32, STEP = 16 }; /* a block's tile of X, made of STEP entries of the longer side at a time */

static const int64_t GROUPS = 2048; /* groups in flight at most */

typedef struct rate_run {
    subspace_coding_rate_args a;
    int64_t groups, kept; /* a view's groups, empty ones included, and entries of its factor */
    double *x;            /* [v, kept]      X, then U */
    double *y;            /* [v, n d]       the right-hand sides of the solves */
    double *half;         /* [v, groups]    m/n h */
    int backward;
} rate_run;

typedef struct rate_group {
    int64_t view, first, m, s, len; /* points; the smaller and the larger of points and features */
    bool points;                    /* s is m */
    double *x, *y;
} rate_group;

/* The i-th group of all views; m is 0 if it is empty, or not a range of rows. */
static __device__ rate_group group(const rate_run &run, int64_t i)
{
    const subspace_coding_rate_args &a = run.a;
    rate_group g = {};
    g.view = i / run.groups;
    g.m = a.n;
    if (a.start) {
        const int64_t *start = a.start + g.view * (a.n + 1) + i % run.groups;
        g.first = start[0];
        g.m = start[0] >= 0 && start[1] <= a.n ? MAX(start[1] - start[0], 0) : 0;
    }
    g.s = MIN(g.m, a.d), g.len = MAX(g.m, a.d), g.points = g.m <= a.d;
    g.x = run.x + g.view * run.kept + (a.start ? g.first * MIN(a.n, a.d) : 0);
    g.y = run.y + (g.view * a.n + g.first) * a.d;
    return g;
}

/* Where feature j of the group's point i lies in z; -1: order is no permutation. */
static __device__ int64_t place(const rate_run &run, const rate_group &g, int64_t i, int64_t j)
{
    const subspace_coding_rate_args &a = run.a;
    const int64_t row = a.order ? a.order[g.view * a.n + g.first + i] : i;
    return row >= 0 && row < a.n ? (g.view * a.n + row) * a.d + j : -1;
}

/* Entry (i, l) of Y, Z or Z' with the smaller side first. */
template <typename T> static __device__ double entry(const rate_run &run, const rate_group &g, int64_t i, int64_t l)
{
    const int64_t at = g.points ? place(run, g, i, l) : place(run, g, l, i);
    return at < 0 ? NAN : (double)((const T *)run.a.z)[at];
}

/* X = a Y Y', a tile of SIDE x SIDE by 16 x 16 threads */
template <typename T> __global__ void gram(const rate_run run)
{
    __shared__ double left[STEP][SIDE + 1], right[STEP][SIDE + 1];
    for (int64_t at = blockIdx.y; at < run.a.v * run.groups; at += gridDim.y) {
        const rate_group g = group(run, at);
        const int64_t tiles = CEIL_DIV(g.s, SIDE);
        const double alpha = (double)run.a.d / ((double)g.m * run.a.eps);
        for (int64_t tile = blockIdx.x; tile < tiles * tiles; tile += gridDim.x) {
            const int64_t i0 = tile / tiles * SIDE, j0 = tile % tiles * SIDE;
            double sum[2][2] = {};
            if (j0 < i0) continue;
            for (int64_t l0 = 0; l0 < g.len; l0 += STEP) {
                const int thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
                for (int q = thread; q < STEP * SIDE; q += (int)(blockDim.x * blockDim.y)) {
                    /* neighbours read neighbours of a row of z */
                    const int r = g.points ? q / STEP : q % SIDE, l = g.points ? q % STEP : q / SIDE;
                    const bool inside = l0 + l < g.len;
                    left[l][r] = inside && i0 + r < g.s ? entry<T>(run, g, i0 + r, l0 + l) : 0;
                    right[l][r] = inside && j0 + r < g.s ? entry<T>(run, g, j0 + r, l0 + l) : 0;
                }
                __syncthreads();
                for (int l = 0; l < STEP; l++)
                    for (int r = 0; r < 2; r++)
                        for (int c = 0; c < 2; c++)
                            sum[r][c] += left[l][threadIdx.y + 16 * r] * right[l][threadIdx.x + 16 * c];
                __syncthreads();
            }
            for (int r = 0; r < 2; r++)
                for (int c = 0; c < 2; c++) {
                    const int64_t i = i0 + threadIdx.y + 16 * r, j = j0 + threadIdx.x + 16 * c;
                    if (i < g.s && j < g.s) g.x[i * g.s + j] = alpha * sum[r][c];
                }
        }
    }
}

/* U in place of X, a block a group; what X has left at a pivot is the argument of log1p */
static __global__ void factor(const rate_run run)
{
    for (int64_t at = blockIdx.x; at < run.a.v * run.groups; at += gridDim.x) {
        const rate_group g = group(run, at);
        const int64_t s = g.s;
        double half = 0;
        for (int64_t k = 0; k < s; k++) {
            const double rest = g.x[k * s + k], root = sqrt(1 + rest);
            half += 0.5 * log1p(rest);
            __syncthreads(); /* rest has been read */
            for (int64_t j = k + threadIdx.x; j < s; j += blockDim.x)
                g.x[k * s + j] = j == k ? root : g.x[k * s + j] / root;
            __syncthreads();
            const int64_t left = s - k - 1;
            for (int64_t q = threadIdx.x; q < left * left; q += blockDim.x) {
                const int64_t i = k + 1 + q / left, j = k + 1 + q % left;
                if (j >= i) g.x[i * s + j] -= g.x[k * s + i] * g.x[k * s + j];
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) run.half[at] = g.m ? (double)g.m / (double)run.a.n * half : 0;
    }
}

template <typename T> __global__ void rate_of(const rate_run run)
{
    double sum = 0;
    for (int64_t g = threadIdx.x; g < run.groups; g += blockDim.x) sum += run.half[blockIdx.x * run.groups + g];
    sum = block_sum(sum);
    if (threadIdx.x == 0) ((T *)run.a.rate)[blockIdx.x] = (T)sum;
}

/* dZ: a thread solves for a column of Y, beside its neighbours */
template <typename T> __global__ void gradient(const rate_run run)
{
    for (int64_t at = blockIdx.y; at < run.a.v * run.groups; at += gridDim.y) {
        const rate_group g = group(run, at);
        const int64_t s = g.s, len = g.len;
        if (g.m == 0) continue;
        const double scale = (double)((const T *)run.a.drate)[g.view] / (double)run.a.n * (double)run.a.d / run.a.eps;
        for (int64_t l = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; l < len;
             l += (int64_t)gridDim.x * blockDim.x) {
            double *y = g.y + l;
            for (int64_t i = 0; i < s; i++) {
                double sum = scale * entry<T>(run, g, i, l);
                for (int64_t q = 0; q < i; q++) sum -= g.x[q * s + i] * y[q * len];
                y[i * len] = sum / g.x[i * s + i];
            }
            for (int64_t i = s - 1; i >= 0; i--) {
                double sum = y[i * len];
                for (int64_t q = i + 1; q < s; q++) sum -= g.x[i * s + q] * y[q * len];
                y[i * len] = sum / g.x[i * s + i];
                const int64_t to = g.points ? place(run, g, i, l) : place(run, g, l, i);
                if (to >= 0) ((T *)run.a.dz)[to] = (T)y[i * len];
            }
        }
    }
}

static void plan(rate_run *run, const subspace_coding_rate_args *a, bool backward, char *base, size_t *bytes)
{
    *run = rate_run{};
    run->a = *a;
    run->groups = a->start ? a->n : 1;
    run->kept = subspace_coding_rate_factor(a);
    run->backward = backward;
    run->x = (double *)carve(base, bytes, a->v * run->kept, sizeof(double));
    run->half = (double *)carve(base, bytes, a->v * run->groups, sizeof(double));
    if (backward) run->y = (double *)carve(base, bytes, a->v * a->n * a->d, sizeof(double));
}

template <typename T> static subspace_status every_group(subspace_ctx *ctx, const rate_run *run)
{
    const subspace_coding_rate_args *a = &run->a;
    const int64_t all = a->v * run->groups, tiles = CEIL_DIV(MIN(a->n, a->d), SIDE);
    if (all == 0) return SUBSPACE_OK;
    const unsigned groups = (unsigned)MIN(all, GROUPS);
    const dim3 squares((unsigned)MIN(tiles * tiles, 64 * 64), groups);
    LAUNCH(ctx, gram<T>, squares, dim3(16, 16), 0, *run);
    LAUNCH(ctx, factor, groups, ROW_THREADS, 0, *run);
    if (run->backward) {
        const dim3 columns((unsigned)CEIL_DIV(MAX(a->n, a->d), ROW_THREADS), groups);
        LAUNCH(ctx, gradient<T>, columns, ROW_THREADS, 0, *run);
    } else {
        if (a->factor)
            CUDA(ctx, cudaMemsetAsync(a->factor, 0, (size_t)(a->v * run->kept) * sizeof(T), (cudaStream_t)ctx->stream));
        LAUNCH(ctx, rate_of<T>, (unsigned)a->v, ROW_THREADS, 0, *run);
    }
    return SUBSPACE_OK;
}

extern "C" size_t subspace_coding_rate_workspace_cuda(const subspace_ctx *, const subspace_coding_rate_args *a)
{
    size_t bytes = 0;
    rate_run run;
    plan(&run, a, a->dz != NULL, NULL, &bytes);
    return bytes;
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_coding_rate_args *a, bool backward, rate_run *run)
{
    size_t bytes = 0;
    TRY(subspace_coding_rate_check(ctx, a));
    plan(run, a, backward, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "coding_rate: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_coding_rate_cuda(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    rate_run run;
    TRY(prepare(ctx, a, false, &run));
    return a->dtype == SUBSPACE_F64 ? every_group<double>(ctx, &run) : every_group<float>(ctx, &run);
}

extern "C" subspace_status subspace_coding_rate_backward_cuda(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    rate_run run;
    TRY(prepare(ctx, a, true, &run));
    return a->dtype == SUBSPACE_F64 ? every_group<double>(ctx, &run) : every_group<float>(ctx, &run);
}
