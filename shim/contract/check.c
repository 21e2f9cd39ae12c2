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
    CHECK(ctx, a->classes == 0 || a->classes >= a->f.c, INVALID,
          "cross_entropy: %lld classes in all, %lld of them here", LL(a->classes), LL(a->f.c));
    return SUBSPACE_OK;
}

subspace_status subspace_rsgd_check(subspace_ctx *ctx, const subspace_rsgd_args *a)
{
    CHECK(ctx, a->dtype == SUBSPACE_F32 || a->dtype == SUBSPACE_F64, INVALID,
          "rsgd: frames are float32 or float64, got dtype %d", (int)a->dtype);
    CHECK(ctx, !a->stiefel || !a->parallel, INVALID, "rsgd: no parallel transport on the Stiefel manifold");
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

subspace_status subspace_tucker_check(subspace_ctx *ctx, const subspace_tucker_args *a)
{
    double most = 1; /* no partial product is larger */
    CHECK(ctx, a->modes >= 2 && a->modes <= SUBSPACE_MODES, INVALID, "tucker: need 2 to %d modes, got %lld",
          (int)SUBSPACE_MODES, LL(a->modes));
    for (int64_t i = 0; i < a->modes; i++) {
        CHECK(ctx, a->d[i] > 0 && a->r[i] > 0, INVALID, "tucker: mode %lld: need sizes above 0, got d=%lld, r=%lld",
              LL(i), LL(a->d[i]), LL(a->r[i]));
        CHECK(ctx, a->factor[i] || a->d[i] == a->r[i], INVALID,
              "tucker: mode %lld without a factor keeps its size, got d=%lld, r=%lld", LL(i), LL(a->d[i]), LL(a->r[i]));
        most *= (double)(a->d[i] > a->r[i] ? a->d[i] : a->r[i]);
    }
    CHECK(ctx, most <= 0x1p48, INVALID, "tucker: sizes of %g entries do not fit", most);
    return SUBSPACE_OK;
}

subspace_status subspace_tucker_linear_check(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    CHECK(ctx, a->t >= 0 && a->n > 0 && a->m > 0 && a->rn > 0 && a->rm > 0, INVALID,
          "tucker_linear: need sizes above 0, got %lld rows, %lld inputs, %lld outputs, ranks %lld and %lld", LL(a->t),
          LL(a->n), LL(a->m), LL(a->rm), LL(a->rn));
    CHECK(ctx, a->dropout >= 0 && a->dropout < 1, INVALID, "tucker_linear: dropout must be in [0, 1), got %g",
          a->dropout);
    CHECK(ctx, a->dropout == 0 || a->seed, INVALID, "tucker_linear: dropout %g needs a seed", a->dropout);
    return SUBSPACE_OK;
}

subspace_status subspace_tucker_conv_check(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    CHECK(ctx, a->b >= 0 && a->p >= 0, INVALID, "tucker_conv: negative size: batch %lld, positions %lld", LL(a->b),
          LL(a->p));
    CHECK(ctx, a->n > 0 && a->r > 0, INVALID, "tucker_conv: need channels and rank above 0, got n=%lld, r=%lld",
          LL(a->n), LL(a->r));
    CHECK(ctx, a->dropout >= 0 && a->dropout < 1, INVALID, "tucker_conv: dropout must be in [0, 1), got %g",
          a->dropout);
    CHECK(ctx, a->dropout == 0 || a->seed, INVALID, "tucker_conv: dropout %g needs a seed", a->dropout);
    CHECK(ctx, !a->df || a->w || a->b * a->p == 0, INVALID, "tucker_conv: df needs w");
    return SUBSPACE_OK;
}

subspace_status subspace_depthwise_check(subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    CHECK(ctx, a->b >= 0 && a->c >= 0 && a->n > 0 && a->m >= 0, INVALID,
          "depthwise: batch %lld, %lld groups of %lld channels and %lld outputs", LL(a->b), LL(a->c), LL(a->n),
          LL(a->m));
    for (int i = 0; i < 3; i++) {
        const int64_t limit = INT32_MAX, k = a->kernel[i], s = a->stride[i], p = a->padding[i], d = a->dilation[i];
        CHECK(ctx, k > 0 && s > 0 && d > 0 && p >= 0 && k <= limit && s <= limit && d <= limit && p <= limit, INVALID,
              "depthwise: need kernel, stride, dilation > 0 and padding >= 0, got %lld, %lld, %lld, %lld", LL(k), LL(s),
              LL(d), LL(p));
        const int64_t rest = a->in[i] + 2 * p - d * (k - 1) - 1, out = rest < 0 ? 0 : rest / s + 1;
        CHECK(ctx, a->in[i] >= 0 && a->in[i] <= limit && a->out[i] == out, INVALID,
              "depthwise: dimension %d of %lld entries has %lld windows, got dy of %lld", i, LL(a->in[i]), LL(out),
              LL(a->out[i]));
    }
    return SUBSPACE_OK;
}

static subspace_status check_rate(subspace_ctx *ctx, const char *op, subspace_dtype dtype, int64_t n, int64_t d,
                                  double eps)
{
    CHECK(ctx, dtype == SUBSPACE_F32 || dtype == SUBSPACE_F64, INVALID, "%s: float32 or float64, got dtype %d", op,
          (int)dtype);
    CHECK(ctx, n > 0 && d > 0 && n <= INT32_MAX && d <= INT32_MAX, INVALID,
          "%s: need points and features, at most 2^31 - 1 of each, got n=%lld, d=%lld", op, LL(n), LL(d));
    CHECK(ctx, eps > 0 && eps <= 1e300, INVALID, "%s: eps must be positive and finite, got %g", op, eps);
    return SUBSPACE_OK;
}

int64_t subspace_coding_rate_factor(const subspace_coding_rate_args *a)
{
    const int64_t side = a->n < a->d ? a->n : a->d;
    return a->order ? a->n * side : side * side; /* a group's smaller side squared is at most n_g * side */
}

subspace_status subspace_coding_rate_check(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    CHECK(ctx, a->v >= 0, INVALID, "coding_rate: negative number of views: %lld", LL(a->v));
    CHECK(ctx, !a->order == !a->start, INVALID, "coding_rate: order and start go together");
    return check_rate(ctx, "coding_rate", a->dtype, a->n, a->d, a->eps);
}

subspace_status subspace_coding_rate_soft_check(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a)
{
    CHECK(ctx, a->v >= 0 && a->k >= 0 && a->k <= INT32_MAX, INVALID,
          "coding_rate_soft: wrong size: %lld views, %lld classes", LL(a->v), LL(a->k));
    return check_rate(ctx, "coding_rate_soft", a->dtype, a->n, a->d, a->eps);
}

subspace_status subspace_sinkhorn_check(subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    CHECK(ctx, a->dtype == SUBSPACE_F32 || a->dtype == SUBSPACE_F64, INVALID,
          "sinkhorn: float32 or float64, got dtype %d", (int)a->dtype);
    CHECK(ctx, a->v >= 0 && a->m > 0 && a->n > 0 && a->m <= INT32_MAX && a->n <= INT32_MAX, INVALID,
          "sinkhorn: need rows and columns, at most 2^31 - 1 of each, got m=%lld, n=%lld", LL(a->m), LL(a->n));
    CHECK(ctx, a->eta > 0 && a->eta <= 1e300, INVALID, "sinkhorn: eta must be positive and finite, got %g", a->eta);
    CHECK(ctx, a->max_iter >= 0 && a->half_steps >= 0, INVALID, "sinkhorn: negative number of steps: %lld, %lld",
          LL(a->max_iter), LL(a->half_steps));
    CHECK(ctx, a->half_steps == 0 || a->half_steps % 2 == 1, INVALID,
          "sinkhorn: half steps end with the rows, so their number is odd, got %lld", LL(a->half_steps));
    CHECK(ctx, a->symmetric != SUBSPACE_SYMMETRIC || a->m == a->n, INVALID,
          "sinkhorn: symmetric scores are square, got %lld x %lld", LL(a->m), LL(a->n));
    CHECK(ctx, (a->row && (a->col || a->symmetric == SUBSPACE_SYMMETRIC)) || a->m == a->n, INVALID,
          "sinkhorn: marginals of ones need a square plan, got %lld x %lld", LL(a->m), LL(a->n));
    return SUBSPACE_OK;
}

subspace_status subspace_sigreg_check(subspace_ctx *ctx, const subspace_sigreg_args *a)
{
    CHECK(ctx, a->v >= 0 && a->n >= 0 && a->d > 0 && a->s > 0, INVALID,
          "sigreg: need features and directions, got %lld views of %lld points, %lld features, %lld directions",
          LL(a->v), LL(a->n), LL(a->d), LL(a->s));
    CHECK(ctx, a->d <= INT32_MAX && a->s <= INT32_MAX, INVALID,
          "sigreg: a BLAS dimension does not fit in 32 bits: features %lld, directions %lld", LL(a->d), LL(a->s));
    CHECK(ctx, a->knots >= 2 && a->knots <= SUBSPACE_KNOTS, INVALID, "sigreg: need 2 to %d knots, got %lld",
          (int)SUBSPACE_KNOTS, LL(a->knots));
    CHECK(ctx, a->step > 0 && a->step <= 1e300, INVALID, "sigreg: step must be positive and finite, got %g", a->step);
    return SUBSPACE_OK;
}

subspace_status subspace_gated_cosine_check(subspace_ctx *ctx, const subspace_gated_cosine_args *a)
{
    CHECK(ctx, a->dtype == SUBSPACE_F32 || a->dtype == SUBSPACE_F64, INVALID,
          "gated_cosine: float32 or float64, got dtype %d", (int)a->dtype);
    CHECK(ctx, a->v >= 0 && a->b >= 0 && a->n >= 0 && a->k > 0, INVALID,
          "gated_cosine: need features, got %lld views of %lld gates, %lld points, %lld features", LL(a->v), LL(a->b),
          LL(a->n), LL(a->k));
    CHECK(ctx, a->b <= INT32_MAX && a->n <= INT32_MAX && a->k <= INT32_MAX, INVALID,
          "gated_cosine: a BLAS dimension does not fit in 32 bits: gates %lld, points %lld, features %lld", LL(a->b),
          LL(a->n), LL(a->k));
    CHECK(ctx, !a->dz1 == !a->dgate, INVALID, "gated_cosine: dz1 and dgate go together");
    return SUBSPACE_OK;
}

/* Rounding is relative to the Gram matrix's largest eigenvalue, and a step multiplies small ones by a^2: beyond GROWTH
 * of that (float32: 2^15 of 2^24) X takes part again. Of nearly square matrices a run saves nothing. */
int64_t subspace_newton_schulz_run(const subspace_newton_schulz_args *a, int64_t from)
{
    const double GROWTH = 1 << 15;
    const int64_t small = a->m < a->n ? a->m : a->n, large = a->m < a->n ? a->n : a->m;
    int64_t count = 1;
    if (4 * large < 5 * small) return 1;
    for (double growth = 1; from + count < a->steps; count++) {
        const double slope = a->coefficients[3 * (from + count - 1)];
        growth *= slope * slope;
        if (!(growth <= GROWTH)) break;
    }
    return count;
}

subspace_status subspace_newton_schulz_check(subspace_ctx *ctx, const subspace_newton_schulz_args *a)
{
    CHECK(ctx, a->v >= 0 && a->m >= 0 && a->n >= 0, INVALID,
          "newton_schulz: negative size: %lld matrices of %lld x %lld", LL(a->v), LL(a->m), LL(a->n));
    CHECK(ctx, a->m <= INT32_MAX && a->n <= INT32_MAX, INVALID,
          "newton_schulz: a BLAS dimension does not fit in 32 bits: %lld x %lld", LL(a->m), LL(a->n));
    CHECK(ctx, a->steps >= 1 && a->steps <= SUBSPACE_STEPS, INVALID, "newton_schulz: need 1 to %d steps, got %lld",
          (int)SUBSPACE_STEPS, LL(a->steps));
    CHECK(ctx, a->eps > 0 && a->eps <= 1e300, INVALID, "newton_schulz: eps must be positive and finite, got %g",
          a->eps);
    for (int64_t i = 0; i < 3 * a->steps; i++)
        CHECK(ctx, a->coefficients[i] >= -1e300 && a->coefficients[i] <= 1e300, INVALID,
              "newton_schulz: coefficients must be finite, got %g in step %lld", a->coefficients[i], LL(i / 3));
    return SUBSPACE_OK;
}

subspace_status subspace_hadamard_check(subspace_ctx *ctx, const subspace_hadamard_args *a)
{
    CHECK(ctx, a->v >= 0, INVALID, "hadamard: negative number of rows: %lld", LL(a->v));
    CHECK(ctx, a->n > 0 && a->n <= SUBSPACE_HADAMARD && (a->n & (a->n - 1)) == 0, INVALID,
          "hadamard: the length must be a power of two, at most 2^26, got %lld", LL(a->n));
    return SUBSPACE_OK;
}

subspace_status subspace_fastfood_check(subspace_ctx *ctx, const subspace_fastfood_args *a)
{
    CHECK(ctx, a->v >= 0, INVALID, "fastfood: negative number of rows: %lld", LL(a->v));
    CHECK(ctx, a->d > 0 && a->d <= SUBSPACE_HADAMARD && a->m > 0 && a->m <= SUBSPACE_HADAMARD, INVALID,
          "fastfood: both sizes must be 1 to 2^26, got %lld to %lld", LL(a->d), LL(a->m));
    return SUBSPACE_OK;
}

subspace_status subspace_product_check(subspace_ctx *ctx, const subspace_product_args *a)
{
    CHECK(ctx, a->v >= 0 && a->m >= 0 && a->n >= 0 && a->k >= 0, INVALID,
          "product: negative size: %lld matrices of %lld x %lld x %lld", LL(a->v), LL(a->m), LL(a->n), LL(a->k));
    CHECK(ctx, a->m <= INT32_MAX && a->n <= INT32_MAX && a->k <= INT32_MAX, INVALID,
          "product: a BLAS dimension does not fit in 32 bits: %lld x %lld x %lld", LL(a->m), LL(a->n), LL(a->k));
    CHECK(ctx, a->dtype == SUBSPACE_F32 || a->dtype == SUBSPACE_F64, INVALID,
          "product: dtype must be float32 or float64, got subspace_dtype %d", (int)a->dtype);
    return SUBSPACE_OK;
}
