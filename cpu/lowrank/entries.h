/* entries.h - what is done to the entries of one matrix, a part of them at a time: lengths, scaling, inner products.
 *
 * Sums are in double, within a part and then over the parts in their order, whatever the number of threads.
 *
 * Included by newton_schulz.c, once without T and once per precision.
 */
#include "cpu.h"
#include "widen.h"
#ifndef T

enum {
    PARTS = 16, /* of a matrix */
    SOME = 512, /* entries that are widened at one go */
};

typedef struct entrywise {
    subspace_dtype dtype; /* of what lies in the caller's memory */
    int64_t at, count;    /* there: the first entry of the matrix, and how many there are */
    const void *from;     /* there, or [count] of T */
    void *to;             /* there, or [count] of T */
    const void *x;        /* [count] of T: X_0 */
    double divisor, factor;
    double *part;
} entrywise;

#else

/* Sums of squares; of float64, whose squares leave its range, of the entries divided by the part's largest. */
static void FN(squares)(int64_t begin, int64_t end, void *arg)
{
    const entrywise *e = arg;
    for (int64_t part = begin; part < end; part++) {
        int64_t i, to;
        share(e->count, part, PARTS, &i, &to);
        double sum = 0, largest = IS_F32; /* float32's squares fit into a double */
        T some[SOME];
        for (int pass = IS_F32; pass < 2; pass++)
            for (int64_t from = i, rows; from < to; from += rows) {
                rows = MIN(SOME, to - from);
                FN(widen)(e->dtype, e->from, e->at + from, rows, some);
                if (pass == 0) {
                    for (int64_t j = 0; j < rows; j++) largest = MAX(largest, fabs((double)some[j]));
                    continue;
                }
                const double unit = largest > 0 ? largest : 1; /* else zeros, or NaN */
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < rows; j++) {
                    const double one = IS_F32 ? (double)some[j] : (double)some[j] / unit;
                    sum += one * one;
                }
            }
        e->part[part] = sum, e->part[PARTS + part] = largest;
    }
}

static void FN(divide)(int64_t begin, int64_t end, void *arg)
{
    const entrywise *e = arg;
    for (int64_t part = begin; part < end; part++) {
        int64_t i, to;
        share(e->count, part, PARTS, &i, &to);
        T *x = e->to;
        FN(widen)(e->dtype, e->from, e->at + i, to - i, x + i);
        for (; i < to; i++) x[i] = (T)((double)x[i] / e->divisor);
    }
}

static void FN(dot)(int64_t begin, int64_t end, void *arg)
{
    const entrywise *e = arg;
    const T *x = e->x, *y = e->from;
    for (int64_t part = begin; part < end; part++) {
        int64_t i, to;
        double sum = 0;
        share(e->count, part, PARTS, &i, &to);
        for (; i < to; i++) sum += (double)x[i] * (double)y[i];
        e->part[part] = sum;
    }
}

/* to = (from - factor x) / divisor, in the caller's type */
static void FN(put)(int64_t begin, int64_t end, void *arg)
{
    const entrywise *e = arg;
    const T *x = e->x, *y = e->from;
    for (int64_t part = begin; part < end; part++) {
        int64_t i, to;
        share(e->count, part, PARTS, &i, &to);
        for (; i < to; i++) {
            const double value = ((double)y[i] - (x ? e->factor * (double)x[i] : 0)) / e->divisor;
            if (e->dtype == SUBSPACE_F16) ((uint16_t *)e->to)[e->at + i] = f32_to_f16((float)value);
            else if (e->dtype == SUBSPACE_BF16) ((uint16_t *)e->to)[e->at + i] = f32_to_bf16((float)value);
            else ((T *)e->to)[e->at + i] = (T)value;
        }
    }
}

#endif
