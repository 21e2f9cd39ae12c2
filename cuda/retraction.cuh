/* retraction.cuh - the k x k half of a Riemannian step, in double, by one block of threads.
 *
 * Every retraction on the Grassmannian is W' = f(X) W + a g(X) D with X = a^2 D D' (k x k):
 *
 *     geodesic   f = cos sqrt X            g = sinc sqrt X
 *     polar      f = g = (I + X)^-1/2
 *     qr         f = g = L^-1, L L' = I + X
 *     cayley     f = (I + X/4)^-1 (I - X/4), g = (I + X/4)^-1
 *
 * Matrices are [k, k], in shared or global memory. Every function is called by the whole block, ends
 * with a barrier, and returns the same to every thread. What looks like a return by swap saves a copy.
 */
#ifndef SUBSPACE_RETRACTION_CUH
#define SUBSPACE_RETRACTION_CUH
#include "cuda.cuh"

/* for e in [0, count), shared out among the threads */
#define EACH(e, count) for (int e = (int)threadIdx.x; e < (count); e += (int)blockDim.x)

typedef struct kxk { /* shape and scratch of the k x k algebra */
    int k;
    double *t0, *t1, *t2, *t3; /* [k, k] */
    double *rows;              /* [2 (k + 1)] */
} kxk;

static __device__ inline void swap(double *&a, double *&b)
{
    double *const t = a;
    a = b, b = t;
}

/* c = alpha a b + beta I; c is neither a nor b */
static __device__ void product(const kxk *s, const double *a, const double *b, double *c, double alpha = 1,
                               double beta = 0)
{
    const int k = s->k;
    EACH(e, k * k)
    {
        const int i = e / k, j = e % k;
        double sum = 0;
        for (int l = 0; l < k; l++) sum += a[i * k + l] * b[l * k + j];
        c[e] = alpha * sum + (i == j ? beta : 0);
    }
    __syncthreads();
}

/* c = a b' */
static __device__ void product_t(const kxk *s, const double *a, const double *b, double *c)
{
    const int k = s->k;
    EACH(e, k * k)
    {
        const int i = e / k, j = e % k;
        double sum = 0;
        for (int l = 0; l < k; l++) sum += a[i * k + l] * b[j * k + l];
        c[e] = sum;
    }
    __syncthreads();
}

/* a = alpha a + beta I */
static __device__ void affine(const kxk *s, double alpha, double beta, double *a)
{
    EACH(e, s->k * s->k) a[e] = alpha * a[e] + (e / s->k == e % s->k ? beta : 0);
    __syncthreads();
}

static __device__ void identity(const kxk *s, double *a)
{
    EACH(e, s->k * s->k) a[e] = e / s->k == e % s->k;
    __syncthreads();
}

/* b = alpha a + beta I */
static __device__ void copy(const kxk *s, const double *a, double *b, double alpha = 1, double beta = 0)
{
    EACH(e, s->k * s->k) b[e] = alpha * a[e] + (e / s->k == e % s->k ? beta : 0);
    __syncthreads();
}

/* largest row sum of |a|: bounds every eigenvalue of a symmetric a */
static __device__ double row_sum_norm(const kxk *s, const double *a)
{
    double norm = 0;
    EACH(i, s->k)
    {
        double sum = 0;
        for (int j = 0; j < s->k; j++) sum += fabs(a[i * s->k + j]);
        s->rows[i] = sum;
    }
    __syncthreads();
    for (int i = 0; i < s->k; i++) norm = s->rows[i] <= norm ? norm : s->rows[i]; /* a NaN is passed on */
    __syncthreads();
    return norm;
}

/* f = cos sqrt X, g = sinc sqrt X, h = (cos sqrt X - 1) / X: entire functions, so a Horner series
 * once X is scaled below 1, then the angle is doubled:
 *     g(4X) = g f,   f(4X) = 2 f^2 - 1,   h(4X) = -g^2 / 2.          x is overwritten. */
static __device__ void geodesic_series(kxk *s, double *x, double tolerance, double *&f, double *&g, double *h)
{
    double norm = row_sum_norm(s, x), scale = 1;
    int doublings = 0, terms = 1;
    for (; doublings < 30 && (norm > 1 || (h && doublings == 0)); doublings++) norm *= 0.25, scale *= 0.25;
    affine(s, scale, 0, x);
    for (double next = norm / 2; next > tolerance; terms++) next *= norm / ((2. * terms + 1) * (2. * terms + 2));
    identity(s, f), identity(s, g);
    for (int j = terms; j > 0; j--) {
        product(s, x, f, s->t0, -1 / ((2. * j - 1) * (2. * j)), 1), swap(f, s->t0);
        product(s, x, g, s->t0, -1 / ((2. * j) * (2. * j + 1)), 1), swap(g, s->t0);
    }
    for (; doublings > 0; doublings--) {
        if (h && doublings == 1) product(s, g, g, h, -0.5);
        product(s, g, f, s->t0), swap(g, s->t0);
        product(s, f, f, s->t0, 2, -1), swap(f, s->t0);
    }
}

/* Inverse of the lower Cholesky factor of an SPD a: a is overwritten by L, inv becomes L^-1. */
static __device__ void cholesky_inverse(const kxk *s, double *a, double *inv)
{
    const int k = s->k;
    for (int j = 0; j < k; j++) {
        EACH(r, k - j)
        {
            const int i = j + r;
            double sum = a[i * k + j];
            for (int l = 0; l < j; l++) sum -= a[i * k + l] * a[j * k + l];
            s->rows[i] = sum;
        }
        __syncthreads();
        EACH(r, k - j) a[(j + r) * k + j] = s->rows[j + r] / sqrt(s->rows[j]);
        __syncthreads();
    }
    EACH(j, k) /* a thread a column */
    {
        for (int i = 0; i < j; i++) inv[i * k + j] = 0;
        for (int i = j; i < k; i++) {
            double sum = i == j;
            for (int l = j; l < i; l++) sum -= a[i * k + l] * inv[l * k + j];
            inv[i * k + j] = sum / a[i * k + i];
        }
    }
    __syncthreads();
}

/* Pair t of a round of a tournament among m = k or k + 1 (a bye): in m - 1 rounds everyone meets everyone once. */
static __device__ inline bool pair_of(int t, int round, int k, int *p, int *q)
{
    const int m = k + k % 2, x = t ? (round + t) % (m - 1) : m - 1, y = (round - t + m - 1) % (m - 1);
    *p = MIN(x, y), *q = MAX(x, y);
    return *q < k;
}

/* Jacobi, the k/2 disjoint rotations of a round at once: a = V' diag(a) V with the eigenvectors in
 * the rows of v; a is overwritten. */
static __device__ void eigen(const kxk *s, double *a, double *v)
{
    const int k = s->k, rounds = k + k % 2 - 1, pairs = (k + 1) / 2;
    double *rotation = s->rows; /* [pairs][cos, sin] */
    identity(s, v);
    for (int sweep = 0; sweep < 30; sweep++) {
        double off = 0, diagonal = 0;
        EACH(i, k)
        {
            double sum = 0;
            for (int j = 0; j < i; j++) sum += a[i * k + j] * a[i * k + j];
            s->rows[i] = sum;
        }
        __syncthreads();
        for (int i = 0; i < k; i++) off += s->rows[i], diagonal += a[i * k + i] * a[i * k + i];
        __syncthreads();
        if (!(off > 1e-33 * diagonal)) return;
        for (int round = 0; round < rounds; round++) {
            int p, q;
            EACH(t, pairs)
            {
                double c = 1, sn = 0;
                if (pair_of(t, round, k, &p, &q) && a[p * k + q] != 0) {
                    const double theta = (a[q * k + q] - a[p * k + p]) / (2 * a[p * k + q]);
                    const double tan = (theta >= 0 ? 1 : -1) / (fabs(theta) + sqrt(theta * theta + 1));
                    c = 1 / sqrt(tan * tan + 1), sn = tan * c;
                }
                rotation[2 * t] = c, rotation[2 * t + 1] = sn;
            }
            __syncthreads();
            EACH(e, pairs * k) /* columns p and q */
            {
                const double c = rotation[e / k * 2], sn = rotation[e / k * 2 + 1];
                if (!pair_of(e / k, round, k, &p, &q)) continue;
                double *const row = a + e % k * k;
                const double x = row[p], y = row[q];
                row[p] = c * x - sn * y, row[q] = sn * x + c * y;
            }
            __syncthreads();
            EACH(e, pairs * k) /* rows p and q */
            {
                const double c = rotation[e / k * 2], sn = rotation[e / k * 2 + 1];
                if (!pair_of(e / k, round, k, &p, &q)) continue;
                const int r = e % k;
                const double x = a[p * k + r], y = a[q * k + r], vx = v[p * k + r], vy = v[q * k + r];
                a[p * k + r] = r == q ? 0 : c * x - sn * y, a[q * k + r] = r == p ? 0 : sn * x + c * y;
                v[p * k + r] = c * vx - sn * vy, v[q * k + r] = sn * vx + c * vy;
            }
            __syncthreads();
        }
    }
}

/* out = V' diag(values) V */
static __device__ void from_eigen(const kxk *s, const double *v, const double *values, double *out)
{
    const int k = s->k;
    EACH(e, k * k)
    {
        double sum = 0;
        for (int l = 0; l < k; l++) sum += values[l] * v[l * k + e / k] * v[l * k + e % k];
        out[e] = sum;
    }
    __syncthreads();
}

/* out = a^-1/2 of an SPD a (overwritten); false if a is singular in working precision */
static __device__ bool inverse_root(const kxk *s, double *a, double *out)
{
    double *values = s->t2, least = INFINITY, most = 0;
    eigen(s, a, s->t0);
    for (int i = 0; i < s->k; i++) least = fmin(least, a[i * s->k + i]), most = fmax(most, a[i * s->k + i]);
    EACH(i, s->k) values[i] = 1 / sqrt(a[i * s->k + i]);
    __syncthreads();
    if (!(least > 1e-12 * most)) return false;
    from_eigen(s, s->t0, values, out);
    return true;
}

/* z = (I + X)^-1/2 for |X| <= 1/2 by Newton-Schulz, z <- z (3 I - (I + X) z^2) / 2: from z = I the
 * residual |X| squares at every step. x is overwritten by I + X. */
static __device__ void inverse_root_series(kxk *s, double *x, double tolerance, double *&z)
{
    double residual = row_sum_norm(s, x);
    affine(s, 1, 1, x);
    identity(s, z);
    for (; residual > tolerance; residual *= residual) {
        product(s, z, z, s->t0), product(s, x, s->t0, s->t1, -0.5, 1.5);
        product(s, z, s->t1, s->t0), swap(z, s->t0);
    }
}

/* f(X) and g(X), and h(X) where asked (geodesic only); x is overwritten. `exact`: by eigenvalues,
 * for steps so long that a series or an inverse would lose digits. */
static __device__ void retraction(kxk *s, subspace_retraction kind, bool exact, double tolerance, double *x, double *&f,
                                  double *&g, double *h)
{
    const int k = s->k;
    double *fs = s->t1, *gs = s->t2, *hs = s->t3; /* [k] of eigenvalues */
    if (kind == SUBSPACE_QR) {
        affine(s, 1, 1, x);
        cholesky_inverse(s, x, f), copy(s, f, g);
    } else if (!exact && kind == SUBSPACE_GEODESIC) {
        geodesic_series(s, x, tolerance, f, g, h);
    } else if (!exact && kind == SUBSPACE_POLAR && row_sum_norm(s, x) <= 0.5) {
        inverse_root_series(s, x, tolerance, f), copy(s, f, g);
    } else if (!exact && kind == SUBSPACE_CAYLEY) { /* with A = I + X/4: g = A^-1 = L^-T L^-1, f = 2 A^-1 - I */
        affine(s, 0.25, 1, x);
        cholesky_inverse(s, x, s->t0);
        EACH(e, k * k) s->t1[e] = s->t0[e % k * k + e / k];
        __syncthreads();
        product(s, s->t1, s->t0, g), copy(s, g, f, 2, -1);
    } else {
        eigen(s, x, s->t0);
        EACH(i, k)
        {
            const double e = fmax(x[i * k + i], 0.), angle = sqrt(e), half = angle / 2;
            const double sinc = half > 1e-8 ? sin(half) / half : 1;
            if (kind == SUBSPACE_GEODESIC) fs[i] = cos(angle), gs[i] = sinc * cos(half), hs[i] = -0.5 * sinc * sinc;
            if (kind == SUBSPACE_POLAR) fs[i] = gs[i] = 1 / sqrt(1 + e);
            if (kind == SUBSPACE_CAYLEY) fs[i] = (4 - e) / (4 + e), gs[i] = 4 / (4 + e);
        }
        __syncthreads();
        from_eigen(s, s->t0, fs, f), from_eigen(s, s->t0, gs, g);
        if (h && kind == SUBSPACE_GEODESIC) from_eigen(s, s->t0, hs, h);
    }
}

#endif
