/* join.cuh - the sum of slices: out[i] = scale sum_s part[s, i], in double and in a fixed order.
 *
 * A block takes 32 neighbouring entries; its 8 warps take every 8th slice each, and are added up in order.
 *
 * Included by depthwise.cu and rank_product.cuh.
 */
#ifndef SUBSPACE_JOIN_CUH
#define SUBSPACE_JOIN_CUH
#include "cuda.cuh"

enum { JOIN_WARPS = 8 };

template <typename A>
__global__ void __launch_bounds__(WARP *JOIN_WARPS)
    join_slices(const A *part, int64_t slices, int64_t count, double scale, A *out)
{
    __shared__ double sums[JOIN_WARPS][WARP];
    const int64_t i = (int64_t)blockIdx.x * WARP + threadIdx.x;
    double sum = 0;
#pragma unroll 8
    for (int64_t s = threadIdx.y; s < slices; s += JOIN_WARPS)
        if (i < count) sum += (double)part[s * count + i];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= count) return;
    for (int w = 1; w < JOIN_WARPS; w++) sum += sums[w][threadIdx.x];
    out[i] = (A)(scale * sum);
}

template <typename A>
static subspace_status join(subspace_ctx *ctx, const A *part, int64_t slices, int64_t count, double scale, A *out)
{
    LAUNCH(ctx, join_slices<A>, (unsigned)CEIL_DIV(count, WARP), dim3(WARP, JOIN_WARPS), 0, part, slices, count, scale,
           out);
    return SUBSPACE_OK;
}

#endif
