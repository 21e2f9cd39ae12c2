/* rank_product.cuh - products with one short side, the rank, where more happens on the way in or out than cuBLAS has.
 *
 *     out[z, i, j] = base[z, i, j] + drop(alpha sum_K left[z, i, K] right[z, K, j])
 *
 * Entries of either side may be of a half type, be dropped, and come in two halves, high + weight low; a step K of the
 * sum is a pair (p, q) with a stride for each, so that unfoldings of a tensor are read where they lie. The result is
 * rounded once; base may be out itself. A sum may be cut into slices, which join.cuh adds up in order.
 *
 * A tile of out is made by 256 threads from 16 steps of the sum at a time in shared memory, 4 x 4 entries a thread.
 * All arithmetic is in float32 (double for double) by plain multiply-adds. With rank r an entry of the long operand
 * takes 2 r flops, for 2 to 8 bytes: the memory is the limit up to r of about 16 for half types and 32 for float32 on
 * an H100 (67 TFLOP/s to 3.35 TB/s: 20 flops a byte); the long operand is read, and out written, once while the rank
 * fits a tile (64).
 *
 * Included by tucker.cu, tucker_conv.cu and tucker_linear.cu.
 */
#ifndef SUBSPACE_RANK_PRODUCT_CUH
#define SUBSPACE_RANK_PRODUCT_CUH
#include "dropout.h"
#include "join.cuh"
#include "linalg.cuh"
#include "rank_product_shape.h"

typedef struct dropping { /* see dropout.h; an entry's place is its distance from the start of its array */
    const int64_t *seed;  /* NULL: nothing is dropped */
    double rate;
} dropping;

template <typename A> struct keeps { /* the same, read once by each thread */
    uint64_t seed;
    float rate;
    A kept;

    __device__ keeps(const dropping &d)
        : seed(d.seed ? (uint64_t)*d.seed : 0), rate(d.seed ? (float)d.rate : 0), kept((A)(1. / (1. - d.rate)))
    {
    }
    __device__ A operator()(int64_t place) const
    {
        return dropout_uniform(seed, (uint64_t)place) < rate ? (A)0 : kept;
    }
};

/* Entry (z, line, K = (p, q)) is at[z batch + line line + p outer + q inner], plus weight times the entry `low` further
 * on unless low is 0. */
template <typename E> struct operand {
    const E *at;
    int64_t batch, line, outer, inner, low;
    double weight;
};

enum rank_side { NOTHING, LEFT, RIGHT, CHANGE }; /* what is dropped; CHANGE: what is added to base */

template <typename L, typename R, typename O> struct rank_job {
    int64_t count, rows, cols, depth, steps; /* products; K = (K / steps, K % steps) */
    operand<L> left;
    operand<R> right;
    double alpha;
    const O *base; /* like out, or NULL: zero; may be out */
    O *out;        /* [count, slices, rows, cols] */
    dropping drop;
    rank_side dropped;
    double split; /* not 0: out is [rows, 3 cols], high | low split | high; count = slices = 1 */
    rank_shape shape = {};
    int64_t tiles = 0;
    int64_t period = 0;   /* not 0: cols are those of several products, so many each, side by side */
    bool aligned = false; /* four entries of out at a time */
};

/* Where an entry's low half is a power of two too small for float16: it is kept times this. */
template <typename T> struct low_half {
    static constexpr double scale = 1;
};
template <> struct low_half<__half> {
    static constexpr double scale = 2048;
};

template <typename E> struct __align__(4 * sizeof(E) < 16 ? 4 * sizeof(E) : 16) four
{
    E v[4];
};

/* LINES lines of RANK_DEPTH steps into shared memory, to[step][line]; zero beyond the ends. With a period, lines are
 * those of several products. */
template <int LINES, typename E, typename A>
static __device__ inline void fill(A (*to)[LINES + RANK_PAD], const operand<E> &from, const keeps<A> &drop,
                                   bool dropped, int z, int period, int first, int lines, int k0, int last, int steps)
{
    enum { TURNS = LINES * RANK_DEPTH / RANK_THREADS, FLIGHT = TURNS < 4 ? TURNS : 4 }; /* loads in flight */
    const bool along = from.inner == 1 && from.line != 1; /* neighbouring threads take neighbouring steps */
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn += FLIGHT) {
        A value[FLIGHT];
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            const int at = (turn + f) * RANK_THREADS + (int)threadIdx.x;
            const int i = first + (along ? at / RANK_DEPTH : at % LINES);
            const int k = k0 + (along ? at % RANK_DEPTH : at / LINES);
            value[f] = 0;
            if (i >= lines || k >= last) continue;
            const int p = k < steps ? 0 : k / steps, product = period ? i / period : z;
            const int64_t place = product * from.batch + (period ? i - product * period : i) * from.line +
                                  p * from.outer + (k - p * steps) * from.inner;
            value[f] = (A)from.at[place];
            if (from.low) value[f] += (A)from.weight * (A)from.at[place + from.low];
            if (dropped) value[f] *= drop(place);
        }
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            const int at = (turn + f) * RANK_THREADS + (int)threadIdx.x;
            to[along ? at % RANK_DEPTH : at / LINES][along ? at / RANK_DEPTH : at % LINES] = value[f];
        }
    }
}

template <typename L, typename R, typename O, int TY>
__global__ void __launch_bounds__(RANK_THREADS, sizeof(acc_t<O>) == 8 ? 2 : 3) rank_product(rank_job<L, R, O> g)
{
    typedef acc_t<O> A;
    enum { TX = RANK_THREADS / TY, ROWS = RANK_SIDE * TY, COLS = RANK_SIDE * TX };
    __shared__ __align__(16) A left[RANK_DEPTH][ROWS + RANK_PAD];
    __shared__ __align__(16) A right[RANK_DEPTH][COLS + RANK_PAD];
    const keeps<A> drop(g.drop);
    const int tx = threadIdx.x % TX, ty = threadIdx.x / TX;
    const int rows = (int)g.rows, cols = (int)g.cols, period = (int)g.period, steps = (int)g.steps;
    for (int64_t tile = blockIdx.x; tile < g.tiles; tile += gridDim.x) {
        int64_t rest = tile;
        const int j0 = (int)(rest % g.shape.col_tiles) * COLS;
        rest /= g.shape.col_tiles;
        const int i0 = (int)(rest % g.shape.row_tiles) * ROWS;
        rest /= g.shape.row_tiles;
        const int slice = (int)(rest % g.shape.slices), z = (int)(rest / g.shape.slices);
        const int first = slice * (int)g.shape.slice, last = (int)MIN(g.depth, first + g.shape.slice);
        const int i1 = i0 + RANK_SIDE * ty, j1 = j0 + RANK_SIDE * tx, ld = period ? period : cols;
        const bool whole = g.aligned && j1 + RANK_SIDE <= cols;

        /* where out's entry (i1, j1) lies; each of its neighbours to the right is one further, and a jump for every
         * product that ends between */
        const int64_t product = period ? j1 / period : rest, jump = (int64_t)(rows - 1) * period;
        int column = period ? j1 % period : j1;
        const int64_t place = (product * rows + i1) * ld + column;
        unsigned ends = 0; /* 4 bits a neighbour */
        for (int j = 0, end = 0; period && j < RANK_SIDE; j++, column++) {
            if (column == period) column = 0, end++;
            ends |= (unsigned)end << 4 * j;
        }

        four<O> old[RANK_SIDE] = {}; /* base is on its way while the sum is made */
        if (g.base) {
#pragma unroll
            for (int i = 0; i < RANK_SIDE; i++) {
                const O *from = g.base + place + (int64_t)i * ld;
                if (whole && i1 + i < rows) old[i] = *(const four<O> *)from;
                for (int j = 0; j < RANK_SIDE; j++)
                    if (!whole && i1 + i < rows && j1 + j < cols) old[i].v[j] = from[j + (ends >> 4 * j & 15) * jump];
            }
        }

        A sum[RANK_SIDE][RANK_SIDE] = {};
        for (int64_t k0 = first; k0 < last; k0 += RANK_DEPTH) {
            fill<ROWS>(left, g.left, drop, g.dropped == LEFT, z, 0, i0, rows, k0, last, steps);
            fill<COLS>(right, g.right, drop, g.dropped == RIGHT, z, period, j0, cols, k0, last, steps);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < RANK_DEPTH; k++) {
                const four<A> l = *(const four<A> *)&left[k][RANK_SIDE * ty];
                const four<A> r = *(const four<A> *)&right[k][RANK_SIDE * tx];
#pragma unroll
                for (int i = 0; i < RANK_SIDE; i++)
#pragma unroll
                    for (int j = 0; j < RANK_SIDE; j++) sum[i][j] += l.v[i] * r.v[j];
            }
            __syncthreads();
        }

#pragma unroll
        for (int i = 0; i < RANK_SIDE; i++) {
            if (i1 + i >= rows) continue;
            const int64_t at = place + (int64_t)i * ld;
            four<O> made, low;
#pragma unroll
            for (int j = 0; j < RANK_SIDE; j++) {
                A value = (A)g.alpha * sum[i][j];
                if (g.dropped == CHANGE) value *= drop(at + j + (ends >> 4 * j & 15) * jump);
                made.v[j] = (O)(g.base ? (A)old[i].v[j] + value : value);
                low.v[j] = (O)((value - (A)made.v[j]) * (A)g.split);
            }
            if (whole && !g.split) *(four<O> *)(g.out + at) = made;
            else
#pragma unroll
                for (int j = 0; j < RANK_SIDE; j++) {
                    if (j1 + j >= cols) continue;
                    O *to = g.out +
                            (g.split ? (int64_t)(i1 + i) * 3 * cols + j1 + j : at + j + (ends >> 4 * j & 15) * jump);
                    *to = made.v[j];
                    if (g.split) to[cols] = low.v[j], to[2 * (int64_t)cols] = made.v[j];
                }
        }
    }
}

static inline unsigned rank_grid(int64_t count)
{
    return (unsigned)MIN(CEIL_DIV(count, RANK_THREADS), 1 << 20);
}

/* Launch a job whose sizes, operands, alpha, base, out, drop and split are given. Sliced: out has room for
 * rank_shape_of(..., true).slices parts of each product. */
template <typename L, typename R, typename O>
static subspace_status rank_multiply(subspace_ctx *ctx, rank_job<L, R, O> g, bool sliced)
{
    enum { ALIGNMENT = alignof(four<O>) };
    const int64_t most = INT32_MAX - 1024; /* a dimension's; places are counted in 64 bits */
    if (g.count > 1 && g.left.batch == 0 && !sliced && g.cols <= most / g.count) /* no tile ends with a product */
        g.period = g.cols, g.cols *= g.count, g.count = 1;
    CHECK(ctx, MAX(MAX(g.rows, g.cols), MAX(g.depth, g.count)) <= most, SUBSPACE_INVALID_ARGUMENT,
          "%lld products of %lld x %lld x %lld are too large", (long long)g.count, (long long)g.rows, (long long)g.cols,
          (long long)g.depth);
    const int64_t ld = g.period ? g.period : g.cols;
    g.shape = rank_shape_of(g.rows, g.cols, g.depth, g.count, sliced);
    g.tiles = g.count * g.shape.slices * g.shape.row_tiles * g.shape.col_tiles;
    g.aligned = ld % RANK_SIDE == 0 && (uintptr_t)g.out % ALIGNMENT == 0 && (uintptr_t)g.base % ALIGNMENT == 0;
    if (g.tiles == 0) return SUBSPACE_OK;
    const unsigned grid = (unsigned)MIN(g.tiles, INT32_MAX);
    switch (g.shape.ty) {
    case 4: LAUNCH(ctx, (rank_product<L, R, O, 4>), grid, RANK_THREADS, 0, g); break;
    case 8: LAUNCH(ctx, (rank_product<L, R, O, 8>), grid, RANK_THREADS, 0, g); break;
    case 32: LAUNCH(ctx, (rank_product<L, R, O, 32>), grid, RANK_THREADS, 0, g); break;
    case 64: LAUNCH(ctx, (rank_product<L, R, O, 64>), grid, RANK_THREADS, 0, g); break;
    default: LAUNCH(ctx, (rank_product<L, R, O, 16>), grid, RANK_THREADS, 0, g);
    }
    return SUBSPACE_OK;
}

#endif
