/* sinkhorn_shape.h - how a batch of plans is laid over the device: C11 and C++, no CUDA.
 *
 * A plan has `blocks` blocks, `groups` plans are on their way at once, group g taking plans g, g + groups, ... Rows
 * come in panels, the rows of one partial column sum, and columns in strips. Both depend on m and n alone, so that a
 * plan's sums, and with them its bits, do not depend on the batch or on the device.
 *
 * If they fit, a block's panels stay in its shared memory for the whole projection, else they are in the plan's place.
 */
#ifndef SUBSPACE_SINKHORN_SHAPE_H
#define SUBSPACE_SINKHORN_SHAPE_H
#include "shape.h"

enum {
    SINKHORN_THREADS = 256,
    SINKHORN_TOGETHER = 2,    /* blocks on a multiprocessor, at most; what registers are limited to */
    SINKHORN_LINES = 8,       /* a panel's rows are a multiple of this */
    SINKHORN_PANELS = 1024,   /* of a plan, at most */
    SINKHORN_STRIP = 8,       /* columns */
    SINKHORN_SMALL = 1 << 14, /* entries of a plan that one block does sooner than several can meet */
    SINKHORN_STATIC = 2048,   /* bytes of static shared memory, at most */
    SINKHORN_RESERVED = 1024  /* bytes that the device takes for each block */
};

typedef struct sinkhorn_shape {
    int64_t rows, panels, strips;  /* rows of a panel */
    int64_t ld;                    /* columns of a row in shared memory, or of partial sums: whole 16 bytes, and 16 more
                                      so that 8 x 4 entries are in 32 banks */
    int64_t share, blocks, groups; /* panels of a block */
    size_t shared;                 /* bytes of dynamic shared memory; 0: the plan is not kept there */
} sinkhorn_shape;

static inline int64_t sinkhorn_within(int64_t x, int64_t least, int64_t most)
{
    return x < least ? least : x > most ? most : x;
}

/* v, m, n > 0; `size` bytes an entry; `shared` is what a block may have, in bytes. */
static inline sinkhorn_shape sinkhorn_shape_of(int64_t v, int64_t m, int64_t n, int64_t size, int64_t multiprocessors,
                                               int64_t shared)
{
    sinkhorn_shape s;
    const int64_t lines = CEIL_DIV(m, (int64_t)SINKHORN_LINES * SINKHORN_PANELS);
    s.rows = SINKHORN_LINES * (lines > 1 ? lines : 1);
    s.panels = CEIL_DIV(m, s.rows);
    s.strips = CEIL_DIV(n, SINKHORN_STRIP);
    s.ld = (CEIL_DIV(n * size, 16) + 1) * 16 / size;
    const int small = (double)m * (double)n <= SINKHORN_SMALL;
    const int64_t panel = s.rows * s.ld * size, room = shared - SINKHORN_STATIC;
    int64_t together = 1, most = small ? 1 : sinkhorn_within(multiprocessors / v, 1, s.panels);
    s.share = CEIL_DIV(s.panels, most);
    if ((double)s.share * (double)panel <= (double)room) {
        s.shared = (size_t)(s.share * panel);
        together = (shared + SINKHORN_RESERVED) / ((int64_t)s.shared + SINKHORN_STATIC + SINKHORN_RESERVED);
        together = sinkhorn_within(together, 1, SINKHORN_TOGETHER);
    } else {
        s.shared = 0, together = SINKHORN_TOGETHER;
        most = small ? 1 : sinkhorn_within(multiprocessors * together / v, 1, s.panels);
        s.share = CEIL_DIV(s.panels, most);
    }
    s.blocks = CEIL_DIV(s.panels, s.share);
    s.groups = sinkhorn_within(multiprocessors * together / s.blocks, 1, v);
    return s;
}

#endif
