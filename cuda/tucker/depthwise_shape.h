/* depthwise_shape.h - how depthwise.cu cuts images into pieces and blocks. Plain C: launcher and tests share it.
 *
 * A piece is what a block has in shared memory at a time: of one channel, `images` whole planes of dy, or a band of
 * `height` rows and `width` columns of one, for each of the m outputs, and all of x that any tap of theirs reads. A
 * group of threads owns `taps` taps beside one another in a row of the kernel, for one output; its threads, `lanes` of
 * them, share the piece's rows in segments of DEPTHWISE_SEGMENT columns.
 */
#ifndef SUBSPACE_DEPTHWISE_SHAPE_H
#define SUBSPACE_DEPTHWISE_SHAPE_H
#include <string.h>
#include "shape.h"
#include "subspace.h"

enum {
    DEPTHWISE_THREADS = 256,
    DEPTHWISE_SEGMENT = 8,
    DEPTHWISE_BYTES = 40 << 10, /* shared memory of a piece, at most: five blocks on an H100's multiprocessor */
    DEPTHWISE_BLOCKS = 1024     /* blocks that fill a device several times over */
};

typedef struct depthwise_shape {
    int fits;                  /* else no piece fits: a block makes one entry of dweight from global memory */
    int taps, chunks;          /* 3, 5 or 7 taps of a thread, as many times as a row of the kernel has them */
    int groups, passes, lanes; /* groups of threads in a block, blocks over all groups, threads in a group */
    int images, height, width; /* of a piece of dy */
    int segments, dy_cols;     /* of a row of dy; its pitch, with zeros behind */
    int x_rows, x_cols;        /* of a plane of x, and its pitch */
    int row_lanes;             /* threads that fetch a row, a power of two */
    int64_t bands_y, bands_x;  /* pieces down and across a plane */
    int64_t pieces, slices;    /* of a channel; blocks that share them, in turns */
    size_t shared;             /* bytes of shared memory */
} depthwise_shape;

/* Pitches are odd, so that threads on neighbouring rows meet other banks. */
static inline int64_t depthwise_x_cols(const subspace_depthwise_args *a, int64_t width, int64_t taps)
{
    return ((width - 1) * a->stride[2] + (taps - 1) * a->dilation[2] + 1) | 1;
}

static inline int64_t depthwise_x_rows(const subspace_depthwise_args *a, int64_t height)
{
    return (height - 1) * a->stride[1] + (a->kernel[1] - 1) * a->dilation[1] + 1;
}

/* For any arguments that subspace_depthwise_check lets pass, of `item` bytes in shared memory (4 or 8), with something
 * to sum: b, c, n, m and every entry of out above 0. */
static inline depthwise_shape depthwise_shape_of(const subspace_depthwise_args *a, int item)
{
    depthwise_shape s;
    memset(&s, 0, sizeof s);
    const int64_t most = DEPTHWISE_BYTES / item - 2 * DEPTHWISE_THREADS; /* entries; the rest is a table of rows */
    const int64_t channels = a->c * a->n;
    const int64_t kw = a->kernel[2], planes = a->kernel[0], tap_rows = a->kernel[0] * a->kernel[1];
    if (tap_rows > most || kw > most || a->m > most) return s;
    for (int i = 0; i < 3; i++)
        if (a->stride[i] > most || a->dilation[i] > most) return s;
    s.taps = kw <= 3 ? 3 : kw <= 5 ? 5 : 7;
    s.chunks = (int)CEIL_DIV(kw, s.taps);
    const int64_t taps = (int64_t)s.taps * s.chunks, groups = a->m * tap_rows * s.chunks;
    s.groups = groups < DEPTHWISE_THREADS ? (int)groups : DEPTHWISE_THREADS;
    s.passes = (int)CEIL_DIV(groups, s.groups), s.groups = (int)CEIL_DIV(groups, s.passes);
    s.lanes = DEPTHWISE_THREADS / s.groups;

    int64_t width = CEIL_DIV(a->out[2], DEPTHWISE_SEGMENT) * DEPTHWISE_SEGMENT, height = 0;
    for (;; width = CEIL_DIV(width / 2, DEPTHWISE_SEGMENT) * DEPTHWISE_SEGMENT) {
        const int64_t x_cols = depthwise_x_cols(a, width, taps), dy_cols = width | 1;
        /* planes x_rows(height) x_cols + m height dy_cols <= most */
        const int64_t room = most - planes * x_cols * (depthwise_x_rows(a, 1) - a->stride[1]);
        height = x_cols > most ? 0 : room / (planes * x_cols * a->stride[1] + a->m * dy_cols);
        if (room < 0) height = 0;
        if (height >= 4 || height >= a->out[1] || width == DEPTHWISE_SEGMENT) break;
    }
    if (height < 1) return s;
    if (height > DEPTHWISE_THREADS) height = DEPTHWISE_THREADS; /* the table of rows */
    s.fits = 1;
    s.bands_y = CEIL_DIV(a->out[1], height), s.height = (int)CEIL_DIV(a->out[1], s.bands_y);
    s.bands_x = CEIL_DIV(a->out[2], width);
    s.width = (int)(width < a->out[2] ? width : a->out[2]);
    s.segments = (int)(width / DEPTHWISE_SEGMENT), s.dy_cols = (int)width | 1;
    s.x_rows = (int)depthwise_x_rows(a, s.height), s.x_cols = (int)depthwise_x_cols(a, width, taps);
    const int64_t image = planes * s.x_rows * s.x_cols + a->m * s.height * s.dy_cols;
    s.images = 1;
    if (s.bands_y == 1 && s.bands_x == 1) { /* several small planes: four units of work for every lane */
        const int64_t wanted = CEIL_DIV(4 * (int64_t)s.lanes, (int64_t)s.height * s.segments);
        int64_t images = most / image;
        if (images > wanted) images = wanted;
        const int64_t spare = a->b * channels * s.passes / DEPTHWISE_BLOCKS; /* blocks come first */
        if (images > spare) images = spare;
        if (images > DEPTHWISE_THREADS / s.height) images = DEPTHWISE_THREADS / s.height;
        if (images > 1) s.images = (int)images;
    }
    s.row_lanes = s.x_cols <= 8 ? 8 : s.x_cols <= 16 ? 16 : 32;
    s.pieces = CEIL_DIV(a->b, s.images) * a->out[0] * s.bands_y * s.bands_x;
    s.slices = CEIL_DIV(DEPTHWISE_BLOCKS, channels * s.passes);
    if (s.slices > s.pieces) s.slices = s.pieces;
    const int64_t sums = DEPTHWISE_THREADS * (int64_t)s.taps, piece = s.images * image;
    s.shared = (size_t)(piece > sums ? piece : sums) * (size_t)item + 2 * DEPTHWISE_THREADS * sizeof(int);
    return s;
}

#endif
