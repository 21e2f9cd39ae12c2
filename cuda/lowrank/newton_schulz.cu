/* newton_schulz.cu - the Newton-Schulz iteration towards the orthogonal factor U V' of x = U S V', on the GPU.
 *
 *     X_0     = x / max(|x|_F, eps)
 *     X_(k+1) = P_k X_k,       P_k = a_k I + b_k A_k + c_k A_k^2,       A_k = X_k X_k'       [s, s]
 *
 * in runs on the Gram matrix alone, Q <- P Q and A <- P (P A), as in the CPU's, and with the same backward,
 * dX <- Q dX + 2 L X. All products are cuBLAS's, of many matrices at once, in full float32: TF32's rounding, relative
 * to the Gram matrix's largest eigenvalue, is what a run could not bear. Of a symmetric one only the TILE rows by TILE
 * rows from the diagonal on, (1 + TILE/s)/2 of its operations; one kernel then adds b A + a I and mirrors it.
 *
 * On an H100, 51 TF/s without TF32, five steps of 1024 x 4096 are 54 GFLOP with nothing halved, 1.1 ms.
 */
#include "entries.cuh"
#include "linalg.cuh"

enum {
    TILE = 1024,          /* rows of a half product at one go: fewer leave a device idle */
    MOST = 1 << 28,       /* bytes of scratch for the matrices that are done together, as long as that is one */
    GRID = (1 << 16) - 1, /* blocks along y and z, at most */
};

typedef struct newton_schulz_plan {
    subspace_newton_schulz_args a;
    subspace_dtype wide;
    int64_t s, l, runs, entries;
    int64_t together; /* matrices at once, all but the last time */
    bool tall, backward;
    void *gram, *poly, *q, *rest;     /* [together, s, s]: A, P, Q, and a product on its way */
    void *dgram, *dpoly, *dq, *drest; /* [together, s, s] their derivatives; backward only */
    void *x;                          /* [2, together, m, n] or, backward, [runs, together, m, n] */
    void *dx;                         /* [2, together, m, n] backward */
    double *part, *divisor, *factor;  /* [together, 2, PARTS]; [together] each */
} newton_schulz_plan;

static void lay_out(newton_schulz_plan *p, char *base, size_t *bytes)
{
    const size_t item = p->wide == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const int64_t squares = p->together * p->s * p->s, all = p->together * p->entries;
    p->gram = carve(base, bytes, squares, item), p->poly = carve(base, bytes, squares, item);
    p->q = carve(base, bytes, squares, item), p->rest = carve(base, bytes, squares, item);
    p->x = carve(base, bytes, (p->backward ? p->runs : is_half(p->a.dtype) ? 2 : 1) * all, item);
    p->part = (double *)carve(base, bytes, p->together * 2 * PARTS, sizeof(double));
    p->divisor = (double *)carve(base, bytes, p->together, sizeof(double));
    p->factor = (double *)carve(base, bytes, p->together, sizeof(double));
    if (!p->backward) return;
    p->dgram = carve(base, bytes, squares, item), p->dpoly = carve(base, bytes, squares, item);
    p->dq = carve(base, bytes, squares, item), p->drest = carve(base, bytes, squares, item);
    p->dx = carve(base, bytes, 2 * all, item);
}

static newton_schulz_plan plan_of(const subspace_newton_schulz_args *a, char *base, size_t *bytes)
{
    newton_schulz_plan p = {};
    size_t one = 0;
    p.a = *a, p.wide = a->dtype == SUBSPACE_F64 ? SUBSPACE_F64 : SUBSPACE_F32;
    p.s = MIN(a->m, a->n), p.l = MAX(a->m, a->n), p.entries = a->m * a->n;
    p.tall = a->m > a->n, p.backward = a->dx != NULL;
    for (int64_t from = 0; from < a->steps; from += subspace_newton_schulz_run(a, from)) p.runs++;
    p.together = 1;
    lay_out(&p, NULL, &one);
    p.together = MAX((int64_t)1, MIN(MIN(a->v, (int64_t)GRID), (int64_t)(MOST / one)));
    lay_out(&p, base, bytes);
    return p;
}

static dim3 all_entries(int64_t entries, int64_t count)
{
    return dim3((unsigned)MIN(CEIL_DIV(entries, ROW_THREADS), 1024), (unsigned)count);
}

/* -------------------------------------------------------------------------------------------------------- products */

/* C = scale (L_0 R_0 + L_1 R_1) + add E + diagonal I, all [count, s, s] and C symmetric; with k > 0 the factors are
 * [count, s, k] and [count, k, s], or their transposes. */
typedef struct half_product {
    const void *left[2], *right[2];
    double scale, add, diagonal;
    const void *also;
    void *c;
    int64_t k, ld;
    bool transa, transb;
} half_product;

static half_product times(const void *left, const void *right, void *c)
{
    half_product h = {};
    h.left[0] = left, h.right[0] = right, h.scale = 1, h.c = c;
    return h;
}

/* The product rule. */
static half_product derivative(const void *left, const void *dleft, const void *right, const void *dright, void *c)
{
    half_product h = times(dleft, right, c);
    h.left[1] = left, h.right[1] = dright;
    return h;
}

template <typename A>
static subspace_status symmetric(subspace_ctx *ctx, const newton_schulz_plan *p, int64_t count, half_product h)
{
    const int64_t s = p->s, k = h.k ? h.k : s, ld = h.k ? h.ld : s;
    for (int64_t i = 0; i < s; i += TILE)
        for (int t = 0; t < 2 && h.left[t]; t++) {
            const gemms g = {MIN((int64_t)TILE, s - i),
                             s - i,
                             k,
                             count,
                             h.transa,
                             h.transb,
                             true,
                             p->wide,
                             p->wide,
                             h.scale,
                             (double)t,
                             (const A *)h.left[t] + (h.transa ? i : i * ld),
                             (const A *)h.right[t] + (h.transb ? i * ld : i),
                             (A *)h.c + i * s + i,
                             ld,
                             ld,
                             s,
                             s * k,
                             s * k,
                             s * s};
            TRY(gemm_all(ctx, &g));
        }
    const unsigned patches = (unsigned)CEIL_DIV(s, PATCH);
    LAUNCH(ctx, mirror<A>, dim3(patches, patches, (unsigned)count), dim3(PATCH, LINES), 0, s, (A *)h.c,
           (const A *)(h.also ? h.also : h.c), (A)h.add, (A)h.diagonal);
    return SUBSPACE_OK;
}

/* C = scale (Y X' + X Y'), of [s, l] or tall ones; without y: X X' */
template <typename A>
static subspace_status gram(subspace_ctx *ctx, const newton_schulz_plan *p, int64_t count, const void *x, const void *y,
                            double scale, void *c)
{
    half_product h = y ? derivative(x, y, x, y, c) : times(x, x, c);
    h.scale = scale, h.k = p->l, h.ld = p->a.n, h.transa = p->tall, h.transb = !p->tall;
    return symmetric<A>(ctx, p, count, h);
}

/* to = left right, and dto = its derivative, where there are any */
template <typename A>
static subspace_status product(subspace_ctx *ctx, const newton_schulz_plan *p, int64_t count, const void *left,
                               const void *dleft, const void *right, const void *dright, void *to, void *dto)
{
    TRY(symmetric<A>(ctx, p, count, times(left, right, to)));
    return dto ? symmetric<A>(ctx, p, count, derivative(left, dleft, right, dright, dto)) : SUBSPACE_OK;
}

/* Q of `steps` steps, of the Gram matrices of x; with dx also its derivative, of that of the Gram matrix along dx. */
template <typename A>
static subspace_status polynomial(subspace_ctx *ctx, newton_schulz_plan *p, int64_t count, const void *x,
                                  const void *dx, int64_t from, int64_t steps)
{
    TRY(gram<A>(ctx, p, count, x, NULL, 1, p->gram));
    if (dx) TRY(gram<A>(ctx, p, count, x, dx, .5, p->dgram));
    for (int64_t k = 0; k < steps; k++) {
        const double *step = p->a.coefficients + 3 * (from + k);
        void *a = p->gram, *da = p->dgram, *rest = p->rest, *drest = dx ? p->drest : NULL;
        void *poly = k ? p->poly : p->q, *dpoly = k ? p->dpoly : p->dq;
        half_product h = times(a, a, poly), d = derivative(a, da, a, da, dpoly);
        h.scale = d.scale = step[2], h.add = d.add = step[1], h.also = a, d.also = da, h.diagonal = step[0];
        TRY(symmetric<A>(ctx, p, count, h));
        if (dx) TRY(symmetric<A>(ctx, p, count, d));
        if (k + 1 < steps) {
            TRY(product<A>(ctx, p, count, poly, dpoly, a, da, rest, drest));
            if (dx) TRY(symmetric<A>(ctx, p, count, derivative(poly, dpoly, rest, drest, da)));
            TRY(symmetric<A>(ctx, p, count, times(poly, rest, a)));
        }
        if (k == 0) continue;
        TRY(product<A>(ctx, p, count, poly, dpoly, p->q, p->dq, rest, drest));
        p->rest = p->q, p->q = rest;
        if (dx) p->drest = p->dq, p->dq = drest;
    }
    return SUBSPACE_OK;
}

/* Y = Q X, or X Q, + beta Y */
template <typename A>
static subspace_status apply(subspace_ctx *ctx, const newton_schulz_plan *p, int64_t count, const void *q, double scale,
                             const void *x, double beta, void *y)
{
    const int64_t s = p->s, l = p->l;
    gemms g = {s,    l, s, count, false, false, true, p->wide, p->wide, scale,
               beta, q, x, y,     s,     l,     l,    s * s,   s * l,   s * l};
    if (p->tall) g.m = l, g.n = s, g.a = x, g.b = q, g.lda = g.ldb = g.ldc = s, g.stride_a = s * l, g.stride_b = s * s;
    return gemm_all(ctx, &g);
}

/* -------------------------------------------------------------------------------------------------------- matrices */

/* X_0 of `count` matrices, and what their entries were divided by */
template <typename T>
static subspace_status begin(subspace_ctx *ctx, const newton_schulz_plan *p, int64_t count, const T *x, void *to)
{
    typedef acc_t<T> A;
    LAUNCH(ctx, squares<T>, dim3(PARTS, (unsigned)count), ROW_THREADS, 0, p->entries, x, p->part);
    LAUNCH(ctx, lengths, (unsigned)CEIL_DIV(count, ROW_THREADS), ROW_THREADS, 0, count, p->part, p->a.eps, p->divisor);
    LAUNCH(ctx, divide<T>, all_entries(p->entries, count), ROW_THREADS, 0, p->entries, x, p->divisor, (A *)to);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status forward(subspace_ctx *ctx, newton_schulz_plan *p)
{
    typedef acc_t<T> A;
    for (int64_t v = 0; v < p->a.v; v += p->together) {
        const int64_t count = MIN(p->together, p->a.v - v);
        T *const out = (T *)p->a.y + v * p->entries;
        void *const y = is_half(p->a.dtype) ? (void *)((A *)p->x + p->together * p->entries) : (void *)out;
        void *x = p->runs % 2 ? p->x : y, *next = p->runs % 2 ? y : p->x;
        TRY(begin(ctx, p, count, (const T *)p->a.x + v * p->entries, x));
        for (int64_t from = 0, steps; from < p->a.steps; from += steps) {
            steps = subspace_newton_schulz_run(&p->a, from);
            TRY(polynomial<A>(ctx, p, count, x, NULL, from, steps));
            TRY(apply<A>(ctx, p, count, p->q, 1, x, 0, next));
            void *const done = x;
            x = next, next = done;
        }
        if (is_half(p->a.dtype))
            LAUNCH(ctx, put<T>, all_entries(p->entries, count), ROW_THREADS, 0, p->entries, (const A *)x,
                   (const A *)NULL, (const double *)NULL, (const double *)NULL, out);
    }
    return SUBSPACE_OK;
}

template <typename T> static subspace_status backward(subspace_ctx *ctx, newton_schulz_plan *p)
{
    typedef acc_t<T> A;
    const int64_t all = p->together * p->entries;
    for (int64_t v = 0; v < p->a.v; v += p->together) {
        const int64_t count = MIN(p->together, p->a.v - v);
        const dim3 grid = all_entries(p->entries, count);
        int64_t begins[SUBSPACE_STEPS + 1] = {0}, r = 0;
        A *x = (A *)p->x, *dx = (A *)p->dx, *next = dx + all;
        TRY(begin(ctx, p, count, (const T *)p->a.x + v * p->entries, x));
        for (; r + 1 < p->runs; r++) {
            begins[r + 1] = begins[r] + subspace_newton_schulz_run(&p->a, begins[r]);
            TRY(polynomial<A>(ctx, p, count, x + r * all, NULL, begins[r], begins[r + 1] - begins[r]));
            TRY(apply<A>(ctx, p, count, p->q, 1, x + r * all, 0, x + (r + 1) * all));
        }
        begins[p->runs] = p->a.steps;
        LAUNCH(ctx, divide<T>, grid, ROW_THREADS, 0, p->entries, (const T *)p->a.dy + v * p->entries,
               (const double *)NULL, dx);
        for (; r >= 0; r--) {
            TRY(polynomial<A>(ctx, p, count, x + r * all, dx, begins[r], begins[r + 1] - begins[r]));
            TRY(apply<A>(ctx, p, count, p->q, 1, dx, 0, next));
            TRY(apply<A>(ctx, p, count, p->dq, 2, x + r * all, 1, next));
            A *const done = dx;
            dx = next, next = done;
        }
        LAUNCH(ctx, dots<A>, dim3(PARTS, (unsigned)count), ROW_THREADS, 0, p->entries, x, dx, p->part);
        LAUNCH(ctx, join_dots, (unsigned)CEIL_DIV(count, ROW_THREADS), ROW_THREADS, 0, count, p->part, p->divisor,
               p->a.eps, p->factor);
        LAUNCH(ctx, put<T>, grid, ROW_THREADS, 0, p->entries, dx, x, p->factor, p->divisor,
               (T *)p->a.dx + v * p->entries);
    }
    return SUBSPACE_OK;
}

extern "C" size_t subspace_newton_schulz_workspace_cuda(const subspace_ctx *, const subspace_newton_schulz_args *a)
{
    size_t bytes = 0;
    plan_of(a, NULL, &bytes);
    return bytes;
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_newton_schulz_args *a, newton_schulz_plan *p)
{
    size_t bytes = 0;
    TRY(subspace_newton_schulz_check(ctx, a));
    *p = plan_of(a, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "newton_schulz: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_newton_schulz_cuda(subspace_ctx *ctx, const subspace_newton_schulz_args *a)
{
    subspace_newton_schulz_args without = *a;
    newton_schulz_plan p;
    without.dx = NULL;
    TRY(prepare(ctx, &without, &p));
    if (a->v * p.s == 0) return SUBSPACE_OK;
    DISPATCH(a->dtype, forward, ctx, &p);
}

extern "C" subspace_status subspace_newton_schulz_backward_cuda(subspace_ctx *ctx, const subspace_newton_schulz_args *a)
{
    newton_schulz_plan p;
    TRY(prepare(ctx, a, &p));
    if (a->v * p.s == 0) return SUBSPACE_OK;
    DISPATCH(a->dtype, backward, ctx, &p);
}
