/* hadamard.cuh - Walsh-Hadamard transforms of many rows, on the GPU; hadamard.h's twin.
 *
 *     (a, b) <- (a + b, a - b)     for all pairs of entries whose places differ in one bit; bits from high to low
 *
 * A row that fits a block's shared memory is read and written once. A longer one is first transformed along the bits
 * above, up to LINES lines at a time, a warp's width of neighbouring columns to a block: rows of up to 2^21 entries
 * (2^19 in double) go through memory twice, longer ones three times. In shared memory the bits are done three at a
 * time, in registers; the last five, between the lanes of a warp. Nothing is rounded but the sums and differences, so
 * that the bits are those of the CPU.
 */
#ifndef SUBSPACE_HADAMARD_CUH
#define SUBSPACE_HADAMARD_CUH
#include "cuda.cuh"

enum {
    TILE_BYTES = 1 << 15, /* of shared memory */
    CHUNK = 1 << 11,      /* entries of short rows that a block takes, at least */
    WARP_BITS = 5,
    TOGETHER = 3, /* bits done in registers */
};

/* Entries of a tile, and lines of one that is a warp wide */
template <typename A> SHAPE_FN int64_t tile_of()
{
    return TILE_BYTES / (int64_t)sizeof(A);
}

SHAPE_FN int bits_of(int64_t n) /* of a power of two */
{
    int bits = 0;
    while ((int64_t)1 << bits < n) bits++;
    return bits;
}

/* BITS bits of a place, from `low` on, of `count` entries */
template <int BITS, typename A> static __device__ inline void butterflies(A *tile, unsigned count, int low)
{
    for (unsigned i = threadIdx.x; i < count >> BITS; i += ROW_THREADS) {
        A *at = tile + ((i >> low << (low + BITS)) | (i & ((1u << low) - 1)));
        A v[1 << BITS];
#pragma unroll
        for (int k = 0; k < 1 << BITS; k++) v[k] = at[k << low];
#pragma unroll
        for (int h = 1 << BITS >> 1; h > 0; h /= 2)
#pragma unroll
            for (int k = 0; k < 1 << BITS; k++)
                if ((k & h) == 0) {
                    const A a = v[k], b = v[k + h];
                    v[k] = a + b, v[k + h] = a - b;
                }
#pragma unroll
        for (int k = 0; k < 1 << BITS; k++) at[k << low] = v[k];
    }
    __syncthreads();
}

/* The bits of a place from `top` - 1 down to those within a warp */
template <typename A> static __device__ inline void across_warps(A *tile, unsigned count, int top)
{
    for (int low = top; low > WARP_BITS;) {
        const int now = MIN(low - WARP_BITS, (int)TOGETHER);
        low -= now;
        if (now == 3) butterflies<3>(tile, count, low);
        else if (now == 2) butterflies<2>(tile, count, low);
        else butterflies<1>(tile, count, low);
    }
}

/* Rows of 2^bits that fit a tile, a block some whole ones: `chunk` entries of `total` */
template <typename From, typename To>
__global__ void __launch_bounds__(ROW_THREADS)
    transform_lines(const From *x, To *y, int64_t total, int bits, unsigned chunk, acc_t<From> scale)
{
    typedef acc_t<From> A;
    __shared__ A tile[TILE_BYTES / sizeof(A)];
    const int64_t begin = (int64_t)blockIdx.x * chunk;
    const unsigned count = (unsigned)MIN((int64_t)chunk, total - begin);
    for (unsigned i = threadIdx.x; i < count; i += ROW_THREADS) tile[i] = (A)x[begin + i];
    __syncthreads();
    across_warps(tile, count, bits);
    for (unsigned i = threadIdx.x; i - threadIdx.x % WARP < count; i += ROW_THREADS) {
        A v = i < count ? tile[i] : A(0);
        for (unsigned h = 1u << MIN(bits, (int)WARP_BITS) >> 1; h > 0; h /= 2) {
            const A other = __shfl_xor_sync(ALL_LANES, v, h);
            v = threadIdx.x & h ? other - v : v + other;
        }
        if (i < count) y[begin + i] = (To)(v * scale);
    }
}

/* `bits` bits of a place, from that of `inner` on: a block 2^bits lines that are `inner` apart, a warp's width of them
 */
template <typename From>
__global__ void __launch_bounds__(ROW_THREADS) transform_columns(const From *x, acc_t<From> *y, int bits, int64_t inner)
{
    typedef acc_t<From> A;
    __shared__ A tile[TILE_BYTES / sizeof(A)];
    const int64_t outer = (int64_t)blockIdx.x / (inner / WARP), col = (int64_t)blockIdx.x % (inner / WARP) * WARP;
    const int64_t begin = (outer << bits) * inner + col;
    const unsigned count = WARP << bits;
    for (unsigned i = threadIdx.x; i < count; i += ROW_THREADS) tile[i] = (A)x[begin + i / WARP * inner + i % WARP];
    __syncthreads();
    across_warps(tile, count, bits + WARP_BITS);
    for (unsigned i = threadIdx.x; i < count; i += ROW_THREADS) y[begin + i / WARP * inner + i % WARP] = tile[i];
}

/* v rows of n entries from x to y, which may be x; `wide` [v, n] is used for half types of long rows, or is y. */
template <typename T>
static subspace_status transform_rows(subspace_ctx *ctx, int64_t v, int64_t n, double scale, const T *x, T *y,
                                      acc_t<T> *wide)
{
    typedef acc_t<T> A;
    const int bits = bits_of(n), fits = bits_of(tile_of<A>()), most = fits - WARP_BITS;
    const int64_t line = MIN(n, tile_of<A>()), total = v * n;
    const unsigned chunk = (unsigned)MAX(line, (int64_t)CHUNK);
    const unsigned blocks = (unsigned)CEIL_DIV(total, (int64_t)chunk);
    for (int high = bits, left; high > fits; high = left) {
        const int now = CEIL_DIV(high - fits, CEIL_DIV(high - fits, most));
        const unsigned tiles = (unsigned)(total >> now) / WARP;
        left = high - now;
        if (high == bits) LAUNCH(ctx, transform_columns<T>, tiles, ROW_THREADS, 0, x, wide, now, (int64_t)1 << left);
        else LAUNCH(ctx, transform_columns<A>, tiles, ROW_THREADS, 0, (const A *)wide, wide, now, (int64_t)1 << left);
    }
    if (n == line) LAUNCH(ctx, (transform_lines<T, T>), blocks, ROW_THREADS, 0, x, y, total, bits, chunk, (A)scale);
    else LAUNCH(ctx, (transform_lines<A, T>), blocks, ROW_THREADS, 0, (const A *)wide, y, total, fits, chunk, (A)scale);
    return SUBSPACE_OK;
}

#endif
