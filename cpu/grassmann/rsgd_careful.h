/* rsgd_careful.h - the slow, sure step of one class, for what the fast one cannot vouch for: steps
 * so long that dir dir' - P P' cancels, frames far from orthonormal, numbers that overflow a sum in
 * working precision. D is stored and projected twice, every sum is in double, f and g come from
 * eigenvalues, and the result is orthonormalised once more.
 *
 * Included by rsgd_lines.h, without T and once per precision.
 */
#include "rsgd.h"
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

/* gram = a b', rows of n, in double; a and b are [k, n]. False if anything in it is not finite. */
static bool FN(gram_exact)(const rsgd_slot *s, const T *a, const T *b, double *gram)
{
    const int64_t n = s->frames->n;
    double all = 0;
    memset(gram, 0, (size_t)(s->kp * s->kp) * sizeof *gram);
    for (int64_t i = 0; i < s->k; i++)
        for (int64_t j = 0; j < s->k; j++) {
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t l = 0; l < n; l++) sum += (double)a[i * n + l] * (double)b[j * n + l];
            gram[i * s->kp + j] = sum;
            all += fabs(sum);
        }
    return isfinite(all);
}

/* w <- e w + f d, column by column; d may be NULL. */
static void FN(combine_exact)(const rsgd_slot *s, const double *e, const double *f, const T *d, T *w)
{
    const int64_t n = s->frames->n, k = s->k, kp = s->kp;
    double *column = s->q.values; /* [k] */
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < k; i++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++) sum += e[i * kp + l] * (double)w[l * n + j];
            for (int64_t l = 0; d && l < k; l++) sum += f[i * kp + l] * (double)d[l * n + j];
            column[i] = sum;
        }
        for (int64_t i = 0; i < k; i++) w[i * n + j] = (T)column[i];
    }
}

/* d <- d - (d w') w; `gram` receives d w' */
static void FN(project)(const rsgd_slot *s, const T *w, T *d, double *gram, double *eye)
{
    FN(gram_exact)(s, d, w, gram);
    identity(&s->q, eye);
    affine(&s->q, -1, 0, gram);
    FN(combine_exact)(s, eye, gram, w, d);
}

/* Not inlined: the fast step gets all that the compiler allows of that. */
static __attribute__((noinline)) bool FN(careful)(rsgd_slot *s)
{
    const rsgd_step *st = &s->step;
    const subspace_frames *p = s->frames;
    const kxk *q = &s->q;
    const int64_t n = p->n, k = s->k;
    const double a = -s->lr;
    double *R = s->R, *P = s->P, *S = s->S, *X = s->X, *f = s->f, *g = s->g, *E = s->E, *h = s->h;
    T *w = (T *)p->weight + s->row * n, *dir = s->dir, *buffer = p->buffer ? (T *)p->buffer + s->row * n : NULL;
    const T *grad = (const T *)p->grad + s->row * n;

    for (int64_t i = 0; i < k * n; i++) {
        const double m = st->mg * (double)grad[i] + (buffer ? st->mm * (double)buffer[i] : 0) + st->mw * (double)w[i];
        dir[i] = (T)(st->dm * m + st->dg * (double)grad[i] + st->dw * (double)w[i]);
    }
    if (!FN(gram_exact)(s, dir, dir, S) || !FN(gram_exact)(s, w, w, X)) return false;
    if (!isfinite(a * a * norm_of(q, S)) || !inverse_root(q, X, R)) return false;

    /* from here on everything is finite, and memory may change */
    if (buffer)
        for (int64_t i = 0; i < k * n; i++)
            buffer[i] = (T)(st->mg * (double)grad[i] + st->mm * (double)buffer[i] + st->mw * (double)w[i]);
    if (a == 0) return true; /* a step of no length leaves every bit */
    FN(combine_exact)(s, R, NULL, NULL, w);
    FN(project)(s, w, dir, P, E);
    skew(q, -a, P, s->Pm); /* it is -dir W' now */
    FN(project)(s, w, dir, P, E);
    FN(gram_exact)(s, dir, dir, S);
    for (int64_t i = 0; i < s->kp * s->kp; i++) X[i] = a * a * S[i];
    if (st->stiefel) stiefel(q, st->kind, true, 1e-19, s->Pm, X, f, g, h, s->Y);
    else retraction(q, st->kind, true, 0, X, f, g, h);

    if (st->parallel) { /* V + Y (a^2 h D - a g W), V the horizontal part of M and Y = V D', as in step_class */
        FN(project)(s, w, buffer, P, E);
        FN(project)(s, w, buffer, P, E);
        FN(gram_exact)(s, buffer, dir, P);
        identity(q, E);
        product(q, P, h, X), affine(q, a * a, 0, X);
        FN(combine_exact)(s, E, X, dir, buffer);
        product(q, P, g, X), affine(q, -a, 0, X);
        FN(combine_exact)(s, E, X, w, buffer);
    }
    if (st->tangent) {
        FN(gram_exact)(s, buffer, w, P);
        identity(q, E), negative_symmetric(q, P, X);
        FN(combine_exact)(s, E, X, w, buffer);
    }
    affine(q, a, 0, g);
    FN(combine_exact)(s, f, g, dir, w);
    FN(gram_exact)(s, w, w, X);
    if (inverse_root(q, X, R)) FN(combine_exact)(s, R, NULL, NULL, w);
    return true;
}

#endif
