/* panels.c - the pass over class panels: z = W xhat', and back through dz to dx and dweight.
 *
 *     forward    z = W_p xhat'                        2 b n rows flops, z handed to the epilogue
 *     backward   z kept or recomputed, epilogue makes dz of it, then
 *                dW_p    += dz xhat                   one GEMM a panel
 *                dxhat   += dz' W_p                   one GEMM a panel and block of dx
 *                dx       = (dxhat - xhat <xhat, dxhat>) / |x|
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include <float.h>
#include "panels.h"
#include "convert.h"

enum {
    PANEL_ROWS = 512,  /* with a block of 256 the tile takes 512 KiB of float32: it stays in L2 */
    BLOCK = 256,       /* batch rows in a block */
    ROUND_ROWS = 8192, /* rows of dz alive together in the backward */
    WORTH_A_THREAD = 1 << 20,
    WORTH_COPYING = 1 << 16,
    WORTH_SPLITTING = 16 /* rows, features, points: a tile of them */
};
#if defined(__AVX512F__) || defined(__aarch64__)
#define MULTIPLY_ROWS 8
#else
#define MULTIPLY_ROWS 4
#endif
#define MULTIPLY_DEPTH 512
#define MULTIPLY_STRIPS 11 /* a packed block takes about 1 MiB: it stays in L2 */

#define NORM_EPS 1e-12 /* as torch.nn.functional.normalize */

#define THIS_FILE "grassmann/panels.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "multiply.h"
#include "widen.h"
#undef BY_PAIRS /* instead of what follows, where bf16 is multiplied in pairs */
#if IS_F32 && defined(__AVX512F__)
#include "panels_pairs.h"
#include "multiply_split.h"
#define BY_PAIRS(p, call)                                                                                              \
    if ((p)->pairs) {                                                                                                  \
        call;                                                                                                          \
        return;                                                                                                        \
    }
#else
#define BY_PAIRS(p, call)
#endif

/* C (+)= A B as multiply has it. */
static void FN(product)(const panels *p, int64_t m, int64_t n, int64_t k, const T *a, int64_t ai, int64_t al,
                        const T *b, int64_t ldb, bool add, T *c, int64_t ldc, T *packed)
{
#if IS_F32 && defined(__AVX512F__)
    if (p->split) {
        multiply_split(m, n, k, a, ai, al, b, ldb, add, c, ldc, (uint32_t *)packed);
        return;
    }
#endif
    (void)p;
    FN(multiply)(m, n, k, a, ai, al, b, ldb, add, c, ldc, packed);
}

static void FN(narrow)(subspace_dtype dtype, const T *restrict src, int64_t count, void *dst, int64_t at)
{
    uint16_t *h = (uint16_t *)dst + at;
    if (dtype == SUBSPACE_F16)
        for (int64_t i = 0; i < count; i++) h[i] = f32_to_f16((float)src[i]);
    else if (dtype == SUBSPACE_BF16)
        for (int64_t i = 0; i < count; i++) h[i] = f32_to_bf16((float)src[i]);
    else memcpy((T *)dst + at, src, (size_t)count * sizeof(T));
}

/* Write the class-major tile to out[b0 + i, c0 + c], 16 x 16 at a time. */
void FN(panels_scatter)(const tile *t, const T *norms, subspace_dtype dtype, void *out, int64_t ld)
{
    const int64_t nc = t->c1 - t->c0;
    for (int64_t i0 = 0; i0 < t->nb; i0 += 16)
        for (int64_t c0 = 0; c0 < nc; c0 += 16)
            for (int64_t i = i0; i < MIN(i0 + 16, t->nb); i++) {
                T row[16];
                const int64_t m = MIN(nc - c0, 16);
                for (int64_t c = 0; c < m; c++) row[c] = norms[(c0 + c) * t->nb + i];
                FN(narrow)(dtype, row, m, out, (t->b0 + i) * ld + t->c0 + c0);
            }
}

/* The other way: norms[c, i] = in[b0 + i, c0 + c]. */
void FN(panels_gather)(const tile *t, T *norms, subspace_dtype dtype, const void *in, int64_t ld)
{
    const int64_t nc = t->c1 - t->c0;
    for (int64_t i0 = 0; i0 < t->nb; i0 += 16)
        for (int64_t c0 = 0; c0 < nc; c0 += 16)
            for (int64_t i = i0; i < MIN(i0 + 16, t->nb); i++) {
                T row[16];
                const int64_t m = MIN(nc - c0, 16);
                FN(widen)(dtype, in, (t->b0 + i) * ld + t->c0 + c0, m, row);
                for (int64_t c = 0; c < m; c++) norms[(c0 + c) * t->nb + i] = row[c];
            }
}

/* xhat = x / max(|x|, 1e-12), the length summed in double so that it cannot overflow float32. */
static void FN(normalise_rows)(int64_t begin, int64_t end, void *arg)
{
    const panels *p = arg;
    const int64_t n = p->a->n;
    for (int64_t i = begin; i < end; i++) {
        T *row = (T *)p->xhat + i * n;
        FN(widen)(p->a->dtype, p->a->x, i * n, n, row);
        if (!p->a->normalize) continue;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += (double)row[j] * (double)row[j];
        const double length = sqrt(sum), r = 1 / MAX(length, NORM_EPS);
        ((T *)p->rnorm)[i] = (T)r;
        for (int64_t j = 0; j < n; j++) row[j] = (T)(row[j] * r);
    }
}

typedef struct {
    const panels *p;
    const T *x, *proj;
    T *out; /* forward: proj to keep */
    panels_epilogue *epilogue;
    void *arg;
    int64_t first, last, block; /* backward: the panels and the block of this round */
    T *dx;                      /* backward: [nb, n] of the block */
    T *dweight;
} FN(pass);

/* xt[j, i] = xhat[i, j] for 16 rows of the batch at a time */
static void FN(transpose_rows)(int64_t begin, int64_t end, void *arg)
{
    const FN(pass) *s = arg;
    const int64_t n = s->p->a->n, b = s->p->a->b;
    T *xt = s->p->xt;
    for (int64_t i0 = begin * 16; i0 < MIN(end * 16, b); i0 += 16)
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = i0; i < MIN(i0 + 16, b); i++) xt[j * b + i] = s->x[i * n + j];
}

/* The normalised, widened rows of x, and beside them their transpose where z is to be computed. */
static void FN(prepare_x)(FN(pass) *s, bool transposed)
{
    const panels *p = s->p;
    const int64_t b = p->a->b, grain = MAX(1, WORTH_COPYING / MAX(p->a->n, 1));
    BY_PAIRS(p, pairs_prepare(p, grain, transposed))
    s->x = p->xhat ? p->xhat : p->a->x;
    if (p->xhat) p->ctx->parallel_for(b, grain, FN(normalise_rows), (void *)p);
    if (transposed) p->ctx->parallel_for(CEIL_DIV(b, 16), CEIL_DIV(grain, 16), FN(transpose_rows), s);
}

static T *FN(packed)(const panels *p, int64_t slot)
{
    return (T *)p->packed + slot * MULTIPLY_DEPTH * MULTIPLY_STRIPS * FN(STRIP);
}

/* Rows r0..r1 and columns j0..j0+m of the weight, widened into the slot's scratch if need be. */
static const T *FN(rows_of_weight)(const panels *p, int64_t slot, int64_t r0, int64_t r1, int64_t j0, int64_t m,
                                   int64_t *ld)
{
    const int64_t n = p->a->n;
    *ld = n;
    if (!p->wide) return (const T *)p->a->weight + r0 * n + j0;
    T *out = (T *)p->wide + slot * p->rows * n;
    for (int64_t r = r0; r < r1; r++) FN(widen)(p->a->dtype, p->a->weight, r * n + j0, m, out + (r - r0) * m);
    *ld = m;
    return out;
}

/* The panel's z [rows, ld]. */
static void FN(project)(const panels *p, const tile *t, T *z, int64_t ld, T *packed)
{
    BY_PAIRS(p, pairs_project(p, t, z, ld, (uint32_t *)packed))
    int64_t ldw;
    const T *w = FN(rows_of_weight)(p, t->slot, t->r0, t->r1, 0, p->a->n, &ldw);
    FN(product)(p, t->r1 - t->r0, t->nb, p->a->n, w, ldw, 1, (const T *)p->xt + t->b0, p->a->b, false, z, ld, packed);
}

/* norms[c, i] = || z_c ||, the root of the sum over the rows of class c of z[row, i]^2 */
static void FN(class_norms)(const panels *p, const tile *t, const T *z, int64_t ld, T *restrict norms)
{
    for (int64_t c = t->c0; c < t->c1; c++, norms += t->nb) {
        const int64_t first = panels_row(p, c) - t->r0, last = panels_row(p, c + 1) - t->r0;
        for (int64_t i0 = 0; i0 < t->nb; i0 += 64) {
            const int64_t m = MIN(64, t->nb - i0);
            T sum[64] = {0};
            for (int64_t r = first; r < last; r++) {
                const T *restrict row = z + r * ld + i0;
                for (int64_t i = 0; i < m; i++) sum[i] += row[i] * row[i];
            }
            for (int64_t i = 0; i < m; i++) norms[i0 + i] = sqrt(sum[i]);
        }
    }
}

/* z[row, i] = from[row, i] factor[class of row, i], from being the projections */
void FN(panels_scale)(const panels *p, const tile *t, const T *restrict factor, T *z, int64_t ld)
{
    for (int64_t c = t->c0; c < t->c1; c++, factor += t->nb)
        for (int64_t r = panels_row(p, c) - t->r0; r < panels_row(p, c + 1) - t->r0; r++) {
            const T *from = (const T *)t->from + r * t->from_ld;
#pragma omp simd
            for (int64_t i = 0; i < t->nb; i++) z[r * ld + i] = from[i] * factor[i];
        }
}

/* ------------------------------------------------------------------------------- forward */

static void FN(forward_slots)(int64_t begin, int64_t end, void *arg)
{
    const FN(pass) *s = arg;
    const panels *p = s->p;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        share(p->count * p->blocks, slot, p->slots, &first, &last);
        for (int64_t i = first; i < last; i++) {
            const tile t = panels_tile(p, i / p->blocks, i % p->blocks, slot);
            const int64_t ld = s->out ? p->a->b : t.nb;
            T *z = s->out ? s->out + t.r0 * ld + t.b0 : (T *)p->tiles + slot * p->rows * p->block;
            T *norms = (T *)p->norms + slot * p->classes * p->block;
            FN(project)(p, &t, z, ld, FN(packed)(p, slot));
            FN(class_norms)(p, &t, z, ld, norms);
            s->epilogue(s->arg, p, &t, z, ld, norms);
        }
    }
}

void FN(panels_forward)(const panels *p, T *proj, panels_epilogue *epilogue, void *arg)
{
    FN(pass) s = {.p = p, .out = proj, .epilogue = epilogue, .arg = arg};
    FN(prepare_x)(&s, true);
    p->ctx->parallel_for(p->slots, 1, FN(forward_slots), &s);
}

/* ------------------------------------------------------------------------------ backward */

/* dW_p (+)= dz xhat of the round's i-th panel. */
static void FN(add_dweight)(const FN(pass) *s, const tile *t, int64_t i, const T *z, T *packed)
{
    const int64_t n = s->p->a->n;
    (void)i;
    BY_PAIRS(s->p, pairs_dz(s->p, t, i, z, (uint32_t *)packed))
    if (!s->dweight) return;
    FN(product)(s->p, t->r1 - t->r0, n, t->nb, z, t->nb, 1, s->x + t->b0 * n, n, t->b0 > 0, s->dweight + t->r0 * n, n,
                packed);
}

/* dz of each panel of the round, then dW_p. */
static void FN(backward_panels)(int64_t begin, int64_t end, void *arg)
{
    const FN(pass) *s = arg;
    const panels *p = s->p;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        share(s->last - s->first, slot, p->slots, &first, &last);
        for (int64_t i = first; i < last; i++) {
            tile t = panels_tile(p, s->first + i, s->block, slot);
            T *packed = FN(packed)(p, slot), *z = (T *)p->tiles + (p->pairs ? slot : i) * p->rows * p->block;
            T *norms = (T *)p->norms + slot * p->classes * p->block;
            t.from = z, t.from_ld = t.nb;
            if (s->proj) t.from = s->proj + t.r0 * p->a->b + t.b0, t.from_ld = p->a->b;
            else FN(project)(p, &t, z, t.nb, packed);
            FN(class_norms)(p, &t, t.from, t.from_ld, norms);
            s->epilogue(s->arg, p, &t, z, t.nb, norms);
            FN(add_dweight)(s, &t, i, z, packed);
        }
    }
}

/* Rows i0.. and columns j0.. of dxhat (+)= dz' W_p, `h` and `m` of them, of the round's i-th panel. */
static void FN(add_dx)(const FN(pass) *s, const tile *t, int64_t i, int64_t i0, int64_t h, int64_t j0, int64_t m,
                       T *packed)
{
    const panels *p = s->p;
    const bool add = s->first + i > 0;
    BY_PAIRS(p, pairs_dx(p, t, i, add, i0, h, j0, m, s->dx, (uint32_t *)packed))
    int64_t ldw;
    const T *z = (const T *)p->tiles + i * p->rows * p->block;
    const T *w = FN(rows_of_weight)(p, t->slot, t->r0, t->r1, j0, m, &ldw);
    FN(product)(p, h, m, t->r1 - t->r0, z + i0, 1, t->nb, w, ldw, add, s->dx + i0 * p->a->n + j0, p->a->n, packed);
}

/* dxhat[block] (+)= sum over the round's panels of dz' W_p, one rectangle of dxhat at a time. */
static void FN(backward_dx)(int64_t begin, int64_t end, void *arg)
{
    const FN(pass) *s = arg;
    const panels *p = s->p;
    const int64_t n = p->a->n, nb = panels_tile(p, s->first, s->block, 0).nb;
    const int64_t cols = MIN(n, 512), across = CEIL_DIV(n, cols);
    const int64_t height = MAX(16, CEIL_DIV(nb, CEIL_DIV(p->slots, across))), down = CEIL_DIV(nb, height);
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        share(across * down, slot, p->slots, &first, &last);
        for (int64_t i = first; i < last; i++) {
            const int64_t j0 = i / down * cols, m = MIN(cols, n - j0);
            const int64_t i0 = i % down * height, h = MIN(height, nb - i0);
            for (int64_t panel = s->first; panel < s->last; panel++) {
                const tile t = panels_tile(p, panel, s->block, slot);
                FN(add_dx)(s, &t, panel - s->first, i0, h, j0, m, FN(packed)(p, slot));
            }
        }
    }
}

/* dx = (dxhat - xhat <xhat, dxhat>) / |x| of a row: the part along x does not change it once normalised. */
static void FN(row_of_dx)(const FN(pass) *s, int64_t row, T *restrict d)
{
    const int64_t n = s->p->a->n;
    BY_PAIRS(s->p, pairs_row_of_dx(s->p, row, d))
    const T *restrict x = s->x + row * n;
    const T r = ((const T *)s->p->rnorm)[row];
    double dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < n; j++) dot += (double)x[j] * (double)d[j];
    if (r >= (T)(1 / NORM_EPS)) dot = 0; /* the clamped length is a constant */
    for (int64_t j = 0; j < n; j++) d[j] = r * (d[j] - (T)dot * x[j]);
}

static void FN(finish_dx)(int64_t begin, int64_t end, void *arg)
{
    const FN(pass) *s = arg;
    const panels *p = s->p;
    const int64_t n = p->a->n, b0 = s->block * p->block;
    for (int64_t i = begin; i < end; i++) {
        if (p->a->normalize) FN(row_of_dx)(s, b0 + i, s->dx + i * n);
        if (p->dx) FN(narrow)(p->a->dtype, s->dx + i * n, n, p->a->dx, (b0 + i) * n);
    }
}

static void FN(narrow_dweight)(int64_t begin, int64_t end, void *arg)
{
    const panels *p = arg;
    const int64_t n = p->a->n;
    FN(narrow)(p->a->dtype, (const T *)p->dweight + begin * n, (end - begin) * n, p->a->dweight, begin * n);
}

void FN(panels_backward)(const panels *p, const T *proj, panels_epilogue *epilogue, void *arg)
{
    const subspace_logits_args *a = p->a;
    const int64_t n = a->n, grain = MAX(1, WORTH_COPYING / MAX(n, 1));
    FN(pass) s = {.p = p, .proj = proj, .epilogue = epilogue, .arg = arg};
    if (a->b == 0 || a->c == 0) { /* nothing flows back */
        const size_t item = a->dtype == SUBSPACE_F64 ? 8 : a->dtype == SUBSPACE_F32 ? 4 : 2;
        if (a->dx) memset(a->dx, 0, (size_t)(a->b * n) * item);
        if (a->dweight) memset(a->dweight, 0, (size_t)(a->rows * n) * item);
        return;
    }
    FN(prepare_x)(&s, proj == NULL);
    s.dweight = p->dweight ? p->dweight : a->dweight;
    for (s.block = 0; s.block < p->blocks; s.block++) {
        s.dx = p->dx ? p->dx : a->dx ? (T *)a->dx + s.block * p->block * n : NULL;
        for (s.first = 0; s.first < p->count; s.first = s.last) {
            s.last = MIN(s.first + p->round, p->count);
            p->ctx->parallel_for(p->slots, 1, FN(backward_panels), &s);
            if (s.dx) p->ctx->parallel_for(p->slots, 1, FN(backward_dx), &s);
        }
        if (s.dx && (a->normalize || p->dx))
            p->ctx->parallel_for(MIN(p->block, a->b - s.block * p->block), grain, FN(finish_dx), &s);
    }
    if (p->dweight) p->ctx->parallel_for(a->rows, grain, FN(narrow_dweight), (void *)p);
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

void LEVEL(panels_plan)(panels *p, const subspace_ctx *ctx, const subspace_logits_args *a, bool backward, char *base,
                        size_t *bytes)
{
    const bool half = a->dtype == SUBSPACE_F16 || a->dtype == SUBSPACE_BF16;
    const bool pairs = a->dtype == SUBSPACE_BF16 && subspace_cpu_bf16();
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    /* a thread is worth waking for a million multiplications or so */
    const int64_t worth = CEIL_DIV(a->b * a->rows, MAX(1, WORTH_A_THREAD / MAX(a->n, 1)));
    const int64_t slots = MAX(1, MIN(ctx->threads, worth)), mean = MAX(1, a->rows / MAX(a->c, 1));
    *p = (panels){.ctx = ctx, .a = a, .slots = slots, .pairs = pairs};
    /* for all products of a call or for none, so that no row depends on which block it is in */
    p->split = (a->dtype == SUBSPACE_F32 || a->dtype == SUBSPACE_F16) && subspace_cpu_splits() &&
               MIN(MIN(a->b, a->rows), a->n) >= WORTH_SPLITTING;

    /* enough panels for every thread, none larger than the cache likes */
    p->classes = MAX(1, MIN(PANEL_ROWS / mean, CEIL_DIV(a->c, slots)));
    p->count = CEIL_DIV(a->c, p->classes);
    for (int64_t i = 0; i < p->count; i++) {
        const int64_t rows = panels_row(p, MIN((i + 1) * p->classes, a->c)) - panels_row(p, i * p->classes);
        p->rows = MAX(p->rows, rows);
    }
    p->block = MAX(1, MIN(a->b, BLOCK));
    if (!backward && p->count < slots) /* few classes: share out the batch instead */
        p->block = MAX(MIN(16, p->block), CEIL_DIV(p->block * p->count, slots));
    p->blocks = CEIL_DIV(a->b, p->block);
    p->round = MIN(MAX(slots, ROUND_ROWS / MAX(p->rows, 1)), p->count);

    const size_t product = pairs ? sizeof(uint16_t) : item; /* of what the products take */
    if (a->normalize || (half && !pairs)) p->xhat = carve(base, bytes, a->b * a->n, product);
    p->xt = carve(base, bytes, a->b * a->n, product);
    p->packed = carve(base, bytes, slots * MULTIPLY_DEPTH * MULTIPLY_STRIPS * 3 * VECTOR, 1);
    if (a->normalize) p->rnorm = carve(base, bytes, a->b, item);
    p->tiles = carve(base, bytes, (backward && !pairs ? p->round : slots) * p->rows * p->block, item);
    p->norms = carve(base, bytes, slots * p->classes * p->block, item);
    p->spare = carve(base, bytes, slots * p->classes * p->block, item);
    if (half && (!pairs || a->n % 2))
        p->wide = carve(base, bytes, slots * p->rows * (a->n + (pairs ? a->n % 2 : 0)), product);
    if (half && backward && a->dweight && (!pairs || p->blocks > 1))
        p->dweight = carve(base, bytes, a->rows * a->n, item);
    if (half && backward && a->dx) p->dx = carve(base, bytes, p->block * a->n, item);
    if (pairs && a->normalize) p->scale = carve(base, bytes, a->b, item);
    if (pairs && backward && a->dweight) p->across = carve(base, bytes, slots * p->rows * (p->block + 1), product);
    if (pairs && backward && a->dx)
        p->down = carve(base, bytes, p->round * CEIL_DIV(p->rows, 2) * p->block, 2 * product);
}

#endif
