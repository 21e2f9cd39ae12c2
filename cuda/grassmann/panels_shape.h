/* panels_shape.h - how panels.cuh cuts classes and batch into tiles. Plain C: launcher and tests share it.
 *
 * A tile's z, of float32, is to stay in the L2 of a large GPU between its GEMM and its epilogue. Tiles are about
 * square: a block of x, a panel of W and the block's dx stay there too, and dW is read and written once a block.
 */
#ifndef SUBSPACE_PANELS_SHAPE_H
#define SUBSPACE_PANELS_SHAPE_H
#include "shape.h"

#define PANEL_TILE ((int64_t)1 << 22)          /* elements of z: 16 MiB of float32 */
#define PANEL_BLOCK ((int64_t)4096)            /* batch rows in a block */
#define PANEL_RAGGED_BLOCK ((int64_t)128)      /* at least so many when a panel is all rows */
#define PANEL_KEPT_BLOCK ((int64_t)1 << 20)    /* z is kept whole: as many as a grid takes */
enum { PANEL_CLASSES = 8, PANEL_BATCH = 128 }; /* an epilogue's block of threads: classes x batch rows */

typedef struct panels_shape {
    int64_t classes, count; /* classes in a panel, panels */
    int64_t rows;           /* most rows in a panel */
    int64_t block, blocks;  /* batch rows in a block, blocks */
} panels_shape;

/* Leading dimension of nb batch rows: tensor cores like aligned rows. */
static inline int64_t panels_ld(int64_t nb)
{
    return CEIL_DIV(nb, 8) * 8;
}

/* For b, c, rows >= 0 and any k; block and classes are at least 1, blocks and count 0 where there is nothing.
 * kept: the forward that keeps z, in one panel. */
static inline panels_shape panels_shape_of(int64_t b, int64_t c, int64_t k, int64_t rows, int ragged, int kept)
{
    panels_shape s;
    s.block = kept ? PANEL_KEPT_BLOCK : PANEL_BLOCK;
    if (!kept && ragged) s.block = MAX(PANEL_RAGGED_BLOCK, MIN(PANEL_BLOCK, PANEL_TILE / MAX(rows, 1)));
    s.block = MAX(MIN(s.block, b), 1);
    s.blocks = CEIL_DIV(b, s.block);
    s.classes = MAX(c, 1);
    if (!kept && !ragged) s.classes = MIN(s.classes, MAX(1, PANEL_TILE / (s.block * MAX(k, 1))));
    s.count = CEIL_DIV(c, s.classes);
    if (s.count > 1) s.classes = CEIL_DIV(c, s.count); /* panels of one size */
    s.rows = ragged ? rows : s.classes * k;
    return s;
}

/* Classes that a block of cross_entropy adds up one after the other, a multiple of PANEL_CLASSES: few enough for some
 * 500 blocks, where there are as many, yet 16 at least: a share is 32 bytes for 64 k or more of z. */
static inline int64_t panels_strip(int64_t classes, int64_t nb)
{
    const int64_t across = CEIL_DIV(512, CEIL_DIV(MAX(nb, 1), PANEL_BATCH));
    const int64_t strip = CEIL_DIV(CEIL_DIV(MAX(classes, 1), across), PANEL_CLASSES) * PANEL_CLASSES;
    return MAX(16, MIN(strip, 128));
}

#endif
