/* depthwise.c - gradient of the weight of a depthwise convolution, or of another with small groups, on the CPU.
 *
 *     dw[ky, kx] = sum_{oy, ox} dy[oy, ox] x[oy s + ky d - p, ox s + kx d - p]      (the third dimension likewise)
 *
 * for every channel of a group of x and every output of that group: one of each where it is depthwise.
 *
 * With k d = q s + phase, tap k reads entry o + q of what is left of x when only every s-th entry counts from
 * phase - p on: a correlation of stride one. Taps k and k + step, step = s / gcd(s, d), share their phase.
 *
 * A channel's volume is widened and its columns split by phase, with zeros around them, so that every tap reads whole
 * vectors. Then a row of x meets up to TAPS rows of dy (one per ky) at up to TAPS shifts (one per kx), all of their
 * sums in registers: TAPS^2 multiply-adds for 2 TAPS loads; a kernel of up to 3 x 3 leaves room for a second output.
 * The lanes of the sums are added at the very end.
 *
 * Memory: a group of x, one or two outputs of dy and a vector for each sum per thread.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "convert.h"

/* Taps each way of a microkernel, and its outputs where it has no more than 3 x 3. As many sums as the registers hold
 * beside what they are made of: 32 registers at avx512, else 16. */
#if defined(__AVX512F__)
#define TAPS 4
#define OUTPUTS 2
#else
#define TAPS 3
#define OUTPUTS 1
#endif

/* A vector in a register: GCC would rather load it again for each of its multiply-adds, and loads are what is short. */
#if defined(__x86_64__)
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define IN_REGISTER(v) (void)(v)
#endif

enum { TOTAL_BYTES = 128 << 10 }; /* a thread's sums stay in L2 */

typedef struct depthwise_run {
    const subspace_depthwise_args *a;
    struct {
        int64_t step, phases; /* taps `step` apart share a phase; how many phases the taps have */
    } axis[3];
    int64_t slots;
    int64_t width, length, pitch; /* of a row of dy, of one phase of a row of x, of all its phases */
    int64_t x_size, dy_size;      /* of a channel; dy's ends in a row of zeros */
    int64_t outputs, block;       /* of a microkernel; that have their sums in `total` */
    void *x, *dy, *total;         /* of a slot: [n][x_size], [outputs][dy_size], [block, n, taps], a vector each */
} depthwise_run;

#define THIS_FILE "tucker/depthwise.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

typedef T FN(vec) __attribute__((vector_size(VECTOR)));
typedef T FN(vecu) __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
enum { FN(LANES) = VECTOR / sizeof(T) };

/* `count` entries of a tensor from `at` on, `stride` apart, as T. */
static void FN(widen)(subspace_dtype dtype, const void *from, int64_t at, int64_t stride, int64_t count, T *restrict to)
{
#if IS_F32
    const uint16_t *half = (const uint16_t *)from + at;
    if (dtype == SUBSPACE_F16) {
        for (int64_t i = 0; i < count; i++) to[i] = f16_to_f32(half[i * stride]);
        return;
    }
    if (dtype == SUBSPACE_BF16) {
        for (int64_t i = 0; i < count; i++) to[i] = bf16_to_f32(half[i * stride]);
        return;
    }
#endif
    const T *x = (const T *)from + at;
    (void)dtype;
    if (stride == 1 && count >= FN(LANES)) { /* whole vectors, the last one over the one before */
        for (int64_t i = 0; i < count - FN(LANES); i += FN(LANES)) *(FN(vecu) *)(to + i) = *(const FN(vecu) *)(x + i);
        *(FN(vecu) *)(to + count - FN(LANES)) = *(const FN(vecu) *)(x + count - FN(LANES));
    } else if (stride == 1) memcpy(to, x, (size_t)count * sizeof(T));
    else
        for (int64_t i = 0; i < count; i++) to[i] = x[i * stride];
}

/* Channel `c` of image `b` of x; the zeros around the rows are there already. */
static void FN(take_x)(const depthwise_run *run, int64_t b, int64_t c, T *to)
{
    const subspace_depthwise_args *a = run->a;
    const int64_t rows = a->in[0] * a->in[1], s = a->stride[2], image = (b * a->c * a->n + c) * rows;
    for (int64_t k = 0; k < run->axis[2].phases; k++) {
        const int64_t first = k * a->dilation[2] % s - a->padding[2]; /* column of entry 0 */
        const int64_t j0 = first < 0 ? CEIL_DIV(-first, s) : 0;
        const int64_t j1 = MIN(CEIL_DIV(MAX(a->in[2] - first, 0), s), run->length);
        for (int64_t row = 0; row < rows && j0 < j1; row++)
            FN(widen)(a->dtype, a->x, (image + row) * a->in[2] + first + j0 * s, s, j1 - j0,
                      to + row * run->pitch + k * run->length + j0);
    }
}

static void FN(take_dy)(const depthwise_run *run, int64_t b, int64_t channel, T *to)
{
    const subspace_depthwise_args *a = run->a;
    const int64_t rows = a->out[0] * a->out[1], image = (b * a->c * a->m + channel) * rows;
    for (int64_t row = 0; row < rows; row++)
        FN(widen)(a->dtype, a->dy, (image + row) * a->out[2], 1, a->out[2], to + row * run->width);
}

/* Taps ky, ky + step, ... (`ty` of them) by kx, kx + 1, ... (`tx`) of a plane of x and one of dy, of `to` outputs.
 * `zero` is a row of dy for the taps that lie outside at a row of x. */
static inline __attribute__((always_inline)) void FN(microkernel)(const int to, const int ty, const int tx,
                                                                  const depthwise_run *run, const T *x, const T *dy,
                                                                  const T *zero, int64_t ky, int64_t kx, FN(vec) *total)
{
    const subspace_depthwise_args *a = run->a;
    const int64_t s = a->stride[1], d = a->dilation[1], out = a->out[1], step = run->axis[1].step;
    const int64_t sums = a->n * a->kernel[0] * a->kernel[1] * a->kernel[2]; /* of an output */
    const int64_t q0 = ky * d / s, dq = step * d / s, first = ky * d % s - a->padding[1];
    const int64_t j0 = MAX(q0, first < 0 ? CEIL_DIV(-first, s) : 0);
    const int64_t j1 = MIN(q0 + (ty - 1) * dq + out, CEIL_DIV(MAX(a->in[1] - first, 0), s));
    int64_t shift[TAPS];
    FN(vec) acc[OUTPUTS][TAPS][TAPS];
    for (int t = 0; t < tx; t++)
        shift[t] = (kx + t) % run->axis[2].step * run->length + (kx + t) * a->dilation[2] / a->stride[2];
#pragma GCC unroll 2
    for (int u = 0; u < to; u++)
#pragma GCC unroll 4
        for (int i = 0; i < ty; i++)
#pragma GCC unroll 4
            for (int t = 0; t < tx; t++) acc[u][i][t] = (FN(vec)){0};
    for (int64_t j = j0; j < j1; j++) {
        const T *row = x + (j * s + first) * run->pitch, *g[TAPS];
#pragma GCC unroll 4
        for (int i = 0; i < ty; i++) {
            const int64_t o = j - q0 - i * dq;
            g[i] = o >= 0 && o < out ? dy + o * run->width : zero;
        }
        for (int64_t v = 0; v < run->width; v += FN(LANES)) {
            FN(vec) gv[OUTPUTS][TAPS];
#pragma GCC unroll 2
            for (int u = 0; u < to; u++)
#pragma GCC unroll 4
                for (int i = 0; i < ty; i++) {
                    gv[u][i] = *(const FN(vec) *)(g[i] + u * run->dy_size + v);
                    IN_REGISTER(gv[u][i]);
                }
#pragma GCC unroll 4
            for (int t = 0; t < tx; t++) {
                const FN(vec) xv = *(const FN(vecu) *)(row + shift[t] + v);
#pragma GCC unroll 2
                for (int u = 0; u < to; u++)
#pragma GCC unroll 4
                    for (int i = 0; i < ty; i++) acc[u][i][t] += gv[u][i] * xv;
            }
        }
    }
#pragma GCC unroll 2
    for (int u = 0; u < to; u++)
#pragma GCC unroll 4
        for (int i = 0; i < ty; i++)
#pragma GCC unroll 4
            for (int t = 0; t < tx; t++) total[u * sums + (ky + i * step) * a->kernel[2] + kx + t] += acc[u][i][t];
}

/* `to` outputs by `ty` taps; two outputs have no more than 3 x 3. */
#define MICROKERNELS(to, ty)                                                                                           \
    static __attribute__((noinline)) void FN(microkernel_##to##ty)(int64_t tx, const depthwise_run *run, const T *x,   \
                                                                   const T *dy, const T *zero, int64_t ky, int64_t kx, \
                                                                   FN(vec) *total)                                     \
    {                                                                                                                  \
        if (tx == 4 && TAPS == 4 && to == 1) FN(microkernel)(to, ty, TAPS, run, x, dy, zero, ky, kx, total);           \
        else if (tx == 3) FN(microkernel)(to, ty, 3, run, x, dy, zero, ky, kx, total);                                 \
        else if (tx == 2) FN(microkernel)(to, ty, 2, run, x, dy, zero, ky, kx, total);                                 \
        else FN(microkernel)(to, ty, 1, run, x, dy, zero, ky, kx, total);                                              \
    }
MICROKERNELS(1, 1)
MICROKERNELS(1, 2)
MICROKERNELS(1, 3)
#if TAPS == 4
MICROKERNELS(1, 4)
MICROKERNELS(2, 1)
MICROKERNELS(2, 2)
MICROKERNELS(2, 3)
#endif
#undef MICROKERNELS

static void (*const FN(microkernels)[OUTPUTS][TAPS])(int64_t, const depthwise_run *, const T *, const T *, const T *,
                                                     int64_t, int64_t, FN(vec) *) = {
#if TAPS == 4
    {FN(microkernel_11), FN(microkernel_12), FN(microkernel_13), FN(microkernel_14)},
    {FN(microkernel_21), FN(microkernel_22), FN(microkernel_23)},
#else
    {FN(microkernel_11), FN(microkernel_12), FN(microkernel_13)},
#endif
};

/* Every tap of a plane of x and `outputs` of dy, in microkernels as even as can be: 7 = 4 + 3 = 3 + 2 + 2. */
static void FN(plane)(int64_t outputs, const depthwise_run *run, const T *x, const T *dy, const T *zero, FN(vec) *total)
{
    const int64_t *kernel = run->a->kernel, step = run->axis[1].step;
    for (int64_t phase = 0; phase < run->axis[1].phases; phase++) {
        const int64_t count = CEIL_DIV(kernel[1] - phase, step), down = CEIL_DIV(count, TAPS);
        const int64_t across = CEIL_DIV(kernel[2], TAPS);
        for (int64_t i = 0; i < down; i++)
            for (int64_t t = 0; t < across; t++) {
                int64_t i0, i1, kx, kx1;
                share(count, i, down, &i0, &i1);
                share(kernel[2], t, across, &kx, &kx1);
                FN(microkernels)
                [outputs - 1][i1 - i0 - 1](kx1 - kx, run, x, dy, zero, phase + i0 * step, kx, total);
            }
    }
}

/* The sums of the outputs first..last of group c. */
static void FN(group)(const depthwise_run *run, int64_t c, int64_t first, int64_t last, T *x, T *dy, FN(vec) *total)
{
    const subspace_depthwise_args *a = run->a;
    const int64_t plane = a->kernel[1] * a->kernel[2], taps = a->kernel[0] * plane;
    for (int64_t b = 0; b < a->b; b++) {
        for (int64_t p = 0; p < a->n; p++) FN(take_x)(run, b, c * a->n + p, x + p * run->x_size);
        for (int64_t output = first, outputs; output < last; output += outputs) {
            outputs = MIN(run->outputs, last - output);
            for (int64_t u = 0; u < outputs; u++) FN(take_dy)(run, b, output + u, dy + u * run->dy_size);
            for (int64_t p = 0; p < a->n; p++)
                for (int64_t kz = 0; kz < a->kernel[0]; kz++)
                    for (int64_t oz = 0; oz < a->out[0]; oz++) {
                        const int64_t iz = oz * a->stride[0] + kz * a->dilation[0] - a->padding[0];
                        if (iz < 0 || iz >= a->in[0]) continue;
                        FN(plane)(outputs, run, x + p * run->x_size + iz * a->in[1] * run->pitch,
                                  dy + oz * a->out[1] * run->width, dy + run->dy_size - run->width,
                                  total + ((output - first) * a->n + p) * taps + kz * plane);
                    }
        }
    }
}

static void FN(channels)(int64_t begin, int64_t end, void *arg)
{
    const depthwise_run *run = arg;
    const subspace_depthwise_args *a = run->a;
    const int64_t sums = a->n * a->kernel[0] * a->kernel[1] * a->kernel[2]; /* of an output */
    for (int64_t slot = begin; slot < end; slot++) {
        T *x = (T *)run->x + slot * a->n * run->x_size, *dy = (T *)run->dy + slot * run->outputs * run->dy_size;
        FN(vec) *total = (FN(vec) *)run->total + slot * run->block * sums;
        int64_t first, last;
        share(a->c * a->m, slot, run->slots, &first, &last);
        memset(x, 0, (size_t)(a->n * run->x_size) * sizeof(T));
        memset(dy, 0, (size_t)(run->outputs * run->dy_size) * sizeof(T));
        for (int64_t end_of; first < last; first = end_of) { /* outputs of one group, as many as there are sums for */
            const int64_t c = first / a->m;
            end_of = MIN(MIN(last, (c + 1) * a->m), first + run->block);
            memset(total, 0, (size_t)((end_of - first) * sums) * sizeof *total);
            FN(group)(run, c, first, end_of, x, dy, total);
            for (int64_t i = 0; i < (end_of - first) * sums; i++) {
                double sum = 0;
                for (int l = 0; l < FN(LANES); l++) sum += (double)total[i][l];
                ((T *)a->dweight)[first * sums + i] = (T)sum;
            }
        }
    }
}

static void FN(plan)(depthwise_run *run, const subspace_ctx *ctx, const subspace_depthwise_args *a, char *base,
                     size_t *bytes)
{
    const int64_t sums = a->n * a->kernel[0] * a->kernel[1] * a->kernel[2];
    *run = (depthwise_run){.a = a, .slots = MAX(1, MIN(ctx->threads, a->c * a->m))};
    for (int i = 0; i < 3; i++) {
        int64_t s = a->stride[i], d = a->dilation[i];
        for (int64_t rest; d; s = d, d = rest) rest = s % d; /* s becomes their greatest common divisor */
        run->axis[i].step = a->stride[i] / s;
        run->axis[i].phases = MIN(run->axis[i].step, a->kernel[i]);
    }
    run->width = CEIL_DIV(a->out[2], FN(LANES)) * FN(LANES);
    run->length = CEIL_DIV((a->kernel[2] - 1) * a->dilation[2] / a->stride[2] + run->width, FN(LANES)) * FN(LANES);
    run->pitch = run->axis[2].phases * run->length;
    run->x_size = a->in[0] * a->in[1] * run->pitch;
    run->dy_size = (a->out[0] * a->out[1] + 1) * run->width;
    run->outputs = CEIL_DIV(a->kernel[1], run->axis[1].step) <= 3 && a->kernel[2] <= 3 ? MIN(OUTPUTS, a->m) : 1;
    run->block = MIN(a->m, MAX(run->outputs, TOTAL_BYTES / VECTOR / sums));
    run->x = carve(base, bytes, run->slots * a->n * run->x_size, sizeof(T));
    run->dy = carve(base, bytes, run->slots * run->outputs * run->dy_size, sizeof(T));
    run->total = carve(base, bytes, run->slots * run->block * sums, sizeof(FN(vec)));
}

static size_t FN(bytes)(const subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    size_t bytes = 0;
    depthwise_run run;
    FN(plan)(&run, ctx, a, NULL, &bytes);
    return bytes;
}

static subspace_status FN(gradient)(subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    size_t bytes = 0;
    depthwise_run run;
    FN(plan)(&run, ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "depthwise: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    if (a->c * a->m > 0) ctx->parallel_for(run.slots, 1, FN(channels), &run);
    return SUBSPACE_OK;
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

size_t LEVEL(subspace_depthwise_workspace)(const subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    DISPATCH(a->dtype, bytes, ctx, a);
}

subspace_status LEVEL(subspace_depthwise)(subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    TRY(subspace_depthwise_check(ctx, a));
    DISPATCH(a->dtype, gradient, ctx, a);
}

#endif
