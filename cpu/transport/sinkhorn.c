/* sinkhorn.c - a plan with given row and column sums, and the exact gradient through it.
 *
 *     plan_ij = f_i K_ij g_j,     K_ij = exp((scores_ij - max) / eta + alpha_i + beta_j), stored in the plan's place
 *
 *     general      f <- f q^w, q = row / (f (K g));   g <- g q^w, q = col / (g (K' f))     one pass over K for both
 *     symmetric    f <- f q^(11/16) (f / f_before)^(1/32), q = row / (f (K f))             upper half of K alone
 *
 * w = 1 is Sinkhorn's iteration, which shrinks the error by s = sigma_2(plan)^2. Once s is seen, w = 2 / (1 +
 * sqrt(1-s)) makes that w - 1: successive over-relaxation; w falls back to 1 should the error grow. The symmetric step
 * is gradient descent on log f, whose Hessian I + plan has eigenvalues in [1, 2] for a positive semidefinite plan:
 * steps of 2 * 11/16 with momentum 1/32 shrink the error by 1/sqrt(32), where the plain f <- sqrt(row f / (K f)) halves
 * it; in the largest |log f - log f*| neither ever moves away. Powers are square roots: w is in sixteenths.
 *
 * Where (max - min) / eta is too much for T's exponent, sweeps in the log domain first put potentials into K (alpha,
 * beta), until every row and column has a sum in range; f and g are put there as well should they grow large.
 * Memory: some vectors.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "sinkhorn_gibbs.h"

enum { BLOCK = 64, SMALL = 1 << 15 }; /* entries of an update; of a plan that one thread had better have for itself */

/* The exponent w of the general sweep, learnt from how fast the error falls. */
typedef struct relaxation {
    int sixteenths, waiting, failures; /* sweeps before the next change */
    double norm, rate;
} relaxation;

static void relax(relaxation *w, double error, double norm)
{
    const double omega = w->sixteenths / 16.0, before = w->rate;
    const double rate = w->norm > 0 ? norm / w->norm : 0;
    w->norm = norm, w->rate = rate, w->waiting++;
    if (rate > 1.5 && w->sixteenths > 16) { /* too bold */
        w->sixteenths = 16, w->waiting = -(3 << w->failures);
        if (w->failures < 16) w->failures++;
        return;
    }
    const double steady = 0.02 + 0.1 * (1 - MAX(rate, before));
    if (error > 0.5 || w->waiting < 2 || !(rate < 1) || !(fabs(rate - before) < steady) || !(rate > omega - 1)) return;
    /* a rate r with w is one of s with 1: (r + w - 1)^2 = r w^2 s (Young) */
    const double s = MIN((rate + omega - 1) * (rate + omega - 1) / (rate * omega * omega), 0.9999);
    const int best = (int)(32 / (1 + sqrt(1 - s)));
    if (best > w->sixteenths) w->sixteenths = best, w->waiting = -2;
}

typedef struct failure {
    subspace_status status;
    char message[256];
} failure;

/* All plans of a call: shared out among the workers, or one after the other by all threads. */
typedef struct batch {
    subspace_ctx *ctx;
    sinkhorn_run run; /* what the plans have in common */
    bool backward;
    int64_t workers;
    size_t bytes; /* of a worker's memory */
    char *memory;
    failure *failed; /* [workers] */
    bool stop;
} batch;

#define THIS_FILE "transport/sinkhorn.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "sinkhorn_gibbs.h"

/* ------------------------------------------------------------------------------------------------------ the sweeps */

/* q <- q^(sixteenths / 16) */
static inline void FN(power)(T *restrict q, int64_t count, int sixteenths)
{
    T y[BLOCK];
    for (int64_t i = 0; i < count; i++) y[i] = sixteenths & 16 ? q[i] : 1;
    for (int bit = 8; bit > 0; bit /= 2) {
        if (!(sixteenths & (2 * bit - 1))) break;
        for (int64_t i = 0; i < count; i++) q[i] = sqrt(q[i]);
        for (int64_t i = 0; i < count && sixteenths & bit; i++) y[i] *= q[i];
    }
    for (int64_t i = 0; i < count; i++) q[i] = y[i];
}

/* f <- f (row / (f K g))^w; the columns' sums K' f of the new f. */
static void FN(sweep)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t n = run->n;
    const T *k = run->plan, *target = run->row, *g = run->g;
    T *f = run->f;
    for (int64_t slot = begin; slot < end; slot++) {
        sinkhorn_slot *own = &run->slot[slot];
        int64_t first, last;
        double *total;
        T *part = FN(fresh)(run, slot, &total);
        *own = (sinkhorn_slot){.empty = -1};
        share(run->m, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i += ROWS) {
            const int64_t rows = MIN(ROWS, last - i);
            const T *row[ROWS];
            T w[ROWS] = {0}, q[ROWS] = {0};
            double y[ROWS] = {0};
            FN(rows_at)(k, n, i, last, row);
            FN(dots)(row, n, n, g, y);
            for (int64_t r = 0; r < rows; r++) q[r] = (T)((double)target[i + r] / ((double)f[i + r] * y[r]));
            FN(power)(q, rows, run->power);
            for (int64_t r = 0; r < rows; r++) {
                if (!(y[r] > 0)) own->empty = i + r;
                f[i + r] = w[r] = f[i + r] * q[r];
                own->error = MAX(own->error, fabs((double)w[r] * y[r] / (double)target[i + r] - 1));
                own->logs = MAX(own->logs, (double)MAX(w[r], 1 / w[r]));
            }
            FN(outer)(row, n, n, w, part);
            if ((i - first + ROWS) % FLUSH == 0) FN(flush)(n, part, total);
        }
        FN(flush)(n, part, total);
    }
}

/* x <- x (target / (x y))^w, y the joined totals; with momentum towards where x came from if `last` is given. */
static double FN(update)(const sinkhorn_run *run, const T *target, const double *y, int sixteenths, T *x, T *last)
{
    double logs = 0;
    for (int64_t j0 = 0; j0 < run->n; j0 += BLOCK) {
        const int64_t count = MIN(BLOCK, run->n - j0);
        T q[BLOCK] = {0}, most = 0;
        for (int64_t j = 0; j < count; j++) q[j] = (T)((double)target[j0 + j] / ((double)x[j0 + j] * y[j0 + j]));
        FN(power)(q, count, sixteenths);
        for (int64_t j = 0; j < count; j++) {
            T to = x[j0 + j] * q[j];
            if (last) {
                const T turn = x[j0 + j] / last[j0 + j], some = turn < 2 ? turn : 2;
                to *= 1 + (some - 1) / 32;
                last[j0 + j] = x[j0 + j];
            }
            x[j0 + j] = to;
            most = MAX(most, MAX(to, 1 / to));
        }
        logs = MAX(logs, (double)most);
    }
    return logs;
}

/* The slots' totals in the first of them; the largest |x y / target - 1|, and the root of the sum of their squares. */
static double FN(error)(sinkhorn_run *run, const T *target, const T *x, double *norm)
{
    double most = 0, squares = 0, *y = run->total;
    for (int64_t s = 1; s < run->slots; s++)
        for (int64_t j = 0; j < run->n; j++) y[j] += run->total[s * run->n + j];
    for (int64_t j = 0; j < run->n; j++) {
        const double e = (double)x[j] * y[j] / (double)target[j] - 1;
        squares += e * e;
        most = MAX(most, fabs(e));
    }
    *norm = sqrt(squares);
    return most;
}

static subspace_status FN(iterate_symmetric)(sinkhorn_run *run, int64_t v, double *error, int64_t *sweeps)
{
    T *f = run->f;
    double norm;
    run->matrix = run->plan, run->in = f;
    for (*sweeps = 0;; ++*sweeps) {
        if (*sweeps % run->patience == 0) TRY(go_on(run));
        each(run, FN(triangle));
        *error = FN(error)(run, run->row, f, &norm);
        for (int64_t i = 0; *sweeps == 0 && i < run->n; i++) TRY(FN(empty_column)(run, v, i, !(run->total[i] > 0)));
        if (*error <= run->a->tol || *sweeps == run->a->max_iter) return SUBSPACE_OK;
        /* from 1 the plain step, which sets the scale at once */
        const double logs = FN(update)(run, run->row, run->total, *sweeps ? 11 : 8, f, *sweeps ? run->last : NULL);
        if (*sweeps == 0) memcpy(run->last, f, (size_t)run->n * sizeof(T));
        if (logs > LIMIT) FN(absorb)(run);
    }
}

static subspace_status FN(iterate)(sinkhorn_run *run, int64_t v, int64_t left, double *error, int64_t *sweeps)
{
    relaxation w = {.sixteenths = 16};
    for (;; left--) {
        double norm, logs = 0;
        if (*sweeps % run->patience == 0) TRY(go_on(run));
        run->power = left > 0 ? w.sixteenths : 0; /* 0: only look */
        each(run, FN(sweep));
        TRY(FN(empty_row)(run, v));
        *sweeps += left > 0;
        *error = FN(error)(run, run->col, run->g, &norm);
        for (int64_t s = 0; s < run->slots; s++) *error = MAX(*error, run->slot[s].error);
        for (int64_t j = 0; j < run->n; j++) TRY(FN(empty_column)(run, v, j, !(run->total[j] > 0)));
        if (left <= 1 || (*error <= run->a->tol && !run->a->half_steps)) return SUBSPACE_OK;
        if (!run->a->half_steps) relax(&w, *error, norm);
        logs = FN(update)(run, run->col, run->total, w.sixteenths, run->g, NULL);
        for (int64_t s = 0; s < run->slots; s++) logs = MAX(logs, run->slot[s].logs);
        if (logs > LIMIT) FN(absorb)(run);
    }
}

static subspace_status FN(forward)(sinkhorn_run *run, int64_t v)
{
    const subspace_sinkhorn_args *a = run->a;
    int64_t left = a->half_steps ? (a->half_steps + 1) / 2 : a->max_iter, *sweeps = &a->sweeps[v];
    double range;
    T *f = run->f, *g = run->g, *last = run->last, *shift = run->shift;
    TRY(FN(inspect)(run, v, &range));
    memset(run->alpha, 0, (size_t)run->m * sizeof(double));
    memset(run->beta, 0, (size_t)run->n * sizeof(double));
    for (int64_t i = 0; i < run->m; i++) f[i] = 1;
    for (int64_t j = 0; j < run->n; j++) g[j] = last[j] = 1, shift[j] = 0;
    *sweeps = 0;
    if (range > FN(RANGE) &&left > 0) {
        TRY(FN(log_sweeps)(run, v));
        left--;
        if (!run->symmetric) ++*sweeps;
    }
    each(run, FN(gibbs));
    TRY(run->symmetric ? FN(iterate_symmetric)(run, v, &a->error[v], sweeps)
                       : FN(iterate)(run, v, left, &a->error[v], sweeps));
    each(run, FN(scale_plan));
    return SUBSPACE_OK;
}

#include "sinkhorn_backward.h"

/* ----------------------------------------------------------------------------------------------------- the batch */

static void FN(lay_out)(sinkhorn_run *run, bool backward, char *base, size_t *at)
{
    const int64_t m = run->m, n = run->n, both = m + n, slots = run->slots;
    run->ones = carve(base, at, MAX(m, n), sizeof(T));
    run->slot = carve(base, at, slots, sizeof *run->slot);
    run->part = carve(base, at, (backward ? 2 : 1) * slots * n, sizeof(T));
    run->total = carve(base, at, (backward ? 2 : 1) * slots * n, sizeof(double));
    if (backward) {
        void **vectors[] = {&run->diagonal, &run->rhs, &run->x, &run->p, &run->out};
        for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
            *vectors[i] = carve(base, at, run->symmetric ? n : both, sizeof(T));
        return;
    }
    run->f = carve(base, at, m, sizeof(T)), run->g = carve(base, at, n, sizeof(T));
    run->last = carve(base, at, n, sizeof(T)), run->shift = carve(base, at, n, sizeof(T));
    run->alpha = carve(base, at, m, sizeof(double)), run->beta = carve(base, at, n, sizeof(double));
}

/* The plans of some workers, each in its own piece of the workspace. */
static void FN(work)(int64_t begin, int64_t end, void *arg)
{
    batch *b = arg;
    const subspace_sinkhorn_args *a = b->run.a;
    const size_t plan = (size_t)(a->m * a->n) * sizeof(T), row = (size_t)a->m * sizeof(T),
                 col = (size_t)a->n * sizeof(T);
    for (int64_t worker = begin; worker < end; worker++) {
        sinkhorn_run run = b->run;
        subspace_ctx ctx = *b->ctx;
        failure *failed = &b->failed[worker];
        int64_t first, last;
        size_t at = 0;
        run.ctx = &ctx, run.stop = &b->stop;
        FN(lay_out)(&run, b->backward, b->memory + worker * (int64_t)b->bytes, &at);
        for (int64_t i = 0; i < MAX(a->m, a->n); i++) ((T *)run.ones)[i] = 1;
        share(a->v, worker, b->workers, &first, &last);
        failed->status = SUBSPACE_OK;
        for (int64_t v = first; v < last && failed->status == SUBSPACE_OK; v++) {
            run.row = a->row ? (const char *)a->row + (size_t)v * row : run.ones;
            run.col = a->col ? (const char *)a->col + (size_t)v * col : run.ones;
            run.plan = (char *)a->plan + (size_t)v * plan;
            run.scores = b->backward ? NULL : (const char *)a->scores + (size_t)v * plan;
            run.dplan = b->backward ? (const char *)a->dplan + (size_t)v * plan : NULL;
            run.dscores = b->backward && a->dscores ? (char *)a->dscores + (size_t)v * plan : NULL;
            failed->status = b->backward ? FN(backward)(&run, v) : FN(forward)(&run, v);
        }
        memcpy(failed->message, ctx.message, sizeof failed->message);
    }
}

static size_t FN(bytes)(const sinkhorn_run *of, bool backward)
{
    sinkhorn_run run = *of;
    size_t bytes = 0;
    FN(lay_out)(&run, backward, NULL, &bytes);
    return bytes;
}

static void FN(start)(batch *b)
{
    if (b->workers == 1) FN(work)(0, 1, b);
    else b->ctx->parallel_for(b->workers, 1, FN(work), b);
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

static size_t plan_batch(batch *b, subspace_ctx *ctx, const subspace_sinkhorn_args *a, bool backward, char *base)
{
    size_t bytes = 0;
    const double entries = (double)a->m * (double)a->n;
    const bool apart = a->v > 1 && (entries < SMALL || a->v >= 4 * ctx->threads);
    *b = (batch){.ctx = ctx, .backward = backward, .workers = apart ? MIN(ctx->threads, a->v) : 1};
    b->run = (sinkhorn_run){.a = a, .m = a->m, .n = a->n, .scale = MIN(1 / a->eta, 1e30)};
    b->run.patience = 1 + (int64_t)(SMALL / entries);
    b->run.slots = apart || entries < SMALL ? 1 : MIN(ctx->threads, CEIL_DIV(a->m, TILE_ROWS));
    b->run.symmetric = backward && a->symmetric == SUBSPACE_SYMMETRIC;
    b->bytes = a->dtype == SUBSPACE_F64 ? LEVEL(bytes_f64)(&b->run, backward) : LEVEL(bytes_f32)(&b->run, backward);
    b->failed = carve(base, &bytes, b->workers, sizeof *b->failed);
    b->memory = carve(base, &bytes, b->workers, b->bytes);
    return bytes;
}

size_t LEVEL(subspace_sinkhorn_workspace)(const subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    batch b;
    if (a->v <= 0 || a->m <= 0 || a->n <= 0) return 0;
    const size_t forward = plan_batch(&b, (subspace_ctx *)ctx, a, false, NULL);
    return MAX(forward, plan_batch(&b, (subspace_ctx *)ctx, a, true, NULL));
}

static subspace_status solve(subspace_ctx *ctx, const subspace_sinkhorn_args *a, bool backward)
{
    batch b;
    TRY(subspace_sinkhorn_check(ctx, a));
    if (a->v == 0) return SUBSPACE_OK;
    const size_t bytes = plan_batch(&b, ctx, a, backward, ctx->workspace);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "sinkhorn: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    if (a->dtype == SUBSPACE_F64) LEVEL(start_f64)(&b);
    else LEVEL(start_f32)(&b);
    for (int64_t w = 0; w < b.workers; w++)
        CHECK(ctx, b.failed[w].status == SUBSPACE_OK, b.failed[w].status, "%s", b.failed[w].message);
    return SUBSPACE_OK;
}

subspace_status LEVEL(subspace_sinkhorn)(subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    return solve(ctx, a, false);
}

subspace_status LEVEL(subspace_sinkhorn_backward)(subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    return solve(ctx, a, true);
}

#endif
