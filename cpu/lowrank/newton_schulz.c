/* newton_schulz.c - the Newton-Schulz iteration towards the orthogonal factor U V' of x = U S V', on the CPU.
 *
 *     X_0     = x / max(|x|_F, eps)
 *     X_(k+1) = P_k X_k,       P_k = a_k I + b_k A_k + c_k A_k^2,       A_k = X_k X_k'       [s, s]
 *
 * s is the shorter side, l the longer one; a tall x has A = X'X and X P, and nothing is transposed. All P and A are
 * polynomials of A_0: symmetric, and they commute. So a run of steps needs no X,
 *
 *     Q_(k+1) = P_k Q_k        A_(k+1) = P_k (P_k A_k)        X_(k+r) = Q X_k
 *
 * and of each product only half is computed (symmetric.h): for r steps 3 s²l + (4r - 3) s³ operations, where X in
 * each step takes r (3 s²l + s³), and torch.optim.Muon r (4 s²l + 2 s³). Five steps of 1024 x 4096: 29 s³, 65 s³, 90
 * s³. The price is rounding: A_k is right up to eps |A_k|, and a step takes a small eigenvalue times a². Where the
 * product of those would pass 2^15, X takes part again (subspace_newton_schulz_run). Largest singular value of the
 * error in float32, 256 x 1024, of normal entries and of singular values 1/i, five steps:
 *
 *                   X in each step     as here      in bfloat16
 *     Muon's          5e-6, 5e-6      6e-6, 9e-4    5e-2, 1e-1
 *     Polar Express   3e-5, 2e-5      3e-5, 8e-4    4e-1, 1e-1
 *
 * Muon's own limit is not 1 but anything within .3 of it. A matrix of less than 5 : 4 takes X in each step.
 *
 * The backward needs nothing of the forward but x: a polynomial's derivative at A is its own adjoint, so that with
 * S = (dX X' + X dX')/2 the gradient of a run is
 *
 *     dX_k = Q dX_(k+r) + 2 L X_k,       L = the derivative of Q at A_k along S
 *
 * and L comes by the product rule beside A, P and Q: 7 s²l + (12r - 9) s³. The X at which runs begin are made again.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include <float.h>
#include "entries.h"
#include "symmetric.h"

enum {
    SLAB = 512,               /* of the longer side, a thread's part of Q X */
    WORTH_A_THREAD = 1 << 18, /* multiplications */
};

typedef struct newton_schulz_slot {   /* of one matrix */
    void *gram, *poly, *q, *rest;     /* [s, s]: A, P, Q, and a product on its way */
    void *dgram, *dpoly, *dq, *drest; /* [s, s] their derivatives; backward only */
    void *x;                          /* [2, m, n] or, backward, [runs, m, n]: X where runs begin */
    void *dx;                         /* [2, m, n] backward: its gradient, before and after */
    double *part;                     /* [2, PARTS] sums, and largest entries */
} newton_schulz_slot;

typedef struct newton_schulz_run {
    const subspace_ctx *ctx;
    const subspace_newton_schulz_args *a;
    void (*each)(int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *); /* the work of one matrix */
    int64_t s, l, runs, slots;
    bool backward;
    char *scratch;
    size_t slot_bytes;
} newton_schulz_run;

static newton_schulz_slot lay_out(const newton_schulz_run *run, char *base, size_t *bytes)
{
    const subspace_newton_schulz_args *a = run->a;
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const int64_t square = run->s * run->s, entries = a->m * a->n;
    const bool half = a->dtype == SUBSPACE_F16 || a->dtype == SUBSPACE_BF16;
    newton_schulz_slot slot = {0};
    slot.gram = carve(base, bytes, square, item);
    slot.poly = carve(base, bytes, square, item);
    slot.q = carve(base, bytes, square, item);
    slot.rest = carve(base, bytes, square, item);
    slot.part = carve(base, bytes, 2 * PARTS, sizeof(double));
    slot.x = carve(base, bytes, (run->backward ? run->runs : half ? 2 : 1) * entries, item);
    if (!run->backward) return slot;
    slot.dgram = carve(base, bytes, square, item);
    slot.dpoly = carve(base, bytes, square, item);
    slot.dq = carve(base, bytes, square, item);
    slot.drest = carve(base, bytes, square, item);
    slot.dx = carve(base, bytes, 2 * entries, item);
    return slot;
}

/* One after the other: where threads have matrices of their own. */
static void in_turn(int64_t count, int64_t grain, void (*fn)(int64_t, int64_t, void *), void *arg)
{
    (void)grain;
    if (count > 0) fn(0, count, arg);
}

static void plan(newton_schulz_run *run, const subspace_ctx *ctx, const subspace_newton_schulz_args *a, char *base,
                 size_t *bytes)
{
    *run = (newton_schulz_run){.ctx = ctx, .a = a, .backward = a->dx != NULL};
    run->s = MIN(a->m, a->n), run->l = MAX(a->m, a->n);
    for (int64_t from = 0; from < a->steps; from += subspace_newton_schulz_run(a, from)) run->runs++;
    const double work = (double)run->s * (double)run->s * (double)(run->l * 3) * (double)a->steps;
    const int64_t worth = (int64_t)MIN(work * (double)a->v / WORTH_A_THREAD, 1 << 20);
    run->slots = MAX(1, MIN(MIN(ctx->threads, a->v), worth));
    run->each = in_turn;
    if (run->slots < ctx->threads && work > WORTH_A_THREAD) run->slots = 1, run->each = ctx->parallel_for;
    lay_out(run, NULL, &run->slot_bytes);
    run->scratch = carve(base, bytes, run->slots * (int64_t)run->slot_bytes, 1);
}

size_t LEVEL(subspace_newton_schulz_workspace)(const subspace_ctx *ctx, const subspace_newton_schulz_args *a)
{
    size_t bytes = 0;
    newton_schulz_run run;
    plan(&run, ctx, a, NULL, &bytes);
    return bytes;
}

/* Y = Q_0 X_0 (+ scale Q_1 X_1), or with the Q on the right. */
typedef struct applied {
    int64_t s, l;
    bool tall;
    int terms;
    const void *q[2], *x[2];
    double scale;
    void *y;
} applied;

#define THIS_FILE "lowrank/newton_schulz.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "entries.h"
#include "symmetric.h"

/* max(|x|, eps), or NaN */
static double FN(divisor_of)(const newton_schulz_run *run, entrywise *e)
{
    double largest = 0, sum = 0;
    run->each(PARTS, 1 + WORTH_A_THREAD / (e->count / PARTS + 1), FN(squares), e);
    for (int i = 0; i < PARTS; i++) largest = MAX(largest, e->part[PARTS + i]);
    for (int i = 0; i < PARTS; i++) {
        const double unit = e->part[PARTS + i] / (largest > 0 ? largest : 1);
        sum += e->part[i] * (e->part[PARTS + i] > 0 ? unit * unit : 1);
    }
    const double length = (largest > 0 ? largest : 1) * sqrt(sum);
    return !(length <= DBL_MAX) ? (double)NAN : MAX(length, run->a->eps);
}

/* -------------------------------------------------------------------------------------------------------- products */

static void FN(slabs)(int64_t begin, int64_t end, void *arg)
{
    const applied *p = arg;
    const int64_t s = p->s, l = p->l;
    for (int64_t slab = begin; slab < end; slab++) {
        const int64_t from = slab * SLAB, some = MIN(SLAB, l - from), at = p->tall ? from * s : from;
        T *y = (T *)p->y + at;
        for (int t = 0; t < p->terms; t++) {
            const T *q = p->q[t], *x = (const T *)p->x[t] + at, scale = (T)(t ? p->scale : 1), add = (T)(t > 0);
            if (p->tall) GEMM(false, false, some, s, s, scale, x, s, q, s, add, y, s);
            else GEMM(false, false, s, some, s, scale, q, s, x, l, add, y, l);
        }
    }
}

static void FN(apply)(const newton_schulz_run *run, applied p)
{
    p.s = run->s, p.l = run->l, p.tall = run->a->m > run->a->n;
    run->each(CEIL_DIV(p.l, SLAB), 1, FN(slabs), &p);
}

/* Of factors [s, s], unless they say otherwise. */
static void FN(symmetric)(const newton_schulz_run *run, half_product p)
{
    const int64_t blocks = CEIL_DIV(run->s, TILE);
    p.m = run->s;
    if (p.k == 0) p.k = p.ld = run->s;
    run->each(blocks * (blocks + 1) / 2, 1, FN(half_blocks), &p);
}

static half_product FN(times)(const T *left, const T *right, T *c)
{
    return (half_product){.left = {left}, .right = {right}, .scale = 1, .c = c};
}

/* The product rule. */
static half_product FN(derivative)(const T *left, const T *dleft, const T *right, const T *dright, T *c)
{
    return (half_product){.left = {dleft, left}, .right = {right, dright}, .scale = 1, .c = c};
}

/* C = scale (Y X' + X Y'), of [s, l] or tall ones; without y: X X' */
static void FN(gram)(const newton_schulz_run *run, const T *x, const T *y, double scale, T *c)
{
    const bool tall = run->a->m > run->a->n;
    half_product p = y ? FN(derivative)(x, y, x, y, c) : FN(times)(x, x, c);
    p.scale = scale, p.k = run->l, p.ld = run->a->n, p.transa = tall, p.transb = !tall;
    FN(symmetric)(run, p);
}

/* to = left right, and dto = its derivative, where there are any */
static void FN(product)(const newton_schulz_run *run, const T *left, const T *dleft, const T *right, const T *dright,
                        T *to, T *dto)
{
    FN(symmetric)(run, FN(times)(left, right, to));
    if (dto) FN(symmetric)(run, FN(derivative)(left, dleft, right, dright, dto));
}

/* Q of `steps` steps, of the Gram matrix of x; with dx also its derivative, of that of the Gram matrix along dx. */
static void FN(polynomial)(const newton_schulz_run *run, newton_schulz_slot *own, const T *x, const T *dx, int64_t from,
                           int64_t steps)
{
    FN(gram)(run, x, NULL, 1, own->gram);
    if (dx) FN(gram)(run, x, dx, .5, own->dgram);
    for (int64_t k = 0; k < steps; k++) {
        const double *step = run->a->coefficients + 3 * (from + k);
        T *a = own->gram, *da = own->dgram, *rest = own->rest, *drest = dx ? own->drest : NULL;
        T *p = k ? own->poly : own->q, *dp = k ? own->dpoly : own->dq;
        half_product h = FN(times)(a, a, p), d = FN(derivative)(a, da, a, da, dp);
        h.scale = d.scale = step[2], h.add = d.add = step[1], h.also = a, d.also = da, h.diagonal = step[0];
        FN(symmetric)(run, h);
        if (dx) FN(symmetric)(run, d);
        if (k + 1 < steps) {
            FN(product)(run, p, dp, a, da, rest, drest);
            if (dx) FN(symmetric)(run, FN(derivative)(p, dp, rest, drest, da));
            FN(symmetric)(run, FN(times)(p, rest, a));
        }
        if (k == 0) continue;
        FN(product)(run, p, dp, own->q, own->dq, rest, drest);
        own->rest = own->q, own->q = rest;
        if (dx) own->drest = own->dq, own->dq = drest;
    }
}

/* -------------------------------------------------------------------------------------------------------- matrices */

static void FN(forward)(const newton_schulz_run *run, newton_schulz_slot *own, int64_t v)
{
    const subspace_newton_schulz_args *a = run->a;
    const int64_t entries = a->m * a->n;
    const bool half = a->dtype == SUBSPACE_F16 || a->dtype == SUBSPACE_BF16;
    T *y = half ? (T *)own->x + entries : (T *)a->y + v * entries;
    T *x = run->runs % 2 ? own->x : y, *next = run->runs % 2 ? y : own->x;
    entrywise e = {.dtype = a->dtype, .at = v * entries, .count = entries, .from = a->x, .to = x, .part = own->part};
    e.divisor = FN(divisor_of)(run, &e);
    run->each(PARTS, 1 + WORTH_A_THREAD / (entries / PARTS + 1), FN(divide), &e);
    for (int64_t from = 0, count; from < a->steps; from += count) {
        count = subspace_newton_schulz_run(a, from);
        FN(polynomial)(run, own, x, NULL, from, count);
        FN(apply)(run, (applied){.terms = 1, .q = {own->q}, .x = {x}, .y = next});
        T *const done = x;
        x = next, next = done;
    }
    if (!half) return;
    e = (entrywise){.dtype = a->dtype, .at = e.at, .count = entries, .from = x, .to = a->y, .divisor = 1};
    run->each(PARTS, 1 + WORTH_A_THREAD / (entries / PARTS + 1), FN(put), &e);
}

static void FN(backward)(const newton_schulz_run *run, newton_schulz_slot *own, int64_t v)
{
    const subspace_newton_schulz_args *a = run->a;
    const int64_t entries = a->m * a->n, grain = 1 + WORTH_A_THREAD / (entries / PARTS + 1);
    T *x = own->x, *dx = own->dx, *next = dx + entries;
    int64_t begins[SUBSPACE_STEPS + 1] = {0}, r = 0;
    entrywise e = {.dtype = a->dtype, .at = v * entries, .count = entries, .from = a->x, .to = x, .part = own->part};
    e.divisor = FN(divisor_of)(run, &e);
    run->each(PARTS, grain, FN(divide), &e);
    for (; r + 1 < run->runs; r++) {
        begins[r + 1] = begins[r] + subspace_newton_schulz_run(a, begins[r]);
        FN(polynomial)(run, own, x + r * entries, NULL, begins[r], begins[r + 1] - begins[r]);
        FN(apply)(run, (applied){.terms = 1, .q = {own->q}, .x = {x + r * entries}, .y = x + (r + 1) * entries});
    }
    begins[run->runs] = a->steps;
    entrywise taken = {.dtype = a->dtype, .at = e.at, .count = entries, .from = a->dy, .to = dx, .divisor = 1};
    run->each(PARTS, grain, FN(divide), &taken);
    for (; r >= 0; r--) {
        const T *here = x + r * entries;
        FN(polynomial)(run, own, here, dx, begins[r], begins[r + 1] - begins[r]);
        FN(apply)(run, (applied){.terms = 2, .q = {own->q, own->dq}, .x = {dx, here}, .scale = 2, .y = next});
        T *const done = dx;
        dx = next, next = done;
    }
    const double divisor = e.divisor; /* d(x / |x|); a length below eps is no part of it */
    e.x = x, e.from = dx, e.to = a->dx, e.factor = 0;
    if (divisor > a->eps || !(divisor == divisor)) {
        run->each(PARTS, grain, FN(dot), &e);
        for (int i = 0; i < PARTS; i++) e.factor += e.part[i];
    }
    run->each(PARTS, grain, FN(put), &e);
}

static void FN(matrices)(int64_t begin, int64_t end, void *arg)
{
    const newton_schulz_run *run = arg;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t from, to;
        share(run->a->v, slot, run->slots, &from, &to);
        for (int64_t v = from; v < to; v++) {
            size_t bytes = 0;
            newton_schulz_slot own = lay_out(run, run->scratch + (size_t)slot * run->slot_bytes, &bytes);
            if (run->backward) FN(backward)(run, &own, v);
            else FN(forward)(run, &own, v);
        }
    }
}

#ifdef LAST_T /* ------------------------------------------------ read once: the contract */

static subspace_status iterate(subspace_ctx *ctx, const subspace_newton_schulz_args *a)
{
    newton_schulz_run run;
    size_t bytes = 0;
    TRY(subspace_newton_schulz_check(ctx, a));
    plan(&run, ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "newton_schulz: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    if (a->v * run.s == 0) return SUBSPACE_OK;
    void (*const fn)(int64_t, int64_t, void *) = a->dtype == SUBSPACE_F64 ? LEVEL(matrices_f64) : LEVEL(matrices_f32);
    if (run.slots == 1) fn(0, 1, &run);
    else ctx->parallel_for(run.slots, 1, fn, &run);
    return SUBSPACE_OK;
}

subspace_status LEVEL(subspace_newton_schulz)(subspace_ctx *ctx, const subspace_newton_schulz_args *a)
{
    subspace_newton_schulz_args forward = *a;
    forward.dx = NULL;
    return iterate(ctx, &forward);
}

subspace_status LEVEL(subspace_newton_schulz_backward)(subspace_ctx *ctx, const subspace_newton_schulz_args *a)
{
    return iterate(ctx, a);
}

#endif
