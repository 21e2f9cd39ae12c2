/* tucker_linear.cu - the change of a linear layer added to its output, and its gradients, on the GPU.
 *
 *     z1 = drop(x) V'    z2 = scale z1 core'    y += z2 U'
 *
 *     h = scale dy U,  dU = dy' z2,  dcore = h' z1,  k = h core,  dV = k' drop(x),  dx += drop(k V)
 *
 * float32 and float64: one GEMM each. Half types: x and dy, the large ones, go to the tensor cores as they are; what is
 * multiplied with them, and has a rank's width, goes as two halves, high + low, side by side in one GEMM whose float32
 * results are added afterwards: 16 (bfloat16) or 22 (float16, its low half kept 2^11 times as large) bits of V, U, z2
 * and k take part. y += z2 U' is one GEMM of depth 3 r, [high low high] [high high low]', whose sum has one rounding,
 * into y; the term left out is 2^-18 of it. It reads and writes y once, 6 r flops for 4 bytes: below r of 190 memory is
 * the limit. Where the sum cannot go through a GEMM, in float16, which z2 may leave, and under dropout of k V, it is a
 * product of rank_product.cuh, in float32 throughout.
 *
 * A dropped copy of x has zeros and entries of x, exactly; 1 / (1 - dropout) is part of a later factor.
 *
 * Launches: forward 3, half types 4; backward 8 and 10; with dropout one more. Bytes, forward: x once, y twice;
 * backward: x twice, dy twice, dx twice; with dropout x once more and the copy once; the rest has a rank's width.
 */
#include "rank_product.cuh"

typedef subspace_tucker_linear_args linear_args;

template <typename T> struct buffers {
    T *x;                      /* [t, n]    dropped, or NULL: x itself */
    acc_t<T> *z1, *h;          /* [t, rn], [t, rm]; half types: [t, 2 rn], [t, 2 rm] of two halves */
    acc_t<T> *z2, *k;          /* [t, rm], [t, rn] */
    T *u, *v;                  /* [m, 3 rm] = high | high | low, [3 rn, n] = high, high, low below one another */
    T *left;                   /* [t, 3 max(rn, rm)] = high | low | high of z2 or k */
    acc_t<T> *du, *dv, *dcore; /* [m, 2 rm], [2 rn, n] in halves; [slices, rm, rn] */
};

static dropping drop_of(const linear_args *a)
{
    return {a->dropout > 0 ? a->seed : NULL, a->dropout};
}

static rank_shape dcore_shape(const linear_args *a)
{
    return rank_shape_of(a->rm, a->rn, a->t, 1, true);
}

template <typename T> static size_t lay_out(const linear_args *a, char *base, buffers<T> *b)
{
    typedef acc_t<T> W;
    const bool half = is_half(a->dtype);
    const int64_t parts = half ? 2 : 1;
    size_t bytes = 0;
    *b = buffers<T>{};
    if (a->dropout > 0) b->x = (T *)carve(base, &bytes, a->t * a->n, sizeof(T));
    b->z1 = (W *)carve(base, &bytes, a->t * a->rn * parts, sizeof(W));
    b->h = (W *)carve(base, &bytes, a->t * a->rm * parts, sizeof(W));
    b->z2 = (W *)carve(base, &bytes, a->t * a->rm, sizeof(W));
    b->k = (W *)carve(base, &bytes, a->t * a->rn, sizeof(W));
    if (!half) return bytes;
    b->u = (T *)carve(base, &bytes, 3 * a->m * a->rm, sizeof(T));
    b->v = (T *)carve(base, &bytes, 3 * a->rn * a->n, sizeof(T));
    b->left = (T *)carve(base, &bytes, 3 * a->t * MAX(a->rn, a->rm), sizeof(T));
    b->du = (W *)carve(base, &bytes, 2 * a->m * a->rm, sizeof(W));
    b->dv = (W *)carve(base, &bytes, 2 * a->rn * a->n, sizeof(W));
    b->dcore = (W *)carve(base, &bytes, dcore_shape(a).slices * a->rm * a->rn, sizeof(W));
    return bytes;
}

/* x where it is kept, else 0: FOUR entries a thread */
template <typename T> __global__ void drop_x(int64_t count, const T *x, dropping d, bool aligned, T *out)
{
    const keeps<acc_t<T>> keep(d);
    const int64_t step = 4 * (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x); i < count; i += step) {
        if (aligned && i + 4 <= count) {
            four<T> v = *(const four<T> *)(x + i);
            for (int j = 0; j < 4; j++)
                if (keep(i + j) == 0) v.v[j] = (T)(acc_t<T>)0;
            *(four<T> *)(out + i) = v;
        } else
            for (int64_t j = i; j < MIN(count, i + 4); j++) out[j] = keep(j) == 0 ? (T)(acc_t<T>)0 : x[j];
    }
}

/* Where entry j of [rn, n] is in v and dv */
static __device__ inline int64_t place_in_v(const linear_args &a, int64_t j)
{
    return a.turned ? j % a.n * a.rn + j / a.n : j;
}

/* U and V in halves, in one launch */
template <typename T> __global__ void split_factors(linear_args a, T *uu, T *vv)
{
    const int64_t rm = a.rm, count_u = a.m * rm, count_v = a.rn * a.n;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count_u + count_v;
         i += (int64_t)gridDim.x * blockDim.x) {
        const bool is_u = i < count_u;
        const int64_t at = is_u ? i / rm * 3 * rm + i % rm : i - count_u, next = is_u ? rm : count_v;
        const float value = is_u ? ((const float *)a.u)[i] : ((const float *)a.v)[place_in_v(a, i - count_u)];
        const T high = (T)value, low = (T)((value - (float)high) * (float)low_half<T>::scale);
        T *to = is_u ? uu : vv;
        to[at] = to[at + next] = high, to[at + 2 * next] = low;
    }
}

/* The halves' sums: dU, dV, and dcore's slices; each or none */
template <typename T>
__global__ void add_halves(linear_args a, buffers<T> b, double scale_dv, int64_t slices, double scale_dcore)
{
    const float low = (float)(1 / low_half<T>::scale);
    const int64_t count_u = a.du ? a.m * a.rm : 0, count_v = a.dv ? a.rn * a.n : 0, core = a.rm * a.rn;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count_u + count_v + (a.dcore ? core : 0);
         i += (int64_t)gridDim.x * blockDim.x) {
        if (i < count_u) {
            const float *part = b.du + i / a.rm * 2 * a.rm + i % a.rm;
            ((float *)a.du)[i] = part[0] + low * part[a.rm];
        } else if (i < count_u + count_v) {
            const int64_t j = i - count_u;
            ((float *)a.dv)[place_in_v(a, j)] = (float)scale_dv * (b.dv[j] + low * b.dv[count_v + j]);
        } else {
            const int64_t j = i - count_u - count_v;
            double sum = 0;
            for (int64_t s = 0; s < slices; s++) sum += (double)b.dcore[s * core + j];
            ((float *)a.dcore)[j] = (float)(scale_dcore * sum);
        }
    }
}

/* C [m, n] = alpha op(A) op(B) + beta C of one type, dense but for what ld says */
static subspace_status times(subspace_ctx *ctx, subspace_dtype ab, subspace_dtype cc, bool transa, bool transb,
                             int64_t m, int64_t n, int64_t k, double alpha, const void *a, int64_t lda, const void *b,
                             int64_t ldb, double beta, void *c)
{
    const gemms g = {m, n, k, 1, transa, transb, false, ab, cc, alpha, beta, a, b, c, lda, ldb, n, 0, 0, 0};
    return gemm_all(ctx, &g);
}

/* A matrix [lines, steps] by rows for rank_product.cuh, in halves `low` apart or whole; turned: [steps, lines] */
template <typename E> static operand<E> matrix(const E *at, int64_t ld, bool turned, int64_t low, double weight)
{
    return {at, 0, turned ? 1 : ld, 0, turned ? ld : 1, low, weight};
}

/* V as what k is multiplied with */
template <typename E> static operand<E> right_v(const linear_args *a)
{
    return matrix((const E *)a->v, a->turned ? a->rn : a->n, !a->turned, 0, 0);
}

/* Drop x; what stands for x afterwards, and the factor it misses. */
template <typename T>
static subspace_status dropped(subspace_ctx *ctx, const linear_args *a, const buffers<T> *b, const T **x, double *kept)
{
    const bool aligned = (uintptr_t)a->x % alignof(four<T>) == 0;
    *x = b->x ? b->x : (const T *)a->x, *kept = b->x ? 1 / (1 - a->dropout) : 1;
    if (b->x)
        LAUNCH(ctx, drop_x<T>, rank_grid(CEIL_DIV(a->t * a->n, 4)), RANK_THREADS, 0, a->t * a->n, (const T *)a->x,
               drop_of(a), aligned, b->x);
    return SUBSPACE_OK;
}

/* to [t, cols] += drop(left right), left [t, k] and right by rank_product.cuh */
template <typename T>
static subspace_status add_product(subspace_ctx *ctx, const linear_args *a, int64_t cols, int64_t k,
                                   const acc_t<T> *left, const operand<acc_t<T>> &right, bool drop, void *to)
{
    typedef acc_t<T> W;
    const operand<W> l = matrix(left, k, false, 0, 0);
    return rank_multiply(ctx,
                         rank_job<W, W, T>{1, a->t, cols, k, k, l, right, 1, (const T *)to, (T *)to, drop_of(a),
                                           drop ? CHANGE : NOTHING, 0},
                         false);
}

/* ------------------------------------------------------------------------------ float32, float64 */

template <typename T> static subspace_status forward_wide(subspace_ctx *ctx, const linear_args *a)
{
    const subspace_dtype d = a->dtype;
    const int64_t t = a->t, n = a->n, m = a->m, rn = a->rn, rm = a->rm;
    buffers<T> b;
    const T *x;
    double kept;
    lay_out(a, (char *)ctx->workspace, &b);
    TRY(dropped(ctx, a, &b, &x, &kept));
    TRY(times(ctx, d, d, false, !a->turned, t, rn, n, 1, x, n, a->v, a->turned ? rn : n, 0, b.z1));
    TRY(times(ctx, d, d, false, true, t, rm, rn, a->scale * kept, b.z1, rn, a->core, rn, 0, b.z2));
    return times(ctx, d, d, false, true, t, m, rm, 1, b.z2, rm, a->u, rm, 1, a->y);
}

template <typename T> static subspace_status backward_wide(subspace_ctx *ctx, const linear_args *a)
{
    const subspace_dtype d = a->dtype;
    const int64_t t = a->t, n = a->n, m = a->m, rn = a->rn, rm = a->rm, ldv = a->turned ? rn : n;
    const bool inner = a->dv || a->dx;
    buffers<T> b;
    const T *x;
    double kept;
    lay_out(a, (char *)ctx->workspace, &b);
    TRY(dropped(ctx, a, &b, &x, &kept));
    if (a->du || a->dcore) TRY(times(ctx, d, d, false, !a->turned, t, rn, n, 1, x, n, a->v, ldv, 0, b.z1));
    if (a->du) TRY(times(ctx, d, d, false, true, t, rm, rn, a->scale * kept, b.z1, rn, a->core, rn, 0, b.z2));
    if (a->du) TRY(times(ctx, d, d, true, false, m, rm, t, 1, a->dy, m, b.z2, rm, 0, a->du));
    if (a->dcore || inner) TRY(times(ctx, d, d, false, false, t, rm, m, a->scale, a->dy, m, a->u, rm, 0, b.h));
    if (a->dcore) TRY(times(ctx, d, d, true, false, rm, rn, t, kept, b.h, rm, b.z1, rn, 0, a->dcore));
    if (inner) TRY(times(ctx, d, d, false, false, t, rn, rm, 1, b.h, rm, a->core, rn, 0, b.k));
    if (a->dv && a->turned) TRY(times(ctx, d, d, true, false, n, rn, t, kept, x, n, b.k, rn, 0, a->dv));
    else if (a->dv) TRY(times(ctx, d, d, true, false, rn, n, t, kept, b.k, rn, x, n, 0, a->dv));
    if (!a->dx) return SUBSPACE_OK;
    if (b.x) return add_product<T>(ctx, a, n, rn, b.k, right_v<T>(a), a->dropout > 0, a->dx);
    return times(ctx, d, d, false, a->turned, t, n, rn, 1, b.k, rn, a->v, ldv, 1, a->dx);
}

/* ------------------------------------------------------------------------------------ half types */

/* out = alpha in op(right): `in` [t, k] in halves, out [t, cols] or, of T, high | low | high */
template <typename T, typename O>
static subspace_status middle(subspace_ctx *ctx, const linear_args *a, double alpha, const float *in, int64_t k,
                              const operand<float> &right, int64_t cols, O *out)
{
    const double scale = low_half<T>::scale;
    const operand<float> left = matrix(in, 2 * k, false, k, 1 / scale);
    rank_job<float, float, O> job = {1, a->t, cols, k, k, left, right, alpha, NULL, out, {}, NOTHING, 0};
    job.split = sizeof(O) == sizeof(T) ? scale : 0;
    return rank_multiply(ctx, job, false);
}

/* U and V in halves, drop(x), and z1 */
template <typename T>
static subspace_status down(subspace_ctx *ctx, const linear_args *a, const buffers<T> *b, bool z1, const T **x,
                            double *kept)
{
    LAUNCH(ctx, split_factors<T>, rank_grid(a->m * a->rm + a->rn * a->n), RANK_THREADS, 0, *a, b->u, b->v);
    TRY(dropped(ctx, a, b, x, kept));
    if (!z1) return SUBSPACE_OK;
    return times(ctx, a->dtype, SUBSPACE_F32, false, true, a->t, 2 * a->rn, a->n, 1, *x, a->n, b->v + a->rn * a->n,
                 a->n, 0, b->z1);
}

template <typename T> static subspace_status forward_half(subspace_ctx *ctx, const linear_args *a)
{
    const int64_t rn = a->rn, rm = a->rm;
    const operand<float> core = matrix((const float *)a->core, rn, false, 0, 0);
    buffers<T> b;
    const T *x;
    double kept;
    lay_out(a, (char *)ctx->workspace, &b);
    TRY(down(ctx, a, &b, true, &x, &kept));
    if (a->dtype == SUBSPACE_F16) {
        TRY((middle<T>(ctx, a, a->scale * kept, b.z1, rn, core, rm, b.z2)));
        return add_product<T>(ctx, a, a->m, rm, b.z2, matrix((const float *)a->u, rm, false, 0, 0), false, a->y);
    }
    TRY((middle<T>(ctx, a, a->scale * kept, b.z1, rn, core, rm, b.left)));
    return times(ctx, a->dtype, a->dtype, false, true, a->t, a->m, 3 * rm, 1, b.left, 3 * rm, b.u, 3 * rm, 1, a->y);
}

template <typename T> static subspace_status backward_half(subspace_ctx *ctx, const linear_args *a)
{
    const subspace_dtype d = a->dtype, f32 = SUBSPACE_F32;
    const int64_t t = a->t, n = a->n, m = a->m, rn = a->rn, rm = a->rm;
    const bool inner = a->dv || a->dx, gemm_dx = a->dx && d == SUBSPACE_BF16 && !(a->dropout > 0);
    const float *c = (const float *)a->core;
    buffers<T> b;
    const T *x;
    double kept;
    lay_out(a, (char *)ctx->workspace, &b);
    TRY(down(ctx, a, &b, a->du || a->dcore, &x, &kept));
    if (a->du) {
        TRY((middle<T>(ctx, a, a->scale * kept, b.z1, rn, matrix(c, rn, false, 0, 0), rm, b.left)));
        TRY(times(ctx, d, f32, true, false, m, 2 * rm, t, 1, a->dy, m, b.left, 3 * rm, 0, b.du));
    }
    if (a->dcore || inner) TRY(times(ctx, d, f32, false, false, t, 2 * rm, m, 1, a->dy, m, b.u + rm, 3 * rm, 0, b.h));
    if (a->dcore) {
        const double low = 1 / low_half<T>::scale;
        const operand<float> h = matrix((const float *)b.h, 2 * rm, true, rm, low);
        const operand<float> z = matrix((const float *)b.z1, 2 * rn, true, rn, low);
        TRY(rank_multiply(ctx, rank_job<float, float, float>{1, rm, rn, t, t, h, z, 1, NULL, b.dcore, {}, NOTHING, 0},
                          true));
    }
    if (a->dv || gemm_dx) TRY((middle<T>(ctx, a, a->scale, b.h, rm, matrix(c, rn, true, 0, 0), rn, b.left)));
    if (a->dv) TRY(times(ctx, d, f32, true, false, 2 * rn, n, t, 1, b.left, 3 * rn, x, n, 0, b.dv));
    if (gemm_dx) TRY(times(ctx, d, d, false, false, t, n, 3 * rn, 1, b.left, 3 * rn, b.v, n, 1, a->dx));
    if (a->dx && !gemm_dx) {
        TRY((middle<T>(ctx, a, a->scale, b.h, rm, matrix(c, rn, true, 0, 0), rn, b.k)));
        TRY(add_product<T>(ctx, a, n, rn, b.k, right_v<float>(a), a->dropout > 0, a->dx));
    }
    if (a->du || a->dv || a->dcore)
        LAUNCH(ctx, add_halves<T>, rank_grid(m * rm + rn * n + rm * rn), RANK_THREADS, 0, *a, b, kept,
               dcore_shape(a).slices, a->scale * kept);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status forward(subspace_ctx *ctx, const linear_args *a)
{
    if constexpr (sizeof(T) == 2) return forward_half<T>(ctx, a);
    else return forward_wide<T>(ctx, a);
}

template <typename T> static subspace_status backward(subspace_ctx *ctx, const linear_args *a)
{
    if constexpr (sizeof(T) == 2) return backward_half<T>(ctx, a);
    else return backward_wide<T>(ctx, a);
}

template <typename T> static size_t bytes_for(const linear_args *a)
{
    buffers<T> b;
    return lay_out(a, NULL, &b);
}

/* Enough for either direction. */
extern "C" size_t subspace_tucker_linear_workspace_cuda(const subspace_ctx *, const subspace_tucker_linear_args *a)
{
    if (a->t <= 0 || a->n <= 0 || a->m <= 0 || a->rn <= 0 || a->rm <= 0) return 0;
    DISPATCH(a->dtype, bytes_for, a);
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    TRY(subspace_tucker_linear_check(ctx, a));
    const size_t bytes = subspace_tucker_linear_workspace_cuda(ctx, a);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "tucker_linear: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_tucker_linear_cuda(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    TRY(prepare(ctx, a));
    if (a->t == 0) return SUBSPACE_OK;
    DISPATCH(a->dtype, forward, ctx, a);
}

extern "C" subspace_status subspace_tucker_linear_backward_cuda(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    const cudaStream_t stream = (cudaStream_t)ctx->stream;
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    TRY(prepare(ctx, a));
    if (a->t > 0) DISPATCH(a->dtype, backward, ctx, a);
    if (a->dcore) CUDA(ctx, cudaMemsetAsync(a->dcore, 0, (size_t)(a->rm * a->rn) * item, stream));
    if (a->du) CUDA(ctx, cudaMemsetAsync(a->du, 0, (size_t)(a->m * a->rm) * item, stream));
    if (a->dv) CUDA(ctx, cudaMemsetAsync(a->dv, 0, (size_t)(a->rn * a->n) * item, stream));
    return SUBSPACE_OK;
}
