/* check.c - is this argument struct one the kernels can trust? Once, for both devices.
 * Host-readable facts only: what lies behind device pointers is the kernels' business. */
#include "check.h"

#define LL(v) ((long long)(v))
#define INVALID SUBSPACE_INVALID_ARGUMENT

static subspace_status check_logits(subspace_ctx *ctx, const subspace_logits_args *a, const char *op)
{
    CHECK(ctx, a->b >= 0 && a->c >= 0 && a->n >= 0, INVALID,
          "%s: negative size: batch %lld, classes %lld, features %lld", op, LL(a->b), LL(a->c), LL(a->n));
    CHECK(ctx, a->start || (a->k > 0 && a->k <= a->n) || a->c == 0, INVALID, "%s: need 0 < k <= n, got k=%lld, n=%lld",
          op, LL(a->k), LL(a->n));
    CHECK(ctx, a->start || a->rows == a->c * a->k, INVALID, "%s: %lld rows are not %lld classes of %lld", op,
          LL(a->rows), LL(a->c), LL(a->k));
    CHECK(ctx, a->b <= INT32_MAX && a->n <= INT32_MAX && a->rows <= INT32_MAX, INVALID,
          "%s: a BLAS dimension does not fit in 32 bits: batch %lld, features %lld, rows %lld", op, LL(a->b), LL(a->n),
          LL(a->rows));
    return SUBSPACE_OK;
}

subspace_status subspace_logits_check(subspace_ctx *ctx, const subspace_logits_args *a)
{
    return check_logits(ctx, a, "logits");
}

subspace_status subspace_cross_entropy_check(subspace_ctx *ctx, const subspace_cross_entropy_args *a)
{
    TRY(check_logits(ctx, &a->f, "cross_entropy"));
    CHECK(ctx, a->f.c > 0 || a->f.b == 0, INVALID, "cross_entropy: need at least one class, got 0");
    CHECK(ctx, a->label || a->soft || a->f.b == 0, INVALID, "cross_entropy: neither labels nor soft targets");
    CHECK(ctx, a->label_smoothing >= 0 && a->label_smoothing <= 1, INVALID,
          "cross_entropy: label_smoothing must be in [0, 1], got %g", a->label_smoothing);
    return SUBSPACE_OK;
}

subspace_status subspace_rsgd_check(subspace_ctx *ctx, const subspace_rsgd_args *a)
{
    CHECK(ctx, a->dtype == SUBSPACE_F32 || a->dtype == SUBSPACE_F64, INVALID,
          "rsgd: frames are float32 or float64, got dtype %d", (int)a->dtype);
    CHECK(ctx, !a->lr_per_class || a->count == 1, INVALID, "rsgd: a step per class needs one parameter, got %lld",
          LL(a->count));
    for (int64_t i = 0; i < a->count; i++) {
        const subspace_frames *p = &a->frames[i];
        CHECK(ctx, (p->k > 0 && p->k <= p->n) || p->c == 0, INVALID,
              "rsgd: parameter %lld: need 0 < k <= n, got k=%lld, n=%lld", LL(i), LL(p->k), LL(p->n));
        CHECK(ctx, p->buffer || p->c == 0 || a->momentum == 0, INVALID,
              "rsgd: parameter %lld: momentum %g needs a buffer", LL(i), a->momentum);
    }
    return SUBSPACE_OK;
}
