/* mode_product.h - the two passes of a Tucker chain.
 *
 * The product of a tensor with a factor U [d, r] along one mode, the sizes before and after it being pre and post:
 *
 *     left    C[p] = U X[p]       [d, post] for each p < pre
 *     right   C    = X K'         [pre, d post], K = U (x) I [d post, r post], where post is shorter than a vector
 *
 * Both are C[b] = A B[b] on row-major matrices. Its reverse takes x = dC, the left and right matrices of the product,
 * L = U and R[p] = X[p]' or L = X and R = K, and gives both gradients in one pass over x:
 *
 *     x R [m, k]     summed over the batch            L' x [k, n]
 *
 * Included by tucker.c, tucker_conv.c and tucker_linear.c, without T and once per precision; it brings multiply.h.
 */
#ifndef SUBSPACE_MODE_PRODUCT_H /* ------------------------------------------------ read once */
#define SUBSPACE_MODE_PRODUCT_H

#include "convert.h"
#include "cpu.h"
#include "dropout.h"

enum {
    PACKED_BYTES = 64 << 10, /* a packed block of B: little beside what a step keeps, and well within L2 */
    TILE_ROWS = 32,          /* rows of x in a tile of the reverse */
    WORTH_A_THREAD = 1 << 19
};

#if defined(__AVX512F__) || defined(__aarch64__)
#define MULTIPLY_ROWS 8
#else
#define MULTIPLY_ROWS 4
#endif
#define MULTIPLY_DEPTH 512
#define MULTIPLY_STRIPS (320 / VECTOR) /* no wider than MULTIPLY_DEPTH; as many bytes whatever the vectors */

typedef struct product {
    int64_t batch, m, n, k;
} product;

typedef struct mask { /* see dropout.h */
    uint64_t seed;
    double dropout;
} mask;

/* How a product is cut: rectangles of `height` rows and `width` columns, shared out in order, rows the fastest. */
typedef struct grid {
    int64_t slots, width, cols, height, rows;
} grid;

static int64_t slots_for(const subspace_ctx *ctx, const product *p)
{
    const int64_t work = p->batch * p->m * p->n * (p->k + 16) / WORTH_A_THREAD;
    return MAX(1, MIN(ctx->threads, work));
}

static grid product_grid(const subspace_ctx *ctx, const product *p, size_t item)
{
    const int64_t strip = 3 * VECTOR / (int64_t)item, fits = MAX(1, PACKED_BYTES / (int64_t)item / p->k / strip);
    grid g = {.slots = slots_for(ctx, p), .cols = CEIL_DIV(p->n, fits * strip)};
    /* a block of columns a thread, so that none packs what another packs too */
    if (p->batch < g.slots && p->n >= 4 * strip * g.slots) g.cols = CEIL_DIV(g.cols, g.slots) * g.slots;
    g.width = CEIL_DIV(CEIL_DIV(p->n, g.cols), strip) * strip;
    g.cols = CEIL_DIV(p->n, g.width);
    g.rows = CEIL_DIV(g.slots, p->batch * g.cols);
    g.height = CEIL_DIV(CEIL_DIV(p->m, g.rows), 8) * 8;
    g.rows = CEIL_DIV(p->m, g.height);
    return g;
}

static size_t product_scratch(const subspace_ctx *ctx, const product *p, size_t item)
{
    const grid g = product_grid(ctx, p, item);
    return (size_t)(g.slots * p->k * g.width) * item;
}

typedef struct reverse {
    const subspace_ctx *ctx;
    int64_t slots, height, width; /* of a tile of x */
    int64_t block;                /* entries of a slot's scratch for multiply.h */
    bool by_rows;                 /* slots share out the rows of x, else its columns */
    void *packed;                 /* [slots][...] scratch of multiply.h */
    void *turned;                 /* [slots][width, k] */
    void *sums;                   /* [slots][k, width or, by rows, n] L' x on its way to be turned over */
    void *wide;                   /* [slots][height, width] half types and dropout: the tile of x */
    void *partial;                /* [slots - 1][m, k] or [k, n] */
} reverse;

/* `over`: L' x is to be turned over, for a batch of one, and R is not. */
static void reverse_plan(reverse *r, const subspace_ctx *ctx, const product *p, size_t item, bool wide, bool over,
                         char *base, size_t *bytes)
{
    const int64_t lanes = VECTOR / (int64_t)item, strip = 3 * lanes;
    *r = (reverse){.ctx = ctx, .slots = slots_for(ctx, p), .height = MIN(TILE_ROWS, p->m)};
    r->by_rows = p->batch == 1 && p->m > p->n;
    r->width = MIN(MULTIPLY_STRIPS * strip, r->by_rows ? p->n : CEIL_DIV(CEIL_DIV(p->n, r->slots), strip) * strip);
    r->slots = MIN(r->slots, r->by_rows ? p->m : p->batch * CEIL_DIV(p->n, r->width));
    /* the blocks that multiply.h packs: of a tile of x, and of R, whose last strip has no more vectors than it needs */
    const int64_t tile = MIN(MULTIPLY_DEPTH, r->height) * MIN(MULTIPLY_STRIPS, CEIL_DIV(r->width, strip)) * strip;
    r->block = MAX(tile, MIN(MULTIPLY_DEPTH, r->width) * MIN(MULTIPLY_STRIPS * strip, CEIL_DIV(p->k, lanes) * lanes));
    r->packed = carve(base, bytes, r->slots * r->block, item);
    if (wide) r->wide = carve(base, bytes, r->slots * r->height * r->width, item);
    if (over) r->sums = carve(base, bytes, r->slots * p->k * (r->by_rows ? p->n : r->width), item);
    else r->turned = carve(base, bytes, r->slots * r->width * p->k, item);
    r->partial = carve(base, bytes, (r->slots - 1) * p->k * (r->by_rows ? over ? 0 : p->n : p->m), item);
}

#endif
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

#include "multiply.h"
#include "widen.h"

/* Drop what the mask drops of the entries at.. of a tensor. */
static void FN(apply)(const mask *drop, int64_t at, int64_t count, T *restrict v)
{
    for (int64_t i = 0; i < count; i++) v[i] *= (T)dropout_factor(drop->seed, (uint64_t)(at + i), drop->dropout);
}

/* out[at..] = base[at..] + scale sum, of `dtype`, rounded once; base may be out or NULL. */
static void FN(add_base)(subspace_dtype dtype, const void *base, T scale, T *restrict sum, int64_t count, void *out,
                         int64_t at)
{
    if (dtype == SUBSPACE_F32 || dtype == SUBSPACE_F64) {
        const T *from = base ? (const T *)base + at : NULL;
        T *to = (T *)out + at;
        if (!base)
            for (int64_t i = 0; i < count; i++) to[i] = scale * sum[i];
        else
#pragma omp simd
            for (int64_t i = 0; i < count; i++) to[i] = from[i] + scale * sum[i];
        return;
    }
    const uint16_t *from = base ? (const uint16_t *)base + at : NULL;
    uint16_t *to = (uint16_t *)out + at;
    for (int64_t i = 0; i < count; i++) sum[i] *= scale;
    if (dtype == SUBSPACE_F16) {
        for (int64_t i = 0; base && i < count; i++) sum[i] += f16_to_f32(from[i]);
        for (int64_t i = 0; i < count; i++) to[i] = f32_to_f16((float)sum[i]);
    } else {
        for (int64_t i = 0; base && i < count; i++) sum[i] += bf16_to_f32(from[i]);
        for (int64_t i = 0; i < count; i++) to[i] = f32_to_bf16((float)sum[i]);
    }
}

/* ------------------------------------------------------- out[b] = base[b] + scale A B[b] */

typedef struct {
    const product *p;
    grid g;
    const T *a, *b; /* b: [batch][k, n], or turned over, [n, k] */
    bool turn;
    T scale;
    subspace_dtype dtype; /* of base and out */
    const void *base;     /* or NULL */
    void *out;
    T *packed;
    const mask *drop; /* or NULL: of the sums, by their place in out */
} FN(product_job);

/* to = from + scale a strip, for rows of `ld` and whole vectors; base joins the sums in registers. */
static inline
    __attribute__((always_inline)) void FN(base_microkernel)(const int rows, const int vecs, int64_t k, const T *a,
                                                             const T *strip, T scale, const T *from, T *to, int64_t ld)
{
    enum { L = FN(LANES) };
    FN(vec) acc[8][3];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) acc[i][v] = (FN(vec)){0};
    for (int64_t l = 0; l < k; l++, strip += vecs * L) {
        FN(vec) x[3];
        for (int v = 0; v < vecs; v++) x[v] = *(const FN(vecu) *)(strip + v * L);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vecs; v++) acc[i][v] += a[i * k + l] * x[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) {
            const int64_t at = i * ld + v * L;
            FN(vec) sum = acc[i][v] * scale;
            if (from) sum = *(const FN(vecu) *)(from + at) + sum;
            *(FN(vecu) *)(to + at) = sum;
        }
}

static __attribute__((noinline)) void FN(base_rows)(int64_t k, const T *a, const T *strip, T scale, const T *from,
                                                    T *to, int64_t ld)
{
    if (from) FN(base_microkernel)(MULTIPLY_ROWS, 3, k, a, strip, scale, from, to, ld);
    else FN(base_microkernel)(MULTIPLY_ROWS, 3, k, a, strip, scale, NULL, to, ld);
}

/* Rows i..i+rows of a block of columns. Where a microkernel cannot join base itself, sums go through a tile in L1. */
static void FN(product_rows)(const FN(product_job) *s, int64_t i, int64_t rows, int64_t cols, const T *packed,
                             int64_t at)
{
    enum { TILE = 8 * FN(STRIP) };
    T tile[8 * TILE];
    const int64_t k = s->p->k, n = s->p->n;
    const T *a = s->a + i * k;
    const bool full = rows == MULTIPLY_ROWS && !s->drop && (s->dtype == SUBSPACE_F32 || s->dtype == SUBSPACE_F64);
    int64_t done = full ? cols - cols % FN(STRIP) : 0;
    for (int64_t j = 0; j < done; j += FN(STRIP)) {
        const int64_t here = at + i * n + j;
        FN(base_rows)(k, a, packed + j * k, s->scale, s->base ? (const T *)s->base + here : NULL, (T *)s->out + here,
                      n);
    }
    /* rows of one strip lie side by side: what a microkernel writes beyond a row, it overwrites with the next */
    const bool joined = n <= FN(STRIP);
    const int64_t ld = joined ? n : TILE;
    for (; done < cols; done += TILE) {
        const int64_t wide = MIN(TILE, cols - done);
        for (int64_t j = 0; j < wide; j += FN(STRIP)) {
            const int64_t vecs = CEIL_DIV(MIN(FN(STRIP), wide - j), FN(LANES)), whole = vecs * FN(LANES);
            const T *strip = packed + (done + j) * k;
            if (rows == 8) FN(microkernel_8)(vecs, k, a, k, 1, strip, tile + j, ld, whole, false);
            else if (rows == 4) FN(microkernel_4)(vecs, k, a, k, 1, strip, tile + j, ld, whole, false);
            else FN(microkernel_1)(vecs, k, a, k, 1, strip, tile + j, ld, whole, false);
        }
        if (s->drop && joined) FN(apply)(s->drop, at + i * n, rows * n, tile);
        if (joined) FN(add_base)(s->dtype, s->base, s->scale, tile, rows * n, s->out, at + i * n);
        for (int64_t q = 0; !joined && q < rows; q++) {
            if (s->drop) FN(apply)(s->drop, at + (i + q) * n + done, wide, tile + q * TILE);
            FN(add_base)(s->dtype, s->base, s->scale, tile + q * TILE, wide, s->out, at + (i + q) * n + done);
        }
    }
}

/* As pack, of a B that is stored turned over, [cols, depth]. */
static void FN(pack_turned)(const T *b, int64_t depth, int64_t cols, T *restrict out)
{
    for (int64_t j = 0; j < cols; j += FN(STRIP)) {
        const int64_t here = MIN(FN(STRIP), cols - j), width = CEIL_DIV(here, FN(LANES)) * FN(LANES);
        for (int64_t q = 0; q < width; q++)
            for (int64_t l = 0; l < depth; l++) out[j * depth + l * width + q] = q < here ? b[(j + q) * depth + l] : 0;
    }
}

static void FN(product_slots)(int64_t begin, int64_t end, void *arg)
{
    const FN(product_job) *s = arg;
    const product *p = s->p;
    const grid *g = &s->g;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last, packed_for = -1;
        T *packed = s->packed + slot * p->k * g->width;
        share(p->batch * g->cols * g->rows, slot, g->slots, &first, &last);
        for (int64_t item = first; item < last; item++) {
            const int64_t block = item / g->rows, b = block / g->cols, j0 = block % g->cols * g->width;
            const int64_t cols = MIN(g->width, p->n - j0), at = b * p->m * p->n + j0;
            const int64_t i0 = item % g->rows * g->height, i1 = MIN(i0 + g->height, p->m);
            if (block != packed_for && s->turn) FN(pack_turned)(s->b + j0 * p->k, p->k, cols, packed);
            else if (block != packed_for) FN(pack)(s->b + b * p->k * p->n + j0, p->n, p->k, cols, packed);
            packed_for = block;
            for (int64_t i = i0, rows; i < i1; i += rows) {
                rows = i1 - i >= MULTIPLY_ROWS ? MULTIPLY_ROWS : i1 - i >= 4 ? 4 : 1;
                FN(product_rows)(s, i, rows, cols, packed, at);
            }
        }
    }
}

static void FN(multiply_add)(const subspace_ctx *ctx, const product *p, const T *a, const T *b, bool turn, T scale,
                             subspace_dtype dtype, const void *base, void *out, void *scratch, const mask *drop)
{
    FN(product_job) s = {p, product_grid(ctx, p, sizeof(T)), a, b, turn, scale, dtype, base, out, scratch, drop};
    ctx->parallel_for(s.g.slots, 1, FN(product_slots), &s);
}

/* --------------------------------------------------------------------- x R and L' x at once */

typedef struct {
    const product *p;
    const reverse *r;
    subspace_dtype dtype; /* of x */
    const void *x;        /* [batch][m, n] */
    const T *left;        /* [m, k] */
    const T *right;       /* [n, k], or turned over: [batch][k, n] */
    bool turn;
    T *xr, *lx; /* [m, k] and [batch][k, n], each or NULL */
    bool over;  /* lx is [n, k], times lx_scale: as planned */
    T lx_scale;
    const mask *drop; /* or NULL: of x; the plan has room for wide tiles then */
} FN(reverse_job);

/* out[j, q] = scale in[q, j] for `n` columns of in */
static void FN(turn_over)(const T *in, int64_t ld, int64_t k, int64_t n, T scale, T *restrict out)
{
    for (int64_t j0 = 0; j0 < n; j0 += 16)
        for (int64_t q = 0; q < k; q++)
            for (int64_t j = j0; j < MIN(j0 + 16, n); j++) out[j * k + q] = scale * in[q * ld + j];
}

static void FN(reverse_slots)(int64_t begin, int64_t end, void *arg)
{
    const FN(reverse_job) *s = arg;
    const product *p = s->p;
    const reverse *r = s->r;
    const int64_t m = p->m, n = p->n, k = p->k, cols = CEIL_DIV(n, r->width);
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first = 0, last = p->batch * cols, top = 0, bottom = m;
        T *packed = (T *)r->packed + slot * r->block, *turned = (T *)r->turned + slot * r->width * k;
        T *wide = r->wide ? (T *)r->wide + slot * r->height * r->width : NULL, *xr = s->xr, *lx = s->lx;
        if (r->by_rows) share(m, slot, r->slots, &top, &bottom);
        else share(p->batch * cols, slot, r->slots, &first, &last);
        const int64_t lx_ld = s->over && !r->by_rows ? r->width : n;
        if (s->over && lx) lx = (T *)r->sums + slot * k * lx_ld;
        else if (slot > 0 && r->by_rows && lx) lx = (T *)r->partial + (slot - 1) * k * n;
        if (slot > 0 && !r->by_rows && xr) xr = (T *)r->partial + (slot - 1) * m * k;
        for (int64_t item = first; item < last; item++) {
            const int64_t b = item / cols, j0 = item % cols * r->width, w = MIN(r->width, n - j0);
            const T *right = turned;
            if (xr && s->turn) FN(turn_over)(s->right + b * k * n + j0, n, k, w, 1, turned);
            else if (xr) right = s->right + j0 * k;
            for (int64_t i0 = top; i0 < bottom; i0 += r->height) {
                const int64_t h = MIN(r->height, bottom - i0), at = (b * m + i0) * n + j0;
                const T *x = (const T *)s->x + at;
                int64_t ld = n;
                if (wide) {
                    for (int64_t i = 0; i < h; i++) {
                        FN(widen)(s->dtype, s->x, at + i * n, w, wide + i * w);
                        if (s->drop) FN(apply)(s->drop, at + i * n, w, wide + i * w);
                    }
                    x = wide, ld = w;
                }
                T *sums = lx && !(s->over && !r->by_rows) ? lx + b * k * n + j0 : lx;
                if (lx) FN(multiply)(k, w, h, s->left + i0 * k, 1, k, x, ld, i0 > top, sums, lx_ld, packed);
                if (xr) FN(multiply)(h, k, w, x, ld, 1, right, k, item > first, xr + i0 * k, k, packed);
            }
            if (lx && s->over && !r->by_rows) FN(turn_over)(lx, lx_ld, k, w, s->lx_scale, s->lx + j0 * k);
        }
    }
}

/* out = scale (out + what the other slots found) */
static void FN(join)(T *out, const T *partial, int64_t count, int64_t slots, T scale)
{
    for (int64_t s = 1; s < slots; s++, partial += count)
        for (int64_t i = 0; i < count; i++) out[i] += partial[i];
    for (int64_t i = 0; scale != 1 && i < count; i++) out[i] *= scale;
}

static void FN(reverse_product)(const FN(reverse_job) *s)
{
    const product *p = s->p;
    const reverse *r = s->r;
    r->ctx->parallel_for(r->slots, 1, FN(reverse_slots), (void *)s);
    if (r->by_rows && s->lx && s->over) {
        T *sums = r->sums;
        FN(join)(sums, sums + p->k * p->n, p->k * p->n, r->slots, 1);
        FN(turn_over)(sums, p->n, p->k, p->n, s->lx_scale, s->lx);
    } else if (r->by_rows && s->lx) FN(join)(s->lx, r->partial, p->k * p->n, r->slots, 1);
    if (!r->by_rows && s->xr) FN(join)(s->xr, r->partial, p->m * p->k, r->slots, 1);
}

#endif
