/* kxk_batch.h - the algebra of kxk.h and retraction.h for as many classes at once as a vector has doubles: entry (i, j)
 * of a k x k matrix is a vector over the classes, so that no lane is empty at any k, a transpose is a matter of
 * addresses, and of a symmetric product the lower half is enough.
 *
 * What a class gets does not depend on its company, and is to the bit what it gets alone: it is its own lane, with as
 * many terms of a series and as many doublings as itself asks for. Terms that others go on with have coefficients of
 * zero in it, doublings and iterations that others need are not taken over, sums are in the same order.
 *
 * Included by rsgd_batches.h; double alone, so once.
 */
#ifndef SUBSPACE_KXK_BATCH_H
#define SUBSPACE_KXK_BATCH_H
#include "retraction.h"

enum {
    BATCH_K = 8,                  /* rows at most */
    BATCH_BYTES = 384 << 10,      /* of W, grad and M: they stay in L2 between the passes */
    BATCH_MATRICES = 10,          /* [k, k] of `wide` */
    BATCH_COLS = WIDE < 8 ? 4 : 8 /* 2 x 8 sums and what they are made of in 32 registers, 2 x 4 in 16 */
};

typedef int64_t chosen __attribute__((vector_size(VECTOR))); /* lanes: -1 or 0 */

typedef struct batch {
    int64_t k;                        /* the most rows that a class has, as 4 or 8 */
    int64_t count;                    /* classes */
    int64_t row[WIDE];                /* the first of each */
    chosen rows;                      /* and how many; without a class 0 */
    wide a;                           /* -lr */
    wide *R, *E, *S;                  /* W W', dir W' and dir dir' first; E and S are the square and cube of X then */
    wide *P, *X, *X4, *f, *g, *t, *u; /* in the end E and g are the coefficients of W and dir */
} batch;

static inline wide all_lanes(double x)
{
    return x - (wide){0};
}

static inline wide choose(chosen which, wide a, wide b)
{
    return (wide)(((chosen)a & which) | ((chosen)b & ~which));
}

/* x += I */
static inline void add_identity(int64_t k, wide *x)
{
    for (int64_t i = 0; i < k; i++) x[i * (k + 1)] += 1;
}

static inline bool any_of(chosen which)
{
    int64_t any = 0;
    for (int i = 0; i < WIDE; i++) any |= which[i];
    return any != 0;
}

/* Lane c of vector v of four is number `at` + v of from[c] .. */
static inline void into_lanes(const double *const *from, int64_t at, wide *to)
{
    double *lanes = (double *)to;
    if (WIDE < 4)
        for (int i = 0; i < 4 * WIDE; i++) lanes[i] = from[i % WIDE][at + i / WIDE];
    for (int c = 0; c + 4 <= WIDE; c += 4)
        turn_rows(from[c] + at, from[c + 1] + at, from[c + 2] + at, from[c + 3] + at, WIDE, lanes + c);
}

/* .. and back, to[c] */
static inline void out_of_lanes(const wide *from, four *to)
{
    const double *lanes = (const double *)from;
    if (WIDE < 4)
        for (int i = 0; i < 4 * WIDE; i++) to[i % WIDE][i / WIDE] = lanes[i];
    for (int c = 0; c + 4 <= WIDE; c += 4)
        turn_rows(lanes + c, lanes + WIDE + c, lanes + 2 * WIDE + c, lanes + 3 * WIDE + c, 4, (double *)(to + c));
}

/* Rows i and i+1 of c = a b, or of a b', the columns j .. j+cols; of a symmetric c up to the diagonal, and its mirror.
 */
static inline __attribute__((always_inline)) void batch_tile(const int cols, const bool turned, const bool symmetric,
                                                             int64_t k, int64_t i, int64_t j, const wide *a,
                                                             const wide *b, wide *c)
{
    const int64_t along = turned ? 1 : k, across = turned ? k : 1;
    wide sum[2][8];
#pragma GCC unroll 8
    for (int v = 0; v < cols; v++) sum[0][v] = sum[1][v] = (wide){0};
    for (int64_t l = 0; l < k; l++) {
        const wide x = a[i * k + l], y = a[(i + 1) * k + l];
#pragma GCC unroll 8
        for (int v = 0; v < cols; v++) {
            const wide z = b[l * along + (j + v) * across];
            sum[0][v] += x * z, sum[1][v] += y * z;
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < cols; v++) {
        if (!symmetric || j + v <= i) c[i * k + j + v] = sum[0][v];
        c[(i + 1) * k + j + v] = sum[1][v];
        if (symmetric) {
            if (j + v < i) c[(j + v) * k + i] = sum[0][v];
            c[(j + v) * k + i + 1] = sum[1][v];
        }
    }
}

static inline __attribute__((always_inline)) void batch_product_of(const bool turned, const bool symmetric, int64_t k,
                                                                   const wide *a, const wide *b, wide *c)
{
    for (int64_t i = 0; i < k; i += 2)
        for (int64_t j = 0, end = symmetric ? i + 2 : k; j < end; j += BATCH_COLS) {
            const int64_t cols = MIN(end - j, BATCH_COLS);
            if (cols == 8) batch_tile(BATCH_COLS, turned, symmetric, k, i, j, a, b, c);
            else if (cols == 6) batch_tile(MIN(6, BATCH_COLS), turned, symmetric, k, i, j, a, b, c);
            else if (cols == 4) batch_tile(4, turned, symmetric, k, i, j, a, b, c);
            else batch_tile(2, turned, symmetric, k, i, j, a, b, c);
        }
}

/* c = a b */
static void batch_product(int64_t k, const wide *a, const wide *b, wide *c)
{
    batch_product_of(false, false, k, a, b, c);
}

/* c = a b of symmetric matrices that commute */
static void batch_symmetric(int64_t k, const wide *a, const wide *b, wide *c)
{
    batch_product_of(false, true, k, a, b, c);
}

/* c = a a' */
static void batch_square(int64_t k, const wide *a, wide *c)
{
    batch_product_of(true, true, k, a, a, c);
}

/* largest column sum of |x| */
static wide batch_norm(int64_t k, const wide *x)
{
    const chosen sign = (chosen)all_lanes(-0.);
    wide norm = {0};
    for (int64_t j = 0; j < k; j++) {
        wide sum = {0};
        for (int64_t i = 0; i < k; i++) sum += (wide)((chosen)x[i * k + j] & ~sign);
        norm = choose(sum > norm, sum, norm);
    }
    return norm;
}

/* f and g = the sums of coefficients c[j] times the powers of X, four powers a product and one more at the top, which
 * is block `top`. A lane whose own series ends below has zeros there, and the same sums. */
static void batch_series(const batch *s, int top, const wide *cf, const wide *cg)
{
    const int64_t k = s->k;
    for (int b = top; b >= 0; b -= 4) {
        if (b < top) batch_symmetric(k, s->X4, s->f, s->t), batch_symmetric(k, s->X4, s->g, s->u);
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j <= i; j++) {
                const int64_t at = i * k + j;
                const wide x = s->X[at], x2 = s->E[at], x3 = s->S[at], x4 = s->X4[at];
                wide f = b < top ? s->t[at] : cf[b + 4] * x4, g = b < top ? s->u[at] : cg[b + 4] * x4;
                f += cf[b + 3] * x3, f += cf[b + 2] * x2, f += cf[b + 1] * x;
                g += cg[b + 3] * x3, g += cg[b + 2] * x2, g += cg[b + 1] * x;
                if (i == j) f += cf[b], g += cg[b];
                s->f[at] = s->f[j * k + i] = f, s->g[at] = s->g[j * k + i] = g;
            }
    }
}

/* f = cos sqrt X, g = sinc sqrt X, see geodesic_series; `norm` of X, zero where that is to be left alone */
static void batch_geodesic(const batch *s, double tolerance, wide norm)
{
    const int64_t k = s->k, size = k * k;
    wide *x = s->X, *f = s->f, *g = s->g, *t = s->t, scale = all_lanes(1);
    wide cf[28] = {all_lanes(1), all_lanes(-0.5)}, cg[28] = {all_lanes(1), all_lanes(-1. / 6)};
    chosen doubled[16];
    int doublings = 0, degree = 1;
    for (chosen on = norm > 1; any_of(on) && doublings<16; on = norm> 1) {
        norm = choose(on, 0.25 * norm, norm), scale = choose(on, 0.25 * scale, scale);
        doubled[doublings++] = on;
    }
    for (int64_t i = 0; doublings > 0 && i < size; i++) x[i] *= scale;
    double next_f = -0.5, next_g = -1. / 6;
    wide next = norm / 2;
    for (chosen on = next > tolerance; any_of(on) && degree<23; on = next> tolerance, degree++) {
        const double j = degree + 1;
        next *= norm / ((2 * j - 1) * (2 * j));
        next_f /= -(2 * j - 1) * (2 * j), next_g /= -(2 * j) * (2 * j + 1);
        cf[degree + 1] = choose(on, all_lanes(next_f), (wide){0});
        cg[degree + 1] = choose(on, all_lanes(next_g), (wide){0});
    }
    batch_symmetric(k, x, x, s->E);
    if (degree > 2) batch_symmetric(k, s->E, x, s->S);
    else memset(s->S, 0, (size_t)size * sizeof *x);
    if (degree > 3) batch_symmetric(k, s->E, s->E, s->X4);
    else memset(s->X4, 0, (size_t)size * sizeof *x);
    batch_series(s, (degree - 1) / 4 * 4, cf, cg);
    while (doublings-- > 0) {
        const chosen on = doubled[doublings];
        batch_symmetric(k, g, f, t);
        for (int64_t i = 0; i < size; i++) g[i] = choose(on, t[i], g[i]);
        batch_symmetric(k, f, f, t);
        for (int64_t i = 0; i < k; i++) t[i * (k + 1)] -= 0.5;
        for (int64_t i = 0; i < size; i++) f[i] = choose(on, 2 * t[i], f[i]);
    }
}

/* f = g = (I + X)^-1/2, see inverse_root_series */
static void batch_polar(const batch *s, double tolerance, wide residual)
{
    const int64_t k = s->k, size = k * k;
    wide *x = s->X, *z = s->f;
    memset(z, 0, (size_t)size * sizeof *z);
    add_identity(k, x), add_identity(k, z);
    for (chosen on = residual > tolerance; any_of(on); on = residual > tolerance) {
        batch_symmetric(k, z, z, s->t), batch_symmetric(k, x, s->t, s->u);
        for (int64_t i = 0; i < size; i++) s->u[i] *= -0.5;
        for (int64_t i = 0; i < k; i++) s->u[i * (k + 1)] += 1.5;
        batch_symmetric(k, z, s->u, s->t);
        for (int64_t i = 0; i < size; i++) z[i] = choose(on, s->t[i], z[i]);
        residual *= residual;
    }
    memcpy(s->g, z, (size_t)size * sizeof *z);
}

/* inv = L^-1, L L' = a; see cholesky_inverse */
static void batch_cholesky_inverse(int64_t k, wide *a, wide *inv)
{
    for (int64_t j = 0; j < k; j++) {
        for (int64_t i = j; i < k; i++)
            for (int64_t l = 0; l < j; l++) a[i * k + j] -= a[i * k + l] * a[j * k + l];
        wide root = a[j * k + j];
        for (int i = 0; i < WIDE; i++) root[i] = sqrt(root[i]);
        for (int64_t i = j; i < k; i++) a[i * k + j] /= root;
    }
    memset(inv, 0, (size_t)(k * k) * sizeof *inv);
    for (int64_t j = 0; j < k; j++)
        for (int64_t i = j; i < k; i++) {
            wide sum = all_lanes(i == j);
            for (int64_t l = j; l < i; l++) sum -= a[i * k + l] * inv[l * k + j];
            inv[i * k + j] = sum / a[i * k + i];
        }
}

#endif
