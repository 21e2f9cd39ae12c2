/* panels_rows.cuh - what panels.cuh does with whole rows of x: their lengths before the pass, the end of dx after it.
 *
 * Everything is read and written four entries a thread at a time, where rows are aligned for it.
 *
 * Included by panels.cuh.
 */
#ifndef SUBSPACE_PANELS_ROWS_CUH
#define SUBSPACE_PANELS_ROWS_CUH
#include "cuda.cuh"

#define NORM_EPS 1e-12 /* as torch.nn.functional.normalize */

template <typename E> struct __align__(4 * sizeof(E) < 16 ? 4 * sizeof(E) : 16) quad
{
    E v[4];
};

/* Four neighbours, `left` of which are there: at once when `whole` says that they are aligned. */
template <typename E> static __device__ inline quad<E> load4(const E *from, bool whole, int64_t left)
{
    if (whole && left >= 4) return *(const quad<E> *)from;
    quad<E> q;
    for (int j = 0; j < 4; j++) q.v[j] = j < left ? from[j] : (E)0.f;
    return q;
}

template <typename E> static __device__ inline void store4(E *to, const quad<E> &q, bool whole, int64_t left)
{
    if (whole && left >= 4) *(quad<E> *)to = q;
    else
        for (int j = 0; j < 4; j++)
            if (j < left) to[j] = q.v[j];
}

/* Are fours of a matrix by rows aligned? */
template <typename E> static __device__ inline bool in_fours(const E *at, int64_t ld)
{
    return ((uintptr_t)at / sizeof(E) | (uintptr_t)ld) % 4 == 0;
}

/* blockDim.x threads a row: a warp where there are many rows, else a whole block. */
static inline dim3 row_block(int64_t rows)
{
    return rows >= 1024 ? dim3(WARP, ROW_THREADS / WARP) : dim3(ROW_THREADS, 1);
}

static inline unsigned row_grid(int64_t rows)
{
    return (unsigned)CEIL_DIV(rows, (int64_t)row_block(rows).y);
}

static __device__ inline double row_sum(double value)
{
    return blockDim.x == WARP ? warp_sum(value) : block_sum(value);
}

/* r = 1 / max(|x|, 1e-12), and xhat where asked; the length is summed in double: it cannot overflow. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    normalise_rows(const T *x, int64_t rows, int64_t n, acc_t<T> *rnorm, double *exact, T *xhat)
{
    const int64_t b = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, step = 4 * blockDim.x;
    const bool whole = in_fours(x, n);
    if (b >= rows) return; /* a whole warp, and only where warps have rows */
    double sum = 0;
#pragma unroll 4
    for (int64_t j = 4 * threadIdx.x; j < n; j += step) {
        const quad<T> q = load4(x + b * n + j, whole, n - j);
        for (int i = 0; i < 4; i++) sum += (double)(acc_t<T>)q.v[i] * (double)(acc_t<T>)q.v[i];
    }
    const double length = sqrt(row_sum(sum)), r = 1 / MAX(length, NORM_EPS);
    if (threadIdx.x == 0) rnorm[b] = (acc_t<T>)r;
    if (threadIdx.x == 0 && exact) exact[b] = r;
    for (int64_t j = 4 * threadIdx.x; xhat && j < n; j += step) {
        quad<T> q = load4(x + b * n + j, whole, n - j);
        for (int i = 0; i < 4; i++) q.v[i] = (T)(acc_t<T>)(r * (double)(acc_t<T>)q.v[i]);
        store4(xhat + b * n + j, q, whole, n - j);
    }
}

/* dx = d - xhat <xhat, d>: the part along x does not change a normalised row. r is still to come unless `folded`.
 *
 * Where d is along x it cancels altogether, so that xhat must not be rounded: with 2^e near r it is (r / 2^e) (2^e x),
 * the last exact, and dx = d - (high + low) 2^e x. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    finish_dx(const T *x, int64_t rows, int64_t n, const double *exact, bool folded, const acc_t<T> *d, T *dx)
{
    typedef acc_t<T> A;
    const int64_t b = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, step = 4 * blockDim.x;
    const bool whole = in_fours(x, n) && in_fours(d, n) && in_fours(dx, n);
    if (b >= rows) return;
    const double r = exact ? exact[b] : 1;
    const A power = exact ? (A)ldexp(1., ilogb(r)) : 0, factor = folded ? 1 : (A)r;
    A high = 0, low = 0;
    if (exact) {
        double dot = 0;
#pragma unroll 2
        for (int64_t j = 4 * threadIdx.x; j < n; j += step) {
            const quad<T> q = load4(x + b * n + j, whole, n - j);
            const quad<A> g = load4(d + b * n + j, whole, n - j);
            for (int i = 0; i < 4; i++) dot += (double)(power * (A)q.v[i]) * (double)g.v[i];
        }
        dot = row_sum(dot) * (r / (double)power) * (r / (double)power);
        if (r >= 1 / NORM_EPS) dot = 0; /* the clamped length is a constant */
        high = (A)dot, low = (A)(dot - (double)high);
    }
#pragma unroll 2
    for (int64_t j = 4 * threadIdx.x; j < n; j += step) {
        const quad<A> g = load4(d + b * n + j, whole, n - j);
        quad<T> q = load4(x + b * n + j, whole, n - j);
        for (int i = 0; i < 4; i++) {
            const A along = power * (A)q.v[i];
            q.v[i] = (T)(exact ? factor * (fma(-high, along, g.v[i]) - low * along) : g.v[i]);
        }
        store4(dx + b * n + j, q, whole, n - j);
    }
}

template <typename T> __global__ void narrow(const acc_t<T> *src, int64_t count, T *dst)
{
    const bool whole = in_fours(src, 4) && in_fours(dst, 4);
    for (int64_t i = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x); i < count;
         i += 4 * (int64_t)gridDim.x * blockDim.x) {
        const quad<acc_t<T>> q = load4(src + i, whole, count - i);
        quad<T> made;
        for (int j = 0; j < 4; j++) made.v[j] = (T)q.v[j];
        store4(dst + i, made, whole, count - i);
    }
}

#endif
