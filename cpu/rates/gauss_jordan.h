/* gauss_jordan.h - inverse and logdet of symmetric positive definite matrices by Gauss-Jordan elimination of the upper
 * half (statistics' sweep operator), a few pivots J at a time and without pivoting:
 *
 *     S = A_JJ = L D L',  V = L^-1 A_J.,  A <- A - V' D^-1 V  outside J,  A_J. <- L^-T D^-1 V,  A_JJ <- -S^-1
 *
 * At the end A is -A^-1. Nearly all of the d^3 flops are the rank-m updates, products of multiply.h on half the matrix:
 * at d = 128 this takes a third of the time of potrf, trtri and a product. The solves with L (rather than products with
 * S^-1) make the pivots as good as Cholesky's.
 *
 * Included by each_class.h, without T and once per precision.
 */
#ifndef SUBSPACE_GAUSS_JORDAN_H /* ------------------------------------------------ read once */
#define SUBSPACE_GAUSS_JORDAN_H
#include "cpu.h"

#define MULTIPLY_ROWS 4
#define MULTIPLY_DEPTH 64
#define MULTIPLY_STRIPS 11

enum { PIVOTS = 8, UPDATE_ROWS = 32 };

static inline int64_t elimination_scratch(int64_t d)
{
    return PIVOTS * (2 * d + MIN(MULTIPLY_STRIPS * 3 * VECTOR / 4, d + VECTOR / 4));
}

#endif
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

#include "multiply.h"

/* A[d, d] becomes -A^-1 in its upper half; what is below the diagonal is scratch. Returns half the logdet, or NaN when
 * A is not positive definite. `scratch` has elimination_scratch(d) entries. */
static double FN(eliminate)(int64_t d, T *restrict a, T *restrict scratch)
{
    T *restrict v = scratch, *restrict w = v + PIVOTS * d, *packed = w + PIVOTS * d;
    double logdet = 0;
    for (int64_t j0 = 0; j0 < d; j0 += PIVOTS) {
        const int64_t m = MIN(PIVOTS, d - j0), j1 = j0 + m;
        T l[PIVOTS][PIVOTS], inverse[PIVOTS]; /* L below the diagonal, D L' above */
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = i; j < m; j++) l[i][j] = a[(j0 + i) * d + j0 + j];
        for (int64_t k = 0; k < m; k++) {
            if (!(l[k][k] > 0 && l[k][k] < (T)INFINITY)) return NAN;
            logdet += log((double)l[k][k]);
            inverse[k] = 1 / l[k][k];
            for (int64_t i = k + 1; i < m; i++) {
                l[i][k] = l[k][i] * inverse[k];
                for (int64_t j = i; j < m; j++) l[i][j] -= l[i][k] * l[k][j];
            }
        }
        for (int64_t x = 0; x < j0; x++)
            for (int64_t i = 0; i < m; i++) v[i * d + x] = a[x * d + j0 + i];
        for (int64_t i = 0; i < m; i++) { /* with I in the columns J, which become S^-1 in the end */
            for (int64_t x = 0; x < m; x++) v[i * d + j0 + x] = i == x;
            memcpy(v + i * d + j1, a + (j0 + i) * d + j1, (size_t)(d - j1) * sizeof(T));
        }
        for (int64_t i = 0; i < m; i++) {
            T *restrict to = v + i * d;
            for (int64_t k = 0; k < i; k++)
                for (int64_t x = 0; x < d; x++) to[x] -= l[i][k] * v[k * d + x];
            for (int64_t x = 0; x < d; x++) w[i * d + x] = -inverse[i] * to[x];
        }
        for (int64_t x = 0; x < d; x += UPDATE_ROWS) FN(multiply)
        (MIN(UPDATE_ROWS, d - x), d - x, m, v + x, 1, d, w + x, d, true, a + x * d + x, d, packed);

        for (int64_t i = m - 1; i >= 0; i--)
            for (int64_t k = i + 1; k < m; k++)
                for (int64_t x = 0; x < d; x++) w[i * d + x] -= l[k][i] * w[k * d + x];
        for (int64_t x = 0; x < j0; x++)
            for (int64_t i = 0; i < m; i++) a[x * d + j0 + i] = -w[i * d + x];
        for (int64_t i = 0; i < m; i++)
            for (int64_t x = j0; x < d; x++) a[(j0 + i) * d + x] = x < j1 ? w[i * d + x] : -w[i * d + x];
    }
    return 0.5 * logdet;
}

#endif
