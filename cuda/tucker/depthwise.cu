/* depthwise.cu - gradient of the weight of a depthwise convolution, or of another grouped one, on the GPU.
 *
 *     dw[c m + q, p, k] = sum_{b, o} dy[b, c m + q, o] x[b, c n + p, o stride + k dilation - padding]
 *
 * A block walks over pieces of one channel (depthwise_shape.h), x with its margins and dy of its group's m outputs in
 * shared memory: both are read once, but for margins between bands and, where n > 1, dy by each channel. A thread has
 * 3, 5 or 7 taps of one row of the kernel in registers and slides along rows of dy: with stride and dilation 1 across,
 * a step is one entry of x, one of dy and as many multiply-adds as taps, so that 7 x 7 taps take 14 + 2 entries of
 * shared memory for 49 multiply-adds. At the end threads of the same taps add up; channels too few to fill the device
 * are shared by blocks whose sums join.cuh adds. Every order is fixed; sums are in float32 (double for double) in a
 * thread, in double beyond.
 *
 * On an H100 7 x 7 of b = 64, c = 96, 56^2 in float32: 154 MB, 46 us from memory; 0.94 G multiply-adds, 33 us; 0.37 G
 * entries from shared memory, 51 us.
 */
#include "cuda.cuh"
#include "depthwise_shape.h"
#include "join.cuh"

enum { THREADS = DEPTHWISE_THREADS, SEGMENT = DEPTHWISE_SEGMENT };

/* Where a piece lies. */
typedef struct piece {
    int64_t b0, oz;
    int images, y0, x0, height, width;
} piece;

static __device__ piece piece_of(const subspace_depthwise_args &a, const depthwise_shape &s, int64_t i)
{
    piece p;
    p.x0 = (int)(i % s.bands_x) * s.width, i /= s.bands_x;
    p.y0 = (int)(i % s.bands_y) * s.height, i /= s.bands_y;
    p.oz = i % a.out[0], p.b0 = i / a.out[0] * s.images;
    p.images = (int)MIN(s.images, a.b - p.b0);
    p.height = (int)MIN(s.height, a.out[1] - p.y0), p.width = (int)MIN(s.width, a.out[2] - p.x0);
    return p;
}

/* `cols` columns of a row of `size` entries from column `first` on, zero where there is none, by neighbouring threads
 */
template <typename T>
static __device__ inline void fetch_row(const T *__restrict__ row, bool there, int64_t first, int64_t size, int lane,
                                        int lanes, int cols, acc_t<T> *to)
{
#pragma unroll 4
    for (int col = lane; col < cols; col += lanes) {
        const int64_t i = first + col;
        to[col] = there && i >= 0 && i < size ? (acc_t<T>)row[i] : 0;
    }
}

/* x of a piece of channel c with its margins, [images, kernel[0], x_rows, x_cols], and dy, [m, images, height, dy_cols]
 */
template <typename T>
static __device__ void fetch(const subspace_depthwise_args &a, const depthwise_shape &s, const piece &p, int64_t c,
                             const T *__restrict__ x, const T *__restrict__ dy, acc_t<T> *xs, acc_t<T> *dys)
{
    const int lanes = s.row_lanes, lane = (int)threadIdx.x % lanes, lines = THREADS / lanes;
    const int planes = (int)a.kernel[0], rows = p.images * planes * s.x_rows;
    const int64_t y_first = p.y0 * a.stride[1] - a.padding[1], x_first = p.x0 * a.stride[2] - a.padding[2];
    for (int row = (int)threadIdx.x / lanes; row < rows; row += lines) {
        const int line = row % s.x_rows, plane = row / s.x_rows % planes, image = row / s.x_rows / planes;
        const int64_t z = p.oz * a.stride[0] + plane * a.dilation[0] - a.padding[0], y = y_first + line;
        const bool there = z >= 0 && z < a.in[0] && y >= 0 && y < a.in[1];
        const int64_t at = (((p.b0 + image) * a.c * a.n + c) * a.in[0] + z) * a.in[1] + y;
        fetch_row(x + (there ? at * a.in[2] : 0), there, x_first, a.in[2], lane, lanes, s.x_cols, xs + row * s.x_cols);
    }
    const int dy_rows = (int)a.m * p.images * p.height;
    for (int row = (int)threadIdx.x / lanes; row < dy_rows; row += lines) {
        const int line = row % p.height, image = row / p.height % p.images, q = row / p.height / p.images;
        const int64_t at = (((p.b0 + image) * a.c + c / a.n) * a.m + q) * a.out[0] + p.oz;
        acc_t<T> *to = dys + ((q * s.images + image) * s.height + line) * s.dy_cols;
        fetch_row(dy + (at * a.out[1] + p.y0 + line) * a.out[2] + p.x0, true, 0, p.width, lane, lanes, s.dy_cols, to);
    }
}

/* part[slice, c, m, n, kernel...] of a block's pieces. SLIDE: stride and dilation across are 1. */
template <typename T, int TAPS, bool SLIDE>
__global__ void __launch_bounds__(THREADS, 4)
    weight_gradient(subspace_depthwise_args a, depthwise_shape s, const T *__restrict__ x, const T *__restrict__ dy,
                    acc_t<T> *part)
{
    typedef acc_t<T> A;
    DYNAMIC_SHARED(shared);
    int *row_x = (int *)shared, *row_dy = row_x + THREADS; /* where the rows of an output's dy begin, and their x */
    A *xs = (A *)(row_dy + THREADS), *dys = xs + s.images * (int)a.kernel[0] * s.x_rows * s.x_cols;
    const int64_t c = blockIdx.x / s.slices, slice = blockIdx.x % s.slices;
    const int kh = (int)a.kernel[1], kd = (int)a.kernel[0], lane = (int)threadIdx.x % s.lanes;
    const int groups = (int)a.m * kd * kh * s.chunks, first = (int)blockIdx.y * s.groups;
    const int group = first + (int)threadIdx.x / s.lanes;
    const bool active = (int)threadIdx.x < s.groups * s.lanes && group < groups;
    const int chunk = group % s.chunks, ky = group / s.chunks % kh, kz = group / s.chunks / kh % kd;
    const int q = group / s.chunks / kh / kd, step = SLIDE ? 1 : (int)a.stride[2], gap = SLIDE ? 1 : (int)a.dilation[2];
    const A *my_x = xs + (kz * s.x_rows + ky * (int)a.dilation[1]) * s.x_cols + chunk * TAPS * gap;
    const A *my_dy = dys + q * s.images * s.height * s.dy_cols;
    A sum[TAPS] = {};

    for (int64_t i = slice; i < s.pieces; i += s.slices) {
        const piece p = piece_of(a, s, i);
        const int rows = p.images * p.height, units = rows * s.segments;
        fetch(a, s, p, c, x, dy, xs, dys);
        if ((int)threadIdx.x < rows) {
            const int image = (int)threadIdx.x / p.height, line = (int)threadIdx.x % p.height;
            row_x[threadIdx.x] = (image * kd * s.x_rows + line * (int)a.stride[1]) * s.x_cols;
            row_dy[threadIdx.x] = (image * s.height + line) * s.dy_cols;
        }
        __syncthreads();
        for (int unit = active ? lane : units; unit < units; unit += s.lanes) {
            const int row = unit % rows, from = unit / rows * SEGMENT;
            const A *at = my_x + row_x[row] + from * step, *g = my_dy + row_dy[row] + from;
            A window[TAPS];
            if (SLIDE)
                for (int k = 0; k < TAPS - 1; k++) window[k] = at[k];
#pragma unroll
            for (int o = 0; o < SEGMENT; o++) {
                if (SLIDE) window[TAPS - 1] = at[o + TAPS - 1];
                else
                    for (int k = 0; k < TAPS; k++) window[k] = at[o * step + k * gap];
                for (int k = 0; k < TAPS; k++) sum[k] += g[o] * window[k];
                if (SLIDE)
                    for (int k = 0; k < TAPS - 1; k++) window[k] = window[k + 1];
            }
        }
        __syncthreads();
    }

    A *sums = xs; /* [threads, TAPS] */
    for (int k = 0; k < TAPS; k++) sums[(int)threadIdx.x * TAPS + k] = sum[k];
    __syncthreads();
    for (int t = (int)threadIdx.x; t < MIN(s.groups, groups - first) * TAPS; t += THREADS) {
        const int owner = t / TAPS, k = t % TAPS, tap = (first + owner) % s.chunks * TAPS + k;
        double total = 0;
        if (tap >= a.kernel[2]) continue;
        for (int l = 0; l < s.lanes; l++) total += (double)sums[(owner * s.lanes + l) * TAPS + k];
        const int64_t tap_row = (first + owner) / s.chunks, output = c / a.n * a.m + tap_row / (kd * kh);
        const int64_t row = (output * a.n + c % a.n) * kd * kh + tap_row % (kd * kh);
        part[(slice * a.c * a.n * (groups / s.chunks) + row) * a.kernel[2] + tap] = (A)total;
    }
}

/* Kernels that fit no shared memory: a block for each entry of dweight. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    entry_gradient(subspace_depthwise_args a, int64_t taps, const T *x, const T *dy, acc_t<T> *dweight)
{
    const int64_t in = a.in[0] * a.in[1] * a.in[2], out = a.out[0] * a.out[1] * a.out[2];
    const int64_t output = blockIdx.x / taps / a.n, channel = output / a.m * a.n + blockIdx.x / taps % a.n;
    int64_t k = blockIdx.x % taps, at[3];
    for (int i = 2; i >= 0; i--) {
        at[i] = k % a.kernel[i] * a.dilation[i] - a.padding[i];
        k /= a.kernel[i];
    }
    double sum = 0;
    for (int64_t i = threadIdx.x; i < a.b * out; i += blockDim.x) {
        const int64_t b = i / out, o = i % out;
        const int64_t z = o / (a.out[1] * a.out[2]) * a.stride[0] + at[0];
        const int64_t y = o / a.out[2] % a.out[1] * a.stride[1] + at[1], w = o % a.out[2] * a.stride[2] + at[2];
        if (z < 0 || z >= a.in[0] || y < 0 || y >= a.in[1] || w < 0 || w >= a.in[2]) continue;
        const T *image = x + (b * a.c * a.n + channel) * in;
        sum += (double)((acc_t<T>)dy[(b * a.c * a.m + output) * out + o] *
                        (acc_t<T>)image[(z * a.in[1] + y) * a.in[2] + w]);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) dweight[blockIdx.x] = (acc_t<T>)sum;
}

static int64_t taps_of(const subspace_depthwise_args *a)
{
    return a->kernel[0] * a->kernel[1] * a->kernel[2];
}

static bool nothing(const subspace_depthwise_args *a)
{
    return a->b <= 0 || a->c <= 0 || a->m <= 0 || a->out[0] <= 0 || a->out[1] <= 0 || a->out[2] <= 0;
}

static int item_of(const subspace_depthwise_args *a)
{
    return a->dtype == SUBSPACE_F64 ? (int)sizeof(double) : (int)sizeof(float);
}

template <typename T, int TAPS>
static subspace_status slide(subspace_ctx *ctx, const subspace_depthwise_args *a, const depthwise_shape *s,
                             acc_t<T> *part)
{
    const dim3 grid((unsigned)(a->c * a->n * s->slices), (unsigned)s->passes);
    const T *x = (const T *)a->x, *dy = (const T *)a->dy;
    if (a->stride[2] == 1 && a->dilation[2] == 1)
        LAUNCH(ctx, (weight_gradient<T, TAPS, true>), grid, THREADS, s->shared, *a, *s, x, dy, part);
    else LAUNCH(ctx, (weight_gradient<T, TAPS, false>), grid, THREADS, s->shared, *a, *s, x, dy, part);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status gradient(subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    const int64_t taps = taps_of(a), channels = a->c * a->n, count = channels * a->m * taps;
    acc_t<T> *dweight = (acc_t<T> *)a->dweight;
    if (nothing(a)) {
        if (count > 0)
            CUDA(ctx, cudaMemsetAsync(dweight, 0, (size_t)count * sizeof *dweight, (cudaStream_t)ctx->stream));
        return SUBSPACE_OK;
    }
    const depthwise_shape s = depthwise_shape_of(a, item_of(a));
    CHECK(ctx, s.fits ? channels * s.slices <= INT32_MAX && s.passes <= 65535 : count <= INT32_MAX,
          SUBSPACE_INVALID_ARGUMENT, "depthwise: a weight of %lld entries is too large", (long long)count);
    if (!s.fits) {
        LAUNCH(ctx, entry_gradient<T>, (unsigned)count, ROW_THREADS, 0, *a, taps, (const T *)a->x, (const T *)a->dy,
               dweight);
        return SUBSPACE_OK;
    }
    acc_t<T> *part = s.slices > 1 ? (acc_t<T> *)ctx->workspace : dweight;
    TRY((s.taps == 3 ? slide<T, 3> : s.taps == 5 ? slide<T, 5> : slide<T, 7>)(ctx, a, &s, part));
    return s.slices > 1 ? join(ctx, (const acc_t<T> *)part, s.slices, count, 1, dweight) : SUBSPACE_OK;
}

extern "C" size_t subspace_depthwise_workspace_cuda(const subspace_ctx *, const subspace_depthwise_args *a)
{
    if (a->n <= 0) return 0;
    for (int i = 0; i < 3; i++)
        if (a->kernel[i] <= 0 || a->stride[i] <= 0 || a->dilation[i] <= 0) return 0;
    if (nothing(a)) return 0;
    const depthwise_shape s = depthwise_shape_of(a, item_of(a));
    return s.fits && s.slices > 1 ? (size_t)(s.slices * a->c * a->n * a->m * taps_of(a)) * (size_t)item_of(a) : 0;
}

extern "C" subspace_status subspace_depthwise_cuda(subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    TRY(subspace_depthwise_check(ctx, a));
    const size_t bytes = subspace_depthwise_workspace_cuda(ctx, a);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "depthwise: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    DISPATCH(a->dtype, gradient, ctx, a);
}
