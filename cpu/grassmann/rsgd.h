/* rsgd.h - what a thread steps a class with, and the two passes over the class: columns of the rows [W; dir] (and M')
 * packed, a tile at a time, then their Gram matrix or linear combinations of them.
 *
 * Included by rsgd_careful.h, without T and once per precision.
 */
#ifndef SUBSPACE_RSGD_H /* -------------------------------------------------------- read once */
#define SUBSPACE_RSGD_H
#include "retraction.h"

enum {
    TILE = 2048,              /* numbers of a float32 tile, if its columns are not fewer than */
    LEAST_WIDTH = 256,        /* for the Gram matrix, as many as pay for adding up lanes, */
    STRIP = 128,              /* and in the second pass, where W, grad and M shall be in L1 beside it */
    AHEAD = 2,                /* lines fetched with a row of a tile and two vectors */
    WORTH_A_THREAD = 1 << 15, /* elements: about 15 microseconds */
#if defined(__AVX512F__) || defined(__aarch64__)
    DOTS_COLS = 4,    /* 4 x 4 sums and what they are made of in 32 registers */
    COMBINED_ROWS = 8 /* of two vectors each */
#else
    DOTS_COLS = 2, /* 4 x 2 in 16 */
    COMBINED_ROWS = 4
#endif
};

/* M' = mm M + mg grad + mw W,   dir = dm M' + dg grad + dw W */
typedef struct rsgd_step {
    double mm, mg, mw, dm, dg, dw;
    subspace_retraction kind;
    bool parallel, stiefel, tangent; /* tangent: M is kept so */
    bool plain;                      /* dir is M' = mm M + mg grad */
} rsgd_step;

typedef struct rsgd_ahead {
    const char *at;
    int64_t left; /* bytes */
} rsgd_ahead;

typedef struct rsgd_slot { /* what one thread works with */
    rsgd_step step;
    const subspace_frames *frames;
    int64_t row, k, kp;     /* first row of the class, its rows, rounded up as the k x k part likes it */
    int64_t blocks, packed; /* of k rows in the Gram matrix and in a tile: W, dir, M' */
    int64_t width, ld;      /* columns of a tile, and from one of its rows to the next */
    double lr;
    kxk q;
    double *gram;                                   /* [rows, rows] of the `blocks`, its lower half */
    double *R, *P, *S, *X, *f, *g, *E, *h, *Pm, *Y; /* [kp, kp] of the k x k part */
    void *pack, *coef, *dir;
    wide *many;          /* [BATCH_MATRICES, k, k] of a batch */
    rsgd_ahead ahead[3]; /* W, grad and M of the class that comes next */
} rsgd_slot;

/* What to fetch into L2 while this class is multiplied, or its memory would be waited for after that: the next `bytes`
 * of the class to come, one array after the other. Along a line of addresses a processor fetches ahead by itself; by
 * these alone, as far as its buffers for misses reach, it would get a quarter of what memory can give. */
static inline const char *fetched_with(rsgd_slot *s, int64_t bytes)
{
    rsgd_ahead *a = s->ahead;
    while (a < s->ahead + 2 && a->left <= 0) a++;
    const char *at = a->at;
    if (a->left > 0) a->at += bytes, a->left -= bytes;
    return at;
}

/* Rows of `blocks` blocks, up to whole 4 x 4 blocks of the Gram matrix. */
static inline int64_t rows_of(int64_t blocks, int64_t k)
{
    return CEIL_DIV(blocks * k, 4) * 4;
}

#endif
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

typedef T FN(vec) __attribute__((vector_size(VECTOR)));
typedef T FN(vecu) __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
typedef T FN(quad) __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
enum { FN(LANES) = VECTOR / sizeof(T) };
#include "sums.h"

/* A vector of an array that has `lanes` more, zeros after them. */
static inline FN(vec) FN(lanes_of)(const T *from, int64_t lanes)
{
    if (lanes >= FN(LANES)) return *(const FN(vecu) *)from;
    FN(vec) v = {0};
    memcpy(&v, from, (size_t)lanes * sizeof(T));
    return v;
}

static inline void FN(store)(T *to, FN(vec) v, int64_t lanes)
{
    if (lanes >= FN(LANES)) *(FN(vecu) *)to = v;
    else memcpy(to, &v, (size_t)lanes * sizeof(T));
}

typedef struct FN(weights) { /* rsgd_step's */
    T mm, mg, mw, dm, dg, dw;
} FN(weights);

static inline FN(weights) FN(weights_of)(const rsgd_step *s)
{
    return (FN(weights)){(T)s->mm, (T)s->mg, (T)s->mw, (T)s->dm, (T)s->dg, (T)s->dw};
}

/* dir and M' of a vector of W, grad and M. `plain`: dir is M', which has no part of W. */
static inline __attribute__((always_inline)) FN(vec)
    FN(direction)(const FN(weights) *by, const bool plain, FN(vec) w, FN(vec) g, FN(vec) m, FN(vec) *moved)
{
    *moved = by->mm * m + by->mg * g;
    if (plain) return *moved;
    *moved += by->mw * w;
    return by->dm * *moved + by->dg * g + by->dw * w;
}

/* The columns j0 .. j0+m of W, dir and M', each where the tile has it; with `write` M' goes to the buffer too. */
static inline __attribute__((always_inline)) void FN(load_as)(const rsgd_slot *s, int64_t j0, int64_t m, T *tile,
                                                              const bool plain, const bool write)
{
    enum { L = FN(LANES) };
    const subspace_frames *p = s->frames;
    const FN(weights) by = FN(weights_of)(&s->step);
    const int64_t n = p->n, block = s->k * s->ld;
    for (int64_t i = 0; i < s->k; i++) {
        const int64_t at = (s->row + i) * n + j0;
        const T *w = (const T *)p->weight + at, *g = (const T *)p->grad + at;
        const T *b = p->buffer ? (const T *)p->buffer + at : g; /* without a buffer mm is 0 */
        T *to = tile + i * s->ld;
        for (int64_t j = 0; j < m; j += L) {
            const FN(vec) x = FN(lanes_of)(w + j, m - j);
            FN(vec) moved;
            const FN(vec) dir =
                FN(direction)(&by, plain, x, FN(lanes_of)(g + j, m - j), FN(lanes_of)(b + j, m - j), &moved);
            *(FN(vecu) *)(to + j) = x;
            *(FN(vecu) *)(to + block + j) = dir;
            if (!plain && s->packed == 3) *(FN(vecu) *)(to + 2 * block + j) = moved;
            if (write) FN(store)((T *)b + j, moved, m - j);
        }
    }
}

/* A tile, with zeros in its padding: columns up to a whole pair of vectors, rows up to whole blocks of 4. */
static void FN(load)(const rsgd_slot *s, int64_t j0, int64_t m, T *tile, bool write)
{
    const int64_t loaded = CEIL_DIV(m, FN(LANES)) * FN(LANES), rows = s->packed * s->k;
    const int64_t padded = CEIL_DIV(m, 2 * FN(LANES)) * 2 * FN(LANES);
    const bool plain = s->step.plain;
    if (plain && write) FN(load_as)(s, j0, m, tile, true, true);
    else if (plain) FN(load_as)(s, j0, m, tile, true, false);
    else FN(load_as)(s, j0, m, tile, false, write);
    for (int64_t i = 0; i < rows && loaded < padded; i++) *(FN(vecu) *)(tile + i * s->ld + loaded) = (FN(vec)){0};
    for (int64_t i = rows; i < rows_of(s->packed, s->k); i++) memset(tile + i * s->ld, 0, (size_t)padded * sizeof(T));
}

/* gram[4, DOTS_COLS] += rows a .. a+3 times rows b .. of a tile; of a block on the diagonal the lower half. */
static inline __attribute__((always_inline)) void FN(dots_of)(const bool diagonal, const int cols, const T *a,
                                                              const T *b, int64_t ld, int64_t m, double *gram,
                                                              int64_t gram_ld, const char *ahead)
{
    enum { L = FN(LANES) };
    FN(vec) acc[16];
    T sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) acc[i] = (FN(vec)){0};
    for (int64_t j = 0; j < m; j += L) {
        FN(vec) x[4], y[4];
        __builtin_prefetch(ahead + j * (int64_t)sizeof(T), 0, 2);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) x[i] = *(const FN(vecu) *)(a + i * ld + j);
#pragma GCC unroll 4
        for (int i = 0; i < cols; i++) y[i] = *(const FN(vecu) *)(b + i * ld + j);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int c = 0; c < cols; c++)
                if (!diagonal || i >= c) acc[i * cols + c] += x[i] * y[c];
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4 * cols; i += L) {
        const FN(vec) v = FN(sums)(acc + i);
        memcpy(sum + i, &v, sizeof v);
    }
    if (cols == 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            *(fouru *)(gram + i * gram_ld) += __builtin_convertvector(*(const FN(quad) *)(sum + 4 * i), four);
    else
        for (int i = 0; i < 4; i++)
            for (int c = 0; c < cols; c++) gram[i * gram_ld + c] += (double)sum[i * cols + c];
}

static void FN(dots)(rsgd_slot *s, const T *a, const T *b, int64_t m, double *gram, int64_t gram_ld)
{
    const int64_t ld = s->ld;
    const char *ahead = fetched_with(s, m * (int64_t)sizeof(T));
    if (a == b) FN(dots_of)(true, 4, a, b, ld, m, gram, gram_ld, ahead);
    else
        for (int c = 0; c < 4; c += DOTS_COLS)
            FN(dots_of)(false, DOTS_COLS, a, b + c * ld, ld, m, gram + c, gram_ld, ahead);
}

/* The Gram matrix of the rows [W; dir] (and M') over all n columns: the first pass. */
static void FN(gram_of)(rsgd_slot *s, double *gram)
{
    const int64_t n = s->frames->n, rows = rows_of(s->blocks, s->k);
    T *tile = s->pack;
    memset(gram, 0, (size_t)(rows * rows) * sizeof *gram);
    for (int64_t j0 = 0; j0 < n; j0 += s->width) {
        const int64_t m = MIN(s->width, n - j0);
        FN(load)(s, j0, m, tile, false);
        for (int64_t i = 0; i < rows; i += 4)
            for (int64_t j = 0; j <= i; j += 4)
                FN(dots)(s, tile + i * s->ld, tile + j * s->ld, m, gram + i * rows + j, rows);
    }
}

/* `rows` rows of out = coef tile, coef [.., depth]. */
static inline
    __attribute__((always_inline)) void FN(combine_of)(const int rows, const T *coef, int64_t depth, const T *tile,
                                                       int64_t ld, int64_t m, T *out, int64_t n, const char *ahead)
{
    enum { L = FN(LANES) };
    for (int64_t j = 0; j < m; j += 2 * L) {
        FN(vec) a[8], b[8];
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) a[i] = b[i] = (FN(vec)){0};
        for (int64_t l = 0; l < depth; l++) {
#pragma GCC unroll 4
            for (int i = 0; i < AHEAD; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            const FN(vec) x = *(const FN(vecu) *)(tile + l * ld + j), y = *(const FN(vecu) *)(tile + l * ld + j + L);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) a[i] += coef[i * depth + l] * x, b[i] += coef[i * depth + l] * y;
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            T *to = out + i * n + j;
            FN(store)(to, a[i], m - j);
            if (m - j > L) FN(store)(to + L, b[i], m - j - L);
        }
    }
}

/* k rows of out = coef tile, by strips of columns that stay in L1 for all of them. */
static void FN(combine_tile)(rsgd_slot *s, const T *coef, const T *tile, int64_t m, T *out)
{
    const int64_t n = s->frames->n, k = s->k, depth = s->blocks * k, ld = s->ld;
    const int64_t strip = MAX(1, 4096 / (2 * FN(LANES) *depth)) * 2 * FN(LANES);
    for (int64_t j = 0; j < m; j += strip) {
        const int64_t cols = MIN(strip, m - j);
        for (int64_t i = 0, rows; i < k; i += rows) {
            T *to = out + i * n + j;
            const char *ahead = fetched_with(s, CEIL_DIV(cols, 2 * FN(LANES)) * depth * AHEAD * 64);
            rows = k - i >= COMBINED_ROWS ? COMBINED_ROWS : k - i >= 4 ? 4 : k - i >= 2 ? 2 : 1;
            if (rows == 8) FN(combine_of)(8, coef + i * depth, depth, tile + j, ld, cols, to, n, ahead);
            else if (rows == 4) FN(combine_of)(4, coef + i * depth, depth, tile + j, ld, cols, to, n, ahead);
            else if (rows == 2) FN(combine_of)(2, coef + i * depth, depth, tile + j, ld, cols, to, n, ahead);
            else FN(combine_of)(1, coef + i * depth, depth, tile + j, ld, cols, to, n, ahead);
        }
    }
}

/* [W; M] <- coef [W; dir; M'], coef [outputs k, blocks k], or M <- M' with one output: the second pass. `loaded`: the
 * tile has this class still, if all of its columns fit. */
static void FN(combine)(rsgd_slot *s, const T *coef, int64_t outputs, bool loaded)
{
    const subspace_frames *p = s->frames;
    const int64_t n = p->n, k = s->k;
    T *tile = s->pack;
    const int64_t width = MIN(STRIP, s->width);
    if (loaded && n <= s->width) { /* M' is its last block */
        const T *moved = tile + (s->packed - 1) * k * s->ld;
        T *buffer = p->buffer ? (T *)p->buffer + s->row * n : NULL;
        FN(combine_tile)(s, coef, tile, n, (T *)p->weight + s->row * n);
        if (outputs == 2) FN(combine_tile)(s, coef + s->blocks * k * k, tile, n, buffer);
        for (int64_t i = 0; outputs == 1 && buffer && i < k; i++)
            memcpy(buffer + i * n, moved + i * s->ld, (size_t)n * sizeof(T));
        return;
    }
    for (int64_t j0 = 0; j0 < n; j0 += width) {
        const int64_t m = MIN(width, n - j0), at = s->row * n + j0;
        FN(load)(s, j0, m, tile, outputs == 1 && p->buffer);
        FN(combine_tile)(s, coef, tile, m, (T *)p->weight + at);
        if (outputs == 2) FN(combine_tile)(s, coef + s->blocks * k * k, tile, m, (T *)p->buffer + at);
    }
}

#endif
