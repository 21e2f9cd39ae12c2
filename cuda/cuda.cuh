/* cuda.cuh - what every CUDA file includes first. Compiled and linked; never run on a GPU so far.
 * (logits, cross_entropy and rsgd were checked by running their kernels on a CPU, one thread after the other.)
 *
 * A kernel here allocates nothing, copies nothing to or from the host and never waits: every call
 * can be captured in a CUDA graph. Sums have a fixed order; there are no floating-point atomics.
 */
#ifndef SUBSPACE_CUDA_CUH
#define SUBSPACE_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include "check.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b)-1) / (b))

/* acc_t<T>: the type we compute in and keep results in. */
template <typename T> struct acc {
    typedef float type;
};
template <> struct acc<double> {
    typedef double type;
};
template <typename T> using acc_t = typename acc<T>::type;

/* Return fn<T>(...) for a runtime dtype. */
#define DISPATCH(dtype, fn, ...)                                                                                       \
    return (dtype) == SUBSPACE_F64    ? fn<double>(__VA_ARGS__)                                                        \
           : (dtype) == SUBSPACE_F16  ? fn<__half>(__VA_ARGS__)                                                        \
           : (dtype) == SUBSPACE_BF16 ? fn<__nv_bfloat16>(__VA_ARGS__)                                                 \
                                      : fn<float>(__VA_ARGS__)

static inline bool is_half(subspace_dtype dtype)
{
    return dtype == SUBSPACE_F16 || dtype == SUBSPACE_BF16;
}

#define CUDA(ctx, call)                                                                                                \
    do {                                                                                                               \
        const cudaError_t e_ = (call);                                                                                 \
        CHECK(ctx, e_ == cudaSuccess, SUBSPACE_CUDA, "%s:%d: %s", __FILE__, __LINE__, cudaGetErrorString(e_));         \
    } while (0)

/* Every launch: LAUNCH(ctx, kernel, grid, block, bytes of dynamic shared memory, arguments...).
 * This and DYNAMIC_SHARED are all that another way of running the kernels has to replace. */
#ifndef LAUNCH
#define LAUNCH(ctx, kernel, grid, block, shared, ...)                                                                  \
    do {                                                                                                               \
        kernel<<<(grid), (block), (shared), (cudaStream_t)(ctx)->stream>>>(__VA_ARGS__);                               \
        CUDA(ctx, cudaGetLastError());                                                                                 \
    } while (0)
#define DYNAMIC_SHARED(name) extern __shared__ double name[]
#endif

/* Carve `count` items off a workspace; with a NULL base it only adds up the size. */
static inline void *carve(char *base, size_t *at, int64_t count, size_t item)
{
    void *here = base ? base + *at : NULL;
    *at += ((size_t)MAX(count, 0) * item + 255) & ~(size_t)255;
    return here;
}

enum { ROW_THREADS = 256 }; /* kernels that give a block to a row, and block_sum's arrays */

/* The sum of every thread's value, for all of them, always added in the same order. */
static __device__ inline double block_sum(double value)
{
    __shared__ double part[ROW_THREADS];
    part[threadIdx.x] = value;
    for (unsigned half = ROW_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    __syncthreads();
    return part[0];
}

#endif
