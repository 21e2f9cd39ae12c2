/* tucker_linear.cu - the change of a linear layer added to its output, and its gradients, on the GPU.
 *
 *     z1 = drop(x) V'    z2 = scale z1 core'    y += z2 U'
 *
 *     h = scale dy U,  dU = dy' z2,  dcore = h' z1,  k = h core,  dV = k' drop(x),  dx += drop(k V)
 *
 * One GEMM each. Half types and dropout go through wide copies of x and dy, and of what is added to y and dx.
 */
#include "cuda.cuh"
#include "dropout.h"
#include "linalg.cuh"

template <typename T> struct buffers {
    acc_t<T> *x, *dy;          /* [t, n], [t, m] wide, where they have to be copied */
    acc_t<T> *z1, *z2, *h, *k; /* [t, rn], [t, rm], [t, rm], [t, rn] */
    acc_t<T> *sum;             /* [t, max(n, m)] what is added, where it can't be in place */
};

static const int64_t *seed_of(const subspace_tucker_linear_args *a)
{
    return a->dropout > 0 ? a->seed : NULL;
}

static bool copies(const subspace_tucker_linear_args *a)
{
    return is_half(a->dtype) || a->dropout > 0;
}

template <typename T> static size_t lay_out(const subspace_tucker_linear_args *a, char *base, buffers<T> *b)
{
    size_t bytes = 0;
    const size_t item = sizeof(acc_t<T>);
    b->x = (acc_t<T> *)carve(base, &bytes, copies(a) ? a->t * a->n : 0, item);
    b->dy = (acc_t<T> *)carve(base, &bytes, is_half(a->dtype) ? a->t * a->m : 0, item);
    b->z1 = (acc_t<T> *)carve(base, &bytes, a->t * a->rn, item);
    b->z2 = (acc_t<T> *)carve(base, &bytes, a->t * a->rm, item);
    b->h = (acc_t<T> *)carve(base, &bytes, a->t * a->rm, item);
    b->k = (acc_t<T> *)carve(base, &bytes, a->t * a->rn, item);
    b->sum = (acc_t<T> *)carve(base, &bytes, copies(a) ? a->t * MAX(a->n, a->m) : 0, item);
    return bytes;
}

/* out = drop(in) in the type we compute in. */
template <typename T>
__global__ void widen(int64_t count, const T *in, const int64_t *seed, double dropout, acc_t<T> *out)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x)
        out[i] = (acc_t<T>)in[i] * (seed ? (acc_t<T>)dropout_factor((uint64_t)*seed, (uint64_t)i, dropout) : 1);
}

/* to += drop(sum), rounded once. */
template <typename T>
__global__ void add(int64_t count, const acc_t<T> *sum, const int64_t *seed, double dropout, T *to)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x)
        to[i] = (T)((acc_t<T>)to[i] +
                    sum[i] * (seed ? (acc_t<T>)dropout_factor((uint64_t)*seed, (uint64_t)i, dropout) : 1));
}

template <typename T> __global__ void scale_by(int64_t count, T factor, T *v)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x)
        v[i] *= factor;
}

static unsigned blocks(int64_t count)
{
    return (unsigned)MIN(CEIL_DIV(count, ROW_THREADS), 1 << 16);
}

/* C [m, n] = op(A) op(B) + beta C of the type we compute in, dense. */
template <typename T>
static subspace_status times(subspace_ctx *ctx, bool transa, bool transb, int64_t m, int64_t n, int64_t k, const T *a,
                             const T *b, double beta, T *c)
{
    const subspace_dtype dtype = sizeof(T) == sizeof(double) ? SUBSPACE_F64 : SUBSPACE_F32;
    return gemm(ctx, transa, transb, m, n, k, dtype, a, transa ? m : k, b, transb ? k : n, beta, dtype, c, n);
}

/* drop(x), z1 and z2 */
template <typename T>
static subspace_status down(subspace_ctx *ctx, const subspace_tucker_linear_args *a, const buffers<T> *b,
                            const acc_t<T> **x)
{
    *x = (const acc_t<T> *)a->x;
    if (copies(a)) {
        LAUNCH(ctx, widen<T>, blocks(a->t * a->n), ROW_THREADS, 0, a->t * a->n, (const T *)a->x, seed_of(a), a->dropout,
               b->x);
        *x = b->x;
    }
    TRY(times(ctx, false, true, a->t, a->rn, a->n, *x, (const acc_t<T> *)a->v, 0, b->z1));
    TRY(times(ctx, false, true, a->t, a->rm, a->rn, (const acc_t<T> *)b->z1, (const acc_t<T> *)a->core, 0, b->z2));
    LAUNCH(ctx, scale_by<acc_t<T>>, blocks(a->t * a->rm), ROW_THREADS, 0, a->t * a->rm, (acc_t<T>)a->scale, b->z2);
    return SUBSPACE_OK;
}

/* to [t, cols] += drop(left [t, k] right), right being [k, cols], or [cols, k] transposed */
template <typename T>
static subspace_status up(subspace_ctx *ctx, const subspace_tucker_linear_args *a, const buffers<T> *b, int64_t cols,
                          int64_t k, const acc_t<T> *left, const void *right, bool transposed, const int64_t *seed,
                          void *to)
{
    const bool direct = !is_half(a->dtype) && !seed;
    acc_t<T> *sum = direct ? (acc_t<T> *)to : b->sum;
    TRY(times(ctx, false, transposed, a->t, cols, k, left, (const acc_t<T> *)right, direct, sum));
    if (!direct)
        LAUNCH(ctx, add<T>, blocks(a->t * cols), ROW_THREADS, 0, a->t * cols, (const acc_t<T> *)sum, seed, a->dropout,
               (T *)to);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status forward(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    buffers<T> b;
    const acc_t<T> *x;
    lay_out(a, (char *)ctx->workspace, &b);
    TRY(down(ctx, a, &b, &x));
    return up(ctx, a, &b, a->m, a->rm, (const acc_t<T> *)b.z2, a->u, true, NULL, a->y);
}

template <typename T> static subspace_status backward(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    buffers<T> b;
    const acc_t<T> *x, *dy = (const acc_t<T> *)a->dy, *u = (const acc_t<T> *)a->u;
    lay_out(a, (char *)ctx->workspace, &b);
    TRY(down(ctx, a, &b, &x));
    if (is_half(a->dtype)) {
        LAUNCH(ctx, widen<T>, blocks(a->t * a->m), ROW_THREADS, 0, a->t * a->m, (const T *)a->dy, NULL, 0.0, b.dy);
        dy = b.dy;
    }
    TRY(times(ctx, false, false, a->t, a->rm, a->m, dy, u, 0, b.h));
    LAUNCH(ctx, scale_by<acc_t<T>>, blocks(a->t * a->rm), ROW_THREADS, 0, a->t * a->rm, (acc_t<T>)a->scale, b.h);
    const acc_t<T> *h = b.h, *k = b.k;
    if (a->du) TRY(times(ctx, true, false, a->m, a->rm, a->t, dy, (const acc_t<T> *)b.z2, 0, (acc_t<T> *)a->du));
    if (a->dcore) TRY(times(ctx, true, false, a->rm, a->rn, a->t, h, (const acc_t<T> *)b.z1, 0, (acc_t<T> *)a->dcore));
    if (a->dv || a->dx) TRY(times(ctx, false, false, a->t, a->rn, a->rm, h, (const acc_t<T> *)a->core, 0, b.k));
    if (a->dv) TRY(times(ctx, true, false, a->rn, a->n, a->t, k, x, 0, (acc_t<T> *)a->dv));
    if (a->dx) TRY(up(ctx, a, &b, a->n, a->rn, k, a->v, false, seed_of(a), a->dx));
    return SUBSPACE_OK;
}

template <typename T> static size_t bytes_for(const subspace_tucker_linear_args *a)
{
    buffers<T> b;
    return lay_out(a, NULL, &b);
}

/* Enough for either direction. */
extern "C" size_t subspace_tucker_linear_workspace_cuda(const subspace_ctx *, const subspace_tucker_linear_args *a)
{
    DISPATCH(a->dtype, bytes_for, a);
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    TRY(subspace_tucker_linear_check(ctx, a));
    const size_t bytes = subspace_tucker_linear_workspace_cuda(ctx, a);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "tucker_linear: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    CHECK(ctx, MAX(a->t, MAX(a->n, a->m)) <= INT32_MAX, SUBSPACE_INVALID_ARGUMENT,
          "tucker_linear: a BLAS dimension does not fit in 32 bits");
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
