/* cuda.cuh - what every CUDA file includes first. Never run on a GPU so far; the kernels run, and are tested, on a
 * CPU under tests/native/cuda_on_cpu.
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
#include "shape.h"

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

/* ------------------------------------------------------------------------------- launches
 * Every launch is one of these: (ctx, kernel, [cluster,] grid, block, bytes of dynamic shared memory, arguments...).
 * They, DYNAMIC_SHARED and the three functions of clusters are all that another way of running the kernels has to
 * replace: tests/native/cuda_on_cpu does, by defining LAUNCH and the rest before it comes here.
 *
 * LAUNCH_COOPERATIVE: all blocks run at once, at most resident_blocks() of them, and may meet in grid_sync().
 * LAUNCH_CLUSTERS (sm_90 and later): each `cluster` neighbouring blocks run at once, may meet in cluster_sync() and
 * read one another's shared memory. */
#ifndef LAUNCH
#define LAUNCH(ctx, kernel, grid, block, shared, ...)                                                                  \
    do {                                                                                                               \
        const size_t shared_ = (shared);                                                                               \
        if (shared_ > 0) CUDA(ctx, allow_shared(kernel, shared_));                                                     \
        kernel<<<(grid), (block), shared_, (cudaStream_t)(ctx)->stream>>>(__VA_ARGS__);                                \
        CUDA(ctx, cudaGetLastError());                                                                                 \
    } while (0)

#define LAUNCH_WITH_(ctx, attribute_, kernel, grid, block, shared, ...)                                                \
    do {                                                                                                               \
        cudaLaunchConfig_t config_ = {};                                                                               \
        config_.gridDim = (grid), config_.blockDim = (block), config_.dynamicSmemBytes = (shared);                     \
        config_.stream = (cudaStream_t)(ctx)->stream, config_.attrs = &attribute_, config_.numAttrs = 1;               \
        if (config_.dynamicSmemBytes > 0) CUDA(ctx, allow_shared(kernel, config_.dynamicSmemBytes));                   \
        CUDA(ctx, cudaLaunchKernelEx(&config_, kernel, __VA_ARGS__));                                                  \
    } while (0)

#define LAUNCH_COOPERATIVE(ctx, kernel, grid, block, shared, ...)                                                      \
    do {                                                                                                               \
        cudaLaunchAttribute attribute_ = {};                                                                           \
        attribute_.id = cudaLaunchAttributeCooperative, attribute_.val.cooperative = 1;                                \
        LAUNCH_WITH_(ctx, attribute_, kernel, grid, block, shared, __VA_ARGS__);                                       \
    } while (0)

#define LAUNCH_CLUSTERS(ctx, kernel, cluster, grid, block, shared, ...)                                                \
    do {                                                                                                               \
        cudaLaunchAttribute attribute_ = {};                                                                           \
        attribute_.id = cudaLaunchAttributeClusterDimension;                                                           \
        attribute_.val.clusterDim.x = (cluster), attribute_.val.clusterDim.y = attribute_.val.clusterDim.z = 1;        \
        LAUNCH_WITH_(ctx, attribute_, kernel, grid, block, shared, __VA_ARGS__);                                       \
    } while (0)

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) double name[]

/* Which block of its cluster this is. */
static __device__ inline unsigned cluster_rank()
{
    unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

/* All threads of all blocks of a cluster meet; what they wrote to shared memory before is seen after. */
static __device__ inline void cluster_sync()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

/* Where block `rank` of the cluster has what lies at `mine` in this block's shared memory. */
template <typename T> static __device__ inline T *cluster_at(T *mine, unsigned rank)
{
#if __CUDA_ARCH__ >= 900
    uint64_t theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
    return (T *)theirs;
#else
    return rank ? NULL : mine;
#endif
}
#endif

/* ----------------------------------------------------------------------- the device, on the host */

/* Leave for a kernel to have `shared` bytes of dynamic shared memory. 48 KiB need none, but what is static counts too.
 * It is always for all that a block may have: another thread of the program may launch the same kernel with more. */
template <typename K> static cudaError_t allow_shared(K *kernel, size_t shared)
{
    cudaFuncAttributes has;
    int device = 0, most = 0;
    cudaError_t error = cudaFuncGetAttributes(&has, kernel);
    if (error != cudaSuccess || shared <= (size_t)has.maxDynamicSharedSizeBytes) return error;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    most -= (int)has.sharedSizeBytes;
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MAX(most, (int)shared));
}

typedef struct device_limits {
    int major, minor; /* compute capability */
    int multiprocessors;
    size_t shared; /* bytes of shared memory a block may have */
} device_limits;

static inline subspace_status limits_of(subspace_ctx *ctx, device_limits *limits)
{
    int device = 0, shared = 0;
    CUDA(ctx, cudaGetDevice(&device));
    CUDA(ctx, cudaDeviceGetAttribute(&limits->major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA(ctx, cudaDeviceGetAttribute(&limits->minor, cudaDevAttrComputeCapabilityMinor, device));
    CUDA(ctx, cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device));
    CUDA(ctx, cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    limits->shared = (size_t)shared;
    return SUBSPACE_OK;
}

/* How many blocks of a kernel are on the device at once. */
template <typename K>
static subspace_status resident_blocks(subspace_ctx *ctx, const device_limits *limits, K *kernel, int threads,
                                       size_t shared, int64_t *blocks)
{
    int each = 0;
    CUDA(ctx, allow_shared(kernel, shared));
    CUDA(ctx, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared));
    *blocks = (int64_t)each * limits->multiprocessors;
    return SUBSPACE_OK;
}

/* May a kernel be launched in clusters? Only if its code knows of them: on a device that does it can still be that of
 * an older one, from PTX. */
template <typename K> static subspace_status clusters_of(subspace_ctx *ctx, K *kernel, bool *clusters)
{
    cudaFuncAttributes has;
    CUDA(ctx, cudaFuncGetAttributes(&has, kernel));
    *clusters = has.ptxVersion >= 90;
    return SUBSPACE_OK;
}

/* Carve `count` items off a workspace; with a NULL base it only adds up the size. */
static inline void *carve(char *base, size_t *at, int64_t count, size_t item)
{
    void *here = base ? base + *at : NULL;
    *at += ((size_t)MAX(count, 0) * item + 255) & ~(size_t)255;
    return here;
}

/* ------------------------------------------------------------------------------ threads together */
enum { ROW_THREADS = 256, WARP = 32 }; /* kernels that give a block to a row */
#define ALL_LANES 0xffffffffu

/* The sum of every lane's value, for all of them. The order is fixed. */
template <typename V> static __device__ inline V warp_sum(V value)
{
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
    return value;
}

/* The larger of two, or NaN if one is. */
static __device__ inline double larger(double a, double b)
{
    return a != a || a >= b ? a : b;
}

/* The largest of every lane's value, for all of them; a NaN is passed on. Not by larger(), whose tests in the other
 * order cost eliminate_small<float> up to 40 bytes of stack a thread (nvcc 13.0). */
static __device__ inline double warp_max(double value)
{
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const double other = __shfl_xor_sync(ALL_LANES, value, lanes);
        value = value >= other || isnan(value) ? value : other;
    }
    return value;
}

static __device__ inline unsigned thread_in_block()
{
    return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
}

/* The sum of every thread's value, for all of them, always added in the same order. A whole number of warps. */
static __device__ inline double block_sum(double value)
{
    __shared__ double part[WARP];
    const unsigned thread = thread_in_block(), warps = blockDim.x * blockDim.y * blockDim.z / WARP;
    value = warp_sum(value);
    if (thread % WARP == 0) part[thread / WARP] = value;
    __syncthreads();
    value = warp_sum(thread % WARP < warps ? part[thread % WARP] : 0.);
    __syncthreads(); /* `part` may be used again */
    return value;
}

/* The largest of every thread's value; a NaN among them is the result. */
static __device__ inline double block_max(double value)
{
    __shared__ double part[WARP];
    const unsigned thread = thread_in_block(), warps = blockDim.x * blockDim.y * blockDim.z / WARP;
    value = warp_max(value);
    if (thread % WARP == 0) part[thread / WARP] = value;
    __syncthreads();
    value = warp_max(thread % WARP < warps ? part[thread % WARP] : part[0]);
    __syncthreads();
    return value;
}

/* `blocks` blocks of a cooperative launch meet; what they wrote to global memory before is seen after, by plain loads.
 * `meeting` is two words of theirs in global memory, zero before the first launch that uses them; the second counts
 * on. */
static __device__ inline void blocks_sync(unsigned *meeting, unsigned blocks)
{
    __syncthreads();
    if (thread_in_block() == 0) {
        const unsigned round = *(volatile unsigned *)&meeting[1];
        __threadfence();
        if (atomicAdd(&meeting[0], 1u) == blocks - 1) {
            atomicExch(&meeting[0], 0u);
            __threadfence();
            atomicAdd(&meeting[1], 1u);
        } else {
            while (*(volatile unsigned *)&meeting[1] == round) __nanosleep(20);
        }
        __threadfence();
    }
    __syncthreads();
}

/* All of them. */
static __device__ inline void grid_sync(unsigned *meeting)
{
    blocks_sync(meeting, gridDim.x * gridDim.y * gridDim.z);
}

#endif
