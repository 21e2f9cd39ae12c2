/* tucker_conv.c - the pointwise ends of a convolution's adapter, on the CPU.
 *
 *     project    z[b] = f' drop(x[b])      df = sum_b drop(x[b]) w[b]'      one pass over x for both
 *     expand     x[b] += drop(f z[b])                                       one pass over x
 *
 * With channels first x[b] is a matrix [n, p] and z[b] is [r, p]; with channels last all of x is one matrix
 * [b p, n] and z is [b p, r], the same sums with left and right exchanged. Both are the passes of mode_product.h.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "mode_product.h"

typedef struct buffers {
    product p;
    reverse r;
    mask mask;
    const struct mask *drop; /* &mask, or NULL */
    void *packed;            /* of the product */
} buffers;

/* Lay out what either direction needs from `base`; with a NULL base only *bytes is of use. */
static void lay_out(buffers *b, const subspace_ctx *ctx, const subspace_tucker_conv_args *a, char *base, size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const bool half = a->dtype == SUBSPACE_F16 || a->dtype == SUBSPACE_BF16;
    *b = (buffers){.mask = {a->seed && base ? (uint64_t)*a->seed : 0, a->dropout}};
    b->p = a->last ? (product){1, a->b * a->p, a->n, a->r} : (product){a->b, a->n, a->p, a->r};
    b->drop = a->dropout > 0 ? &b->mask : NULL;
    reverse_plan(&b->r, ctx, &b->p, item, half || b->drop, a->last, base, bytes);
    b->packed = carve(base, bytes, (int64_t)product_scratch(ctx, &b->p, item), 1);
}

#define THIS_FILE "tucker/tucker_conv.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "mode_product.h"

static subspace_status FN(project)(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    size_t bytes = 0;
    buffers b;
    lay_out(&b, ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "tucker_conv: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    FN(reverse_job) job = {.p = &b.p, .r = &b.r, .dtype = a->dtype, .x = a->x, .drop = b.drop};
    if (a->last) job.left = a->w, job.right = a->f, job.xr = a->z, job.lx = a->df, job.over = true, job.lx_scale = 1;
    else job.left = a->f, job.right = a->w, job.turn = true, job.xr = a->df, job.lx = a->z;
    FN(reverse_product)(&job);
    return SUBSPACE_OK;
}

static subspace_status FN(expand)(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    size_t bytes = 0;
    buffers b;
    lay_out(&b, ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "tucker_conv: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    FN(multiply_add)
    (ctx, &b.p, a->last ? a->z : a->f, a->last ? a->f : a->z, a->last, 1, a->dtype, a->x, a->x, b.packed, b.drop);
    return SUBSPACE_OK;
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

/* Enough for either direction. */
size_t LEVEL(subspace_tucker_conv_workspace)(const subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    size_t bytes = 0;
    buffers b;
    if (a->b * a->p > 0 && a->n > 0 && a->r > 0) lay_out(&b, ctx, a, NULL, &bytes);
    return bytes;
}

subspace_status LEVEL(subspace_tucker_conv_project)(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    TRY(subspace_tucker_conv_check(ctx, a));
    if (a->b * a->p == 0) {
        if (a->df)
            memset(a->df, 0, (size_t)(a->n * a->r) * (a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float)));
        return SUBSPACE_OK;
    }
    DISPATCH(a->dtype, project, ctx, a);
}

subspace_status LEVEL(subspace_tucker_conv_expand)(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    TRY(subspace_tucker_conv_check(ctx, a));
    if (a->b * a->p == 0) return SUBSPACE_OK;
    DISPATCH(a->dtype, expand, ctx, a);
}

#endif
