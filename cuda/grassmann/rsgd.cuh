/* rsgd.cuh - the passes over one class by a block, or by the blocks of a cluster, each over a slice of its columns:
 * columns of the rows [W; dir] (and M') into shared memory, a tile at a time, then their Gram matrix or linear
 * combinations of them. A slice that is one tile stays there between the passes.
 *
 * Arithmetic is in A: the weight's own type for the fast step, double for the careful one. Plain FMA, never a tensor
 * core: frames stay orthonormal to 1e-7. Every function is called by the whole block, unless it takes a team.
 *
 * Shared memory is the busiest part of a multiprocessor. In units of 128 bytes, a clock each, k = 8, n = 2048, float32:
 * 1024 to write the tile, 5120 for the Gram matrix (4 x 4 blocks read 8 numbers for 16 FMAs), 512 to write M', 1536 to
 * combine (8 rows at once): 8.2 thousand clocks a class, 36 us for 1000 of them on 132 multiprocessors at 1.75 GHz,
 * half the time their 328 MB take.
 *
 * Included by rsgd_careful.cuh.
 */
#ifndef SUBSPACE_RSGD_CUH
#define SUBSPACE_RSGD_CUH
#include "rsgd_shape.h"
#include "stiefel.cuh"

enum { OCTET = 8, IN_FLIGHT = 2 }; /* lanes to a 4 x 4 block of the Gram matrix; vectors of each array a thread loads */

/* M' = mm M + mg grad + mw W,   dir = dm M' + dg grad + dw W */
template <typename A> struct rsgd_weights {
    A mm, mg, mw, dm, dg, dw;
};

typedef struct rsgd_step {
    rsgd_weights<double> exact;
    rsgd_weights<float> single; /* the same, for FMAs that take them from here */
    subspace_retraction kind;
    bool parallel, stiefel, tangent; /* tangent: M is kept so */
    rsgd_rule rule;
} rsgd_step;

static __device__ inline const rsgd_weights<double> *weights_of(const rsgd_step *step, double)
{
    return &step->exact;
}

static __device__ inline const rsgd_weights<float> *weights_of(const rsgd_step *step, float)
{
    return &step->single;
}

template <typename T> struct rsgd_class { /* what a block works with */
    const rsgd_step *step;
    T *w, *buffer;
    const T *grad; /* [k, n] */
    int k, kp;     /* kp is k rounded up to the rows a thread combines */
    int64_t n;
    int64_t begin, end; /* the columns of this block */
    int width;          /* of a tile; its rows are as long */
    bool aligned;       /* every row of all three begins where a vector may */
    unsigned cluster, rank;
    double lr;
    char *tile; /* shared */
    size_t tile_bytes;
    kxk q;
    double *gram; /* [pairs, 16]: of W, dir and M' by 4 x 4 blocks of the lower triangle */
    void *coef;   /* [outputs, blocks k, kp]: transposed, so that the rows of a column lie side by side; before that
                     the [parts, pairs, 16] that gram is the sum of */
    double *mats; /* [10 or 13, k, k], see rsgd_matrix */
};

/* The k x k matrices of a class, by their names in the maths; the last three where M is transported. */
enum rsgd_matrix { AT_R, AT_P, AT_S, AT_X, AT_F, AT_G, AT_E, AT_PM, AT_SCRATCH, AT_SPARE, AT_H, AT_MW, AT_Y };

template <typename T> static __device__ inline double *matrix(const rsgd_class<T> *s, rsgd_matrix which)
{
    return s->mats + which * s->k * s->k;
}

/* V numbers that lie together and, in shared memory always, where a vector may. */
template <typename T, int V> struct alignas(sizeof(T) * V) vec {
    T v[V];
};
template <typename A> static __device__ inline constexpr int lanes_of()
{
    return 16 / sizeof(A);
}

template <typename T, typename A, int V, bool ALIGNED> static __device__ inline void fetch(const T *at, int count, A *x)
{
    if (ALIGNED) {
        const vec<T, V> in = *(const vec<T, V> *)at;
#pragma unroll
        for (int v = 0; v < V; v++) x[v] = (A)in.v[v];
    } else {
#pragma unroll
        for (int v = 0; v < V; v++) x[v] = v < count ? (A)at[v] : (A)0;
    }
}

template <typename T, typename A, int V> static __device__ inline void store(T *at, const A *x, int count, bool aligned)
{
    if (aligned) {
        vec<T, V> out;
#pragma unroll
        for (int v = 0; v < V; v++) out.v[v] = (T)x[v];
        *(vec<T, V> *)at = out;
    } else {
#pragma unroll
        for (int v = 0; v < V; v++)
            if (v < count) at[v] = (T)x[v];
    }
}

template <typename T, typename A, bool ALIGNED>
static __device__ inline void load_as(const rsgd_class<T> *s, int64_t j0, int m, int ld)
{
    const rsgd_step *st = s->step;
    constexpr int V = lanes_of<A>(), U = ALIGNED && sizeof(T) == sizeof(A) ? IN_FLIGHT : 1;
    const int k = s->k, vecs = CEIL_DIV(m, V), threads = (int)blockDim.x;
    const unsigned inverse = inverse_of(MAX(vecs, 1));
    const rsgd_weights<A> *const by = weights_of(s->step, (A)0);
    A *tile = (A *)s->tile;
    for (int u0 = (int)threadIdx.x; u0 < k * vecs; u0 += U * threads) {
        A w[U][V], g[U][V], b[U][V];
#pragma unroll
        for (int x = 0; x < U; x++) {
            const int u = MIN(u0 + x * threads, k * vecs - 1), i = quotient(u, inverse), j = (u - i * vecs) * V;
            const int64_t at = i * s->n + j0 + j;
            fetch<T, A, V, ALIGNED>(s->w + at, m - j, w[x]);
            fetch<T, A, V, ALIGNED>(s->grad + at, m - j, g[x]);
            if (s->buffer) {
                fetch<T, A, V, ALIGNED>(s->buffer + at, m - j, b[x]);
            } else {
#pragma unroll
                for (int v = 0; v < V; v++) b[x][v] = 0;
            }
        }
#pragma unroll
        for (int x = 0; x < U; x++) {
            const int u = u0 + x * threads, i = quotient(u, inverse), j = (u - i * vecs) * V;
            if (u >= k * vecs) continue;
            A momentum[V], dir[V];
#pragma unroll
            for (int v = 0; v < V; v++) {
                momentum[v] = by->mg * g[x][v] + by->mm * b[x][v];
                if (by->mw != 0) momentum[v] += by->mw * w[x][v];
                dir[v] = momentum[v];
                if (by->dg != 0) dir[v] = by->dm * momentum[v] + by->dg * g[x][v] + by->dw * w[x][v]; /* Nesterov */
            }
            store<A, A, V>(tile + i * ld + j, w[x], V, true);
            store<A, A, V>(tile + (k + i) * ld + j, dir, V, true);
            if (st->rule.held == 3) store<A, A, V>(tile + (2 * k + i) * ld + j, momentum, V, true);
        }
    }
    const int rows = st->rule.held * k, padding = (4 * CEIL_DIV(rows, 4) - rows) * ld;
    EACH(e, padding) tile[rows * ld + e] = 0;
}

/* Columns j0 .. j0+m of W, dir and, where it is held too, M' as [held k, ld]; zero rows after them up to a multiple of
 * four, zeros up to a whole vector. Between two barriers. */
template <typename T, typename A> static __device__ void load(const rsgd_class<T> *s, int64_t j0, int m, int ld)
{
    __syncthreads();
    if (s->aligned) load_as<T, A, true>(s, j0, m, ld);
    else load_as<T, A, false>(s, j0, m, ld);
    __syncthreads();
}

/* Columns in a tile of `rows` rows of A with `more` in each. */
template <typename A> static __device__ inline int tile_width(size_t bytes, int rows, int more)
{
    const int fit = (int)(bytes / sizeof(A)) / rows - more;
    return fit >= 32 ? fit & ~31 : fit & ~3;
}

/* Block `pair` of the lower triangle. */
static __device__ inline void place_of(int pair, int *bi, int *bj)
{
    int i = (int)((sqrtf(8.f * (float)pair + 1) - 1) / 2);
    while ((i + 1) * (i + 2) / 2 <= pair) i++;
    while (i * (i + 1) / 2 > pair) i--;
    *bi = i, *bj = pair - i * (i + 1) / 2;
}

/* The 16 sums of 8 neighbouring lanes added up: each lane gets two, 2 (lane % 8) and the next, for 20 shuffles. */
template <typename A> static __device__ inline void octet_sum(const A *sum, double *two)
{
    const int lane = (int)threadIdx.x % OCTET;
    double eight[8], four[4];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const A keep = lane & 4 ? sum[8 + e] : sum[e], give = lane & 4 ? sum[e] : sum[8 + e];
        eight[e] = (double)keep + (double)__shfl_xor_sync(ALL_LANES, give, 4);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const double keep = lane & 2 ? eight[4 + e] : eight[e], give = lane & 2 ? eight[e] : eight[4 + e];
        four[e] = keep + __shfl_xor_sync(ALL_LANES, give, 2);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const double keep = lane & 1 ? four[2 + e] : four[e], give = lane & 1 ? four[e] : four[2 + e];
        two[e] = keep + __shfl_xor_sync(ALL_LANES, give, 1);
    }
}

/* The m columns in the tile into the Gram matrix. 8 lanes own a 4 x 4 block and every `parts`-th 8 vectors of columns:
 * theirs are 8 neighbouring vectors, all banks once. A lane sums its columns in A, lanes and tiles are in double. */
template <typename T> static __device__ inline void gram_of_tile(const rsgd_class<T> *s, int m, int ld, bool first)
{
    constexpr int V = lanes_of<T>();
    const int pairs = rsgd_pairs(s->step->rule.blocks * s->k), octets = (int)blockDim.x / OCTET;
    const int parts = rsgd_parts(pairs, octets), vecs = CEIL_DIV(m, V), lane = (int)threadIdx.x % OCTET;
    for (int item0 = 0; item0 < parts * pairs; item0 += octets) {
        const int item = item0 + (int)threadIdx.x / OCTET, part = item / pairs;
        const bool busy = item < parts * pairs;
        int bi, bj;
        T sum[16] = {0};
        double two[2];
        place_of(item - part * pairs, &bi, &bj);
        const T *x = (const T *)s->tile + 4 * bi * ld, *y = (const T *)s->tile + 4 * bj * ld;
        for (int p = part * OCTET + lane; busy && p < vecs; p += parts * OCTET) {
            T a[4][V], b[4][V];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                fetch<T, T, V, true>(x + r * ld + p * V, V, a[r]);
                fetch<T, T, V, true>(y + r * ld + p * V, V, b[r]);
            }
#pragma unroll
            for (int v = 0; v < V; v++)
#pragma unroll
                for (int e = 0; e < 16; e++) sum[e] += a[e / 4][v] * b[e % 4][v];
        }
        octet_sum(sum, two);
        double *const at = (parts > 1 ? (double *)s->coef : s->gram) + (int64_t)item * 16 + lane * 2;
        if (busy && first) at[0] = two[0], at[1] = two[1];
        else if (busy) at[0] += two[0], at[1] += two[1];
    }
}

/* Entry (row, column) of the Gram matrix: the blocks of the cluster in order, so that all of them get the same bits. */
template <typename T> static __device__ inline double gram_at(const rsgd_class<T> *s, int row, int column)
{
    const int r = MAX(row, column), c = MIN(row, column); /* in a block of the diagonal both are there, and equal */
    double *const mine = s->gram + (r / 4 * (r / 4 + 1) / 2 + c / 4) * 16 + r % 4 * 4 + c % 4;
    if (s->cluster == 1) return *mine;
    double sum = 0;
#pragma unroll 2
    for (unsigned rank = 0; rank < s->cluster; rank++) sum += *cluster_at(mine, rank);
    return sum;
}

/* The first pass: q = W W', dw = dir W', dd = dir dir' and, with three blocks, mw = M' W' and md = M' dir'. False if q
 * is far from I or not finite. */
template <typename T>
static __device__ bool gram_of(const rsgd_class<T> *s, double *q, double *dw, double *dd, double *mw, double *md)
{
    const int k = s->k, size = rsgd_pairs(s->step->rule.blocks * k) * 16;
    for (int64_t j0 = s->begin; j0 == s->begin || j0 < s->end; j0 += s->width) {
        const int m = (int)MIN(s->width, s->end - j0);
        load<T, T>(s, j0, m, s->width);
        gram_of_tile(s, m, s->width, j0 == s->begin);
    }
    __syncthreads();
    const int parts = rsgd_parts(size / 16, (int)blockDim.x / OCTET);
    if (parts > 1) {
        EACH(e, size)
        {
            double sum = 0;
#pragma unroll 3
            for (int part = 0; part < parts; part++) sum += ((const double *)s->coef)[part * size + e];
            s->gram[e] = sum;
        }
        __syncthreads();
    }
    if (s->cluster > 1) cluster_sync();
    bool far = false;
    EACH(e, k * k)
    {
        const int i = quotient(e, s->q.inverse), j = e - i * k;
        q[e] = gram_at(s, i, j), dw[e] = gram_at(s, k + i, j), dd[e] = gram_at(s, k + i, k + j);
        if (s->step->rule.blocks == 3) mw[e] = gram_at(s, 2 * k + i, j), md[e] = gram_at(s, 2 * k + i, k + j);
        far |= !(fabs(q[e] - (i == j)) < 1e-2);
    }
    if (s->cluster > 1) cluster_sync(); /* nobody goes, or comes to the next class, while his sums are read */
    return !__syncthreads_or(far);
}

/* coef(output, block) = scale a, of one of W' and M' on one of W, dir and M'; NULL is zero. By the team of q. */
template <typename T, typename A>
static __device__ void put(const rsgd_class<T> *s, const double *a, int output, int block, double scale = 1)
{
    const int k = s->k, kp = s->kp;
    const unsigned inverse = inverse_of(kp);
    A *coef = (A *)s->coef + (output * s->step->rule.blocks + block) * k * kp;
    EACH_OF(&s->q, e, k * kp)
    {
        const int l = quotient(e, inverse), i = e - l * kp;
        coef[e] = a && i < k ? (A)(scale * a[i * k + l]) : (A)0;
    }
    meet(&s->q);
}

/* The m columns from j0 in the tile: W (and M) <- coef [W; dir; M']. A thread makes ROWS rows of a vector of columns.
 */
template <typename T, typename A, int ROWS>
static __device__ inline void combine_rows(const rsgd_class<T> *s, int64_t j0, int m, int ld, int outputs)
{
    constexpr int V = lanes_of<A>();
    const int k = s->k, kp = s->kp, rows = s->step->rule.blocks * k, groups = kp / ROWS, vecs = CEIL_DIV(m, V);
    const unsigned inverse = inverse_of(MAX(vecs, 1));
    EACH(u, outputs * groups * vecs)
    {
        const int group = quotient(u, inverse), j = (u - group * vecs) * V;
        const int output = groups == 1 ? group : group / groups, i0 = (group - output * groups) * ROWS;
        const A *coef = (const A *)s->coef + output * rows * kp + i0, *tile = (const A *)s->tile + j;
        A sum[ROWS][V] = {{0}};
#pragma unroll 2
        for (int l = 0; l < rows; l++, coef += kp, tile += ld) {
            A x[V], c[ROWS];
            fetch<A, A, V, true>(tile, V, x);
#pragma unroll
            for (int r = 0; r < ROWS; r += V) fetch<A, A, V, true>(coef + r, V, c + r);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int v = 0; v < V; v++) sum[r][v] += c[r] * x[v];
        }
        T *out = (output ? s->buffer : s->w) + i0 * s->n + j0 + j;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (i0 + r < k) store<T, A, V>(out + r * s->n, sum[r], m - j, s->aligned);
    }
}

/* M <- M' for the m columns from j0 in the tile, by `threads` threads of which this is one. */
template <typename T, typename A>
static __device__ inline void keep_momentum(const rsgd_class<T> *s, int64_t j0, int m, int ld, int thread, int threads)
{
    constexpr int V = lanes_of<A>();
    const int k = s->k, vecs = CEIL_DIV(m, V);
    const unsigned inverse = inverse_of(MAX(vecs, 1));
    const A *tile = (const A *)s->tile + (s->step->rule.held - 1) * k * ld;
    for (int u = thread; u < k * vecs; u += threads) {
        const int i = quotient(u, inverse), j = (u - i * vecs) * V;
        A x[V];
        fetch<A, A, V, true>(tile + i * ld + j, V, x);
        store<T, A, V>(s->buffer + i * s->n + j0 + j, x, m - j, s->aligned);
    }
}

/* The second pass, from the last tile, which is still there, to the first: [W; M] <- coef [W; dir; M'], with one
 * output only W. With `write` M <- M'. */
template <typename T, typename A>
static __device__ inline void combine(const rsgd_class<T> *s, int width, int ld, bool there, int outputs, bool write)
{
    int64_t j0 = s->begin;
    if (s->end - j0 > width) j0 += (s->end - j0 - 1) / width * width;
    for (; j0 >= s->begin; j0 -= width) {
        const int m = (int)MIN(width, s->end - j0);
        if (!there) load<T, A>(s, j0, m, ld);
        if (write) keep_momentum<T, A>(s, j0, m, ld, (int)threadIdx.x, (int)blockDim.x);
        if (sizeof(A) == 4 && s->kp % 8 == 0) combine_rows<T, A, 8>(s, j0, m, ld, outputs);
        else combine_rows<T, A, 4>(s, j0, m, ld, outputs);
        there = false;
    }
    __syncthreads();
}

#endif
