/* rsgd.c - Riemannian SGD on frames, two passes over memory and no SVD, QR or division by sigma.
 *
 *     1  dir = momentum step of the gradient; Gram of the rows [W; dir] (and M)     8 n k^2 flops
 *     2  k x k, in double:  Q = W W',  R = 1.5 I - 0.5 Q          drift repaired by one Newton-Schulz
 *        P = dir W' R,  S = dir dir' - P P' = D D',  X = a^2 S,  f, g of X          (retraction.h)
 *     3  W <- (f - a g P) R W + a g dir,   M <- its momentum step, or transported
 *
 * On the Stiefel manifold f and g are of B = a skew(P) too, and M keeps its tangent part; the rest is the same.
 *
 * D = dir - P W is never stored. Nothing is written before the k x k part is known to be finite.
 * Traffic: W, grad and M are read, W and M written; the second read comes from cache.
 *
 * A step so long that S cancels (a^2 |dir|^2 > 10), or a frame too far from orthonormal for one
 * Newton-Schulz step, takes the careful path: D stored, projected twice, sums in double, f and g
 * by eigenvalues, and the result orthonormalised again.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "rsgd_batches.h"

typedef struct rsgd_run {
    const subspace_rsgd_args *a;
    rsgd_step step;
    int64_t classes, slots, blocks, packed;
    int64_t k, n, kp; /* the largest */
    int64_t kb;       /* of a batch, or 0 */
    size_t slot_bytes;
    char *base;       /* [slots][slot_bytes] */
    int64_t *skipped; /* [slots] */
} rsgd_run;

static int64_t rounded(int64_t k)
{
    return k <= 4 ? 4 : CEIL_DIV(k, 8) * 8;
}

/* Point a slot's scratch into its piece of the workspace; returns its size. */
static size_t lay_out(const rsgd_run *r, char *base, rsgd_slot *s)
{
    const size_t item = r->a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const int64_t rows = rows_of(r->blocks, r->k), tall = rows_of(r->packed, r->k);
    size_t at = 0;
    s->blocks = r->blocks, s->packed = r->packed;
    s->width = MIN(MAX(LEAST_WIDTH, TILE / tall / 32 * 32), CEIL_DIV(r->n, 32) * 32);
    s->ld = s->width + 16; /* an odd number of lines: rows are not all in the same sets of the cache */
    s->pack = carve(base, &at, tall * s->ld, item);
    s->coef = carve(base, &at, 2 * r->blocks * r->k * r->kp, item);
    s->dir = carve(base, &at, r->k * r->n, item);
    s->gram = carve(base, &at, rows * rows, sizeof(double));
    s->q.values = carve(base, &at, 3 * r->kp, sizeof(double));
    double **matrices[] = {&s->R, &s->P, &s->S,  &s->X, &s->f,         &s->g,
                           &s->E, &s->h, &s->Pm, &s->Y, &s->q.scratch, &s->q.spare};
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
        *matrices[i] = carve(base, &at, r->kp * r->kp, sizeof(double));
    carve(base, &at, 2 * r->kp * r->kp, sizeof(double)); /* more of `spare` */
    s->many = carve(base, &at, BATCH_MATRICES * r->kb * r->kb, sizeof(wide));
    return at;
}

static rsgd_run plan(const subspace_ctx *ctx, const subspace_rsgd_args *a, char *base, size_t *bytes)
{
    rsgd_run r = {.a = a, .slots = MAX(ctx->threads, 1), .k = 1, .n = 1}; /* there may be no frames */
    rsgd_slot unused;
    const double mu = a->momentum, keep = mu == 0 ? 1 : 1 - a->dampening, sign = a->maximize ? -1 : 1;
    /* g = sign grad + wd W;  M' = mu M + keep g;  dir = M', or with Nesterov g + mu M' */
    r.step = (rsgd_step){.mm = mu, .mg = keep * sign, .mw = keep * a->weight_decay, .dm = 1};
    if (a->nesterov) r.step.dm = mu, r.step.dg = sign, r.step.dw = a->weight_decay;
    r.step.kind = a->retraction, r.step.parallel = a->parallel && mu != 0, r.step.stiefel = a->stiefel;
    r.step.tangent = a->stiefel && mu != 0;
    r.blocks = (r.step.parallel || r.step.tangent) && a->nesterov ? 3 : 2;
    r.step.plain = !a->nesterov && r.step.mw == 0;
    r.packed = a->nesterov ? 3 : 2;
    for (int64_t i = 0; i < a->count; i++) {
        r.classes += a->frames[i].c;
        r.k = MAX(r.k, a->frames[i].k), r.n = MAX(r.n, a->frames[i].n);
    }
    r.kp = rounded(r.k);
    r.kb = r.k == 1 || r.step.parallel || r.step.stiefel ? 0 : rounded(MIN(r.k, BATCH_K));
    const int64_t worth = CEIL_DIV(r.classes * r.k * (r.n + 32 * r.k), WORTH_A_THREAD); /* the 32 for the k x k part */
    r.slots = MAX(1, MIN(r.slots, worth));
    r.slot_bytes = lay_out(&r, NULL, &unused);
    r.base = carve(base, bytes, r.slots, r.slot_bytes);
    r.skipped = carve(base, bytes, r.slots, sizeof(int64_t));
    return r;
}

size_t LEVEL(subspace_rsgd_workspace)(const subspace_ctx *ctx, const subspace_rsgd_args *a)
{
    size_t bytes = 0;
    plan(ctx, a, NULL, &bytes);
    return bytes;
}

#define THIS_FILE "grassmann/rsgd.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "rsgd_batches.h"

/* Block (bi, bj), bi >= bj, of the gram as a [kp, kp] matrix. */
static void FN(block_of)(const rsgd_slot *s, const double *gram, int64_t bi, int64_t bj, double *out)
{
    const int64_t k = s->k, kp = s->kp, ld = rows_of(s->blocks, k);
    const double *from = gram + bi * k * ld + bj * k;
    if (k == kp) {
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < k; j += 4) *(fouru *)(out + i * k + j) = *(const fouru *)(from + i * ld + j);
    } else {
        memset(out, 0, (size_t)(kp * kp) * sizeof *out);
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < k; j++) out[i * kp + j] = from[i * ld + j];
    }
    if (bi == bj) mirror(&s->q, out);
}

/* Coefficients of an output by the rows of a block. */
static void FN(put)(const rsgd_slot *s, const double *a, T *coef, int64_t output, int64_t block)
{
    const int64_t k = s->k, kp = s->kp, depth = s->blocks * k;
    coef += output * k * depth + block * k;
    if (k == kp)
        for (int64_t i = 0; i < k; i++)
            for (int64_t j0 = 0; j0 < k; j0 += 4)
                for (int64_t j = j0; j < j0 + 4; j++) coef[i * depth + j] = (T)a[i * kp + j];
    else
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < k; j++) coef[i * depth + j] = (T)a[i * kp + j];
}

/* One class. False: its numbers are not finite, nothing was changed. */
static bool FN(step_class)(rsgd_slot *s)
{
    const rsgd_step *st = &s->step;
    const kxk *q = &s->q;
    const double a = -s->lr;
    double *gram = s->gram, *R = s->R, *P = s->P, *S = s->S, *X = s->X, *f = s->f, *g = s->g, *E = s->E, *h = s->h,
           *Pm = s->Pm, *Y = s->Y;
    const int64_t kp = s->kp;

    FN(gram_of)(s, gram);
    FN(block_of)(s, gram, 0, 0, R); /* Q for now */
    FN(block_of)(s, gram, 1, 1, S);
    double trace = 0;
    bool near = true;
    for (int64_t i = 0; i < s->k; i++) trace += S[i * kp + i];
    for (int64_t i = 0; i < s->k; i++) {
        double far = 0; /* entries of the row: a count is a sum of vectors, a largest value is not */
        for (int64_t j = 0; j < s->k; j++) {
            const double d = R[i * kp + j] - (i == j);
            far += !(d * d < 1e-4);
        }
        near &= far == 0;
    }
    /* written so that a NaN or an infinity takes the careful path, which tells overflow from rubbish */
    if (!(near && a * a * trace < 10)) return FN(careful)(s);

    affine(q, -0.5, 1.5, R);
    FN(block_of)(s, gram, 1, 0, E);
    product(q, E, R, P);
    transpose(q, P, E);
    product_symmetric(q, P, E, X);
    for (int64_t i = 0; i < kp * kp; i++) S[i] -= X[i], X[i] = a * a * S[i];
    const double tolerance = IS_F32 ? 1e-10 : 1e-19;
    if (st->stiefel) skew(q, a, P, Pm), stiefel(q, st->kind, false, tolerance, Pm, X, f, g, h, Y);
    else retraction(q, st->kind, false, tolerance, X, f, g, st->parallel ? h : NULL);

    T *coef = s->coef;
    product(q, g, P, X);
    for (int64_t i = 0; i < kp * kp; i++) X[i] = f[i] - a * X[i];
    if (a != 0) product(q, X, R, E);
    else identity(q, E); /* a step of no length leaves every bit, drift included */
    memset(coef, 0, (size_t)(2 * s->blocks * s->k * s->k) * sizeof *coef);
    FN(put)(s, E, coef, 0, 0);
    if (st->parallel) { /* M <- V + Y (a^2 h D - a g W), V = M' - Pm W horizontal, Y = V D' */
        if (s->blocks == 3) {
            FN(block_of)(s, gram, 2, 0, E), product(q, E, R, Pm);
            FN(block_of)(s, gram, 2, 1, Y), product_t(q, Pm, P, X);
            for (int64_t i = 0; i < kp * kp; i++) Y[i] -= X[i];
        } else {
            copy(q, P, Pm), copy(q, S, Y);
        }
        product(q, Y, h, S), affine(q, a * a, 0, S);
        product(q, S, P, X), product(q, Y, g, E);
        for (int64_t i = 0; i < kp * kp; i++) X[i] = -(Pm[i] + X[i] + a * E[i]);
        product(q, X, R, E);
        FN(put)(s, E, coef, 1, 0);
        if (s->blocks == 2) affine(q, 1, 1, S);
        FN(put)(s, S, coef, 1, 1);
        identity(q, E);
        if (s->blocks == 3) FN(put)(s, E, coef, 1, 2);
    } else if (st->tangent) { /* M <- M' - sym(M' W') W */
        if (s->blocks == 3) FN(block_of)(s, gram, 2, 0, E), product(q, E, R, P);
        negative_symmetric(q, P, X), product(q, X, R, E);
        FN(put)(s, E, coef, 1, 0);
        identity(q, E);
        FN(put)(s, E, coef, 1, s->blocks - 1);
    }
    affine(q, a, 0, g);
    FN(put)(s, g, coef, 0, 1);
    FN(combine)(s, coef, st->parallel || st->tangent ? 2 : 1, true);
    return true;
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

/* Seat class c of s->frames in the slot. */
static void seat(const rsgd_run *r, rsgd_slot *s, int64_t c)
{
    const subspace_rsgd_args *a = r->a;
    const subspace_frames *p = s->frames;
    s->row = a->start ? a->start[c] : c * p->k;
    s->k = a->start ? a->start[c + 1] - s->row : p->k;
    s->kp = rounded(s->k), s->q.k = s->k, s->q.ld = s->kp;
    s->lr = a->lr ? ((const double *)a->lr)[a->lr_per_class ? c : 0] : a->lr_value;
}

static int64_t item_of(const rsgd_run *r)
{
    return r->a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
}

/* To be fetched meanwhile: what is behind class c, which the slot has, as many rows as it and those with it have. */
static void look_ahead(const rsgd_run *r, rsgd_slot *s, int64_t c, int64_t rows)
{
    const subspace_frames *p = s->frames;
    const int64_t bytes = c + 1 < p->c ? rows * p->n * item_of(r) : 0, at = (s->row + s->k) * p->n * item_of(r);
    const void *arrays[] = {p->weight, p->grad, p->buffer ? p->buffer : p->grad};
    for (int i = 0; i < 3; i++) s->ahead[i] = (rsgd_ahead){(const char *)arrays[i] + at, bytes};
}

/* The next `count` classes of s->frames from class c on, which the slot has, as lines; of those that are left for
 * step_class, the bits. */
static uint64_t lines_of(const rsgd_run *r, rsgd_slot *s, int64_t c, int64_t most, int64_t *count)
{
    const subspace_rsgd_args *a = r->a;
    const bool f64 = a->dtype == SUBSPACE_F64;
    double lr[LINES];
    if (a->start) most = 1; /* the next may be no line */
    *count = MAX(1, MIN(MIN(most, LINES), LINES_BYTES / (s->frames->n * 3 * item_of(r))));
    for (int64_t i = 0; i < *count; i++)
        lr[i] = a->lr ? ((const double *)a->lr)[a->lr_per_class ? c + i : 0] : a->lr_value;
    return f64 ? LEVEL(step_lines_f64)(s, *count, lr) : LEVEL(step_lines_f32)(s, *count, lr);
}

/* Whether the class in the slot is one for a batch: to be stepped as step_class would, beside others. */
static bool batched(const rsgd_run *r, const rsgd_slot *s)
{
    return r->kb && s->k > 1 && s->k <= r->kb && WIDE * 3 * s->k * s->frames->n * item_of(r) <= BATCH_BYTES;
}

/* The same as a batch; all of them are left if they are too few to pay for empty lanes. */
static uint64_t batch_of(const rsgd_run *r, rsgd_slot *s, int64_t c, int64_t most, int64_t *count)
{
    const int64_t first = s->row;
    batch b = {.k = 0};
    do {
        b.row[b.count] = s->row, b.rows[b.count] = s->k, b.a[b.count] = -s->lr;
        b.k = MAX(b.k, s->kp);
        look_ahead(r, s, c + b.count, s->row + s->k - first);
        if (++b.count < MIN(most, WIDE)) seat(r, s, c + b.count);
    } while (b.count < MIN(most, WIDE) && batched(r, s));
    *count = b.count;
    if (32 * b.count < 3 * WIDE * b.k) return ~(uint64_t)0;
    wide **matrices[] = {&b.R, &b.E, &b.S, &b.P, &b.X, &b.X4, &b.f, &b.g, &b.t, &b.u};
    for (int64_t i = 0; i < BATCH_MATRICES; i++) *matrices[i] = s->many + i * b.k * b.k;
    return r->a->dtype == SUBSPACE_F64 ? LEVEL(step_batch_f64)(s, &b) : LEVEL(step_batch_f32)(s, &b);
}

/* The same in whichever way suits the first of them. */
static uint64_t several_of(const rsgd_run *r, rsgd_slot *s, int64_t c, int64_t most, int64_t *count)
{
    seat(r, s, c);
    if (s->k == 1 && !r->step.parallel && !r->step.stiefel) return lines_of(r, s, c, most, count);
    if (batched(r, s)) return batch_of(r, s, c, most, count);
    *count = 1;
    return 1;
}

static void step_slots(int64_t begin, int64_t end, void *arg)
{
    const rsgd_run *r = arg;
    const subspace_rsgd_args *a = r->a;
    for (int64_t slot = begin; slot < end; slot++) {
        rsgd_slot s = {.step = r->step, .frames = a->frames};
        int64_t first, last, before = 0; /* classes of the parameters before s.frames */
        lay_out(r, r->base + (size_t)slot * r->slot_bytes, &s);
        share(r->classes, slot, r->slots, &first, &last);
        r->skipped[slot] = 0;
        for (int64_t i = first, count; i < last; i += count) {
            while (i >= before + s.frames->c) before += s.frames++->c;
            const int64_t c = i - before;
            const uint64_t left = several_of(r, &s, c, MIN(last - i, s.frames->c - c), &count);
            for (int64_t l = 0; l < count; l++) {
                if (!(left >> l & 1)) continue;
                seat(r, &s, c + l), look_ahead(r, &s, c + l, s.k);
                const bool done = a->dtype == SUBSPACE_F64 ? LEVEL(step_class_f64)(&s) : LEVEL(step_class_f32)(&s);
                r->skipped[slot] += !done;
            }
        }
    }
}

subspace_status LEVEL(subspace_rsgd)(subspace_ctx *ctx, const subspace_rsgd_args *a)
{
    size_t bytes = 0;
    TRY(subspace_rsgd_check(ctx, a));
    rsgd_run r = plan(ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "rsgd: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, bytes);
    ctx->parallel_for(r.slots, 1, step_slots, &r);
    *a->skipped = 0;
    for (int64_t slot = 0; slot < r.slots; slot++) *a->skipped += r.skipped[slot];
    return SUBSPACE_OK;
}

#endif
