/* cholesky.cuh - batches of A = I + X: the logarithms, roots and inverses of gauss_jordan.cuh for matrices of any size.
 *
 * Small ones (coding_rate_shape.h) have a block each. Large ones are done by a cooperative launch, all in step, in
 * global memory (an X of 2048 in float32 stays in the L2), by the same elimination with J of 64 pivots: each block that
 * has to do with a panel makes its root R_J = L^-T in registers, Y = R_J' A_J. is a product, and so are the rest; the
 * blocks meet twice a panel.
 *
 * A list on the device says which matrices there are: how many, and how large, need not be known to the host.
 *
 * Included by cholesky.cu and qr_update.cuh; the former has the launches for all.
 */
#ifndef SUBSPACE_CHOLESKY_CUH
#define SUBSPACE_CHOLESKY_CUH
#include "gauss_jordan.cuh"

/* ------------------------------------------------------------------------------- all blocks together */

enum { MEASURE, PIVOT, UPDATE, JUDGE, STORE }; /* what is done to all matrices before the blocks meet */

/* Of how many items that consists, for one matrix. */
static __device__ inline int64_t items_of(int phase, int wanted, int64_t side, int64_t p)
{
    const int64_t tiles = CEIL_DIV(side, RATE_TILE);
    switch (phase) {
    case MEASURE: return tiles;
    case PIVOT: return p >= tiles ? 0 : wanted == LOGDET ? tiles - p : tiles;
    case UPDATE: return p >= tiles ? 0 : rate_upper(side);
    case JUDGE: return side > 0;
    default: return wanted == LOGDET ? 0 : rate_upper(side);
    }
}

/* The squares and the trace of 64 rows of X, for norm and sum. */
template <typename C> static __device__ inline void measure(const squares &b, const square &q, int64_t panel)
{
    const C *x = (const C *)b.x + q.at;
    double square_sum = 0, sum = 0;
    for (int64_t i = panel * RATE_TILE; i < MIN((panel + 1) * RATE_TILE, q.side); i++)
        for (int64_t j = i + threadIdx.x; j < q.side; j += blockDim.x) {
            const double value = (double)x[i * q.side + j];
            square_sum += (i < j ? 2 : 1) * value * value;
            if (i == j) sum += value;
        }
    square_sum = block_sum(square_sum), sum = block_sum(sum);
    if (threadIdx.x == 0) b.traces[2 * (q.work + panel)] = square_sum, b.traces[2 * (q.work + panel) + 1] = sum;
}

/* The root of the 64 pivots of panel p, in `root` with zeros below; every block that needs it makes it. */
template <typename C>
static __device__ inline void pivot_root(const squares &b, const square &q, int64_t p, bool tell, C *root,
                                         const elimination_space<C> &space)
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
    eliminate(t, mine, ti, tj, RATE_TILE / PANEL, ROOT, space);
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
                                    const elimination_space<C> &space)
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
        *(pack16<C> *)(left + at) = *(const pack16<C> *)(y + i * RATE_TILE * RATE_TILE + e);
        *(pack16<C> *)(right + at) = *(const pack16<C> *)(y + j * RATE_TILE * RATE_TILE + e);
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
    for (int64_t i = threadIdx.x; i < CEIL_DIV(s, RATE_TILE); i += blockDim.x)
        square_sum += b.traces[2 * (q.work + i)], sum += b.traces[2 * (q.work + i) + 1];
    if (b.wanted == ROOT)
        for (int64_t i = 0; i < s; i++)
            for (int64_t j = i + threadIdx.x; j < s; j += blockDim.x)
                trace += (double)x[i * s + j] * (double)x[i * s + j];
    half = block_sum(half), least = -block_max(-least), square_sum = block_sum(square_sum), sum = block_sum(sum);
    trace = block_sum(trace), largest = block_max(largest);
    const bool good = isfinite(half) && least > 0 && sqrt(square_sum) <= b.worst * least;
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
static __device__ void share_out(const squares &b, int64_t p, C *left, C *right, const elimination_space<C> &space)
{
    int64_t turn = blockIdx.x;
    for (int64_t list = 0; list < b.lists; list++)
        for (int64_t at = 0; at < b.count[2 * list + 1]; at++) {
            const square q = b.large[list * b.most_large + at];
            verdict *const of = b.of + list * b.slots + q.slot;
            const int64_t items = items_of(phase, b.wanted, q.side, p), tiles = CEIL_DIV(q.side, RATE_TILE);
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
static __device__ void eliminate_together(const squares &b, int64_t panels, C *left, C *right,
                                          const elimination_space<C> &space)
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

/* Factor the whole batch, of float or double, with sides of at least `least` and at most `side`: cholesky.cu. */
subspace_status eliminate_all(subspace_ctx *ctx, const device_limits *limits, bool wide, const squares *b,
                              int64_t least, int64_t side);

#endif
