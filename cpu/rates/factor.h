/* factor.h - Gram matrices, I + X = U'U with its log-determinant, and (U'U)^-1, for sides up to a few hundred.
 *
 * Everything is made of two microkernels: rows by rows (dot products, their lanes added at the end) and rows by
 * vectors. Operands are read where they lie, through pointers to rows: at these sizes packing them, as a
 * general product does, takes as long as the product.
 *
 * Matrices are row-major, [ROUND(s, 16), ld] in memory with ld a multiple of LANES, so that they may write whole
 * blocks; what is beyond s, or below the diagonal of a symmetric or triangular matrix, is scratch.
 *
 * X comes without the identity, which joins it only under the root of a pivot: what X has left there is the argument
 * of log1p, so that the rate of small features keeps its digits.
 *
 * Included by coding_rate.h, without T and once per precision.
 */
#ifndef SUBSPACE_FACTOR_H /* ------------------------------------------------------ read once */
#define SUBSPACE_FACTOR_H
#include "cpu.h"

#define ROUND(n, to) (CEIL_DIV(n, to) * (to))

enum {
    SMALL = 256, /* sides up to here by the microkernels */
    BLOCK = 64,  /* of a larger side */
#if defined(__AVX512F__)
    ROWS = 4, /* 16 sums and what they are made of in 32 registers */
    COLS = 4,
    VECS = 4,
#else
    ROWS = 4, /* 8 in 16 */
    COLS = 2,
    VECS = 2,
#endif
};

#endif
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

#undef SOLVE
#undef INVERT
#if IS_F32
#define SOLVE solve_f32
#define INVERT invert_f32
#else
#define SOLVE solve_f64
#define INVERT invert_f64
#endif

typedef T FN(vec) __attribute__((vector_size(VECTOR)));
typedef T FN(vecu) __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
enum { FN(LANES) = VECTOR / sizeof(T) };
#include "sums.h"

/* ---------------------------------------------------------------------------- rows by rows */

/* x[i, j] (+)= alpha sum_l p_i[l] p_j[l], l from `from` to `to` in whole vectors, for ROWS x COLS of X */
static inline __attribute__((always_inline)) void FN(dots)(int64_t from, int64_t to, T alpha, const T *const *pi,
                                                           const T *const *pj, bool add, T *x, int64_t ld)
{
    enum { L = FN(LANES), SUMS = ROWS * COLS };
    FN(vec) acc[SUMS];
    T sum[SUMS];
#pragma GCC unroll 16
    for (int q = 0; q < SUMS; q++) acc[q] = (FN(vec)){0};
    for (int64_t l = from; l < to; l += L) {
        FN(vec) y[COLS];
#pragma GCC unroll 4
        for (int c = 0; c < COLS; c++) y[c] = *(const FN(vecu) *)(pj[c] + l);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const FN(vec) v = *(const FN(vecu) *)(pi[r] + l);
#pragma GCC unroll 4
            for (int c = 0; c < COLS; c++) acc[r * COLS + c] += v * y[c];
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < SUMS; q += L) *(FN(vecu) *)(sum + q) = FN(sums)(acc + q);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++) x[r * ld + c] = (add ? x[r * ld + c] : 0) + alpha * sum[r * COLS + c];
}

/* X (+)= alpha P P', the upper half: s rows of w, whole vectors, with pointers up to the next ROWS */
static void FN(gram_of_rows)(int64_t s, int64_t w, T alpha, const T *const *p, bool add, T *x, int64_t ld)
{
    for (int64_t i = 0; i < s; i += ROWS)
        for (int64_t j = i / COLS * COLS; j < s; j += COLS)
            FN(dots)(0, w, alpha, p + i, p + j, add, x + i * ld + j, ld);
}

/* ------------------------------------------------------------------------- rows by vectors */

/* c_i[j] (+)= alpha sum_l a_i[l] b_l[j], or with `square` b_l[first + i] for a_i[l]: ROWS rows i, `vecs` vectors j */
static inline __attribute__((always_inline)) void FN(microkernel)(const int vecs, const bool square, int64_t k, T alpha,
                                                                  const T *const *a, const T *const *b, int64_t first,
                                                                  int64_t j, bool add, T *const *c)
{
    enum { L = FN(LANES) };
    FN(vec) acc[ROWS][VECS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < vecs; v++) {
            acc[i][v] = (FN(vec)){0};
            __builtin_prefetch(c[i] + j + v * L, 1);
        }
    for (int64_t l = 0; l < k; l++) {
        FN(vec) y[VECS];
        for (int v = 0; v < vecs; v++) y[v] = *(const FN(vecu) *)(b[l] + j + v * L);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < vecs; v++) acc[i][v] += (square ? b[l][first + i] : a[i][l]) * y[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < vecs; v++) {
            FN(vecu) *to = (FN(vecu) *)(c[i] + j + v * L);
            acc[i][v] *= alpha;
            if (add) acc[i][v] += *to;
            *to = acc[i][v];
        }
}

static inline __attribute__((always_inline)) void FN(microkernels)(const bool square, int64_t k, T alpha,
                                                                   const T *const *a, const T *const *b, int64_t first,
                                                                   int64_t j, int64_t vecs, bool add, T *const *c)
{
    if (vecs >= 4 && VECS >= 4) FN(microkernel)(VECS, square, k, alpha, a, b, first, j, add, c);
    else if (vecs == 3 && VECS >= 3) FN(microkernel)(MIN(VECS, 3), square, k, alpha, a, b, first, j, add, c);
    else if (vecs >= 2) FN(microkernel)(2, square, k, alpha, a, b, first, j, add, c);
    else FN(microkernel)(1, square, k, alpha, a, b, first, j, add, c);
}

static __attribute__((noinline)) void FN(product_rows)(int64_t k, const T *const *a, const T *const *b, int64_t j,
                                                       int64_t vecs, T *const *c)
{
    FN(microkernels)(false, k, 1, a, b, 0, j, vecs, false, c);
}

/* c_i[j] (+)= alpha sum_l b_l[first + i] b_l[j] for ROWS rows i and j from `from` to `to`, whole vectors */
static __attribute__((noinline)) void FN(square_rows)(int64_t k, T alpha, const T *const *b, int64_t first,
                                                      int64_t from, int64_t to, bool add, T *const *c)
{
    enum { L = FN(LANES) };
    for (int64_t j = from, vecs; j < to; j += vecs * L) {
        vecs = MIN(VECS, (to - j) / L);
        FN(microkernels)(true, k, alpha, NULL, b, first, j, vecs, add, c);
    }
}

/* X (+)= alpha P' P, the upper half, from the w rows p_l of P */
static void FN(gram_of_columns)(int64_t s, int64_t w, T alpha, const T *const *p, bool add, T *x, int64_t ld)
{
    enum { L = FN(LANES) };
    for (int64_t i = 0; i < s; i += ROWS) {
        T *c[ROWS];
        for (int r = 0; r < ROWS; r++) c[r] = x + (i + r) * ld;
        FN(square_rows)(w, alpha, p, i, i / L * L, ROUND(s, L), add, c);
    }
}

/* c_i = sum_l a_i[l] b_l: m rows, with pointers up to the next ROWS, and n columns, whole vectors */
static void FN(times)(int64_t m, int64_t n, int64_t k, const T *const *a, const T *const *b, T *const *c)
{
    for (int64_t j = 0, vecs; j < n; j += vecs * FN(LANES)) {
        vecs = MIN(VECS, (n - j) / FN(LANES));
        for (int64_t i = 0; i < m; i += ROWS) FN(product_rows)(k, a + i, b, j, vecs, c + i);
    }
}

/* Pointers to the rows of a matrix, the last again up to the next ROWS. */
static void FN(point)(int64_t rows, const T *at, int64_t ld, const T **p)
{
    for (int64_t i = 0; i < ROUND(rows, ROWS); i++) p[i] = at + MIN(i, rows - 1) * ld;
}

/* ------------------------------------------------------------------------ factor, inverse */

/* U in place of X, with 1/2 log det(I + X); NaN where that is not positive definite or not finite. ROWS rows at a time:
 * less what the rows above have done, then each by those before it. */
static double FN(factor_small)(int64_t s, T *x, int64_t ld)
{
    enum { L = FN(LANES) };
    const int64_t end = ROUND(s, L);
    const T *above[SMALL];
    double half = 0, product = 1;
    for (int64_t i = 0; i < s; i += ROWS) {
        const int64_t rows = MIN(ROWS, s - i);
        T *c[ROWS];
        for (int r = 0; r < ROWS; r++) c[r] = x + (i + r) * ld;
        if (i > 0) FN(square_rows)(i, -1, above, i, i / L * L, end, true, c);
        for (int64_t k = 0; k < rows; k++) {
            const T rest = c[k][i + k], root = sqrt(1 + rest), inverse = 1 / root;
            if (!(root > 0 && inverse > 0)) return NAN;
            if (rest < (T)0.01 || !IS_F32) half += 0.5 * log1p((double)rest);
            else product *= 1 + (double)rest; /* a logarithm is slow, and double has digits to spare */
            if (product > 1e200) half += 0.5 * log(product), product = 1;
            for (int64_t j = (i + k) / L * L; j < end; j += L) *(FN(vecu) *)(c[k] + j) *= inverse;
            c[k][i + k] = root;
            for (int64_t q = k + 1; q < rows; q++) {
                const T f = c[k][i + q];
                for (int64_t j = (i + q) / L * L; j < end; j += L)
                    *(FN(vecu) *)(c[q] + j) -= f * *(const FN(vecu) *)(c[k] + j);
            }
            above[i + k] = c[k];
        }
    }
    return half + 0.5 * log(product);
}

/* W = scale (U'U)^-1, all of it: V = U^-1 from the last rows up, then V V'. v is scratch like w. */
static void FN(inverse)(int64_t s, const T *u, int64_t ld, double scale, T *v, T *w)
{
    enum { L = FN(LANES) };
    const T *a[ROWS], *p[SMALL];
    T *c[ROWS];
    memset(v, 0, (size_t)(s * ld) * sizeof(T));
    FN(point)(s, v, ld, p);
    for (int64_t i = (s - 1) / ROWS * ROWS; i >= 0; i -= ROWS) {
        const int64_t rows = MIN(ROWS, s - i), below = i + ROWS, end = ROUND(s, L);
        for (int r = 0; r < ROWS; r++) a[r] = u + (i + r) * ld + below, c[r] = v + (i + r) * ld;
        for (int64_t j = below / L * L, vecs; j < end && below < s; j += vecs * L) {
            vecs = MIN(VECS, (end - j) / L);
            FN(product_rows)(s - below, a, p + below, j, vecs, c);
        }
        for (int64_t k = rows - 1; k >= 0; k--) {
            const T *row = u + (i + k) * ld + i, inverse = 1 / row[k];
            for (int64_t j = (i + k) / L * L; j < end; j += L) {
                FN(vec) sum = *(FN(vecu) *)(c[k] + j);
                for (int64_t q = k + 1; q < rows; q++) sum += row[q] * *(const FN(vecu) *)(c[q] + j);
                *(FN(vecu) *)(c[k] + j) = -inverse * sum;
            }
            c[k][i + k] = inverse;
        }
    }
    for (int64_t i = 0; i < s; i += ROWS) /* row i of V is 0 before column i */
        for (int64_t j = 0; j < s; j += COLS)
            FN(dots)(MAX(i, j) / L * L, ROUND(s, L), (T)scale, p + i, p + j, false, w + i * ld + j, ld);
}

/* -------------------------------------------------------------------- larger, over threads */

typedef struct FN(factoring) {
    int64_t s, ld, k, nb; /* rows k .. k + nb of U are being made */
    T *x, *blocks;
} FN(factoring);

/* U_kj = U_kk^-T X_kj, chunks of BLOCK columns j */
static void FN(factor_right)(int64_t begin, int64_t end, void *arg)
{
    const FN(factoring) *f = arg;
    const T *u = f->x + f->k * f->ld + f->k;
    for (int64_t c = begin; c < end; c++) {
        const int64_t j = f->k + f->nb + c * BLOCK;
        SOLVE(false, true, f->nb, MIN(BLOCK, f->s - j), u, f->ld, f->x + f->k * f->ld + j, f->ld);
    }
}

/* X_ij -= U_ki' U_kj, chunks of BLOCK rows i, every j >= i */
static void FN(factor_below)(int64_t begin, int64_t end, void *arg)
{
    const FN(factoring) *f = arg;
    const T *u = f->x + f->k * f->ld;
    for (int64_t c = begin; c < end; c++) {
        const int64_t i = f->k + f->nb + c * BLOCK;
        GEMM(true, false, MIN(BLOCK, f->s - i), f->s - i, f->nb, -1, u + i, f->ld, u + i, f->ld, 1,
             f->x + i * f->ld + i, f->ld);
    }
}

/* D_k = U_kk^-1 of the diagonal blocks, [BLOCK, BLOCK] each. */
static void FN(invert_blocks)(int64_t begin, int64_t end, void *arg)
{
    const FN(factoring) *f = arg;
    for (int64_t b = begin; b < end; b++) {
        const int64_t k = b * BLOCK, nb = MIN(BLOCK, f->s - k);
        T *to = f->blocks + b * BLOCK * BLOCK;
        for (int64_t i = 0; i < nb; i++)
            for (int64_t j = 0; j < nb; j++) to[i * BLOCK + j] = j < i ? 0 : f->x[(k + i) * f->ld + k + j];
        INVERT(nb, to, BLOCK);
    }
}

/* P becomes P U^-1 (right) or U^-1 P, with `trans` of U', P [m, n]: by products, a BLOCK of U at a time; OpenBLAS's
 * solves are scalar along the diagonal, which takes as long as the products do. `space` has room for a BLOCK of P. */
static void FN(solve_blocks)(bool right, bool trans, int64_t m, int64_t n, const T *u, int64_t ldu, const T *blocks,
                             T *p, int64_t ld, T *space)
{
    const int64_t s = right ? n : m, count = CEIL_DIV(s, BLOCK);
    for (int64_t q = 0; q < count; q++) {
        const int64_t b = right == trans ? count - 1 - q : q, k = b * BLOCK, nb = MIN(BLOCK, s - k);
        const int64_t from = right == trans ? k + nb : 0, before = right == trans ? s - from : k; /* solved by now */
        const T *between = trans == right ? u + k * ldu + from : u + k, *d = blocks + b * BLOCK * BLOCK;
        const int64_t rows = right ? m : nb, cols = right ? nb : n;
        T *x = right ? p + k : p + k * ld;
        if (before > 0 && right) GEMM(false, trans, m, nb, before, -1, p + from, ld, between, ldu, 1, x, ld);
        if (before > 0 && !right) GEMM(trans, false, nb, n, before, -1, between, ldu, p + from * ld, ld, 1, x, ld);
        if (right) GEMM(false, trans, m, nb, nb, 1, x, ld, d, BLOCK, 0, space, nb);
        else GEMM(trans, false, nb, n, nb, 1, d, BLOCK, x, ld, 0, space, n);
        for (int64_t i = 0; i < rows; i++) memcpy(x + i * ld, space + i * cols, (size_t)cols * sizeof(T));
    }
}

/* As factor_small, for any s. Every entry is computed in one order, whatever the number of threads. */
static double FN(factor)(const subspace_ctx *ctx, int64_t s, T *x, int64_t ld)
{
    FN(factoring) f = {.s = s, .ld = ld, .x = x};
    double half = 0;
    if (s <= SMALL) return FN(factor_small)(s, x, ld);
    for (; f.k < s && !isnan(half); f.k += f.nb) {
        f.nb = MIN(BLOCK, s - f.k);
        half += FN(factor_small)(f.nb, x + f.k * ld + f.k, ld);
        const int64_t chunks = CEIL_DIV(s - f.k - f.nb, BLOCK);
        if (isnan(half) || chunks == 0) break;
        ctx->parallel_for(chunks, 1, FN(factor_right), &f);
        ctx->parallel_for(chunks, 1, FN(factor_below), &f);
    }
    return half;
}

#endif
