/* depthwise.c - gradient of a depthwise convolution's weight on the CPU.
 *
 *     dw[ky, kx] = sum_{oy, ox} dy[oy, ox] x[oy s + ky d - p, ox s + kx d - p]      (the third dimension likewise)
 *
 * With k d = q s + phase, tap k reads entry o + q of what is left of x when only every s-th entry counts from
 * phase - p on: a correlation of stride one. Taps k and k + step, step = s / gcd(s, d), share their phase.
 *
 * A channel's volume is widened and its columns split by phase, with zeros around them, so that every tap reads whole
 * vectors. Then a row of x meets up to TAPS rows of dy (one per ky) at up to TAPS shifts (one per kx), all of their
 * sums in registers: TAPS^2 multiply-adds for 2 TAPS loads. The lanes of the sums are added at the very end.
 *
 * Memory: a channel of x and one of dy per thread.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "convert.h"

/* Taps each way of a microkernel. As many sums as the registers hold beside what they are made of: 32 registers at
 * avx512, else 16. */
#if defined(__AVX512F__)
#define TAPS 4
#else
#define TAPS 3
#endif

typedef struct depthwise_run {
    const subspace_depthwise_args *a;
    struct {
        int64_t step, phases; /* taps `step` apart share a phase; how many phases the taps have */
    } axis[3];
    int64_t slots;
    int64_t width, length, pitch; /* of a row of dy, of one phase of a row of x, of all its phases */
    int64_t x_size, dy_size;      /* of a slot's channels; dy's ends in a row of zeros */
    void *x, *dy, *total;         /* total: a vector per tap */
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
    if (stride == 1) memcpy(to, x, (size_t)count * sizeof(T));
    else
        for (int64_t i = 0; i < count; i++) to[i] = x[i * stride];
}

/* Channel `c` of image `b` of x; the zeros around the rows are there already. */
static void FN(take_x)(const depthwise_run *run, int64_t b, int64_t c, T *to)
{
    const subspace_depthwise_args *a = run->a;
    const int64_t rows = a->in[0] * a->in[1], s = a->stride[2], image = (b * a->c + c) * rows;
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

/* Taps ky, ky + step, ... (`ty` of them) by kx, kx + 1, ... (`tx`) of a plane of x and one of dy. `zero` is a row of
 * dy for the taps that lie outside at a row of x. */
static inline __attribute__((always_inline)) void FN(microkernel)(const int ty, const int tx, const depthwise_run *run,
                                                                  const T *x, const T *dy, const T *zero, int64_t ky,
                                                                  int64_t kx, FN(vec) *total)
{
    const subspace_depthwise_args *a = run->a;
    const int64_t s = a->stride[1], d = a->dilation[1], out = a->out[1], step = run->axis[1].step;
    const int64_t q0 = ky * d / s, dq = step * d / s, first = ky * d % s - a->padding[1];
    const int64_t j0 = MAX(q0, first < 0 ? CEIL_DIV(-first, s) : 0);
    const int64_t j1 = MIN(q0 + (ty - 1) * dq + out, CEIL_DIV(MAX(a->in[1] - first, 0), s));
    int64_t shift[TAPS];
    FN(vec) acc[TAPS][TAPS];
    for (int t = 0; t < tx; t++)
        shift[t] = (kx + t) % run->axis[2].step * run->length + (kx + t) * a->dilation[2] / a->stride[2];
#pragma GCC unroll 4
    for (int i = 0; i < ty; i++)
#pragma GCC unroll 4
        for (int t = 0; t < tx; t++) acc[i][t] = (FN(vec)){0};
    for (int64_t j = j0; j < j1; j++) {
        const T *row = x + (j * s + first) * run->pitch, *g[TAPS];
#pragma GCC unroll 4
        for (int i = 0; i < ty; i++) {
            const int64_t o = j - q0 - i * dq;
            g[i] = o >= 0 && o < out ? dy + o * run->width : zero;
        }
        for (int64_t v = 0; v < run->width; v += FN(LANES)) {
            FN(vec) gv[TAPS];
#pragma GCC unroll 4
            for (int i = 0; i < ty; i++) gv[i] = *(const FN(vec) *)(g[i] + v);
#pragma GCC unroll 4
            for (int t = 0; t < tx; t++) {
                const FN(vec) xv = *(const FN(vecu) *)(row + shift[t] + v);
#pragma GCC unroll 4
                for (int i = 0; i < ty; i++) acc[i][t] += gv[i] * xv;
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ty; i++)
#pragma GCC unroll 4
        for (int t = 0; t < tx; t++) total[(ky + i * step) * a->kernel[2] + kx + t] += acc[i][t];
}

#define MICROKERNELS(ty)                                                                                               \
    static __attribute__((noinline)) void FN(microkernel_##ty)(int64_t tx, const depthwise_run *run, const T *x,       \
                                                               const T *dy, const T *zero, int64_t ky, int64_t kx,     \
                                                               FN(vec) *total)                                         \
    {                                                                                                                  \
        if (tx == 4 && TAPS == 4) FN(microkernel)(ty, TAPS, run, x, dy, zero, ky, kx, total);                          \
        else if (tx == 3) FN(microkernel)(ty, 3, run, x, dy, zero, ky, kx, total);                                     \
        else if (tx == 2) FN(microkernel)(ty, 2, run, x, dy, zero, ky, kx, total);                                     \
        else FN(microkernel)(ty, 1, run, x, dy, zero, ky, kx, total);                                                  \
    }
#if TAPS == 4
MICROKERNELS(4)
#endif
MICROKERNELS(3)
MICROKERNELS(2)
MICROKERNELS(1)
#undef MICROKERNELS

/* Every tap of a plane, in microkernels as even as can be: 7 = 4 + 3 = 3 + 2 + 2. */
static void FN(plane)(const depthwise_run *run, const T *x, const T *dy, const T *zero, FN(vec) *total)
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
                const int64_t ky = phase + i0 * step, tx = kx1 - kx;
                if (i1 - i0 == 1) FN(microkernel_1)(tx, run, x, dy, zero, ky, kx, total);
                else if (i1 - i0 == 2) FN(microkernel_2)(tx, run, x, dy, zero, ky, kx, total);
#if TAPS == 4
                else if (i1 - i0 == 4) FN(microkernel_4)(tx, run, x, dy, zero, ky, kx, total);
#endif
                else FN(microkernel_3)(tx, run, x, dy, zero, ky, kx, total);
            }
    }
}

static void FN(channels)(int64_t begin, int64_t end, void *arg)
{
    const depthwise_run *run = arg;
    const subspace_depthwise_args *a = run->a;
    const int64_t plane = a->kernel[1] * a->kernel[2], taps = a->kernel[0] * plane;
    for (int64_t slot = begin; slot < end; slot++) {
        T *x = (T *)run->x + slot * run->x_size, *dy = (T *)run->dy + slot * run->dy_size;
        const T *zero = dy + run->dy_size - run->width;
        FN(vec) *total = (FN(vec) *)run->total + slot * a->m * taps;
        int64_t first, last;
        share(a->c * a->m, slot, run->slots, &first, &last);
        memset(x, 0, (size_t)run->x_size * sizeof(T));
        memset(dy, 0, (size_t)run->dy_size * sizeof(T));
        for (int64_t end_of; first < last; first = end_of) { /* outputs of one channel of x */
            const int64_t c = first / a->m;
            end_of = MIN(last, (c + 1) * a->m);
            memset(total, 0, (size_t)((end_of - first) * taps) * sizeof *total);
            for (int64_t b = 0; b < a->b; b++) {
                FN(take_x)(run, b, c, x);
                for (int64_t channel = first; channel < end_of; channel++) {
                    FN(take_dy)(run, b, channel, dy);
                    for (int64_t kz = 0; kz < a->kernel[0]; kz++)
                        for (int64_t oz = 0; oz < a->out[0]; oz++) {
                            const int64_t iz = oz * a->stride[0] + kz * a->dilation[0] - a->padding[0];
                            if (iz < 0 || iz >= a->in[0]) continue;
                            FN(plane)(run, x + iz * a->in[1] * run->pitch, dy + oz * a->out[1] * run->width, zero,
                                      total + (channel - first) * taps + kz * plane);
                        }
                }
            }
            for (int64_t i = 0; i < (end_of - first) * taps; i++) {
                double sum = 0;
                for (int l = 0; l < FN(LANES); l++) sum += (double)total[i][l];
                ((T *)a->dweight)[first * taps + i] = (T)sum;
            }
        }
    }
}

static void FN(plan)(depthwise_run *run, const subspace_ctx *ctx, const subspace_depthwise_args *a, char *base,
                     size_t *bytes)
{
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
    run->x = carve(base, bytes, run->slots * run->x_size, sizeof(T));
    run->dy = carve(base, bytes, run->slots * run->dy_size, sizeof(T));
    run->total = carve(base, bytes, run->slots * a->m * a->kernel[0] * a->kernel[1] * a->kernel[2], sizeof(FN(vec)));
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
