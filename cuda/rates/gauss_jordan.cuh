/* gauss_jordan.cuh - A = I + X, symmetric and positive definite: 1/2 log det A and A^-1, or the root U^-1 of it, A =
 * U'U, by Gauss-Jordan elimination of the upper half (statistics' sweep operator), J of 8 pivots at a time:
 *
 *     A_JJ = L L',  Y = L^-1 A_J.,  A <- A - Y'Y outside J,  A_J. <- L^-T Y,  A_JJ <- -L^-T L^-1
 *
 * At the end A is -A^-1. These are s^3 flops of which nearly all are products of half the matrix with itself, of one
 * size from first to last. For the logarithms alone the rows before J are left alone, s^3 / 3 flops; for the root
 * (triangular products with U^-1 cancel less than those with A^-1) the columns before J, 2 s^3 / 3.
 *
 * X comes without the identity, which joins it only where it is a pivot: what X has left there is the argument of
 * log1p, so that the logarithm of a small X keeps its digits.
 *
 * Here a matrix has a block to itself, and each thread 8 x 8 entries in its registers from first to last: rather than
 * in shared memory, where each panel would read and write all of them, with no limit but the threads. What goes through
 * shared memory is Y, 16 entries a thread for 64 multiplications; the matrix is read and written once. A panel costs
 * two barriers and the 8 dependent roots of its corner, which the one thread that has it factors as soon as it is done
 * with the panel before. Of side 256 in float32: 32 panels of 2200 clocks of multiplications on a multiprocessor, and
 * about 1000 of what hangs together.
 *
 * Included by cholesky.cuh.
 */
#ifndef SUBSPACE_GAUSS_JORDAN_CUH
#define SUBSPACE_GAUSS_JORDAN_CUH
#include "tile_product.cuh"

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
    int packed;     /* the upper halves without gaps, row by row; small ones only */
    void *x;        /* X, then what is wanted: symmetric, or upper triangular with zeros below */
    verdict *of;    /* [lists, slots] */
    double worst;   /* not good: |X|_F > worst * the least pivot; INFINITY: never mind */
    double failed;  /* what then takes the place of what is wanted */
    void *y;        /* [rows, 64] for large ones: Y by columns of 64 */
    double *rest;   /* [rows] what X has left of the pivots, */
    double *traces; /* [rows, 2] and squares and traces of 64 rows each */
    unsigned *meeting;
} squares;

/* Row i of a matrix of side s, at column 0. */
static __device__ inline int64_t row_begins(int packed, int64_t s, int64_t i)
{
    return packed ? i * s - i * (i - 1) / 2 - i : i * s;
}

/* ------------------------------------------------------------------- a matrix in a block's registers */

enum { PANEL = RATE_PANEL };

template <typename C> struct elimination_space {
    C *y[2], *z, *corner, *rest;
};

template <typename C> static __device__ inline elimination_space<C> elimination_space_at(C *shared, int tiles)
{
    const int panel = PANEL * PANEL * tiles;
    return elimination_space<C>{
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
static __device__ inline void solve_column(const elimination_space<C> &space, C *y, int tiles, int p, int x, int wanted)
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
static __device__ inline void eliminate(C (&t)[PANEL][PANEL], bool mine, int ti, int tj, int tiles, int wanted,
                                        const elimination_space<C> &space)
{
    const int row = PANEL * tiles, thread = (int)thread_in_block();
    enum { whole = 16 / sizeof(C), PACKS = PANEL / whole };
    const int threads = (int)(blockDim.x * blockDim.y);
    for (int p = 0; p < tiles; p++) {
        C *const y = p % 2 ? space.y[1] : space.y[0]; /* an index would put them into local memory */
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
            const pack16<C> *a = (const pack16<C> *)y + ti, *b = (const pack16<C> *)y + tj;
#pragma unroll 1
            for (int k = 0; k < PANEL; k++, a += PACKS * tiles, b += PACKS * tiles) {
                pack16<C> right[PACKS];
#pragma unroll
                for (int c = 0; c < PACKS; c++) right[c] = b[c * tiles];
#pragma unroll
                for (int r = 0; r < PANEL; r += whole) {
                    const pack16<C> left = a[r / whole * tiles];
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
static __device__ inline void eliminate_matrix(const squares &b, const square &q, verdict *to, C *shared)
{
    const int s = (int)q.side, tiles = CEIL_DIV(s, PANEL);
    const elimination_space<C> space = elimination_space_at(shared, tiles);
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
            square_sum += (i < j ? 2. : 1.) * (double)t[r][c] * (double)t[r][c];
            if (i == j) sum += (double)t[r][c];
        }
    }
    __syncthreads(); /* the matrix before has been looked at */
    eliminate(t, mine, ti, tj, tiles, b.wanted, space);
    for (int i = (int)thread_in_block(); i < s; i += (int)(blockDim.x * blockDim.y)) {
        const double rest = (double)space.rest[i];
        half += 0.5 * log1p(rest);
        least = fmin(least, isnan(rest) ? -INFINITY : 1 + rest);
    }
    half = block_sum(half), least = -block_max(-least);
    const double norm = sqrt(block_sum(square_sum));
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

#endif
