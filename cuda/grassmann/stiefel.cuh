/* stiefel.cuh - the k x k half of a Riemannian step on the Stiefel manifold, in double, by one team of threads.
 *
 * On the Stiefel manifold a step is T = B W + a D with B = -B' (k x k) beside it, and W' = f W + a g D, now with
 *
 *     geodesic   f = M, g = N of  exp [[B, -X], [I, 0]] = [[M, -N X], [N, M - N B]]     (canonical metric)
 *     polar, qr  g of X + B B' as above, f = g (I + B)
 *     cayley     g = (I - B/2 + X/4)^-1, f = 2 g - I                                    (cpu/grassmann/retraction.h)
 *
 * Included by rsgd.cuh.
 */
#ifndef SUBSPACE_STIEFEL_CUH
#define SUBSPACE_STIEFEL_CUH
#include "retraction.cuh"

/* f and g as M and N of the head: [f; g] is the first column of exp C, C = [[B, -X], [I, 0]], by Horner once C is
 * scaled below 1, then doubled: the other column is known from the first.       b and x are overwritten; t and u are
 * scratch. */
static __device__ void stiefel_geodesic(kxk *s, double tolerance, double *b, double *x, double *&f, double *&g,
                                        double *t, double *u)
{
    const int k = s->k;
    double norm = row_sum_norm(s, b) + sqrt(row_sum_norm(s, x));
    int doublings = 0, terms = 1;
    for (; doublings < 60 && norm > 1; doublings++) norm *= 0.5;
    affine(s, ldexp(1., -doublings), 0, b), affine(s, ldexp(1., -2 * doublings), 0, x);
    for (double next = norm * norm / 2; next > tolerance; terms++) next *= norm / (terms + 2);
    EACH_OF(s, e, k * k) f[e] = on_diagonal(s, e), g[e] = 0;
    meet(s);
    for (int j = terms; j > 0; j--) {
        EACH_OF(s, e, k * k) /* [f; g] <- [I; 0] + C [f; g] / j */
        {
            const int i = quotient(e, s->inverse), c = e - i * k;
            const double sum = row_times_column(b + i * k, f + c, k) - row_times_column(x + i * k, g + c, k);
            s->scratch[e] = sum / j + (i == c), s->spare[e] = f[e] / j;
        }
        meet(s);
        swap(f, s->scratch), swap(g, s->spare);
    }
    for (; doublings > 0; doublings--) { /* f <- f f - g x g,  g <- (g f + (f - g b) g) / 2 */
        product(s, g, x, t), product(s, g, b, u, -1);
        EACH_OF(s, e, k * k) u[e] += f[e];
        meet(s);
        EACH_OF(s, e, k * k)
        {
            const int i = quotient(e, s->inverse), c = e - i * k;
            s->scratch[e] = row_times_column(f + i * k, f + c, k) - row_times_column(t + i * k, g + c, k);
            s->spare[e] = (row_times_column(g + i * k, f + c, k) + row_times_column(u + i * k, g + c, k)) / 2;
        }
        meet(s);
        swap(f, s->scratch), swap(g, s->spare);
        affine(s, 2, 0, b), affine(s, 4, 0, x);
    }
}

/* inv = a^-1 by Gauss-Jordan with row pivots; a is overwritten */
static __device__ void inverse(const kxk *s, double *a, double *inv)
{
    const int k = s->k;
    identity(s, inv);
    for (int j = 0; j < k; j++) {
        int p = j;
        for (int i = j + 1; i < k; i++)
            if (fabs(a[i * k + j]) > fabs(a[p * k + j])) p = i;
        const double scale = 1 / a[p * k + j];
        meet(s); /* all have seen the column */
        EACH_OF(s, c, k)
        {
            const double x = a[p * k + c], y = inv[p * k + c];
            a[p * k + c] = a[j * k + c], inv[p * k + c] = inv[j * k + c];
            a[j * k + c] = x * scale, inv[j * k + c] = y * scale;
        }
        meet(s);
        EACH_OF(s, i, k) s->rows[i] = a[i * k + j];
        meet(s);
        EACH_OF(s, e, k * k)
        {
            const int i = quotient(e, s->inverse), c = e - i * k;
            if (i == j) continue;
            a[e] -= s->rows[i] * a[j * k + c], inv[e] -= s->rows[i] * inv[j * k + c];
        }
        meet(s);
    }
}

/* The Stiefel manifold's f and g of B and X, which are overwritten; t and u are scratch. By value: a pointer to the
 * team would keep it in memory on the Grassmannian's path. */
static __device__ __noinline__ void stiefel(kxk team, subspace_retraction kind, bool exact, double tolerance, double *b,
                                            double *x, double *to_f, double *to_g, double *t, double *u)
{
    kxk *const s = &team;
    const int k = s->k;
    double *f = to_f, *g = to_g;
    if (kind == SUBSPACE_GEODESIC) {
        stiefel_geodesic(s, tolerance, b, x, f, g, t, u);
    } else if (kind == SUBSPACE_CAYLEY) {
        EACH_OF(s, e, k * k) x[e] = x[e] / 4 - b[e] / 2 + on_diagonal(s, e);
        meet(s);
        inverse(s, x, g), copy(s, g, f, 2, -1);
    } else {
        EACH_OF(s, e, k * k)
        {
            const int i = quotient(e, s->inverse);
            x[e] += row_times_row(b + i * k, b + (e - i * k) * k, k);
        }
        meet(s);
        if (exact) retraction_exact(s, kind, x, f, g, NULL);
        else retraction(s, kind, tolerance, x, f, g, NULL);
        product(s, g, b, t);
        EACH_OF(s, e, k * k) f[e] = t[e] + g[e];
        meet(s);
    }
    if (f != to_f) copy(s, f, to_f);
    if (g != to_g) copy(s, g, to_g);
}

/* b = -sym(p) */
static __device__ void negative_symmetric(const kxk *s, const double *p, double *b)
{
    EACH_OF(s, e, s->k * s->k)
    {
        const int i = quotient(e, s->inverse);
        b[e] = -(p[e] + p[(e - i * s->k) * s->k + i]) / 2;
    }
    meet(s);
}

/* b = a skew(p) */
static __device__ void skew(const kxk *s, double a, const double *p, double *b)
{
    EACH_OF(s, e, s->k * s->k)
    {
        const int i = quotient(e, s->inverse);
        b[e] = a / 2 * (p[e] - p[(e - i * s->k) * s->k + i]);
    }
    meet(s);
}

#endif
