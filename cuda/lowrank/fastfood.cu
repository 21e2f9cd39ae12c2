/* fastfood.cu - a product with a random matrix that is not stored, and with its transpose, on the GPU.
 *
 *     t = H_D B pad(theta)            D, M and L: the least powers of two no less than d, m and both
 *     u_i = G_i t[pi(i) mod D]        i < L
 *     f_i = u_i + u_(i+M) + ...       i < M
 *     out = H_M f / sqrt(m sum G^2)
 *
 * as on the CPU, to the bit: the normal numbers are drawn with no product joined to a sum, the sum of their squares is
 * one of whole numbers, entries of u are added up in the order in which H_L does it. A thread draws four normal numbers
 * or a sign at a time, for all rows of a group. All is bound by memory, which is gone through some four times.
 */
#include "fastfood.h"
#include "hadamard.cuh"

enum {
    GROUP = 1 << 24, /* entries of the rows that are worked on together, if one row has no more */
    FOLDED = 3,      /* bits of a place that are summed over in one step */
};

typedef struct fastfood_plan {
    int64_t ins, outs;           /* entries of a row of what comes in and goes out: d and m, or m and d */
    int64_t in, out, length;     /* the powers of two: D, M (or M, D) and L */
    int64_t group, rows;         /* rows at a time, at most and now */
    void *t, *u;                 /* [group, L] each: rows of `in`, then of `out` entries; of L */
    unsigned long long *squares; /* [1] the sum of squares of G's multiples of 2^-18 */
} fastfood_plan;

static fastfood_plan plan_of(const subspace_fastfood_args *a, bool adjoint, char *base, size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    fastfood_plan s = {};
    s.ins = adjoint ? a->m : a->d, s.outs = adjoint ? a->d : a->m;
    s.in = (int64_t)1 << bits_of(s.ins), s.out = (int64_t)1 << bits_of(s.outs), s.length = MAX(s.in, s.out);
    s.group = MAX(1, MIN(a->v, GROUP / s.length));
    s.t = carve(base, bytes, s.group * s.length, item);
    s.u = carve(base, bytes, s.group * s.length, item);
    s.squares = (unsigned long long *)carve(base, bytes, 1, sizeof *s.squares);
    return s;
}

static __device__ inline bool minus_at(uint64_t seed, int64_t j)
{
    uint32_t word[4];
    fastfood_words(seed, (uint32_t)(j / 128), FASTFOOD_SIGNS, word);
    const uint32_t low = j & 32 ? word[1] : word[0], high = j & 32 ? word[3] : word[2];
    return (j & 64 ? high : low) >> (j % 32) & 1;
}

/* The rows that come in, zero beyond their end; forward with B's signs. A thread an entry. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    enter(fastfood_plan s, uint64_t seed, bool adjoint, const T *x, acc_t<T> *t)
{
    const int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i >= s.in) return;
    const bool minus = !adjoint && minus_at(seed, i);
    for (int64_t r = 0; r < s.rows; r++) {
        const acc_t<T> value = i < s.ins ? (acc_t<T>)x[r * s.ins + i] : acc_t<T>(0);
        t[r * s.in + i] = minus && i < s.ins ? -value : value;
    }
}

/* u_i = G_i t[pi(i) mod D], or G_i t[i mod M]: a thread four of them */
template <typename A>
__global__ void __launch_bounds__(ROW_THREADS) mix(fastfood_plan s, uint64_t seed, fastfood_order order, bool adjoint,
                                                   const A *t, A *u, unsigned long long *squares)
{
    __shared__ unsigned long long sums[ROW_THREADS];
    const int64_t block = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x, first = 4 * block;
    const int count = (int)MAX((int64_t)0, MIN((int64_t)4, s.length - first));
    unsigned long long sum = 0;
    if (count > 0) {
        uint32_t word[4];
        int32_t normal[4];
        fastfood_words(seed, (uint32_t)block, FASTFOOD_NORMALS, word);
        fastfood_normals(word[0], word[1], &normal[0], &normal[1]);
        fastfood_normals(word[2], word[3], &normal[2], &normal[3]);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (k >= count) break;
            const uint32_t i = (uint32_t)first + k,
                           place = (adjoint ? i : fastfood_pi(&order, i)) & ((uint32_t)s.in - 1);
            const A g = (A)normal[k] * (A)0x1p-18;
            sum += (unsigned long long)((int64_t)normal[k] * normal[k]);
            for (int64_t r = 0; r < s.rows; r++) u[r * s.length + i] = g * t[r * s.in + place];
        }
    }
    sums[threadIdx.x] = sum;
    for (unsigned half = ROW_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) atomicAdd(squares, sums[0]);
}

/* A step on the way from u to f, fold's of the CPU: a thread an entry */
template <typename A>
__global__ void __launch_bounds__(ROW_THREADS)
    fold(int64_t rows, int64_t from, int bits, bool permuted, fastfood_order order, const A *x, A *y)
{
    const int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x, to = from >> bits;
    if (i >= rows * to) return;
    x += i / to * from;
    A part[1 << FOLDED] = {};
#pragma unroll
    for (int k = 0; k < 1 << FOLDED; k++) {
        if (k >= 1 << bits) break;
        const int64_t j = k * to + i % to;
        part[k] = x[permuted ? (int64_t)fastfood_pi_inverse(&order, (uint32_t)j) : j];
    }
#pragma unroll
    for (int h = 1 << FOLDED >> 1; h > 0; h /= 2)
#pragma unroll
        for (int k = 0; k < h; k++)
            if (h < 1 << bits) part[k] += part[k + h];
    y[i] = part[0];
}

/* The rows that go out, scaled; of the adjoint with B's signs. A thread an entry. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) leave(fastfood_plan s, uint64_t seed, bool adjoint, int64_t m,
                                                     const acc_t<T> *x, const unsigned long long *squares, T *result)
{
    typedef acc_t<T> A;
    const int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i >= s.outs) return;
    const A scale = (A)(1 / sqrt((double)m * ((double)*squares * 0x1p-36)));
    const bool minus = adjoint && minus_at(seed, i);
    for (int64_t r = 0; r < s.rows; r++) {
        const A y = x[r * s.out + i] * scale;
        result[r * s.outs + i] = (T)(minus ? -y : y);
    }
}

static unsigned blocks_of(int64_t threads)
{
    return (unsigned)CEIL_DIV(threads, ROW_THREADS);
}

template <typename T>
static subspace_status transform(subspace_ctx *ctx, const subspace_fastfood_args *a, bool adjoint, fastfood_plan *s)
{
    typedef acc_t<T> A;
    const uint64_t seed = (uint64_t)a->seed;
    const fastfood_order order = fastfood_order_of(seed, bits_of(s->length));
    A *t = (A *)s->t, *u = (A *)s->u;
    for (int64_t v = 0; v < a->v; v += s->group) {
        const T *x = (const T *)(adjoint ? a->dout : a->theta) + v * s->ins;
        T *result = (T *)(adjoint ? a->dtheta : a->out) + v * s->outs;
        A *f = u;
        s->rows = MIN(s->group, a->v - v);
        LAUNCH(ctx, enter<T>, blocks_of(s->in), ROW_THREADS, 0, *s, seed, adjoint, x, t);
        TRY(transform_rows<A>(ctx, s->rows, s->in, 1, t, t, t));
        CUDA(ctx, cudaMemsetAsync(s->squares, 0, sizeof *s->squares, (cudaStream_t)ctx->stream));
        LAUNCH(ctx, mix<A>, blocks_of(CEIL_DIV(s->length, 4)), ROW_THREADS, 0, *s, seed, order, adjoint, (const A *)t,
               u, s->squares);
        int left = bits_of(s->length) - bits_of(s->out);
        for (bool permuted = adjoint; permuted || left > 0; permuted = false) {
            const int now = MIN(left, (int)FOLDED);
            const int64_t from = s->out << left;
            A *next = f == u ? t : u;
            LAUNCH(ctx, fold<A>, blocks_of(s->rows * (from >> now)), ROW_THREADS, 0, s->rows, from, now, permuted,
                   order, (const A *)f, next);
            f = next, left -= now;
        }
        TRY(transform_rows<A>(ctx, s->rows, s->out, 1, f, f, f));
        LAUNCH(ctx, leave<T>, blocks_of(s->outs), ROW_THREADS, 0, *s, seed, adjoint, a->m, (const A *)f,
               (const unsigned long long *)s->squares, result);
    }
    return SUBSPACE_OK;
}

extern "C" size_t subspace_fastfood_workspace_cuda(const subspace_ctx *, const subspace_fastfood_args *a)
{
    size_t bytes = 0;
    plan_of(a, false, NULL, &bytes); /* the adjoint's is the same */
    return bytes;
}

static subspace_status product(subspace_ctx *ctx, const subspace_fastfood_args *a, bool adjoint)
{
    size_t bytes = 0;
    TRY(subspace_fastfood_check(ctx, a));
    fastfood_plan s = plan_of(a, adjoint, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "fastfood: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    DISPATCH(a->dtype, transform, ctx, a, adjoint, &s);
}

extern "C" subspace_status subspace_fastfood_cuda(subspace_ctx *ctx, const subspace_fastfood_args *a)
{
    return product(ctx, a, false);
}

extern "C" subspace_status subspace_fastfood_adjoint_cuda(subspace_ctx *ctx, const subspace_fastfood_args *a)
{
    return product(ctx, a, true);
}
