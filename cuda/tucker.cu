/* tucker.cu - a weight's change from a core and a factor on every mode, on the GPU.
 *
 *     G_0 = core,  G_t = G_{t-1} x_m U_m,  out = base + scale G_L         one launch a mode
 *
 *     D_L = dout,  D_{t-1} = D_t x_m U_m',  dU_m = scale unfold(D_t) unfold(G_{t-1})',  dcore = scale D_0
 *
 * The order of the modes is that of cpu/tucker.c. Every product is a batch of small ones, [d, post] for each of pre
 * places, which no single GEMM covers; a thread takes one entry and walks its sum in order. Where pre is 1 (mode 0
 * last) the two large products of the backward are GEMMs of cuBLAS, on a widened copy of dout for half types.
 */
#include <string.h>
#include "linalg.cuh"

enum { THREADS = 256 };
static const int64_t MOST_BLOCKS = 1 << 20;

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
    void *wide;                    /* half types: dout in float32 */
} plan;

static unsigned blocks(int64_t count)
{
    return (unsigned)MIN(CEIL_DIV(count, THREADS), MOST_BLOCKS);
}

#define EACH(i, count)                                                                                                 \
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += (int64_t)gridDim.x * blockDim.x)

/* out[p, i, q] = base + scale sum_j u[i ui + j uj] x[p, j, q], i < rows, j < depth; base may be out or NULL */
template <typename T, typename O>
__global__ void apply(int64_t pre, int64_t rows, int64_t depth, int64_t post, const T *u, int64_t ui, int64_t uj,
                      const T *x, T scale, const O *base, O *out)
{
    EACH(at, pre * rows * post)
    {
        const int64_t q = at % post, i = at / post % rows, p = at / post / rows;
        T sum = 0;
        for (int64_t j = 0; j < depth; j++) sum += u[i * ui + j * uj] * x[(p * depth + j) * post + q];
        sum *= scale;
        out[at] = (O)(base ? (T)base[at] + sum : sum);
    }
}

/* du[i, j] = scale sum_{p, q} x[p, i, q] g[p, j, q], a block for each entry */
template <typename T>
__global__ void factor_gradient(int64_t pre, int64_t d, int64_t r, int64_t post, const T *x, const T *g, T scale, T *du)
{
    for (int64_t at = blockIdx.x; at < d * r; at += gridDim.x) {
        const int64_t i = at / r, j = at % r;
        double sum = 0;
        for (int64_t k = threadIdx.x; k < pre * post; k += blockDim.x) {
            const int64_t p = k / post, q = k % post;
            sum += (double)x[(p * d + i) * post + q] * (double)g[(p * r + j) * post + q];
        }
        sum = block_sum(sum);
        if (threadIdx.x == 0) du[at] = (T)(scale * sum);
        __syncthreads();
    }
}

/* out = base + scale x, entry by entry */
template <typename I, typename T, typename O>
__global__ void scale_into(int64_t count, const I *x, T scale, const O *base, O *out)
{
    EACH(i, count)
    {
        const T value = scale * (T)x[i];
        out[i] = (O)(base ? (T)base[i] + value : value);
    }
}

/* G_t = G_{t-1} x_m U_m; the last one joins base in out. */
template <typename T>
static subspace_status step(subspace_ctx *ctx, const subspace_tucker_args *a, const plan *p, int t, bool last)
{
    typedef acc_t<T> W;
    const stage *s = &p->stages[t];
    const W *u = (const W *)a->factor[s->mode], *x = (const W *)(t ? p->partial[t] : a->core);
    const unsigned grid = blocks(s->pre * s->d * s->post);
    if (last)
        LAUNCH(ctx, (apply<W, T>), grid, THREADS, 0, s->pre, s->d, s->r, s->post, u, s->r, (int64_t)1, x, (W)a->scale,
               (const T *)a->base, (T *)a->out);
    else
        LAUNCH(ctx, (apply<W, W>), grid, THREADS, 0, s->pre, s->d, s->r, s->post, u, s->r, (int64_t)1, x, (W)1,
               (const W *)NULL, (W *)p->partial[t + 1]);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status forward(subspace_ctx *ctx, const subspace_tucker_args *a, const plan *p)
{
    typedef acc_t<T> W;
    for (int t = 0; t < p->count; t++) TRY(step<T>(ctx, a, p, t, t == p->count - 1));
    if (p->count == 0)
        LAUNCH(ctx, (scale_into<W, W, T>), blocks(p->core), THREADS, 0, p->core, (const W *)a->core, (W)a->scale,
               (const T *)a->base, (T *)a->out);
    return SUBSPACE_OK;
}

/* dU_m, and D_{t-1} into `dg` unless it is NULL, from x = D_t. */
template <typename T>
static subspace_status reverse_step(subspace_ctx *ctx, const subspace_tucker_args *a, const plan *p, int t,
                                    const acc_t<T> *x, acc_t<T> *dg)
{
    typedef acc_t<T> W;
    const stage *s = &p->stages[t];
    const W *u = (const W *)a->factor[s->mode], *g = (const W *)(t ? p->partial[t] : a->core);
    W *du = (W *)a->dfactor[s->mode];
    const subspace_dtype wide = a->dtype == SUBSPACE_F64 ? SUBSPACE_F64 : SUBSPACE_F32;
    if (s->pre == 1 && MAX(MAX(s->d, s->r), s->post) <= INT32_MAX) {
        if (du) {
            TRY(gemm(ctx, false, true, s->d, s->r, s->post, wide, x, s->post, g, s->post, 0, wide, du, s->r));
            LAUNCH(ctx, (scale_into<W, W, W>), blocks(s->d * s->r), THREADS, 0, s->d * s->r, (const W *)du, (W)a->scale,
                   (const W *)NULL, du);
        }
        if (dg) TRY(gemm(ctx, true, false, s->r, s->post, s->d, wide, u, s->r, x, s->post, 0, wide, dg, s->post));
        return SUBSPACE_OK;
    }
    if (du)
        LAUNCH(ctx, factor_gradient<W>, (unsigned)MIN(s->d * s->r, MOST_BLOCKS), ROW_THREADS, 0, s->pre, s->d, s->r,
               s->post, x, g, (W)a->scale, du);
    if (dg)
        LAUNCH(ctx, (apply<W, W>), blocks(s->pre * s->r * s->post), THREADS, 0, s->pre, s->r, s->d, s->post, u,
               (int64_t)1, s->r, x, (W)1, (const W *)NULL, dg);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status backward(subspace_ctx *ctx, const subspace_tucker_args *a, const plan *p)
{
    typedef acc_t<T> W;
    for (int t = 0; t < p->last_needed; t++) TRY(step<T>(ctx, a, p, t, false));
    const W *x = (const W *)a->dout;
    if (p->wide) {
        LAUNCH(ctx, (scale_into<T, W, W>), blocks(p->entries), THREADS, 0, p->entries, (const T *)a->dout, (W)1,
               (const W *)NULL, (W *)p->wide);
        x = (const W *)p->wide;
    }
    for (int t = p->count - 1; t >= p->first_needed && t >= 0; t--) {
        const bool on = t > p->first_needed || a->dcore;
        W *dg = (W *)(!on ? NULL : t ? p->dpartial[t % 2] : a->dcore);
        TRY(reverse_step<T>(ctx, a, p, t, x, dg));
        x = dg;
    }
    if (a->dcore)
        LAUNCH(ctx, (scale_into<W, W, W>), blocks(p->core), THREADS, 0, p->core, p->count ? (const W *)a->dcore : x,
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

static void make_plan(plan *p, const subspace_tucker_args *a, bool backward, char *base, size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    int64_t size[SUBSPACE_MODES], dpartial[2] = {0, 0};
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
        if (backward && t) dpartial[t % 2] = MAX(dpartial[t % 2], s->pre * s->r * s->post);
    }
    if (!backward) return;
    for (int i = 0; i < 2; i++) p->dpartial[i] = carve(base, bytes, dpartial[i], item);
    if (is_half(a->dtype)) p->wide = carve(base, bytes, p->entries, item);
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
