/* sinkhorn.cu - a plan with given row and column sums, and the exact gradient through it, on the GPU.
 *
 *     plan_ij = exp(scores_ij / eta + a_i + b_j)
 *
 *     general      a <- a + w (log row - log sum_j exp(scores / eta + b) - a), then b likewise
 *     symmetric    a <- a + 11/16 (log row - log sum_j exp(scores / eta + a) - a) + (a - a before) / 32
 *
 * in the log domain throughout, potentials in double: the sums are bound by memory, not by the exponential. For w and
 * the step see cpu/sinkhorn.c. A block a row, a block 32 columns; then a block a plan takes the errors together, moves
 * the potentials and decides whether the plan is done. The host cannot know: it launches all sweeps, and those of a
 * plan that is done return at once. Conjugate gradients likewise. A plan that does not exist is NaN.
 */
#include "cuda.cuh"

enum { COLUMNS = 32, LINES = 8 };                /* of a block that adds up columns */
enum { MOST_STEPS = 128, SYMMETRIC_STEPS = 48 }; /* of conjugate gradients; the condition of the latter is about 2 */

typedef struct progress { /* of one plan */
    double error, norm, rate, before, first;
    long long sweeps;
    int sixteenths, waiting, failures, done;
} progress;

typedef struct sinkhorn_run {
    int64_t v, m, n;
    int symmetric;
    double scale, tol;                  /* scale: 1 / eta */
    double *a, *b, *last;               /* [v, m], [v, n], [v, n]: potentials, the symmetric one in a */
    double *row_sum, *col_sum;          /* [v, m], [v, n]: logarithms of the sums without their own potential */
    double *row_error;                  /* [v, m] */
    double *diagonal, *rhs, *x, *p, *q; /* [v, count] conjugate gradients */
    int64_t count;                      /* m + n, or n */
    progress *state;                    /* [v] */
} sinkhorn_run;

/* The larger of two, or NaN if one is. */
static __device__ inline double larger(double a, double b)
{
    return a != a || a >= b ? a : b;
}

template <typename T> static __device__ inline double marginal(const T *given, int64_t at)
{
    return given ? (double)given[at] : 1;
}

/* ---------------------------------------------------------------------------------------------------- the forward */

/* Symmetric scores by their upper half, in the plan's place. */
template <typename T> __global__ void mirror(sinkhorn_run r, const T *scores, T *plan)
{
    const int64_t row = blockIdx.x, i = row % r.n, first = row - i;
    for (int64_t j = threadIdx.x; j < r.n; j += blockDim.x)
        plan[row * r.n + j] = scores[(first + MIN(i, j)) * r.n + MAX(i, j)];
}

/* The largest score of every row. */
template <typename T> __global__ void row_max(sinkhorn_run r, const T *scores)
{
    const T *s = scores + (int64_t)blockIdx.x * r.n;
    double most = -INFINITY;
    for (int64_t j = threadIdx.x; j < r.n; j += blockDim.x) most = larger(most, (double)s[j]);
    most = block_max(most);
    if (threadIdx.x == 0) r.row_sum[blockIdx.x] = most;
}

/* Potentials to begin with: nothing, but for the largest score of the plan. */
static __global__ void begin(sinkhorn_run r)
{
    const int64_t v = blockIdx.x;
    double most = -INFINITY;
    for (int64_t i = threadIdx.x; i < r.m; i += blockDim.x) most = larger(most, r.row_sum[v * r.m + i]);
    most = block_max(most) * r.scale;
    for (int64_t i = threadIdx.x; i < r.m; i += blockDim.x) r.a[v * r.m + i] = r.symmetric ? -most / 2 : -most;
    for (int64_t j = threadIdx.x; j < r.n; j += blockDim.x) {
        r.b[v * r.n + j] = 0;
        r.last[v * r.n + j] = -most / 2;
    }
    if (threadIdx.x > 0) return;
    progress s = {};
    s.sixteenths = 16;
    r.state[v] = s;
}

/* log sum_j exp(scores_ij / eta + b_j) and, if it moves, a. */
template <typename T> __global__ void row_sweep(sinkhorn_run r, const T *scores, const T *row, int move)
{
    const int64_t at = blockIdx.x, v = at / r.m;
    const progress *state = &r.state[v];
    if (state->done) return;
    const T *s = scores + at * r.n;
    const double *b = r.symmetric ? r.a + v * r.m : r.b + v * r.n;
    double most = -INFINITY, sum = 0;
    for (int64_t j = threadIdx.x; j < r.n; j += blockDim.x) most = larger(most, (double)s[j] * r.scale + b[j]);
    most = block_max(most);
    for (int64_t j = threadIdx.x; j < r.n; j += blockDim.x)
        sum += (double)exp((acc_t<T>)((double)s[j] * r.scale + b[j] - most));
    sum = most + log(block_sum(sum));
    if (threadIdx.x > 0) return;
    r.row_sum[at] = sum;
    if (r.symmetric) return;
    const double target = log(marginal(row, at)), w = state->sixteenths / 16.0;
    if (move) r.a[at] += w * (target - sum - r.a[at]);
    r.row_error[at] = fabs(exp(r.a[at] + sum - target) - 1);
}

/* log sum_i exp(scores_ij / eta + a_i) */
template <typename T> __global__ void col_sweep(sinkhorn_run r, const T *scores)
{
    __shared__ double part_most[LINES][COLUMNS], part_sum[LINES][COLUMNS];
    const int64_t tiles = CEIL_DIV(r.n, (int64_t)COLUMNS), v = blockIdx.x / tiles;
    const int64_t j = blockIdx.x % tiles * COLUMNS + threadIdx.x;
    if (r.state[v].done) return;
    const T *s = scores + v * r.m * r.n + j;
    const double *a = r.a + v * r.m;
    double most = -INFINITY, sum = 0;
    if (j < r.n) {
        for (int64_t i = threadIdx.y; i < r.m; i += LINES) most = larger(most, (double)s[i * r.n] * r.scale + a[i]);
        for (int64_t i = threadIdx.y; i < r.m && most > -INFINITY; i += LINES)
            sum += (double)exp((acc_t<T>)((double)s[i * r.n] * r.scale + a[i] - most));
    }
    part_most[threadIdx.y][threadIdx.x] = most, part_sum[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || j >= r.n) return;
    for (int line = 0; line < LINES; line++) most = larger(most, part_most[line][threadIdx.x]);
    sum = 0;
    for (int line = 0; line < LINES; line++)
        if (part_sum[line][threadIdx.x] > 0)
            sum += part_sum[line][threadIdx.x] * exp(part_most[line][threadIdx.x] - most);
    r.col_sum[v * r.n + j] = most + log(sum);
}

/* As in cpu/sinkhorn.c. */
static __device__ void relax(progress *w, double error, double norm)
{
    const double omega = w->sixteenths / 16.0, before = w->rate, rate = w->norm > 0 ? norm / w->norm : 0;
    w->norm = norm, w->rate = rate, w->waiting++;
    if (rate > 1.5 && w->sixteenths > 16) { /* too bold */
        w->sixteenths = 16, w->waiting = -(3 << w->failures);
        if (w->failures < 16) w->failures++;
        return;
    }
    const double steady = 0.02 + 0.1 * (1 - MAX(rate, before));
    if (error > 0.5 || w->waiting < 2 || !(rate < 1) || !(fabs(rate - before) < steady) || !(rate > omega - 1)) return;
    const double s = MIN((rate + omega - 1) * (rate + omega - 1) / (rate * omega * omega), 0.9999);
    const int best = (int)(32 / (1 + sqrt(1 - s)));
    if (best > w->sixteenths) w->sixteenths = best, w->waiting = -2;
}

/* The plan's error; unless it is done, the next b (symmetric: a). */
template <typename T>
__global__ void decide(sinkhorn_run r, const T *marginals, int last, int half_steps, int made, double *error,
                       int64_t *sweeps)
{
    const int64_t v = blockIdx.x, n = r.n;
    progress state = r.state[v];
    if (state.done) return;
    double *b = r.symmetric ? r.a + v * n : r.b + v * n;
    const double *sums = r.symmetric ? r.row_sum + v * n : r.col_sum + v * n;
    double most = 0, squares = 0;
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
        const double e = exp(b[j] + sums[j]) / marginal(marginals, v * n + j) - 1;
        most = larger(most, fabs(e));
        squares += e * e;
    }
    for (int64_t i = threadIdx.x; i < r.m && !r.symmetric; i += blockDim.x)
        most = larger(most, r.row_error[v * r.m + i]);
    most = block_max(most);
    squares = block_sum(squares);
    state.error = most;
    state.done = last || (most <= r.tol && !half_steps);
    if (r.symmetric) state.sweeps += !state.done;
    else {
        state.sweeps += made;
        if (!state.done && !half_steps) relax(&state, most, sqrt(squares));
    }
    const double w = r.symmetric ? (state.sweeps == 1 ? 0.5 : 11.0 / 16) : state.sixteenths / 16.0;
    for (int64_t j = threadIdx.x; j < n && !state.done; j += blockDim.x) {
        const double now = b[j], step = w * (log(marginal(marginals, v * n + j)) - sums[j] - now);
        double *before = &r.last[v * n + j];
        b[j] = now + step + (r.symmetric && state.sweeps > 1 ? (now - *before) / 32 : 0);
        *before = r.symmetric && state.sweeps == 1 ? b[j] : now;
    }
    __syncthreads(); /* every thread has read the state */
    if (threadIdx.x > 0) return;
    r.state[v] = state;
    error[v] = state.error, sweeps[v] = state.sweeps;
}

template <typename T> __global__ void write_plan(sinkhorn_run r, const T *scores, T *plan)
{
    const int64_t at = blockIdx.x, v = at / r.m;
    const double a = r.a[at], *b = r.symmetric ? r.a + v * r.m : r.b + v * r.n;
    for (int64_t j = threadIdx.x; j < r.n; j += blockDim.x)
        plan[at * r.n + j] = (T)exp((acc_t<T>)((double)scores[at * r.n + j] * r.scale + (a + b[j])));
}

template <typename T> static subspace_status forward(subspace_ctx *ctx, const subspace_sinkhorn_args *a, sinkhorn_run r)
{
    const unsigned rows = (unsigned)(r.v * r.m), plans = (unsigned)r.v;
    const unsigned columns = (unsigned)(r.v * CEIL_DIV(r.n, (int64_t)COLUMNS));
    const int64_t sweeps = a->half_steps ? (a->half_steps + 1) / 2 : a->max_iter;
    const T *scores = (const T *)a->scores, *row = (const T *)a->row, *col = (const T *)a->col;
    T *plan = (T *)a->plan;
    if (r.symmetric) {
        LAUNCH(ctx, mirror<T>, rows, ROW_THREADS, 0, r, scores, plan);
        scores = plan;
    }
    LAUNCH(ctx, row_max<T>, rows, ROW_THREADS, 0, r, scores);
    LAUNCH(ctx, begin, plans, ROW_THREADS, 0, r);
    for (int64_t sweep = 0; sweep <= sweeps;
         sweep++) { /* the last only looks: of a symmetric plan, or where none is made */
        if (!r.symmetric && sweep == sweeps && sweeps > 0) break;
        const int last = r.symmetric ? sweep == sweeps : sweep + 1 >= sweeps;
        LAUNCH(ctx, row_sweep<T>, rows, ROW_THREADS, 0, r, scores, row, (int)(sweeps > 0));
        if (!r.symmetric) LAUNCH(ctx, col_sweep<T>, columns, dim3(COLUMNS, LINES), 0, r, scores);
        LAUNCH(ctx, decide<T>, plans, ROW_THREADS, 0, r, r.symmetric ? row : col, last, (int)(a->half_steps > 0),
               (int)(sweeps > 0), a->error, a->sweeps);
    }
    LAUNCH(ctx, write_plan<T>, rows, ROW_THREADS, 0, r, scores, plan);
    return SUBSPACE_OK;
}

/* --------------------------------------------------------------------------------------------------- the backward */

/* Row sums of P and P o G (symmetric: of P o (G + G')/2). */
template <typename T> __global__ void row_sums(sinkhorn_run r, const T *plan, const T *dplan)
{
    const int64_t at = blockIdx.x, v = at / r.m, i = at % r.m;
    double sum = 0, sum_g = 0;
    for (int64_t j = threadIdx.x; j < r.n; j += blockDim.x) {
        const double p = (double)plan[at * r.n + j];
        double g = (double)dplan[at * r.n + j];
        if (r.symmetric) g = 0.5 * (g + (double)dplan[(v * r.n + j) * r.n + i]);
        sum += p, sum_g += p * g;
    }
    sum = block_sum(sum), sum_g = block_sum(sum_g);
    if (threadIdx.x > 0) return;
    r.diagonal[v * r.count + i] = sum, r.rhs[v * r.count + i] = sum_g;
}

/* Sum of a block's lines for each of its columns, in their order. */
static __device__ inline double join(double value)
{
    __shared__ double part[LINES][COLUMNS];
    part[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    double sum = 0;
    for (int line = 0; line < LINES; line++) sum += part[line][threadIdx.x];
    __syncthreads();
    return sum;
}

template <typename T> __global__ void col_sums(sinkhorn_run r, const T *plan, const T *dplan)
{
    const int64_t tiles = CEIL_DIV(r.n, (int64_t)COLUMNS), v = blockIdx.x / tiles;
    const int64_t j = blockIdx.x % tiles * COLUMNS + threadIdx.x;
    double sum = 0, sum_g = 0;
    for (int64_t i = threadIdx.y; i < r.m && j < r.n; i += LINES) {
        const int64_t at = (v * r.m + i) * r.n + j;
        sum += (double)plan[at], sum_g += (double)plan[at] * (double)dplan[at];
    }
    sum = join(sum), sum_g = join(sum_g);
    if (threadIdx.y > 0 || j >= r.n) return;
    r.diagonal[v * r.count + r.m + j] = sum, r.rhs[v * r.count + r.m + j] = sum_g;
}

/* q = R x + P y of p = (x, y), or (R + P) p */
template <typename T> __global__ void row_product(sinkhorn_run r, const T *plan)
{
    const int64_t at = blockIdx.x, v = at / r.m, i = at % r.m;
    if (r.state[v].done) return;
    const double *p = r.p + v * r.count, *y = r.symmetric ? p : p + r.m;
    double sum = 0;
    for (int64_t j = threadIdx.x; j < r.n; j += blockDim.x) sum += (double)plan[at * r.n + j] * y[j];
    sum = block_sum(sum);
    if (threadIdx.x == 0) r.q[v * r.count + i] = r.diagonal[v * r.count + i] * p[i] + sum;
}

/* q = P' x + C y */
template <typename T> __global__ void col_product(sinkhorn_run r, const T *plan)
{
    const int64_t tiles = CEIL_DIV(r.n, (int64_t)COLUMNS), v = blockIdx.x / tiles;
    const int64_t j = blockIdx.x % tiles * COLUMNS + threadIdx.x;
    if (r.state[v].done) return;
    const double *x = r.p + v * r.count;
    double sum = 0;
    for (int64_t i = threadIdx.y; i < r.m && j < r.n; i += LINES) sum += (double)plan[(v * r.m + i) * r.n + j] * x[i];
    sum = join(sum);
    if (threadIdx.y > 0 || j >= r.n) return;
    r.q[v * r.count + r.m + j] = r.diagonal[v * r.count + r.m + j] * x[r.m + j] + sum;
}

/* One step of conjugate gradients; before the first only its direction. */
static __global__ void conjugate_gradients(sinkhorn_run r, int first, double enough)
{
    const int64_t v = blockIdx.x, base = v * r.count;
    progress state = r.state[v];
    if (!first && state.done) return;
    double inner = 0, alpha = 0;
    if (!first) {
        for (int64_t i = threadIdx.x; i < r.count; i += blockDim.x) inner += r.p[base + i] * r.q[base + i];
        inner = block_sum(inner);
        state.done = !(inner > 0); /* nothing but the null space is left */
        alpha = state.done ? 0 : state.before / inner;
    }
    inner = 0;
    for (int64_t i = threadIdx.x; i < r.count; i += blockDim.x) {
        r.x[base + i] = first ? 0 : r.x[base + i] + alpha * r.p[base + i];
        if (!first) r.rhs[base + i] -= alpha * r.q[base + i];
        inner += r.rhs[base + i] * r.rhs[base + i] / r.diagonal[base + i];
    }
    inner = block_sum(inner);
    if (first) state.first = inner, state.done = 0;
    state.done = state.done || !(inner > enough * enough * state.first);
    const double beta = first ? 0 : inner / state.before;
    for (int64_t i = threadIdx.x; i < r.count; i += blockDim.x)
        r.p[base + i] = r.rhs[base + i] / r.diagonal[base + i] + (first ? 0 : beta * r.p[base + i]);
    state.before = inner;
    __syncthreads(); /* every thread has read the state */
    if (threadIdx.x == 0) r.state[v] = state;
}

/* The multiple of the null vector that makes sum x = sum y; half steps: x = rhs / row, y = 0. Then drow and dcol. */
template <typename T> __global__ void finish(sinkhorn_run r, const T *row, int half_steps, T *drow, T *dcol)
{
    const int64_t v = blockIdx.x, base = v * r.count;
    double shift = 0;
    if (!half_steps && !r.symmetric) {
        for (int64_t i = threadIdx.x; i < r.count; i += blockDim.x) shift += i < r.m ? r.x[base + i] : -r.x[base + i];
        shift = block_sum(shift) / (double)r.count;
    }
    for (int64_t i = threadIdx.x; i < r.count; i += blockDim.x) {
        double x = r.x[base + i] + (i < r.m ? -shift : shift);
        if (half_steps) x = i < r.m ? r.rhs[base + i] / marginal(row, v * r.m + i) : 0;
        r.x[base + i] = x;
        if (i < r.m && drow) drow[v * r.m + i] = (T)(r.symmetric ? 2 * x : x);
        if (i >= r.m && dcol) dcol[v * r.n + i - r.m] = (T)x;
    }
    for (int64_t j = threadIdx.x; j < r.n && r.symmetric && dcol; j += blockDim.x) dcol[v * r.n + j] = 0;
}

/* dscores = P o (G - x_i - y_j) / eta */
template <typename T> __global__ void write(sinkhorn_run r, const T *plan, const T *dplan, T *dscores)
{
    const int64_t at = blockIdx.x, v = at / r.m, i = at % r.m;
    const double *x = r.x + v * r.count, *y = r.symmetric ? x : x + r.m;
    for (int64_t j = threadIdx.x; j < r.n; j += blockDim.x) {
        double g = (double)dplan[at * r.n + j];
        if (r.symmetric) g = 0.5 * (g + (double)dplan[(v * r.n + j) * r.n + i]);
        dscores[at * r.n + j] = (T)(r.scale * (double)plan[at * r.n + j] * (g - (x[i] + y[j])));
    }
}

template <typename T>
static subspace_status backward(subspace_ctx *ctx, const subspace_sinkhorn_args *a, sinkhorn_run r)
{
    const unsigned rows = (unsigned)(r.v * r.m), plans = (unsigned)r.v;
    const unsigned columns = (unsigned)(r.v * CEIL_DIV(r.n, (int64_t)COLUMNS));
    const int half = a->half_steps > 0, steps = half ? 0 : r.symmetric ? SYMMETRIC_STEPS : MOST_STEPS;
    const double enough = a->dtype == SUBSPACE_F64 ? 1e-13 : 1e-7;
    const T *plan = (const T *)a->plan, *dplan = (const T *)a->dplan;
    LAUNCH(ctx, row_sums<T>, rows, ROW_THREADS, 0, r, plan, dplan);
    if (!r.symmetric) LAUNCH(ctx, col_sums<T>, columns, dim3(COLUMNS, LINES), 0, r, plan, dplan);
    for (int step = 0; step <= steps && !half; step++) {
        if (step > 0) {
            LAUNCH(ctx, row_product<T>, rows, ROW_THREADS, 0, r, plan);
            if (!r.symmetric) LAUNCH(ctx, col_product<T>, columns, dim3(COLUMNS, LINES), 0, r, plan);
        }
        LAUNCH(ctx, conjugate_gradients, plans, ROW_THREADS, 0, r, (int)(step == 0), enough);
    }
    LAUNCH(ctx, finish<T>, plans, ROW_THREADS, 0, r, (const T *)a->row, half, (T *)a->drow, (T *)a->dcol);
    if (a->dscores) LAUNCH(ctx, write<T>, rows, ROW_THREADS, 0, r, plan, dplan, (T *)a->dscores);
    return SUBSPACE_OK;
}

/* ------------------------------------------------------------------------------------------------------ the batch */

static void lay_out(sinkhorn_run *r, const subspace_sinkhorn_args *a, bool backward, char *base, size_t *bytes)
{
    *r = sinkhorn_run{};
    r->v = a->v, r->m = a->m, r->n = a->n;
    r->symmetric = a->symmetric == SUBSPACE_SYMMETRIC && a->half_steps == 0; /* nobody looks here */
    r->scale = 1 / a->eta, r->tol = a->tol;
    r->count = r->symmetric ? r->n : r->m + r->n;
    r->state = (progress *)carve(base, bytes, r->v, sizeof(progress));
    if (backward) {
        double **vectors[] = {&r->diagonal, &r->rhs, &r->x, &r->p, &r->q};
        for (double **vector : vectors) *vector = (double *)carve(base, bytes, r->v * r->count, sizeof(double));
        return;
    }
    double **per_row[] = {&r->a, &r->row_sum, &r->row_error}, **per_column[] = {&r->b, &r->last, &r->col_sum};
    for (double **vector : per_row) *vector = (double *)carve(base, bytes, r->v * r->m, sizeof(double));
    for (double **vector : per_column) *vector = (double *)carve(base, bytes, r->v * r->n, sizeof(double));
}

extern "C" size_t subspace_sinkhorn_workspace_cuda(const subspace_ctx *, const subspace_sinkhorn_args *a)
{
    size_t forward = 0, backward = 0;
    sinkhorn_run r;
    if (a->v <= 0 || a->m <= 0 || a->n <= 0) return 0;
    lay_out(&r, a, false, NULL, &forward);
    lay_out(&r, a, true, NULL, &backward);
    return MAX(forward, backward);
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_sinkhorn_args *a, bool backward, sinkhorn_run *r)
{
    size_t bytes = 0;
    TRY(subspace_sinkhorn_check(ctx, a));
    CHECK(ctx, (double)a->v * (double)MAX(a->m, a->n) <= INT32_MAX, SUBSPACE_INVALID_ARGUMENT,
          "sinkhorn: %lld plans of %lld x %lld are too many at once", (long long)a->v, (long long)a->m,
          (long long)a->n);
    lay_out(r, a, backward, (char *)ctx->workspace, &bytes);
    CHECK(ctx, a->v == 0 || bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "sinkhorn: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_sinkhorn_cuda(subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    sinkhorn_run r;
    TRY(prepare(ctx, a, false, &r));
    if (a->v == 0) return SUBSPACE_OK;
    if (a->dtype == SUBSPACE_F64) return forward<double>(ctx, a, r);
    return forward<float>(ctx, a, r);
}

extern "C" subspace_status subspace_sinkhorn_backward_cuda(subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    sinkhorn_run r;
    TRY(prepare(ctx, a, true, &r));
    if (a->v == 0) return SUBSPACE_OK;
    if (a->dtype == SUBSPACE_F64) return backward<double>(ctx, a, r);
    return backward<float>(ctx, a, r);
}
