/* cross_entropy.cu - softmax cross-entropy over subspace logits that are never stored.
 *
 *     y[b,c]   = gamma || z[b,c,:] || / |x_b|          panels.cuh, a tile at a time
 *     lse[b]   = log sum_c exp(y)                      online: running maximum and sum
 *     tau[b,c] = w_c ((1 - s) target[b,c] + s / C)     s = label smoothing, w = class weights, C of all classes
 *     loss[b]  = lse sum_c tau - sum_c tau y
 *
 *     dy       = dloss (sum_c tau exp(y - lse) - tau)  recomputed a tile at a time
 *     dz       = gamma dy z / ||z||                    panels.cuh takes it to dweight and dx
 *
 * A block sums a strip of 16 to 128 classes for 128 rows; `join`, a warp a row, adds those shares to the rows' running
 * state in a fixed order, a panel after the other, and after the last writes loss and stats. Memory: a tile, its
 * shares, four numbers a row. Launches: 3 a tile and 1 (r = 1/|x|); the backward 4 a tile (5 with z's GEMM), and
 * dx's end a block.
 */
#include "panels.cuh"

typedef struct targets {
    const int64_t *label;
    const void *soft;
    const double *class_weight;
    int64_t classes, all, ignore_index; /* here, and in all */
    double smoothing;

    template <typename A> __device__ A tau(int64_t c, A target) const
    {
        const A w = (A)(class_weight ? class_weight[c] : 1);
        return w * ((A)(1 - smoothing) * target + (A)(smoothing / (double)all));
    }
} targets;

typedef struct row_state { /* of one row, over some of the classes */
    double most, sum, tau_y, tau_sum;
} row_state;

static __device__ void merge(row_state *to, const row_state &from)
{
    to->tau_y += from.tau_y, to->tau_sum += from.tau_sum;
    if (from.sum == 0) return; /* no class */
    const double high = to->most > from.most ? to->most : from.most;
    to->sum = to->sum * exp(to->most - high) + from.sum * exp(from.most - high);
    to->most = high;
}

static __device__ row_state fresh()
{
    return {-INFINITY, 0, 0, 0};
}

/* One strip's share of lse, sum_c tau y and sum_c tau: share[strip, row]. */
template <typename T>
__global__ void __launch_bounds__(EPILOGUE_THREADS) accumulate(tile t, view<acc_t<T>> v, const acc_t<T> *z, int64_t ldz,
                                                               targets target, int64_t strip, row_state *share)
{
    typedef acc_t<T> A;
    __shared__ A soft[CLASSES][BATCH + 4];
    __shared__ quad<A> part[CLASSES][BATCH]; /* most, sum, tau_y, tau_sum of each thread's rows */
    const int64_t i0 = (int64_t)blockIdx.y * BATCH, i = i0 + 4 * threadIdx.x, first = t.c0 + blockIdx.x * strip;
    A most[4], sum[4] = {}, tau_y[4] = {}, tau_sum[4] = {};
    int64_t label[4];
    for (int j = 0; j < 4; j++) {
        label[j] = target.label && i + j < t.nb ? target.label[t.b0 + i + j] : -1;
        most[j] = (A)-INFINITY;
    }
    for (int64_t c0 = first; c0 < MIN(first + strip, t.c1); c0 += CLASSES) {
        const int64_t c = c0 + threadIdx.y;
        if (target.soft) panels_gather(t, c0, i0, soft, (const A *)target.soft, target.classes);
        if (i < t.nb && c < t.c1) {
            projections<A> p;
            panels_read(t, v, z, ldz, c, i, &p);
            for (int j = 0; j < 4; j++) {
                const A y = v.gamma * p.norm.v[j];
                const A tau = target.tau(c, target.soft ? soft[threadIdx.y][4 * threadIdx.x + j] : (A)(c == label[j]));
                if (y > most[j]) sum[j] = sum[j] * exp(most[j] - y) + 1, most[j] = y;
                else sum[j] += exp(y - most[j]);
                tau_y[j] += tau * y, tau_sum[j] += tau;
            }
        }
        if (target.soft) __syncthreads(); /* soft has been read */
    }
    for (int j = 0; j < 4; j++) part[threadIdx.y][4 * threadIdx.x + j] = {{most[j], sum[j], tau_y[j], tau_sum[j]}};
    __syncthreads();
    const int row = (int)thread_in_block();
    if (row >= BATCH || i0 + row >= t.nb) return;
    row_state s = fresh();
    for (int line = 0; line < CLASSES; line++) {
        const quad<A> q = part[line][row];
        merge(&s, {(double)q.v[0], (double)q.v[1], (double)q.v[2], (double)q.v[3]});
    }
    share[blockIdx.x * t.nb + i0 + row] = s;
}

/* The shares of a panel join the rows' state, a warp a row; with the last panel come loss and stats.
 * A label out of range cannot raise without a wait for the device: its row's loss is NaN. */
template <typename A>
__global__ void __launch_bounds__(ROW_THREADS)
    join(tile t, int64_t b, targets target, const row_state *share, int64_t strips, row_state *state, A *loss, A *stats)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, at = t.b0 + i;
    if (i >= t.nb) return; /* a whole warp */
    row_state s = fresh();
    for (int64_t strip = threadIdx.x; strip < strips; strip += WARP) merge(&s, share[strip * t.nb + i]);
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        row_state other;
        other.most = __shfl_down_sync(ALL_LANES, s.most, lanes), other.sum = __shfl_down_sync(ALL_LANES, s.sum, lanes);
        other.tau_y = __shfl_down_sync(ALL_LANES, s.tau_y, lanes);
        other.tau_sum = __shfl_down_sync(ALL_LANES, s.tau_sum, lanes);
        merge(&s, other);
    }
    if (threadIdx.x > 0) return;
    if (t.c0) {
        row_state all = state[at];
        merge(&all, s);
        s = all;
    }
    if (t.c1 < target.classes) {
        state[at] = s;
        return;
    }
    const double lse = s.most + log(s.sum);
    const int64_t label = target.label ? target.label[at] : 0;
    const bool ignored = target.label && label == target.ignore_index;
    if (label < 0 || label >= target.all) s.tau_sum = NAN;
    stats[at] = (A)lse;
    stats[b + at] = (A)(ignored ? 0 : s.tau_sum);
    loss[at] = (A)(ignored ? 0 : s.tau_sum * lse - s.tau_y);
}

template <typename T>
__global__ void __launch_bounds__(EPILOGUE_THREADS)
    make_dz(tile t, view<acc_t<T>> v, const acc_t<T> *z, int64_t ldz, targets target, const acc_t<T> *stats, int64_t b,
            const acc_t<T> *dloss, T *dz)
{
    typedef acc_t<T> A;
    __shared__ A soft[CLASSES][BATCH + 4];
    const int64_t c0 = t.c0 + (int64_t)blockIdx.x * CLASSES, i0 = (int64_t)blockIdx.y * BATCH;
    const int64_t c = c0 + threadIdx.y, i = i0 + 4 * threadIdx.x;
    projections<A> p;
    if (i < t.nb && c < t.c1) panels_read(t, v, z, ldz, c, i, &p);
    if (target.soft) panels_gather(t, c0, i0, soft, (const A *)target.soft, target.classes);
    if (i >= t.nb || c >= t.c1) return;
    A dy[4];
    for (int j = 0; j < 4; j++) {
        const int64_t row = t.b0 + MIN(i + j, t.nb - 1), label = target.label ? target.label[row] : -1;
        const bool ignored = target.label && label == target.ignore_index;
        const A tau = target.tau(c, target.soft ? soft[threadIdx.y][4 * threadIdx.x + j] : (A)(c == label));
        dy[j] = ignored ? 0 : dloss[row] * (stats[b + row] * exp(v.gamma * p.norm.v[j] - stats[row]) - tau);
    }
    panels_write(t, v, p, dy, z, ldz, c, i, dz);
}

typedef struct cross_entropy_run {
    const subspace_cross_entropy_args *a;
    targets target;
    int64_t strip;
    row_state *share, *state; /* [strips, block] of a tile; [b] */
} cross_entropy_run;

template <typename T>
static subspace_status forward_tile(void *arg, const panels *p, const tile *t, const void *z, int64_t ldz, void *)
{
    const cross_entropy_run *run = (const cross_entropy_run *)arg;
    const dim3 grid = panels_grid(t, run->strip), rows(WARP, ROW_THREADS / WARP);
    LAUNCH(p->ctx, accumulate<T>, grid, panels_block(), 0, *t, view_of<T>(p), (const acc_t<T> *)z, ldz, run->target,
           run->strip, run->share);
    LAUNCH(p->ctx, join<acc_t<T>>, (unsigned)CEIL_DIV(t->nb, (int64_t)rows.y), rows, 0, *t, p->a->b, run->target,
           run->share, (int64_t)grid.x, run->state, (acc_t<T> *)run->a->loss, (acc_t<T> *)run->a->stats);
    return SUBSPACE_OK;
}

template <typename T>
static subspace_status backward_tile(void *arg, const panels *p, const tile *t, const void *z, int64_t ldz, void *dz)
{
    const cross_entropy_run *run = (const cross_entropy_run *)arg;
    LAUNCH(p->ctx, make_dz<T>, panels_grid(t, CLASSES), panels_block(), 0, *t, view_of<T>(p), (const acc_t<T> *)z, ldz,
           run->target, (const acc_t<T> *)run->a->stats, p->a->b, (const acc_t<T> *)run->a->dloss, (T *)dz);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status forward(const panels *p, cross_entropy_run *run)
{
    return panels_forward<T>(p, forward_tile<T>, run);
}

template <typename T> static subspace_status backward(const panels *p, cross_entropy_run *run)
{
    return panels_backward<T>(p, backward_tile<T>, run);
}

static void plan(panels *p, cross_entropy_run *run, subspace_ctx *ctx, const subspace_cross_entropy_args *a,
                 bool backward, char *base, size_t *bytes)
{
    panels_plan(p, ctx, &a->f, NULL, backward, base, bytes);
    *run = cross_entropy_run{};
    run->a = a;
    run->target = {
        a->label,        a->soft,           (const double *)a->class_weight, a->f.c, a->classes ? a->classes : a->f.c,
        a->ignore_index, a->label_smoothing};
    if (backward) return;
    run->strip = panels_strip(p->s.classes, p->s.block);
    run->share = (row_state *)carve(base, bytes, CEIL_DIV(p->s.classes, run->strip) * p->s.block, sizeof(row_state));
    run->state = (row_state *)carve(base, bytes, a->f.b, sizeof(row_state));
}

extern "C" size_t subspace_cross_entropy_workspace_cuda(const subspace_ctx *, const subspace_cross_entropy_args *a)
{
    size_t forward = 0, backward = 0;
    panels p;
    cross_entropy_run run;
    plan(&p, &run, NULL, a, false, NULL, &forward);
    plan(&p, &run, NULL, a, true, NULL, &backward);
    return MAX(forward, backward);
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_cross_entropy_args *a, bool backward, panels *p,
                               cross_entropy_run *run)
{
    size_t bytes = 0;
    TRY(subspace_cross_entropy_check(ctx, a));
    plan(p, run, ctx, a, backward, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "cross_entropy: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_cross_entropy_cuda(subspace_ctx *ctx, const subspace_cross_entropy_args *a)
{
    panels p;
    cross_entropy_run run;
    TRY(prepare(ctx, a, false, &p, &run));
    DISPATCH(a->f.dtype, forward, &p, &run);
}

extern "C" subspace_status subspace_cross_entropy_backward_cuda(subspace_ctx *ctx, const subspace_cross_entropy_args *a)
{
    panels p;
    cross_entropy_run run;
    TRY(prepare(ctx, a, true, &p, &run));
    DISPATCH(a->f.dtype, backward, &p, &run);
}
