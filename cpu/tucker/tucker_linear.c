/* tucker_linear.c - the change of a linear layer added to its output, and its gradients, on the CPU.
 *
 *     z1 = drop(x) V'    z2 = z1 core'    y += scale z2 U'                one pass over x, one over y
 *
 *     h = scale dy U,  dU = scale dy' z2                                  one pass over dy
 *     dcore = h' z1,   k = h core
 *     dV = k' drop(x),  dx += drop(k V)                                   one over x, one over dx
 *
 * z1, z2, h and k have a rank's width: x is read once more for z1 in the backward, and nothing is kept but x.
 * Every product is one of mode_product.h's two passes, where V and U' stand for [k, n] and U, and V turned, for [n, k].
 * A step keeps few bytes beside its results, so what lies the other way is turned over piece by piece, the gradients of
 * U and of V turned, too, and k takes the place of z1.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "mode_product.h"

typedef struct buffers {
    const subspace_ctx *ctx;
    mask mask;
    const struct mask *drop; /* &mask, or NULL */
    void *z1, *z2, *h, *k;   /* [t, rn], [t, rm], [t, rm], [t, rn] */
    void *scratch;           /* of the pass that runs */
} buffers;

static bool is_half(subspace_dtype dtype)
{
    return dtype == SUBSPACE_F16 || dtype == SUBSPACE_BF16;
}

/* Lay out either direction's buffers from `base`; with a NULL base only *bytes is of use. */
static void lay_out(buffers *b, const subspace_ctx *ctx, const subspace_tucker_linear_args *a, char *base,
                    size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const product passes[] = {
        {1, a->t, a->n, a->rn}, {1, a->t, a->rn, a->rm}, {1, a->t, a->rm, a->rn}, {1, a->t, a->m, a->rm}};
    size_t most = 0;
    *b = (buffers){.ctx = ctx, .mask = {a->seed && base ? (uint64_t)*a->seed : 0, a->dropout}};
    b->drop = a->dropout > 0 ? &b->mask : NULL;
    b->z1 = carve(base, bytes, a->t * a->rn, item);
    b->z2 = carve(base, bytes, a->t * a->rm, item);
    b->h = carve(base, bytes, a->t * a->rm, item);
    b->k = b->z1;
    for (int i = 0; i < 5; i++) { /* the last is the first again, turned over */
        const product *p = &passes[i % 4];
        reverse r;
        size_t pass = 0;
        if (i == 4 && !a->turned) continue;
        reverse_plan(&r, ctx, p, item, is_half(a->dtype) || b->drop, i > 2, NULL, &pass);
        most = MAX(most, MAX(pass, product_scratch(ctx, p, item)));
    }
    b->scratch = carve(base, bytes, (int64_t)most, 1);
}

#define THIS_FILE "tucker/tucker_linear.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "mode_product.h"

/* xr = x R and lx = left' x of a matrix x [m, n], either left out; R is [k, n] (turn) or [n, k]. `over`: lx is turned
 * over and scaled. */
static void FN(pass)(const buffers *b, const product *p, subspace_dtype dtype, const void *x, const mask *drop,
                     const T *right, bool turn, T *xr, const T *left, T *lx, bool over, double scale)
{
    reverse r;
    size_t bytes = 0;
    reverse_plan(&r, b->ctx, p, sizeof(T), is_half(dtype) || drop, over, b->scratch, &bytes);
    FN(reverse_product)
    (&(FN(reverse_job)){.p = p,
                        .r = &r,
                        .dtype = dtype,
                        .x = x,
                        .left = left,
                        .right = right,
                        .turn = turn,
                        .xr = xr,
                        .lx = lx,
                        .over = over,
                        .lx_scale = (T)scale,
                        .drop = drop});
}

/* z1 and z2 */
static void FN(down)(const buffers *b, const subspace_tucker_linear_args *a)
{
    const subspace_dtype wide = IS_F32 ? SUBSPACE_F32 : SUBSPACE_F64;
    const product first = {1, a->t, a->n, a->rn}, second = {1, a->t, a->rn, a->rm};
    FN(pass)(b, &first, a->dtype, a->x, b->drop, a->v, !a->turned, b->z1, NULL, NULL, false, 1);
    FN(pass)(b, &second, wide, b->z1, NULL, a->core, true, b->z2, NULL, NULL, false, 1);
}

static subspace_status FN(forward)(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    const product up = {1, a->t, a->m, a->rm};
    size_t bytes = 0;
    buffers b;
    lay_out(&b, ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "tucker_linear: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    FN(down)(&b, a);
    FN(multiply_add)(ctx, &up, b.z2, a->u, true, (T)a->scale, a->dtype, a->y, a->y, b.scratch, NULL);
    return SUBSPACE_OK;
}

static subspace_status FN(backward)(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    const subspace_dtype wide = IS_F32 ? SUBSPACE_F32 : SUBSPACE_F64;
    const product up = {1, a->t, a->m, a->rm}, middle = {1, a->t, a->rn, a->rm}, back = {1, a->t, a->rm, a->rn},
                  down = {1, a->t, a->n, a->rn};
    const bool inner = a->dv || a->dx;
    size_t bytes = 0;
    buffers b;
    lay_out(&b, ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "tucker_linear_backward: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    if (a->du || a->dcore) FN(down)(&b, a);
    FN(pass)(&b, &up, a->dtype, a->dy, NULL, a->u, false, b.h, b.z2, a->du, true, a->scale);
    for (int64_t i = 0; i < a->t * a->rm; i++) ((T *)b.h)[i] *= (T)a->scale;
    if (a->dcore) FN(pass)(&b, &middle, wide, b.z1, NULL, NULL, false, NULL, b.h, a->dcore, false, 1);
    if (inner) FN(pass)(&b, &back, wide, b.h, NULL, a->core, false, b.k, NULL, NULL, false, 1);
    if (a->dv) FN(pass)(&b, &down, a->dtype, a->x, b.drop, NULL, false, NULL, b.k, a->dv, a->turned, 1);
    if (a->dx) FN(multiply_add)(ctx, &down, b.k, a->v, a->turned, 1, a->dtype, a->dx, a->dx, b.scratch, b.drop);
    return SUBSPACE_OK;
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

/* Enough for either direction. */
size_t LEVEL(subspace_tucker_linear_workspace)(const subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    size_t bytes = 0;
    buffers b;
    if (a->t > 0 && a->n > 0 && a->m > 0 && a->rn > 0 && a->rm > 0) lay_out(&b, ctx, a, NULL, &bytes);
    return bytes;
}

subspace_status LEVEL(subspace_tucker_linear)(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    TRY(subspace_tucker_linear_check(ctx, a));
    if (a->t == 0) return SUBSPACE_OK;
    DISPATCH(a->dtype, forward, ctx, a);
}

subspace_status LEVEL(subspace_tucker_linear_backward)(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    TRY(subspace_tucker_linear_check(ctx, a));
    if (a->t == 0) {
        const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
        if (a->dcore) memset(a->dcore, 0, (size_t)(a->rm * a->rn) * item);
        if (a->du) memset(a->du, 0, (size_t)(a->m * a->rm) * item);
        if (a->dv) memset(a->dv, 0, (size_t)(a->rn * a->n) * item);
        return SUBSPACE_OK;
    }
    DISPATCH(a->dtype, backward, ctx, a);
}

#endif
