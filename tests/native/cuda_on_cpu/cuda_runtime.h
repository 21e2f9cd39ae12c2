// cuda_runtime.h - CUDA's execution on a CPU, for tests alone: what the files of cuda/ need of the toolkit's header of
// this name.
//
// The very same .cu files are compiled as C++ with this folder in front of the toolkit's:
//   * a thread is a fiber; __syncthreads, the warp functions and __nanosleep are where it may hand over to another;
//   * blocks run one after the other; those of a cluster, or of a cooperative launch, at once, on OS threads;
//   * memory is the host's, so that the sanitizers see every access; shared memory is exactly as large as asked for,
//     and is full of NaNs when a block begins;
//   * which device is modelled (what it has of shared memory, and clusters or not), and in which order its threads and
//     blocks run, is chosen with the instruction set's variable, SUBSPACE_ISA=sm_80|sm_86|sm_90: see model.cpp.
// It stops the program where a kernel does what a GPU punishes with a hang or rubbish: threads at different barriers,
// a warp function that not all named lanes reach, more shared memory or threads than there are.
//
// Not here: cooperative_groups, PTX, tensor cores, bulk copies, several streams; time.
#ifndef SUBSPACE_CUDA_ON_CPU_H
#define SUBSPACE_CUDA_ON_CPU_H
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <math.h>

// ---------------------------------------------------------------------------------- the language
#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local /* a block is one OS thread's work */
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct __attribute__((aligned(16))) double2 {
    double x, y;
};
static inline double2 make_double2(double x, double y)
{
    return {x, y};
}

namespace cuda_on_cpu
{
struct place { // of the thread that runs
    uint3 thread, block;
    dim3 threads, blocks;
};
#define FOUND_AT_ONCE __attribute__((tls_model("initial-exec"))) /* not by a call, which ASan would watch besides */
extern FOUND_AT_ONCE __thread place *here /* no wrapper of C++ about it */;

void barrier(int line);                   // __syncthreads
int vote(int line, bool value, int kind); // __syncthreads_count (0), _and (1), _or (2)
void lanes(int line, unsigned mask);      // __syncwarp
unsigned ballot(int line, unsigned mask, bool value);
void shuffle(int line, unsigned mask, void *value, size_t bytes, int lane); // value of `lane`
void fence();
void pause();
void *dynamic_shared();
void *shared_of(void *mine, unsigned rank);
void cluster_barrier(int line);
unsigned cluster_rank();

enum kind { PLAIN, COOPERATIVE, CLUSTERS };
void launch(kind, const char *name, unsigned cluster, dim3 grid, dim3 block, size_t shared,
            const std::function<void()> &);

template <typename T> T take(int line, unsigned mask, T value, int lane)
{
    shuffle(line, mask, &value, sizeof value, lane);
    return value;
}

inline int lane()
{
    const place *p = here;
    return static_cast<int>(((p->thread.z * p->threads.y + p->thread.y) * p->threads.x + p->thread.x) % 32);
}

// the lane a value is taken from, within groups of `width` lanes; out of the group: one's own
inline int down(int by, int width)
{
    return lane() % width + by < width ? lane() + by : lane();
}
inline int up(int by, int width)
{
    return lane() % width - by >= 0 ? lane() - by : lane();
}
inline int across(int with, int width)
{
    const int other = lane() ^ with;
    return other / width <= lane() / width ? other : lane();
}
inline int at(int source, int width)
{
    return lane() / width * width + ((source % width) + width) % width;
}
} // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::here->thread)
#define blockIdx (cuda_on_cpu::here->block)
#define blockDim (cuda_on_cpu::here->threads)
#define gridDim (cuda_on_cpu::here->blocks)

#define __syncthreads() cuda_on_cpu::barrier(__LINE__)
#define __syncthreads_count(p) cuda_on_cpu::vote(__LINE__, (p), 0)
#define __syncthreads_and(p) cuda_on_cpu::vote(__LINE__, (p), 1)
#define __syncthreads_or(p) cuda_on_cpu::vote(__LINE__, (p), 2)
#define __syncwarp(...) cuda_on_cpu::lanes(__LINE__, cuda_on_cpu::mask(__VA_ARGS__))
#define __shfl_sync(mask, value, source, ...)                                                                          \
    cuda_on_cpu::take(__LINE__, (mask), (value), cuda_on_cpu::at((source), cuda_on_cpu::width(__VA_ARGS__)))
#define __shfl_xor_sync(mask, value, with, ...)                                                                        \
    cuda_on_cpu::take(__LINE__, (mask), (value), cuda_on_cpu::across((with), cuda_on_cpu::width(__VA_ARGS__)))
#define __shfl_down_sync(mask, value, by, ...)                                                                         \
    cuda_on_cpu::take(__LINE__, (mask), (value),                                                                       \
                      cuda_on_cpu::down(static_cast<int>(by), cuda_on_cpu::width(__VA_ARGS__)))
#define __shfl_up_sync(mask, value, by, ...)                                                                           \
    cuda_on_cpu::take(__LINE__, (mask), (value), cuda_on_cpu::up(static_cast<int>(by), cuda_on_cpu::width(__VA_ARGS__)))
namespace cuda_on_cpu
{
inline int width(int w = 32)
{
    return w;
}
inline unsigned mask(unsigned m = 0xffffffffu)
{
    return m;
}
} // namespace cuda_on_cpu
#define __ballot_sync(mask, p) cuda_on_cpu::ballot(__LINE__, (mask), (p))
#define __any_sync(mask, p) (cuda_on_cpu::ballot(__LINE__, (mask), (p)) != 0)
#define __all_sync(mask, p) (cuda_on_cpu::ballot(__LINE__, (mask), !(p)) == 0)

// ------------------------------------------------------------------------- memory and arithmetic
static inline void __threadfence()
{
    cuda_on_cpu::fence();
}
static inline void __nanosleep(unsigned)
{
    cuda_on_cpu::pause();
}

static inline int atomicAdd(int *p, int v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
static inline unsigned atomicAdd(unsigned *p, unsigned v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
static inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <typename T> T atomicExch(T *p, T v)
{
    return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}

static inline float rsqrtf(float x)
{
    return 1 / sqrtf(x);
}
static inline double rsqrt(double x)
{
    return 1 / sqrt(x);
}

// ------------------------------------------------------------------------------------ the runtime
typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorCooperativeLaunchTooLarge = 82
} cudaError_t;
typedef struct CUstream_st *cudaStream_t;
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
    size_t sharedSizeBytes; /* static: not known here */
    int maxDynamicSharedSizeBytes;
    int ptxVersion; /* what the kernel was compiled for */
};

cudaError_t cudaGetLastError(); // of the last launch, and forgets it
const char *cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int *);
cudaError_t cudaDeviceGetAttribute(int *, cudaDeviceAttr, int device);
cudaError_t cuda_on_cpu_resident(int *blocks, const void *kernel, int threads, size_t shared);
int cuda_on_cpu_allowed(const void *kernel); // bytes of dynamic shared memory
cudaError_t cuda_on_cpu_allow(const void *kernel, int bytes);

template <typename K> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, K *kernel)
{
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
    a->sharedSizeBytes = 0, a->maxDynamicSharedSizeBytes = cuda_on_cpu_allowed(reinterpret_cast<const void *>(kernel));
    a->ptxVersion = 10 * major + minor;
    return cudaSuccess;
}
template <typename K> cudaError_t cudaFuncSetAttribute(K *kernel, cudaFuncAttribute, int bytes)
{
    return cuda_on_cpu_allow(reinterpret_cast<const void *>(kernel), bytes);
}
template <typename K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, K *kernel, int threads, size_t shared)
{
    return cuda_on_cpu_resident(blocks, reinterpret_cast<const void *>(kernel), threads, shared);
}
static inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t)
{
    if (bytes) std::memset(p, value, bytes);
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t)
{
    if (bytes) std::memcpy(to, from, bytes);
    return cudaSuccess;
}

// ------------------------------------------------------------- what cuda.cuh says of launches
#define LAUNCH_ON_CPU_(ctx, how, cluster, kernel, grid, block, shared, ...)                                            \
    do {                                                                                                               \
        cuda_on_cpu::launch(how, #kernel, (cluster), (grid), (block), (shared), [&] { kernel(__VA_ARGS__); });         \
        CUDA(ctx, cudaGetLastError());                                                                                 \
    } while (0)
#define LAUNCH(ctx, kernel, grid, block, shared, ...)                                                                  \
    LAUNCH_ON_CPU_(ctx, cuda_on_cpu::PLAIN, 1, kernel, grid, block, shared, __VA_ARGS__)
#define LAUNCH_COOPERATIVE(ctx, kernel, grid, block, shared, ...)                                                      \
    LAUNCH_ON_CPU_(ctx, cuda_on_cpu::COOPERATIVE, 1, kernel, grid, block, shared, __VA_ARGS__)
#define LAUNCH_CLUSTERS(ctx, kernel, cluster, grid, block, shared, ...)                                                \
    LAUNCH_ON_CPU_(ctx, cuda_on_cpu::CLUSTERS, cluster, kernel, grid, block, shared, __VA_ARGS__)
#define DYNAMIC_SHARED(name) double *const name = static_cast<double *>(cuda_on_cpu::dynamic_shared())

static inline unsigned cluster_rank()
{
    return cuda_on_cpu::cluster_rank();
}
#define cluster_sync() cuda_on_cpu::cluster_barrier(__LINE__)
template <typename T> T *cluster_at(T *mine, unsigned rank)
{
    return static_cast<T *>(cuda_on_cpu::shared_of((void *)mine, rank));
}
#endif
