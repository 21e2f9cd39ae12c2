/* cross_entropy.cu - softmax cross-entropy over subspace logits that are never stored.
 *
 *     y[b,c]   = gamma || z[b,c,:] || / |x_b|          panels.cuh, a tile at a time
 *     lse[b]   = log sum_c exp(y)                      online: running maximum and sum
 *     tau[b,c] = w_c ((1 - s) target[b,c] + s / C)     s = label smoothing, w = class weights
 *     loss[b]  = lse sum_c tau - sum_c tau y
 *
 *     dy       = dloss (sum_c tau exp(y - lse) - tau)  recomputed a tile at a time
 *     dz       = gamma dy z / ||z||                    panels.cuh takes it to dweight and dx
 *
 * A block sums 128 classes of 32 rows; `join` adds those shares to the rows' running state in the
 * order of the classes, a panel after the other. Memory: a tile, its shares, four numbers a row.
 */
#include "panels.cuh"

enum { STRIP = 128 }; /* classes that one block adds up */

typedef struct targets {
    const int64_t *label;
    const void *soft;
    const double *class_weight;
    int64_t classes, ignore_index;
    double smoothing;

    template <typename A> __device__ A tau(int64_t c, A target) const
    {
        const A w = (A)(class_weight ? class_weight[c] : 1);
        return w * ((A)(1 - smoothing) * target + (A)(smoothing / (double)classes));
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
__global__ void accumulate(tile t, view<acc_t<T>> v, const acc_t<T> *z, int64_t ldz, targets target, row_state *share)
{
    typedef acc_t<T> A;
    __shared__ A soft[SQUARE][SQUARE + 1];
    __shared__ row_state part[LINES][SQUARE];
    const int64_t i0 = (int64_t)blockIdx.y * SQUARE, i = i0 + threadIdx.x, first = t.c0 + (int64_t)blockIdx.x * STRIP;
    const int64_t label = target.label && i < t.nb ? target.label[t.b0 + i] : -1;
    A most = (A)-INFINITY, sum = 0, tau_y = 0, tau_sum = 0;
    for (int64_t c0 = first; c0 < MIN(first + STRIP, t.c1); c0 += SQUARE) {
        if (target.soft) panels_gather(t, c0, i0, soft, (const T *)target.soft, target.classes);
        for (int line = threadIdx.y; line < SQUARE; line += LINES) {
            const int64_t c = c0 + line;
            if (i >= t.nb || c >= t.c1) continue;
            const A y = v.gamma * class_norm(t, v, z, ldz, c, i);
            const A tau = target.tau(c, target.soft ? soft[line][threadIdx.x] : (A)(c == label));
            if (y > most) sum = sum * exp(most - y) + 1, most = y;
            else sum += exp(y - most);
            tau_y += tau * y, tau_sum += tau;
        }
        __syncthreads(); /* soft has been read */
    }
    part[threadIdx.y][threadIdx.x] = {(double)most, (double)sum, (double)tau_y, (double)tau_sum};
    __syncthreads();
    if (threadIdx.y > 0 || i >= t.nb) return;
    row_state s = fresh();
    for (int line = 0; line < LINES; line++) merge(&s, part[line][threadIdx.x]);
    share[blockIdx.x * t.nb + i] = s;
}

static __global__ void join(tile t, const row_state *share, int64_t strips, row_state *state)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= t.nb) return;
    row_state s = t.c0 ? state[t.b0 + i] : fresh();
    for (int64_t strip = 0; strip < strips; strip++) merge(&s, share[strip * t.nb + i]);
    state[t.b0 + i] = s;
}

/* A label out of range cannot raise without a wait for the device: its row's loss is NaN. */
template <typename A> __global__ void finish_rows(int64_t b, targets target, const row_state *state, A *loss, A *stats)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= b) return;
    row_state s = state[i];
    const double lse = s.most + log(s.sum);
    const int64_t label = target.label ? target.label[i] : 0;
    const bool ignored = target.label && label == target.ignore_index;
    if (label < 0 || label >= target.classes) s.tau_sum = NAN;
    stats[i] = (A)lse;
    stats[b + i] = (A)(ignored ? 0 : s.tau_sum);
    loss[i] = (A)(ignored ? 0 : s.tau_sum * lse - s.tau_y);
}

template <typename T>
__global__ void make_dz(tile t, view<acc_t<T>> v, const acc_t<T> *z, int64_t ldz, targets target, const acc_t<T> *stats,
                        int64_t b, const acc_t<T> *dloss, T *dz)
{
    typedef acc_t<T> A;
    __shared__ A soft[SQUARE][SQUARE + 1];
    const int64_t c0 = t.c0 + (int64_t)blockIdx.x * SQUARE, i0 = (int64_t)blockIdx.y * SQUARE, i = i0 + threadIdx.x;
    if (target.soft) panels_gather(t, c0, i0, soft, (const T *)target.soft, target.classes);
    if (i >= t.nb) return;
    const int64_t label = target.label ? target.label[t.b0 + i] : -1;
    const bool ignored = target.label && label == target.ignore_index;
    const A lse = stats[t.b0 + i], tau_sum = stats[b + t.b0 + i], d = dloss[t.b0 + i];
    for (int line = threadIdx.y; line < SQUARE; line += LINES) {
        const int64_t c = c0 + line;
        if (c >= t.c1) continue;
        const A norm = class_norm(t, v, z, ldz, c, i);
        const A tau = target.tau(c, target.soft ? soft[line][threadIdx.x] : (A)(c == label));
        const A dy = ignored ? 0 : d * (tau_sum * exp(v.gamma * norm - lse) - tau);
        panels_scale(t, v, norm > 0 ? v.gamma * dy / norm : 0, z, ldz, c, i, dz);
    }
}

typedef struct cross_entropy_run {
    const subspace_cross_entropy_args *a;
    targets target;
    row_state *share, *state; /* [strips, block] of a tile; [b] */
} cross_entropy_run;

enum { JOIN_THREADS = 64 };

template <typename T>
static subspace_status forward_tile(void *arg, const panels *p, const tile *t, const void *z, int64_t ldz, void *)
{
    const cross_entropy_run *run = (const cross_entropy_run *)arg;
    const dim3 grid = squares(t, STRIP);
    LAUNCH(p->ctx, accumulate<T>, grid, dim3(SQUARE, LINES), 0, *t, view_of<T>(p), (const acc_t<T> *)z, ldz,
           run->target, run->share);
    LAUNCH(p->ctx, join, (unsigned)CEIL_DIV(t->nb, JOIN_THREADS), JOIN_THREADS, 0, *t, run->share, (int64_t)grid.x,
           run->state);
    return SUBSPACE_OK;
}

template <typename T>
static subspace_status backward_tile(void *arg, const panels *p, const tile *t, const void *z, int64_t ldz, void *dz)
{
    const cross_entropy_run *run = (const cross_entropy_run *)arg;
    LAUNCH(p->ctx, make_dz<T>, squares(t, SQUARE), dim3(SQUARE, LINES), 0, *t, view_of<T>(p), (const acc_t<T> *)z, ldz,
           run->target, (const acc_t<T> *)run->a->stats, p->a->b, (const acc_t<T> *)run->a->dloss, (T *)dz);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status forward(const panels *p, cross_entropy_run *run)
{
    typedef acc_t<T> A;
    const int64_t b = p->a->b;
    if (b == 0) return SUBSPACE_OK;
    TRY(panels_forward<T>(p, forward_tile<T>, run));
    LAUNCH(p->ctx, finish_rows<A>, (unsigned)CEIL_DIV(b, JOIN_THREADS), JOIN_THREADS, 0, b, run->target, run->state,
           (A *)run->a->loss, (A *)run->a->stats);
    return SUBSPACE_OK;
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
    run->target = {a->label, a->soft, (const double *)a->class_weight, a->f.c, a->ignore_index, a->label_smoothing};
    if (backward) return;
    run->share = (row_state *)carve(base, bytes, CEIL_DIV(p->classes, STRIP) * p->block, sizeof(row_state));
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
