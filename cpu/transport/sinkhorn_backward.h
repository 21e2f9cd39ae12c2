/* sinkhorn_backward.h - the gradient through a plan P. G = dplan, and R, C are P's own row and column sums: the
 * matrices below are then exactly semidefinite, and what they ask exactly solvable.
 *
 *     general      [R  P ] [x]   [(P o G) 1 ]        dscores = P o (G - x 1' - 1 y') / eta, drow = x, dcol = y
 *                  [P' C ] [y] = [(P o G)' 1]
 *     symmetric    (R + P) x = (P o Gs) 1            dscores = P o (Gs - x 1' - 1 x') / eta, drow = 2 x
 *     half steps   x = (P o G) 1 / row               dscores = P o (G - x 1') / eta, drow = x, dcol = 0
 *
 * with Gs = (G + G') / 2, by conjugate gradients, scaled by R and C; one pass over P a step. With s = sigma_2 of the
 * scaled plan the condition is (1 + s) / (1 - s), and of the symmetric one at most 2 for a positive semidefinite plan.
 * The first system has the null vector (1, -1), of which the solution gets as much as makes sum x = sum y: the gradient
 * within row and column sums that stay equal.
 *
 * Included by sinkhorn.c once per precision, after sinkhorn_gibbs.h.
 */
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

/* Row sums of P and P o G into diagonal and rhs, column sums likewise into the totals. */
static void FN(sums)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t m = run->m, n = run->n;
    T *diagonal = run->diagonal, *rhs = run->rhs;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        double *total, *total_g = run->total + (run->slots + slot) * n;
        T *restrict part = FN(fresh)(run, slot, &total), *restrict part_g = (T *)run->part + (run->slots + slot) * n;
        memset(part_g, 0, (size_t)n * sizeof(T)), memset(total_g, 0, (size_t)n * sizeof(double));
        share(m, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i++) {
            const T *restrict p = (const T *)run->plan + i * n, *restrict g = (const T *)run->dplan + i * n;
            double sum = 0, sum_g = 0;
            for (int64_t j0 = 0; j0 < n; j0 += CHUNK) {
                T some = 0, some_g = 0;
#pragma omp simd reduction(+ : some, some_g)
                for (int64_t j = j0; j < MIN(n, j0 + CHUNK); j++) {
                    const T pg = p[j] * g[j];
                    some += p[j], some_g += pg;
                    part[j] += p[j], part_g[j] += pg;
                }
                sum += (double)some, sum_g += (double)some_g;
            }
            diagonal[i] = (T)sum, rhs[i] = (T)sum_g;
            if ((i - first) % FLUSH == FLUSH - 1) FN(flush)(n, part, total), FN(flush)(n, part_g, total_g);
        }
        FN(flush)(n, part, total), FN(flush)(n, part_g, total_g);
    }
}

/* The same of a symmetric P and Gs, from upper halves; P o Gs is kept in dscores' upper half. */
static void FN(sums_symmetric)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t n = run->n;
    const T *plan = run->plan, *dplan = run->dplan;
    T *dscores = run->dscores;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        double *total, *total_g = run->total + (run->slots + slot) * n;
        T *part = FN(fresh)(run, slot, &total), *part_g = (T *)run->part + (run->slots + slot) * n;
        FN(tile) mirror;
        memset(part_g, 0, (size_t)n * sizeof(T)), memset(total_g, 0, (size_t)n * sizeof(double));
        share_triangle(n, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i += TILE_ROWS) {
            const int64_t rows = MIN(TILE_ROWS, last - i);
            double sum[TILE_ROWS] = {0}, sum_g[TILE_ROWS] = {0};
            for (int64_t j = i; j < n; j += tile_columns(i, j)) {
                const int64_t columns = MIN(tile_columns(i, j), n - j);
                FN(mirror)(dplan, n, i, j, rows, columns, &mirror);
                for (int64_t r = 0; r < rows; r++) {
                    const T *restrict p = plan + (i + r) * n + j, *restrict g = dplan + (i + r) * n + j;
                    T *restrict kept = mirror.at[r], *restrict pj = part + j, *restrict gj = part_g + j;
                    const int64_t from = i == j ? r : 0; /* the diagonal's own entry counts once, as a row's */
                    T some = 0, some_g = 0;
#pragma omp simd reduction(+ : some, some_g)
                    for (int64_t c = from; c < columns; c++) {
                        const T pg = kept[c] = p[c] * (T)0.5 * (g[c] + kept[c]);
                        some += p[c], some_g += pg;
                        pj[c] += p[c], gj[c] += pg;
                    }
                    if (i == j) {
                        pj[r] -= p[r];
                        gj[r] -= p[r] * g[r];
                    }
                    if (dscores)
                        memcpy(dscores + (i + r) * n + j + from, kept + from, (size_t)(columns - from) * sizeof(T));
                    sum[r] += (double)some, sum_g[r] += (double)some_g;
                }
            }
            for (int64_t r = 0; r < rows; r++) total[i + r] += sum[r], total_g[i + r] += sum_g[r];
            if ((i - first + TILE_ROWS) % FLUSH == 0) FN(flush)(n, part, total), FN(flush)(n, part_g, total_g);
        }
        FN(flush)(n, part, total), FN(flush)(n, part_g, total_g);
    }
}

/* out = R x + P y, total = P' x, of p = (x, y) */
static void FN(product)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t m = run->m, n = run->n;
    const T *plan = run->plan, *x = run->p, *diagonal = run->diagonal;
    T *out = run->out;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        double *total;
        T *part = FN(fresh)(run, slot, &total);
        share(m, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i += ROWS) {
            const int64_t rows = MIN(ROWS, last - i);
            const T *row[ROWS];
            T w[ROWS] = {0};
            double y[ROWS] = {0};
            FN(rows_at)(plan, n, i, last, row);
            for (int64_t r = 0; r < rows; r++) w[r] = x[i + r];
            FN(dots_and_outer)(row, n, 0, n, x + m, y, w, part);
            for (int64_t r = 0; r < rows; r++) out[i + r] = (T)((double)diagonal[i + r] * (double)w[r] + y[r]);
            if ((i - first + ROWS) % FLUSH == 0) FN(flush)(n, part, total);
        }
        FN(flush)(n, part, total);
    }
}

/* out = (the matrix above) p */
static void FN(apply)(sinkhorn_run *run)
{
    const int64_t n = run->n, m = run->symmetric ? 0 : run->m;
    const T *p = run->p, *diagonal = run->diagonal;
    T *out = run->out;
    run->matrix = run->plan, run->in = p;
    each(run, run->symmetric ? FN(triangle) : FN(product));
    for (int64_t j = 0; j < n; j++)
        out[m + j] = (T)((double)diagonal[m + j] * (double)p[m + j] + join(run, run->total, j));
}

static double FN(inner)(const T *restrict a, const T *restrict b, int64_t count)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* x solves (matrix) x = rhs, which becomes the residual. */
static void FN(conjugate_gradients)(sinkhorn_run *run, int64_t count)
{
    const double enough = IS_F32 ? 1e-7 : 1e-13;
    const T *restrict diagonal = run->diagonal;
    T *restrict residual = run->rhs, *restrict x = run->x, *restrict p = run->p, *restrict out = run->out;
    double before = 0, first = 0;
    memset(x, 0, (size_t)count * sizeof(T));
    for (int step = 0; step <= MOST_STEPS; step++) {
        for (int64_t i = 0; i < count; i++) out[i] = residual[i] / diagonal[i];
        const double now = FN(inner)(residual, out, count);
        if (step == 0) first = now;
        if (!(now > enough * enough * first) || step == MOST_STEPS) return;
        const T beta = (T)(step ? now / before : 0);
        for (int64_t i = 0; i < count; i++) p[i] = out[i] + (step ? beta * p[i] : 0);
        FN(apply)(run);
        const double curvature = FN(inner)(p, out, count);
        if (!(curvature > 0)) return; /* nothing but the null space is left */
        const T alpha = (T)(now / curvature);
        for (int64_t i = 0; i < count; i++) {
            x[i] += alpha * p[i];
            residual[i] -= alpha * out[i];
        }
        before = now;
    }
}

/* dscores = (P o G - P (x_i + y_j)) / eta */
static void FN(write)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t m = run->m, n = run->n;
    const T *x = run->x, *restrict y = x + (run->symmetric ? 0 : m), scale = (T)run->scale;
    const bool half = run->a->half_steps > 0;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        if (!run->symmetric) {
            share(m, slot, run->slots, &first, &last);
            for (int64_t i = first; i < last; i++) {
                const T *restrict p = (const T *)run->plan + i * n, *restrict g = (const T *)run->dplan + i * n;
                T *restrict ds = (T *)run->dscores + i * n;
                if (half)
                    for (int64_t j = 0; j < n; j++) ds[j] = scale * p[j] * (g[j] - x[i]);
                else
                    for (int64_t j = 0; j < n; j++) ds[j] = scale * p[j] * (g[j] - (x[i] + y[j]));
            }
            continue;
        }
        const T *plan = run->plan;
        T *ds = run->dscores;
        FN(tile) t;
        share_triangle(n, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i += TILE_ROWS)
            for (int64_t j = i; j < n; j += tile_columns(i, j)) {
                const int64_t rows = MIN(TILE_ROWS, last - i), columns = MIN(tile_columns(i, j), n - j);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < columns; c++) {
                        const int64_t at = (i + r) * n + j + c;
                        t.at[r][c] = scale * (ds[at] - plan[at] * (x[i + r] + x[j + c]));
                    }
                FN(put)(&t, i, j, rows, columns, ds, n);
            }
    }
}

static subspace_status FN(backward)(sinkhorn_run *run, int64_t v)
{
    const subspace_sinkhorn_args *a = run->a;
    const int64_t m = run->m, n = run->n, columns = run->symmetric ? 0 : m;
    const bool half = a->half_steps > 0;
    T *diagonal = run->diagonal, *rhs = run->rhs, *x = run->x;
    each(run, run->symmetric ? FN(sums_symmetric) : FN(sums));
    for (int64_t j = 0; j < n && !half; j++) {
        diagonal[columns + j] = (T)join(run, run->total, j);
        rhs[columns + j] = (T)join(run, run->total + run->slots * n, j);
    }
    if (half)
        for (int64_t i = 0; i < m; i++) x[i] = rhs[i] / ((const T *)run->row)[i];
    else FN(conjugate_gradients)(run, columns + n);
    if (!half && !run->symmetric) {
        double excess = 0;
        for (int64_t i = 0; i < m + n; i++) excess += i < m ? (double)x[i] : -(double)x[i];
        const T shift = (T)(excess / (double)(m + n));
        for (int64_t i = 0; i < m + n; i++) x[i] += i < m ? -shift : shift;
    }
    if (run->dscores) each(run, FN(write));
    T *drow = a->drow ? (T *)a->drow + v * m : NULL, *dcol = a->dcol ? (T *)a->dcol + v * n : NULL;
    for (int64_t i = 0; drow && i < m; i++) drow[i] = run->symmetric ? 2 * x[i] : x[i];
    for (int64_t j = 0; dcol && j < n; j++) dcol[j] = half || run->symmetric ? 0 : x[m + j];
    return SUBSPACE_OK;
}

#endif
