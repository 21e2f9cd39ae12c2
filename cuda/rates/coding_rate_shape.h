/* coding_rate_shape.h - what the launches of coding_rate.cu and coding_rate_soft.cu have for blocks, threads and
 * memory, from sizes and the limits of a device alone.
 *
 * Products are made of tiles of RATE_TILE x RATE_TILE by RATE_THREADS threads, RATE_SLAB deep at a time. A matrix up to
 * rate_small() is factored by one block, which has it in its registers, a tile of RATE_PANEL x RATE_PANEL of the upper
 * half a thread; a larger one by all blocks of a cooperative launch, RATE_TILE rows at a time.
 */
#ifndef SUBSPACE_CODING_RATE_SHAPE_H
#define SUBSPACE_CODING_RATE_SHAPE_H
#include "shape.h"

enum {
    RATE_TILE = 64,
    RATE_SLAB = 32,
    RATE_THREADS = 128,
    RATE_PAD = RATE_TILE + 4, /* entries between rows of a tile in shared memory: 16 bytes on, and off the banks */
    RATE_PANEL = 8,
    RATE_CLASSES = 3,    /* launches for small matrices, the smallest first */
    RATE_PARTS = 64,     /* of a long group's Gram matrix, at most, */
    RATE_PART = 1024,    /* points or features each, at least */
    RATE_BLOCKS = 512,   /* tiles and parts of a matrix, about, at most */
    RATE_LARGE = 1 << 24 /* multiplications from which on one group's products are the library's */
};

/* The largest side that has a block to itself, of entries of `item` bytes: 64 of them in each thread's registers, 528
 * threads with float32 and 253 with float64, on any device. */
SHAPE_FN int rate_small(size_t item)
{
    return item == 4 ? 256 : 176;
}

/* The largest side of class 0 .. RATE_CLASSES - 1. */
SHAPE_FN int rate_class(int which, size_t item)
{
    return which == 0 ? 64 : which == 1 ? 128 : rate_small(item);
}

/* Threads of a block for matrices up to a side, whole warps: one for each tile of the upper half. */
SHAPE_FN int rate_elimination_threads(int side)
{
    const int tiles = CEIL_DIV(side, RATE_PANEL);
    return CEIL_DIV(tiles * (tiles + 1) / 2, 32) * 32;
}

/* Entries of a block's shared memory for matrices up to a side: two panels and what they become, the factor of a
 * panel's corner, and what the pivots are. */
SHAPE_FN int rate_elimination_space(int side)
{
    const int rows = CEIL_DIV(side, RATE_PANEL) * RATE_PANEL;
    return 3 * RATE_PANEL * rows + RATE_PANEL * RATE_PANEL + rows;
}

/* Bytes of shared memory of a block of the cooperative launch: two tiles, and space for the elimination of one. */
SHAPE_FN size_t rate_large_shared(size_t item)
{
    return item * (size_t)(2 * RATE_TILE * RATE_PAD + rate_elimination_space(RATE_TILE));
}

/* Bytes of shared memory of a product: two slabs. */
SHAPE_FN size_t rate_product_shared(size_t item)
{
    return item * (size_t)(2 * RATE_SLAB * RATE_PAD);
}

/* Tiles of the upper half of a matrix. */
SHAPE_FN int64_t rate_upper(int64_t side)
{
    const int64_t tiles = CEIL_DIV(side, RATE_TILE);
    return tiles * (tiles + 1) / 2;
}

/* In how many parts the Gram matrix of m points with d features is summed: as the device has room for blocks, but
 * all of them are no larger than the points. */
SHAPE_FN int64_t rate_parts(int64_t m, int64_t d)
{
    const int64_t side = m < d ? m : d, length = m < d ? d : m;
    int64_t parts = MIN((int64_t)RATE_PARTS, length / (side > RATE_PART ? side : (int64_t)RATE_PART));
    if (side <= 0) return 1;
    parts = MIN(parts, RATE_BLOCKS / rate_upper(side));
    if (parts <= 1) return 1;
    return CEIL_DIV(CEIL_DIV(length, RATE_SLAB), CEIL_DIV(CEIL_DIV(length, RATE_SLAB), parts)); /* none empty */
}

/* Where part `part` of `parts` of `length` begins: whole slabs. */
SHAPE_FN int64_t rate_part_from(int64_t length, int64_t part, int64_t parts)
{
    return MIN(length, CEIL_DIV(CEIL_DIV(length, RATE_SLAB), parts) * RATE_SLAB * part);
}

/* Blocks of a launch whose work only the device knows, for each view: at most what there could be, and enough to fill
 * the device a few times over. */
SHAPE_FN unsigned rate_blocks(int64_t most, int64_t views, int multiprocessors)
{
    const int64_t fill = CEIL_DIV((int64_t)multiprocessors * 8, views > 0 ? views : 1);
    const int64_t blocks = MIN(most, fill);
    return (unsigned)(blocks > 1 ? blocks : 1);
}

/* Blocks for the small matrices of each list, which take turns: as many as are on the device at once. */
SHAPE_FN unsigned rate_elimination_blocks(int64_t most, int64_t views, int threads, int multiprocessors)
{
    const int64_t at_once = (int64_t)multiprocessors * (threads < 512 ? 512 / threads : 1);
    const int64_t blocks = MIN(most, CEIL_DIV(at_once, views > 0 ? views : 1));
    return (unsigned)(blocks > 1 ? blocks : 1);
}

#endif
