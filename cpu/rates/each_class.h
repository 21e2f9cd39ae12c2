/* each_class.h - what is done one class at a time: the factors, and of few classes the Gram matrices and gradients.
 *
 *     forward     G_k = (diag(w_k) Z)' Z       blocks of rows a of the upper half, each with its own scaled copy of Z
 *     backward    Y = Z A_k^-1,  q_ik = z_i' y_i,  dz_i += w_ik y_i              blocks of rows of Z
 *
 * The same flops as the face-splitting product, with the features for long sides instead of the classes. In a careful
 * run A_k = U'U is kept instead of A_k^-1: V = Z U^-1, q_ik = |v_i|^2, Y = V U^-T. Where A_k^-1 z is much shorter
 * than z, products with an inverse cancel; triangular solves do not. Where A_k itself has lost I, U is made of the
 * points (qr_update.h).
 *
 * Included by coding_rate_soft.c, without T and once per precision.
 */
#include "coding_rate_soft.h"
#include "gauss_jordan.h"
#include "qr_update.h"
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

static T FN(dot)(int64_t n, const T *a, const T *b)
{
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void FN(grams_each)(int64_t begin, int64_t end, void *arg)
{
    const soft_run *r = arg;
    const int64_t d = r->d, panels = CEIL_DIV(d, PANEL);
    const T *z = r->z, *w = r->w;
    for (int64_t slot = begin; slot < end; slot++) {
        T *scaled = slot_space(r, slot);
        for (int64_t item = slot; item < r->kc * panels; item += r->slots) {
            const int64_t k = item / panels, a0 = item % panels * PANEL, m = MIN(PANEL, d - a0);
            T *g = (T *)r->square + k * d * d + a0 * d + a0;
            for (int64_t i0 = 0; i0 < r->n; i0 += r->depth) {
                const int64_t rows = MIN(r->depth, r->n - i0);
                for (int64_t i = 0; i < rows; i++) {
                    const T weight = w[(i0 + i) * r->ldw + k], *from = z + (i0 + i) * d + a0;
                    for (int64_t j = 0; j < m; j++) scaled[i * m + j] = weight * from[j];
                }
                GEMM(true, false, m, d - a0, rows, 1, scaled, m, z + i0 * d + a0, d, i0 > 0, g, d);
            }
        }
    }
}

#if !IS_F32
/* U in place of A, with 1/2 logdet A; NaN where float64 has not the digits for it */
static double FN(half_of)(int64_t d, T *a, double trace)
{
    double half = 0, least = INFINITY;
    if (!cholesky_f64(d, a, d)) return NAN;
    for (int64_t i = 0; i < d; i++) half += log(a[i * d + i]), least = MIN(least, a[i * d + i] * a[i * d + i]);
    return trace <= LOST * least ? half : NAN;
}

/* The same from the points, without A. */
static double FN(half_of_points)(const soft_run *r, int64_t k, double scale, T *u, T *space)
{
    const int64_t d = r->d;
    const T *z = r->z, *w = (const T *)r->w + k;
    T *spare = space + QR_ROWS * d;
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = i; j < d; j++) u[i * d + j] = i == j;
    for (int64_t i0 = 0; i0 < r->n; i0 += QR_ROWS) {
        const int64_t rows = MIN(QR_ROWS, r->n - i0);
        for (int64_t i = 0; i < rows; i++) {
            const T root = sqrt(scale * w[(i0 + i) * r->ldw]);
            for (int64_t j = 0; j < d; j++) space[i * d + j] = root * z[(i0 + i) * d + j];
        }
        qr_update(d, rows, u, d, space, d, spare);
    }
    return qr_half(d, u, d, spare);
}
#endif

/* G_k becomes A_k, and then A_k^-1 in r->inverse or, in a careful run, U in its place; h_k, and tr A_k^-1. */
static void FN(factor)(int64_t begin, int64_t end, void *arg)
{
    const soft_run *r = arg;
    const int64_t d = r->d;
    for (int64_t slot = begin; slot < end; slot++)
        for (int64_t k = slot; k < r->kc; k += r->slots) {
            T *space = slot_space(r, slot), *a = space, *packed = r->inverse ? (T *)r->inverse + k * r->p : NULL;
            const double t = r->t[r->k0 + k];
            const T scale = (T)((double)d / (t * r->a->eps));
            double *h = &r->h[r->k0 + k], *trace = &r->trace[r->k0 + k], *loss = &r->loss[r->k0 + k];
            double sum = 0, largest = 0;
            *h = *loss = 0, *trace = (double)d;
            if (t == 0) {
                if (packed) memset(packed, 0, (size_t)r->p * sizeof(T));
                continue;
            }
            if (r->square) a = (T *)r->square + k * d * d;
            else space += d * d;
            for (int64_t i = 0, at = 0; i < d; at += d - i++) {
                const T *from = r->square ? a + i * d + i : packed + at;
                T *to = a + i * d + i;
                for (int64_t j = 0; j < d - i; j++) to[j] = scale * from[j];
                sum += (double)to[0];
                to[0] += 1;
            }
#if !IS_F32
            if (r->careful) {
                *h = FN(half_of)(d, a, sum);
                if (isnan(*h)) *h = FN(half_of_points)(r, k, (double)scale, a, space);
                if (sum < TINY) *h = sum / 2; /* trace: d */
                if (!r->dw || !(*h < INFINITY) || sum < TINY) continue;
                memcpy(space, a, (size_t)(d * d) * sizeof(T)); /* tr A^-1 = |U^-1|^2 */
                invert_f64(d, space, d);
                *trace = 0;
                for (int64_t i = 0; i < d; i++) *trace += FN(dot)(d - i, space + i * d + i, space + i * d + i);
                continue;
            }
#endif
            *h = FN(eliminate)(d, a, space);
            *trace = 0;
            for (int64_t i = 0, at = 0; i < d; at += d - i++) {
                *trace -= (double)a[i * d + i];
                largest = MAX(largest, -(double)a[i * d + i]);
                for (int64_t j = 0; packed && j < d - i; j++) packed[at + j] = -a[i * d + i + j];
            }
            if (sum > 0) *loss = largest * MAX(sum / ((double)d - *trace), r->spread / OUTLIER);
            if (sum < TINY) *h = sum / 2, *trace = (double)d;
        }
}

/* Y = Z A_k^-1 and q_i = z_i' y_i for `rows` rows of Z; y is not needed, and may be left half done, without dz. */
static void FN(apply_inverse)(const soft_run *r, int64_t k, const T *z, int64_t rows, T *matrix, T *restrict y,
                              T *restrict q)
{
    const int64_t d = r->d;
#if !IS_F32
    if (r->careful) {
        const T *u = (const T *)r->square + k * d * d;
        memcpy(y, z, (size_t)(rows * d) * sizeof(T));
        solve_f64(true, false, rows, d, u, d, y, d);
        for (int64_t i = 0; i < rows; i++) q[i] = FN(dot)(d, y + i * d, y + i * d);
        if (r->dz) solve_f64(true, true, rows, d, u, d, y, d);
        return;
    }
#endif
    const T *packed = (const T *)r->inverse + k * r->p;
    for (int64_t a = 0; a < d; a++) memcpy(matrix + a * d + a, packed, (size_t)(d - a) * sizeof(T)), packed += d - a;
    for (int64_t a0 = 0; a0 < d; a0 += 16) /* the lower half, 16 x 16 at a time */
        for (int64_t b0 = a0; b0 < d; b0 += 16)
            for (int64_t b = b0; b < MIN(b0 + 16, d); b++)
                for (int64_t a = a0; a < MIN(a0 + 16, b); a++) matrix[b * d + a] = matrix[a * d + b];
    GEMM(false, false, rows, d, d, 1, z, d, matrix, d, 0, y, d);
    for (int64_t i = 0; i < rows; i++) q[i] = FN(dot)(d, y + i * d, z + i * d);
}

static void FN(gradients_each)(int64_t begin, int64_t end, void *arg)
{
    const soft_run *r = arg;
    const int64_t d = r->d;
    for (int64_t slot = begin; slot < end; slot++) {
        T *matrix = slot_space(r, slot), *y = matrix + (r->careful ? 0 : d * d), *q = y + r->rows * d;
        for (int64_t block = slot; block < r->blocks; block += r->slots) {
            int64_t i0, i1;
            share(r->n, block, r->blocks, &i0, &i1);
            const int64_t m = i1 - i0;
            const T *z = (const T *)r->z + i0 * d, *w = (const T *)r->w + i0 * r->ldw;
            T *dz = r->dz ? (T *)r->dz + i0 * d : NULL;
            for (int64_t k = 0; k < r->kc; k++) {
                const bool empty = r->t[r->k0 + k] == 0;
                if (!empty) FN(apply_inverse)(r, k, z, m, matrix, y, q);
                for (int64_t i = 0; r->dw && i < m; i++)
                    put(r->a->dtype, r->dw, (i0 + i) * r->a->k + r->k0 + k,
                        empty ? 0 : r->to_dw * (double)q[i] + r->shift[r->k0 + k]);
                for (int64_t i = 0; dz && !empty && i < m; i++) {
                    const T weight = w[i * r->ldw + k], *restrict from = y + i * d;
                    T *restrict to = dz + i * d;
                    for (int64_t j = 0; j < d; j++) to[j] += weight * from[j];
                }
            }
        }
    }
}

#endif
