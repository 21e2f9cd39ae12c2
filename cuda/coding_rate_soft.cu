/* coding_rate_soft.cu - the coding rate of soft memberships on the GPU.
 *
 *     A_k = I + d/(t_k eps) Z' diag(w_k) Z,   t_k = sum_i w_ik,   h_k = 1/2 logdet A_k,   rate = sum_k t_k h_k / n
 *     dw_ik = (h_k - (d - tr A_k^-1)/2) / n + d/(2n eps) z_i' A_k^-1 z_i
 *     dz_i  = d/(n eps) sum_k w_ik A_k^-1 z_i
 *
 * The face-splitting product of cpu/face_split.h for any number of classes: a tile of F[i, (a, b)] = z_ia z_ib at a
 * time, and products of cuBLAS, never in TF32: 2 n k p flops in the forward, p = d(d+1)/2, and 4 n k p in the backward.
 * F is written and read once for each product, 1/k of their flops in bytes. The factors are cholesky.cuh's, in place.
 *
 * As cpu/coding_rate_soft.c, but decided on the device: a view that float32 (or the inverse) is too short for is done
 * again with care, class by class in float64 and with the root R = U^-1 of A^-1 = R R': v = R' z, q = |v|^2,
 * A^-1 z = R v cancel no more than triangular solves do. One cooperative launch, whose blocks leave at once where all
 * was well. A view with a negative or non-finite weight or feature has the rate NaN.
 */
#include "cholesky.cuh"
#include "linalg.cuh"

enum { COLUMNS = 32, ROW_LANES = 16, WARPS = ROW_THREADS / WARP };
enum { WELL, CARE, BAD }; /* a view */
static const int64_t MOST_BLOCKS = 1 << 20, LONGEST = 256;
static const int64_t TILE = 1 << 24;    /* entries of F at a time, where one row of pairs allows */
static const int64_t SQUARES = 1 << 23; /* entries of the matrices that are too large for a block, at a time */
static const int64_t CHUNK = 1 << 26;   /* entries of the inverses that are not kept */
static const int64_t AGAIN = 1 << 23;   /* float64 entries of the classes done with care at a time */

/* As in cpu/coding_rate_soft.c, which says why. */
static const double MOST_LOSS_F32 = 1000, MOST_LOSS_F64 = 1e5, LEAST_RATE_F32 = 0.1, LEAST_MASS_F32 = 1e-20;
static const double OUTLIER = 10;
static const double CAREFUL = -1; /* in place of tr A_k^-1: the kept inverses are no use */

/* The pairs (a, b), a <= b, of whole rows a0 .. a1-1 of the packed upper half: `width` of them from `at` on. */
typedef struct tile {
    int64_t a0, a1, at, width;
} tile;

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
    double *rest, *bands;  /* [squares pad], [squares pad, 2] */
    double *x64, *y64, *rest64, *bands64, *v64,
        *dz64; /* in place of the six before: [again, ...], [again, n, d], [n, d] */
} soft_run;

static tile tile_from(const soft_run *r, int64_t a0, int64_t at)
{
    const int64_t d = r->a.d;
    tile t = {a0, a0, at, 0};
    while (t.a1 < d && (t.width == 0 || t.width + d - t.a1 <= r->width)) t.width += d - t.a1++;
    return t;
}

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
    const int64_t n = a.n, d = a.d, k = a.k, sums = rate_ceil(k, COLUMNS);
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

/* --------------------------------------------------------------------------------- the fast way */

/* f[i, (a, b)] = z_ia z_ib, or with a factor of 2 that where a < b; a block for a point, a warp for a row of pairs */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) pairs(int64_t n, int64_t d, const T *z, tile t, T factor, T *f)
{
    for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
        const T *const zi = z + i * d;
        for (int64_t a = t.a0 + threadIdx.x / WARP; a < t.a1; a += WARPS) {
            T *const row = f + i * t.width + row_begins(1, d, a) - t.at;
            const T za = zi[a];
            for (int64_t b = a + threadIdx.x % WARP; b < d; b += WARP) row[b] = (b > a ? factor : (T)1) * za * zi[b];
        }
    }
}

/* dz_ic += sum_b M_i(c, b) z_ib + sum_{a < c} M_i(a, c) z_ia over the pairs of a tile; a block for a point, and a warp
 * for a row of M, then a thread for a column. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) apply_pairs(int64_t n, int64_t d, const T *z, tile t, const T *m, T *dz)
{
    for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
        const T *const zi = z + i * d, *const mi = m + i * t.width - t.at;
        T *const to = dz + i * d;
        for (int64_t a = t.a0 + threadIdx.x / WARP; a < t.a1; a += WARPS) {
            const T *const row = mi + row_begins(1, d, a);
            T sum = 0;
            for (int64_t b = a + threadIdx.x % WARP; b < d; b += WARP) sum += row[b] * zi[b];
            sum = warp_sum(sum);
            if (threadIdx.x % WARP == 0) to[a] += sum;
        }
        __syncthreads();
        for (int64_t c = t.a0 + threadIdx.x; c < d; c += blockDim.x) {
            T sum = 0;
#pragma unroll 4
            for (int64_t a = t.a0; a < MIN(t.a1, c); a++) sum += mi[row_begins(1, d, a) + c] * zi[a];
            to[c] += sum;
        }
        __syncthreads();
    }
}

static unsigned point_blocks(const soft_run *r)
{
    return (unsigned)MIN(r->a.n, MOST_BLOCKS);
}

/* A product of this op's: float32 in full. */
static subspace_status exactly(subspace_ctx *ctx, const soft_run *r, bool transa, bool transb, int64_t m, int64_t n,
                               int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb, bool onto, void *c,
                               int64_t ldc)
{
    gemms g = {};
    g.m = m, g.n = n, g.k = k, g.count = 1, g.transa = transa, g.transb = transb, g.exact = true;
    g.ab = g.cc = r->a.dtype, g.alpha = 1, g.beta = onto;
    g.a = a, g.b = b, g.c = c, g.lda = lda, g.ldb = ldb, g.ldc = ldc;
    return gemm_all(ctx, &g);
}

/* G = W' F of a chunk of classes, packed, into `inverse` */
template <typename T>
static subspace_status grams_split(subspace_ctx *ctx, const soft_run *r, int64_t kc, const T *z, const T *w, T *inverse)
{
    const subspace_coding_rate_soft_args *a = &r->a;
    T *f = (T *)r->f;
    for (tile t = tile_from(r, 0, 0); t.width > 0; t = tile_from(r, t.a1, t.at + t.width)) {
        LAUNCH(ctx, pairs<T>, point_blocks(r), ROW_THREADS, 0, a->n, a->d, z, t, (T)1, f);
        TRY(exactly(ctx, r, true, false, kc, t.width, a->n, w, a->k, f, t.width, false, inverse + t.at, r->p));
    }
    return SUBSPACE_OK;
}

/* q = F2 B' into dw, and dz += the use of M = W B, of a chunk of classes */
template <typename T>
static subspace_status gradients_split(subspace_ctx *ctx, const soft_run *r, int64_t kc, const T *z, const T *w,
                                       const T *inverse, T *dz, T *dw)
{
    const subspace_coding_rate_soft_args *a = &r->a;
    T *f = (T *)r->f;
    for (tile t = tile_from(r, 0, 0); t.width > 0; t = tile_from(r, t.a1, t.at + t.width)) {
        if (dw) {
            LAUNCH(ctx, pairs<T>, point_blocks(r), ROW_THREADS, 0, a->n, a->d, z, t, (T)2, f);
            TRY(exactly(ctx, r, false, true, a->n, kc, t.width, f, t.width, inverse + t.at, r->p, t.at > 0, dw, a->k));
        }
        if (!dz) continue;
        TRY(exactly(ctx, r, false, false, a->n, t.width, kc, w, a->k, inverse + t.at, r->p, false, f, t.width));
        LAUNCH(ctx, apply_pairs<T>, point_blocks(r), ROW_THREADS, 0, a->n, a->d, z, t, (const T *)f, dz);
    }
    return SUBSPACE_OK;
}

/* Packed G of some classes as squares of X; blocks (x, class). And back: the inverses, or 0 of an empty class. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    unpack(int64_t d, int64_t count, const square *each, T *packed, T *x, int back)
{
    for (int64_t c = blockIdx.y; c < count; c += gridDim.y) {
        const square q = each[c];
        T *const from = packed + c * (d * (d + 1) / 2), *const to = x + q.at;
        for (int64_t i = blockIdx.x; i < d; i += gridDim.x)
            for (int64_t j = i + threadIdx.x; j < d; j += blockDim.x) {
                T *const entry = from + row_begins(1, d, i) + j;
                if (back) *entry = q.side ? to[i * d + j] : (T)0;
                else to[i * d + j] = (T)q.scale * *entry;
            }
    }
}

/* Gram matrices and factors of a chunk of classes from k0 on. */
template <typename T>
static subspace_status make_factors(subspace_ctx *ctx, const device_limits *limits, const soft_run *r, int64_t k0,
                                    int64_t kc, const T *z, const T *w, T *inverse)
{
    const int64_t d = r->a.d, at_once = r->square_x ? r->squares : r->chunk;
    squares b = {};
    TRY(grams_split<T>(ctx, r, kc, z, w, inverse));
    b.lists = 1, b.wanted = INVERSE, b.packed = r->square_x == NULL;
    b.most = b.slots = b.most_large = at_once;
    b.of = r->of, b.worst = INFINITY, b.failed = 0;
    b.y = r->y, b.rest = r->rest, b.bands = r->bands, b.meeting = r->meeting;
    b.x = r->square_x ? r->square_x : inverse;
    for (int64_t k = k0; k < k0 + kc; k += at_once) { /* chunks are whole numbers of that */
        const int64_t count = MIN(at_once, k0 + kc - k);
        const dim3 grid((unsigned)MIN(d, 4096), (unsigned)MIN(count, 65535));
        T *const packed = inverse + (k - k0) * r->p;
        b.small = b.large = r->each + k, b.count = r->count + k / at_once * 2;
        if (r->square_x) LAUNCH(ctx, unpack<T>, grid, ROW_THREADS, 0, d, count, b.large, packed, (T *)r->square_x, 0);
        TRY(sweep_all<T>(ctx, limits, &b, d, d));
        if (r->square_x) LAUNCH(ctx, unpack<T>, grid, ROW_THREADS, 0, d, count, b.large, packed, (T *)r->square_x, 1);
    }
    return SUBSPACE_OK;
}

/* ------------------------------------------------------------------------------------- with care */

/* The classes that an item-th tile, of `tiles` a class, belongs to; false: it is empty, or there are no more. */
#define EACH_ITEM(item, items) for (int64_t item = blockIdx.x; item < (items); item += gridDim.x)

template <typename T>
static __device__ void careful_grams(const soft_run &run, int64_t v, int64_t k0, int64_t kc, double *shared)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const int64_t d = a.d, tiles = rate_ceil(d, RATE_TILE), upper = rate_upper(d);
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

/* V = Z R */
template <typename T>
static __device__ void careful_products(const soft_run &run, int64_t v, int64_t k0, int64_t kc, double *shared)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const int64_t n = a.n, d = a.d, across = rate_ceil(d, RATE_TILE), tiles = rate_ceil(n, RATE_TILE) * across;
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
    const int64_t n = a.n, d = a.d, across = rate_ceil(d, RATE_TILE), warps = blockDim.x / WARP;
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
        const double shift = run.of[c].half - ((double)d - run.of[c].trace) / 2;
        if (threadIdx.x % WARP == 0)
            ((T *)a.dweights)[v * n * a.k + i / kc * a.k + c] = empty ? (T)0 : (T)(drate * (shift + scale / 2 * sum));
    }
    EACH_ITEM(item, a.dz ? rate_ceil(n, RATE_TILE) * across : 0)
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
    b.x = run.x64, b.of = run.of, b.worst = INFINITY, b.failed = NAN;
    b.y = run.y64, b.rest = run.rest64, b.bands = run.bands64, b.meeting = run.meeting;
    for (int64_t k0 = 0; k0 < run.a.k; k0 += run.again) {
        const int64_t kc = MIN(run.again, run.a.k - k0);
        b.large = run.careful + k0, b.count = run.careful_count + k0 / run.again * 2;
        careful_grams<T>(run, v, k0, kc, shared);
        grid_sync(run.meeting);
        sweep_together(b, rate_ceil(run.a.d, RATE_TILE), left, right,
                       sweep_space_at(right + RATE_TILE * RATE_PAD, RATE_TILE / PANEL));
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
    blocks = MAX(1, MIN(blocks, r->again * rate_ceil(MAX(r->a.n, r->a.d), RATE_TILE) * rate_ceil(r->a.d, RATE_TILE)));
    CUDA(ctx, cudaMemsetAsync(r->meeting, 0, 2 * sizeof(unsigned), (cudaStream_t)ctx->stream));
    LAUNCH_COOPERATIVE(ctx, careful_view<T>, (unsigned)blocks, RATE_THREADS, shared, *r, v);
    return SUBSPACE_OK;
}

/* --------------------------------------------------------------------------------------- a view */

/* The rate, and the statistics; no inverses are left of a view that needed care. */
template <typename T> __global__ void __launch_bounds__(ROW_THREADS) finish_rate(const soft_run run, int64_t v)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const int64_t is = run.state->is;
    T *const inverse = (T *)a.inverse + (a.inverse ? v * a.k * run.p : 0), *const stats = (T *)a.stats;
    double sum = 0;
    if (is == CARE && inverse)
        for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.k * run.p;
             i += (int64_t)gridDim.x * blockDim.x)
            inverse[i] = 0;
    if (blockIdx.x > 0) return;
    for (int64_t c = threadIdx.x; c < a.k; c += blockDim.x) {
        const verdict of = run.of[c];
        sum += of.good ? run.t[c] * of.half : (double)NAN;
        if (stats)
            stats[2 * v * a.k + c] = (T)of.half, stats[(2 * v + 1) * a.k + c] = (T)(is == CARE ? CAREFUL : of.trace);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) ((T *)a.rate)[v] = is == BAD ? (T)NAN : (T)(sum / (double)a.n);
}

/* q becomes dw, columns k0 .. k0 + kc - 1 of [n, k]; h and trace from the forward's stats, or its own */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) finish_dw(const soft_run run, int64_t v, int64_t k0, int64_t kc)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const T *const stats = run.kept ? (const T *)a.stats + 2 * v * a.k : NULL;
    const double drate = (double)((const T *)a.drate)[v] / (double)a.n, d = (double)a.d;
    for (int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; at < a.n * kc;
         at += (int64_t)gridDim.x * blockDim.x) {
        const int64_t c = k0 + at % kc;
        T *const dw = (T *)a.dweights + (v * a.n + at / kc) * a.k + c;
        const double half = stats ? (double)stats[c] : run.of[c].half,
                     left = d - (stats ? (double)stats[a.k + c] : run.of[c].trace);
        *dw = (T)(drate * (d / (2 * a.eps) * (double)*dw + half - left / 2));
    }
}

template <typename T> __global__ void __launch_bounds__(ROW_THREADS) finish_dz(const soft_run run, int64_t v)
{
    const subspace_coding_rate_soft_args &a = run.a;
    const double scale = (double)((const T *)a.drate)[v] * (double)a.d / ((double)a.n * a.eps);
    T *const dz = (T *)a.dz + v * a.n * a.d;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.n * a.d;
         i += (int64_t)gridDim.x * blockDim.x)
        dz[i] = (T)(scale * (double)dz[i]);
}

static unsigned blocks_for(int64_t count)
{
    return (unsigned)MAX(1, MIN(CEIL_DIV(count, ROW_THREADS), MOST_BLOCKS));
}

template <typename T> static subspace_status look_at_view(subspace_ctx *ctx, const soft_run *r, int64_t v)
{
    const int64_t blocks = MIN(MAX(CEIL_DIV(r->a.k, COLUMNS), MIN(LONGEST, CEIL_DIV(r->a.n, ROW_LANES))), MOST_BLOCKS);
    LAUNCH(ctx, examine<T>, (unsigned)blocks, dim3(COLUMNS, ROW_LANES), 0, *r, v);
    LAUNCH(ctx, begin<T>, 1, ROW_THREADS, 0, *r, v, (int)MIN(blocks, LONGEST));
    return SUBSPACE_OK;
}

template <typename T>
static subspace_status forward_view(subspace_ctx *ctx, const device_limits *limits, const soft_run *r, int64_t v)
{
    const subspace_coding_rate_soft_args *a = &r->a;
    const T *z = (const T *)a->z + v * a->n * a->d, *w = (const T *)a->weights + v * a->n * a->k;
    TRY(look_at_view<T>(ctx, r, v));
    for (int64_t k0 = 0; k0 < a->k; k0 += r->chunk) {
        T *inverse = a->inverse ? (T *)a->inverse + (v * a->k + k0) * r->p : (T *)r->own_inverse;
        TRY(make_factors<T>(ctx, limits, r, k0, MIN(r->chunk, a->k - k0), z, w + k0, inverse));
    }
    LAUNCH(ctx, examine_factors<T>, 1, ROW_THREADS, 0, *r);
    TRY(with_care<T>(ctx, limits, r, v));
    LAUNCH(ctx, finish_rate<T>, (unsigned)(4 * limits->multiprocessors), ROW_THREADS, 0, *r, v);
    return SUBSPACE_OK;
}

template <typename T>
static subspace_status backward_view(subspace_ctx *ctx, const device_limits *limits, const soft_run *r, int64_t v)
{
    const subspace_coding_rate_soft_args *a = &r->a;
    const T *z = (const T *)a->z + v * a->n * a->d, *w = (const T *)a->weights + v * a->n * a->k;
    T *dz = a->dz ? (T *)a->dz + v * a->n * a->d : NULL, *dw = a->dweights ? (T *)a->dweights + v * a->n * a->k : NULL;
    if (dz) CUDA(ctx, cudaMemsetAsync(dz, 0, (size_t)(a->n * a->d) * sizeof(T), (cudaStream_t)ctx->stream));
    TRY(look_at_view<T>(ctx, r, v));
    for (int64_t k0 = 0; k0 < a->k; k0 += r->chunk) {
        const int64_t kc = MIN(r->chunk, a->k - k0);
        T *inverse = r->kept ? (T *)a->inverse + (v * a->k + k0) * r->p : (T *)r->own_inverse;
        if (!r->kept) TRY(make_factors<T>(ctx, limits, r, k0, kc, z, w + k0, inverse));
        TRY(gradients_split<T>(ctx, r, kc, z, w + k0, inverse, dz, dw ? dw + k0 : NULL));
        if (dw) LAUNCH(ctx, finish_dw<T>, blocks_for(a->n * kc), ROW_THREADS, 0, *r, v, k0, kc);
    }
    if (dz) LAUNCH(ctx, finish_dz<T>, blocks_for(a->n * a->d), ROW_THREADS, 0, *r, v);
    if (!r->kept) LAUNCH(ctx, examine_factors<T>, 1, ROW_THREADS, 0, *r);
    return with_care<T>(ctx, limits, r, v);
}

static void plan(soft_run *r, const subspace_coding_rate_soft_args *a, bool backward, char *base, size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const int64_t n = a->n, d = a->d, k = a->k;
    *r = soft_run{};
    r->a = *a;
    r->backward = backward, r->kept = backward && a->inverse;
    r->p = d * (d + 1) / 2, r->pad = rate_ceil(d, RATE_TILE) * RATE_TILE;
    const bool large = d > rate_small(item);
    r->squares = MAX(1, MIN(k, SQUARES / (d * d)));
    r->chunk = MAX(1, r->kept || a->inverse ? k : MIN(k, CHUNK / r->p));
    if (large && r->chunk < k) r->chunk = MAX(1, r->chunk / r->squares) * r->squares;
    r->width = MAX(d, MIN(TILE / n, r->p));
    r->again = MAX(1, MIN(k, AGAIN / (d * d + r->pad * RATE_TILE + (r->backward ? n * d : 0))));
    r->t = (double *)carve(base, bytes, k, sizeof(double));
    r->longest = (double *)carve(base, bytes, LONGEST, sizeof(double));
    r->of = (verdict *)carve(base, bytes, k, sizeof(verdict));
    r->each = (square *)carve(base, bytes, k, sizeof(square));
    r->careful = (square *)carve(base, bytes, k, sizeof(square));
    r->count = (int64_t *)carve(base, bytes, 2 * k, sizeof(int64_t));
    r->careful_count = (int64_t *)carve(base, bytes, 2 * k, sizeof(int64_t));
    r->state = (soft_state *)carve(base, bytes, 1, sizeof(soft_state));
    r->meeting = (unsigned *)carve(base, bytes, 2, sizeof(unsigned));

    size_t fast = *bytes, careful = *bytes;
    r->f = carve(base, &fast, n * r->width, item);
    if (!a->inverse) r->own_inverse = carve(base, &fast, r->chunk * r->p, item);
    if (large && !r->kept) {
        r->square_x = carve(base, &fast, r->squares * d * d, item);
        r->y = carve(base, &fast, r->squares * r->pad * RATE_TILE, item);
        r->rest = (double *)carve(base, &fast, r->squares * r->pad, sizeof(double));
        r->bands = (double *)carve(base, &fast, r->squares * r->pad * 2, sizeof(double));
    }
    r->x64 = (double *)carve(base, &careful, r->again * d * d, sizeof(double));
    r->y64 = (double *)carve(base, &careful, r->again * r->pad * RATE_TILE, sizeof(double));
    r->rest64 = (double *)carve(base, &careful, r->again * r->pad, sizeof(double));
    r->bands64 = (double *)carve(base, &careful, r->again * r->pad * 2, sizeof(double));
    if (r->backward) r->v64 = (double *)carve(base, &careful, r->again * n * d, sizeof(double));
    if (r->backward && a->dz) r->dz64 = (double *)carve(base, &careful, n * d, sizeof(double));
    *bytes = MAX(fast, careful);
}

extern "C" size_t subspace_coding_rate_soft_workspace_cuda(const subspace_ctx *,
                                                           const subspace_coding_rate_soft_args *a)
{
    size_t bytes = 0;
    soft_run r;
    if (a->n <= 0 || a->d <= 0 || a->v <= 0 || a->k < 0) return 0;
    plan(&r, a, a->drate != NULL, NULL, &bytes);
    return bytes;
}

static subspace_status run_views(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a, bool backward)
{
    size_t bytes = 0;
    soft_run r;
    device_limits limits;
    TRY(subspace_coding_rate_soft_check(ctx, a));
    CHECK(ctx, a->d < 1 << 16, SUBSPACE_INVALID_ARGUMENT, "coding_rate_soft: %lld features are too many",
          (long long)a->d);
    if (a->v == 0) return SUBSPACE_OK;
    plan(&r, a, backward, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "coding_rate_soft: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    TRY(limits_of(ctx, &limits));
    for (int64_t v = 0; v < a->v; v++)
        if (backward)
            TRY(a->dtype == SUBSPACE_F64 ? backward_view<double>(ctx, &limits, &r, v)
                                         : backward_view<float>(ctx, &limits, &r, v));
        else
            TRY(a->dtype == SUBSPACE_F64 ? forward_view<double>(ctx, &limits, &r, v)
                                         : forward_view<float>(ctx, &limits, &r, v));
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_coding_rate_soft_cuda(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a)
{
    return run_views(ctx, a, false);
}

extern "C" subspace_status subspace_coding_rate_soft_backward_cuda(subspace_ctx *ctx,
                                                                   const subspace_coding_rate_soft_args *a)
{
    return run_views(ctx, a, true);
}
