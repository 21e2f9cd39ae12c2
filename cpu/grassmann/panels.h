/* panels.h - the pass over class panels that logits and cross_entropy share.
 *
 * The rows of the weight are cut into panels of whole classes and the batch into blocks. A tile
 *     z = W_panel xhat_block'            [panel rows, block]      one GEMM
 * keeps the batch in the fast index, so that the k rows of a class are summed lane by lane for any
 * k and for ragged dims alike. An epilogue consumes the tile while it is in cache; in the
 * backward it makes dz of it. Nothing larger than tiles is ever stored. */
#ifndef SUBSPACE_PANELS_H
#define SUBSPACE_PANELS_H
#include "cpu.h"

typedef struct panels {
    const subspace_ctx *ctx;
    const subspace_logits_args *a;
    int64_t classes;       /* classes in a panel */
    int64_t count;         /* panels */
    int64_t rows;          /* most rows in a panel */
    int64_t block, blocks; /* batch rows in a block, blocks */
    int64_t round;         /* backward: panels whose dz tiles are alive together */
    int64_t slots;         /* threads; slot s always does the same part of the work */
    bool pairs;            /* bf16 that is multiplied as such: see panels_pairs.h */
    bool split;            /* float32 by three products of bf16: see multiply_split.h */
    void *xhat, *rnorm;    /* [b, n] the rows x_b widened and normalised (pairs: xhat / scale); [b] 1/|x_b| */
    void *xt;              /* [n, b] their transpose */
    void *packed;          /* [slots][...] scratch of multiply.h */
    void *tiles;           /* [slots or round][rows * block] */
    void *norms, *spare;   /* [slots][classes * block] each; spare is the epilogue's */
    void *wide;            /* [slots][...] half types: weights in float32; pairs: rows of an odd length, padded */
    void *dweight;         /* [rows of all, n] half types: dweight in float32; pairs: where blocks add to it */
    void *dx;              /* [block, n]       half types: dx of a block in float32 */
    void *scale;           /* [b]                                 pairs: of the rows */
    void *across, *down;   /* [slots][...], [round][...]          pairs: dz as dweight and as dx take it */
} panels;

typedef struct tile {
    int64_t c0, c1, r0, r1; /* classes and rows of the panel */
    int64_t b0, nb;         /* the batch block */
    int64_t slot;
    const void *from; /* backward: the projections [r1 - r0, from_ld], kept ones or z itself */
    int64_t from_ld;
} tile;

/* Plan the pass and lay out its scratch from `base`; with a NULL base only *bytes is of use. */
void LEVEL(panels_plan)(panels *, const subspace_ctx *, const subspace_logits_args *, bool backward, char *base,
                        size_t *bytes);

/* The slot's own piece of the epilogue's scratch. */
static inline void *panels_spare(const panels *p, const tile *t)
{
    const size_t item = p->a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    return (char *)p->spare + (size_t)(t->slot * p->classes * p->block) * item;
}

static inline int64_t panels_row(const panels *p, int64_t c)
{
    return p->a->start ? p->a->start[c] : c * p->a->k;
}

static inline tile panels_tile(const panels *p, int64_t panel, int64_t block, int64_t slot)
{
    tile t = {.c0 = panel * p->classes, .b0 = block * p->block, .slot = slot};
    t.c1 = MIN(t.c0 + p->classes, p->a->c);
    t.r0 = panels_row(p, t.c0), t.r1 = panels_row(p, t.c1);
    t.nb = MIN(p->block, p->a->b - t.b0);
    return t;
}

/* z is [r1 - r0, ld] (its first nb columns count), norms is [c1 - c0, nb]: || z_c ||; the
 * epilogue may overwrite it. */
typedef void panels_epilogue(void *arg, const panels *, const tile *, void *z, int64_t ld, void *norms);

#define PANELS_DECLARE(T, S)                                                                                           \
    void LEVEL(panels_forward_##S)(const panels *, T *proj, panels_epilogue *, void *arg);                             \
    void LEVEL(panels_backward_##S)(const panels *, const T *proj, panels_epilogue *, void *arg);                      \
    void LEVEL(panels_scatter_##S)(const tile *, const T *norms, subspace_dtype, void *out, int64_t ld);               \
    void LEVEL(panels_gather_##S)(const tile *, T *norms, subspace_dtype, const void *in, int64_t ld);                 \
    void LEVEL(panels_scale_##S)(const panels *, const tile *, const T *factor, T *z, int64_t ld);
PANELS_DECLARE(float, f32)
PANELS_DECLARE(double, f64)
#endif
