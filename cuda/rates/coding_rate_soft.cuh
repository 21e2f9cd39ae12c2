/* coding_rate_soft.cuh - what coding_rate_soft.cu has to know of a view, whether float32 and inverses are enough for
 * it, and how it is done where they are not: class by class in float64 and with the root R = U^-1 of A^-1 = R R',
 *
 *     V = Z R,  q_i = |v_i|^2,  dZ += diag(w_k) V R'
 *
 * which cancels no more than triangular solves do. Where A itself has lost I, its factor is made of the points
 * (qr_update.cuh). All of that is one cooperative launch, whose blocks leave at once
 * where there is nothing to do. As many classes at a time as there is memory for; 4 n k d^2 flops in float64.
 *
 * Included by coding_rate_soft.cu.
 */
#ifndef SUBSPACE_CODING_RATE_SOFT_CUH
#define SUBSPACE_CODING_RATE_SOFT_CUH
#include "qr_update.cuh"

enum { COLUMNS = 32, ROW_LANES = 16, WARPS = ROW_THREADS / WARP };
enum { WELL, CARE, BAD }; /* a view */
static const int64_t MOST_BLOCKS = 1 << 20, LONGEST = 256;
static const int64_t STRIPE = 1 << 24;  /* entries of F at a time, where one row of pairs allows */
static const int64_t SQUARES = 1 << 23; /* entries of the matrices that are too large for a block, at a time */
static const int64_t CHUNK = 1 << 26;   /* entries of the inverses that are not kept */
static const int64_t AGAIN = 1 << 23;   /* float64 entries of the classes done with care at a time */

/* As in cpu/rates/coding_rate_soft.c, which says why. */
static const double MOST_LOSS_F32 = 1000, MOST_LOSS_F64 = 1e5, LEAST_RATE_F32 = 0.1, LEAST_MASS_F32 = 1e-20;
static const double OUTLIER = 10;
static const double TINY = 1e-8;
static const double CAREFUL = -1; /* in place of tr A_k^-1: the kept inverses are no use */

/* The pairs (a, b), a <= b, of whole rows a0 .. a1-1 of the packed upper half: `width` of them from `at` on. */
typedef struct stripe {
    int64_t a0, a1, at, width;
} stripe;

typedef struct soft_state { /* of a view */
    double spread;          /* d/eps max |z_i|^2 */
    int64_t is;             /* WELL, CARE or BAD */
} soft_state;

typedef struct soft_run {
    subspace_coding_rate_soft_args a;
    int64_t p, chunk, width; /* d(d+1)/2; classes and pairs at a time */
    int64_t squares, again;  /* classes too large for a block, and classes done with care, at a time */
    int64_t pad;             /* d, whole tiles */
    int backward, kept;
    double *t, *longest;            /* [k]; [LONGEST] maxima of |z_i|^2 */
    verdict *of;                    /* [k] */
    square *each, *careful;         /* [k] */
    int64_t *count, *careful_count; /* [chunks, 2] */
    soft_state *state;
    unsigned *meeting;
    void *f, *own_inverse; /* [n, width]; [chunk, p] or NULL */
    void *square_x, *y;    /* [squares, d, d], [squares pad, 64] or NULL */
    double *rest, *traces; /* [squares pad], [squares pad, 2] */
    double *x64, *y64, *rest64, *traces64, *v64,
        *dz64;     /* in place of the six before: [again, ...], [again, n, d], [n, d] */
    double *panel; /* [again, QR_ROWS, d] */
} soft_run;

/* ----------------------------------------------------------------------------- what a view is like */

/* Is there nothing to be seen to in this backward? The forward's inverses serve. */
template <typename T> static __device__ inline bool served(const soft_run &run, int64_t v)
{
    const T *stats = (const T *)run.a.stats;
    return run.kept && (run.a.k == 0 || (double)stats[(2 * v + 1) * run.a.k] != CAREFUL);
}

/* t_k of 32 classes a block, or NaN when one of their weights is negative; behind those, the longest of the rows of z.
 */
template <typename T> __global__ void __launch_bounds__(COLUMNS *ROW_LANES) examine(const soft_run run, int64_t v)
{
    __shared__ double part[ROW_LANES][COLUMNS + 1];
    const subspace_coding_rate_soft_args &a = run.a;
    const int64_t n = a.n, d = a.d, k = a.k, sums = CEIL_DIV(k, COLUMNS);
    const T *z = (const T *)a.z + v * n * d, *w = (const T *)a.weights + v * n * k;
    if (served<T>(run, v)) return;
    for (int64_t item = blockIdx.x; item < sums; item += gridDim.x) {
        const int64_t c = item * COLUMNS + threadIdx.x;
        double sum = 0;
        for (int64_t i = threadIdx.y; c < k && i < n; i += ROW_LANES)
            sum += w[i * k + c] >= 0 ? (double)w[i * k + c] : (double)NAN;
        part[threadIdx.y][threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.y == 0 && c < k) {
            sum = 0;
            for (int y = 0; y < ROW_LANES; y++) sum += part[y][threadIdx.x];
            run.t[c] = sum;
        }
        __syncthreads();
    }
    if (blockIdx.x >= LONGEST) return;
    double most = 0;
    for (int64_t i = blockIdx.x * ROW_LANES + threadIdx.y; i < n; i += MIN(gridDim.x, LONGEST) * ROW_LANES) {
        double sum = 0;
        for (int64_t j = threadIdx.x; j < d; j += WARP) sum += (double)z[i * d + j] * (double)z[i * d + j];
        sum = warp_sum(sum);
        most = most >= sum || isnan(most) ? most : sum;
    }
    most = block_max(most);
    if (threadIdx.x == 0 && threadIdx.y == 0) run.longest[blockIdx.x] = most;
}

/* The view's state and the lists of its classes; one block. */
template <typename T> __global__ void __launch_bounds__(ROW_THREADS) begin(const soft_run run, int64_t v, int maxima)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const bool packed = run.square_x == NULL, once = served<T>(run, v);
    double most = 0, least = INFINITY, bad = 0;
    for (int64_t c = threadIdx.x; c < a.k; c += blockDim.x) {
        const double t = once ? 1 : run.t[c], scale = (double)a.d / (t * a.eps);
        const int64_t side = t == 0 ? 0 : a.d;
        if (!(t >= 0 && t < INFINITY)) bad = 1;
        if (t > 0) least = fmin(least, t);
        run.each[c] = packed ? square{c % run.chunk * run.p, side, c, 0, scale}
                             : square{c % run.squares * a.d * a.d, side, c, c % run.squares * run.pad, scale};
        run.careful[c] = square{c % run.again * a.d * a.d, side, c, c % run.again * run.pad, scale};
        run.of[c] = verdict{0, (double)a.d, 0, 0, 1};
        const int64_t at_once = packed ? run.chunk : run.squares;
        if (c % at_once == 0) {
            const int64_t left = MIN(at_once, a.k - c);
            run.count[c / at_once * 2] = packed ? left : 0, run.count[c / at_once * 2 + 1] = packed ? 0 : left;
        }
        if (c % run.again == 0)
            run.careful_count[c / run.again * 2] = 0,
                                              run.careful_count[c / run.again * 2 + 1] = MIN(run.again, a.k - c);
    }
    for (int i = (int)threadIdx.x; !once && i < maxima; i += (int)blockDim.x)
        most = most >= run.longest[i] || isnan(most) ? most : run.longest[i];
    most = block_max(most), least = -block_max(-least), bad = block_max(bad);
    if (threadIdx.x == 0) {
        const bool again = run.kept ? !once : sizeof(T) == 4 && least < LEAST_MASS_F32;
        run.state->spread = (double)a.d / a.eps * most;
        run.state->is = bad > 0 || !(most < INFINITY) ? BAD : again ? CARE : WELL;
    }
}

/* Were the factors good enough? One block. */
template <typename T> __global__ void __launch_bounds__(ROW_THREADS) examine_factors(const soft_run run)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const double spread = run.state->spread, most = sizeof(T) == 4 ? MOST_LOSS_F32 : MOST_LOSS_F64;
    double worse = 0, mass = 0, rate = 0;
    for (int64_t c = threadIdx.x; c < a.k; c += blockDim.x) {
        const verdict of = run.of[c];
        const double loss = of.sum > 0 ? of.largest * fmax(of.sum / ((double)a.d - of.trace), spread / OUTLIER) : 0;
        if (!of.good || (spread > 0 && !(loss <= most))) worse = 1;
        mass += run.t[c], rate += run.t[c] * of.half;
    }
    worse = block_max(worse), mass = block_sum(mass), rate = block_sum(rate);
    if (sizeof(T) == 4 && spread > 0 && !(rate >= LEAST_RATE_F32 * mass)) worse = 1;
    if (threadIdx.x == 0 && run.state->is == WELL && worse > 0) run.state->is = CARE;
}

/* ------------------------------------------------------------------------------------- with care */

/* The blocks take turns. */
#define EACH_ITEM(item, items) for (int64_t item = blockIdx.x; item < (items); item += gridDim.x)

template <typename T>
static __device__ void careful_grams(const soft_run &run, int64_t v, int64_t k0, int64_t kc, double *shared)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const int64_t d = a.d, tiles = CEIL_DIV(d, RATE_TILE), upper = rate_upper(d);
    const rows<T> z = rows_of((const T *)a.z + v * a.n * d, (const int64_t *)NULL, a.n, a.n, d);
    EACH_ITEM(item, kc * upper)
    {
        const square q = run.careful[k0 + item / upper];
        rows<T> left = z;
        double sum[MY_ROWS][MY_COLS];
        int i, j;
        left.weight = (const T *)a.weights + v * a.n * a.k + k0 + item / upper, left.weight_ld = a.k;
        if (q.side == 0) continue;
        tile_of((int)(item % upper), (int)tiles, &i, &j);
        product<T, T, double, false, false>(left, i * RATE_TILE, z, j * RATE_TILE, false, 0, a.n, shared, sum);
        for (int r = 0; r < MY_ROWS; r++)
            for (int c = 0; c < MY_COLS; c++) {
                const int64_t row = i * RATE_TILE + my_row() + r, col = j * RATE_TILE + my_col() + c;
                if (row < d && col < d) run.x64[q.at + row * d + col] = q.scale * sum[r][c];
            }
    }
}

/* The factors that float64 has lost, from the points; a block for a class */
template <typename T>
static __device__ void careful_points(const soft_run &run, int64_t v, int64_t k0, int64_t kc, int wanted)
{
    const subspace_coding_rate_soft_args &a = run.a;
    rows<T> z = rows_of((const T *)a.z + v * a.n * a.d, (const int64_t *)NULL, a.n, a.n, a.d);
    EACH_ITEM(item, kc)
    {
        const square q = run.careful[k0 + item];
        if (q.side == 0 || run.of[q.slot].good) continue;
        __syncthreads();
        z.weight = (const T *)a.weights + v * a.n * a.k + k0 + item, z.weight_ld = a.k;
        eliminate_points(z, false, q.scale, a.d, a.n, wanted, run.x64 + q.at, run.panel + item * QR_ROWS * a.d,
                         &run.of[q.slot]);
    }
}

/* tr A_k^-1; d where it differs by next to nothing, and dw_ik has nothing for all i */
static __device__ inline double trace_of(const verdict &of, int64_t d)
{
    return of.sum < TINY ? (double)d : of.trace;
}

static __device__ inline double shift_of(double half, double trace, int64_t d)
{
    const double left = (double)d - trace;
    return left == 0 ? 0 : half - left / 2;
}

/* V = Z R */
template <typename T>
static __device__ void careful_products(const soft_run &run, int64_t v, int64_t k0, int64_t kc, double *shared)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const int64_t n = a.n, d = a.d, across = CEIL_DIV(d, RATE_TILE), tiles = CEIL_DIV(n, RATE_TILE) * across;
    const rows<T> z = rows_of((const T *)a.z + v * n * d, (const int64_t *)NULL, n, n, d);
    EACH_ITEM(item, kc * tiles)
    {
        const square q = run.careful[k0 + item / tiles];
        const rows<double> root = rows_of((const double *)run.x64 + q.at, (const int64_t *)NULL, d, d, d);
        const int64_t i0 = item % tiles / across * RATE_TILE, j0 = item % across * RATE_TILE;
        double sum[MY_ROWS][MY_COLS], *const to = run.v64 + item / tiles * n * d;
        if (q.side == 0) continue;
        product<T, double, double, true, false>(z, i0, root, j0, false, 0, MIN(d, j0 + RATE_TILE), shared, sum);
        for (int r = 0; r < MY_ROWS; r++)
            for (int c = 0; c < MY_COLS; c++) {
                const int64_t row = i0 + my_row() + r, col = j0 + my_col() + c;
                if (row < n && col < d) to[row * d + col] = sum[r][c];
            }
    }
}

/* dw, a warp for an entry, and dZ += diag(w_k) V R', all classes of the chunk in their order */
template <typename T>
static __device__ void careful_gradients(const soft_run &run, int64_t v, int64_t k0, int64_t kc, double *shared)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const int64_t n = a.n, d = a.d, across = CEIL_DIV(d, RATE_TILE), warps = blockDim.x / WARP;
    const double drate = (double)((const T *)a.drate)[v] / (double)n, scale = (double)d / a.eps;
    const T *const w = (const T *)a.weights + v * n * a.k;
    const bool last = k0 + kc == a.k;
    for (int64_t i = blockIdx.x * warps + threadIdx.x / WARP; a.dweights && i < n * kc; i += gridDim.x * warps) {
        const int64_t c = k0 + i % kc;
        const double *const row = run.v64 + (i % kc * n + i / kc) * d;
        const bool empty = run.careful[c].side == 0;
        double sum = 0;
        for (int64_t j = threadIdx.x % WARP; !empty && j < d; j += WARP) sum += row[j] * row[j];
        sum = warp_sum(sum);
        const double shift = shift_of(run.of[c].half, trace_of(run.of[c], d), d);
        if (threadIdx.x % WARP == 0)
            ((T *)a.dweights)[v * n * a.k + i / kc * a.k + c] = empty ? (T)0 : (T)(drate * (shift + scale / 2 * sum));
    }
    EACH_ITEM(item, a.dz ? CEIL_DIV(n, RATE_TILE) * across : 0)
    {
        const int64_t i0 = item / across * RATE_TILE, j0 = item % across * RATE_TILE;
        for (int64_t c = 0; c < kc; c++) {
            const square q = run.careful[k0 + c];
            const rows<double> root = rows_of((const double *)run.x64 + q.at, (const int64_t *)NULL, d, d, d);
            const rows<double> left = rows_of((const double *)run.v64 + c * n * d, (const int64_t *)NULL, n, n, d);
            double sum[MY_ROWS][MY_COLS];
            if (q.side) product<double, double, double, true, true>(left, i0, root, j0, false, j0, d, shared, sum);
            for (int r = 0; r < MY_ROWS; r++)
                for (int l = 0; l < MY_COLS; l++) {
                    const int64_t row = i0 + my_row() + r, col = j0 + my_col() + l;
                    if (row >= n || col >= d) continue;
                    const double before = k0 + c > 0 ? run.dz64[row * d + col] : 0;
                    const double now = before + (q.side ? (double)w[row * a.k + k0 + c] * sum[r][l] : 0);
                    run.dz64[row * d + col] = now;
                    if (last && c == kc - 1) ((T *)a.dz)[(v * n + row) * d + col] = (T)(drate * scale * now);
                }
        }
    }
}

/* A view that needs care; a cooperative launch */
template <typename T> __global__ void __launch_bounds__(RATE_THREADS) careful_view(const soft_run run, int64_t v)
{
    DYNAMIC_SHARED(shared);
    double *const left = shared, *const right = left + RATE_TILE * RATE_PAD;
    squares b = {};
    if (run.state->is != CARE) return;
    b.lists = 1, b.most_large = b.slots = run.again, b.wanted = run.backward ? ROOT : LOGDET;
    b.x = run.x64, b.of = run.of, b.worst = LOST, b.failed = 0;
    b.y = run.y64, b.rest = run.rest64, b.traces = run.traces64, b.meeting = run.meeting;
    for (int64_t k0 = 0; k0 < run.a.k; k0 += run.again) {
        const int64_t kc = MIN(run.again, run.a.k - k0);
        b.large = run.careful + k0, b.count = run.careful_count + k0 / run.again * 2;
        careful_grams<T>(run, v, k0, kc, shared);
        grid_sync(run.meeting);
        eliminate_together(b, CEIL_DIV(run.a.d, RATE_TILE), left, right,
                           elimination_space_at(right + RATE_TILE * RATE_PAD, RATE_TILE / PANEL));
        grid_sync(run.meeting);
        careful_points<T>(run, v, k0, kc, b.wanted);
        grid_sync(run.meeting);
        if (!run.backward) continue;
        careful_products<T>(run, v, k0, kc, shared);
        grid_sync(run.meeting);
        careful_gradients<T>(run, v, k0, kc, shared);
        grid_sync(run.meeting);
    }
}

template <typename T>
static subspace_status with_care(subspace_ctx *ctx, const device_limits *limits, const soft_run *r, int64_t v)
{
    const size_t shared = rate_large_shared(sizeof(double));
    int64_t blocks = 0;
    if (r->a.k == 0) return SUBSPACE_OK;
    TRY(resident_blocks(ctx, limits, careful_view<T>, RATE_THREADS, shared, &blocks));
    blocks = MAX(1, MIN(blocks, r->again * CEIL_DIV(MAX(r->a.n, r->a.d), RATE_TILE) * CEIL_DIV(r->a.d, RATE_TILE)));
    CUDA(ctx, cudaMemsetAsync(r->meeting, 0, 2 * sizeof(unsigned), (cudaStream_t)ctx->stream));
    LAUNCH_COOPERATIVE(ctx, careful_view<T>, (unsigned)blocks, RATE_THREADS, shared, *r, v);
    return SUBSPACE_OK;
}

#endif
