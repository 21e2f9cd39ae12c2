/* tucker_conv.cu - the pointwise ends of a convolution's adapter on the GPU.
 *
 *     project    z = f' x~        df = sum x~ w'      x~ = drop(x); a thread a position and RANKS ranks, a block an
 *                                                     entry of df
 *     expand     x += drop(f z)                       a thread an entry of x
 */
#include "cuda.cuh"
#include "dropout.h"

enum { RANKS = 8 }; /* entries of z a thread makes in one reading of x */

/* Where the entry of position i (of all images) and channel c lies. */
struct layout {
    int64_t b, n, p, r;
    int last;

    __device__ int64_t at(int64_t i, int64_t c, int64_t channels) const
    {
        return last ? i * channels + c : (i / p * channels + c) * p + i % p;
    }
};

struct mask {
    const int64_t *seed;
    double dropout;

    __device__ double operator()(int64_t i) const
    {
        return seed ? dropout_factor((uint64_t)*seed, (uint64_t)i, dropout) : 1;
    }
};

static layout layout_of(const subspace_tucker_conv_args *a)
{
    return {a->b, a->n, a->p, a->r, a->last};
}

static mask mask_of(const subspace_tucker_conv_args *a)
{
    return {a->dropout > 0 ? a->seed : NULL, a->dropout};
}

template <typename T> __global__ void project_z(layout s, mask drop, const T *x, const acc_t<T> *f, acc_t<T> *z)
{
    const int64_t q0 = (int64_t)blockIdx.y * RANKS;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < s.b * s.p;
         i += (int64_t)gridDim.x * blockDim.x) {
        acc_t<T> sum[RANKS] = {};
        for (int64_t c = 0; c < s.n; c++) {
            const int64_t j = s.at(i, c, s.n);
            const acc_t<T> v = (acc_t<T>)x[j] * (acc_t<T>)drop(j);
            for (int q = 0; q < RANKS; q++)
                if (q0 + q < s.r) sum[q] += v * f[c * s.r + q0 + q];
        }
        for (int q = 0; q < RANKS; q++)
            if (q0 + q < s.r) z[s.at(i, q0 + q, s.r)] = sum[q];
    }
}

template <typename T> __global__ void project_df(layout s, mask drop, const T *x, const acc_t<T> *w, acc_t<T> *df)
{
    const int64_t c = blockIdx.x;
    for (int64_t q = blockIdx.y; q < s.r; q += gridDim.y) {
        double sum = 0;
        for (int64_t i = threadIdx.x; i < s.b * s.p; i += ROW_THREADS) {
            const int64_t j = s.at(i, c, s.n);
            sum += (double)(acc_t<T>)x[j] * drop(j) * (double)w[s.at(i, q, s.r)];
        }
        sum = block_sum(sum);
        if (threadIdx.x == 0) df[c * s.r + q] = (acc_t<T>)sum;
        __syncthreads();
    }
}

template <typename T> __global__ void expand_x(layout s, mask drop, const acc_t<T> *f, const acc_t<T> *z, T *x)
{
    const int64_t count = s.b * s.n * s.p;
    for (int64_t j = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; j < count; j += (int64_t)gridDim.x * blockDim.x) {
        const int64_t c = s.last ? j % s.n : j / s.p % s.n, i = s.last ? j / s.n : j / s.p / s.n * s.p + j % s.p;
        acc_t<T> sum = 0;
        for (int64_t q = 0; q < s.r; q++) sum += f[c * s.r + q] * z[s.at(i, q, s.r)];
        x[j] = (T)((acc_t<T>)x[j] + (acc_t<T>)drop(j) * sum);
    }
}

static unsigned blocks(int64_t count)
{
    return (unsigned)MIN(CEIL_DIV(count, ROW_THREADS), 1 << 20);
}

template <typename T> static subspace_status project(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    if (a->z && a->b * a->p > 0)
        LAUNCH(ctx, project_z<T>, dim3(blocks(a->b * a->p), (unsigned)CEIL_DIV(a->r, RANKS)), ROW_THREADS, 0,
               layout_of(a), mask_of(a), (const T *)a->x, (const acc_t<T> *)a->f, (acc_t<T> *)a->z);
    if (a->df)
        LAUNCH(ctx, project_df<T>, dim3((unsigned)a->n, (unsigned)MIN(a->r, 1024)), ROW_THREADS, 0, layout_of(a),
               mask_of(a), (const T *)a->x, (const acc_t<T> *)a->w, (acc_t<T> *)a->df);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status expand(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    if (a->b * a->n * a->p > 0)
        LAUNCH(ctx, expand_x<T>, blocks(a->b * a->n * a->p), ROW_THREADS, 0, layout_of(a), mask_of(a),
               (const acc_t<T> *)a->f, (const acc_t<T> *)a->z, (T *)a->x);
    return SUBSPACE_OK;
}

/* Nothing lies between. */
extern "C" size_t subspace_tucker_conv_workspace_cuda(const subspace_ctx *, const subspace_tucker_conv_args *)
{
    return 0;
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    TRY(subspace_tucker_conv_check(ctx, a));
    CHECK(ctx, a->r <= 65535 * RANKS && a->n <= INT32_MAX, SUBSPACE_INVALID_ARGUMENT,
          "tucker_conv: a grid has no room for n=%lld, r=%lld", (long long)a->n, (long long)a->r);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_tucker_conv_project_cuda(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    TRY(prepare(ctx, a));
    DISPATCH(a->dtype, project, ctx, a);
}

extern "C" subspace_status subspace_tucker_conv_expand_cuda(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    TRY(prepare(ctx, a));
    DISPATCH(a->dtype, expand, ctx, a);
}
