/* logits.c - subspace logits on the CPU.
 *
 *     z[b,c,:]     = weight_c xhat_b               panels.c: one GEMM a panel
 *     logits[b,c]  = gamma || z[b,c,:] ||          one pass over the tile
 *
 *     dz[b,c,:]    = gamma dlogits z / ||z||       one pass over the tile, 0 where z is 0
 *     dweight, dx                                  panels.c: one GEMM each
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "panels.h"

/* Enough for either direction. */
size_t LEVEL(subspace_logits_workspace)(const subspace_ctx *ctx, const subspace_logits_args *a)
{
    size_t forward = 0, backward = 0;
    panels p;
    LEVEL(panels_plan)(&p, ctx, a, false, NULL, &forward);
    LEVEL(panels_plan)(&p, ctx, a, true, NULL, &backward);
    return MAX(forward, backward);
}

#define THIS_FILE "grassmann/logits.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

static void FN(write_logits)(void *arg, const panels *p, const tile *t, void *z, int64_t ld, void *norms)
{
    const subspace_logits_args *a = arg;
    const T gamma = (T)a->gamma;
    T *y = norms;
    (void)p, (void)z, (void)ld;
    for (int64_t i = 0; i < (t->c1 - t->c0) * t->nb; i++) y[i] *= gamma;
    FN(panels_scatter)(t, y, a->dtype, a->logits, a->c);
}

static void FN(make_dz)(void *arg, const panels *p, const tile *t, void *z, int64_t ld, void *norms)
{
    const subspace_logits_args *a = arg;
    const T gamma = (T)a->gamma, *norm = norms;
    T *factor = panels_spare(p, t);
    FN(panels_gather)(t, factor, a->dtype, a->dlogits, a->c);
    for (int64_t i = 0; i < (t->c1 - t->c0) * t->nb; i++) factor[i] = norm[i] > 0 ? gamma * factor[i] / norm[i] : 0;
    FN(panels_scale)(p, t, factor, z, ld);
}

static subspace_status FN(forward)(subspace_ctx *ctx, const subspace_logits_args *a)
{
    size_t bytes = 0;
    panels p;
    LEVEL(panels_plan)(&p, ctx, a, false, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "logits: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, bytes);
    FN(panels_forward)(&p, a->proj, FN(write_logits), (void *)a);
    return SUBSPACE_OK;
}

static subspace_status FN(backward)(subspace_ctx *ctx, const subspace_logits_args *a)
{
    size_t bytes = 0;
    panels p;
    LEVEL(panels_plan)(&p, ctx, a, true, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "logits_backward: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    FN(panels_backward)(&p, a->proj, FN(make_dz), (void *)a);
    return SUBSPACE_OK;
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

subspace_status LEVEL(subspace_logits)(subspace_ctx *ctx, const subspace_logits_args *a)
{
    TRY(subspace_logits_check(ctx, a));
    DISPATCH(a->dtype, forward, ctx, a);
}

subspace_status LEVEL(subspace_logits_backward)(subspace_ctx *ctx, const subspace_logits_args *a)
{
    TRY(subspace_logits_check(ctx, a));
    DISPATCH(a->dtype, backward, ctx, a);
}

#endif
