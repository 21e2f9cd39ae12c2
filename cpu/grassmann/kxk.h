/* kxk.h - the algebra of small square matrices of double, of which retraction.h and rsgd.c make the k x k part of a
 * step. Matrices are [ld, ld] with zeros outside [k, k]; ld is 4 or a multiple of 8.
 *
 * Included by retraction.h; double alone, so once.
 */
#ifndef SUBSPACE_KXK_H
#define SUBSPACE_KXK_H
#include "cpu.h"

typedef struct kxk { /* scratch and shape of the k x k algebra of one thread */
    int64_t k, ld;
    double *scratch, *spare; /* [ld, ld], three of them in `spare` */
    double *values;          /* [3 ld] of eigenvalues */
} kxk;

typedef double four __attribute__((vector_size(32)));
typedef double wide __attribute__((vector_size(VECTOR)));
typedef double fouru __attribute__((vector_size(32), aligned(8), may_alias));
typedef double wideu __attribute__((vector_size(VECTOR), aligned(8), may_alias));
enum {
    WIDE = VECTOR / sizeof(double),
    HEIGHT = WIDE < 4 ? 4 : WIDE
}; /* HEIGHT x 8 sums, or twice that, in registers */

/* c = a b for HEIGHT rows and `vecs` vectors of c */
static inline __attribute__((always_inline)) void product_tile(const int vecs, int64_t ld, const double *a,
                                                               const double *b, double *c)
{
    wide sum[HEIGHT][4];
#pragma GCC unroll 8
    for (int i = 0; i < HEIGHT; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sum[i][v] = (wide){0};
    for (int64_t l = 0; l < ld; l++) {
        wide x[4];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) x[v] = *(const wideu *)(b + l * ld + v * WIDE);
#pragma GCC unroll 8
        for (int i = 0; i < HEIGHT; i++)
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) sum[i][v] += a[i * ld + l] * x[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < HEIGHT; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) *(wideu *)(c + i * ld + v * WIDE) = sum[i][v];
}

/* rows a, b, c, d of four as the columns of `to` */
static inline __attribute__((always_inline)) void turn_rows(const double *a, const double *b, const double *c,
                                                            const double *d, int64_t ld, double *to)
{
    const four p = *(const fouru *)a, q = *(const fouru *)b, r = *(const fouru *)c, s = *(const fouru *)d;
    const four pq = __builtin_shufflevector(p, q, 0, 4, 2, 6), pq1 = __builtin_shufflevector(p, q, 1, 5, 3, 7);
    const four rs = __builtin_shufflevector(r, s, 0, 4, 2, 6), rs1 = __builtin_shufflevector(r, s, 1, 5, 3, 7);
    *(fouru *)to = __builtin_shufflevector(pq, rs, 0, 1, 4, 5);
    *(fouru *)(to + ld) = __builtin_shufflevector(pq1, rs1, 0, 1, 4, 5);
    *(fouru *)(to + 2 * ld) = __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
    *(fouru *)(to + 3 * ld) = __builtin_shufflevector(pq1, rs1, 2, 3, 6, 7);
}

/* b = a', 4 x 4 */
static inline __attribute__((always_inline)) void turn(int64_t ld, const double *a, double *b)
{
    turn_rows(a, a + ld, a + 2 * ld, a + 3 * ld, ld, b);
}

/* b = a'; b is not a */
static inline void transpose(const kxk *s, const double *a, double *b)
{
    for (int64_t i = 0; i < s->ld; i += 4)
        for (int64_t j = 0; j < s->ld; j += 4) turn(s->ld, a + i * s->ld + j, b + j * s->ld + i);
}

/* what is below the diagonal of a above it too */
static inline void mirror(const kxk *s, double *a)
{
    for (int64_t i = 0; i < s->ld; i += 4) {
        for (int64_t j = 0; j < i; j += 4) turn(s->ld, a + i * s->ld + j, a + j * s->ld + i);
        for (int64_t r = i + 1; r < i + 4; r++)
            for (int64_t c = i; c < r; c++) a[c * s->ld + r] = a[r * s->ld + c];
    }
}

/* c = a b; c is neither a nor b. Of a symmetric c what is above the diagonal is copied from below. */
static inline __attribute__((always_inline)) void product_of(const kxk *s, const bool symmetric, const double *a,
                                                             const double *b, double *c)
{
    const int64_t ld = s->ld;
    if (ld == 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            four sum = {0};
#pragma GCC unroll 4
            for (int l = 0; l < 4; l++) sum += a[i * 4 + l] * *(const fouru *)(b + l * 4);
            *(fouru *)(c + i * 4) = sum;
        }
        if (symmetric) mirror(s, c);
        return;
    }
    if (ld == 8) {
        for (int64_t i = 0; i < 8; i += HEIGHT) product_tile(8 / WIDE, 8, a + i * 8, b, c + i * 8);
        if (symmetric) mirror(s, c);
        return;
    }
    for (int64_t i = 0; i < ld; i += HEIGHT)
        for (int64_t j = 0, cols; j < (symmetric ? i + HEIGHT : ld); j += cols) {
            cols = WIDE == 8 && ld - j >= 16 ? 16 : 8;
            if (cols == 16) product_tile(16 / WIDE > 4 ? 4 : 16 / WIDE, ld, a + i * ld, b + j, c + i * ld + j);
            else product_tile(8 / WIDE, ld, a + i * ld, b + j, c + i * ld + j);
        }
    if (symmetric) mirror(s, c);
}

static void product(const kxk *s, const double *a, const double *b, double *c)
{
    product_of(s, false, a, b, c);
}

/* of symmetric matrices that commute, or of a matrix and its transpose */
static void product_symmetric(const kxk *s, const double *a, const double *b, double *c)
{
    product_of(s, true, a, b, c);
}

/* c = a b'; s->spare is overwritten */
static void product_t(const kxk *s, const double *a, const double *b, double *c)
{
    transpose(s, b, s->spare);
    product(s, a, s->spare, c);
}

/* b = alpha a + beta I */
static inline void affine_of(const kxk *s, double alpha, const double *a, double beta, double *b)
{
    for (int64_t i = 0; i < s->ld * s->ld; i++) b[i] = alpha * a[i];
    for (int64_t i = 0; i < s->k; i++) b[i * s->ld + i] += beta;
}

/* a = alpha a + beta I */
static inline void affine(const kxk *s, double alpha, double beta, double *a)
{
    affine_of(s, alpha, a, beta, a);
}

static inline void identity(const kxk *s, double *a)
{
    memset(a, 0, (size_t)(s->ld * s->ld) * sizeof *a);
    for (int64_t i = 0; i < s->k; i++) a[i * s->ld + i] = 1;
}

static inline void copy(const kxk *s, const double *a, double *b)
{
    memcpy(b, a, (size_t)(s->ld * s->ld) * sizeof *a);
}

/* largest column sum of |a|: bounds every eigenvalue */
static inline double norm_of(const kxk *s, const double *a)
{
    double norm = 0;
    for (int64_t j = 0; j < s->ld; j += 4) {
        double sum[4] = {0};
        for (int64_t i = 0; i < s->k; i++)
            for (int64_t c = 0; c < 4; c++) sum[c] += fabs(a[i * s->ld + j + c]);
        for (int64_t c = 0; c < 4; c++) norm = MAX(norm, sum[c]);
    }
    return norm;
}

#endif
