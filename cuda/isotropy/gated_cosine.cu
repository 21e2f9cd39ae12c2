/* gated_cosine.cu - cosines of points under gates, of all pairs, and their gradients, on the GPU.
 *
 *     cos[i,j] = <w_i y_i, z2_j> R[i,j]        w = g²,  y_i = z1_i / |g_i z1_i|,  R[i,j] = <w_i, z2_j²>^(-1/2)
 *
 *     V = dcos R        P = V cos R        q = V z2        s_i = <w_i y_i, q_i>
 *     dz1   = w (q - s y) / |g z1|
 *     dgate = g (y (2 q - s y) - P z2²)
 *     dz2   = V' (w y) - z2 (P' w)
 *
 * as in the CPU's: rows are divided by their largest entries, two products forward, four backward, each one batched
 * GEMM in full precision over the views. V and P are whole matrices here, made once.
 *
 * Bytes forward, beside the products': z1 and gate twice, z2 twice; w, w y, z2 and z2² once; cos twice and R twice. On
 * an H100 at 256³ a launch's latency is the limit; at 4096² pairs of 512 features the products are, by 15 to 1.
 */
#include <cfloat>
#include "linalg.cuh"

typedef struct gated_plan {
    void *weight, *held;         /* [v, b, k] w and w y, */
    void *points, *squares;      /* [v, n, k] z2 and z2², all of rows divided by their largest entries, */
    void *unit1, *unitg, *unit2; /* [v, b], [v, b], [v, n] which are these */
    void *inverse;               /* [v, b] 1 / |g z1| */
    void *along, *across;        /* [v, b, n] V and P, backward only */
    void *outer;                 /* [v, n, k] P' w, backward only */
} gated_plan;

static gated_plan plan_of(const subspace_gated_cosine_args *a, char *base, size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const int64_t gates = a->v * a->b, points = a->v * a->n;
    gated_plan s = {};
    s.weight = carve(base, bytes, gates * a->k, item);
    s.held = carve(base, bytes, gates * a->k, item);
    s.points = carve(base, bytes, points * a->k, item);
    s.squares = carve(base, bytes, points * a->k, item);
    s.unit1 = carve(base, bytes, gates, item);
    s.unitg = carve(base, bytes, gates, item);
    s.unit2 = carve(base, bytes, points, item);
    s.inverse = carve(base, bytes, gates, item);
    if (!a->dcosine) return s;
    s.along = carve(base, bytes, gates * a->n, item);
    s.across = carve(base, bytes, gates * a->n, item);
    s.outer = carve(base, bytes, a->dz2 ? points * a->k : 0, item);
    return s;
}

template <typename T> struct least;
template <> struct least<float> {
    static constexpr float normal = FLT_MIN, nothing = FLT_MIN / FLT_EPSILON;
};
template <> struct least<double> {
    static constexpr double normal = DBL_MIN, nothing = DBL_MIN / DBL_EPSILON;
};

/* square^(-1/2), and 0 of one that can't be told from 0; NaN stays. */
template <typename T> static __device__ inline T inverse_root(T square)
{
    return square <= least<T>::nothing ? (T)0 : 1 / sqrt(square);
}

/* Of a row, by a block: its largest magnitude, or the least normal number; NaN if an entry is not finite. */
template <typename T> static __device__ inline T unit_of(int64_t k, const T *x)
{
    double largest = (double)least<T>::normal;
    for (int64_t l = threadIdx.x; l < k; l += ROW_THREADS) {
        const double size = fabs((double)x[l]);
        largest = larger(largest, size);
    }
    largest = block_max(largest);
    return (T)(largest + largest * 0); /* infinity times 0 is NaN */
}

/* A block has a gate. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) prepare_gates(subspace_gated_cosine_args a, gated_plan s)
{
    const int64_t i = blockIdx.x;
    const T *z = (const T *)a.z1 + i * a.k, *g = (const T *)a.gate + i * a.k;
    T *weight = (T *)s.weight + i * a.k, *held = (T *)s.held + i * a.k;
    const T unit1 = unit_of(a.k, z), unitg = unit_of(a.k, g);
    double square = 0;
    for (int64_t l = threadIdx.x; l < a.k; l += ROW_THREADS) {
        const T gate = g[l] / unitg, point = z[l] / unit1;
        square += (double)(gate * gate * point * point);
    }
    const T inverse = inverse_root((T)block_sum(square));
    for (int64_t l = threadIdx.x; l < a.k; l += ROW_THREADS) {
        const T gate = g[l] / unitg;
        weight[l] = gate * gate, held[l] = gate * gate * (z[l] / unit1) * inverse;
    }
    if (threadIdx.x == 0) ((T *)s.unit1)[i] = unit1, ((T *)s.unitg)[i] = unitg, ((T *)s.inverse)[i] = inverse;
}

/* A block has a point. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) prepare_points(subspace_gated_cosine_args a, gated_plan s)
{
    const int64_t j = blockIdx.x;
    const T *z = (const T *)a.z2 + j * a.k;
    const T unit = unit_of(a.k, z);
    for (int64_t l = threadIdx.x; l < a.k; l += ROW_THREADS) {
        const T point = z[l] / unit;
        ((T *)s.points)[j * a.k + l] = point, ((T *)s.squares)[j * a.k + l] = point * point;
    }
    if (threadIdx.x == 0) ((T *)s.unit2)[j] = unit;
}

/* cos and R, where both products are, a thread each */
template <typename T> __global__ void __launch_bounds__(ROW_THREADS) divide(int64_t count, T *cosine, T *inverse)
{
    const int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i >= count) return;
    const T r = inverse_root(inverse[i]);
    inverse[i] = r, cosine[i] *= r;
}

/* V and P, a thread each */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) factors(int64_t count, subspace_gated_cosine_args a, gated_plan s)
{
    const int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i >= count) return;
    const T r = ((const T *)a.inverse)[i], along = ((const T *)a.dcosine)[i] * r;
    ((T *)s.along)[i] = along, ((T *)s.across)[i] = along * ((const T *)a.cosine)[i] * r;
}

/* dz1 and dgate where q and P z2² are; a block has a gate */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) finish_gates(subspace_gated_cosine_args a, gated_plan s)
{
    const int64_t i = blockIdx.x;
    const T *z = (const T *)a.z1 + i * a.k, *g = (const T *)a.gate + i * a.k;
    const T *weight = (const T *)s.weight + i * a.k, *held = (const T *)s.held + i * a.k;
    const T unit1 = ((const T *)s.unit1)[i], unitg = ((const T *)s.unitg)[i], inverse = ((const T *)s.inverse)[i];
    T *q = (T *)a.dz1 + i * a.k, *p = (T *)a.dgate + i * a.k;
    double sum = 0;
    for (int64_t l = threadIdx.x; l < a.k; l += ROW_THREADS) sum += (double)held[l] * (double)q[l];
    const T along = (T)block_sum(sum);
    for (int64_t l = threadIdx.x; l < a.k; l += ROW_THREADS) {
        const T y = inverse * (z[l] / unit1), rest = q[l] - along * y;
        p[l] = g[l] / unitg * (y * (q[l] + rest) - p[l]) / unitg;
        q[l] = inverse * weight[l] * rest / unit1;
    }
}

/* dz2 where V' w y is, a thread each */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) finish_points(int64_t count, subspace_gated_cosine_args a, gated_plan s)
{
    const int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i >= count) return;
    T *d = (T *)a.dz2 + i;
    *d = (*d - ((const T *)s.points)[i] * ((const T *)s.outer)[i]) / ((const T *)s.unit2)[i / a.k];
}

static unsigned blocks_of(int64_t threads)
{
    return (unsigned)CEIL_DIV(threads, ROW_THREADS);
}

/* C [v, rows, cols] = op(A) op(B) over `inner`, of every view */
static subspace_status times(subspace_ctx *ctx, const subspace_gated_cosine_args *a, bool transa, bool transb,
                             int64_t rows, int64_t cols, int64_t inner, const void *left, const void *right, void *to)
{
    gemms g = {};
    g.m = rows, g.n = cols, g.k = inner, g.count = a->v, g.transa = transa, g.transb = transb, g.exact = true;
    g.ab = g.cc = a->dtype, g.alpha = 1, g.a = left, g.b = right, g.c = to;
    g.lda = transa ? rows : inner, g.ldb = transb ? inner : cols, g.ldc = cols;
    g.stride_a = rows * inner, g.stride_b = inner * cols, g.stride_c = rows * cols;
    return gemm_all(ctx, &g);
}

template <typename T>
static subspace_status prepare_rows(subspace_ctx *ctx, const subspace_gated_cosine_args *a, const gated_plan *s)
{
    if (a->v * a->b > 0) LAUNCH(ctx, prepare_gates<T>, (unsigned)(a->v * a->b), ROW_THREADS, 0, *a, *s);
    if (a->v * a->n > 0) LAUNCH(ctx, prepare_points<T>, (unsigned)(a->v * a->n), ROW_THREADS, 0, *a, *s);
    return SUBSPACE_OK;
}

template <typename T>
static subspace_status forward(subspace_ctx *ctx, const subspace_gated_cosine_args *a, const gated_plan *s)
{
    const int64_t pairs = a->v * a->b * a->n;
    if (pairs == 0) return SUBSPACE_OK;
    TRY(prepare_rows<T>(ctx, a, s));
    TRY(times(ctx, a, false, true, a->b, a->n, a->k, s->held, s->points, a->cosine));
    TRY(times(ctx, a, false, true, a->b, a->n, a->k, s->weight, s->squares, a->inverse));
    LAUNCH(ctx, divide<T>, blocks_of(pairs), ROW_THREADS, 0, pairs, (T *)a->cosine, (T *)a->inverse);
    return SUBSPACE_OK;
}

template <typename T>
static subspace_status backward(subspace_ctx *ctx, const subspace_gated_cosine_args *a, const gated_plan *s)
{
    const int64_t gates = a->v * a->b, points = a->v * a->n, pairs = gates * a->n;
    const cudaStream_t stream = (cudaStream_t)ctx->stream;
    if (pairs == 0) {
        if (a->dz1) CUDA(ctx, cudaMemsetAsync(a->dz1, 0, (size_t)(gates * a->k) * sizeof(T), stream));
        if (a->dgate) CUDA(ctx, cudaMemsetAsync(a->dgate, 0, (size_t)(gates * a->k) * sizeof(T), stream));
        if (a->dz2) CUDA(ctx, cudaMemsetAsync(a->dz2, 0, (size_t)(points * a->k) * sizeof(T), stream));
        return SUBSPACE_OK;
    }
    TRY(prepare_rows<T>(ctx, a, s));
    LAUNCH(ctx, factors<T>, blocks_of(pairs), ROW_THREADS, 0, pairs, *a, *s);
    if (a->dz1) {
        TRY(times(ctx, a, false, false, a->b, a->k, a->n, s->along, s->points, a->dz1));
        TRY(times(ctx, a, false, false, a->b, a->k, a->n, s->across, s->squares, a->dgate));
        LAUNCH(ctx, finish_gates<T>, (unsigned)gates, ROW_THREADS, 0, *a, *s);
    }
    if (!a->dz2) return SUBSPACE_OK;
    TRY(times(ctx, a, true, false, a->n, a->k, a->b, s->along, s->held, a->dz2));
    TRY(times(ctx, a, true, false, a->n, a->k, a->b, s->across, s->weight, s->outer));
    LAUNCH(ctx, finish_points<T>, blocks_of(points * a->k), ROW_THREADS, 0, points * a->k, *a, *s);
    return SUBSPACE_OK;
}

extern "C" size_t subspace_gated_cosine_workspace_cuda(const subspace_ctx *, const subspace_gated_cosine_args *a)
{
    size_t bytes = 0;
    plan_of(a, NULL, &bytes);
    return bytes;
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_gated_cosine_args *a, gated_plan *s)
{
    size_t bytes = 0;
    TRY(subspace_gated_cosine_check(ctx, a));
    *s = plan_of(a, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "gated_cosine: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    CHECK(ctx, a->v * MAX(a->b, a->n) <= INT32_MAX, SUBSPACE_INVALID_ARGUMENT,
          "gated_cosine: %lld views of %lld gates and %lld points are too many", (long long)a->v, (long long)a->b,
          (long long)a->n);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_gated_cosine_cuda(subspace_ctx *ctx, const subspace_gated_cosine_args *a)
{
    gated_plan s;
    TRY(prepare(ctx, a, &s));
    return a->dtype == SUBSPACE_F64 ? forward<double>(ctx, a, &s) : forward<float>(ctx, a, &s);
}

extern "C" subspace_status subspace_gated_cosine_backward_cuda(subspace_ctx *ctx, const subspace_gated_cosine_args *a)
{
    gated_plan s;
    TRY(prepare(ctx, a, &s));
    return a->dtype == SUBSPACE_F64 ? backward<double>(ctx, a, &s) : backward<float>(ctx, a, &s);
}
