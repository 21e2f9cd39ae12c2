/* cross_entropy.c - softmax cross-entropy over subspace logits that are never stored.
 *
 *     y[b,c]   = gamma || z[b,c,:] ||                  panels.c, a tile at a time
 *     lse[b]   = log sum_c exp(y)                      online: running maximum and sum
 *     tau[b,c] = w_c ((1 - s) target[b,c] + s / C)     s = label smoothing, w = class weights, C of all classes
 *     loss[b]  = lse sum_c tau - sum_c tau y
 *
 *     dy       = dloss (sum_c tau exp(y - lse) - tau)  recomputed a tile at a time
 *     dz       = gamma dy z / ||z||                    panels.c takes it to dweight and dx
 *
 * Memory: tiles, and four numbers a row and thread.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "panels.h"
#include "convert.h"

enum { LANES = 64 };

typedef struct cross_entropy_run {
    const subspace_cross_entropy_args *a;
    int64_t slots;
    double *state; /* [slots][4][b]: running maximum, sum of exp, sum of tau y, sum of tau */
} cross_entropy_run;

static inline double class_weight(const subspace_cross_entropy_args *a, int64_t c)
{
    return a->class_weight ? ((const double *)a->class_weight)[c] : 1;
}

static inline int64_t all_classes(const subspace_cross_entropy_args *a)
{
    return a->classes ? a->classes : a->f.c;
}

#define THIS_FILE "grassmann/cross_entropy.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "exp.h"

/* One tile's share of lse and of sum_c tau y (and, for soft targets, of sum_c tau). */
static void FN(accumulate)(void *arg, const panels *p, const tile *t, void *z, int64_t ld, void *norms)
{
    const cross_entropy_run *run = arg;
    const subspace_cross_entropy_args *a = run->a;
    const int64_t b = a->f.b, nb = t->nb, nc = t->c1 - t->c0;
    const T gamma = (T)a->f.gamma;
    T *y = norms, *tau = panels_spare(p, t);
    double *most = run->state + t->slot * 4 * b + t->b0, *sum = most + b, *tau_y = sum + b, *tau_sum = tau_y + b;
    (void)z, (void)ld;

    for (int64_t i = 0; i < nc * nb; i++) y[i] *= gamma;
    if (a->soft) FN(panels_gather)(t, tau, IS_F32 ? SUBSPACE_F32 : SUBSPACE_F64, a->soft, a->f.c);

    for (int64_t i0 = 0; i0 < nb; i0 += LANES) {
        const int64_t m = MIN(LANES, nb - i0);
        T top[LANES], s[LANES] = {0}, ty[LANES] = {0}, ts[LANES] = {0};
        for (int64_t i = 0; i < m; i++) top[i] = y[i0 + i];
        for (int64_t c = 1; c < nc; c++) {
            const T *restrict yc = y + c * nb + i0;
            for (int64_t i = 0; i < m; i++) top[i] = yc[i] > top[i] ? yc[i] : top[i];
        }
        for (int64_t c = 0; c < nc; c++) {
            const T *restrict yc = y + c * nb + i0;
            for (int64_t i = 0; i < m; i++) s[i] += FN(exp_)(yc[i] - top[i]);
        }
        if (a->soft || a->label_smoothing > 0)
            for (int64_t c = 0; c < nc; c++) {
                const T *restrict yc = y + c * nb + i0, *restrict tc = tau + c * nb + i0;
                const T w = (T)class_weight(a, t->c0 + c), even = w * (T)(a->label_smoothing / (double)all_classes(a));
                const T scale = a->soft ? w * (T)(1 - a->label_smoothing) : 0;
                for (int64_t i = 0; i < m; i++) {
                    const T target = a->soft ? scale * tc[i] + even : even;
                    ty[i] += target * yc[i];
                    ts[i] += target;
                }
            }
        for (int64_t i = 0; i < m; i++) {
            const double high = most[i0 + i] > (double)top[i] ? most[i0 + i] : (double)top[i];
            sum[i0 + i] = sum[i0 + i] * exp(most[i0 + i] - high) + (double)s[i] * exp((double)top[i] - high);
            most[i0 + i] = high;
            tau_y[i0 + i] += (double)ty[i];
            tau_sum[i0 + i] += (double)ts[i];
        }
    }
    if (!a->label) return;
    for (int64_t i = 0; i < nb; i++) {
        const int64_t label = a->label[t->b0 + i];
        if (label < t->c0 || label >= t->c1) continue;
        const double w = (1 - a->label_smoothing) * class_weight(a, label);
        tau_y[i] += w * (double)y[(label - t->c0) * nb + i];
        tau_sum[i] += w;
    }
}

/* Join the threads' shares, always in the same order. */
static void FN(finish_rows)(int64_t begin, int64_t end, void *arg)
{
    const cross_entropy_run *run = arg;
    const subspace_cross_entropy_args *a = run->a;
    const int64_t b = a->f.b;
    T *loss = a->loss, *lse = a->stats, *tau_sum = lse + b;
    for (int64_t i = begin; i < end; i++) {
        double most = -INFINITY, sum = 0, ty = 0, ts = 0;
        for (int64_t slot = 0; slot < run->slots; slot++) {
            const double *state = run->state + slot * 4 * b + i;
            if (state[b] == 0) continue; /* this thread had no tile of the row */
            const double high = most > state[0] ? most : state[0];
            sum = sum * exp(most - high) + state[b] * exp(state[0] - high);
            most = high, ty += state[2 * b], ts += state[3 * b];
        }
        const bool ignored = a->label && a->label[i] == a->ignore_index;
        lse[i] = (T)(most + log(sum));
        tau_sum[i] = (T)(ignored ? 0 : ts);
        loss[i] = (T)(ignored ? 0 : ts * (most + log(sum)) - ty);
    }
}

static void FN(make_dz)(void *arg, const panels *p, const tile *t, void *z, int64_t ld, void *norms)
{
    const subspace_cross_entropy_args *a = arg;
    const int64_t b = a->f.b, nb = t->nb;
    const T gamma = (T)a->f.gamma, *norm = norms;
    const T *lse = (const T *)a->stats + t->b0, *tau_sum = lse + b, *dloss = (const T *)a->dloss + t->b0;
    T *dy = panels_spare(p, t);

    if (a->soft) FN(panels_gather)(t, dy, IS_F32 ? SUBSPACE_F32 : SUBSPACE_F64, a->soft, a->f.c);
    for (int64_t c = t->c0; c < t->c1; c++) {
        const T w = (T)class_weight(a, c), even = w * (T)(a->label_smoothing / (double)all_classes(a));
        const T scale = a->soft ? w * (T)(1 - a->label_smoothing) : 0;
        const T *restrict nc = norm + (c - t->c0) * nb;
        T *restrict d = dy + (c - t->c0) * nb;
        for (int64_t i = 0; i < nb; i++) {
            const T target = a->soft ? scale * d[i] + even : tau_sum[i] != 0 ? even : 0;
            d[i] = dloss[i] * (tau_sum[i] * FN(exp_)(gamma * nc[i] - lse[i]) - target);
        }
    }
    if (a->label)
        for (int64_t i = 0; i < nb; i++) {
            const int64_t label = a->label[t->b0 + i];
            if (label < t->c0 || label >= t->c1 || label == a->ignore_index) continue;
            dy[(label - t->c0) * nb + i] -= dloss[i] * (T)((1 - a->label_smoothing) * class_weight(a, label));
        }
    for (int64_t i = 0; i < (t->c1 - t->c0) * nb; i++) dy[i] = norm[i] > 0 ? gamma * dy[i] / norm[i] : 0;
    FN(panels_scale)(p, t, dy, z, ld);
}

static subspace_status FN(forward)(subspace_ctx *ctx, cross_entropy_run *run, const panels *p)
{
    const int64_t b = run->a->f.b;
    for (int64_t slot = 0; slot < run->slots; slot++)
        for (int64_t i = 0; i < 4 * b; i++) run->state[slot * 4 * b + i] = i < b ? -INFINITY : 0;
    FN(panels_forward)(p, NULL, FN(accumulate), run);
    ctx->parallel_for(b, 4096, FN(finish_rows), run);
    return SUBSPACE_OK;
}

static subspace_status FN(backward)(subspace_ctx *ctx, const subspace_cross_entropy_args *a, const panels *p)
{
    (void)ctx;
    FN(panels_backward)(p, NULL, FN(make_dz), (void *)a);
    return SUBSPACE_OK;
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

static void plan(panels *p, cross_entropy_run *run, const subspace_ctx *ctx, const subspace_cross_entropy_args *a,
                 bool backward, char *base, size_t *bytes)
{
    LEVEL(panels_plan)(p, ctx, &a->f, backward, base, bytes);
    *run = (cross_entropy_run){.a = a, .slots = p->slots};
    if (!backward) run->state = carve(base, bytes, p->slots * 4 * a->f.b, sizeof(double));
}

size_t LEVEL(subspace_cross_entropy_workspace)(const subspace_ctx *ctx, const subspace_cross_entropy_args *a)
{
    size_t forward = 0, backward = 0;
    panels p;
    cross_entropy_run run;
    plan(&p, &run, ctx, a, false, NULL, &forward);
    plan(&p, &run, ctx, a, true, NULL, &backward);
    return MAX(forward, backward);
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_cross_entropy_args *a, bool backward, panels *p,
                               cross_entropy_run *run)
{
    size_t bytes = 0;
    TRY(subspace_cross_entropy_check(ctx, a));
    for (int64_t i = 0; a->label && i < a->f.b; i++)
        CHECK(ctx, a->label[i] == a->ignore_index || (a->label[i] >= 0 && a->label[i] < all_classes(a)),
              SUBSPACE_INVALID_ARGUMENT, "cross_entropy: target %lld of row %lld is not in [0, %lld)",
              (long long)a->label[i], (long long)i, (long long)all_classes(a));
    plan(p, run, ctx, a, backward, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "cross_entropy: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

subspace_status LEVEL(subspace_cross_entropy)(subspace_ctx *ctx, const subspace_cross_entropy_args *a)
{
    panels p;
    cross_entropy_run run;
    TRY(prepare(ctx, a, false, &p, &run));
    DISPATCH(a->f.dtype, forward, ctx, &run, &p);
}

subspace_status LEVEL(subspace_cross_entropy_backward)(subspace_ctx *ctx, const subspace_cross_entropy_args *a)
{
    panels p;
    cross_entropy_run run;
    TRY(prepare(ctx, a, true, &p, &run));
    DISPATCH(a->f.dtype, backward, ctx, a, &p);
}

#endif
