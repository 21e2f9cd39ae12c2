/* cholesky.cuh - batches of A = I + X, symmetric and positive definite: 1/2 log det A and A^-1, or the root U^-1 of it,
 * A = U'U, by the sweep operator on the upper half, J of 8 or 64 pivots at a time:
 *
 *     A_JJ = L L',  Y = L^-1 A_J.,  A <- A - Y'Y outside J,  A_J. <- L^-T Y,  A_JJ <- -L^-T L^-1
 *
 * At the end A is -A^-1. These are d^3 flops of which nearly all are products of half the matrix with itself, of one
 * size from first to last. For the logarithms alone the rows before J are left alone, d^3 / 3 flops; for the root
 * (triangular products with U^-1 cancel less than those with A^-1) the columns before J, 2 d^3 / 3.
 *
 * X comes without the identity, which joins it only where it is a pivot: what X has left there is the argument of
 * log1p, so that the logarithm of a small X keeps its digits.
 *
 * Small matrices (coding_rate_shape.h) have a block each, and each of its threads 8 x 8 entries in its registers from
 * first to last: what goes through shared memory is Y, two packs of 8 entries for 64 multiplications, and a matrix is
 * read and written once. A panel costs two barriers and the 8 dependent roots of its corner, which the one thread that
 * has it factors as soon as it is done with the panel before. Large ones: a cooperative launch, all matrices in step,
 * in global memory (an X of 2048 in float32 stays in the L2), two meetings of all blocks a panel of 64.
 *
 * A list on the device says which matrices there are: how many, and how large, need not be known to the host.
 */
#ifndef SUBSPACE_CHOLESKY_CUH
#define SUBSPACE_CHOLESKY_CUH
#include "tiles.cuh"

typedef struct square { /* a matrix of a batch */
    int64_t at, side;   /* where it begins; 0: there is nothing to do */
    int64_t slot;       /* of its verdict */
    int64_t work;       /* a large one: where its scratch begins, in rows */
    double scale;       /* packed: X is that much of what is found */
} square;

typedef struct verdict {
    double half;    /* 1/2 log det A */
    double trace;   /* of A^-1, unless only the logarithm is wanted */
    double largest; /* of the diagonal of A^-1, if that is wanted */
    double sum;     /* tr X */
    int64_t good;   /* the factorisation stands */
} verdict;

enum { LOGDET, ROOT, INVERSE };

typedef struct squares {
    const square *small, *large; /* [lists, most], [lists, most_large] */
    const int64_t *count;        /* [lists, 2] of each there are */
    int64_t lists, most, most_large, slots;
    int wanted;
    int packed;    /* the upper halves without gaps, row by row; small ones only */
    void *x;       /* X, then what is wanted: symmetric, or upper triangular with zeros below */
    verdict *of;   /* [lists, slots] */
    double worst;  /* not good: |X|_F > worst * the least pivot; INFINITY: never mind */
    double failed; /* what then takes the place of what is wanted */
    void *y;       /* [rows, 64] for large ones: Y by columns of 64 */
    double *rest;  /* [rows] what X has left of the pivots, */
    double *bands; /* [rows, 2] and squares and traces of 64 rows each */
    unsigned *meeting;
} squares;

/* Row i of a matrix of side s, at column 0. */
static __device__ inline int64_t row_begins(int packed, int64_t s, int64_t i)
{
    return packed ? i * s - i * (i - 1) / 2 - i : i * s;
}

/* ------------------------------------------------------------------- a matrix in a block's registers */

enum { PANEL = RATE_PANEL };

template <typename C> struct sweep_space {
    C *y[2], *z, *corner, *rest;
};

template <typename C> static __device__ inline sweep_space<C> sweep_space_at(C *shared, int tiles)
{
    const int panel = PANEL * PANEL * tiles;
    return sweep_space<C>{
        {shared, shared + panel}, shared + 2 * panel, shared + 3 * panel, shared + 3 * panel + PANEL * PANEL};
}

/* Where a row of a panel has entry r of tile `tile`: the first packs of all tiles, then the second ones, so that
 * neighbouring tiles' lie side by side. */
template <typename C> static __device__ inline int spot(int tiles, int tile, int r)
{
    const int whole = 16 / sizeof(C);
    return (r / whole * tiles + tile) * whole + r % whole;
}

/* The thread's tile (i, j), i <= j, column by column; false: it has none. */
static __device__ inline bool tile_of(int thread, int tiles, int *i, int *j)
{
    int column = (int)((sqrtf(8.f * (float)thread + 1.f) - 1.f) / 2.f);
    while (column * (column + 1) / 2 > thread) column--;
    while ((column + 1) * (column + 2) / 2 <= thread) column++;
    *j = column, *i = thread - column * (column + 1) / 2;
    return column < tiles;
}

/* x^-1/2, of float32 with one step of Newton's to the last digit but one; no root is NaN */
static __device__ inline float inverse_root(float x)
{
    const float y = rsqrtf(x);
    return fmaf(0.5f * y, fmaf(-x * y, y, 1.f), y);
}

static __device__ inline double inverse_root(double x)
{
    return rsqrt(x);
}

/* The tile on the diagonal becomes its factor U in `corner`, with 1/u on its diagonal, and tells what its pivots are.
 */
template <typename C> static __device__ inline void factor_corner(C (&t)[PANEL][PANEL], C *corner, C *rest)
{
#pragma unroll
    for (int k = 0; k < PANEL; k++) {
        const C root = inverse_root(1 + t[k][k]);
        rest[k] = t[k][k];
        corner[k * PANEL + k] = root;
#pragma unroll
        for (int c = k + 1; c < PANEL; c++) corner[k * PANEL + c] = t[k][c] *= root;
#pragma unroll
        for (int r = k + 1; r < PANEL; r++)
#pragma unroll
            for (int c = r; c < PANEL; c++) t[r][c] -= t[k][r] * t[k][c];
    }
}

/* Y of column x from what the tiles have put there, and if asked for L^-T Y. */
template <typename C>
static __device__ inline void solve_column(const sweep_space<C> &space, C *y, int tiles, int p, int x, int wanted)
{
    const int tile = x / PANEL, r = x % PANEL, row = PANEL * tiles, at = spot<C>(tiles, tile, r);
    const bool own = tile == p;
    C v[PANEL];
#pragma unroll
    for (int k = 0; k < PANEL; k++) v[k] = own ? (C)(k == r) : y[k * row + at];
#pragma unroll
    for (int k = 0; k < PANEL; k++) {
        v[k] *= space.corner[k * PANEL + k];
#pragma unroll
        for (int l = k + 1; l < PANEL; l++) v[l] -= space.corner[k * PANEL + l] * v[k];
        y[k * row + at] = v[k];
    }
    if (wanted != INVERSE) return;
#pragma unroll
    for (int k = PANEL - 1; k >= 0; k--) {
#pragma unroll
        for (int l = k + 1; l < PANEL; l++) v[k] -= space.corner[k * PANEL + l] * v[l];
        v[k] *= space.corner[k * PANEL + k];
        space.z[k * row + at] = own ? -v[k] : v[k];
    }
}

/* The tile of each thread, of `tiles` on a side, from X to -A^-1, to U^-1 above the diagonal, or to nothing of use.
 * Ends with a barrier; then the pivots are known. */
template <typename C>
static __device__ inline void sweep(C (&t)[PANEL][PANEL], bool mine, int ti, int tj, int tiles, int wanted,
                                    const sweep_space<C> &space)
{
    const int row = PANEL * tiles, thread = (int)thread_in_block();
    enum { whole = 16 / sizeof(C), PACKS = PANEL / whole };
    const int threads = (int)(blockDim.x * blockDim.y);
    for (int p = 0; p < tiles; p++) {
        C *const y = space.y[p % 2];
        if (mine && ti == p && tj == p) {
            factor_corner(t, space.corner, space.rest + p * PANEL);
        } else if (mine && ti == p) {
#pragma unroll
            for (int r = 0; r < PANEL; r++)
#pragma unroll
                for (int c = 0; c < PANEL; c++) y[r * row + spot<C>(tiles, tj, c)] = t[r][c];
        } else if (mine && tj == p && wanted != LOGDET) {
#pragma unroll
            for (int r = 0; r < PANEL; r++)
#pragma unroll
                for (int c = 0; c < PANEL; c++) y[c * row + spot<C>(tiles, ti, r)] = t[r][c];
        }
        __syncthreads();
        for (int x = (wanted == LOGDET ? p + 1 : 0) * PANEL + thread; x < row; x += threads)
            solve_column(space, y, tiles, p, x, wanted);
        __syncthreads();
        if (!mine) continue;
        if (wanted == INVERSE && ti == p) {
#pragma unroll
            for (int r = 0; r < PANEL; r++)
#pragma unroll
                for (int c = 0; c < PANEL; c++) t[r][c] = space.z[r * row + spot<C>(tiles, tj, c)];
        } else if (wanted != LOGDET && tj == p) {
            const C *const from = wanted == INVERSE ? space.z : y;
#pragma unroll
            for (int r = 0; r < PANEL; r++)
#pragma unroll
                for (int c = 0; c < PANEL; c++) t[r][c] = from[c * row + spot<C>(tiles, ti, r)];
        } else if (wanted == INVERSE || (tj > p && (wanted == ROOT || ti > p))) {
            if (ti == p)
#pragma unroll
                for (int r = 0; r < PANEL; r++)
#pragma unroll
                    for (int c = 0; c < PANEL; c++) t[r][c] = 0;
            const pack<C> *a = (const pack<C> *)y + ti, *b = (const pack<C> *)y + tj;
#pragma unroll 1
            for (int k = 0; k < PANEL; k++, a += PACKS * tiles, b += PACKS * tiles) {
                pack<C> right[PACKS];
#pragma unroll
                for (int c = 0; c < PACKS; c++) right[c] = b[c * tiles];
#pragma unroll
                for (int r = 0; r < PANEL; r += whole) {
                    const pack<C> left = a[r / whole * tiles];
#pragma unroll
                    for (int e = 0; e < whole; e++)
#pragma unroll
                        for (int c = 0; c < PANEL; c++) t[r + e][c] -= left.v[e] * right[c / whole].v[c % whole];
                }
            }
        }
    }
    __syncthreads();
}

/* One matrix; all threads of the block. */
template <typename C>
static __device__ inline void sweep_matrix(const squares &b, const square &q, verdict *to, C *shared)
{
    const int s = (int)q.side, tiles = (s + PANEL - 1) / PANEL;
    const sweep_space<C> space = sweep_space_at(shared, tiles);
    C *const x = (C *)b.x + q.at;
    const C scale = (C)q.scale;
    double square_sum = 0, sum = 0, half = 0, least = INFINITY, trace = 0, largest = 0;
    int ti, tj;
    const bool mine = tile_of((int)thread_in_block(), tiles, &ti, &tj), corner = mine && ti == tj;
    C t[PANEL][PANEL];
#pragma unroll
    for (int r = 0; r < PANEL; r++) {
        const int i = PANEL * ti + r;
        const C *row = x + row_begins(b.packed, s, i);
#pragma unroll
        for (int c = 0; c < PANEL; c++) {
            const int j = PANEL * tj + c;
            t[r][c] = mine && i <= j && j < s ? (b.packed ? scale * row[j] : row[j]) : (C)0;
            if (sizeof(C) == 4) square_sum += (i < j ? 2. : 1.) * (double)t[r][c] * (double)t[r][c];
            if (i == j) sum += (double)t[r][c];
        }
    }
    __syncthreads(); /* the matrix before has been looked at */
    sweep(t, mine, ti, tj, tiles, b.wanted, space);
    for (int i = (int)thread_in_block(); i < s; i += (int)(blockDim.x * blockDim.y)) {
        const double rest = (double)space.rest[i];
        half += 0.5 * log1p(rest);
        least = fmin(least, isnan(rest) ? -INFINITY : 1 + rest);
    }
    half = block_sum(half), least = -block_max(-least);
    const double norm = sizeof(C) == 4 ? sqrt(block_sum(square_sum)) : 0;
    const bool good = isfinite(half) && least > 0 && norm <= b.worst * least;
#pragma unroll
    for (int r = 0; r < PANEL; r++) {
        const int i = PANEL * ti + r;
        C *const row = x + row_begins(b.packed, s, i);
#pragma unroll
        for (int c = 0; c < PANEL; c++) {
            const int j = PANEL * tj + c;
            if (!mine || b.wanted == LOGDET || i > j || j >= s) continue;
            const C value = !good ? (C)b.failed : b.wanted == INVERSE ? -t[r][c] : t[r][c];
            if (b.wanted == ROOT) trace += (double)value * (double)value;
            else if (i == j) trace += (double)value, largest = fmax(largest, (double)value);
            row[j] = value;
            if (!b.packed && i < j) x[(int64_t)j * s + i] = good && b.wanted == ROOT ? (C)0 : value;
        }
    }
    sum = block_sum(corner ? sum : 0), trace = block_sum(trace), largest = block_max(largest);
    if (thread_in_block() == 0) *to = verdict{half, trace, largest, sum, good};
}

/* Sides above `over` and up to `side`, which the block's threads and shared memory are for; blocks (x, list). */
template <typename C, int threads>
__global__ void __launch_bounds__(threads, sizeof(C) == 4 ? MAX(1, 512 / threads) : 1)
    sweep_small(const squares b, int over, int side)
{
    DYNAMIC_SHARED(shared);
    for (int64_t list = blockIdx.y; list < b.lists; list += gridDim.y)
        for (int64_t i = blockIdx.x; i < b.count[2 * list]; i += gridDim.x) {
            const square q = b.small[list * b.most + i];
            if (q.side > over && q.side <= side) sweep_matrix(b, q, b.of + list * b.slots + q.slot, (C *)shared);
        }
}

/* ------------------------------------------------------------------------------- all blocks together */

enum { MEASURE, PIVOT, UPDATE, JUDGE, STORE }; /* what is done to all matrices before the blocks meet */

/* Of how many items that consists, for one matrix. */
static __device__ inline int64_t items_of(int phase, int wanted, int64_t side, int64_t p)
{
    const int64_t tiles = rate_ceil(side, RATE_TILE);
    switch (phase) {
    case MEASURE: return tiles;
    case PIVOT: return p >= tiles ? 0 : wanted == LOGDET ? tiles - p : tiles;
    case UPDATE: return p >= tiles ? 0 : rate_upper(side);
    case JUDGE: return side > 0;
    default: return wanted == LOGDET ? 0 : rate_upper(side);
    }
}

/* The squares and the trace of 64 rows of X, for norm and sum. */
template <typename C> static __device__ inline void measure(const squares &b, const square &q, int64_t band)
{
    const C *x = (const C *)b.x + q.at;
    double square_sum = 0, sum = 0;
    for (int64_t i = band * RATE_TILE; i < MIN((band + 1) * RATE_TILE, q.side); i++)
        for (int64_t j = i + threadIdx.x; j < q.side; j += blockDim.x) {
            const double value = (double)x[i * q.side + j];
            square_sum += (i < j ? 2 : 1) * value * value;
            if (i == j) sum += value;
        }
    square_sum = block_sum(square_sum), sum = block_sum(sum);
    if (threadIdx.x == 0) b.bands[2 * (q.work + band)] = square_sum, b.bands[2 * (q.work + band) + 1] = sum;
}

/* The root of the 64 pivots of panel p, in `root` with zeros below; every block that needs it makes it. */
template <typename C>
static __device__ inline void pivot_root(const squares &b, const square &q, int64_t p, bool tell, C *root,
                                         const sweep_space<C> &space)
{
    const int64_t s = q.side, at = p * RATE_TILE;
    const C *x = (const C *)b.x + q.at;
    int ti, tj;
    const bool mine = tile_of((int)threadIdx.x, RATE_TILE / PANEL, &ti, &tj);
    C t[PANEL][PANEL];
#pragma unroll
    for (int r = 0; r < PANEL; r++)
#pragma unroll
        for (int c = 0; c < PANEL; c++) {
            const int64_t i = at + PANEL * ti + r, j = at + PANEL * tj + c;
            t[r][c] = mine && i <= j && j < s ? x[i * s + j] : (C)0;
        }
    sweep(t, mine, ti, tj, RATE_TILE / PANEL, ROOT, space);
    if (mine)
#pragma unroll
        for (int r = 0; r < PANEL; r++)
#pragma unroll
            for (int c = 0; c < PANEL; c++) {
                root[(PANEL * ti + r) * RATE_PAD + PANEL * tj + c] = t[r][c];
                if (ti < tj) root[(PANEL * tj + c) * RATE_PAD + PANEL * ti + r] = 0;
            }
    if (tell && threadIdx.x < RATE_TILE) b.rest[q.work + at + threadIdx.x] = (double)space.rest[threadIdx.x];
    __syncthreads();
}

/* Tile `tile` of Y = L^-1 A_J. to scratch, and if it is the inverse that is wanted, L^-T Y in place of the tile. */
template <typename C>
static __device__ inline void pivot(const squares &b, const square &q, int64_t p, int64_t tile, C *root, C *other,
                                    const sweep_space<C> &space)
{
    const int64_t s = q.side, row0 = p * RATE_TILE, col0 = tile * RATE_TILE;
    C *const x = (C *)b.x + q.at, *const y = (C *)b.y + (q.work + col0) * RATE_TILE;
    const int row = my_row(), col = my_col();
    C sum[MY_ROWS][MY_COLS] = {};
    pivot_root(b, q, p, tile == p, root, space);
    if (tile == p) {
        for (int e = (int)threadIdx.x; e < RATE_TILE * RATE_TILE; e += RATE_THREADS)
            y[e] = root[e % RATE_TILE * RATE_PAD + e / RATE_TILE];
        __syncthreads();
        return;
    }
    for (int e = (int)threadIdx.x; e < RATE_TILE * RATE_TILE; e += RATE_THREADS) {
        const int k = tile > p ? e / RATE_TILE : e % RATE_TILE, l = tile > p ? e % RATE_TILE : e / RATE_TILE;
        const int64_t i = row0 + k, j = col0 + l;
        other[k * RATE_PAD + l] = i < s && j < s ? x[tile > p ? i * s + j : j * s + i] : (C)0;
    }
    __syncthreads();
    multiply<C, false>(RATE_TILE, root, other, sum);
    for (int r = 0; r < MY_ROWS; r++)
        for (int c = 0; c < MY_COLS; c++) y[(row + r) * RATE_TILE + col + c] = sum[r][c];
    if (b.wanted == INVERSE) {
        __syncthreads();
        for (int r = 0; r < MY_ROWS; r++)
            for (int c = 0; c < MY_COLS; c++) other[(row + r) * RATE_PAD + col + c] = sum[r][c], sum[r][c] = 0;
        __syncthreads();
        multiply<C, true>(RATE_TILE, root, other, sum);
    }
    if (b.wanted == INVERSE || (b.wanted == ROOT && tile < p))
        for (int r = 0; r < MY_ROWS; r++)
            for (int c = 0; c < MY_COLS; c++) {
                const int64_t i = row0 + row + r, j = col0 + col + c;
                if (i < s && j < s) x[tile > p ? i * s + j : j * s + i] = sum[r][c];
            }
    __syncthreads();
}

/* Tile (i, j), i <= j, of A <- A - Y'Y, and what is to become of A_JJ. */
template <typename C>
static __device__ inline void update(const squares &b, const square &q, int64_t p, int64_t i, int64_t j, C *left,
                                     C *right)
{
    const int64_t s = q.side;
    const int whole = 16 / sizeof(C), row = my_row(), col = my_col();
    const bool corner = i == p && j == p, fresh = i == p;
    C *const x = (C *)b.x + q.at;
    const C *const y = (const C *)b.y + q.work * RATE_TILE;
    C sum[MY_ROWS][MY_COLS];
    if (b.wanted == LOGDET ? i <= p : b.wanted == ROOT ? j < p || (j == p && i < p) : (i == p) != (j == p)) return;
#pragma unroll
    for (int r = 0; r < MY_ROWS; r++)
#pragma unroll
        for (int c = 0; c < MY_COLS; c++) {
            const int64_t at_row = i * RATE_TILE + row + r, at_col = j * RATE_TILE + col + c;
            sum[r][c] = !fresh && at_row < s && at_col < s ? -x[at_row * s + at_col] : (C)0;
        }
    for (int e = (int)threadIdx.x * whole; e < RATE_TILE * RATE_TILE; e += RATE_THREADS * whole) {
        const int at = e / RATE_TILE * RATE_PAD + e % RATE_TILE;
        *(pack<C> *)(left + at) = *(const pack<C> *)(y + i * RATE_TILE * RATE_TILE + e);
        *(pack<C> *)(right + at) = *(const pack<C> *)(y + j * RATE_TILE * RATE_TILE + e);
    }
    __syncthreads();
    if (corner && b.wanted == ROOT)
        for (int r = 0; r < MY_ROWS; r++)
            for (int c = 0; c < MY_COLS; c++) sum[r][c] = -left[(col + c) * RATE_PAD + row + r];
    else multiply<C, false>(RATE_TILE, left, right, sum);
#pragma unroll
    for (int r = 0; r < MY_ROWS; r++)
#pragma unroll
        for (int c = 0; c < MY_COLS; c++) {
            const int64_t at_row = i * RATE_TILE + row + r, at_col = j * RATE_TILE + col + c;
            if (at_row < s && at_col < s) x[at_row * s + at_col] = -sum[r][c];
        }
    __syncthreads();
}

template <typename C> static __device__ inline void judge(const squares &b, const square &q, verdict *to)
{
    const int64_t s = q.side;
    const C *x = (const C *)b.x + q.at;
    double square_sum = 0, sum = 0, half = 0, least = INFINITY, trace = 0, largest = 0;
    for (int64_t i = threadIdx.x; i < s; i += blockDim.x) {
        const double rest = b.rest[q.work + i], left = -(double)x[i * s + i];
        half += 0.5 * log1p(rest);
        least = fmin(least, isnan(rest) ? -INFINITY : 1 + rest);
        if (b.wanted == INVERSE) trace += left, largest = fmax(largest, left);
    }
    for (int64_t i = threadIdx.x; i < rate_ceil(s, RATE_TILE); i += blockDim.x)
        square_sum += b.bands[2 * (q.work + i)], sum += b.bands[2 * (q.work + i) + 1];
    if (b.wanted == ROOT)
        for (int64_t i = 0; i < s; i++)
            for (int64_t j = i + threadIdx.x; j < s; j += blockDim.x)
                trace += (double)x[i * s + j] * (double)x[i * s + j];
    half = block_sum(half), least = -block_max(-least), square_sum = block_sum(square_sum), sum = block_sum(sum);
    trace = block_sum(trace), largest = block_max(largest);
    const bool good = isfinite(half) && least > 0 && (sizeof(C) == 8 || sqrt(square_sum) <= b.worst * least);
    if (threadIdx.x == 0) *to = verdict{half, trace, largest, sum, good};
}

/* Tile (i, j), i <= j, as it is handed on, with what is on the other side of the diagonal. */
template <typename C>
static __device__ inline void store(const squares &b, const square &q, bool good, int64_t i, int64_t j, C *tile)
{
    const int64_t s = q.side;
    C *const x = (C *)b.x + q.at;
    for (int e = (int)threadIdx.x; e < RATE_TILE * RATE_TILE; e += RATE_THREADS) {
        const int r = e / RATE_TILE, c = e % RATE_TILE;
        const int64_t row = i * RATE_TILE + r, col = j * RATE_TILE + c;
        if (row > col || col >= s) continue;
        const C found = x[row * s + col], value = !good ? (C)b.failed : b.wanted == INVERSE ? -found : found;
        x[row * s + col] = value;
        tile[c * RATE_PAD + r] = good && b.wanted == ROOT ? (C)0 : value;
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < RATE_TILE * RATE_TILE; e += RATE_THREADS) {
        const int r = e / RATE_TILE, c = e % RATE_TILE;
        const int64_t row = j * RATE_TILE + r, col = i * RATE_TILE + c;
        if (row > col && row < s) x[row * s + col] = tile[r * RATE_PAD + c];
    }
    __syncthreads();
}

/* Every block does its share of the items of all large matrices. */
template <typename C, int phase>
static __device__ void share_out(const squares &b, int64_t p, C *left, C *right, const sweep_space<C> &space)
{
    int64_t turn = blockIdx.x;
    for (int64_t list = 0; list < b.lists; list++)
        for (int64_t at = 0; at < b.count[2 * list + 1]; at++) {
            const square q = b.large[list * b.most_large + at];
            verdict *const of = b.of + list * b.slots + q.slot;
            const int64_t items = items_of(phase, b.wanted, q.side, p), tiles = rate_ceil(q.side, RATE_TILE);
            for (; turn < items; turn += gridDim.x) {
                int i, j;
                if (phase == UPDATE || phase == STORE) tile_of((int)turn, (int)tiles, &i, &j);
                if (phase == MEASURE) measure<C>(b, q, turn);
                if (phase == PIVOT) pivot(b, q, p, turn + tiles - items, left, right, space);
                if (phase == UPDATE) update(b, q, p, i, j, left, right);
                if (phase == JUDGE) judge<C>(b, q, of);
                if (phase == STORE) store(b, q, of->good, i, j, left);
            }
            turn -= items;
        }
}

/* The large matrices of a batch, of which the largest has so many panels, by all blocks of a cooperative launch; the
 * results are there after the next meeting. */
template <typename C>
static __device__ void sweep_together(const squares &b, int64_t panels, C *left, C *right, const sweep_space<C> &space)
{
    share_out<C, MEASURE>(b, 0, left, right, space);
    for (int64_t p = 0; p < panels; p++) {
        grid_sync(b.meeting);
        share_out<C, PIVOT>(b, p, left, right, space);
        grid_sync(b.meeting);
        share_out<C, UPDATE>(b, p, left, right, space);
    }
    grid_sync(b.meeting);
    share_out<C, JUDGE>(b, 0, left, right, space);
    grid_sync(b.meeting);
    share_out<C, STORE>(b, 0, left, right, space);
}

template <typename C> __global__ void __launch_bounds__(RATE_THREADS) sweep_large(const squares b)
{
    DYNAMIC_SHARED(shared);
    C *const left = (C *)shared, *const right = left + RATE_TILE * RATE_PAD;
    int64_t panels = 0;
    for (int64_t list = 0; list < b.lists; list++)
        for (int64_t i = 0; i < b.count[2 * list + 1]; i++)
            panels = MAX(panels, rate_ceil(b.large[list * b.most_large + i].side, RATE_TILE));
    if (panels > 0)
        sweep_together(b, panels, left, right, sweep_space_at(right + RATE_TILE * RATE_PAD, RATE_TILE / PANEL));
}

/* ---------------------------------------------------------------------------------- on the host */

/* The matrices of a class, if there can be any. */
template <typename C, int which>
static subspace_status sweep_class(subspace_ctx *ctx, const device_limits *limits, const squares *b, int64_t least,
                                   int64_t side)
{
    const int over = which ? rate_class(which - 1, sizeof(C)) : 0, up_to = rate_class(which, sizeof(C));
    const int threads = rate_sweep_threads(rate_class(which, sizeof(C)));
    const unsigned lists = (unsigned)MIN(b->lists, 65535);
    const dim3 grid(rate_sweep_blocks(b->most, lists, threads, limits->multiprocessors), lists);
    if (side <= over || least > up_to) return SUBSPACE_OK;
    LAUNCH(ctx, (sweep_small<C, threads>), grid, threads, sizeof(C) * (size_t)rate_sweep_space(up_to), *b, over, up_to);
    return SUBSPACE_OK;
}

/* Factor the whole batch, with sides of at least `least` and at most `side`. */
template <typename C>
static subspace_status sweep_all(subspace_ctx *ctx, const device_limits *limits, const squares *b, int64_t least,
                                 int64_t side)
{
    TRY((sweep_class<C, 0>(ctx, limits, b, least, side)));
    TRY((sweep_class<C, 1>(ctx, limits, b, least, side)));
    TRY((sweep_class<C, 2>(ctx, limits, b, least, side)));
    if (side > rate_small(sizeof(C))) {
        const size_t shared = rate_large_shared(sizeof(C));
        int64_t blocks = 0;
        TRY(resident_blocks(ctx, limits, sweep_large<C>, RATE_THREADS, shared, &blocks));
        blocks = MAX(1, MIN(blocks, b->lists * b->most_large * rate_upper(side)));
        CUDA(ctx, cudaMemsetAsync(b->meeting, 0, 2 * sizeof(unsigned), (cudaStream_t)ctx->stream));
        LAUNCH_COOPERATIVE(ctx, sweep_large<C>, (unsigned)blocks, RATE_THREADS, shared, *b);
    }
    return SUBSPACE_OK;
}

#endif
