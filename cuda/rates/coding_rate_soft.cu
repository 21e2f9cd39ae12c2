/* coding_rate_soft.cu - the coding rate of soft memberships on the GPU.
 *
 *     A_k = I + d/(t_k eps) Z' diag(w_k) Z,   t_k = sum_i w_ik,   h_k = 1/2 logdet A_k,   rate = sum_k t_k h_k / n
 *     dw_ik = (h_k - (d - tr A_k^-1)/2) / n + d/(2n eps) z_i' A_k^-1 z_i
 *     dz_i  = d/(n eps) sum_k w_ik A_k^-1 z_i
 *
 * The face-splitting product of cpu/rates/face_split.h for any number of classes: a stripe of F[i, (a, b)] = z_ia z_ib
 * at a time, and products of cuBLAS, never in TF32: 2 n k p flops in the forward, p = d(d+1)/2, and 4 n k p in the
 * backward. F is written and read once for each product, 1/k of their flops in bytes. The factors are cholesky.cuh's,
 * in place.
 *
 * As cpu/rates/coding_rate_soft.c, but decided on the device: a view that float32 (or the inverse) is too short for is
 * done again with care, class by class in float64 and with the root R = U^-1 of A^-1 = R R': v = R' z, q = |v|^2, A^-1
 * z = R v cancel no more than triangular solves do; of the points themselves, where float64 loses A, too. One
 * cooperative launch, whose blocks leave at once where all was well. A view with a negative or non-finite weight or
 * feature has the rate NaN.
 */
#include "coding_rate_soft.cuh"
#include "linalg.cuh"

static stripe stripe_from(const soft_run *r, int64_t a0, int64_t at)
{
    const int64_t d = r->a.d;
    stripe t = {a0, a0, at, 0};
    while (t.a1 < d && (t.width == 0 || t.width + d - t.a1 <= r->width)) t.width += d - t.a1++;
    return t;
}

/* --------------------------------------------------------------------------------- the fast way */

/* f[i, (a, b)] = z_ia z_ib, or with a factor of 2 that where a < b; a block for a point, a warp for a row of pairs */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) pairs(int64_t n, int64_t d, const T *z, stripe t, T factor, T *f)
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

/* dz_ic += sum_b M_i(c, b) z_ib + sum_{a < c} M_i(a, c) z_ia over the pairs of a stripe; a block for a point, and a
 * warp for a row of M, then a thread for a column. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    apply_pairs(int64_t n, int64_t d, const T *z, stripe t, const T *m, T *dz)
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
    for (stripe t = stripe_from(r, 0, 0); t.width > 0; t = stripe_from(r, t.a1, t.at + t.width)) {
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
    for (stripe t = stripe_from(r, 0, 0); t.width > 0; t = stripe_from(r, t.a1, t.at + t.width)) {
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
    b.y = r->y, b.rest = r->rest, b.traces = r->traces, b.meeting = r->meeting;
    b.x = r->square_x ? r->square_x : inverse;
    for (int64_t k = k0; k < k0 + kc; k += at_once) { /* chunks are whole numbers of that */
        const int64_t count = MIN(at_once, k0 + kc - k);
        const dim3 grid((unsigned)MIN(d, 4096), (unsigned)MIN(count, 65535));
        T *const packed = inverse + (k - k0) * r->p;
        b.small = b.large = r->each + k, b.count = r->count + k / at_once * 2;
        if (r->square_x) LAUNCH(ctx, unpack<T>, grid, ROW_THREADS, 0, d, count, b.large, packed, (T *)r->square_x, 0);
        TRY(eliminate_all(ctx, limits, sizeof(T) == 8, &b, d, d));
        if (r->square_x) LAUNCH(ctx, unpack<T>, grid, ROW_THREADS, 0, d, count, b.large, packed, (T *)r->square_x, 1);
    }
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
            stats[2 * v * a.k + c] = (T)of.half,
                                stats[(2 * v + 1) * a.k + c] = (T)(is == CARE ? CAREFUL : trace_of(of, a.d));
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
                     trace = stats ? (double)stats[a.k + c] : trace_of(run.of[c], a.d);
        *dw = (T)(drate * (d / (2 * a.eps) * (double)*dw + shift_of(half, trace, a.d)));
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
    r->p = d * (d + 1) / 2, r->pad = CEIL_DIV(d, RATE_TILE) * RATE_TILE;
    const bool large = d > rate_small(item);
    r->squares = MAX(1, MIN(k, SQUARES / (d * d)));
    r->chunk = MAX(1, r->kept || a->inverse ? k : MIN(k, CHUNK / r->p));
    if (large && r->chunk < k) r->chunk = MAX(1, r->chunk / r->squares) * r->squares;
    r->width = MAX(d, MIN(STRIPE / n, r->p));
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
        r->traces = (double *)carve(base, &fast, r->squares * r->pad * 2, sizeof(double));
    }
    r->x64 = (double *)carve(base, &careful, r->again * d * d, sizeof(double));
    r->y64 = (double *)carve(base, &careful, r->again * r->pad * RATE_TILE, sizeof(double));
    r->rest64 = (double *)carve(base, &careful, r->again * r->pad, sizeof(double));
    r->traces64 = (double *)carve(base, &careful, r->again * r->pad * 2, sizeof(double));
    r->panel = (double *)carve(base, &careful, r->again * QR_ROWS * d, sizeof(double));
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
