/* cholesky.cu - the launches of cholesky.cuh's factorisation, compiled once for both kinds of rates: small matrices by
 * a block each, large ones by all blocks together.
 */
#include "cholesky.cuh"

/* Sides above `over` and up to `side`, which the block's threads and shared memory are for; blocks (x, list). */
template <typename C, int threads>
__global__ void __launch_bounds__(threads, sizeof(C) == 4 ? MAX(1, 512 / threads) : 1)
    eliminate_small(const squares b, int over, int side)
{
    DYNAMIC_SHARED(shared);
    for (int64_t list = blockIdx.y; list < b.lists; list += gridDim.y)
        for (int64_t i = blockIdx.x; i < b.count[2 * list]; i += gridDim.x) {
            const square q = b.small[list * b.most + i];
            if (q.side > over && q.side <= side) eliminate_matrix(b, q, b.of + list * b.slots + q.slot, (C *)shared);
        }
}

template <typename C> __global__ void __launch_bounds__(RATE_THREADS) eliminate_large(const squares b)
{
    DYNAMIC_SHARED(shared);
    C *const left = (C *)shared, *const right = left + RATE_TILE * RATE_PAD;
    int64_t panels = 0;
    for (int64_t list = 0; list < b.lists; list++)
        for (int64_t i = 0; i < b.count[2 * list + 1]; i++)
            panels = MAX(panels, CEIL_DIV(b.large[list * b.most_large + i].side, RATE_TILE));
    if (panels > 0)
        eliminate_together(b, panels, left, right,
                           elimination_space_at(right + RATE_TILE * RATE_PAD, RATE_TILE / PANEL));
}

/* ---------------------------------------------------------------------------------- on the host */

/* The matrices of a class, if there can be any. */
template <typename C, int which>
static subspace_status eliminate_class(subspace_ctx *ctx, const device_limits *limits, const squares *b, int64_t least,
                                       int64_t side)
{
    const int over = which ? rate_class(which - 1, sizeof(C)) : 0, up_to = rate_class(which, sizeof(C));
    const int threads = rate_elimination_threads(rate_class(which, sizeof(C)));
    const unsigned lists = (unsigned)MIN(b->lists, 65535);
    const dim3 grid(rate_elimination_blocks(b->most, lists, threads, limits->multiprocessors), lists);
    if (side <= over || least > up_to) return SUBSPACE_OK;
    LAUNCH(ctx, (eliminate_small<C, threads>), grid, threads, sizeof(C) * (size_t)rate_elimination_space(up_to), *b,
           over, up_to);
    return SUBSPACE_OK;
}

template <typename C>
static subspace_status eliminate_every_class(subspace_ctx *ctx, const device_limits *limits, const squares *b,
                                             int64_t least, int64_t side)
{
    TRY((eliminate_class<C, 0>(ctx, limits, b, least, side)));
    TRY((eliminate_class<C, 1>(ctx, limits, b, least, side)));
    TRY((eliminate_class<C, 2>(ctx, limits, b, least, side)));
    if (side > rate_small(sizeof(C))) {
        const size_t shared = rate_large_shared(sizeof(C));
        int64_t blocks = 0;
        TRY(resident_blocks(ctx, limits, eliminate_large<C>, RATE_THREADS, shared, &blocks));
        blocks = MAX(1, MIN(blocks, b->lists * b->most_large * rate_upper(side)));
        CUDA(ctx, cudaMemsetAsync(b->meeting, 0, 2 * sizeof(unsigned), (cudaStream_t)ctx->stream));
        LAUNCH_COOPERATIVE(ctx, eliminate_large<C>, (unsigned)blocks, RATE_THREADS, shared, *b);
    }
    return SUBSPACE_OK;
}

subspace_status eliminate_all(subspace_ctx *ctx, const device_limits *limits, bool wide, const squares *b,
                              int64_t least, int64_t side)
{
    return wide ? eliminate_every_class<double>(ctx, limits, b, least, side)
                : eliminate_every_class<float>(ctx, limits, b, least, side);
}
