/* retraction.h - the k x k half of a Riemannian step, in double.
 *
 * Every retraction on the Grassmannian is W' = f(X) W + a g(X) D with X = a^2 D D' (k x k):
 *
 *     geodesic   f = cos sqrt X            g = sinc sqrt X
 *     polar      f = g = (I + X)^-1/2
 *     qr         f = g = L^-1, L L' = I + X
 *     cayley     f = (I + X/4)^-1 (I - X/4), g = (I + X/4)^-1
 *
 * On the Stiefel manifold a step is T = B W + a D with B = -B' (k x k) beside it, and W' = f W + a g D, now with
 *
 *     geodesic   f = M, g = N of  exp [[B, -X], [I, 0]] = [[M, -N X], [N, M - N B]]     (canonical metric)
 *     polar, qr  g of X + B B' as above, f = g (I + B)
 *     cayley     g = (I - B/2 + X/4)^-1, f = 2 g - I
 *
 * The geodesic is exp(Z) W' transposed, Cayley's transform (I - Z/2)^-1 (I + Z/2) W', with the skew n x n matrix
 * Z = T'W - W'T + W'BW, for which Z W' = T': it maps the span of W' and D' into itself. At B = 0 they are those above.
 *
 * Included by rsgd.h and kxk_batch.h; double alone, so once.
 */
#ifndef SUBSPACE_RETRACTION_H
#define SUBSPACE_RETRACTION_H
#include "kxk.h"

/* y = the sum of coefficients c[j] times the powers of X, j up to `degree`, given x[p] = X^p: `step` powers a product,
 * and one more at the top. batch_series does the same to the bit. */
static inline __attribute__((always_inline)) void polynomial(const kxk *s, const bool symmetric, const int step,
                                                             const double *const *x, int degree, const double *c,
                                                             double *y)
{
    const int64_t size = s->ld * s->ld;
    const int top = (degree - 1) / step * step;
    for (int64_t i = 0; i < size; i++) y[i] = c[top + step] * x[step][i];
    for (int b = top; b >= 0; b -= step) {
        if (b < top) (symmetric ? product_symmetric : product)(s, x[step], y, s->scratch), copy(s, s->scratch, y);
        for (int64_t i = 0; i < size; i++)
#pragma GCC unroll 3
            for (int p = step - 1; p > 0; p--) y[i] += c[b + p] * x[p][i];
        for (int64_t i = 0; i < s->k; i++) y[i * s->ld + i] += c[b];
    }
}

/* f = cos sqrt X, g = sinc sqrt X, h = (cos sqrt X - 1) / X: entire functions, so a series
 * once X is scaled below 1, then the angle is doubled:
 *     g(4X) = g f,   f(4X) = 2 f^2 - 1,   h(4X) = -g^2 / 2.          x is overwritten. */
static void geodesic_series(const kxk *s, double *x, double tolerance, double *f, double *g, double *h)
{
    const int64_t size = s->ld * s->ld;
    void (*const times)(const kxk *, const double *, const double *, double *) = h ? product : product_symmetric;
    double norm = norm_of(s, x), scale = 1;
    int doublings = 0;
    while (norm > 1 || (h && doublings == 0)) norm *= 0.25, scale *= 0.25, doublings++;
    for (int64_t i = 0; i < size; i++) x[i] *= scale;
    double cf[28] = {1, -0.5}, cg[28] = {1, -1. / 6}; /* (-1)^j / (2j)! and / (2j+1)! */
    int degree = 1;
    for (double next = norm / 2; next > tolerance; degree++) {
        const double j = degree + 1;
        next *= norm / ((2 * j - 1) * (2 * j));
        cf[degree + 1] = -cf[degree] / ((2 * j - 1) * (2 * j)), cg[degree + 1] = -cg[degree] / ((2 * j) * (2 * j + 1));
    }
    double *x2 = s->spare, *x3 = x2 + size, *x4 = x3 + size;
    const double *const powers[] = {NULL, x, x2, x3, x4};
    times(s, x, x, x2);
    if (h) { /* in many steps with transport, rounding grows less so */
        polynomial(s, false, 2, powers, degree, cf, f), polynomial(s, false, 2, powers, degree, cg, g);
    } else {
        if (degree > 2) times(s, x2, x, x3);
        else memset(x3, 0, (size_t)size * sizeof *x3);
        if (degree > 3) times(s, x2, x2, x4);
        else memset(x4, 0, (size_t)size * sizeof *x4);
        polynomial(s, true, 4, powers, degree, cf, f), polynomial(s, true, 4, powers, degree, cg, g);
    }
    for (; doublings > 0; doublings--) {
        if (h && doublings == 1) times(s, g, g, h), affine(s, -0.5, 0, h);
        times(s, g, f, s->scratch), copy(s, s->scratch, g);
        times(s, f, f, s->scratch), affine_of(s, 2, s->scratch, -1, f);
    }
}

/* Inverse of the lower Cholesky factor of an SPD a: a is overwritten by L, inv becomes L^-1. */
static void cholesky_inverse(const kxk *s, double *a, double *inv)
{
    const int64_t k = s->k, ld = s->ld;
    for (int64_t j = 0; j < k; j++) {
        for (int64_t i = j; i < k; i++)
            for (int64_t l = 0; l < j; l++) a[i * ld + j] -= a[i * ld + l] * a[j * ld + l];
        const double d = sqrt(a[j * ld + j]);
        for (int64_t i = j; i < k; i++) a[i * ld + j] /= d;
    }
    memset(inv, 0, (size_t)(ld * ld) * sizeof *inv);
    for (int64_t j = 0; j < k; j++)
        for (int64_t i = j; i < k; i++) {
            double sum = i == j;
            for (int64_t l = j; l < i; l++) sum -= a[i * ld + l] * inv[l * ld + j];
            inv[i * ld + j] = sum / a[i * ld + i];
        }
}

/* Cyclic Jacobi: a = V' diag(a) V with the eigenvectors in the rows of v; a is overwritten. */
static void eigen(const kxk *s, double *a, double *v)
{
    const int64_t k = s->k, ld = s->ld;
    identity(s, v);
    for (int sweep = 0; sweep < 30; sweep++) {
        double off = 0, diagonal = 0;
        for (int64_t i = 0; i < k; i++) {
            diagonal += a[i * ld + i] * a[i * ld + i];
            for (int64_t j = 0; j < i; j++) off += a[i * ld + j] * a[i * ld + j];
        }
        if (!(off > 1e-34 * diagonal)) return;
        for (int64_t p = 0; p < k; p++)
            for (int64_t q = p + 1; q < k; q++) {
                const double apq = a[p * ld + q];
                if (apq == 0) continue;
                const double theta = (a[q * ld + q] - a[p * ld + p]) / (2 * apq);
                const double t = (theta >= 0 ? 1 : -1) / (fabs(theta) + sqrt(theta * theta + 1));
                const double c = 1 / sqrt(t * t + 1), sn = t * c;
                for (int64_t r = 0; r < k; r++) {
                    const double x = a[r * ld + p], y = a[r * ld + q];
                    a[r * ld + p] = c * x - sn * y, a[r * ld + q] = sn * x + c * y;
                }
                for (int64_t r = 0; r < k; r++) {
                    const double x = a[p * ld + r], y = a[q * ld + r];
                    a[p * ld + r] = c * x - sn * y, a[q * ld + r] = sn * x + c * y;
                    const double vx = v[p * ld + r], vy = v[q * ld + r];
                    v[p * ld + r] = c * vx - sn * vy, v[q * ld + r] = sn * vx + c * vy;
                }
            }
    }
}

/* out = V' diag(values) V */
static void from_eigen(const kxk *s, const double *v, const double *values, double *out)
{
    const int64_t k = s->k, ld = s->ld;
    memset(out, 0, (size_t)(ld * ld) * sizeof *out);
    for (int64_t e = 0; e < k; e++)
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < k; j++) out[i * ld + j] += values[e] * v[e * ld + i] * v[e * ld + j];
}

/* out = a^-1/2 of an SPD a (overwritten); false if a is singular in working precision */
static bool inverse_root(const kxk *s, double *a, double *out)
{
    double *values = s->values, least = INFINITY, most = 0;
    eigen(s, a, s->scratch);
    for (int64_t i = 0; i < s->k; i++) {
        const double e = a[i * s->ld + i];
        least = MIN(least, e), most = MAX(most, e);
        values[i] = 1 / sqrt(e);
    }
    if (!(least > 1e-12 * most)) return false;
    from_eigen(s, s->scratch, values, out);
    return true;
}

/* z = (I + X)^-1/2 for |X| <= 1/2 by Newton-Schulz, z <- z (3 I - (I + X) z^2) / 2: from z = I the
 * residual |X| squares at every step. x is overwritten by I + X. */
static void inverse_root_series(const kxk *s, double *x, double tolerance, double *z)
{
    double residual = norm_of(s, x);
    affine(s, 1, 1, x);
    identity(s, z);
    while (residual > tolerance) {
        product_symmetric(s, z, z, s->scratch), product_symmetric(s, x, s->scratch, s->spare);
        affine(s, -0.5, 1.5, s->spare);
        product_symmetric(s, z, s->spare, s->scratch), copy(s, s->scratch, z);
        residual *= residual;
    }
}

/* f(X) and g(X), and h(X) where asked (geodesic only); x is overwritten. `exact`: by eigenvalues,
 * for steps so long that a series or an inverse would lose digits. */
static void retraction(const kxk *s, subspace_retraction kind, bool exact, double tolerance, double *x, double *f,
                       double *g, double *h)
{
    double *fs = s->values, *gs = fs + s->k, *hs = gs + s->k; /* of eigenvalues */
    if (kind == SUBSPACE_QR) {
        affine(s, 1, 1, x);
        cholesky_inverse(s, x, f), copy(s, f, g);
    } else if (!exact && kind == SUBSPACE_GEODESIC) {
        geodesic_series(s, x, tolerance, f, g, h);
    } else if (!exact && kind == SUBSPACE_POLAR && norm_of(s, x) <= 0.5) {
        inverse_root_series(s, x, tolerance, f), copy(s, f, g);
    } else if (!exact && kind == SUBSPACE_CAYLEY) { /* with A = I + X/4: g = A^-1 = L^-T L^-1, f = 2 A^-1 - I */
        affine(s, 0.25, 1, x);
        cholesky_inverse(s, x, s->scratch);
        for (int64_t i = 0; i < s->ld; i++)
            for (int64_t j = 0; j < s->ld; j++) s->spare[i * s->ld + j] = s->scratch[j * s->ld + i];
        product(s, s->spare, s->scratch, g);
        copy(s, g, f), affine(s, 2, -1, f);
    } else {
        eigen(s, x, s->scratch);
        for (int64_t i = 0; i < s->k; i++) {
            const double e = MAX(x[i * s->ld + i], 0), angle = sqrt(e);
            const double half = angle / 2, sinc = half > 1e-8 ? sin(half) / half : 1;
            if (kind == SUBSPACE_GEODESIC) fs[i] = cos(angle), gs[i] = sinc * cos(half), hs[i] = -0.5 * sinc * sinc;
            if (kind == SUBSPACE_POLAR) fs[i] = gs[i] = 1 / sqrt(1 + e);
            if (kind == SUBSPACE_CAYLEY) fs[i] = (4 - e) / (4 + e), gs[i] = 4 / (4 + e);
        }
        from_eigen(s, s->scratch, fs, f), from_eigen(s, s->scratch, gs, g);
        if (h && kind == SUBSPACE_GEODESIC) from_eigen(s, s->scratch, hs, h);
    }
}

/* f and g as M and N of the head: [f; g] is the first column of exp C, C = [[B, -X], [I, 0]], by Horner once C is
 * scaled below 1, then doubled: the other column is known from the first.       b and x are overwritten; t and u are
 * scratch. */
static void stiefel_geodesic(const kxk *s, double tolerance, double *b, double *x, double *f, double *g, double *t,
                             double *u)
{
    const int64_t size = s->ld * s->ld;
    double norm = norm_of(s, b) + sqrt(norm_of(s, x));
    int doublings = 0, terms = 1;
    for (; doublings < 60 && norm > 1; doublings++) norm *= 0.5;
    affine(s, ldexp(1, -doublings), 0, b), affine(s, ldexp(1, -2 * doublings), 0, x);
    for (double next = norm * norm / 2; next > tolerance; terms++) next *= norm / (terms + 2);
    identity(s, f), memset(g, 0, (size_t)size * sizeof *g);
    for (int j = terms; j > 0; j--) { /* [f; g] <- [I; 0] + C [f; g] / j */
        product(s, b, f, s->scratch), product(s, x, g, s->spare);
        affine_of(s, 1. / j, f, 0, g);
        for (int64_t i = 0; i < size; i++) s->scratch[i] = (s->scratch[i] - s->spare[i]) / j;
        affine_of(s, 1, s->scratch, 1, f);
    }
    for (; doublings > 0; doublings--) { /* f <- f f - g x g,  g <- (g f + (f - g b) g) / 2 */
        product(s, g, x, t), product(s, t, g, s->scratch);
        product(s, g, b, t);
        for (int64_t i = 0; i < size; i++) t[i] = f[i] - t[i];
        product(s, t, g, u), product(s, g, f, t);
        for (int64_t i = 0; i < size; i++) g[i] = (t[i] + u[i]) / 2;
        product(s, f, f, t);
        for (int64_t i = 0; i < size; i++) f[i] = t[i] - s->scratch[i];
        affine(s, 2, 0, b), affine(s, 4, 0, x);
    }
}

/* inv = a^-1 by Gauss-Jordan with row pivots; a is overwritten */
static void inverse(const kxk *s, double *a, double *inv)
{
    const int64_t k = s->k, ld = s->ld;
    identity(s, inv);
    for (int64_t j = 0; j < k; j++) {
        int64_t p = j;
        for (int64_t i = j + 1; i < k; i++)
            if (fabs(a[i * ld + j]) > fabs(a[p * ld + j])) p = i;
        const double scale = 1 / a[p * ld + j];
        for (int64_t c = 0; c < k; c++) {
            const double x = a[p * ld + c], y = inv[p * ld + c];
            a[p * ld + c] = a[j * ld + c], inv[p * ld + c] = inv[j * ld + c];
            a[j * ld + c] = x * scale, inv[j * ld + c] = y * scale;
        }
        for (int64_t i = 0; i < k; i++) {
            const double x = a[i * ld + j];
            for (int64_t c = 0; i != j && c < k; c++)
                a[i * ld + c] -= x * a[j * ld + c], inv[i * ld + c] -= x * inv[j * ld + c];
        }
    }
}

/* The Stiefel manifold's f and g of B and X, which are overwritten; t and u are scratch. */
static void stiefel(const kxk *s, subspace_retraction kind, bool exact, double tolerance, double *b, double *x,
                    double *f, double *g, double *t, double *u)
{
    const int64_t size = s->ld * s->ld;
    if (kind == SUBSPACE_GEODESIC) {
        stiefel_geodesic(s, tolerance, b, x, f, g, t, u);
    } else if (kind == SUBSPACE_CAYLEY) {
        for (int64_t i = 0; i < size; i++) x[i] = x[i] / 4 - b[i] / 2;
        affine(s, 1, 1, x);
        inverse(s, x, g), affine_of(s, 2, g, -1, f);
    } else {
        product_t(s, b, b, t);
        for (int64_t i = 0; i < size; i++) x[i] += t[i];
        retraction(s, kind, exact, tolerance, x, f, g, NULL);
        product(s, g, b, f);
        for (int64_t i = 0; i < size; i++) f[i] += g[i];
    }
}

/* b = -sym(p) */
static inline void negative_symmetric(const kxk *s, const double *p, double *b)
{
    for (int64_t i = 0; i < s->ld; i++)
        for (int64_t j = 0; j < s->ld; j++) b[i * s->ld + j] = -(p[i * s->ld + j] + p[j * s->ld + i]) / 2;
}

/* b = a skew(p) */
static inline void skew(const kxk *s, double a, const double *p, double *b)
{
    for (int64_t i = 0; i < s->ld; i++)
        for (int64_t j = 0; j < s->ld; j++) b[i * s->ld + j] = a / 2 * (p[i * s->ld + j] - p[j * s->ld + i]);
}

#endif
