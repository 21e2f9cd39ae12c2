/* tile_product.cuh - products of 64 x 64 tiles by 128 threads, 8 x 4 of a tile's entries a thread, for matrices whose
 * rows are anywhere: points in the order of their groups.
 *
 * A slab is 32 x 64 of an operand, its rows along the sum. Each thread fetches 16 of its entries into registers, 16
 * bytes at a time where rows allow, while the slab before is being multiplied from shared memory: 12 entries read for
 * 32 multiplications, neighbouring threads the same or neighbouring ones.
 *
 * Included by gauss_jordan.cuh.
 */
#ifndef SUBSPACE_TILE_PRODUCT_CUH
#define SUBSPACE_TILE_PRODUCT_CUH
#include "cuda.cuh"
#include "coding_rate_shape.h"

template <typename T> struct alignas(16) pack16 {
    T v[16 / sizeof(T)];
};

enum { MY_ROWS = 8, MY_COLS = 4 }; /* of a tile, a thread's */

static __device__ inline int my_row()
{
    return (int)thread_in_block() / (RATE_TILE / MY_COLS) * MY_ROWS;
}

static __device__ inline int my_col()
{
    return (int)thread_in_block() % (RATE_TILE / MY_COLS) * MY_COLS;
}

/* Rows of `width` entries, ld apart, of which the i-th is `order[i]` of `height`; order NULL: i. */
template <typename T> struct rows {
    const T *at;
    const int64_t *order;
    unsigned count, height, width, ld; /* below 2^31 */
    bool packed;                       /* rows are whole and aligned packs */
    const T *weight;                   /* of each row, weight_ld apart, or NULL */
    int64_t weight_ld;
};

template <typename T>
static __device__ rows<T> rows_of(const T *at, const int64_t *order, int64_t count, int64_t height, int64_t width)
{
    const int64_t whole = 16 / sizeof(T);
    return rows<T>{at,
                   order,
                   (unsigned)count,
                   (unsigned)height,
                   (unsigned)width,
                   (unsigned)width,
                   width % whole == 0 && (size_t)at % 16 == 0,
                   NULL,
                   0};
}

/* Where row i begins; NULL: order leads out of the matrix. */
template <typename T> static __device__ inline const T *row_at(const rows<T> &m, unsigned i)
{
    const int64_t row = m.order ? m.order[i] : (int64_t)i;
    return row >= 0 && row < (int64_t)m.height ? m.at + row * m.ld : NULL;
}

/* Entries j .. of row i; 0 outside, NaN where order is no permutation. */
template <typename T> static __device__ inline pack16<T> pack_of(const rows<T> &m, unsigned i, unsigned j)
{
    const unsigned whole = 16 / sizeof(T);
    pack16<T> p = {};
    if (i >= m.count || j >= m.width) return p;
    const T *row = row_at(m, i);
    if (row && m.packed) return *(const pack16<T> *)(row + j);
#pragma unroll
    for (unsigned e = 0; e < whole; e++)
        if (j + e < m.width) p.v[e] = row ? row[j + e] : (T)NAN;
    return p;
}

/* A thread's share of a slab. */
template <typename T> struct slab {
    pack16<T> v[sizeof(T)]; /* RATE_SLAB * RATE_TILE / RATE_THREADS entries */
};

/* Where the i-th pack of a thread's share lies in the matrix: `across` if the sum goes along its rows, which become the
 * slab's columns, else along its columns. */
template <typename T, bool across> static __device__ inline void place(unsigned i, unsigned *along, unsigned *side)
{
    const unsigned whole = 16 / sizeof(T), thread = thread_in_block();
    if (across) { /* a warp takes 32 bytes of each of 16 rows */
        *side = thread / 2 % RATE_TILE;
        *along = (2 * i + thread % 2) * whole;
    } else {
        const unsigned e = thread + i * RATE_THREADS;
        *along = e / (RATE_TILE / whole), *side = e % (RATE_TILE / whole) * whole;
    }
}

/* Fetch what is at `from`, but not beyond `to`, of the sum and at `at` of the other side. */
template <typename T, bool across>
static __device__ inline void fetch(const rows<T> &m, unsigned from, unsigned to, unsigned at, slab<T> &s)
{
#pragma unroll
    for (unsigned i = 0; i < sizeof(T); i++) {
        unsigned along, side;
        place<T, across>(i, &along, &side);
        if (from + along >= to) s.v[i] = pack16<T>{};
        else s.v[i] = across ? pack_of(m, at + side, from + along) : pack_of(m, from + along, at + side);
    }
}

/* Put it into shared memory [RATE_SLAB][RATE_PAD], each row of the sum times its weight, if there are weights. */
template <typename T, typename C, bool across>
static __device__ inline void put(const rows<T> &m, unsigned from, const slab<T> &s, C *shared)
{
    const unsigned whole = 16 / sizeof(T);
#pragma unroll
    for (unsigned i = 0; i < sizeof(T); i++) {
        unsigned along, side;
        place<T, across>(i, &along, &side);
        C weight = 1;
        if (!across && m.weight)
            weight = from + along < m.count ? (C)m.weight[(int64_t)(from + along) * m.weight_ld] : (C)0;
#pragma unroll
        for (unsigned e = 0; e < whole; e++) {
            if (across) shared[(along + e) * RATE_PAD + side] = (C)s.v[i].v[e];
            else shared[along * RATE_PAD + side + e] = m.weight ? weight * (C)s.v[i].v[e] : (C)s.v[i].v[e];
        }
    }
}

/* sum += a' b over `depth` rows of a and b in shared memory; with `turned`, a b for a square tile a */
template <typename C, bool turned>
static __device__ inline void multiply(int depth, const C *a, const C *b, C (&sum)[MY_ROWS][MY_COLS])
{
    const int whole = 16 / sizeof(C), row = my_row(), col = my_col();
#pragma unroll 2
    for (int k = 0; k < depth; k++) {
        pack16<C> left[MY_ROWS / whole], right[MY_COLS / whole];
#pragma unroll
        for (int r = 0; r < MY_ROWS; r++)
            if (turned) left[r / whole].v[r % whole] = a[(row + r) * RATE_PAD + k];
#pragma unroll
        for (int r = 0; r < MY_ROWS; r += whole)
            if (!turned) left[r / whole] = *(const pack16<C> *)(a + k * RATE_PAD + row + r);
#pragma unroll
        for (int c = 0; c < MY_COLS; c += whole) right[c / whole] = *(const pack16<C> *)(b + k * RATE_PAD + col + c);
#pragma unroll
        for (int r = 0; r < MY_ROWS; r++)
#pragma unroll
            for (int c = 0; c < MY_COLS; c++) sum[r][c] += left[r / whole].v[r % whole] * right[c / whole].v[c % whole];
    }
}

enum { RUN = 8 }; /* slabs whose sum is kept apart in float32: roundings grow with the root of the terms of a sum */

/* sum = the tile at (a_at, b_at) of A' B, rows `from` .. `to` of both; `across`: of A B, columns `from` .. `to` of A.
 * With `same`, B is A, and so is the tile's place: it is fetched once. All threads of the block take part; `shared`,
 * two slabs, is free again at the next barrier. */
template <typename A, typename B, typename C, bool across_a, bool across_b>
static __device__ inline void product(const rows<A> &a, unsigned a_at, const rows<B> &b, unsigned b_at, bool same,
                                      unsigned from, unsigned to, C *shared, C (&sum)[MY_ROWS][MY_COLS])
{
    C *const left = shared, *const right = same ? shared : shared + RATE_SLAB * RATE_PAD;
    C run[MY_ROWS][MY_COLS] = {};
    slab<A> next_a;
    slab<B> next_b;
    int runs = 0;
#pragma unroll
    for (int r = 0; r < MY_ROWS; r++)
#pragma unroll
        for (int c = 0; c < MY_COLS; c++) sum[r][c] = 0;
    fetch<A, across_a>(a, from, to, a_at, next_a);
    if (!same) fetch<B, across_b>(b, from, to, b_at, next_b);
    for (unsigned k = from; k < to; k += RATE_SLAB) {
        __syncthreads();
        put<A, C, across_a>(a, k, next_a, left);
        if (!same) put<B, C, across_b>(b, k, next_b, right);
        __syncthreads();
        if (k + RATE_SLAB < to) {
            fetch<A, across_a>(a, k + RATE_SLAB, to, a_at, next_a);
            if (!same) fetch<B, across_b>(b, k + RATE_SLAB, to, b_at, next_b);
        }
        if (sizeof(C) == 8) {
            multiply<C, false>(RATE_SLAB, left, right, sum);
            continue;
        }
        multiply<C, false>(RATE_SLAB, left, right, run);
        if (++runs % RUN == 0 || k + RATE_SLAB >= to)
#pragma unroll
            for (int r = 0; r < MY_ROWS; r++)
#pragma unroll
                for (int c = 0; c < MY_COLS; c++) sum[r][c] += run[r][c], run[r][c] = 0;
    }
}

#endif
