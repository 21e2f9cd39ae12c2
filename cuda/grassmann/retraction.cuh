/* retraction.cuh - the k x k half of a Riemannian step, in double, by one block of threads.
 *
 * Every retraction on the Grassmannian is W' = f(X) W + a g(X) D with X = a^2 D D' (k x k):
 *
 *     geodesic   f = cos sqrt X            g = sinc sqrt X
 *     polar      f = g = (I + X)^-1/2
 *     qr         f = g = L^-1, L L' = I + X
 *     cayley     f = (I + X/4)^-1 (I - X/4), g = (I + X/4)^-1
 *
 * Matrices are [k, k], in shared or global memory. Every function is called by a team of threads, the whole block or
 * its first warp, ends with a barrier of the team, and returns the same to every thread of it. What looks like a return
 * by swap saves a copy.
 *
 * Latency, not arithmetic, is what a class waits for: a product is a load, k dependent FMAs and a barrier, about 150
 * cycles for k = 8 in one warp, and the geodesic of a step of |X| <= 1 does 6 for P, S and the coefficients and one for
 * every term (f and g side by side, 8 terms at most in float32): 1 to 2 thousand cycles, about one microsecond.
 *
 * Included by stiefel.cuh.
 */
#ifndef SUBSPACE_RETRACTION_CUH
#define SUBSPACE_RETRACTION_CUH
#include "cuda.cuh"

/* for e in [0, count), shared out among the threads of a block, or of a team */
#define EACH(e, count) for (int e = (int)threadIdx.x; e < (count); e += (int)blockDim.x)
#define EACH_OF(s, e, count) for (int e = (s)->thread; e < (count); e += (s)->threads)

typedef struct kxk { /* shape and scratch of the k x k algebra */
    int k;
    unsigned inverse;        /* of k */
    int thread, threads;     /* the team */
    double *scratch, *spare; /* [k, k] */
    double *rows;            /* [2 (k + 1)] */
    double *values;          /* [3 k] */
} kxk;

/* e / d by a product, for e d < 2^32. */
static __device__ inline unsigned inverse_of(int d)
{
    return 0xffffffffu / (unsigned)d + 1; /* d = 1 wraps to 0 */
}

static __device__ inline int quotient(int e, unsigned inverse)
{
    return inverse ? (int)((uint64_t)(unsigned)e * inverse >> 32) : e;
}

static __device__ inline bool on_diagonal(const kxk *s, int e)
{
    return quotient(e, s->inverse) * (s->k + 1) == e;
}

static __device__ inline void meet(const kxk *s)
{
    if (s->threads == WARP) __syncwarp();
    else __syncthreads();
}

static __device__ inline void swap(double *&a, double *&b)
{
    double *const t = a;
    a = b, b = t;
}

/* row of a times column of b, in two sums: half the latency */
static __device__ inline double row_times_column(const double *a, const double *b, int k)
{
    double even = 0, odd = 0;
    int l = 0;
#pragma unroll 2
    for (; l + 1 < k; l += 2) even += a[l] * b[l * k], odd += a[l + 1] * b[(l + 1) * k];
    return l < k ? even + odd + a[l] * b[l * k] : even + odd;
}

static __device__ inline double row_times_row(const double *a, const double *b, int k)
{
    double even = 0, odd = 0;
    int l = 0;
#pragma unroll 2
    for (; l + 1 < k; l += 2) even += a[l] * b[l], odd += a[l + 1] * b[l + 1];
    return l < k ? even + odd + a[l] * b[l] : even + odd;
}

/* c = alpha a b + beta I; c is neither a nor b */
static __device__ void product(const kxk *s, const double *a, const double *b, double *c, double alpha = 1,
                               double beta = 0)
{
    const int k = s->k;
    EACH_OF(s, e, k * k)
    {
        const int i = quotient(e, s->inverse), j = e - i * k;
        c[e] = alpha * row_times_column(a + i * k, b + j, k) + (i == j ? beta : 0);
    }
    meet(s);
}

/* c = a b' */
static __device__ void product_t(const kxk *s, const double *a, const double *b, double *c)
{
    const int k = s->k;
    EACH_OF(s, e, k * k)
    {
        const int i = quotient(e, s->inverse), j = e - i * k;
        c[e] = row_times_row(a + i * k, b + j * k, k);
    }
    meet(s);
}

/* b = alpha a + beta I; may be a */
static __device__ void copy(const kxk *s, const double *a, double *b, double alpha = 1, double beta = 0)
{
    EACH_OF(s, e, s->k * s->k) b[e] = alpha * a[e] + (on_diagonal(s, e) ? beta : 0);
    meet(s);
}

static __device__ void affine(const kxk *s, double alpha, double beta, double *a)
{
    copy(s, a, a, alpha, beta);
}

static __device__ void identity(const kxk *s, double *a)
{
    EACH_OF(s, e, s->k * s->k) a[e] = on_diagonal(s, e);
    meet(s);
}

/* largest row sum of |a|: bounds every eigenvalue of a symmetric a */
static __device__ double row_sum_norm(const kxk *s, const double *a)
{
    double norm = 0;
    EACH_OF(s, i, s->k)
    {
        double sum = 0;
#pragma unroll 4
        for (int j = 0; j < s->k; j++) sum += fabs(a[i * s->k + j]);
        s->rows[i] = sum;
    }
    meet(s);
#pragma unroll 4
    for (int i = 0; i < s->k; i++) norm = s->rows[i] <= norm ? norm : s->rows[i]; /* a NaN is passed on */
    meet(s);
    return norm;
}

/* f = cos sqrt X, g = sinc sqrt X, h = (cos sqrt X - 1) / X: entire functions, so a Horner series
 * once X is scaled below 1, then the angle is doubled:
 *     g(4X) = g f,   f(4X) = 2 f^2 - 1,   h(4X) = -g^2 / 2.          x is overwritten. */
static __device__ void geodesic_series(kxk *s, double *x, double tolerance, double *&f, double *&g, double *h)
{
    const int k = s->k;
    double norm = row_sum_norm(s, x), scale = 1;
    int doublings = 0, terms = 1;
    for (; doublings < 30 && (norm > 1 || (h && doublings == 0)); doublings++) norm *= 0.25, scale *= 0.25;
    affine(s, scale, 0, x);
    for (double next = norm / 2; next > tolerance; terms++) next *= norm / ((2. * terms + 1) * (2. * terms + 2));
    identity(s, f), identity(s, g);
    for (int j = terms; j > 0; j--) {
        const double cf = -1 / ((2. * j - 1) * (2. * j)), cg = -1 / ((2. * j) * (2. * j + 1));
        EACH_OF(s, e, k * k) /* f = 1 + cf x f,  g = 1 + cg x g */
        {
            const int row = quotient(e, s->inverse), column = e - row * k;
            const double one = row == column;
            s->scratch[e] = one + cf * row_times_column(x + row * k, f + column, k);
            s->spare[e] = one + cg * row_times_column(x + row * k, g + column, k);
        }
        meet(s);
        swap(f, s->scratch), swap(g, s->spare);
    }
    for (; doublings > 0; doublings--) {
        if (h && doublings == 1) product(s, g, g, h, -0.5);
        product(s, g, f, s->scratch), product(s, f, f, s->spare, 2, -1);
        swap(g, s->scratch), swap(f, s->spare);
    }
}

/* Inverse of the lower Cholesky factor of an SPD a: a is overwritten by L, inv becomes L^-1. */
static __device__ void cholesky_inverse(const kxk *s, double *a, double *inv)
{
    const int k = s->k;
    for (int j = 0; j < k; j++) {
        EACH_OF(s, r, k - j)
        {
            const int i = j + r;
            double sum = a[i * k + j];
#pragma unroll 1
            for (int l = 0; l < j; l++) sum -= a[i * k + l] * a[j * k + l];
            s->rows[i] = sum;
        }
        meet(s);
        EACH_OF(s, r, k - j) a[(j + r) * k + j] = s->rows[j + r] / sqrt(s->rows[j]);
        meet(s);
    }
    EACH_OF(s, j, k) /* a thread a column */
    {
#pragma unroll 1
        for (int i = 0; i < j; i++) inv[i * k + j] = 0;
        for (int i = j; i < k; i++) {
            double sum = i == j;
#pragma unroll 1
            for (int l = j; l < i; l++) sum -= a[i * k + l] * inv[l * k + j];
            inv[i * k + j] = sum / a[i * k + i];
        }
    }
    meet(s);
}

/* Pair t of a round of a tournament among m = k or k + 1 (a bye): in m - 1 rounds everyone meets everyone once. */
static __device__ inline bool pair_of(int t, int round, int k, int *p, int *q)
{
    const int m = k + k % 2, x = t ? (round + t) % (m - 1) : m - 1, y = (round - t + m - 1) % (m - 1);
    *p = MIN(x, y), *q = MAX(x, y);
    return *q < k;
}

/* Jacobi, the k/2 disjoint rotations of a round at once: a = V' diag(a) V with the eigenvectors in
 * the rows of v; a is overwritten. By value: a pointer would keep the caller's in memory. */
static __device__ __noinline__ void eigen(kxk team, double *a, double *v)
{
    const kxk *const s = &team;
    const int k = s->k, rounds = k + k % 2 - 1, pairs = (k + 1) / 2;
    double *rotation = s->rows; /* [pairs][cos, sin] */
    identity(s, v);
    for (int sweep = 0; sweep < 30; sweep++) {
        double off = 0, diagonal = 0;
        EACH_OF(s, i, k)
        {
            double sum = 0;
            for (int j = 0; j < i; j++) sum += a[i * k + j] * a[i * k + j];
            s->rows[i] = sum;
        }
        meet(s);
        for (int i = 0; i < k; i++) off += s->rows[i], diagonal += a[i * k + i] * a[i * k + i];
        meet(s);
        if (!(off > 1e-33 * diagonal)) return;
        for (int round = 0; round < rounds; round++) {
            int p, q;
            EACH_OF(s, t, pairs)
            {
                double c = 1, sn = 0;
                if (pair_of(t, round, k, &p, &q) && a[p * k + q] != 0) {
                    const double theta = (a[q * k + q] - a[p * k + p]) / (2 * a[p * k + q]);
                    const double tan = (theta >= 0 ? 1 : -1) / (fabs(theta) + sqrt(theta * theta + 1));
                    c = 1 / sqrt(tan * tan + 1), sn = tan * c;
                }
                rotation[2 * t] = c, rotation[2 * t + 1] = sn;
            }
            meet(s);
            EACH_OF(s, e, pairs * k) /* columns p and q */
            {
                const double c = rotation[e / k * 2], sn = rotation[e / k * 2 + 1];
                if (!pair_of(e / k, round, k, &p, &q)) continue;
                double *const row = a + e % k * k;
                const double x = row[p], y = row[q];
                row[p] = c * x - sn * y, row[q] = sn * x + c * y;
            }
            meet(s);
            EACH_OF(s, e, pairs * k) /* rows p and q */
            {
                const double c = rotation[e / k * 2], sn = rotation[e / k * 2 + 1];
                if (!pair_of(e / k, round, k, &p, &q)) continue;
                const int r = e % k;
                const double x = a[p * k + r], y = a[q * k + r], vx = v[p * k + r], vy = v[q * k + r];
                a[p * k + r] = r == q ? 0 : c * x - sn * y, a[q * k + r] = r == p ? 0 : sn * x + c * y;
                v[p * k + r] = c * vx - sn * vy, v[q * k + r] = sn * vx + c * vy;
            }
            meet(s);
        }
    }
}

/* out = V' diag(values) V */
static __device__ void from_eigen(const kxk *s, const double *v, const double *values, double *out)
{
    const int k = s->k;
    EACH_OF(s, e, k * k)
    {
        double sum = 0;
        for (int l = 0; l < k; l++) sum += values[l] * v[l * k + e / k] * v[l * k + e % k];
        out[e] = sum;
    }
    meet(s);
}

/* out = a^-1/2 of an SPD a (overwritten); false if a is singular in working precision */
static __device__ bool inverse_root(const kxk *s, double *a, double *out)
{
    double *values = s->values, least = INFINITY, most = 0;
    eigen(*s, a, s->scratch);
    for (int i = 0; i < s->k; i++) least = fmin(least, a[i * s->k + i]), most = fmax(most, a[i * s->k + i]);
    EACH_OF(s, i, s->k) values[i] = 1 / sqrt(a[i * s->k + i]);
    meet(s);
    if (!(least > 1e-12 * most)) return false;
    from_eigen(s, s->scratch, values, out);
    return true;
}

/* z = (I + X)^-1/2 by Newton-Schulz on A = (I + X) / b, b a bound of |I + X|: z <- z (3 I - A z^2) / 2 from z = I. The
 * residual e of A z^2 is 1 - 1/b at first and e^2 (3 + e) / 4 next. X >= 0 is overwritten by A. */
static __device__ void inverse_root_series(kxk *s, double *x, double tolerance, double *&z)
{
    const double bound = 1 + row_sum_norm(s, x);
    affine(s, 1 / bound, 1 / bound, x);
    identity(s, z);
    for (double e = 1 - 1 / bound; e > tolerance; e *= e * (3 + e) / 4) {
        product(s, z, z, s->scratch), product(s, x, s->scratch, s->spare, -0.5, 1.5);
        product(s, z, s->spare, s->scratch), swap(z, s->scratch);
    }
    affine(s, 1 / sqrt(bound), 0, z);
}

/* f(X) and g(X), and h(X) where asked (geodesic only), for X of moderate size; x is overwritten. */
static __device__ void retraction(kxk *s, subspace_retraction kind, double tolerance, double *x, double *&f, double *&g,
                                  double *h)
{
    const int k = s->k;
    if (kind == SUBSPACE_GEODESIC) {
        geodesic_series(s, x, tolerance, f, g, h);
    } else if (kind == SUBSPACE_POLAR) {
        inverse_root_series(s, x, tolerance, f), copy(s, f, g);
    } else if (kind == SUBSPACE_QR) {
        affine(s, 1, 1, x);
        cholesky_inverse(s, x, f), copy(s, f, g);
    } else { /* with A = I + X/4: g = A^-1 = L^-T L^-1, f = 2 A^-1 - I */
        affine(s, 0.25, 1, x);
        cholesky_inverse(s, x, s->scratch);
        EACH_OF(s, e, k * k)
        {
            const int i = quotient(e, s->inverse);
            s->spare[(e - i * k) * k + i] = s->scratch[e];
        }
        meet(s);
        product(s, s->spare, s->scratch, g), copy(s, g, f, 2, -1);
    }
}

/* The same by eigenvalues, for steps so long that a series or an inverse would lose digits. */
static __device__ void retraction_exact(const kxk *s, subspace_retraction kind, double *x, double *f, double *g,
                                        double *h)
{
    const int k = s->k;
    double *fs = s->values, *gs = fs + k, *hs = gs + k; /* of eigenvalues */
    if (kind == SUBSPACE_QR) {
        affine(s, 1, 1, x);
        cholesky_inverse(s, x, f), copy(s, f, g);
        return;
    }
    eigen(*s, x, s->scratch);
    EACH_OF(s, i, k)
    {
        const double e = fmax(x[i * k + i], 0.), angle = sqrt(e), half = angle / 2;
        const double sinc = half > 1e-8 ? sin(half) / half : 1;
        if (kind == SUBSPACE_GEODESIC) fs[i] = cos(angle), gs[i] = sinc * cos(half), hs[i] = -0.5 * sinc * sinc;
        if (kind == SUBSPACE_POLAR) fs[i] = gs[i] = 1 / sqrt(1 + e);
        if (kind == SUBSPACE_CAYLEY) fs[i] = (4 - e) / (4 + e), gs[i] = 4 / (4 + e);
    }
    meet(s);
    from_eigen(s, s->scratch, fs, f), from_eigen(s, s->scratch, gs, g);
    if (h && kind == SUBSPACE_GEODESIC) from_eigen(s, s->scratch, hs, h);
}

#endif
