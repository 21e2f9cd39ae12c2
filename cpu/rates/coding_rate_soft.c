/* coding_rate_soft.c - the coding rate of soft memberships, on the CPU.
 *
 *     A_k = I + d/(t_k eps) Z' diag(w_k) Z,   t_k = sum_i w_ik,   h_k = 1/2 logdet A_k,   rate = sum_k t_k h_k / n
 *     dw_ik = (h_k - (d - tr A_k^-1)/2) / n + d/(2n eps) z_i' A_k^-1 z_i
 *     dz_i  = d/(n eps) sum_k w_ik A_k^-1 z_i
 *
 * 3 n k d^2 flops in products (one for the Gram matrices of half their size, two for the gradients), n k d^2 of them in
 * the forward, and k d^3 in factorisations (gauss_jordan.h). With many classes all Gram matrices are one product
 * (face_split.h), with few they are made one by one (each_class.h). Nothing of size n d k exists; of size k d^2/2 only
 * the inverses, in the very buffer handed to the backward, or without one a chunk of them at a time.
 *
 * Where features have collapsed, or eps is small, A_k^-1 z_i is much shorter than z_i and its product cancels: with C_k
 * = A_k - I, tr(C_k A_k^-1) / tr C_k is by how much, and a large diagonal entry of A_k^-1 says that there is something
 * to cancel. A tiny rate is lost in I + C_k. Both are known from the factors; then the view is run again, with care:
 * class by class in float64 with triangular solves, on widened copies, and so in the backward. Long points of low rank
 * are lost in float64's A_k, too; its factor is then made of the points (qr_update.h). The workspace has room for all
 * that, but the fast way does not touch it, and untouched pages are no memory.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "each_class.h"
#include "face_split.h"

static void plan(soft_run *r, const subspace_ctx *ctx, const subspace_coding_rate_soft_args *a, bool backward,
                 bool careful, char *base, size_t *bytes)
{
    const bool f64 = a->dtype == SUBSPACE_F64, widened = careful && !f64;
    const size_t item = f64 || careful ? sizeof(double) : sizeof(float);
    const int64_t n = a->n, d = a->d, p = d * (d + 1) / 2;
    *r = (soft_run){.a = a, .n = n, .d = d, .p = p, .slots = MAX(1, ctx->threads), .careful = careful};
    r->split = !careful && a->k >= MAX(MANY, d / 6);
    r->kept = backward && a->inverse && !careful;

    const int64_t few = CHUNK / (int64_t)item / (r->split ? p : d * d);
    r->chunk = a->inverse && r->split ? a->k : MIN(a->k, MAX(few, r->split ? MANY : r->slots));
    r->chunk = r->kept ? a->k : MAX(r->chunk, 1);
    r->width = MAX(MIN(STRIPE_WIDTH, p / (4 * r->slots)), d);
    r->depth = MIN(n, MIN(DEEP, MAX(16, STRIPE / r->width)));
    r->blocks = CEIL_DIV(n, MIN(BLOCK, MAX(16, STRIPE / r->width)));
    r->blocks = MIN(CEIL_DIV(r->blocks, r->slots) * r->slots, CEIL_DIV(n, 16));
    r->rows = CEIL_DIV(n, r->blocks);

    r->t = carve(base, bytes, a->k, sizeof(double));
    r->h = carve(base, bytes, a->k, sizeof(double));
    r->trace = carve(base, bytes, a->k, sizeof(double));
    r->loss = carve(base, bytes, a->k, sizeof(double));
    r->shift = carve(base, bytes, backward ? a->k : 0, sizeof(double));
    if (widened) r->wide_z = carve(base, bytes, n * d, sizeof(double));
    if (widened) r->wide_w = carve(base, bytes, n * r->chunk, sizeof(double));
    if (widened && backward) r->wide_dz = carve(base, bytes, n * d, sizeof(double));
    if (!careful && !a->inverse && (r->split || backward)) r->own_inverse = carve(base, bytes, r->chunk * p, item);
    if (!r->split && !r->kept) r->square = carve(base, bytes, r->chunk * d * d, item);

    int64_t space = careful ? MAX(d, QR_ROWS + 1) * d : elimination_scratch(d); /* factor */
    if (!r->square) space += d * d;
    space = MAX(space, r->depth * (r->split ? r->width : MIN(PANEL, d)));
    if (backward && r->split) space = MAX(space, r->rows * r->width);
    if (backward && !r->split) space = MAX(space, (careful ? 0 : d * d) + r->rows * (d + 1));
    r->space_bytes = ((size_t)space * item + 63) & ~(size_t)63;
    r->space = carve(base, bytes, r->slots, r->space_bytes);
}

size_t LEVEL(subspace_coding_rate_soft_workspace)(const subspace_ctx *ctx, const subspace_coding_rate_soft_args *a)
{
    size_t most = 0;
    soft_run r;
    if (a->n <= 0 || a->d <= 0) return 0;
    for (int which = 0; which < 4; which++) {
        size_t bytes = 0;
        if (!a->drate && which & 2) break;
        plan(&r, ctx, a, which & 2, which & 1, NULL, &bytes);
        most = MAX(most, bytes);
    }
    return most;
}

#define THIS_FILE "rates/coding_rate_soft.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "each_class.h"
#include "face_split.h"

/* t_k of a range of classes; a range with a negative weight has t = -1 in front, one with a NaN has some t = NaN. */
static void FN(column_sums)(int64_t begin, int64_t end, void *arg)
{
    const soft_run *r = arg;
    const T *w = (const T *)r->a->weights + r->v * r->n * r->a->k;
    T least = 0;
    for (int64_t k = begin; k < end; k++) r->t[k] = 0;
    for (int64_t i = 0; i < r->n; i++) {
        const T *restrict row = w + i * r->a->k;
        for (int64_t k = begin; k < end; k++) {
            r->t[k] += (double)row[k];
            least = row[k] < least ? row[k] : least;
        }
    }
    if (least < 0) r->t[begin] = -1;
}

/* The largest |z_i|^2; a row that is not finite is named. */
static subspace_status FN(largest_square)(subspace_ctx *ctx, const soft_run *r, double *largest)
{
    const T *z = (const T *)r->a->z + r->v * r->n * r->d;
    *largest = 0;
    for (int64_t i = 0; i < r->n; i++) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < r->d; j++) sum += (double)z[i * r->d + j] * (double)z[i * r->d + j];
        CHECK(ctx, sum < INFINITY, SUBSPACE_NUMERICAL,
              "coding_rate_soft: z is not finite, or its length overflows, at view %lld, point %lld", (long long)r->v,
              (long long)i);
        *largest = MAX(*largest, sum);
    }
    return SUBSPACE_OK;
}

/* The classes k0 .. k0 + kc - 1 are next: their weights, widened if need be, and where their inverses are. */
static void FN(begin_chunk)(soft_run *r, int64_t k0)
{
    const subspace_coding_rate_soft_args *a = r->a;
    const int64_t from = r->v * r->n * a->k + k0;
    r->k0 = k0, r->kc = MIN(r->chunk, a->k - k0);
    r->w = (const T *)a->weights + from, r->ldw = a->k;
    if (r->wide_w) {
        for (int64_t i = 0; i < r->n; i++)
            for (int64_t k = 0; k < r->kc; k++)
                r->wide_w[i * r->kc + k] = (double)((const float *)a->weights)[from + i * a->k + k];
        r->w = r->wide_w, r->ldw = r->kc;
    }
    r->inverse = r->careful ? NULL : a->inverse ? (T *)a->inverse + (r->v * a->k + k0) * r->p : r->own_inverse;
}

/* Gram matrices and factors of a chunk; false: one broke down, and its h is not finite, or the view needs care. */
static bool FN(make_factors)(subspace_ctx *ctx, soft_run *r)
{
    double mass = 0, rate = 0;
    bool well = true;
    ctx->parallel_for(r->slots, 1, r->split ? FN(grams_split) : FN(grams_each), r);
    ctx->parallel_for(r->slots, 1, FN(factor), r);
    for (int64_t k = r->k0; k < r->k0 + r->kc; k++) {
        if (!(fabs(r->h[k]) < INFINITY)) return false;
        mass += r->t[k], rate += r->t[k] * r->h[k];
        well = well && r->loss[k] <= (IS_F32 ? MOST_LOSS_F32 : MOST_LOSS_F64);
    }
    return r->careful || r->spread == 0 || (well && (!IS_F32 || rate >= LEAST_RATE_F32 * mass));
}

static const void *FN(points)(const soft_run *r)
{
    const int64_t from = r->v * r->n * r->d;
    if (!r->wide_z) return (const T *)r->a->z + from;
    for (int64_t i = 0; i < r->n * r->d; i++) r->wide_z[i] = (double)((const float *)r->a->z)[from + i];
    return r->wide_z;
}

static bool FN(forward_view)(subspace_ctx *ctx, soft_run *r)
{
    const subspace_coding_rate_soft_args *a = r->a;
    double rate = 0;
    r->z = FN(points)(r);
    for (int64_t k0 = 0; k0 < a->k; k0 += r->chunk) {
        FN(begin_chunk)(r, k0);
        if (!FN(make_factors)(ctx, r)) return false;
    }
    for (int64_t k = 0; k < a->k; k++) {
        rate += r->t[k] * r->h[k];
        if (!a->stats) continue;
        put(a->dtype, a->stats, (2 * r->v) * a->k + k, r->h[k]);
        put(a->dtype, a->stats, (2 * r->v + 1) * a->k + k, r->careful ? CAREFUL : r->trace[k]);
    }
    put(a->dtype, a->rate, r->v, rate / (double)r->n);
    return true;
}

/* dz of a range of rows, scaled and narrowed */
static void FN(finish_dz)(int64_t begin, int64_t end, void *arg)
{
    const soft_run *r = arg;
    const T *dz = r->dz;
    for (int64_t i = begin * r->d; i < end * r->d; i++)
        put(r->a->dtype, r->a->dz, r->v * r->n * r->d + i, 2 * r->to_dw * (double)dz[i]);
}

static bool FN(backward_view)(subspace_ctx *ctx, soft_run *r)
{
    const subspace_coding_rate_soft_args *a = r->a;
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const double drate = get(a->dtype, a->drate, r->v);
    r->z = FN(points)(r);
    r->to_dw = drate * (double)r->d / (2 * (double)r->n * a->eps);
    r->dw = a->dweights ? (char *)a->dweights + (size_t)(r->v * r->n * a->k) * item : NULL;
    r->dz = !a->dz ? NULL : r->wide_dz ? (void *)r->wide_dz : (T *)a->dz + r->v * r->n * r->d;
    if (r->dz) memset(r->dz, 0, (size_t)(r->n * r->d) * sizeof(T));
    for (int64_t k0 = 0; k0 < a->k; k0 += r->chunk) {
        FN(begin_chunk)(r, k0);
        if (!r->kept && !FN(make_factors)(ctx, r)) return false;
        for (int64_t k = k0; k < k0 + r->kc; k++) {
            const double h = r->kept ? get(a->dtype, a->stats, (2 * r->v) * a->k + k) : r->h[k];
            const double trace = r->kept ? get(a->dtype, a->stats, (2 * r->v + 1) * a->k + k) : r->trace[k];
            const double left = (double)r->d - trace;
            r->shift[k] = left == 0 ? 0 : drate * (h - left / 2) / (double)r->n;
        }
        ctx->parallel_for(r->slots, 1, r->split ? FN(gradients_split) : FN(gradients_each), r);
    }
    if (r->dz) ctx->parallel_for(r->n, 1 + (1 << 14) / r->d, FN(finish_dz), r);
    return true;
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

/* The sums t_k, the spread and whether the view needs care; what is negative or not finite is named. */
static subspace_status examine(subspace_ctx *ctx, soft_run *r, bool *careful)
{
    const subspace_coding_rate_soft_args *a = r->a;
    const bool f64 = a->dtype == SUBSPACE_F64;
    double largest = 0, least = INFINITY;
    bool bad = false;
    TRY((f64 ? LEVEL(largest_square_f64) : LEVEL(largest_square_f32))(ctx, r, &largest));
    ctx->parallel_for(a->k, 64, f64 ? LEVEL(column_sums_f64) : LEVEL(column_sums_f32), r);
    for (int64_t k = 0; k < a->k; k++) {
        bad = bad || !(r->t[k] >= 0 && r->t[k] < INFINITY);
        if (r->t[k] > 0) least = MIN(least, r->t[k]);
    }
    for (int64_t i = 0; bad && i < a->n * a->k; i++) {
        const double w = get(a->dtype, a->weights, r->v * a->n * a->k + i);
        const long long v = r->v, point = i / a->k, class = i % a->k;
        CHECK(ctx, !(w < 0), SUBSPACE_INVALID_ARGUMENT,
              "coding_rate_soft: weights must be >= 0, got %g at view %lld, point %lld, class %lld", w, v, point,
              class);
        CHECK(ctx, w < INFINITY, SUBSPACE_NUMERICAL,
              "coding_rate_soft: the weight at view %lld, point %lld, class %lld is not finite", v, point, class);
    }
    CHECK(ctx, !bad, SUBSPACE_NUMERICAL, "coding_rate_soft: the weights of a class overflow at view %lld",
          (long long)r->v);
    r->spread = (double)a->d / a->eps * largest;
    *careful = !f64 && least < LEAST_MASS_F32; /* products with such weights underflow */
    return SUBSPACE_OK;
}

static subspace_status broken(subspace_ctx *ctx, const soft_run *r)
{
    for (int64_t k = r->k0; k < r->k0 + r->kc; k++)
        CHECK(ctx, fabs(r->h[k]) < INFINITY, SUBSPACE_NUMERICAL,
              "coding_rate_soft: the matrix of view %lld, class %lld is not positive definite in float64: "
              "d/eps |z|^2 is too large; scale z",
              (long long)r->v, (long long)k);
    return SUBSPACE_OK;
}

static subspace_status run_views(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a, bool backward)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    TRY(subspace_coding_rate_soft_check(ctx, a));
    CHECK(ctx, a->d < 1 << 16, SUBSPACE_INVALID_ARGUMENT, "coding_rate_soft: %lld features are too many",
          (long long)a->d);
    const size_t need = LEVEL(subspace_coding_rate_soft_workspace)(ctx, a);
    CHECK(ctx, need <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "coding_rate_soft: workspace of %zu bytes, need %zu", ctx->workspace_bytes, need);
    for (int64_t v = 0; v < a->v; v++) {
        bool careful = false, done = false;
        size_t bytes = 0;
        soft_run r;
        plan(&r, ctx, a, backward, false, ctx->workspace, &bytes);
        r.v = v;
        TRY(examine(ctx, &r, &careful));
        careful = careful || (r.kept && get(a->dtype, a->stats, (2 * v + 1) * a->k) == CAREFUL);
        if (!careful && a->dtype == SUBSPACE_F64)
            done = backward ? LEVEL(backward_view_f64)(ctx, &r) : LEVEL(forward_view_f64)(ctx, &r);
        else if (!careful) done = backward ? LEVEL(backward_view_f32)(ctx, &r) : LEVEL(forward_view_f32)(ctx, &r);
        if (done) continue;
        bytes = 0; /* t is where it was */
        plan(&r, ctx, a, backward, true, ctx->workspace, &bytes);
        r.v = v;
        done = backward ? LEVEL(backward_view_f64)(ctx, &r) : LEVEL(forward_view_f64)(ctx, &r);
        if (!done) return broken(ctx, &r);
        if (!backward && a->inverse)
            memset((char *)a->inverse + (size_t)(v * a->k * r.p) * item, 0, (size_t)(a->k * r.p) * item);
    }
    return SUBSPACE_OK;
}

subspace_status LEVEL(subspace_coding_rate_soft)(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a)
{
    return run_views(ctx, a, false);
}

subspace_status LEVEL(subspace_coding_rate_soft_backward)(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a)
{
    return run_views(ctx, a, true);
}

#endif
