/* tucker.c - a weight's change from a core and a factor on every mode, on the CPU.
 *
 *     G_0 = core,  G_t = G_{t-1} x_m U_m,  out = base + scale G_L         mode_product.h: one GEMM a mode
 *
 *     D_L = dout,  D_{t-1} = D_t x_m U_m',  dU_m = scale unfold(D_t) unfold(G_{t-1})',  dcore = scale D_0
 *
 * Of two neighbouring modes i then j cost d_i r_i r_j + d_i d_j r_j (times the rest), so i comes first when
 * 1/r_i - 1/d_i < 1/r_j - 1/d_j: sorting by that is optimal. Mode 0 is preferred last all the same, as long as that
 * costs no more than 1.5 times the least: the last product then is one GEMM that reads base and writes out row by row.
 * The partials G_t are small beside out and recomputed in the backward, which reads dout once.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "mode_product.h"

enum { RIGHT = 128 }; /* largest matrix of a right product that is spread over the modes after its own */

/* One mode of the chain. */
typedef struct stage {
    int mode;
    bool right;
    int64_t d, r, pre, post;
    product p;
} stage;

typedef struct plan {
    int count; /* L: modes with a factor */
    stage stage[SUBSPACE_MODES];
    int64_t core;                  /* entries of the core */
    int first_needed, last_needed; /* backward: stages whose dU or D is asked for */
    void *partial[SUBSPACE_MODES]; /* G_t, 0 < t < L */
    void *dpartial[2];             /* D_t, 0 < t < L, in turns */
    void *matrix, *packed, *lx;    /* of one stage */
    reverse reverse[SUBSPACE_MODES];
} plan;

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

static void make_plan(plan *p, const subspace_ctx *ctx, const subspace_tucker_args *a, bool backward, char *base,
                      size_t *bytes)
{
    const bool half = a->dtype == SUBSPACE_F16 || a->dtype == SUBSPACE_BF16;
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const int64_t lanes = VECTOR / (int64_t)item;
    int64_t size[SUBSPACE_MODES], matrix = 0, lx = 0, dpartial[2] = {0, 0};
    size_t packed = 0;
    int mode[SUBSPACE_MODES];
    *p = (plan){.count = order(a, mode), .core = 1, .first_needed = SUBSPACE_MODES};
    for (int64_t i = 0; i < a->modes; i++) p->core *= size[i] = a->r[i];
    for (int t = p->count - 1; t >= 0; t--)
        if (a->dfactor[mode[t]]) p->first_needed = t, p->last_needed = MAX(p->last_needed, t);
    if (a->dcore) p->first_needed = 0;

    for (int t = 0; t < p->count; t++) {
        stage *s = &p->stage[t];
        *s = (stage){.mode = mode[t], .d = a->d[mode[t]], .r = a->r[mode[t]], .pre = 1, .post = 1};
        for (int i = 0; i < s->mode; i++) s->pre *= size[i];
        for (int i = s->mode + 1; i < a->modes; i++) s->post *= size[i];
        size[s->mode] = s->d;
        s->right = s->post == 1 || (s->post < lanes && s->post * MAX(s->d, s->r) <= RIGHT);
        if (s->right) s->p = (product){1, s->pre, s->d * s->post, s->r * s->post};
        else s->p = (product){s->pre, s->d, s->post, s->r};
        const bool last = t == p->count - 1, again = !backward || t < p->last_needed;
        if (!last && again) p->partial[t + 1] = carve(base, bytes, s->pre * s->d * s->post, item);
        if (again) packed = MAX(packed, product_scratch(ctx, &s->p, item));
        if (s->right) matrix = MAX(matrix, s->d * s->r * s->post * s->post);
        if (!backward) continue;
        if (s->right) lx = MAX(lx, s->d * s->r * s->post * s->post);
        if (t) dpartial[t % 2] = MAX(dpartial[t % 2], s->pre * s->r * s->post);
    }
    p->matrix = carve(base, bytes, matrix, item);
    p->packed = carve(base, bytes, (int64_t)packed, 1);
    if (!backward) return;
    p->lx = carve(base, bytes, lx, item);
    for (int i = 0; i < 2; i++) p->dpartial[i] = carve(base, bytes, dpartial[i], item);
    size_t most = *bytes; /* the stages take turns with the rest */
    for (int t = 0; t < p->count; t++) {
        size_t end = *bytes;
        reverse_plan(&p->reverse[t], ctx, &p->stage[t].p, item, half && t == p->count - 1, false, base, &end);
        most = MAX(most, end);
    }
    *bytes = most;
}

#define THIS_FILE "tucker/tucker.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "mode_product.h"

/* The matrix of a right product: K[(i, p), (j, q)] = U[i, j] if p == q, or its transpose. */
static void FN(spread)(const stage *s, const T *u, bool transposed, T *restrict out)
{
    const int64_t row = s->post * s->r, col = s->post * s->d;
    if (s->post > 1) memset(out, 0, (size_t)(row * col) * sizeof(T));
    for (int64_t i = 0; i < s->d; i++)
        for (int64_t j = 0; j < s->r; j++)
            for (int64_t q = 0; q < s->post; q++) {
                const int64_t y = i * s->post + q, x = j * s->post + q;
                out[transposed ? x * col + y : y * row + x] = u[i * s->r + j];
            }
}

/* G_t = G_{t-1} x_m U_m; the last one joins base in out. */
static void FN(step)(const subspace_ctx *ctx, const subspace_tucker_args *a, const plan *p, int t, bool last)
{
    const stage *s = &p->stage[t];
    const T *u = a->factor[s->mode], *x = t ? p->partial[t] : a->core;
    const T scale = last ? (T)a->scale : 1;
    const subspace_dtype wide = IS_F32 ? SUBSPACE_F32 : SUBSPACE_F64;
    const void *base = last ? a->base : NULL;
    void *out = last ? a->out : p->partial[t + 1];
    if (s->right) FN(spread)(s, u, true, p->matrix);
    FN(multiply_add)
    (ctx, &s->p, s->right ? x : u, s->right ? p->matrix : x, false, scale, last ? a->dtype : wide, base, out, p->packed,
     NULL);
}

typedef struct {
    const subspace_tucker_args *a;
    T scale;
    const void *in; /* of a->dtype */
    T *out;
} FN(scaling);

static void FN(scale_into)(int64_t begin, int64_t end, void *arg)
{
    const FN(scaling) *s = arg;
    FN(widen)(s->a->dtype, s->in, begin, end - begin, s->out + begin);
    for (int64_t i = begin; i < end; i++) s->out[i] *= s->scale;
}

static void FN(copy_core)(int64_t begin, int64_t end, void *arg)
{
    const subspace_tucker_args *a = arg;
    T part[512];
    for (int64_t i = begin, n; i < end; i += n) {
        n = MIN(512, end - i);
        memcpy(part, (const T *)a->core + i, (size_t)n * sizeof(T));
        FN(add_base)(a->dtype, a->base, (T)a->scale, part, n, a->out, i);
    }
}

static subspace_status FN(forward)(subspace_ctx *ctx, const subspace_tucker_args *a)
{
    size_t bytes = 0;
    plan p;
    make_plan(&p, ctx, a, false, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "tucker: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, bytes);
    for (int t = 0; t < p.count; t++) FN(step)(ctx, a, &p, t, t == p.count - 1);
    if (p.count == 0) ctx->parallel_for(p.core, WORTH_A_THREAD, FN(copy_core), (void *)a);
    return SUBSPACE_OK;
}

/* dU of a right product from x' G = [r post, d post]: the entries with the same place after the mode. */
static void FN(fold)(const stage *s, const T *lx, T scale, T *du)
{
    for (int64_t i = 0; i < s->d; i++)
        for (int64_t j = 0; j < s->r; j++) {
            T sum = 0;
            for (int64_t q = 0; q < s->post; q++) sum += lx[(j * s->post + q) * s->d * s->post + i * s->post + q];
            du[i * s->r + j] = scale * sum;
        }
}

/* dU_m, and D_{t-1} into `dg` unless it is NULL, from x = D_t. */
static void FN(reverse_step)(const subspace_tucker_args *a, const plan *p, int t, subspace_dtype dtype, const void *x,
                             T *dg)
{
    const stage *s = &p->stage[t];
    const T *u = a->factor[s->mode], *g = t ? p->partial[t] : a->core;
    T *du = a->dfactor[s->mode];
    FN(reverse_job) job = {.p = &s->p, .r = &p->reverse[t], .dtype = dtype, .x = x};
    if (s->right) {
        if (s->post > 1 && dg) FN(spread)(s, u, false, p->matrix);
        job.left = g, job.right = s->post > 1 ? p->matrix : u, job.xr = dg, job.lx = du ? p->lx : NULL;
        FN(reverse_product)(&job);
        if (du) FN(fold)(s, p->lx, (T)a->scale, du);
    } else {
        job.left = u, job.right = g, job.turn = true, job.xr = du, job.lx = dg;
        FN(reverse_product)(&job);
        if (du) FN(join)(du, NULL, s->d * s->r, 1, (T)a->scale);
    }
}

static subspace_status FN(backward)(subspace_ctx *ctx, const subspace_tucker_args *a)
{
    const subspace_dtype wide = IS_F32 ? SUBSPACE_F32 : SUBSPACE_F64;
    size_t bytes = 0;
    plan p;
    make_plan(&p, ctx, a, true, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "tucker_backward: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    for (int t = 0; t < p.last_needed; t++) FN(step)(ctx, a, &p, t, false);
    const void *x = a->dout;
    for (int t = p.count - 1; t >= p.first_needed && t >= 0; t--) {
        const bool on = t > p.first_needed || a->dcore;
        T *dg = !on ? NULL : t ? p.dpartial[t % 2] : a->dcore;
        FN(reverse_step)(a, &p, t, t == p.count - 1 ? a->dtype : wide, x, dg);
        x = dg;
    }
    if (a->dcore && p.count == 0) {
        FN(scaling) s = {a, (T)a->scale, a->dout, a->dcore};
        ctx->parallel_for(p.core, WORTH_A_THREAD, FN(scale_into), &s);
    } else if (a->dcore) FN(join)(a->dcore, NULL, p.core, 1, (T)a->scale);
    return SUBSPACE_OK;
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

/* The forward's, or with dout enough for either direction. */
size_t LEVEL(subspace_tucker_workspace)(const subspace_ctx *ctx, const subspace_tucker_args *a)
{
    size_t forward = 0, backward = 0;
    plan p;
    make_plan(&p, ctx, a, false, NULL, &forward);
    if (a->dout) make_plan(&p, ctx, a, true, NULL, &backward);
    return MAX(forward, backward);
}

subspace_status LEVEL(subspace_tucker)(subspace_ctx *ctx, const subspace_tucker_args *a)
{
    TRY(subspace_tucker_check(ctx, a));
    DISPATCH(a->dtype, forward, ctx, a);
}

subspace_status LEVEL(subspace_tucker_backward)(subspace_ctx *ctx, const subspace_tucker_args *a)
{
    TRY(subspace_tucker_check(ctx, a));
    DISPATCH(a->dtype, backward, ctx, a);
}

#endif
