/* tucker.cu - a weight's change from a core and a factor on every mode, on the GPU.
 *
 *     G_0 = core,  G_t = G_{t-1} x_m U_m,  out = base + scale G_L                  one launch a mode
 *
 *     D_L = dout,  D_{t-1} = D_t x_m U_m',  dU_m = scale unfold(D_t) unfold(G_{t-1})',  dcore = scale D_0
 *
 * The order of the modes is that of cpu/tucker/tucker.c: kernel modes are small and come first, mode 0 last where it
 * costs little more. A stage is `pre` products [d, r] [r, post], or one where pre or post is 1. The last one adds to
 * base in float32 and rounds once: base is read and out written once, 2 item bytes an entry, by rank_product.cuh (2 r
 * flops an entry: memory is the limit up to r of 32 to 64). Deeper products of float32 are GEMMs of cuBLAS, never in
 * TF32, on a copy of base. dU_m is one sum over all of pre and post, in slices added up in order. The backward reads
 * dout twice, once for dU and once for D, half types as they are.
 */
#include <string.h>
#include "rank_product.cuh"

enum { DEEP = 64 }; /* ranks above it go to cuBLAS */

/* One mode of the chain. */
typedef struct stage {
    int mode;
    int64_t d, r, pre, post;
} stage;

typedef struct plan {
    int count; /* L: modes with a factor */
    stage stages[SUBSPACE_MODES];
    int64_t core, entries;         /* entries of the core, of out */
    int first_needed, last_needed; /* backward: stages whose dU or D is asked for */
    void *partial[SUBSPACE_MODES]; /* G_t, 0 < t < L */
    void *dpartial[2];             /* D_t, 0 < t < L, in turns */
    void *slices;                  /* of dU or D, before they are added up */
} plan;

/* for i in [0, count), shared out among the threads of a grid */
#define EACH_OF_GRID(i, count)                                                                                         \
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += (int64_t)gridDim.x * blockDim.x)

/* out = base + scale x, entry by entry */
template <typename I, typename W, typename O>
__global__ void scale_into(int64_t count, const I *x, W scale, const O *base, O *out)
{
    EACH_OF_GRID(i, count)
    {
        const W value = scale * (W)x[i];
        out[i] = (O)(base ? (W)base[i] + value : value);
    }
}

/* [pre, d, post] = base + scale U [pre, r, post] for every one of pre; base may be out or NULL */
template <typename W, typename O>
static subspace_status expand(subspace_ctx *ctx, const stage *s, const W *u, const W *x, double scale, const O *base,
                              O *out)
{
    const int64_t d = s->d, r = s->r, pre = s->pre, post = s->post, entries = pre * d * post;
    if (r > DEEP && sizeof(O) == sizeof(W)) {
        const subspace_dtype w = sizeof(W) == sizeof(double) ? SUBSPACE_F64 : SUBSPACE_F32;
        const double beta = base ? 1 : 0;
        const gemms all = {d,    post, r, pre, false, false, true, w, w,        scale,
                           beta, u,    x, out, r,     post,  post, 0, r * post, d * post};
        const gemms one = {pre, d, r, 1, false, true, true, w, w, scale, beta, x, u, out, r, r, d, 0, 0, 0};
        if (base && (const void *)base != (const void *)out)
            CUDA(ctx, cudaMemcpyAsync(out, base, (size_t)entries * sizeof(O), cudaMemcpyDeviceToDevice,
                                      (cudaStream_t)ctx->stream));
        return gemm_all(ctx, post == 1 ? &one : &all);
    }
    if (post == 1) {
        const rank_job<W, W, O> one = {1,    pre, d,  r,       r, {x, 0, r, 0, 1, 0, 0}, {u, 0, r, 0, 1, 0, 0}, scale,
                                       base, out, {}, NOTHING, 0};
        return rank_multiply(ctx, one, false);
    }
    const rank_job<W, W, O> all = {
        pre, d, post, r, r, {u, 0, r, 0, 1, 0, 0}, {x, r * post, 1, 0, post, 0, 0}, scale, base, out, {}, NOTHING, 0};
    return rank_multiply(ctx, all, false);
}

/* G_t = G_{t-1} x_m U_m; the last one joins base in out. */
template <typename T>
static subspace_status step(subspace_ctx *ctx, const subspace_tucker_args *a, const plan *p, int t, bool last)
{
    typedef acc_t<T> W;
    const stage *s = &p->stages[t];
    const W *u = (const W *)a->factor[s->mode], *x = (const W *)(t ? p->partial[t] : a->core);
    if (last) return expand(ctx, s, u, x, a->scale, (const T *)a->base, (T *)a->out);
    return expand(ctx, s, u, x, 1, (const W *)NULL, (W *)p->partial[t + 1]);
}

template <typename T> static subspace_status forward(subspace_ctx *ctx, const subspace_tucker_args *a, const plan *p)
{
    typedef acc_t<T> W;
    for (int t = 0; t < p->count; t++) TRY(step<T>(ctx, a, p, t, t == p->count - 1));
    if (p->count == 0)
        LAUNCH(ctx, (scale_into<W, W, T>), rank_grid(p->core), RANK_THREADS, 0, p->core, (const W *)a->core,
               (W)a->scale, (const T *)a->base, (T *)a->out);
    return SUBSPACE_OK;
}

/* A job over one product, in slices where there are more than one, and their sum */
template <typename L, typename R, typename W>
static subspace_status in_slices(subspace_ctx *ctx, const plan *p, rank_job<L, R, W> job)
{
    const int64_t slices = rank_shape_of(job.rows, job.cols, job.depth, 1, true).slices, count = job.rows * job.cols;
    W *out = job.out;
    const double scale = job.alpha;
    if (slices == 1) return rank_multiply(ctx, job, true);
    job.out = (W *)p->slices, job.alpha = 1;
    TRY(rank_multiply(ctx, job, true));
    return join(ctx, (const W *)p->slices, slices, count, scale, out);
}

/* dU_m = scale sum_{p, q} x[p, :, q] g[p, :, q]' */
template <typename X, typename W>
static subspace_status factor_gradient(subspace_ctx *ctx, const plan *p, const stage *s, const X *x, const W *g,
                                       double scale, W *du)
{
    const int64_t d = s->d, r = s->r, pre = s->pre, post = s->post;
    const subspace_dtype w = sizeof(W) == sizeof(double) ? SUBSPACE_F64 : SUBSPACE_F32;
    if (sizeof(X) == sizeof(W) && (pre == 1 || post == 1)) {
        const gemms rows = {d, r, post, 1, false, true, false, w, w, scale, 0, x, g, du, post, post, r, 0, 0, 0};
        const gemms columns = {d, r, pre, 1, true, false, false, w, w, scale, 0, x, g, du, d, r, r, 0, 0, 0};
        return gemm_all(ctx, pre == 1 ? &rows : &columns);
    }
    return in_slices(ctx, p,
                     rank_job<X, W, W>{1,
                                       d,
                                       r,
                                       pre * post,
                                       post,
                                       {x, 0, post, d * post, 1, 0, 0},
                                       {g, 0, post, r * post, 1, 0, 0},
                                       scale,
                                       NULL,
                                       du,
                                       {},
                                       NOTHING,
                                       0});
}

/* [pre, r, post] = scale U' [pre, d, post] for every one of pre */
template <typename X, typename W>
static subspace_status contract(subspace_ctx *ctx, const plan *p, const stage *s, const W *u, const X *x, double scale,
                                W *dg)
{
    const int64_t d = s->d, r = s->r, pre = s->pre, post = s->post;
    const subspace_dtype w = sizeof(W) == sizeof(double) ? SUBSPACE_F64 : SUBSPACE_F32;
    if (sizeof(X) == sizeof(W)) {
        const gemms all = {r, post, d, pre, true, false, false, w, w,        scale,
                           0, u,    x, dg,  r,    post,  post,  0, d * post, r * post};
        const gemms one = {pre, r, d, 1, false, false, false, w, w, scale, 0, x, u, dg, d, r, r, 0, 0, 0};
        return gemm_all(ctx, post == 1 ? &one : &all);
    }
    if (post == 1)
        return in_slices(
            ctx, p,
            rank_job<X, W, W>{
                1, pre, r, d, d, {x, 0, d, 0, 1, 0, 0}, {u, 0, 1, 0, r, 0, 0}, scale, NULL, dg, {}, NOTHING, 0});
    const rank_job<W, X, W> all = {
        pre, r, post, d, d, {u, 0, 1, 0, r, 0, 0}, {x, d * post, 1, 0, post, 0, 0}, scale, NULL, dg, {}, NOTHING, 0};
    return pre == 1 ? in_slices(ctx, p, all) : rank_multiply(ctx, all, false);
}

/* dU_m, and D_{t-1} into `dg` unless it is NULL, from x = D_t. */
template <typename X, typename W>
static subspace_status reverse_step(subspace_ctx *ctx, const subspace_tucker_args *a, const plan *p, int t, const X *x,
                                    W *dg)
{
    const stage *s = &p->stages[t];
    const W *u = (const W *)a->factor[s->mode], *g = (const W *)(t ? p->partial[t] : a->core);
    if (a->dfactor[s->mode]) TRY(factor_gradient(ctx, p, s, x, g, a->scale, (W *)a->dfactor[s->mode]));
    return dg ? contract(ctx, p, s, u, x, t ? 1 : a->scale, dg) : SUBSPACE_OK;
}

template <typename T> static subspace_status backward(subspace_ctx *ctx, const subspace_tucker_args *a, const plan *p)
{
    typedef acc_t<T> W;
    for (int t = 0; t < p->last_needed; t++) TRY(step<T>(ctx, a, p, t, false));
    const W *x = NULL;
    for (int t = p->count - 1; t >= p->first_needed && t >= 0; t--) {
        const bool on = t > p->first_needed || a->dcore;
        W *dg = (W *)(!on ? NULL : t ? p->dpartial[t % 2] : a->dcore);
        if (t == p->count - 1) TRY(reverse_step(ctx, a, p, t, (const T *)a->dout, dg));
        else TRY(reverse_step(ctx, a, p, t, x, dg));
        x = dg;
    }
    if (a->dcore && p->count == 0)
        LAUNCH(ctx, (scale_into<T, W, W>), rank_grid(p->core), RANK_THREADS, 0, p->core, (const T *)a->dout,
               (W)a->scale, (const W *)NULL, (W *)a->dcore);
    return SUBSPACE_OK;
}

static double flops(const subspace_tucker_args *a, const int *mode, int count)
{
    double size = 1, sum = 0;
    for (int64_t i = 0; i < a->modes; i++) size *= (double)a->r[i];
    for (int t = 0; t < count; t++) {
        sum += size * (double)a->d[mode[t]];
        size *= (double)a->d[mode[t]] / (double)a->r[mode[t]];
    }
    return sum;
}

/* The modes with a factor in the order of the chain. */
static int order(const subspace_tucker_args *a, int *mode)
{
    double key[SUBSPACE_MODES];
    int count = 0, other[SUBSPACE_MODES], others = 0;
    for (int i = (int)a->modes - 1; i >= 0; i--) {
        if (!a->factor[i]) continue;
        const double k = 1 / (double)a->r[i] - 1 / (double)a->d[i];
        int at = count++;
        for (; at > 0 && k < key[at - 1]; at--) key[at] = key[at - 1], mode[at] = mode[at - 1];
        key[at] = k, mode[at] = i;
    }
    if (!a->factor[0]) return count;
    for (int t = 0; t < count; t++)
        if (mode[t]) other[others++] = mode[t];
    other[others] = 0;
    if (flops(a, other, count) <= 1.5 * flops(a, mode, count)) memcpy(mode, other, (size_t)count * sizeof *mode);
    return count;
}

/* Entries of the slices in_slices asks for */
static int64_t sliced(int64_t rows, int64_t cols, int64_t depth)
{
    const int64_t slices = rank_shape_of(rows, cols, depth, 1, true).slices;
    return slices > 1 ? slices * rows * cols : 0;
}

static void make_plan(plan *p, const subspace_tucker_args *a, bool backward, char *base, size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    int64_t size[SUBSPACE_MODES], dpartial[2] = {0, 0}, slices = 0;
    int mode[SUBSPACE_MODES];
    *p = plan{};
    p->count = order(a, mode), p->core = p->entries = 1, p->first_needed = SUBSPACE_MODES;
    for (int64_t i = 0; i < a->modes; i++) p->core *= size[i] = a->r[i], p->entries *= a->d[i];
    for (int t = p->count - 1; t >= 0; t--)
        if (a->dfactor[mode[t]]) p->first_needed = t, p->last_needed = MAX(p->last_needed, t);
    if (a->dcore) p->first_needed = 0;

    for (int t = 0; t < p->count; t++) {
        stage *s = &p->stages[t];
        *s = stage{mode[t], a->d[mode[t]], a->r[mode[t]], 1, 1};
        for (int i = 0; i < s->mode; i++) s->pre *= size[i];
        for (int i = s->mode + 1; i < a->modes; i++) s->post *= size[i];
        size[s->mode] = s->d;
        if (t < p->count - 1 && (!backward || t < p->last_needed))
            p->partial[t + 1] = carve(base, bytes, s->pre * s->d * s->post, item);
        if (!backward) continue;
        if (t) dpartial[t % 2] = MAX(dpartial[t % 2], s->pre * s->r * s->post);
        slices = MAX(slices, sliced(s->d, s->r, s->pre * s->post));
        if (s->post == 1) slices = MAX(slices, sliced(s->pre, s->r, s->d));
        if (s->pre == 1) slices = MAX(slices, sliced(s->r, s->post, s->d));
    }
    if (!backward) return;
    for (int i = 0; i < 2; i++) p->dpartial[i] = carve(base, bytes, dpartial[i], item);
    p->slices = carve(base, bytes, slices, item);
}

/* The forward's, or with dout enough for either direction. */
extern "C" size_t subspace_tucker_workspace_cuda(const subspace_ctx *, const subspace_tucker_args *a)
{
    size_t forward = 0, backward = 0;
    plan p;
    make_plan(&p, a, false, NULL, &forward);
    if (a->dout) make_plan(&p, a, true, NULL, &backward);
    return MAX(forward, backward);
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_tucker_args *a, bool backward, plan *p)
{
    size_t bytes = 0;
    TRY(subspace_tucker_check(ctx, a));
    make_plan(p, a, backward, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "tucker: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_tucker_cuda(subspace_ctx *ctx, const subspace_tucker_args *a)
{
    plan p;
    TRY(prepare(ctx, a, false, &p));
    DISPATCH(a->dtype, forward, ctx, a, &p);
}

extern "C" subspace_status subspace_tucker_backward_cuda(subspace_ctx *ctx, const subspace_tucker_args *a)
{
    plan p;
    TRY(prepare(ctx, a, true, &p));
    DISPATCH(a->dtype, backward, ctx, a, &p);
}
