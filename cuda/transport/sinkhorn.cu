/* sinkhorn.cu - a plan with given row and column sums, and the exact gradient through it, on the GPU: one cooperative
 * kernel each.
 *
 *     plan_ij = f_i K_ij g_j,     K_ij = exp((scores_ij - max) / eta + alpha_i + beta_j), in shared memory if it fits
 *
 *     general      f <- f q^w, q = row / (f (K g));   g <- g q^w, q = col / (g (K' f))
 *     symmetric    f <- f q^(11/16) (f / f_before)^(1/32), q = row / (f (K f))
 *
 * The algebra, the exponent w, the log domain and what is absorbed into K are those of cpu/transport/sinkhorn.c.
 * Several blocks have a plan, each some of its rows (sinkhorn_shape.h), and meet after the rows, where all learn the
 * columns' partial sums or the next f, and after the columns, where all learn g, the error and the norm. They come to
 * the same decisions by themselves and leave when their plan is done. A plan that does not exist is NaN.
 *
 * A sweep over a plan in shared memory costs its meetings and what passes through the L2 cache: f, n entries to each
 * block, once a symmetric sweep; partial sums, an eighth of the plan to and fro, and g, twice met, of a general one. At
 * 1024 x 1024 in float32, 33 KB a block on 128 multiprocessors, that is 0.5 MB, or 1.5 MB: the meetings' latency, of
 * some microseconds, is what counts. Scores are read twice, the plan is written once. Streamed, K is read once a sweep,
 * twice by a general one where eight rows for each block outgrow the L2 cache.
 */
#include "sinkhorn.cuh"
#include "sinkhorn_gibbs.cuh"
#include "sinkhorn_backward.cuh"

/* The exponent w of the general sweep, learnt from how fast the error falls. */
typedef struct relaxation {
    int sixteenths, waiting, failures; /* sweeps before the next change */
    double norm, rate;
} relaxation;

/* As in cpu/transport/sinkhorn.c. */
static __device__ void relax(relaxation *w, double error, double norm)
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

/* ------------------------------------------------------------------------------------------------------ the sweeps */

/* q^(sixteenths / 16) by square roots */
template <typename T> static __device__ inline T power(T q, int sixteenths)
{
    T y = sixteenths & 16 ? q : (T)1;
    for (int bit = 8; bit > 0; bit /= 2) {
        if (!(sixteenths & (2 * bit - 1))) break;
        q = sqrt(q);
        if (sixteenths & bit) y *= q;
    }
    return y;
}

/* |x y / target - 1|; NaN of an empty row or column. */
template <typename T> static __device__ inline double off(T x, double y, T target)
{
    return y > 0 ? (double)x * y / (double)target - 1 : NAN;
}

/* How far x is from 1, of either side. */
template <typename T> static __device__ inline double far(T x)
{
    return (double)(x > 1 / x ? x : 1 / x);
}

/* f <- f (row / (f K g))^w; the columns' sums K' f of the new f, of each panel. */
template <typename T> static __device__ inline void sweep(const sinkhorn_run<T> &r, int sixteenths)
{
    const combination<T> g = {r.x[r.now], NULL, 0};
    double error = 0, logs = 0;
    for (int64_t t0 = r.first; t0 < r.last; t0 += span_of(r)) {
        const int64_t t1 = MIN(r.last, t0 + span_of(r));
        for (int64_t i = t0 * r.shape.rows + warp_of(); i < MIN(r.end, t1 * r.shape.rows); i += WARPS) {
            const T target = marginal(r.row, r.at * r.m + i), f = r.f[i];
            const double y = row_product(row_of(r, i), r.n, r.wide, g);
            const T to = f * power((T)((double)target / ((double)f * y)), sixteenths);
            __syncwarp();
            if (lane_of() == 0) r.f[i] = to;
            error = larger(error, fabs(off(to, y, target)));
            logs = larger(logs, far(to));
        }
        __syncthreads();
        panel_sums<true>(r, t0, t1, (const T *)r.f);
    }
    report(r, 0, error, logs);
}

/* The columns' sums, their errors, and g <- g (col / (g K' f))^w, the next. */
template <typename T> static __device__ inline void columns(const sinkhorn_run<T> &r, int sixteenths)
{
    const T *g = r.x[r.now];
    T *next = r.x[r.now ^ 1];
    double error = 0, logs = 0;
    for (int64_t s = first_strip(r); s < r.shape.strips; s += strip_step(r)) {
        const int64_t j = strip_column(s);
        const double y = strip_total<false>(r, r.partial[0], s);
        double e = 0;
        if (owner(r, j)) {
            const T target = marginal(r.col, r.at * r.n + j);
            const T to = g[j] * power((T)((double)target / ((double)g[j] * y)), sixteenths);
            next[j] = to, r.y[j] = y;
            e = off(g[j], y, target);
            error = larger(error, fabs(e));
            logs = larger(logs, far(to));
        }
        e = warp_sum(e * e);
        if (lane_of() == 0) r.sums[0][s] = e;
    }
    report(r, 1, error, logs);
}

/* The next g once more, with another exponent. */
template <typename T> static __device__ inline void columns_again(const sinkhorn_run<T> &r, int sixteenths)
{
    double logs = 0;
    for (int64_t s = first_strip(r); s < r.shape.strips; s += strip_step(r)) {
        const int64_t j = strip_column(s);
        if (!owner(r, j)) continue;
        const T target = marginal(r.col, r.at * r.n + j), g = r.x[r.now][j];
        const T to = g * power((T)((double)target / ((double)g * r.y[j])), sixteenths);
        r.x[r.now ^ 1][j] = to;
        logs = larger(logs, far(to));
    }
    report(r, 0, 0, logs);
}

/* False if the plan does not exist. */
template <typename T>
static __device__ inline bool iterate(sinkhorn_run<T> &r, double high, int64_t left, double *error, int64_t *sweeps)
{
    __shared__ relaxation w;
    if (threadIdx.x == 0) w = relaxation{16, 0, 0, 0, 0};
    __syncthreads();
    for (;; left--) {
        const int sixteenths = w.sixteenths;
        sweep(r, left > 0 ? sixteenths : 0); /* 0: only look */
        meet(r);
        columns(r, sixteenths);
        meet(r);
        const double2 most = collect(r, 2);
        const double norm = sqrt(add_up(r.sums[0], r.shape.strips));
        double logs = most.y;
        *error = most.x;
        if (most.x != most.x) return false;
        *sweeps += left > 0;
        if (left <= 1 || (most.x <= r.tol && r.half_steps == 0)) return true;
        if (threadIdx.x == 0 && r.half_steps == 0) relax(&w, most.x, norm);
        __syncthreads();
        if (w.sixteenths != sixteenths) { /* seldom */
            columns_again(r, w.sixteenths);
            meet(r);
            logs = larger(logs, collect(r, 1).y);
        }
        if (logs > domain<T>::LIMIT) absorb(r, high);
        flip(&r.now);
    }
}

/* The next f of a symmetric plan; `fresh`: nothing is known of where it came from. */
template <typename T>
static __device__ inline void sweep_symmetric(const sinkhorn_run<T> &r, int sixteenths, bool fresh)
{
    const T *f = r.x[r.now];
    T *next = r.x[r.now ^ 1]; /* f before */
    const combination<T> g = {f, NULL, 0};
    double error = 0, logs = 0;
    for (int64_t i = r.begin + warp_of(); i < r.end; i += WARPS) {
        const T target = marginal(r.row, r.at * r.m + i), fi = f[i], turn = fresh ? (T)1 : fi / next[i];
        const double y = row_product(row_of(r, i), r.n, r.wide, g);
        T to = fi * power((T)((double)target / ((double)fi * y)), sixteenths);
        to *= 1 + ((turn < 2 ? turn : (T)2) - 1) / 32;
        __syncwarp();
        if (lane_of() == 0) next[i] = to;
        error = larger(error, fabs(off(fi, y, target)));
        logs = larger(logs, far(to));
    }
    report(r, 0, error, logs);
}

template <typename T>
static __device__ inline bool iterate_symmetric(sinkhorn_run<T> &r, double high, double *error, int64_t *sweeps)
{
    bool fresh = true;
    for (;; ++*sweeps) {
        /* from 1 the plain step, which sets the scale at once */
        sweep_symmetric(r, *sweeps ? 11 : 8, fresh);
        meet(r);
        const double2 most = collect(r, 1);
        *error = most.x;
        if (most.x != most.x) return false;
        if (most.x <= r.tol || *sweeps == r.max_iter) return true;
        fresh = *sweeps == 0 || most.y > domain<T>::LIMIT;
        if (most.y > domain<T>::LIMIT) absorb(r, high);
        flip(&r.now);
    }
}

template <typename T> static __device__ inline bool solve(sinkhorn_run<T> &r, double *error, int64_t *sweeps)
{
    int64_t left = r.half_steps ? (r.half_steps + 1) / 2 : r.max_iter;
    double high;
    for (int64_t i = r.begin + threadIdx.x; i < r.end; i += THREADS) r.f[i] = 1, r.alpha[i] = 0;
    for (int64_t s = first_strip(r); s < r.shape.strips; s += strip_step(r)) {
        const int64_t j = strip_column(s);
        if (owner(r, j)) r.x[0][j] = 1, r.beta[j] = 0;
    }
    const double range = inspect(r, &high);
    if (!(range >= 0)) return false;
    if (range > domain<T>::RANGE && left > 0) {
        fill<false>(r, high);
        if (!log_sweeps(r)) return false;
        left--;
        if (!r.symmetric) ++*sweeps;
    }
    if (r.symmetric && threadIdx.x == 0) r.beta = r.alpha;
    __syncthreads();
    fill<true>(r, high);
    return r.symmetric ? iterate_symmetric(r, high, error, sweeps) : iterate(r, high, left, error, sweeps);
}

template <typename T>
static __global__ void __launch_bounds__(THREADS, SINKHORN_TOGETHER) project(const sinkhorn_run<T> all)
{
    DYNAMIC_SHARED(shared);
    __shared__ sinkhorn_run<T> r;
    if (threadIdx.x == 0) {
        r = all;
        enter_group(r);
    }
    __syncthreads();
    for (int64_t v = r.group; v < all.v; v += all.shape.groups) {
        double error = NAN;
        int64_t sweeps = 0;
        meet(r); /* nobody needs the last plan's vectors any more */
        if (threadIdx.x == 0) take_plan(r, v, (T *)shared);
        __syncthreads();
        const bool exists = solve(r, &error, &sweeps);
        write_plan(r, exists);
        if (r.rank == 0 && threadIdx.x == 0) all.error[v] = exists ? error : NAN, all.sweeps[v] = sweeps;
    }
}

/* ------------------------------------------------------------------------------------------------------ the batch */

template <typename T>
static void lay_out(sinkhorn_run<T> *r, const subspace_sinkhorn_args *a, const device_limits *limits, bool backward,
                    char *base, size_t *bytes)
{
    *r = sinkhorn_run<T>{};
    r->v = a->v, r->m = a->m, r->n = a->n, r->max_iter = a->max_iter, r->half_steps = a->half_steps;
    r->given = a->symmetric, r->scale = MIN(1 / a->eta, 1e30), r->tol = a->tol;
    r->scores = (const T *)a->scores, r->row = (const T *)a->row, r->col = (const T *)a->col;
    r->plan = (T *)a->plan, r->error = a->error, r->sweeps = a->sweeps;
    r->dplan = (const T *)a->dplan, r->dscores = (T *)a->dscores, r->drow = (T *)a->drow, r->dcol = (T *)a->dcol;
    r->shape = sinkhorn_shape_of(a->v, a->m, a->n, sizeof(T), limits->multiprocessors, (int64_t)limits->shared);
    r->columns = CEIL_DIV(a->m * (int64_t)sizeof(T), 16) * 16 / (int64_t)sizeof(T);
    const int64_t m = a->m, n = a->n, partial = r->shape.panels * r->shape.ld;
    r->meeting = (unsigned *)carve(base, bytes, r->shape.groups * MEETING, sizeof(unsigned));
    const size_t group = *bytes;
    for (double *&sums : r->sums)
        sums = (double *)carve(base, bytes, r->shape.panels + r->shape.strips, sizeof(double));
    r->y = (double *)carve(base, bytes, n, sizeof(double));
    r->f = (T *)carve(base, bytes, m, sizeof(T));
    r->partial[0] = (T *)carve(base, bytes, partial, sizeof(T));
    if (backward) {
        r->partial[1] = (T *)carve(base, bytes, partial, sizeof(T));
        r->term = (double *)carve(base, bytes, m, sizeof(double));
        T **vectors[] = {&r->diagonal, &r->rhs, &r->z, &r->p[0], &r->p[1], &r->s};
        for (T **vector : vectors) *vector = (T *)carve(base, bytes, r->columns + n, sizeof(T));
    } else {
        r->report = (double2 *)carve(base, bytes, 4 * r->shape.blocks, sizeof(double2));
        r->logs[0] = (double *)carve(base, bytes, m, sizeof(double));
        r->logs[1] = (double *)carve(base, bytes, n, sizeof(double));
        for (T *&x : r->x) x = (T *)carve(base, bytes, n, sizeof(T));
    }
    r->bytes = *bytes - group;
    *bytes = group + (size_t)r->shape.groups * r->bytes;
}

template <typename T> static size_t bytes_of(const subspace_sinkhorn_args *a, const device_limits *limits)
{
    size_t forward = 0, backward = 0;
    sinkhorn_run<T> r;
    lay_out(&r, a, limits, false, NULL, &forward);
    lay_out(&r, a, limits, true, NULL, &backward);
    return MAX(forward, backward);
}

extern "C" size_t subspace_sinkhorn_workspace_cuda(const subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    subspace_ctx own = *ctx; /* for a message that the launch will have again */
    device_limits limits;
    if (a->v <= 0 || a->m <= 0 || a->n <= 0 || limits_of(&own, &limits) != SUBSPACE_OK) return 0;
    return a->dtype == SUBSPACE_F64 ? bytes_of<double>(a, &limits) : bytes_of<float>(a, &limits);
}

template <typename T> static subspace_status launch(subspace_ctx *ctx, const subspace_sinkhorn_args *a, bool backward)
{
    void (*const kernel)(sinkhorn_run<T>) = backward ? differentiate<T> : project<T>;
    sinkhorn_run<T> r;
    device_limits limits;
    size_t bytes = 0;
    int64_t resident;
    TRY(limits_of(ctx, &limits));
    lay_out(&r, a, &limits, backward, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "sinkhorn: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    TRY(resident_blocks(ctx, &limits, kernel, THREADS, r.shape.shared, &resident));
    CHECK(ctx, resident >= r.shape.blocks, SUBSPACE_CUDA,
          "sinkhorn: a plan needs %lld blocks at once, the device has room for %lld", (long long)r.shape.blocks,
          (long long)resident);
    r.shape.groups = MIN(r.shape.groups, resident / r.shape.blocks);
    CUDA(ctx,
         cudaMemsetAsync(r.meeting, 0, (size_t)r.shape.groups * MEETING * sizeof(unsigned), (cudaStream_t)ctx->stream));
    LAUNCH_COOPERATIVE(ctx, kernel, (unsigned)(r.shape.groups * r.shape.blocks), THREADS, r.shape.shared, r);
    return SUBSPACE_OK;
}

static subspace_status start(subspace_ctx *ctx, const subspace_sinkhorn_args *a, bool backward)
{
    TRY(subspace_sinkhorn_check(ctx, a));
    if (a->v == 0) return SUBSPACE_OK;
    return a->dtype == SUBSPACE_F64 ? launch<double>(ctx, a, backward) : launch<float>(ctx, a, backward);
}

extern "C" subspace_status subspace_sinkhorn_cuda(subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    return start(ctx, a, false);
}

extern "C" subspace_status subspace_sinkhorn_backward_cuda(subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    return start(ctx, a, true);
}
