/* entries.cuh - what is done to the entries of some matrices: lengths, scaling, inner products, mirror images.
 *
 * A block has a part of a matrix, and matrices lie along the grid's y, or z. Sums are in double, their order is fixed.
 */
#ifndef SUBSPACE_ENTRIES_CUH
#define SUBSPACE_ENTRIES_CUH
#include "cuda.cuh"

enum {
    PARTS = 32, /* of a matrix's entries, in sums */
    PATCH = 32,
    LINES = 8, /* a block's part of what is mirrored, and its lines of threads */
};

/* A block has a part of a matrix: its sum of squares, and what its entries are divided by before, 1 or (float64, whose
 * squares leave its range) the largest of them. */
template <typename T> __global__ void __launch_bounds__(ROW_THREADS) squares(int64_t entries, const T *x, double *part)
{
    typedef acc_t<T> A;
    const int64_t begin = entries * blockIdx.x / PARTS, end = entries * (blockIdx.x + 1) / PARTS;
    double sum = 0, largest = 1;
    x += blockIdx.y * entries, part += (int64_t)blockIdx.y * 2 * PARTS + blockIdx.x;
    if (sizeof(T) == 8) {
        largest = 0;
        for (int64_t i = begin + threadIdx.x; i < end; i += ROW_THREADS) {
            const double size = fabs((double)(A)x[i]);
            largest = larger(largest, size);
        }
        largest = block_max(largest);
    }
    const double unit = largest > 0 ? largest : 1; /* else zeros, or NaN */
    for (int64_t i = begin + threadIdx.x; i < end; i += ROW_THREADS) {
        const double one = (double)(A)x[i] / unit;
        sum += one * one;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) part[0] = sum, part[PARTS] = largest;
}

/* max(|x|, eps), or NaN, a thread each */
static __global__ void __launch_bounds__(ROW_THREADS) lengths(int64_t count, const double *part, double eps, double *to)
{
    const int64_t v = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    double largest = 0, sum = 0;
    if (v >= count) return;
    part += v * 2 * PARTS;
    for (int i = 0; i < PARTS; i++) largest = larger(part[PARTS + i], largest);
    for (int i = 0; i < PARTS; i++) {
        const double unit = part[PARTS + i] / (largest > 0 ? largest : 1);
        sum += part[i] * (part[PARTS + i] > 0 ? unit * unit : 1);
    }
    const double length = (largest > 0 ? largest : 1) * sqrt(sum);
    to[v] = isfinite(length) ? MAX(length, eps) : (double)NAN;
}

/* to = from / divisor, or from itself */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    divide(int64_t entries, const T *from, const double *divisor, acc_t<T> *to)
{
    typedef acc_t<T> A;
    const int64_t at = blockIdx.y * entries;
    const double by = divisor ? divisor[blockIdx.y] : 1;
    for (int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x; i < entries;
         i += (int64_t)gridDim.x * ROW_THREADS)
        to[at + i] = (A)((double)(A)from[at + i] / by);
}

template <typename A>
__global__ void __launch_bounds__(ROW_THREADS) dots(int64_t entries, const A *x, const A *y, double *part)
{
    const int64_t begin = entries * blockIdx.x / PARTS, end = entries * (blockIdx.x + 1) / PARTS;
    const int64_t at = blockIdx.y * entries;
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += ROW_THREADS) sum += (double)x[at + i] * (double)y[at + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) part[(int64_t)blockIdx.y * 2 * PARTS + blockIdx.x] = sum;
}

/* The parts' sum, a thread each; a length of no more than eps has no derivative. */
static __global__ void __launch_bounds__(ROW_THREADS)
    join_dots(int64_t count, const double *part, const double *divisor, double eps, double *to)
{
    const int64_t v = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    double sum = 0;
    if (v >= count) return;
    for (int i = 0; i < PARTS; i++) sum += part[v * 2 * PARTS + i];
    to[v] = divisor[v] > eps || isnan(divisor[v]) ? sum : 0;
}

/* to = (from - factor x) / divisor; without x: from itself */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    put(int64_t entries, const acc_t<T> *from, const acc_t<T> *x, const double *factor, const double *divisor, T *to)
{
    typedef acc_t<T> A;
    const int64_t at = blockIdx.y * entries;
    for (int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x; i < entries;
         i += (int64_t)gridDim.x * ROW_THREADS) {
        double value = (double)from[at + i];
        if (x) value = (value - factor[blockIdx.y] * (double)x[at + i]) / divisor[blockIdx.y];
        to[at + i] = (T)(A)value;
    }
}

/* C's upper half + add E + diagonal I, on both sides of the diagonal. */
template <typename A>
__global__ void __launch_bounds__(PATCH *LINES) mirror(int64_t s, A *c, const A *e, A add, A diagonal)
{
    __shared__ A patch[PATCH][PATCH + 1];
    const int64_t i0 = (int64_t)blockIdx.y * PATCH, j0 = (int64_t)blockIdx.x * PATCH, x = threadIdx.x;
    if (j0 < i0) return;
    c += blockIdx.z * s * s, e += blockIdx.z * s * s;
    for (int y = threadIdx.y; y < PATCH; y += LINES) {
        const int64_t i = i0 + y, j = j0 + x;
        if (i > j || j >= s) continue;
        A value = c[i * s + j];
        if (add != 0) value += add * e[i * s + j];
        patch[y][x] = i == j ? value + diagonal : value;
    }
    __syncthreads();
    for (int y = threadIdx.y; y < PATCH; y += LINES) {
        if (i0 + y <= j0 + x && j0 + x < s) c[(i0 + y) * s + j0 + x] = patch[y][x];
        if (i0 + x < j0 + y && j0 + y < s) c[(j0 + y) * s + i0 + x] = patch[x][y];
    }
}

#endif
