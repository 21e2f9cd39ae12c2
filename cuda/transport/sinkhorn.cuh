/* sinkhorn.cuh - the blocks that work on one plan: what each of them has, how they meet, and what both directions of
 * sinkhorn.cu do with a matrix K of which each block has some rows.
 *
 *     row sums       a warp a row, dot products of 16 bytes a lane
 *     column sums    a partial sum for each panel of rows, a thread 16 bytes of columns; after the blocks have met, a
 *                    warp adds up the partial sums of a strip of columns
 *
 * Terms and partial sums are of K's type, some tens of terms each, their sums in double. Nothing here depends on how
 * many blocks there are. Every function but those of a row or a strip is called by all threads of the block; the run
 * itself is in shared memory, and what changes in it is written by one thread, between two barriers.
 *
 * Included by sinkhorn.cu, sinkhorn_gibbs.cuh and sinkhorn_backward.cuh.
 */
#ifndef SUBSPACE_SINKHORN_CUH
#define SUBSPACE_SINKHORN_CUH
#include <float.h>
#include "cuda.cuh"
#include "sinkhorn_shape.h"

enum {
    THREADS = SINKHORN_THREADS,
    WARPS = THREADS / WARP,
    LINES = SINKHORN_LINES,
    STRIP = SINKHORN_STRIP,
    STEPS = 16,       /* of a lane, in a partial sum of a row */
    AHEAD = 8,        /* loads of a lane before the first store */
    FLUSH = 64,       /* rows in a partial sum of a column */
    MEETING = 32,     /* words, a cache line for each group */
    MOST_STEPS = 500, /* of conjugate gradients */
};

template <typename T> struct sinkhorn_run {
    int64_t v, m, n, max_iter, half_steps;
    subspace_symmetry given;
    double scale, tol; /* scale: 1 / eta */
    const T *scores, *row, *col, *dplan;
    T *plan, *dscores, *drow, *dcol;
    double *error;
    int64_t *sweeps;
    sinkhorn_shape shape;
    /* of the first group; that of the next lies `bytes` further */
    size_t bytes;
    int64_t columns;                  /* where those of a vector of conjugate gradients begin: 16 bytes' worth */
    unsigned *meeting;                /* [groups, MEETING] */
    double2 *report;                  /* [2, 2, blocks] */
    double *sums[3];                  /* [panels + strips] */
    double *logs[2], *y, *term;       /* [m], [n]: of alpha and beta; [n], [m] */
    T *f, *x[2];                      /* [m], [n] */
    T *diagonal, *rhs, *z, *p[2], *s; /* [m + n] or [n]: conjugate gradients, s the solution */
    T *partial[2];                    /* [panels, ld] */
    /* of this block: */
    unsigned group, rank;
    int64_t first, last, begin, end; /* its panels, their rows */
    int64_t at;                      /* the plan */
    double *alpha, *beta;            /* logs, of a symmetric plan one for both */
    T *k;                            /* K from row `origin` on, rows of `ld` entries */
    int64_t origin, ld;
    bool wide, even; /* K's, the others' rows begin at multiples of 16 bytes */
    bool symmetric;  /* the plan is */
    int turn;        /* of report */
    int now;         /* of x or p */
};

template <typename T> static __device__ inline T marginal(const T *given, int64_t at)
{
    return given ? given[at] : (T)1;
}

static __device__ inline unsigned lane_of()
{
    return threadIdx.x % WARP;
}

static __device__ inline unsigned warp_of()
{
    return threadIdx.x / WARP;
}

/* --------------------------------------------------------------------------------------------- this block's share */

template <typename V> static __device__ inline void advance(V **pointer, size_t bytes)
{
    *pointer = (V *)((char *)*pointer + bytes);
}

template <typename T> static __device__ inline void enter_group(sinkhorn_run<T> &r)
{
    r.group = blockIdx.x / (unsigned)r.shape.blocks, r.rank = blockIdx.x % (unsigned)r.shape.blocks;
    r.first = r.rank * r.shape.share, r.last = MIN(r.first + r.shape.share, r.shape.panels);
    r.begin = r.first * r.shape.rows, r.end = MIN(r.last * r.shape.rows, r.m);
    r.meeting += r.group * MEETING, r.turn = 0;
    const size_t bytes = r.group * r.bytes;
    advance(&r.report, bytes);
    for (int i = 0; i < 3; i++) advance(&r.sums[i], bytes);
    advance(&r.y, bytes), advance(&r.term, bytes);
    advance(&r.f, bytes), advance(&r.diagonal, bytes), advance(&r.rhs, bytes), advance(&r.z, bytes);
    advance(&r.s, bytes);
    for (int i = 0; i < 2; i++) {
        advance(&r.x[i], bytes), advance(&r.p[i], bytes);
        advance(&r.logs[i], bytes), advance(&r.partial[i], bytes);
    }
}

/* K is in shared memory, or in the plan's place. */
template <typename T> static __device__ inline void take_plan(sinkhorn_run<T> &r, int64_t v, T *shared)
{
    const bool kept = r.shape.shared > 0;
    r.at = v, r.now = 0, r.alpha = r.logs[0], r.beta = r.logs[1];
    r.k = kept ? shared : r.plan + v * r.m * r.n;
    r.origin = kept ? r.begin : 0, r.ld = kept ? r.shape.ld : r.n;
    r.even = r.n * (int64_t)sizeof(T) % 16 == 0 && ((uintptr_t)r.plan | (uintptr_t)r.dplan) % 16 == 0;
    r.wide = kept || r.even;
}

template <typename T> static __device__ inline T *row_of(const sinkhorn_run<T> &r, int64_t i)
{
    return r.k + (i - r.origin) * r.ld;
}

/* Panels that go together from row sums to column sums: a streamed plan's rows are then read from memory once. */
template <typename T> static __device__ inline int64_t span_of(const sinkhorn_run<T> &r)
{
    return r.shape.shared > 0 ? r.shape.share : 1;
}

/* x or p changes places with the next one, or report with the one to come. */
static __device__ inline void flip(int *which)
{
    __syncthreads();
    if (threadIdx.x == 0) *which ^= 1;
    __syncthreads();
}

/* All blocks of the plan meet. */
template <typename T> static __device__ inline void meet(const sinkhorn_run<T> &r)
{
    if (r.shape.blocks > 1) blocks_sync(r.meeting, (unsigned)r.shape.blocks);
    else __syncthreads();
}

/* The largest a and b of the block, in the first or second place of what all learn after they have met. */
template <typename T> static __device__ inline void report(const sinkhorn_run<T> &r, int place, double a, double b)
{
    __shared__ double part[2][WARPS];
    a = warp_max(a), b = warp_max(b);
    __syncthreads();
    if (lane_of() == 0) part[0][warp_of()] = a, part[1][warp_of()] = b;
    __syncthreads();
    if (warp_of() > 0) return;
    a = warp_max(part[0][lane_of() % WARPS]), b = warp_max(part[1][lane_of() % WARPS]);
    if (lane_of() == 0) r.report[(2 * r.turn + place) * r.shape.blocks + r.rank] = make_double2(a, b);
}

/* The largest a and b of all blocks and places. Two turns: who is early writes where nobody reads any more. */
template <typename T> static __device__ inline double2 collect(sinkhorn_run<T> &r, int places)
{
    const double2 *all = r.report + 2 * r.turn * r.shape.blocks;
    double a = -INFINITY, b = -INFINITY;
    for (int64_t i = threadIdx.x; i < places * r.shape.blocks; i += THREADS) {
        const double2 one = all[i];
        a = larger(a, one.x), b = larger(b, one.y);
    }
    flip(&r.turn);
    a = block_max(a), b = block_max(b);
    return make_double2(a, b);
}

static __device__ inline double add_up(const double *x, int64_t count)
{
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) sum += x[i];
    return block_sum(sum);
}

/* ------------------------------------------------------------------------------------------------ rows and columns */

/* Entries of a block's rows, AHEAD at a time: (i, j), (i, j + step), ... A warp has one row after the other; or, where
 * what is at (j, i) is read too, 8 x 4 entries, of which 8 neighbours of a column are in 32 bytes. */
typedef struct walk {
    int64_t i, j, rows, step; /* from where, how far to the next row, and the next column */
} walk;

template <typename T> static __device__ inline walk along_rows(const sinkhorn_run<T> &r)
{
    return walk{r.begin + warp_of(), lane_of(), WARPS, WARP};
}

template <typename T> static __device__ inline walk across_pairs(const sinkhorn_run<T> &r)
{
    return walk{r.begin + lane_of() % LINES, warp_of() * (WARP / LINES) + lane_of() / LINES, LINES, THREADS / LINES};
}

/* x[a] = from[j + a step], where there is one */
template <typename T, typename S>
static __device__ inline void ahead(T (&x)[AHEAD], const S *from, int64_t step, int64_t left)
{
#pragma unroll
    for (int a = 0; a < AHEAD; a++) x[a] = a * step < left ? (T)from[a * step] : (T)0;
}

template <typename T> struct alignas(16) pack {
    T at[16 / sizeof(T)];
};

/* A pack, or one entry of it. */
template <typename T> static __device__ inline pack<T> load(const T *from, bool wide, unsigned count = 16 / sizeof(T))
{
    if (wide && count > 1) return *(const pack<T> *)from;
    pack<T> p;
    for (unsigned l = 0; l < 16 / sizeof(T); l++) p.at[l] = l < count ? from[l] : (T)0;
    return p;
}

/* A vector: x + beta p, or x. */
template <typename T> struct combination {
    const T *x, *p;
    T beta;
};

template <typename T> static __device__ inline T entry(const combination<T> &c, int64_t j)
{
    return c.p ? c.x[j] + c.beta * c.p[j] : c.x[j];
}

template <typename T> static __device__ inline pack<T> entries(const combination<T> &c, int64_t j)
{
    pack<T> x = load(c.x + j, true);
    if (!c.p) return x;
    const pack<T> p = load(c.p + j, true);
    for (unsigned l = 0; l < 16 / sizeof(T); l++) x.at[l] += c.beta * p.at[l];
    return x;
}

/* The product of a row and a vector, by a warp, for all its lanes. */
template <typename T>
static __device__ inline double row_product(const T *k, int64_t n, bool wide, const combination<T> &c)
{
    enum { WIDE = 16 / sizeof(T) };
    const int64_t whole = n / WIDE * WIDE;
    double sum = 0;
    for (int64_t j0 = lane_of() * WIDE; j0 < whole; j0 += STEPS * WARP * WIDE) {
        T some[WIDE] = {};
#pragma unroll 4
        for (int64_t j = j0; j < MIN(whole, j0 + STEPS * WARP * WIDE); j += WARP * WIDE) {
            const pack<T> a = load(k + j, wide), b = entries(c, j);
            for (int l = 0; l < WIDE; l++) some[l] += a.at[l] * b.at[l];
        }
        for (int l = 1; l < WIDE; l++) some[0] += some[l];
        sum += (double)some[0];
    }
    if (whole + lane_of() < n) sum += (double)(k[whole + lane_of()] * entry(c, whole + lane_of()));
    return warp_sum(sum);
}

/* For the rows i of each panel t = first .. last-1: partial[0][t, j] = sum_i w_i K_ij, w given; or, given G in its
 * place, sum_i K_ij, and partial[1][t, j] = sum_i K_ij G_ij. */
template <bool WEIGHTED, typename T>
static __device__ inline void panel_sums(const sinkhorn_run<T> &r, int64_t first, int64_t last, const T *given)
{
    enum { WIDE = 16 / sizeof(T), SUMS = WEIGHTED ? 1 : 2 };
    const unsigned packs = (unsigned)(r.n / WIDE), each = packs + (unsigned)(r.n % WIDE); /* and single columns */
    for (unsigned item = threadIdx.x; item < (last - first) * each; item += THREADS) {
        const int64_t t = first + item / each, end = MIN(r.m, (t + 1) * r.shape.rows);
        const unsigned c = item % each, count = c < packs ? WIDE : 1;
        const int64_t j = c < packs ? (int64_t)c * WIDE : (int64_t)packs * (WIDE - 1) + c;
        double total[SUMS][WIDE] = {};
        for (int64_t i0 = t * r.shape.rows; i0 < end; i0 += FLUSH) {
            T some[SUMS][WIDE] = {};
#pragma unroll 4
            for (int64_t i = i0; i < MIN(end, i0 + FLUSH); i++) {
                const pack<T> k = load(row_of(r, i) + j, r.wide, count);
                if (WEIGHTED) {
                    const T w = given[i];
                    for (int l = 0; l < WIDE; l++) some[0][l] += w * k.at[l];
                } else {
                    const pack<T> g = load(given + i * r.n + j, r.even, count);
                    for (int l = 0; l < WIDE; l++) some[0][l] += k.at[l], some[SUMS - 1][l] += k.at[l] * g.at[l];
                }
            }
            for (int s = 0; s < SUMS; s++)
                for (int l = 0; l < WIDE; l++) total[s][l] += (double)some[s][l];
        }
        for (int s = 0; s < SUMS; s++) {
            T *to = r.partial[s] + t * r.shape.ld + j; /* rows are whole packs */
            pack<T> a;
            for (int l = 0; l < WIDE; l++) a.at[l] = (T)total[s][l];
            if (count == WIDE) *(pack<T> *)to = a;
            else to[0] = a.at[0];
        }
    }
}

/* A warp's strips: s = first_strip(), + strip_step(), ... */
template <typename T> static __device__ inline int64_t first_strip(const sinkhorn_run<T> &r)
{
    return r.rank + r.shape.blocks * warp_of();
}

template <typename T> static __device__ inline int64_t strip_step(const sinkhorn_run<T> &r)
{
    return r.shape.blocks * WARPS;
}

/* The lane's column: each has four lanes, of which the first, owner(), does what is to be done once. */
static __device__ inline int64_t strip_column(int64_t strip)
{
    return strip * STRIP + lane_of() % STRIP;
}

template <typename T> static __device__ inline bool owner(const sinkhorn_run<T> &r, int64_t column)
{
    return lane_of() < STRIP && column < r.n;
}

/* The sum, or the largest, of the panels' partial results for the lane's column, by a warp. */
template <bool LARGEST, typename T>
static __device__ inline double strip_total(const sinkhorn_run<T> &r, const T *partial, int64_t strip)
{
    enum { QUARTERS = WARP / STRIP, LOADS = 16 };
    const int64_t j = strip_column(strip);
    double total = LARGEST ? -INFINITY : 0;
    for (int64_t t0 = lane_of() / STRIP; t0 < r.shape.panels && j < r.n; t0 += QUARTERS * LOADS) {
        T some[LOADS];
#pragma unroll
        for (int a = 0; a < LOADS; a++) {
            const int64_t t = t0 + a * QUARTERS;
            some[a] = t < r.shape.panels ? partial[t * r.shape.ld + j] : LARGEST ? (T)-INFINITY : (T)0;
        }
#pragma unroll
        for (int a = 0; a < LOADS; a++) total = LARGEST ? larger(total, (double)some[a]) : total + (double)some[a];
    }
    for (int lanes = STRIP; lanes < WARP; lanes *= 2) {
        const double other = __shfl_xor_sync(ALL_LANES, total, lanes);
        total = LARGEST ? larger(total, other) : total + other;
    }
    return total;
}

#endif
