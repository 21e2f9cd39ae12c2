/* qr_update.h - U'U = I + X from the points themselves, where X has lost what I adds to it.
 *
 *     [U; P] = Q [U+; 0],    U+'U+ = U'U + P'P    a Householder reflection for each column
 *
 * From U = I on, a few rows P of sqrt(a) Z at a time, 2 s^2 flops a row: nothing is squared, so that long points of low
 * rank keep twice the digits that a Gram matrix leaves them. float64 alone.
 *
 * Included by coding_rate.h and each_class.h.
 */
#ifndef SUBSPACE_QR_UPDATE_H
#define SUBSPACE_QR_UPDATE_H
#include "cpu.h"

enum { QR_ROWS = 32 };
static const double LOST = 1e10;      /* about the condition of I + X from which on float64 loses more than 1e-6 */
static const double MOST_LOST = 1e12; /* the same of U, whose condition is the root of that */

/* U [s, s] and P [w, s], which is overwritten; t: [s] */
static void qr_update(int64_t s, int64_t w, double *u, int64_t ldu, double *p, int64_t ldp, double *restrict t)
{
    for (int64_t j = 0; j < s; j++) {
        double *restrict uj = u + j * ldu, sum = 0;
        for (int64_t i = 0; i < w; i++) sum += p[i * ldp + j] * p[i * ldp + j];
        if (sum == 0) continue;
        const double root = sqrt(uj[j] * uj[j] + sum), v = -sum / (uj[j] + root), beta = 2 / (v * v + sum);
        for (int64_t k = j + 1; k < s; k++) t[k] = v * uj[k];
        for (int64_t i = 0; i < w; i++) {
            const double *restrict pi = p + i * ldp;
            for (int64_t k = j + 1; k < s; k++) t[k] += pi[j] * pi[k];
        }
        for (int64_t k = j + 1; k < s; k++) uj[k] -= v * (t[k] *= beta);
        for (int64_t i = 0; i < w; i++) {
            double *restrict pi = p + i * ldp;
            for (int64_t k = j + 1; k < s; k++) pi[k] -= t[k] * pi[j];
        }
        uj[j] = root;
    }
}

/* 1/2 log det of U'U; NaN where a pivot is no more than the rounding of its column. t: [s] */
static double qr_half(int64_t s, const double *u, int64_t ldu, double *restrict t)
{
    double half = 0;
    memset(t, 0, (size_t)s * sizeof(double));
    for (int64_t i = 0; i < s; i++) {
        const double *restrict row = u + i * ldu;
        for (int64_t j = i; j < s; j++) t[j] += row[j] * row[j];
        if (!(row[i] > 0 && sqrt(t[i]) <= MOST_LOST * row[i])) return NAN;
        half += log(row[i]);
    }
    return half;
}

#endif
