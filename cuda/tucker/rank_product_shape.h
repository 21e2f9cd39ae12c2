/* rank_product_shape.h - how rank_product.cuh cuts a product into blocks. Plain C: launcher and tests share it.
 *
 * A block makes 4 ty x 4 tx entries with ty tx = 256 threads. A rank is a short side: tiles of 16, 32 or 64 along it,
 * so that few of the multiplications are of padding. Sums are cut into slices where there are too few tiles to fill a
 * device; how many depends on the sizes alone, so that results are the same bits on every device.
 */
#ifndef SUBSPACE_RANK_PRODUCT_SHAPE_H
#define SUBSPACE_RANK_PRODUCT_SHAPE_H
#include "shape.h"

enum {
    RANK_THREADS = 256,
    RANK_SIDE = 4,     /* a thread's entries each way */
    RANK_DEPTH = 16,   /* steps of the sum in shared memory at a time */
    RANK_PAD = 4,      /* entries behind a line of shared memory: stores across lines meet few conflicts */
    RANK_BLOCKS = 512, /* blocks that fill a device */
    RANK_SLICE = 256,  /* steps of the sum in a slice, at least */
    RANK_MOST_SLICES = 512
};

typedef struct rank_shape {
    int ty, tx; /* threads along rows and columns */
    int64_t row_tiles, col_tiles, slices, slice /* steps in each, a multiple of RANK_DEPTH */;
} rank_shape;

/* For rows, cols, depth >= 0 and count >= 1 products at once; all slices have a step when depth > 0. */
static inline rank_shape rank_shape_of(int64_t rows, int64_t cols, int64_t depth, int64_t count, int sliced)
{
    rank_shape s = {16, 16, 0, 0, 1, 0};
    if (rows <= 32 && rows <= cols) s.ty = rows <= 16 ? 4 : 8;
    else if (cols <= 32) s.ty = cols <= 16 ? 64 : 32;
    s.tx = RANK_THREADS / s.ty;
    s.row_tiles = CEIL_DIV(rows, RANK_SIDE * s.ty), s.col_tiles = CEIL_DIV(cols, RANK_SIDE * s.tx);
    const int64_t tiles = s.row_tiles * s.col_tiles * count;
    if (sliced && tiles > 0 && tiles < RANK_BLOCKS) {
        s.slices = CEIL_DIV(RANK_BLOCKS, tiles);
        if (s.slices > CEIL_DIV(depth, RANK_SLICE)) s.slices = CEIL_DIV(depth, RANK_SLICE);
        if (s.slices > RANK_MOST_SLICES) s.slices = RANK_MOST_SLICES;
        if (s.slices < 1) s.slices = 1;
    }
    s.slice = CEIL_DIV(CEIL_DIV(depth, s.slices), RANK_DEPTH) * RANK_DEPTH;
    s.slices = depth > 0 ? CEIL_DIV(depth, s.slice) : 1;
    return s;
}

/* Bytes of static shared memory of a tile; at most 19 KB in float, 38 KB in double. */
static inline size_t rank_shared(int ty, int tx, size_t item)
{
    return (size_t)RANK_DEPTH * (size_t)(RANK_SIDE * (ty + tx) + 2 * RANK_PAD) * item;
}

#endif
