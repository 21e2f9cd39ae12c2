/* rsgd_lines.h - the step of lines, frames of a single row: of as many classes at once as a vector has lanes, so that
 * what a line needs between its two passes, a few numbers, is computed for all of them together.
 *
 * Included by rsgd_batches.h, without T and once per precision.
 */
#include "rsgd_careful.h"
#ifndef SUBSPACE_RSGD_LINES_H /* -------------------------------------------------- read once */
#define SUBSPACE_RSGD_LINES_H

enum {
    LINES = 16,             /* at most */
    LINES_BYTES = 48 << 10, /* of W, grad and M: they stay in L2 between the passes */
    LINE_PIECE = 2048       /* columns summed in working precision */
};

typedef struct lines {
    double ww[LINES], wd[LINES], dd[LINES]; /* the Gram matrix of w and dir */
    double lr[LINES], e[LINES], g[LINES];   /* w <- e w + g dir */
} lines;

/* From the sums to the coefficients, as step_class does it. */
static inline void turn_lines(subspace_retraction kind, lines *s)
{
    for (int i = 0; i < LINES; i++) {
        const double a = -s->lr[i], r = 1.5 - 0.5 * s->ww[i], p = s->wd[i] * r;
        const double x = a * a * (s->dd[i] - p * p);
        double f, g;
        if (kind == SUBSPACE_GEODESIC) { /* the series of a quarter of the angle, |x| < 10 / 16, doubled twice */
            const double y = x / 16;
            f = g = 1;
#pragma GCC unroll 9
            for (int j = 9; j > 0; j--) {
                g = 1 - y * (1 / ((2. * j) * (2. * j + 1))) * g;
                if (j > 1) f = 1 - y * (1 / ((2. * j - 1) * (2. * j))) * f;
            }
            double v = y / 2 * f; /* 1 - cos, which doubling leaves its digits */
            g *= 1 - v, v *= 2 * (2 - v);
            g *= 1 - v, v *= 2 * (2 - v);
            f = 1 - v;
        } else if (kind == SUBSPACE_CAYLEY) {
            g = 4 / (4 + x), f = 2 * g - 1;
        } else {
            f = g = 1 / sqrt(1 + x);
        }
        s->e[i] = a == 0 ? 1 : (f - a * g * p) * r; /* a step of no length leaves every bit */
        s->g[i] = a * g;
    }
}

#endif
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

/* `count` classes from the row s->row on; of those that the fast step is not for, with the bits of the answer. */
static inline __attribute__((always_inline))
uint64_t FN(lines_as)(rsgd_slot *s, int64_t count, const double *lr, const bool plain)
{
    enum { L = FN(LANES) };
    const subspace_frames *p = s->frames;
    const FN(weights) by = FN(weights_of)(&s->step);
    const int64_t n = p->n, at = s->row * n;
    T *weight = (T *)p->weight + at, *buffer = p->buffer ? (T *)p->buffer + at : NULL;
    const T *grad = (const T *)p->grad + at, *before = buffer ? buffer : grad;
    lines all = {.ww = {0}};
    FN(vec) moved;
    for (int64_t j0 = 0; j0 < n; j0 += LINE_PIECE) {
        FN(vec) ww[LINES] = {{0}}, wd[LINES] = {{0}}, dd[LINES] = {{0}};
        for (int64_t i = 0; i < count; i++) {
            FN(vec) a = {0}, b = {0}, c = {0};
            for (int64_t j = i * n + j0, end = i * n + MIN(n, j0 + LINE_PIECE); j < end; j += L) {
                const FN(vec) w = FN(lanes_of)(weight + j, end - j);
                const FN(vec) dir = FN(direction)(&by, plain, w, FN(lanes_of)(grad + j, end - j),
                                                  FN(lanes_of)(before + j, end - j), &moved);
                a += w * w, b += w * dir, c += dir * dir;
            }
            ww[i] = a, wd[i] = b, dd[i] = c;
        }
        for (int i = 0; i < LINES; i += L) {
            const FN(vec) a = FN(sums)(ww + i), b = FN(sums)(wd + i), c = FN(sums)(dd + i);
            for (int l = 0; l < L; l++)
                all.ww[i + l] += (double)a[l], all.wd[i + l] += (double)b[l], all.dd[i + l] += (double)c[l];
        }
    }
    uint64_t left = 0;
    for (int64_t i = 0; i < count; i++) {
        const double drift = all.ww[i] - 1, a = lr[i];
        all.lr[i] = a;
        if (!(drift * drift < 1e-4 && a * a * all.dd[i] < 10)) left |= (uint64_t)1 << i;
    }
    turn_lines(s->step.kind, &all);
    for (int64_t i = 0; i < count; i++) {
        const T e = (T)all.e[i], g = (T)all.g[i];
        if (left >> i & 1) continue;
        for (int64_t j = i * n, end = j + n; j < end; j += L) {
            const FN(vec) w = FN(lanes_of)(weight + j, end - j);
            const FN(vec) dir = FN(direction)(&by, plain, w, FN(lanes_of)(grad + j, end - j),
                                              FN(lanes_of)(before + j, end - j), &moved);
            __builtin_prefetch(weight + j + count * n, 1, 2), __builtin_prefetch(grad + j + count * n, 0, 2);
            __builtin_prefetch(before + j + count * n, 1, 2);
            if (buffer) FN(store)(buffer + j, moved, end - j);
            FN(store)(weight + j, e * w + g * dir, end - j);
        }
    }
    return left;
}

static uint64_t FN(step_lines)(rsgd_slot *s, int64_t count, const double *lr)
{
    return s->step.plain ? FN(lines_as)(s, count, lr, true) : FN(lines_as)(s, count, lr, false);
}

#endif
