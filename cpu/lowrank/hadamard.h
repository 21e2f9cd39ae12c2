/* hadamard.h - Walsh-Hadamard transforms of many rows, once through each level of the memory's caches.
 *
 *     (a, b) <- (a + b, a - b)     for all pairs of entries whose places differ in one bit; bits from high to low
 *
 * A long row is a matrix of up to LINES lines: first its columns are transformed, a strip as wide as some cache lines
 * at a time, then each line in the same way, until it fits a core's own cache. Two levels of that do for 2^24 entries.
 * What fits is again a matrix, of vectors: its columns are transformed with up to 2^NEAR vectors in registers, and what
 * is left are the bits of a place within a vector. Nothing is rounded but the sums and differences themselves, so that
 * all ways to go through them give the same bits.
 *
 * Included by hadamard.c and fastfood.c, without T and once per precision.
 */
#ifndef SUBSPACE_HADAMARD_H /* --------------------------------------------- read once */
#define SUBSPACE_HADAMARD_H
#include "cpu.h"

enum {
    ROW_BYTES = 1 << 15,         /* of what fits the nearest cache, */
    LINE_BYTES = 1 << 14,        /* and of the last lines of what does not */
    LINES = 64,                  /* at a time: with STRIP bytes of each, they fit as well */
    STRIP = 512,                 /* bytes */
    NEAR = VECTOR == 64 ? 4 : 3, /* bits done at one go: of as many vectors as there are registers for, */
    FAR = 3,                     /* or of lines, which a cache has but so many places for at powers of two apart */
    PAGE = 1 << 12,              /* bytes, that rows of fewer, */
    ASKED = 1 << 10,             /* but of as many, are asked for ahead of their turn, */
    FAR_AWAY = 1 << 23,          /* where there are more of them than a cache holds */
    WORTH_A_THREAD = 1 << 15,    /* entries */
};

/* v rows of n entries on their way from x to y, in T; y may be x. */
typedef struct hadamard_rows {
    const subspace_ctx *ctx;
    int64_t v, n, slots;
    double scale;
    const void *x;
    void *y;
    void *strips; /* [slots, LINES, STRIP] bytes */
} hadamard_rows;

static int64_t lines_of(int64_t n, size_t item)
{
    return n * (int64_t)item <= ROW_BYTES ? 1 : MIN(LINES, n * (int64_t)item / LINE_BYTES);
}

static hadamard_rows plan_rows(const subspace_ctx *ctx, int64_t v, int64_t n, size_t item, char *base, size_t *bytes)
{
    hadamard_rows p = {.ctx = ctx, .v = v, .n = n, .scale = 1};
    p.slots = MAX(1, MIN(ctx->threads, v * n / WORTH_A_THREAD));
    p.strips = carve(base, bytes, lines_of(n, item) > 1 << FAR ? p.slots * LINES : 0, STRIP);
    return p;
}

#define PLACES_2(h) 0 ^ (h), 1 ^ (h)
#define PLACES_4(h) PLACES_2(h), 2 ^ (h), 3 ^ (h)
#define PLACES_8(h) PLACES_4(h), 4 ^ (h), 5 ^ (h), 6 ^ (h), 7 ^ (h)
#define PLACES_16(h) PLACES_8(h), 8 ^ (h), 9 ^ (h), 10 ^ (h), 11 ^ (h), 12 ^ (h), 13 ^ (h), 14 ^ (h), 15 ^ (h)

#endif
#ifdef T /* ----------------------------------------------------------------- read twice */

typedef T FN(vec) __attribute__((vector_size(VECTOR)));
typedef T FN(vecu) __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
enum { FN(LANES) = VECTOR / sizeof(T) };

#undef PLACES
#if IS_F32
#if VECTOR == 64
#define PLACES PLACES_16
#elif VECTOR == 32
#define PLACES PLACES_8
#else
#define PLACES PLACES_4
#endif
#else
#if VECTOR == 64
#define PLACES PLACES_8
#elif VECTOR == 32
#define PLACES PLACES_4
#else
#define PLACES PLACES_2
#endif
#endif

/* Transforms of n neighbours within a vector: where bit h is set, b meets a, and a - b is needed. */
static inline __attribute__((always_inline)) FN(vec) FN(within)(FN(vec) v, const int n)
{
#define BIT(h)                                                                                                         \
    if (n > (h) && FN(LANES) > (h)) {                                                                                  \
        FN(vec) sign = {0};                                                                                            \
        for (int i = 0; i < FN(LANES); i++) sign[i] = i & (h) ? -1 : 1;                                                \
        v = __builtin_shufflevector(v, v, PLACES((h) & (FN(LANES) - 1))) + sign * v;                                   \
    }
    BIT(8)
    BIT(4)
    BIT(2)
    BIT(1)
#undef BIT
    return v;
}

/* The bits of a row's number that 2^bits rows differ in: of those `step` rows apart, all of them among `span` rows.
 * Rows of x are xs entries apart, of y ys; `width` entries of each. The last pass over short rows, that of single
 * vectors, ends with the bits of a place within them. What comes next, at in and out, is asked for, a vector for each
 * of these: rows of a page or less are too short for a prefetcher. */
static inline __attribute__((always_inline)) void FN(butterflies)(const T *x, int64_t xs, T *y, int64_t ys,
                                                                  int64_t step, int64_t width, const int bits,
                                                                  const bool last, T scale, const T *in, const T *out)
{
    enum { MOST = 1 << NEAR };
    const int count = 1 << bits;
    for (int64_t row = 0; row < step; row++)
        for (int64_t i = 0; i < width; i += FN(LANES)) {
            const T *from = x + row * xs + i;
            T *to = y + row * ys + i;
            FN(vec) v[MOST];
            if (in) {
#pragma GCC unroll 16
                for (int k = 0; k < count; k++) __builtin_prefetch(in + k * FN(LANES), 0, 2);
                in += count * FN(LANES);
            }
            if (out) {
#pragma GCC unroll 16
                for (int k = 0; k < count; k++) __builtin_prefetch(out + k * FN(LANES), 1, 2);
                out += count * FN(LANES);
            }
#pragma GCC unroll 16
            for (int k = 0; k < count; k++) v[k] = *(const FN(vecu) *)(from + k * step * xs);
#pragma GCC unroll 4
            for (int bit = bits - 1; bit >= 0; bit--)
#pragma GCC unroll 8
                for (int pair = 0; pair < count / 2; pair++) {
                    const int low = pair >> bit << (bit + 1) | (pair & ((1 << bit) - 1)), high = low | 1 << bit;
                    const FN(vec) a = v[low], b = v[high];
                    v[low] = a + b, v[high] = a - b;
                }
#pragma GCC unroll 16
            for (int k = 0; k < count; k++)
                *(FN(vecu) *)(to + k * step * ys) = last ? FN(within)(v[k], FN(LANES)) * scale : v[k];
        }
}

static void FN(pass)(const T *x, int64_t xs, T *y, int64_t ys, int64_t rows, int64_t step, int64_t width, int bits,
                     bool last, T scale, const T *in, const T *out)
{
    const int64_t span = step << bits;
#define CASE(count, end)                                                                                               \
    case 2 * (count) + (end):                                                                                          \
        for (int64_t at = 0; at < rows; at += span)                                                                    \
            FN(butterflies)(x + at * xs, xs, y + at * ys, ys, step, width, count, end, scale,                          \
                            in ? in + at * xs : NULL, out ? out + at * ys : NULL);                                     \
        return
    switch (2 * bits + last) {
        CASE(1, 0);
        CASE(2, 0);
        CASE(3, 0);
        CASE(1, 1);
        CASE(2, 1);
        CASE(3, 1);
#if VECTOR == 64
        CASE(4, 0);
        CASE(4, 1);
#endif
    }
#undef CASE
}

/* Columns of `rows` rows, a power of two: as few passes of at most `most` bits as that takes, each of as many. What
 * lies between two of them is in `between`, whose rows are bs apart. `next`: entries from here to the next such rows.
 */
static void FN(columns)(const T *x, int64_t xs, T *y, int64_t ys, T *between, int64_t bs, int64_t rows, int64_t width,
                        int most, bool last, T scale, int64_t next)
{
    const int bits = __builtin_ctzll((uint64_t)rows), passes = CEIL_DIV(bits, most);
    for (int pass = 0, left = bits; pass < passes; pass++) {
        const int now = CEIL_DIV(left, passes - pass);
        const bool end = pass == passes - 1;
        left -= now;
        FN(pass)(pass ? between : x, pass ? bs : xs, end ? y : between, end ? ys : bs, rows, (int64_t)1 << left, width,
                 now, end && last, scale, next && !pass ? x + next : NULL, next && end ? y + next : NULL);
    }
}

/* Rows of at most a vector, side by side; the last vector may not be full. */
static inline __attribute__((always_inline)) void FN(neighbours)(const T *x, T *y, int64_t count, const int n, T scale)
{
    int64_t i = 0;
    for (; i + FN(LANES) <= count; i += FN(LANES))
        *(FN(vecu) *)(y + i) = FN(within)(*(const FN(vecu) *)(x + i), n) * scale;
    if (i == count) return;
    FN(vec) v = {0};
    memcpy(&v, x + i, (size_t)(count - i) * sizeof(T));
    v = FN(within)(v, n) * scale;
    memcpy(y + i, &v, (size_t)(count - i) * sizeof(T));
}

static void FN(tiny_rows)(const T *x, T *y, int64_t count, int64_t n, T scale)
{
    if (n == 1) FN(neighbours)(x, y, count, 1, scale);
    else if (n == 2) FN(neighbours)(x, y, count, 2, scale);
    else if (n == 4) FN(neighbours)(x, y, count, 4, scale);
    else if (n == 8) FN(neighbours)(x, y, count, 8, scale);
    else FN(neighbours)(x, y, count, 16, scale);
}

/* `count` entries of rows of n that fit the nearest cache */
static void FN(short_rows)(const T *x, T *y, int64_t count, int64_t n, T scale)
{
    enum { L = FN(LANES) };
    if (n <= L) FN(tiny_rows)(x, y, count, n, scale);
    else {
        const int64_t bytes = n * (int64_t)sizeof(T), next = n * MAX(1, PAGE / bytes);
        const bool far = x != y && bytes >= ASKED && count * (int64_t)sizeof(T) >= FAR_AWAY;
        for (int64_t i = 0; i < count; i += n)
            FN(columns)(x + i, L, y + i, L, y + i, L, n / L, L, NEAR, true, scale, far && i + next < count ? next : 0);
    }
}

/* Some strips of a long row's columns */
static void FN(strips)(const T *x, T *y, int64_t n, T *strip, int64_t begin, int64_t end)
{
    const int64_t lines = lines_of(n, sizeof(T)), line = n / lines, width = STRIP / sizeof(T);
    for (int64_t at = begin * width; at < end * width; at += width)
        FN(columns)(x + at, line, y + at, line, strip, width, lines, width, FAR, false, 1, 0);
}

/* `count` entries of rows of any n */
static void FN(rows)(const T *x, T *y, int64_t count, int64_t n, T *strip, T scale)
{
    const int64_t lines = lines_of(n, sizeof(T)), line = n / lines;
    if (lines == 1) FN(short_rows)(x, y, count, n, scale);
    else
        for (int64_t i = 0; i < count; i += n) {
            FN(strips)(x + i, y + i, n, strip, 0, line * (int64_t)sizeof(T) / STRIP);
            FN(rows)(y + i, y + i, n, line, strip, scale);
        }
}

static T *FN(strip_of)(const hadamard_rows *p, int64_t slot)
{
    return (T *)p->strips + slot * LINES * (STRIP / (int64_t)sizeof(T));
}

/* Each slot some whole rows, */
static void FN(whole_rows)(int64_t begin, int64_t end, void *arg)
{
    const hadamard_rows *p = arg;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t from, to;
        share(p->v, slot, p->slots, &from, &to);
        FN(rows)((const T *)p->x + from * p->n, (T *)p->y + from * p->n, (to - from) * p->n, p->n,
                 FN(strip_of)(p, slot), (T)p->scale);
    }
}

/* or of one long row some strips, */
static void FN(shared_columns)(int64_t begin, int64_t end, void *arg)
{
    const hadamard_rows *p = arg;
    const int64_t line = p->n / lines_of(p->n, sizeof(T));
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t from, to;
        share(line * (int64_t)sizeof(T) / STRIP, slot, p->slots, &from, &to);
        FN(strips)(p->x, p->y, p->n, FN(strip_of)(p, slot), from, to);
    }
}

/* then some lines. */
static void FN(shared_lines)(int64_t begin, int64_t end, void *arg)
{
    const hadamard_rows *p = arg;
    const int64_t lines = lines_of(p->n, sizeof(T)), line = p->n / lines;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t from, to;
        share(lines, slot, p->slots, &from, &to);
        T *y = (T *)p->y + from * line;
        FN(rows)(y, y, (to - from) * line, line, FN(strip_of)(p, slot), (T)p->scale);
    }
}

static void FN(transform_rows)(const hadamard_rows *p)
{
    if (p->v >= p->slots || lines_of(p->n, sizeof(T)) == 1) {
        p->ctx->parallel_for(p->slots, 1, FN(whole_rows), (void *)p);
        return;
    }
    for (int64_t v = 0; v < p->v; v++) {
        hadamard_rows one = *p;
        one.x = (const T *)p->x + v * p->n, one.y = (T *)p->y + v * p->n;
        p->ctx->parallel_for(p->slots, 1, FN(shared_columns), &one);
        p->ctx->parallel_for(p->slots, 1, FN(shared_lines), &one);
    }
}

#endif
