/* qr_update.cuh - U'U = I + X from the points themselves, where X has lost what I adds to it, by one block:
 *
 *     [U; P] = Q [U+; 0],    U+'U+ = U'U + P'P    a Householder reflection for each column
 *
 * From U = I on, QR_ROWS rows P of sqrt(a) Z at a time, as cpu/rates/qr_update.h, which says why. A thread has columns
 * of its own; they meet once a column.
 *
 * Included by rate_groups.cuh and coding_rate_soft.cuh.
 */
#ifndef SUBSPACE_QR_UPDATE_CUH
#define SUBSPACE_QR_UPDATE_CUH
#include "cholesky.cuh"

enum { QR_ROWS = 16 };
static const double LOST = 1e10, MOST_LOST = 1e12; /* as cpu/rates/qr_update.h */

/* U [s, s] and P [w, s], which is overwritten */
static __device__ inline void qr_update(int64_t s, int64_t w, double *u, double *p)
{
    for (int64_t j = 0; j < s; j++) {
        double *const uj = u + j * s, pivot = uj[j], sum = 0;
        for (int64_t i = 0; i < w; i++) sum += p[i * s + j] * p[i * s + j];
        const double root = sqrt(pivot * pivot + sum), v = sum == 0 ? 0 : -sum / (pivot + root);
        const double beta = sum == 0 ? 0 : 2 / (v * v + sum);
        for (int64_t k = j + 1 + thread_in_block(); k < s; k += blockDim.x) {
            double t = v * uj[k];
            for (int64_t i = 0; i < w; i++) t += p[i * s + j] * p[i * s + k];
            t *= beta;
            uj[k] -= v * t;
            for (int64_t i = 0; i < w; i++) p[i * s + k] -= t * p[i * s + j];
        }
        __syncthreads();
        if (thread_in_block() == 0) uj[j] = root;
    }
    __syncthreads();
}

/* 1/2 log det of U'U; NaN where a pivot is no more than the rounding of its column. */
static __device__ inline double qr_half(int64_t s, const double *u)
{
    double half = 0;
    for (int64_t j = thread_in_block(); j < s; j += blockDim.x) {
        const double pivot = u[j * s + j];
        double sum = 0;
        for (int64_t i = 0; i <= j; i++) sum += u[i * s + j] * u[i * s + j];
        half += pivot > 0 && sqrt(sum) <= MOST_LOST * pivot ? log(pivot) : (double)NAN;
    }
    return block_sum(half);
}

/* U of a Z'Z, or with `points` of a Z Z', a = scale, row i of Z weighted by its weight; p: [QR_ROWS, s] */
template <typename T>
static __device__ double half_of_points(const rows<T> &z, bool points, double scale, int64_t s, int64_t len, double *u,
                                        double *p)
{
    const int64_t threads = blockDim.x;
    for (int64_t e = thread_in_block(); e < s * s; e += threads) u[e] = e / s == e % s;
    for (int64_t at = 0; at < len; at += QR_ROWS) {
        const int64_t w = MIN((int64_t)QR_ROWS, len - at);
        for (int64_t e = thread_in_block(); e < w * s; e += threads) {
            const int64_t i = points ? e % s : at + e / s, j = points ? at + e / s : e % s;
            const T *const row = row_at(z, (unsigned)i);
            const double weight = z.weight ? scale * (double)z.weight[i * z.weight_ld] : scale;
            p[e] = row ? sqrt(weight) * (double)row[j] : (double)NAN;
        }
        __syncthreads();
        qr_update(s, w, u, p);
    }
    return qr_half(s, u);
}

/* V = U^-1 into the lower half, transposed, but for its diagonal, which is U's inverted; a thread for a column */
static __device__ inline void qr_root(int64_t s, double *u)
{
    for (int64_t c = thread_in_block(); c < s; c += blockDim.x) {
        double *const v = u + c * s;
        for (int64_t i = c - 1; i >= 0; i--) {
            double sum = u[i * s + c] / u[c * s + c];
            for (int64_t l = i + 1; l < c; l++) sum += u[i * s + l] * v[l];
            v[i] = -sum / u[i * s + i];
        }
    }
    __syncthreads();
    for (int64_t i = thread_in_block(); i < s; i += blockDim.x) u[i * s + i] = 1 / u[i * s + i];
    __syncthreads();
}

/* What is wanted in place of U, as cholesky.cuh leaves it: U^-1 above zeros, or (U'U)^-1; returns the trace of that. */
static __device__ inline double qr_result(int64_t s, int wanted, double *u)
{
    double trace = 0;
    qr_root(s, u);
    for (int64_t e = thread_in_block(); e < s * s; e += blockDim.x) {
        const int64_t i = e / s, j = e % s;
        double sum = 0;
        if (i >= j) continue;
        for (int64_t l = j; l < s && wanted == INVERSE; l++) sum += u[l * s + i] * u[l * s + j];
        u[e] = wanted == INVERSE ? sum : u[j * s + i];
    }
    __syncthreads();
    for (int64_t i = thread_in_block(); i < s; i += blockDim.x) {
        double sum = 0;
        for (int64_t l = i; l < s; l++) sum += u[l * s + i] * u[l * s + i];
        trace += sum;
        if (wanted == INVERSE) u[i * s + i] = sum;
    }
    __syncthreads();
    for (int64_t e = thread_in_block(); e < s * s; e += blockDim.x)
        if (e / s > e % s) u[e] = wanted == INVERSE ? u[e % s * s + e / s] : 0;
    __syncthreads();
    return block_sum(trace);
}

/* The verdict on a matrix, and what is wanted of it in u, from rows of Z; p: [QR_ROWS, s] */
template <typename T>
static __device__ void eliminate_points(const rows<T> &z, bool points, double scale, int64_t s, int64_t len, int wanted,
                                        double *u, double *p, verdict *to)
{
    const double half = half_of_points(z, points, scale, s, len, u, p);
    const bool good = isfinite(half);
    double trace = NAN;
    if (good && wanted != LOGDET) trace = qr_result(s, wanted, u);
    for (int64_t e = thread_in_block(); e < s * s && !good; e += blockDim.x) u[e] = NAN;
    if (thread_in_block() == 0) *to = verdict{half, trace, 0, INFINITY, good};
}

#endif
