/* rsgd_careful.cuh - the slow, sure step of one class, for what the fast one cannot vouch for: steps
 * so long that dir dir' - P P' cancels, frames far from orthonormal, numbers that overflow a sum in
 * working precision. D is computed again in every pass rather than stored, projected twice, every
 * sum is in double, f and g come from eigenvalues, and the result is orthonormalised once more. One block does it, the
 * first of its cluster; what the fast step kept in shared memory is given up.
 *
 * Included by rsgd.cu.
 */
#ifndef SUBSPACE_RSGD_CAREFUL_CUH
#define SUBSPACE_RSGD_CAREFUL_CUH
#include "rsgd.cuh"

/* Rows made of the loaded ones: on_w W + on_dir dir + block `plus` (0 W, 1 dir, 2 M'; -1 none). */
typedef struct made {
    const double *on_w, *on_dir;
    int plus;
} made;

template <typename T>
static __device__ void make_rows(const rsgd_class<T> *s, const made &a, int m, int ld, const double *tile, double *out)
{
    const int k = s->k;
    EACH(e, k * m)
    {
        const int i = e / m, j = e % m;
        double sum = a.plus < 0 ? 0 : tile[(a.plus * k + i) * ld + j];
        for (int l = 0; a.on_w && l < k; l++) sum += a.on_w[i * k + l] * tile[l * ld + j];
        for (int l = 0; a.on_dir && l < k; l++) sum += a.on_dir[i * k + l] * tile[(k + l) * ld + j];
        out[i * ld + j] = sum;
    }
}

/* gram = a b' in double. False if anything in it is not finite. */
template <typename T>
static __device__ __noinline__ bool gram_exact(const rsgd_class<T> *s, const made &a, const made &b, double *gram)
{
    const int k = s->k, loaded = (int)rsgd_round(s->step->rule.held * k, 4);
    const int width = tile_width<double>(s->tile_bytes, loaded + 2 * k, 2), ld = width + 2;
    double *tile = (double *)s->tile, *x = tile + loaded * ld, *y = x + k * ld, all = 0;
    EACH(e, k * k) gram[e] = 0;
    for (int64_t j0 = 0; j0 < s->n; j0 += width) {
        const int m = (int)MIN(width, s->n - j0);
        load<T, double>(s, j0, m, ld);
        make_rows(s, a, m, ld, tile, x), make_rows(s, b, m, ld, tile, y);
        __syncthreads();
        EACH(e, k * k)
        {
            double sum = 0;
            for (int j = 0; j < m; j++) sum += x[e / k * ld + j] * y[e % k * ld + j];
            gram[e] += sum;
        }
    }
    __syncthreads();
    EACH(i, k)
    {
        double sum = 0;
        for (int j = 0; j < k; j++) sum += fabs(gram[i * k + j]);
        s->q.rows[i] = sum;
    }
    __syncthreads();
    for (int i = 0; i < k; i++) all += s->q.rows[i];
    __syncthreads();
    return isfinite(all);
}

/* on = the matrix with rows - on W orthogonal to w = R W, `rows` being dir or M': found, then corrected */
template <typename T>
static __device__ void project(const rsgd_class<T> *s, const double *R, int rows, double *P, double *E, double *on)
{
    const made w = {R, NULL, -1};
    gram_exact(s, {NULL, NULL, rows}, w, P);
    product(&s->q, P, R, on, -1);
    gram_exact(s, {on, NULL, rows}, w, P);
    product(&s->q, P, R, E);
    EACH(e, s->k * s->k) on[e] -= E[e];
    __syncthreads();
}

/* [W; M] <- coef [W; dir; M'] or, with one output, only W. */
template <typename T> static __device__ __noinline__ void combine_exact(const rsgd_class<T> *s, int outputs, bool write)
{
    const int width = tile_width<double>(s->tile_bytes, (int)rsgd_round(s->step->rule.held * s->k, 4), 2);
    combine<T, double>(s, width, width + 2, false, outputs, write);
}

template <typename T> static __device__ void clear(const rsgd_class<T> *s)
{
    EACH(e, s->step->rule.outputs * s->step->rule.blocks * s->k * s->kp)((double *)s->coef)[e] = 0;
    __syncthreads();
}

/* By value: a pointer to it would keep the class of the fast path in memory. */
template <typename T> static __device__ __noinline__ bool careful(rsgd_class<T> c)
{
    rsgd_class<T> *const s = &c;
    kxk *q = &s->q;
    const int k = s->k;
    const double a = -s->lr;
    const bool parallel = s->step->parallel && a != 0; /* a step of no length leaves every bit, and M as it is */
    const bool tangent = s->step->tangent && a != 0;
    double *R = matrix(s, AT_R), *P = matrix(s, AT_P), *S = matrix(s, AT_S), *X = matrix(s, AT_X), *f = matrix(s, AT_F),
           *g = matrix(s, AT_G), *E = matrix(s, AT_E), *Dw = matrix(s, AT_PM), *h = matrix(s, AT_H),
           *Mw = matrix(s, AT_MW), *Y = matrix(s, AT_Y);
    q->thread = (int)threadIdx.x, q->threads = (int)blockDim.x;
    s->begin = 0, s->end = s->n;

    if (!gram_exact(s, {NULL, NULL, 1}, {NULL, NULL, 1}, S)) return false;
    if (!gram_exact(s, {NULL, NULL, 0}, {NULL, NULL, 0}, X)) return false;
    if (!isfinite(a * a * row_sum_norm(q, S)) || !inverse_root(q, X, R)) return false;

    project(s, R, 1, P, E, Dw); /* D = dir + Dw W */
    gram_exact(s, {Dw, NULL, 1}, {Dw, NULL, 1}, S);
    copy(q, S, X, a * a);
    if (s->step->stiefel) {
        gram_exact(s, {NULL, NULL, 1}, {R, NULL, -1}, P), skew(q, a, P, S);
        stiefel(*q, s->step->kind, true, 1e-19, S, X, f, g, P, E);
    } else {
        retraction_exact(q, s->step->kind, X, f, g, parallel ? h : NULL);
    }

    clear(s);
    if (tangent) { /* M' - sym(M' w') w */
        gram_exact(s, {NULL, NULL, s->step->rule.blocks - 1}, {R, NULL, -1}, P);
        negative_symmetric(q, P, X), product(q, X, R, E), put<T, double>(s, E, 1, 0);
        identity(q, E), put<T, double>(s, E, 1, s->step->rule.blocks - 1);
    }
    if (parallel) { /* V + Y (a^2 h D - a g w), V the horizontal part of M and Y = V D' */
        if (s->step->rule.blocks == 3) project(s, R, 2, P, E, Mw), gram_exact(s, {Mw, NULL, 2}, {Dw, NULL, 1}, Y);
        else copy(q, Dw, Mw), copy(q, S, Y); /* M' is dir */
        product(q, Y, h, E, a * a);
        product(q, E, Dw, X), product(q, Y, g, P), product(q, P, R, S);
        EACH(e, k * k) X[e] += Mw[e] - a * S[e];
        __syncthreads();
        put<T, double>(s, X, 1, 0);
        if (s->step->rule.blocks == 2) affine(q, 1, 1, E);
        put<T, double>(s, E, 1, 1);
        identity(q, E);
        if (s->step->rule.blocks == 3) put<T, double>(s, E, 1, 2);
    }
    product(q, f, R, E), product(q, g, Dw, P); /* f w + a g D = E W + P dir */
    EACH(e, k * k) E[e] += a * P[e];
    __syncthreads();
    copy(q, g, P, a);
    if (a == 0) identity(q, E);
    put<T, double>(s, E, 0, 0), put<T, double>(s, P, 0, 1);
    combine_exact(s, parallel || tangent ? 2 : 1, s->buffer && !parallel && !tangent);
    if (a != 0 && gram_exact(s, {NULL, NULL, 0}, {NULL, NULL, 0}, X) && inverse_root(q, X, R)) {
        clear(s);
        put<T, double>(s, R, 0, 0);
        combine_exact(s, 1, false);
    }
    return true;
}

#endif
