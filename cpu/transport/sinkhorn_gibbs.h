/* sinkhorn_gibbs.h - the scores of one plan: are they numbers, are they symmetric, how far apart; the Gibbs kernel
 *
 *     K_ij = exp((scores_ij - max) / eta + alpha_i + beta_j)
 *
 * of which only the upper half is made where they are symmetric; the sweeps in the log domain that find alpha and beta
 * where they are too far apart for T; and what becomes the plan.
 *
 * Included by sinkhorn.c, without T and once per precision; it brings sinkhorn_passes.h.
 */
#include <float.h>
#include "exp.h"
#include "sinkhorn_passes.h"

#define LL(v) ((long long)(v))

#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

#undef LOWEST
#undef LIMIT
#undef LARGEST
#undef EPSILON
#undef ROUNDING
#if IS_F32
enum { FN(RANGE) = 40 }; /* exp(-RANGE) is well within the exponent */
#define LOWEST (-87)     /* exp(LOWEST) as well, just */
#define LIMIT 1e25       /* for f and g, and 1 over them */
#define LARGEST FLT_MAX
#define EPSILON FLT_EPSILON
#define ROUNDING 0x1p-11 /* of symmetric scores, relative to the largest */
#else
enum { FN(RANGE) = 200 };
#define LOWEST (-708)
#define LIMIT 1e100
#define LARGEST DBL_MAX
#define EPSILON DBL_EPSILON
#define ROUNDING 0x1p-26
#endif

/* ---------------------------------------------------------------------------------------------------- the scores */

/* Largest and smallest finite score, and whether all are below +inf. */
static void FN(scan)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        share(run->m * run->n, slot, run->slots, &first, &last);
        const T *restrict s = run->scores;
        T high = -INFINITY, low = INFINITY, wrong = 0;
#pragma omp simd reduction(max : high, wrong) reduction(min : low)
        for (int64_t i = first; i < last; i++) {
            const T finite = s[i] > -INFINITY ? s[i] : (T)INFINITY, bad = s[i] <= LARGEST ? 0 : 1;
            high = s[i] > high ? s[i] : high;
            low = finite < low ? finite : low;
            wrong = bad > wrong ? bad : wrong;
        }
        run->slot[slot] = (sinkhorn_slot){.low = (double)low, .high = (double)high, .finite = wrong == 0};
    }
}

/* The same from the upper half, and the largest difference from the lower. */
static void FN(scan_symmetric)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t n = run->n;
    const T *s = run->scores;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        T high = -INFINITY, low = INFINITY, asymmetry = 0, wrong = 0;
        FN(tile) mirror;
        share_triangle(n, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i += TILE_ROWS)
            for (int64_t j = i; j < n; j += tile_columns(i, j)) {
                const int64_t rows = MIN(TILE_ROWS, last - i), columns = MIN(tile_columns(i, j), n - j);
                FN(mirror)(s, n, i, j, rows, columns, &mirror);
                for (int64_t r = 0; r < rows; r++) {
                    const T *restrict upper = s + (i + r) * n + j, *restrict lower = mirror.at[r];
#pragma omp simd reduction(max : high, wrong, asymmetry) reduction(min : low)
                    for (int64_t c = 0; c < columns; c++) {
                        const T x = upper[c], y = lower[c], d = x > y ? x - y : y - x, off = x == y ? 0 : d;
                        const T finite = x > -INFINITY ? x : (T)INFINITY, bad = x <= LARGEST && y <= LARGEST ? 0 : 1;
                        high = x > high ? x : high;
                        low = finite < low ? finite : low;
                        asymmetry = off > asymmetry ? off : asymmetry;
                        wrong = bad > wrong ? bad : wrong;
                    }
                }
            }
        run->slot[slot] = (sinkhorn_slot){
            .low = (double)low, .high = (double)high, .asymmetry = (double)asymmetry, .finite = wrong == 0};
    }
}

static sinkhorn_slot FN(scanned)(sinkhorn_run *run, bool symmetric)
{
    each(run, symmetric ? FN(scan_symmetric) : FN(scan));
    sinkhorn_slot all = run->slot[0];
    for (int64_t s = 1; s < run->slots; s++) {
        const sinkhorn_slot *one = &run->slot[s];
        all.low = MIN(all.low, one->low), all.high = MAX(all.high, one->high);
        all.asymmetry = MAX(all.asymmetry, one->asymmetry);
        all.finite = all.finite && one->finite;
    }
    return all;
}

/* Decides between the two problems and learns the range of the scores. */
static subspace_status FN(inspect)(sinkhorn_run *run, int64_t v, double *range)
{
    const subspace_sinkhorn_args *a = run->a;
    const int64_t m = run->m, n = run->n;
    const T *s = run->scores, *row = run->row, *col = run->col;
    sinkhorn_slot all = {0};
    run->symmetric = a->symmetric != SUBSPACE_GENERAL && m == n && a->half_steps == 0;
    if (a->symmetric == SUBSPACE_LOOK) /* the first row against the first column, before the rest */
        for (int64_t i = 0; run->symmetric && i < n; i++)
            run->symmetric = row[i] == col[i] && !(fabs(s[i] - s[i * n]) > ROUNDING * MAX(fabs(s[i]), fabs(s[0])));
    if (run->symmetric) {
        all = FN(scanned)(run, true);
        const double most = MAX(fabs(all.low), fabs(all.high));
        if (a->symmetric == SUBSPACE_LOOK) run->symmetric = all.asymmetry <= 8 * EPSILON * most;
        else
            CHECK(run->ctx, !(all.asymmetry > ROUNDING * most), SUBSPACE_INVALID_ARGUMENT,
                  "sinkhorn: scores are not symmetric: plan %lld differs from its transpose by up to %g", LL(v),
                  all.asymmetry);
    }
    if (!run->symmetric) all = FN(scanned)(run, false);
    for (int64_t i = 0; !all.finite && i < m * n; i++)
        CHECK(run->ctx, s[i] <= LARGEST, SUBSPACE_NUMERICAL, "sinkhorn: score (%lld, %lld, %lld) is %g", LL(v),
              LL(i / n), LL(i % n), (double)s[i]);
    CHECK(run->ctx, all.high > -INFINITY, SUBSPACE_NUMERICAL, "sinkhorn: plan %lld has no score above -inf", LL(v));
    run->high = all.high;
    *range = (all.high - all.low) * run->scale;
    return SUBSPACE_OK;
}

/* ------------------------------------------------------------------------------------------------- the log domain */

/* log sum_j exp((s_j - high) scale + shift_j) */
static double FN(log_sum)(const sinkhorn_run *run, const T *restrict s, const T *restrict shift)
{
    const T high = (T)run->high, scale = (T)run->scale;
    double sum = 0;
    T top = -INFINITY;
    for (int64_t j = 0; j < run->n; j++) {
        const T x = (s[j] - high) * scale + shift[j];
        top = x > top ? x : top;
    }
    for (int64_t j0 = 0; j0 < run->n && top > -INFINITY; j0 += CHUNK) {
        T some = 0;
#pragma omp simd reduction(+ : some)
        for (int64_t j = j0; j < MIN(run->n, j0 + CHUNK); j++) some += FN(exp_)((s[j] - high) * scale + shift[j] - top);
        sum += (double)some;
    }
    return (double)top + log(sum);
}

/* alpha_i = log row_i - log sum_j exp(... + beta_j), or half way there; then the columns' largest terms. */
static void FN(log_rows)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t n = run->n;
    const T high = (T)run->high, scale = (T)run->scale, *row = run->row;
    for (int64_t slot = begin; slot < end; slot++) {
        sinkhorn_slot *own = &run->slot[slot];
        int64_t first, last;
        T *restrict top = (T *)run->part + slot * n;
        *own = (sinkhorn_slot){.empty = -1};
        share(run->m, slot, run->slots, &first, &last);
        for (int64_t j = 0; j < n; j++) top[j] = -INFINITY;
        for (int64_t i = first; i < last; i++) {
            const T *restrict s = (const T *)run->scores + i * n;
            const double sum = FN(log_sum)(run, s, run->shift), to = log((double)row[i]) - sum;
            if (!(sum > -INFINITY)) own->empty = i;
            own->logs = MAX(own->logs, fabs(to - run->alpha[i]));
            run->alpha[i] = run->symmetric ? 0.5 * (run->alpha[i] + to) : to;
            const T up = (T)run->alpha[i];
            if (run->symmetric) continue;
            for (int64_t j = 0; j < n; j++) {
                const T x = (s[j] - high) * scale + up;
                top[j] = x > top[j] ? x : top[j];
            }
        }
    }
}

/* total[j] = sum_i exp((s_ij - high) scale + alpha_i - shift_j), shift the columns' largest terms. */
static void FN(log_columns)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t n = run->n;
    const T high = (T)run->high, scale = (T)run->scale, *restrict shift = run->shift;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        double *total;
        T *restrict part = FN(fresh)(run, slot, &total);
        share(run->m, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i++) {
            const T *restrict s = (const T *)run->scores + i * n, up = (T)run->alpha[i];
            for (int64_t j = 0; j < n; j++) part[j] += FN(exp_)((s[j] - high) * scale + up - shift[j]);
            if ((i - first) % FLUSH == FLUSH - 1) FN(flush)(n, part, total);
        }
        FN(flush)(n, part, total);
    }
}

static subspace_status FN(empty_row)(const sinkhorn_run *run, int64_t v)
{
    for (int64_t s = 0; s < run->slots; s++)
        CHECK(run->ctx, run->slot[s].empty < 0, SUBSPACE_NUMERICAL,
              "sinkhorn: row %lld of plan %lld has no score above -inf", LL(run->slot[s].empty), LL(v));
    return SUBSPACE_OK;
}

static subspace_status FN(empty_column)(const sinkhorn_run *run, int64_t v, int64_t j, bool empty)
{
    CHECK(run->ctx, !empty, SUBSPACE_NUMERICAL, "sinkhorn: column %lld of plan %lld has no score above -inf", LL(j),
          LL(v));
    return SUBSPACE_OK;
}

/* Sweeps in the log domain. After rows and columns once, no sum is further from its marginal than sum(row) / min(col);
 * the symmetric potential halves its way there. */
static subspace_status FN(log_sweeps)(sinkhorn_run *run, int64_t v)
{
    T *shift = run->shift;
    const T *col = run->col;
    for (int64_t sweep = 0; sweep < 64; sweep++) {
        double logs = 0;
        TRY(go_on(run));
        each(run, FN(log_rows));
        TRY(FN(empty_row)(run, v));
        for (int64_t s = 0; s < run->slots; s++) logs = MAX(logs, run->slot[s].logs);
        if (!run->symmetric) break;
        for (int64_t j = 0; j < run->n; j++) shift[j] = (T)run->alpha[j];
        if (logs <= FN(RANGE) / 2) return SUBSPACE_OK;
    }
    if (run->symmetric || run->a->half_steps == 1) return SUBSPACE_OK;
    for (int64_t j = 0; j < run->n; j++) {
        shift[j] = -INFINITY;
        for (int64_t s = 0; s < run->slots; s++) shift[j] = MAX(shift[j], ((T *)run->part)[s * run->n + j]);
        TRY(FN(empty_column)(run, v, j, !(shift[j] > -INFINITY)));
    }
    each(run, FN(log_columns));
    for (int64_t j = 0; j < run->n; j++) {
        run->beta[j] = log((double)col[j]) - (double)shift[j] - log(join(run, run->total, j));
        shift[j] = (T)run->beta[j];
    }
    return SUBSPACE_OK;
}

/* ------------------------------------------------------------------------------------------------------ K */

/* K, or its upper half. */
static void FN(gibbs)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t n = run->n;
    const T high = (T)run->high, scale = (T)run->scale, *restrict shift = run->shift;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        if (run->symmetric) share_triangle(n, slot, run->slots, &first, &last);
        else share(run->m, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i++) {
            const T *restrict s = (const T *)run->scores + i * n, up = (T)run->alpha[i];
            T *restrict k = (T *)run->plan + i * n;
            for (int64_t j = run->symmetric ? i : 0; j < n; j++) {
                const T x = (s[j] - high) * scale + (up + shift[j]);
                k[j] = x < LOWEST ? 0 : FN(exp_)(x);
            }
        }
    }
}

/* plan = f K g, of a symmetric plan both halves. */
static void FN(scale_plan)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t n = run->n;
    const T *restrict f = run->f, *restrict g = run->symmetric ? run->f : run->g;
    T *k = run->plan;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        if (!run->symmetric) {
            share(run->m, slot, run->slots, &first, &last);
            for (int64_t i = first; i < last; i++)
                for (int64_t j = 0; j < n; j++) k[i * n + j] = f[i] * k[i * n + j] * g[j];
            continue;
        }
        FN(tile) t;
        share_triangle(n, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i += TILE_ROWS)
            for (int64_t j = i; j < n; j += tile_columns(i, j)) {
                const int64_t rows = MIN(TILE_ROWS, last - i), columns = MIN(tile_columns(i, j), n - j);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < columns; c++) t.at[r][c] = f[i + r] * k[(i + r) * n + j + c] * g[j + c];
                FN(put)(&t, i, j, rows, columns, k, n);
            }
    }
}

/* What f and g have become goes into K. */
static void FN(absorb)(sinkhorn_run *run)
{
    T *f = run->f, *g = run->g, *last = run->last, *shift = run->shift;
    for (int64_t i = 0; i < run->m; i++) {
        run->alpha[i] += log((double)f[i]);
        f[i] = 1;
    }
    for (int64_t j = 0; j < run->n; j++) {
        if (!run->symmetric) run->beta[j] += log((double)g[j]);
        shift[j] = (T)(run->symmetric ? run->alpha[j] : run->beta[j]);
        g[j] = last[j] = 1;
    }
    each(run, FN(gibbs));
}

#endif
