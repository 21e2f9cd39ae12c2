/* rsgd_batches.h - the step of frames of few rows, of several classes at once: the Gram pass of every class first, then
 * the k x k part of all (turn_batch, as step_class does it, see kxk_batch.h), then every class's second pass. A class
 * of fewer rows than others has zeros in theirs.
 *
 * Included by rsgd.c, without T and once per precision.
 */
#include "rsgd_lines.h"
#ifndef SUBSPACE_RSGD_BATCHES_H /* ------------------------------------------------ read once */
#define SUBSPACE_RSGD_BATCHES_H
#include "kxk_batch.h"

/* From the Gram matrices to the coefficients E and g of W and dir. The lanes that they are good for. */
static chosen turn_batch(subspace_retraction kind, double tolerance, const batch *s)
{
    const int64_t k = s->k, size = k * k;
    const wide a = s->a;
    wide *R = s->R, *E = s->E, *S = s->S, *P = s->P, *X = s->X, *f = s->f, *g = s->g, *t = s->t, trace = {0};
    chosen good = s->rows > 0;
    if (any_of(s->rows < k)) /* rows that a class has not are in order, and go nowhere */
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < k; j++) {
                const chosen has = s->rows > MAX(i, j);
                R[i * k + j] = choose(has, R[i * k + j], all_lanes(i == j));
                E[i * k + j] = choose(has, E[i * k + j], (wide){0});
                S[i * k + j] = choose(has, S[i * k + j], (wide){0});
            }
    for (int64_t i = 0; i < k; i++) {
        for (int64_t j = 0; j <= i; j++) {
            const wide q = R[i * k + j], far = q - (i == j);
            good &= far * far < 1e-4;
            R[i * k + j] = R[j * k + i] = 1.5 * (i == j) - 0.5 * q, S[j * k + i] = S[i * k + j];
        }
        trace += S[i * k + i];
    }
    good &= a * a * trace < 10;
    batch_product(k, E, R, P), batch_square(k, P, t);
    for (int64_t i = 0; i < size; i++) X[i] = a * a * (S[i] - t[i]);
    wide norm = choose(good, batch_norm(k, X), (wide){0});
    if (kind == SUBSPACE_GEODESIC) {
        batch_geodesic(s, tolerance, norm);
    } else if (kind == SUBSPACE_POLAR) { /* longer ones are turned by eigenvalues */
        good &= norm <= 0.5;
        batch_polar(s, tolerance, choose(good, norm, (wide){0}));
    } else if (kind == SUBSPACE_QR) {
        add_identity(k, X);
        batch_cholesky_inverse(k, X, f), memcpy(g, f, (size_t)size * sizeof *g);
    } else {
        for (int64_t i = 0; i < size; i++) X[i] *= 0.25;
        add_identity(k, X);
        batch_cholesky_inverse(k, X, f);
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < k; j++) t[i * k + j] = f[j * k + i];
        batch_square(k, t, g);
        for (int64_t i = 0; i < size; i++) f[i] = 2 * g[i];
        for (int64_t i = 0; i < k; i++) f[i * (k + 1)] -= 1;
    }
    batch_product(k, g, P, t);
    for (int64_t i = 0; i < size; i++) X[i] = f[i] - a * t[i], g[i] *= a;
    batch_product(k, X, R, E);
    const chosen still = a == 0; /* a step of no length leaves every bit */
    for (int64_t i = 0; any_of(still) && i < k; i++)
        for (int64_t j = 0; j < k; j++) E[i * k + j] = choose(still, all_lanes(i == j), E[i * k + j]);
    return good;
}

#endif
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

/* The Gram matrices, one after the other, into lanes; what is read beyond a row goes nowhere. */
static void FN(gram_of_batch)(rsgd_slot *s, const batch *b)
{
    const int64_t k = b->k, apart = 4 * k * k + 8;
    double *gram = (double *)b->P; /* up to the last matrix: none is there yet */
    const double *from[3][WIDE];
    int64_t ld[WIDE];
    for (int64_t c = 0; c < WIDE; c++, gram += apart) {
        const int64_t rows = b->rows[c];
        ld[c] = rows_of(2, rows);
        from[0][c] = gram, from[1][c] = gram + rows * ld[c], from[2][c] = from[1][c] + rows;
        if (rows == 0) continue;
        s->row = b->row[c], s->k = rows;
        FN(gram_of)(s, gram);
    }
    wide *const to[] = {b->R, b->E, b->S}; /* W W', dir W', dir dir' */
    for (int block = 0; block < 3; block++)
        for (int64_t i = 0; i < k; i++) {
            into_lanes(from[block], 0, to[block] + i * k);
            for (int64_t j = 4; j < k && (block == 1 || j <= i); j += 4)
                into_lanes(from[block], j, to[block] + i * k + j);
            for (int64_t c = 0; c < WIDE; c++) from[block][c] += ld[c];
        }
}

/* Of the classes those that the fast step is not for, with the bits of the answer: nothing of them was changed. */
static uint64_t FN(step_batch)(rsgd_slot *s, const batch *b)
{
    const int64_t k = b->k, apart = 2 * k * k + 16;
    four row[WIDE];
    T *coef = (void *)b->P, *to[WIDE];
    FN(gram_of_batch)(s, b);
    const chosen good = turn_batch(s->step.kind, IS_F32 ? 1e-10 : 1e-19, b);
    for (int64_t c = 0; c < WIDE; c++) to[c] = coef + c * apart;
    for (int64_t i = 0; i < 2 * k; i++) { /* in the order of addresses: what is written beyond a row is replaced */
        const wide *from = (i % 2 ? b->g : b->E) + i / 2 * k;
        for (int64_t j = 0; j < k; j += 4) {
            out_of_lanes(from + j, row);
            for (int64_t c = 0; c < WIDE; c++) *(FN(quad) *)(to[c] + j) = __builtin_convertvector(row[c], FN(quad));
        }
        for (int64_t c = 0; c < WIDE; c++) to[c] += b->rows[c];
    }
    uint64_t left = 0;
    for (int64_t c = 0; c < b->count; c++, coef += apart) {
        s->row = b->row[c], s->k = b->rows[c];
        if (good[c]) FN(combine)(s, coef, 1, false);
        else left |= (uint64_t)1 << c;
    }
    return left;
}

#endif
