/* sinkhorn_passes.h - what both directions of sinkhorn.c do with a matrix: one pass over it, rows shared among the
 * slots, column sums added up by each slot and joined in the order of the slots. Four rows at a time; partial sums of
 * a few hundred terms in T, their sums in double, so that float32 reaches marginals of 1e-6. Of a symmetric matrix
 * only the upper half is read. Included by sinkhorn_gibbs.h, without T and once per precision.
 */
#ifndef SUBSPACE_SINKHORN_PASSES_H /* --------------------------------------------- read once */
#define SUBSPACE_SINKHORN_PASSES_H
#include "cpu.h"

#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed" /* it leaves some of the loops marked simd as they are */
#endif

enum {
    ROWS = 4,           /* of one step of a pass */
    CHUNK = 512,        /* terms of a row's partial sum */
    FLUSH = 64,         /* rows of a column's partial sum, a multiple of ROWS */
    TILE_ROWS = 32,     /* of a tile; the first of each row of tiles is square, on the diagonal */
    AHEAD = 32,         /* rows */
    TILE_COLUMNS = 128, /* of the others */
    MOST_STEPS = 500    /* of conjugate gradients */
};

typedef struct sinkhorn_slot {
    double low, high, asymmetry, error, logs; /* of the slot's rows */
    int64_t empty;                            /* a row without a score, or -1 */
    bool finite;
} sinkhorn_slot;

/* One plan on its way, forward or backward. */
typedef struct sinkhorn_run {
    const subspace_sinkhorn_args *a;
    subspace_ctx *ctx;
    int64_t slots, m, n;
    bool symmetric;
    double scale;                 /* 1 / eta */
    const void *scores, *dplan;   /* of this plan, T */
    const void *row, *col;        /* [m], [n] T */
    void *plan, *dscores;         /* T */
    void *ones;                   /* [max(m, n)] T, in the place of marginals that are not given */
    void *f, *g, *last;           /* [m], [n], [n] T */
    double *alpha, *beta;         /* [m], [n] the potentials' logarithms that K contains */
    void *shift;                  /* [n] T, beta rounded */
    double high;                  /* the largest score */
    int power;                    /* sixteenths */
    const void *matrix, *in;      /* of a product with the plan */
    void *out;                    /* [m + n] or [n] T */
    void *diagonal, *rhs, *x, *p; /* [m + n] or [n] T, conjugate gradients */
    void *part;                   /* [slots, n] T, twice in the backward */
    double *total;                /* [slots, n], twice in the backward */
    sinkhorn_slot *slot;          /* [slots] */
    bool *stop;                   /* all plans */
    int64_t patience;             /* sweeps from one look at that to the next */
} sinkhorn_run;

/* Between sweeps: is the caller tired of it? */
static subspace_status go_on(const sinkhorn_run *run)
{
    if (run->ctx->interrupted && run->ctx->interrupted()) __atomic_store_n(run->stop, true, __ATOMIC_RELAXED);
    CHECK(run->ctx, !__atomic_load_n(run->stop, __ATOMIC_RELAXED), SUBSPACE_INTERRUPTED, "sinkhorn: interrupted");
    return SUBSPACE_OK;
}

/* fn for every slot. */
static void each(sinkhorn_run *run, void (*fn)(int64_t, int64_t, void *))
{
    if (run->slots == 1) fn(0, 1, run);
    else run->ctx->parallel_for(run->slots, 1, fn, run);
}

/* First row of a slot, when each of `slots` gets rows of about the same area above the diagonal, in whole rows of
 * tiles. */
static int64_t triangle_row(int64_t n, int64_t slot, int64_t slots)
{
    const int64_t row = (int64_t)((double)n * (1 - sqrt(1 - (double)slot / (double)slots)));
    return slot == slots ? n : row / TILE_ROWS * TILE_ROWS;
}

static void share_triangle(int64_t n, int64_t slot, int64_t slots, int64_t *begin, int64_t *end)
{
    *begin = triangle_row(n, slot, slots);
    *end = triangle_row(n, slot + 1, slots);
}

/* Columns of the tile at (i, j). */
static inline int64_t tile_columns(int64_t i, int64_t j)
{
    return i == j ? TILE_ROWS : TILE_COLUMNS;
}

/* Sum of the slots' totals for column j. */
static inline double join(const sinkhorn_run *run, const double *total, int64_t j)
{
    double sum = 0;
    for (int64_t s = 0; s < run->slots; s++) sum += total[s * run->n + j];
    return sum;
}

#endif
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

typedef T FN(vec) __attribute__((vector_size(VECTOR)));
typedef T FN(vecu) __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
enum { FN(LANES) = VECTOR / sizeof(T) };

static inline double FN(lanes)(FN(vec) v)
{
    T sum[FN(LANES)];
    memcpy(sum, &v, sizeof sum);
    for (int half = FN(LANES) / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) sum[l] += sum[l + half];
    return (double)sum[0];
}

/* Four rows from `i` on; rows from `end` on are the first once more, to be given weight 0. */
static inline void FN(rows_at)(const T *k, int64_t ld, int64_t i, int64_t end, const T *row[ROWS])
{
    for (int r = 0; r < ROWS; r++) row[r] = k + (i + r < end ? i + r : i) * ld;
}

/* y[r] += sum_j row[r][j] x[j] and part[j] += sum_r w[r] row[r][j], j from begin on; either may be left out by a NULL.
 * The next rows are asked for ahead: to the prefetcher each row is a new page. */
static inline __attribute__((always_inline)) void FN(stream)(const T *const row[ROWS], int64_t ld, int64_t begin,
                                                             int64_t n, const T *x, double *y, const T *w, T *part)
{
    const T *k0 = row[0], *k1 = row[1], *k2 = row[2], *k3 = row[3];
    for (int64_t j0 = begin; j0 < n; j0 += CHUNK) {
        const int64_t j1 = MIN(n, j0 + CHUNK);
        int64_t j = j0;
        FN(vec) y0 = {0}, y1 = {0}, y2 = {0}, y3 = {0};
        for (; j + FN(LANES) <= j1; j += FN(LANES)) {
            const FN(vec) a = *(const FN(vecu) *)(k0 + j), b = *(const FN(vecu) *)(k1 + j);
            const FN(vec) c = *(const FN(vecu) *)(k2 + j), d = *(const FN(vecu) *)(k3 + j);
            if (y) {
                const FN(vec) v = *(const FN(vecu) *)(x + j);
                y0 += a * v, y1 += b * v, y2 += c * v, y3 += d * v;
                __builtin_prefetch(k0 + ROWS * ld + j), __builtin_prefetch(k1 + ROWS * ld + j);
                __builtin_prefetch(k2 + ROWS * ld + j), __builtin_prefetch(k3 + ROWS * ld + j);
            }
            if (w) *(FN(vecu) *)(part + j) += (w[0] * a + w[1] * b) + (w[2] * c + w[3] * d);
        }
        for (; j < j1; j++) {
            if (y) y0[0] += k0[j] * x[j], y1[0] += k1[j] * x[j], y2[0] += k2[j] * x[j], y3[0] += k3[j] * x[j];
            if (w) part[j] += (w[0] * k0[j] + w[1] * k1[j]) + (w[2] * k2[j] + w[3] * k3[j]);
        }
        if (y) y[0] += FN(lanes)(y0), y[1] += FN(lanes)(y1), y[2] += FN(lanes)(y2), y[3] += FN(lanes)(y3);
    }
}

static void FN(dots)(const T *const row[ROWS], int64_t ld, int64_t n, const T *x, double y[ROWS])
{
    FN(stream)(row, ld, 0, n, x, y, NULL, NULL);
}

static void FN(outer)(const T *const row[ROWS], int64_t ld, int64_t n, const T w[ROWS], T *part)
{
    FN(stream)(row, ld, 0, n, NULL, NULL, w, part);
}

static void FN(dots_and_outer)(const T *const row[ROWS], int64_t ld, int64_t begin, int64_t n, const T *x,
                               double y[ROWS], const T w[ROWS], T *part)
{
    FN(stream)(row, ld, begin, n, x, y, w, part);
}

/* total += part, part = 0 */
static void FN(flush)(int64_t n, T *restrict part, double *restrict total)
{
    for (int64_t j = 0; j < n; j++) {
        total[j] += (double)part[j];
        part[j] = 0;
    }
}

/* A slot's column sums, set to zero. */
static T *FN(fresh)(const sinkhorn_run *run, int64_t slot, double **total)
{
    T *part = (T *)run->part + slot * run->n;
    *total = run->total + slot * run->n;
    memset(part, 0, (size_t)run->n * sizeof(T));
    memset(*total, 0, (size_t)run->n * sizeof(double));
    return part;
}

/* total[i] = (K x)_i from the upper half of a symmetric K, shared among the slots: K = matrix, x = in */
static void FN(triangle)(int64_t begin, int64_t end, void *arg)
{
    const sinkhorn_run *run = arg;
    const int64_t n = run->n;
    const T *k = run->matrix, *x = run->in;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        double *total;
        T *part = FN(fresh)(run, slot, &total);
        share_triangle(n, slot, run->slots, &first, &last);
        for (int64_t i = first; i < last; i += ROWS) {
            const int64_t rows = MIN(ROWS, last - i);
            const T *row[ROWS];
            T w[ROWS] = {0};
            double y[ROWS] = {0};
            FN(rows_at)(k, n, i, last, row);
            for (int64_t r = 0; r < rows; r++) {
                w[r] = x[i + r];
                y[r] += (double)row[r][i + r] * (double)x[i + r];
                for (int64_t s = r + 1; s < rows; s++) {
                    y[r] += (double)row[r][i + s] * (double)x[i + s];
                    y[s] += (double)row[r][i + s] * (double)x[i + r];
                }
            }
            FN(dots_and_outer)(row, n, i + rows, n, x, y, w, part);
            for (int64_t r = 0; r < rows; r++) total[i + r] += y[r];
            if ((i - first + ROWS) % FLUSH == 0) FN(flush)(n, part, total);
        }
        FN(flush)(n, part, total);
    }
}

/* Some rows of a symmetric matrix's upper half, or of what its lower half mirrors. */
typedef struct FN(tile) {
    T at[TILE_ROWS][TILE_COLUMNS];
} FN(tile);

typedef T FN(four) __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));

/* to = from', [rows, columns] to [columns, rows] */
static inline void FN(transpose)(const T *from, int64_t ld, int64_t rows, int64_t columns, T *to, int64_t ldt)
{
    const int64_t whole_rows = rows & ~3, whole_columns = columns & ~3;
    for (int64_t r = 0; r < whole_rows; r += 4)
        for (int64_t c = 0; c < whole_columns; c += 4) {
            const T *at = from + r * ld + c;
            T *out = to + c * ldt + r;
            const FN(four) x0 = *(const FN(four) *)at, x1 = *(const FN(four) *)(at + ld);
            const FN(four) x2 = *(const FN(four) *)(at + 2 * ld), x3 = *(const FN(four) *)(at + 3 * ld);
            const FN(four) a = __builtin_shufflevector(x0, x1, 0, 4, 1, 5);
            const FN(four) b = __builtin_shufflevector(x2, x3, 0, 4, 1, 5);
            const FN(four) c2 = __builtin_shufflevector(x0, x1, 2, 6, 3, 7);
            const FN(four) d = __builtin_shufflevector(x2, x3, 2, 6, 3, 7);
            *(FN(four) *)out = __builtin_shufflevector(a, b, 0, 1, 4, 5);
            *(FN(four) *)(out + ldt) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
            *(FN(four) *)(out + 2 * ldt) = __builtin_shufflevector(c2, d, 0, 1, 4, 5);
            *(FN(four) *)(out + 3 * ldt) = __builtin_shufflevector(c2, d, 2, 3, 6, 7);
        }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++) to[c * ldt + r] = from[r * ld + c];
}

/* The mirror image of the tile at (i, j). */
static inline void FN(mirror)(const T *from, int64_t ld, int64_t i, int64_t j, int64_t rows, int64_t columns,
                              FN(tile) *to)
{
    for (int64_t c = 0; c < columns; c += 4) {
        for (int64_t ahead = AHEAD; ahead < AHEAD + 4; ahead++) /* no prefetcher sees columns coming */
            __builtin_prefetch(from + (j + c + ahead) * ld + i, 0, 2);
        FN(transpose)(from + (j + c) * ld + i, ld, MIN(4, columns - c), rows, to->at[0] + c, TILE_COLUMNS);
    }
}

/* Writes a tile at (i, j) and its mirror image at (j, i); of one on the diagonal the upper half counts. */
static inline void FN(put)(FN(tile) *t, int64_t i, int64_t j, int64_t rows, int64_t columns, T *to, int64_t ld)
{
    if (i == j)
        for (int64_t r = 1; r < rows; r++)
            for (int64_t c = 0; c < r; c++) t->at[r][c] = t->at[c][r];
    for (int64_t r = 0; r < rows; r++) memcpy(to + (i + r) * ld + j, t->at[r], (size_t)columns * sizeof(T));
    for (int64_t c = 0; c < columns && i != j; c += 4) { /* whole cache lines, one after the other */
        for (int64_t ahead = AHEAD; ahead < AHEAD + 4; ahead++) __builtin_prefetch(to + (j + c + ahead) * ld + i, 1, 2);
        FN(transpose)(t->at[0] + c, TILE_COLUMNS, rows, MIN(4, columns - c), to + (j + c) * ld + i, ld);
    }
}

#endif
