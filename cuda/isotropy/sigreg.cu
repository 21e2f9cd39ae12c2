/* sigreg.cu - the empirical characteristic function along directions, less that of a standard normal, on the GPU.
 *
 *     p[i,l]     = <z_i, direction_l>                            one GEMM a chunk of points
 *     off[j-1,l] = root_j sum_i (u^j - 1 + 1 - normal_j)         u = exp(i step p): one sine and cosine an entry,
 *                                                                knots - 2 products
 *
 *     dp[i,l]    = Re sum_j q[j,l] exp(i t_j p)                  Horner's rule, q = root_j t_j (doff_im + i doff_re)
 *     dz_i       = sum_l dp[i,l] direction_l                     one GEMM a chunk
 *
 * as in the CPU's. A thread has a direction and every LINES-th point of a slice, and GROUP sums in registers; a block's
 * lines and then the slices are added up in order, in double. Beside z only p of a chunk and the slices' sums exist.
 *
 * On an H100 n = 512, s = 256, 17 knots: 131072 entries, each some 60 multiply-adds forward and as many backward.
 */
#include "linalg.cuh"

enum {
    LINES = 8,            /* points beside one another in a block */
    GROUP = 16,           /* knots from one sine and cosine to the next */
    TOGETHER = 4,         /* points of a thread in the backward */
    CHUNK = 1 << 25,      /* entries of p at a time, at most, as long as that is a slice */
    BLOCKS = 1024,        /* blocks that fill a device several times over */
    LONGEST = 4096,       /* points of a slice */
    GRID = (1 << 16) - 1, /* blocks along y and z, at most */
};

typedef struct sigreg_plan {
    int64_t powers, groups, columns; /* knots - 1; groups of them; blocks of directions */
    int64_t length, slices;          /* points of a slice, slices of a view */
    int64_t views, rows;             /* of a chunk: some whole views, or some slices of one */
    void *p, *wide, *part;           /* [views, rows, s]; [views, rows, d] of halves; see below */
} sigreg_plan;

/* Where a chunk begins. `part` holds the slices' sums, [v, slices, 2, powers, s], or q, [v, 2, powers, s]. */
typedef struct sigreg_chunk {
    int64_t v, from;     /* the first view and point */
    int64_t views, rows; /* how many of each */
} sigreg_chunk;

static sigreg_plan plan_of(const subspace_sigreg_args *a, char *base, size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    sigreg_plan s = {};
    s.powers = a->knots - 1, s.groups = CEIL_DIV(s.powers, GROUP), s.columns = CEIL_DIV(a->s, WARP);
    const int64_t most = MAX(CEIL_DIV(a->n, LONGEST), BLOCKS / MAX(1, a->v * s.groups * s.columns));
    s.slices = MAX(1, MIN(CEIL_DIV(a->n, 8 * LINES), most));
    s.length = MAX(1, CEIL_DIV(CEIL_DIV(a->n, s.slices), LINES)) * LINES;
    s.slices = CEIL_DIV(a->n, s.length);
    s.rows = MIN(a->n, MAX(1, CHUNK / a->s / s.length) * s.length);
    s.views = s.rows < a->n ? 1 : MAX(1, MIN(MIN(a->v, GRID / s.groups), CHUNK / MAX(1, a->n * a->s)));
    s.p = carve(base, bytes, s.views * s.rows * a->s, item);
    s.wide = carve(base, bytes, is_half(a->dtype) ? s.views * s.rows * a->d : 0, item);
    s.part = carve(base, bytes, a->v * MAX(1, s.slices) * 2 * s.powers * a->s, sizeof(double));
    return s;
}

static __device__ inline void turn(float angle, float *sine, float *cosine)
{
    sincosf(angle, sine, cosine);
}

static __device__ inline void turn(double angle, double *sine, double *cosine)
{
    sincos(angle, sine, cosine);
}

/* The trapezoidal rule: the root of knot j's weight, and what the standard normal's value there is below 1. */
static __device__ inline double rule(const subspace_sigreg_args &a, int64_t j, double *below)
{
    const double t = (double)(j + 1) * a.step;
    *below = -expm1(-t * t / 2);
    return sqrt((j + 2 < a.knots ? 2 : 1) * a.step * exp(-t * t / 2));
}

/* The sums of a slice of points along WARP directions, GROUP powers, less 1 each. */
template <typename A>
__global__ void __launch_bounds__(WARP *LINES)
    sum_powers(subspace_sigreg_args a, sigreg_plan s, sigreg_chunk chunk, const A *__restrict__ p, double *part)
{
    __shared__ A sums[2][LINES][WARP];
    const int64_t col = (int64_t)blockIdx.y * WARP + threadIdx.x, view = blockIdx.z / s.groups;
    const int64_t first = blockIdx.z % s.groups * GROUP, slice = chunk.from / s.length + blockIdx.x;
    const int64_t begin = (int64_t)blockIdx.x * s.length, end = MIN(begin + s.length, chunk.rows);
    const A step = (A)a.step, start = (A)((double)(first + 1) * a.step);
    A re[GROUP] = {}, im[GROUP] = {};
    for (int64_t i = begin + threadIdx.y; col < a.s && i < end; i += LINES) {
        const A x = p[(view * chunk.rows + i) * a.s + col];
        A c, d, u, w;
        turn(x * step, &d, &c);
        u = c, w = d;
        if (first > 0) turn(x * start, &w, &u);
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            re[j] += u - 1, im[j] += w;
            const A next = u * c - w * d;
            w = u * d + w * c, u = next;
        }
    }
    double *to = part + ((chunk.v + view) * s.slices + slice) * 2 * s.powers * a.s;
#pragma unroll
    for (int j = 0; j < GROUP; j++) {
        sums[0][threadIdx.y][threadIdx.x] = re[j], sums[1][threadIdx.y][threadIdx.x] = im[j];
        __syncthreads();
        if (threadIdx.y < 2 && col < a.s && first + j < s.powers) {
            double sum = 0;
            for (int line = 0; line < LINES; line++) sum += (double)sums[threadIdx.y][line][threadIdx.x];
            to[(threadIdx.y * s.powers + first + j) * a.s + col] = sum;
        }
        __syncthreads();
    }
}

/* off of the slices' sums, a thread each */
static __global__ void __launch_bounds__(ROW_THREADS)
    join_slices(subspace_sigreg_args a, sigreg_plan s, const double *part, double *off)
{
    const int64_t size = 2 * s.powers * a.s, i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    const int64_t v = i / size, at = i % size, j = at / a.s;
    double sum = 0, below;
    if (i >= a.v * size) return;
    for (int64_t slice = 0; slice < s.slices; slice++) sum += part[(v * s.slices + slice) * size + at];
    const double root = rule(a, j % s.powers, &below);
    off[i] = root * (sum + (j < s.powers ? (double)a.n * below : 0));
}

/* q, a thread each: real parts of doff's sines, imaginary ones of its cosines */
template <typename A>
__global__ void __launch_bounds__(ROW_THREADS)
    coefficients(subspace_sigreg_args a, sigreg_plan s, const double *doff, A *q)
{
    const int64_t half = s.powers * a.s, i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    const int64_t j = i % half / a.s;
    double below;
    if (i >= a.v * 2 * half) return;
    const double root = rule(a, j, &below);
    q[i] = (A)(root * (double)(j + 1) * a.step * doff[i / half % 2 ? i - half : i + half]);
}

/* dp in the place of p: TOGETHER points of a thread, WARP directions of a block */
template <typename A>
__global__ void __launch_bounds__(WARP *LINES)
    horner(subspace_sigreg_args a, sigreg_plan s, sigreg_chunk chunk, const A *__restrict__ coefficient, A *p)
{
    const int64_t col = (int64_t)blockIdx.y * WARP + threadIdx.x, view = blockIdx.z;
    const int64_t from = (int64_t)blockIdx.x * LINES * TOGETHER + threadIdx.y;
    const A *re = coefficient + (chunk.v + view) * 2 * s.powers * a.s + col, *im = re + s.powers * a.s;
    A x[TOGETHER], dp[TOGETHER] = {}, c[TOGETHER], d[TOGETHER];
    if (col >= a.s) return;
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
        const int64_t i = from + k * LINES;
        x[k] = i < chunk.rows ? p[(view * chunk.rows + i) * a.s + col] : 0;
        turn(x[k] * (A)a.step, &d[k], &c[k]);
    }
    for (int64_t first = 0; first < s.powers; first += GROUP) {
        A u[TOGETHER] = {}, w[TOGETHER] = {};
        for (int64_t j = MIN(first + GROUP, s.powers) - 1; j >= first; j--) {
            const A qr = re[j * a.s], qi = im[j * a.s];
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                const A next = qr + u[k] * c[k] - w[k] * d[k];
                w[k] = qi + u[k] * d[k] + w[k] * c[k], u[k] = next;
            }
        }
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            A sine = d[k], cosine = c[k];
            if (first > 0) turn(x[k] * (A)((double)(first + 1) * a.step), &sine, &cosine);
            dp[k] += u[k] * cosine - w[k] * sine;
        }
    }
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
        const int64_t i = from + k * LINES;
        if (i < chunk.rows) p[(view * chunk.rows + i) * a.s + col] = dp[k];
    }
}

template <typename From, typename To>
__global__ void __launch_bounds__(ROW_THREADS) convert(const From *from, int64_t count, To *to)
{
    const int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i < count) to[i] = (To)(float)from[i];
}

static unsigned blocks_of(int64_t threads)
{
    return (unsigned)CEIL_DIV(threads, ROW_THREADS);
}

/* p of a chunk */
template <typename T>
static subspace_status project(subspace_ctx *ctx, const subspace_sigreg_args *a, const sigreg_plan *s,
                               const sigreg_chunk *c)
{
    const subspace_dtype wide = a->dtype == SUBSPACE_F64 ? SUBSPACE_F64 : SUBSPACE_F32;
    const int64_t points = c->views * c->rows;
    const void *z = (const T *)a->z + (c->v * a->n + c->from) * a->d;
    if constexpr (sizeof(T) == 2) {
        LAUNCH(ctx, (convert<T, float>), blocks_of(points * a->d), ROW_THREADS, 0, (const T *)z, points * a->d,
               (float *)s->wide);
        z = s->wide;
    }
    return gemm(ctx, false, false, points, a->s, a->d, wide, z, a->d, a->directions, a->s, 0, wide, s->p, a->s);
}

/* dz of a chunk's dp */
template <typename T>
static subspace_status project_back(subspace_ctx *ctx, const subspace_sigreg_args *a, const sigreg_plan *s,
                                    const sigreg_chunk *c)
{
    const subspace_dtype wide = a->dtype == SUBSPACE_F64 ? SUBSPACE_F64 : SUBSPACE_F32;
    const int64_t points = c->views * c->rows;
    T *dz = (T *)a->dz + (c->v * a->n + c->from) * a->d;
    TRY(gemm(ctx, false, true, points, a->d, a->s, wide, s->p, a->s, a->directions, a->s, 0, wide,
             is_half(a->dtype) ? s->wide : (void *)dz, a->d));
    if constexpr (sizeof(T) == 2)
        LAUNCH(ctx, (convert<float, T>), blocks_of(points * a->d), ROW_THREADS, 0, (const float *)s->wide,
               points * a->d, dz);
    return SUBSPACE_OK;
}

/* From one chunk to the next; false: that was the last one. {0} is before the first. */
static bool next(const subspace_sigreg_args *a, const sigreg_plan *s, sigreg_chunk *c)
{
    c->from += c->rows;
    if (c->from >= a->n) c->v += c->views, c->from = 0;
    if (c->v >= a->v || a->n == 0) return false;
    c->views = MIN(s->views, a->v - c->v), c->rows = MIN(s->rows, a->n - c->from);
    return true;
}

template <typename T>
static subspace_status forward(subspace_ctx *ctx, const subspace_sigreg_args *a, const sigreg_plan *s)
{
    typedef acc_t<T> A;
    double *part = (double *)s->part;
    for (sigreg_chunk c = {}; next(a, s, &c);) {
        const dim3 grid((unsigned)CEIL_DIV(c.rows, s->length), (unsigned)s->columns, (unsigned)(c.views * s->groups));
        TRY(project<T>(ctx, a, s, &c));
        LAUNCH(ctx, sum_powers<A>, grid, dim3(WARP, LINES), 0, *a, *s, c, (const A *)s->p, part);
    }
    LAUNCH(ctx, join_slices, blocks_of(a->v * 2 * s->powers * a->s), ROW_THREADS, 0, *a, *s, part, a->off);
    return SUBSPACE_OK;
}

template <typename T>
static subspace_status backward(subspace_ctx *ctx, const subspace_sigreg_args *a, const sigreg_plan *s)
{
    typedef acc_t<T> A;
    A *q = (A *)s->part;
    LAUNCH(ctx, coefficients<A>, blocks_of(a->v * 2 * s->powers * a->s), ROW_THREADS, 0, *a, *s, a->doff, q);
    for (sigreg_chunk c = {}; next(a, s, &c);) {
        const dim3 grid((unsigned)CEIL_DIV(c.rows, LINES * TOGETHER), (unsigned)s->columns, (unsigned)c.views);
        TRY(project<T>(ctx, a, s, &c));
        LAUNCH(ctx, horner<A>, grid, dim3(WARP, LINES), 0, *a, *s, c, (const A *)q, (A *)s->p);
        TRY(project_back<T>(ctx, a, s, &c));
    }
    return SUBSPACE_OK;
}

extern "C" size_t subspace_sigreg_workspace_cuda(const subspace_ctx *, const subspace_sigreg_args *a)
{
    size_t bytes = 0;
    plan_of(a, NULL, &bytes);
    return bytes;
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_sigreg_args *a, sigreg_plan *s)
{
    size_t bytes = 0;
    TRY(subspace_sigreg_check(ctx, a));
    *s = plan_of(a, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "sigreg: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, bytes);
    CHECK(ctx, s->columns <= GRID, SUBSPACE_INVALID_ARGUMENT, "sigreg: %lld directions are too many", (long long)a->s);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_sigreg_cuda(subspace_ctx *ctx, const subspace_sigreg_args *a)
{
    sigreg_plan s;
    TRY(prepare(ctx, a, &s));
    if (a->v == 0) return SUBSPACE_OK;
    DISPATCH(a->dtype, forward, ctx, a, &s);
}

extern "C" subspace_status subspace_sigreg_backward_cuda(subspace_ctx *ctx, const subspace_sigreg_args *a)
{
    sigreg_plan s;
    TRY(prepare(ctx, a, &s));
    if (a->v == 0 || a->n == 0) return SUBSPACE_OK;
    DISPATCH(a->dtype, backward, ctx, a, &s);
}
