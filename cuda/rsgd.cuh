/* rsgd.cuh - the sweeps over one class by one block: columns of W, dir and M into shared memory, a
 * tile at a time, then Gram matrices or linear combinations of the rows in it.
 *
 * Arithmetic is in A: the weight's own type for the fast step, double for the careful one. Plain FMA,
 * never a tensor core: frames stay orthonormal to 1e-7. Every function is called by the whole block.
 */
#ifndef SUBSPACE_RSGD_CUH
#define SUBSPACE_RSGD_CUH
#include "retraction.cuh"

enum { MATRICES = 11, KXK_SCRATCH = 4, COEFFICIENTS = 6 }; /* [kp, kp] doubles each */

/* M' = mm M + mg grad + mw W,   dir = dm M' + dg grad + dw W */
typedef struct rsgd_step {
    double mm, mg, mw, dm, dg, dw;
    subspace_retraction kind;
    bool parallel;
    int blocks; /* of rows: W, dir and, where it differs and is needed, M' */
} rsgd_step;

template <typename T> struct rsgd_class { /* what the block works with */
    rsgd_step step;
    T *w, *buffer;
    const T *grad; /* [k, n] */
    int k, kp;     /* kp is k rounded up to a multiple of 4 */
    int64_t n;
    double lr;
    char *tile; /* shared */
    size_t tile_bytes;
    kxk q;
    double *mat[MATRICES];
    void *coef; /* [outputs, blocks, k, kp]: transposed, so that four rows of a column lie side by side */
};

/* Columns in a tile of `rows` rows of A; a row takes one more, against bank conflicts. */
template <typename A> static __device__ inline int tile_width(size_t bytes, int rows)
{
    const int fit = (int)(bytes / sizeof(A)) / rows - 1;
    return fit >= 256 ? 256 : fit >= 32 ? fit & ~31 : fit;
}

/* Columns j0 .. j0+m of W, dir and, with three blocks, M' as [blocks kp, width + 1]; zeros in the
 * padding rows. With `write` M' also goes back to the buffer. Between two barriers. */
template <typename T, typename A>
static __device__ void load(const rsgd_class<T> *s, int64_t j0, int m, int width, bool write)
{
    const rsgd_step *st = &s->step;
    const int ld = width + 1, kp = s->kp;
    A *tile = (A *)s->tile;
    __syncthreads();
    EACH(e, kp * m)
    {
        const int i = e / m, j = e % m;
        A w = 0, momentum = 0, dir = 0;
        if (i < s->k) {
            const int64_t at = i * s->n + j0 + j;
            const A g = (A)s->grad[at];
            w = (A)s->w[at];
            momentum = (A)st->mg * g;
            if (s->buffer) momentum += (A)st->mm * (A)s->buffer[at];
            if (st->mw != 0) momentum += (A)st->mw * w;
            dir = momentum;
            if (st->dg != 0) dir = (A)st->dm * momentum + (A)st->dg * g + (A)st->dw * w; /* Nesterov */
            if (write) s->buffer[at] = (T)momentum;
        }
        tile[i * ld + j] = w, tile[(kp + i) * ld + j] = dir;
        if (st->blocks == 3) tile[(2 * kp + i) * ld + j] = momentum;
    }
    __syncthreads();
}

/* The Gram matrix of [W; dir; M'] by 4 x 4 blocks, as q = W W', dw = dir W', dd = dir dir', mw and md.
 * A thread owns a block, or a slice of its columns when there are more threads than blocks, and with
 * more blocks than threads there are several sweeps. A tile is summed in A, tiles in double. */
template <typename T, typename A>
static __device__ void gram_of(const rsgd_class<T> *s, double *q, double *dw, double *dd, double *mw, double *md)
{
    const int kp = s->kp, k = s->k, groups = s->step.blocks * kp / 4, pairs = groups * (groups + 1) / 2;
    const int threads = (int)blockDim.x, slices = MAX(threads / pairs, 1), per_sweep = threads / slices;
    const int width = tile_width<A>(s->tile_bytes, 4 * groups), ld = width + 1;
    for (int first = 0; first < pairs; first += per_sweep) {
        const int pair = first + (int)threadIdx.x / slices, slice = (int)threadIdx.x % slices;
        const bool busy = (int)threadIdx.x < per_sweep * slices && pair < pairs;
        int bi = 0;
        while ((bi + 1) * (bi + 2) / 2 <= pair) bi++;
        const int bj = pair - bi * (bi + 1) / 2;
        double total[16] = {0};
        for (int64_t j0 = 0; j0 < s->n; j0 += width) {
            const int m = (int)MIN(width, s->n - j0);
            load<T, A>(s, j0, m, width, false);
            if (!busy) continue;
            const A *x = (const A *)s->tile + 4 * bi * ld, *y = (const A *)s->tile + 4 * bj * ld;
            A sum[16] = {0};
            for (int j = slice; j < m; j += slices) {
                const A a[4] = {x[j], x[ld + j], x[2 * ld + j], x[3 * ld + j]};
                const A b[4] = {y[j], y[ld + j], y[2 * ld + j], y[3 * ld + j]};
#pragma unroll
                for (int e = 0; e < 16; e++) sum[e] += a[e / 4] * b[e % 4];
            }
#pragma unroll
            for (int e = 0; e < 16; e++) total[e] += (double)sum[e];
        }
        __syncthreads();
        double *sums = (double *)s->tile; /* [threads, 16]: the slices' shares */
#pragma unroll
        for (int e = 0; e < 16; e++) sums[threadIdx.x * 16 + e] = total[e];
        __syncthreads();
        EACH(u, MIN(per_sweep, pairs - first) * 16)
        {
            int gi = 0;
            while ((gi + 1) * (gi + 2) / 2 <= first + u / 16) gi++;
            const int gj = first + u / 16 - gi * (gi + 1) / 2;
            const int row = 4 * gi + u % 16 / 4, col = 4 * gj + u % 4, i = row % kp, j = col % kp;
            double *const blocks[3][3] = {{q, NULL, NULL}, {dw, dd, NULL}, {mw, md, NULL}};
            double *const out = blocks[row / kp][col / kp];
            double sum = 0;
            for (int l = 0; l < slices; l++) sum += sums[(u / 16 * slices + l) * 16 + u % 16];
            if (!out || i >= k || j >= k) continue;
            out[i * k + j] = sum;
            if (row / kp == col / kp && gi != gj) out[j * k + i] = sum;
        }
        __syncthreads();
    }
}

/* coef(output, block) = a, of one of W' and M' on one of W, dir and M' */
template <typename T, typename A>
static __device__ void put(const rsgd_class<T> *s, const double *a, int output, int block)
{
    const int k = s->k, kp = s->kp;
    A *coef = (A *)s->coef + (output * s->step.blocks + block) * k * kp;
    EACH(e, k * kp) coef[e] = e % kp < k ? (A)a[e % kp * k + e / kp] : (A)0;
    __syncthreads();
}

/* All of coef to zero. */
template <typename T, typename A> static __device__ void clear(const rsgd_class<T> *s)
{
    EACH(e, 2 * s->step.blocks * s->k * s->kp)((A *)s->coef)[e] = 0;
    __syncthreads();
}

/* [W; M] <- coef [W; dir; M'], with one output only W: the second sweep. With `write` M <- M'. */
template <typename T, typename A> static __device__ void combine(const rsgd_class<T> *s, int outputs, bool write)
{
    const int k = s->k, kp = s->kp, blocks = s->step.blocks, quads = kp / 4;
    const int width = tile_width<A>(s->tile_bytes, blocks * kp), ld = width + 1;
    for (int64_t j0 = 0; j0 < s->n; j0 += width) {
        const int m = (int)MIN(width, s->n - j0);
        load<T, A>(s, j0, m, width, write);
        EACH(u, outputs * quads * m)
        {
            const int j = u % m, output = u / m / quads, i0 = u / m % quads * 4;
            const A *coef = (const A *)s->coef + output * blocks * k * kp + i0;
            A sum[4] = {0};
            for (int b = 0; b < blocks; b++)
                for (int l = 0; l < k; l++, coef += kp) {
                    const A x = ((const A *)s->tile)[(b * kp + l) * ld + j];
#pragma unroll
                    for (int r = 0; r < 4; r++) sum[r] += coef[r] * x;
                }
            T *out = (output ? s->buffer : s->w) + i0 * s->n + j0 + j;
            for (int r = 0; r < 4 && i0 + r < k; r++) out[r * s->n] = (T)sum[r];
        }
    }
    __syncthreads();
}

#endif
