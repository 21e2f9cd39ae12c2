/* coding_rate_soft.cu - the coding rate of soft memberships on the GPU.
 *
 *     A_k = I + d/(t_k eps) Z' diag(w_k) Z,   h_k = 1/2 logdet A_k,   rate = sum_k t_k h_k / n
 *
 * The face-splitting product of cpu/face_split.h for any number of classes: a tile of F[i, (a, b)] = z_ia z_ib at a
 * time, and GEMMs of cuBLAS. The factors are swept in float64, a block of threads for a class and a pivot at a time.
 *
 * Unlike the CPU's kernel this one looks at no value on the host. A view with a negative or non-finite weight or
 * feature gets the rate NaN, and no view is run with care: where features have collapsed, or eps is tiny, float32
 * inverses lose digits in proportion to the condition of A_k. Use float64 there.
 */
#include "linalg.cuh"

enum { THREADS = 256 };
static const int64_t MOST_BLOCKS = 1 << 20;
static const int64_t TILE = 1 << 24;    /* entries of F at a time, where one row of pairs allows */
static const int64_t SQUARES = 1 << 23; /* entries of the matrices that are factored at a time */
static const int64_t CHUNK = 1 << 26;   /* entries of the inverses that are not kept */

#define EACH(i, count)                                                                                                 \
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += (int64_t)gridDim.x * blockDim.x)

static unsigned blocks(int64_t count)
{
    return (unsigned)MAX(1, MIN(CEIL_DIV(count, THREADS), MOST_BLOCKS));
}

/* The pairs (a, b), a <= b, of whole rows a0 .. a1-1 of the packed upper half: `width` of them from `at` on. */
struct tile {
    int64_t a0, a1, at, width;
};

struct plan {
    int64_t p, chunk, width, squares; /* d(d+1)/2; classes, pairs and factorisations at a time */
    double *t, *h, *trace;            /* [k] */
    double *square;                   /* [squares, d, d + 1]: matrices and a pivot's row of each */
    void *f;                          /* [n, width] */
    void *own_inverse;                /* [chunk, p], or NULL */
};

static tile tile_from(const plan *p, int64_t d, int64_t a0, int64_t at)
{
    tile t = {a0, a0, at, 0};
    while (t.a1 < d && (t.width == 0 || t.width + d - t.a1 <= p->width)) t.width += d - t.a1++;
    return t;
}

/* First pair of row a in the packed upper half. */
static __host__ __device__ inline int64_t row_start(int64_t d, int64_t a)
{
    return a * d - a * (a - 1) / 2;
}

/* f[i, (a, b)] = z_ia z_ib, or with a factor of 2 that where a < b: a block for each row of a tile and each point */
template <typename T> __global__ void pairs(int64_t n, int64_t d, const T *z, tile t, T factor, T *f)
{
    for (int64_t item = blockIdx.x; item < n * (t.a1 - t.a0); item += gridDim.x) {
        const int64_t i = item / (t.a1 - t.a0), a = t.a0 + item % (t.a1 - t.a0);
        T *row = f + i * t.width + row_start(d, a) - t.at - a;
        for (int64_t b = a + threadIdx.x; b < d; b += blockDim.x)
            row[b] = (b > a ? factor : (T)1) * z[i * d + a] * z[i * d + b];
    }
}

/* G = W' F of a chunk of classes, packed, into `inverse` */
template <typename T>
static subspace_status grams_split(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a, const plan *p,
                                   int64_t kc, const T *z, const T *w, T *inverse)
{
    T *f = (T *)p->f;
    for (tile t = tile_from(p, a->d, 0, 0); t.width > 0; t = tile_from(p, a->d, t.a1, t.at + t.width)) {
        LAUNCH(ctx, pairs<T>, (unsigned)MIN(a->n * (t.a1 - t.a0), MOST_BLOCKS), THREADS, 0, a->n, a->d, z, t, (T)1, f);
        TRY(gemm(ctx, true, false, kc, t.width, a->n, a->dtype, w, a->k, f, t.width, 0, a->dtype, inverse + t.at,
                 p->p));
    }
    return SUBSPACE_OK;
}

/* dz_ic += sum_b M_i(c, b) z_ib + sum_{a < c} M_i(a, c) z_ia over the pairs of a tile */
template <typename T> __global__ void apply_pairs(int64_t n, int64_t d, const T *z, tile t, const T *m, T *dz)
{
    EACH(at, n * d)
    {
        const int64_t i = at / d, c = at % d;
        const T *row = m + i * t.width - t.at, *zi = z + i * d;
        T sum = 0;
        for (int64_t a = t.a0; a < MIN(t.a1, c); a++) sum += row[row_start(d, a) + c - a] * zi[a];
        if (c >= t.a0 && c < t.a1)
            for (int64_t b = c; b < d; b++) sum += row[row_start(d, c) + b - c] * zi[b];
        dz[at] += sum;
    }
}

/* q = F2 B' into dw, and dz += the use of M = W B, of a chunk of classes */
template <typename T>
static subspace_status gradients_split(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a, const plan *p,
                                       int64_t kc, const T *z, const T *w, const T *inverse, T *dz, T *dw)
{
    T *f = (T *)p->f;
    for (tile t = tile_from(p, a->d, 0, 0); t.width > 0; t = tile_from(p, a->d, t.a1, t.at + t.width)) {
        if (dw) {
            LAUNCH(ctx, pairs<T>, (unsigned)MIN(a->n * (t.a1 - t.a0), MOST_BLOCKS), THREADS, 0, a->n, a->d, z, t, (T)2,
                   f);
            TRY(gemm(ctx, false, true, a->n, kc, t.width, a->dtype, f, t.width, inverse + t.at, p->p, t.at > 0,
                     a->dtype, dw, a->k));
        }
        if (!dz) continue;
        TRY(gemm(ctx, false, false, a->n, t.width, kc, a->dtype, w, a->k, inverse + t.at, p->p, 0, a->dtype, f,
                 t.width));
        LAUNCH(ctx, apply_pairs<T>, blocks(a->n * a->d), THREADS, 0, a->n, a->d, z, t, (const T *)f, dz);
    }
    return SUBSPACE_OK;
}

/* t_k, or NaN when a weight of the class is negative; a block for each class */
template <typename T> __global__ void column_sums(int64_t n, int64_t k, const T *w, double *t)
{
    for (int64_t c = blockIdx.x; c < k; c += gridDim.x) {
        double sum = 0;
        for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += w[i * k + c] >= 0 ? (double)w[i * k + c] : NAN;
        sum = block_sum(sum);
        if (threadIdx.x == 0) t[c] = sum;
        __syncthreads();
    }
}

/* G_k becomes A_k^-1 in place, and h_k and tr A_k^-1, by the sweep operator on the upper half of a float64 copy:
 * pivot by pivot A <- A - r r'/p outside the pivot's row r, which becomes r/p, and the pivot -1/p. A block for each
 * class, and so for each square. */
template <typename T>
__global__ void factor(int64_t d, int64_t kc, int64_t p, double eps, const double *t, double *square, T *inverse,
                       double *h, double *trace)
{
    double *a = square + blockIdx.x * d * (d + 1), *row = a + d * d;
    for (int64_t k = blockIdx.x; k < kc; k += gridDim.x) {
        T *packed = inverse + k * p;
        const double scale = (double)d / (t[k] * eps);
        double logdet = 0, sum = 0;
        for (int64_t at = threadIdx.x; at < d * d; at += blockDim.x) {
            const int64_t i = at / d, j = at % d;
            if (i <= j) a[at] = scale * (double)packed[row_start(d, i) + j - i] + (i == j);
        }
        for (int64_t q = 0; q < d; q++) {
            __syncthreads();
            const double pivot = a[q * d + q];
            for (int64_t x = threadIdx.x; x < d; x += blockDim.x) row[x] = x < q ? a[x * d + q] : a[q * d + x];
            logdet += pivot > 0 ? log(pivot) : NAN;
            __syncthreads();
            for (int64_t at = threadIdx.x; at < d * d; at += blockDim.x) {
                const int64_t i = at / d, j = at % d;
                if (i > j) continue;
                if (i == q && j == q) a[at] = -1 / pivot;
                else if (i == q || j == q) a[at] /= pivot;
                else a[at] -= row[i] * row[j] / pivot;
            }
        }
        __syncthreads();
        const bool empty = t[k] == 0;
        for (int64_t i = threadIdx.x; i < d; i += blockDim.x) sum -= a[i * d + i];
        for (int64_t at = threadIdx.x; at < d * d; at += blockDim.x) {
            const int64_t i = at / d, j = at % d;
            if (i <= j) packed[row_start(d, i) + j - i] = empty ? (T)0 : (T)-a[at];
        }
        sum = block_sum(sum);
        if (threadIdx.x == 0) h[k] = empty ? 0 : 0.5 * logdet, trace[k] = empty ? (double)d : sum;
        __syncthreads();
    }
}

template <typename T>
static subspace_status make_factors(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a, const plan *p,
                                    int64_t k0, int64_t kc, const T *z, const T *w, T *inverse)
{
    TRY(grams_split<T>(ctx, a, p, kc, z, w, inverse));
    LAUNCH(ctx, factor<T>, (unsigned)MIN(kc, p->squares), ROW_THREADS, 0, a->d, kc, p->p, a->eps, p->t + k0, p->square,
           inverse, p->h + k0, p->trace + k0);
    return SUBSPACE_OK;
}

/* rate, and unless NULL the statistics [2, k]; one block */
template <typename T>
__global__ void finish_rate(int64_t n, int64_t k, const double *t, const double *h, const double *trace, T *rate,
                            T *stats)
{
    double sum = 0;
    for (int64_t c = threadIdx.x; c < k; c += blockDim.x) {
        sum += t[c] * h[c];
        if (stats) stats[c] = (T)h[c], stats[k + c] = (T)trace[c];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) *rate = (T)(sum / (double)n);
}

template <typename T>
static subspace_status forward_view(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a, const plan *p,
                                    int64_t v)
{
    const T *z = (const T *)a->z + v * a->n * a->d, *w = (const T *)a->weights + v * a->n * a->k;
    if (a->k > 0) LAUNCH(ctx, column_sums<T>, (unsigned)MIN(a->k, MOST_BLOCKS), ROW_THREADS, 0, a->n, a->k, w, p->t);
    for (int64_t k0 = 0; k0 < a->k; k0 += p->chunk) {
        T *inverse = a->inverse ? (T *)a->inverse + (v * a->k + k0) * p->p : (T *)p->own_inverse;
        TRY(make_factors<T>(ctx, a, p, k0, MIN(p->chunk, a->k - k0), z, w + k0, inverse));
    }
    LAUNCH(ctx, finish_rate<T>, 1, ROW_THREADS, 0, a->n, a->k, (const double *)p->t, (const double *)p->h,
           (const double *)p->trace, (T *)a->rate + v, a->stats ? (T *)a->stats + v * 2 * a->k : (T *)NULL);
    return SUBSPACE_OK;
}

/* q becomes dw, columns k0 .. k0 + kc - 1 of [n, k]; h and trace from the forward's stats, or its own */
template <typename T>
__global__ void finish_dw(int64_t n, int64_t d, int64_t k, int64_t kc, double eps, const T *drate, const T *stats,
                          const double *h, const double *trace, T *dw)
{
    EACH(at, n * kc)
    {
        const int64_t i = at / kc, c = at % kc;
        const double half = stats ? (double)stats[c] : h[c],
                     left = (double)d - (stats ? (double)stats[k + c] : trace[c]);
        dw[i * k + c] =
            (T)((double)*drate / (double)n * ((double)d / (2 * eps) * (double)dw[i * k + c] + half - left / 2));
    }
}

template <typename T> __global__ void clear(int64_t count, T *x)
{
    EACH(i, count) x[i] = 0;
}

template <typename T> __global__ void finish_dz(int64_t count, double scale, const T *drate, T *dz)
{
    EACH(i, count) dz[i] = (T)((double)*drate * scale * (double)dz[i]);
}

template <typename T>
static subspace_status backward_view(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a, const plan *p,
                                     int64_t v)
{
    const T *z = (const T *)a->z + v * a->n * a->d, *w = (const T *)a->weights + v * a->n * a->k;
    const T *drate = (const T *)a->drate + v, *stats = a->inverse ? (const T *)a->stats + v * 2 * a->k : NULL;
    T *dz = a->dz ? (T *)a->dz + v * a->n * a->d : NULL, *dw = a->dweights ? (T *)a->dweights + v * a->n * a->k : NULL;
    if (dz) LAUNCH(ctx, clear<T>, blocks(a->n * a->d), THREADS, 0, a->n * a->d, dz);
    if (!a->inverse && a->k > 0)
        LAUNCH(ctx, column_sums<T>, (unsigned)MIN(a->k, MOST_BLOCKS), ROW_THREADS, 0, a->n, a->k, w, p->t);
    for (int64_t k0 = 0; k0 < a->k; k0 += p->chunk) {
        const int64_t kc = MIN(p->chunk, a->k - k0);
        T *inverse = a->inverse ? (T *)a->inverse + (v * a->k + k0) * p->p : (T *)p->own_inverse;
        if (!a->inverse) TRY(make_factors<T>(ctx, a, p, k0, kc, z, w + k0, inverse));
        TRY(gradients_split<T>(ctx, a, p, kc, z, w + k0, inverse, dz, dw ? dw + k0 : NULL));
        if (dw)
            LAUNCH(ctx, finish_dw<T>, blocks(a->n * kc), THREADS, 0, a->n, a->d, a->k, kc, a->eps, drate,
                   stats ? stats + k0 : stats, (const double *)p->h + k0, (const double *)p->trace + k0, dw + k0);
    }
    if (dz)
        LAUNCH(ctx, finish_dz<T>, blocks(a->n * a->d), THREADS, 0, a->n * a->d, (double)a->d / ((double)a->n * a->eps),
               drate, dz);
    return SUBSPACE_OK;
}

static void make_plan(plan *p, const subspace_coding_rate_soft_args *a, char *base, size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const int64_t d = a->d;
    *p = plan{};
    p->p = d * (d + 1) / 2;
    p->chunk = MAX(1, a->inverse ? a->k : MIN(a->k, CHUNK / p->p));
    p->width = MAX(d, MIN(TILE / a->n, p->p));
    p->squares = MAX(1, MIN(p->chunk, SQUARES / (d * (d + 1))));
    p->t = (double *)carve(base, bytes, a->k, sizeof(double));
    p->h = (double *)carve(base, bytes, a->k, sizeof(double));
    p->trace = (double *)carve(base, bytes, a->k, sizeof(double));
    p->square = (double *)carve(base, bytes, p->squares * d * (d + 1), sizeof(double));
    p->f = carve(base, bytes, a->n * p->width, item);
    if (!a->inverse) p->own_inverse = carve(base, bytes, p->chunk * p->p, item);
}

extern "C" size_t subspace_coding_rate_soft_workspace_cuda(const subspace_ctx *,
                                                           const subspace_coding_rate_soft_args *a)
{
    size_t bytes = 0;
    plan p;
    if (a->n <= 0 || a->d <= 0) return 0;
    make_plan(&p, a, NULL, &bytes);
    return bytes;
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a, plan *p)
{
    size_t bytes = 0;
    TRY(subspace_coding_rate_soft_check(ctx, a));
    CHECK(ctx, a->d < 1 << 16, SUBSPACE_INVALID_ARGUMENT, "coding_rate_soft: %lld features are too many",
          (long long)a->d);
    make_plan(p, a, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "coding_rate_soft: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_coding_rate_soft_cuda(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a)
{
    plan p;
    TRY(prepare(ctx, a, &p));
    for (int64_t v = 0; v < a->v; v++)
        TRY(a->dtype == SUBSPACE_F64 ? forward_view<double>(ctx, a, &p, v) : forward_view<float>(ctx, a, &p, v));
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_coding_rate_soft_backward_cuda(subspace_ctx *ctx,
                                                                   const subspace_coding_rate_soft_args *a)
{
    plan p;
    TRY(prepare(ctx, a, &p));
    for (int64_t v = 0; v < a->v; v++)
        TRY(a->dtype == SUBSPACE_F64 ? backward_view<double>(ctx, a, &p, v) : backward_view<float>(ctx, a, &p, v));
    return SUBSPACE_OK;
}
