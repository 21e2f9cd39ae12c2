/* face_split.h - the Gram matrices of many weightings of the same rows, as one product.
 *
 *     F[i, (a, b)] = z_ia z_ib,  a <= b        the face-splitting product, p = d(d+1)/2 columns, of which only a stripe
 *                                              of whole rows a exists at a time
 *     forward     G = W' F                     [k, p]: the upper half of every Z' diag(w_k) Z
 *     backward    q = F2 B'                    [n, k]: q_ik = z_i' B_k z_i, F2 being F with a < b doubled
 *                 M = W B                      [n, p]: dz_ia += M_i(a,b) z_ib, and dz_ib += M_i(a,b) z_ia where a < b
 *
 * Three products of 2 n k p flops; making F and using M costs 1/k of that. The forward shares the stripes among the
 * threads, the backward blocks of rows of Z: what threads write is disjoint.
 *
 * Included by coding_rate_soft.c, without T and once per precision.
 */
#ifndef SUBSPACE_FACE_SPLIT_H /* -------------------------------------------------- read once */
#define SUBSPACE_FACE_SPLIT_H
#include "coding_rate_soft.h"

/* The pairs (a, b) of whole rows a0 .. a1-1 of the packed upper half: `width` of them from `at` on. */
typedef struct stripe {
    int64_t a0, a1, at, width;
} stripe;

/* As many rows as stay within r->width, at least one; width 0 past the end. */
static stripe stripe_from(const soft_run *r, int64_t a0, int64_t at)
{
    stripe t = {a0, a0, at, 0};
    while (t.a1 < r->d && (t.width == 0 || t.width + r->d - t.a1 <= r->width)) t.width += r->d - t.a1++;
    return t;
}

static stripe first_stripe(const soft_run *r)
{
    return stripe_from(r, 0, 0);
}

static stripe next_stripe(const soft_run *r, const stripe *t)
{
    return stripe_from(r, t->a1, t->at + t->width);
}

#endif
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

/* `rows` rows of F, or with a factor of 2 of F2, for the pairs of a stripe */
static void FN(pairs)(const T *z, int64_t rows, int64_t d, const stripe *t, T factor, T *restrict f)
{
    for (int64_t i = 0; i < rows; i++, z += d)
        for (int64_t a = t->a0; a < t->a1; a++) {
            const T za = factor * z[a];
            for (int64_t b = a; b < d; b++) f[b - a] = za * z[b];
            f[0] = z[a] * z[a];
            f += d - a;
        }
}

static void FN(grams_split)(int64_t begin, int64_t end, void *arg)
{
    const soft_run *r = arg;
    const T *z = r->z, *w = r->w;
    T *inverse = r->inverse;
    for (int64_t slot = begin; slot < end; slot++) {
        T *f = slot_space(r, slot);
        int64_t turn = 0;
        for (stripe t = first_stripe(r); t.width > 0; t = next_stripe(r, &t)) {
            if (turn++ % r->slots != slot) continue;
            for (int64_t i = 0; i < r->n; i += r->depth) {
                const int64_t m = MIN(r->depth, r->n - i);
                FN(pairs)(z + i * r->d, m, r->d, &t, 1, f);
                GEMM(true, false, r->kc, t.width, m, 1, w + i * r->ldw, r->ldw, f, t.width, i > 0, inverse + t.at,
                     r->p);
            }
        }
    }
}

/* dz_ia += sum_b M_ab z_b and its transpose, for the pairs of a stripe of one row's M */
static void FN(apply_pairs)(const T *restrict z, int64_t d, const stripe *t, const T *restrict m, T *restrict dz)
{
    for (int64_t a = t->a0; a < t->a1; a++) {
        const T za = z[a];
        T sum = m[0] * za;
#pragma omp simd reduction(+ : sum)
        for (int64_t b = a + 1; b < d; b++) {
            sum += m[b - a] * z[b];
            dz[b] += m[b - a] * za;
        }
        dz[a] += sum;
        m += d - a;
    }
}

static void FN(gradients_split)(int64_t begin, int64_t end, void *arg)
{
    const soft_run *r = arg;
    const T *inverse = r->inverse;
    for (int64_t slot = begin; slot < end; slot++) {
        T *f = slot_space(r, slot);
        for (int64_t block = slot; block < r->blocks; block += r->slots) {
            int64_t i0, i1;
            share(r->n, block, r->blocks, &i0, &i1);
            const int64_t m = i1 - i0;
            const T *z = (const T *)r->z + i0 * r->d, *w = (const T *)r->w + i0 * r->ldw;
            T *dz = r->dz ? (T *)r->dz + i0 * r->d : NULL, *dw = r->dw ? (T *)r->dw + i0 * r->a->k + r->k0 : NULL;
            for (stripe t = first_stripe(r); t.width > 0; t = next_stripe(r, &t)) {
                if (dw) {
                    FN(pairs)(z, m, r->d, &t, 2, f);
                    GEMM(false, true, m, r->kc, t.width, 1, f, t.width, inverse + t.at, r->p, t.at > 0, dw, r->a->k);
                }
                if (!dz) continue;
                GEMM(false, false, m, t.width, r->kc, 1, w, r->ldw, inverse + t.at, r->p, 0, f, t.width);
                for (int64_t i = 0; i < m; i++) FN(apply_pairs)(z + i * r->d, r->d, &t, f + i * t.width, dz + i * r->d);
            }
            for (int64_t i = 0; dw && i < m; i++)
                for (int64_t k = 0; k < r->kc; k++)
                    dw[i * r->a->k + k] = (T)(r->to_dw * (double)dw[i * r->a->k + k] + r->shift[r->k0 + k]);
        }
    }
}

#endif
