/* sigreg.c - the empirical characteristic function along directions, less that of a standard normal, on the CPU.
 *
 *     p[i,l]     = <z_i, direction_l>                            one GEMM a tile
 *     u[i,l]     = exp(i step p)                                 one sine and cosine an entry
 *     off[j-1,l] = root_j sum_i (u[i,l]^j - 1 + 1 - normal_j)    knots - 2 complex products an entry
 *
 *     dp[i,l]    = Re sum_j q[j,l] u[i,l]^j                      Horner's rule, q = root_j t_j (doff_im + i doff_re)
 *     dz_i       = sum_l dp[i,l] direction_l                     one GEMM a tile
 *
 * with t_j = j step, normal_j = exp(-t_j^2/2) and root_j the root of the trapezoidal rule's weight.
 *
 * Rounding grows with every product, so each GROUP of knots begins with a sine and cosine of its own. Only tiles of p
 * and u exist; the backward makes them again. Sums are in T within a tile, in double beyond. Where t is small, all
 * cosines are nearly 1 and so is normal_j: u^j - 1 is what is summed, 1 - normal_j is added in double.
 *
 * Forward: a slot takes a block of directions and a part of a view's points, whose tiles it adds in order; the parts
 * are the same for any number of threads, and are added in order too. Backward: a slot takes some points, all
 * directions.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "sincos.h"
#include "widen.h"

enum {
    ROWS = 128,               /* points of a tile, */
    COLS = 64,                /* and directions */
    GROUP = 16,               /* knots from one sine and cosine to the next */
    TOGETHER = VECTOR / 16,   /* points whose products are interleaved: as many as the registers hold */
    PART = 1024,              /* points of a part, at least, */
    PARTS = 16,               /* and parts of a view, at most */
    WORTH_A_THREAD = 1 << 18, /* multiplications */
};

typedef struct sigreg_slot { /* scratch of one thread */
    void *z, *dz;            /* [ROWS, d] widened, to be narrowed; NULL but for half types */
    void *p, *dp;            /* [ROWS, COLS] */
    void *cosine, *sine;     /* [ROWS, COLS] of u */
    void *base;              /* [2, ROWS, COLS] of a later group's first power */
    void *coefficient;       /* [2, knots - 1, COLS] sums of a tile, or q */
} sigreg_slot;

typedef struct sigreg_run {
    const subspace_ctx *ctx;
    const subspace_sigreg_args *a;
    int64_t powers, blocks; /* knots - 1; blocks of directions */
    int64_t parts, chunks;  /* of a view's points: parts that are summed, tiles of the backward */
    int64_t slots;
    double *part;         /* [v, parts, 2, powers, s], or off itself */
    double *below, *root; /* [powers]: 1 - normal, root */
    char *scratch;
    size_t slot_bytes;
} sigreg_run;

static sigreg_slot lay_out(const subspace_sigreg_args *a, char *base, size_t *bytes)
{
    const bool half = a->dtype == SUBSPACE_F16 || a->dtype == SUBSPACE_BF16;
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    sigreg_slot slot = {0};
    if (half) slot.z = carve(base, bytes, ROWS * a->d, item);
    if (half) slot.dz = carve(base, bytes, ROWS * a->d, item);
    slot.dp = carve(base, bytes, ROWS * COLS, item);
    slot.p = carve(base, bytes, ROWS * COLS, item);
    slot.cosine = carve(base, bytes, ROWS * COLS, item);
    slot.sine = carve(base, bytes, ROWS * COLS, item);
    slot.base = carve(base, bytes, a->knots - 1 > GROUP ? 2 * ROWS * COLS : 0, item);
    slot.coefficient = carve(base, bytes, 2 * (a->knots - 1) * COLS, item);
    return slot;
}

static sigreg_slot slot_of(const sigreg_run *run, int64_t slot)
{
    size_t bytes = 0;
    return lay_out(run->a, run->scratch + (size_t)slot * run->slot_bytes, &bytes);
}

static void plan(sigreg_run *run, const subspace_ctx *ctx, const subspace_sigreg_args *a, char *base, size_t *bytes)
{
    *run = (sigreg_run){.ctx = ctx, .a = a, .powers = a->knots - 1, .blocks = CEIL_DIV(a->s, COLS)};
    run->parts = MAX(1, MIN(PARTS, a->n / PART)), run->chunks = CEIL_DIV(a->n, ROWS);
    run->slots = MAX(1, ctx->threads);
    run->part = a->off;
    if (run->parts > 1) run->part = carve(base, bytes, a->v * run->parts * 2 * run->powers * a->s, sizeof(double));
    run->below = carve(base, bytes, run->powers, sizeof(double));
    run->root = carve(base, bytes, run->powers, sizeof(double));
    lay_out(a, NULL, &run->slot_bytes);
    run->scratch = carve(base, bytes, run->slots * (int64_t)run->slot_bytes, 1);
}

size_t LEVEL(subspace_sigreg_workspace)(const subspace_ctx *ctx, const subspace_sigreg_args *a)
{
    size_t bytes = 0;
    sigreg_run run;
    plan(&run, ctx, a, NULL, &bytes);
    return bytes;
}

#define THIS_FILE "isotropy/sigreg.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "sincos.h"
#include "widen.h"

typedef T FN(vec) __attribute__((vector_size(VECTOR)));
typedef T FN(vecu) __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
enum { FN(LANES) = VECTOR / sizeof(T) };

/* z[from .. from + rows) of view v, as T */
static const T *FN(points)(const sigreg_run *run, const sigreg_slot *own, int64_t v, int64_t from, int64_t rows)
{
    const subspace_sigreg_args *a = run->a;
    const int64_t at = (v * a->n + from) * a->d;
    if (!own->z) return (const T *)a->z + at;
    FN(widen)(a->dtype, a->z, at, rows * a->d, own->z);
    return own->z;
}

/* Cosines and sines of a tile's scale p. */
static void FN(turn)(const T *restrict p, int64_t rows, double scale, T *restrict cosine, T *restrict sine)
{
    const quarter_turns turns = in_quarter_turns(scale, IS_F32);
    const T high = (T)turns.high, low = (T)turns.low;
#pragma omp simd
    for (int64_t i = 0; i < rows * COLS; i++) FN(sincos)(p[i], high, low, &sine[i], &cosine[i]);
}

/* p and u of `rows` points and the directions from `col` on, rows up to a whole TOGETHER with zeros. Columns beyond the
 * last direction hold zeros, too. */
static int64_t FN(project)(const sigreg_run *run, const sigreg_slot *own, const T *z, int64_t rows, int64_t col)
{
    const subspace_sigreg_args *a = run->a;
    const int64_t cols = MIN(COLS, a->s - col), padded = CEIL_DIV(rows, TOGETHER) * TOGETHER;
    T *p = own->p;
    if (cols < COLS) memset(p, 0, (size_t)(rows * COLS) * sizeof(T));
    memset(p + rows * COLS, 0, (size_t)((padded - rows) * COLS) * sizeof(T));
    GEMM(false, false, rows, cols, a->d, 1, z, a->d, (const T *)a->directions + col, a->s, 0, p, COLS);
    FN(turn)(p, padded, a->step, own->cosine, own->sine);
    return padded;
}

/* The first power of the group that begins with u^(first + 1): u itself, or anew. */
static void FN(begin)(const sigreg_run *run, const sigreg_slot *own, int64_t rows, int64_t first, const T **cosine,
                      const T **sine)
{
    T *base = own->base;
    *cosine = own->cosine, *sine = own->sine;
    if (first == 0) return;
    FN(turn)(own->p, rows, (double)(first + 1) * run->a->step, base, base + ROWS * COLS);
    *cosine = base, *sine = base + ROWS * COLS;
}

/* Sums over a tile's points of `count` powers from u^(first + 1) on, less 1 each, lane by lane. */
static void FN(sum_powers)(const sigreg_slot *own, int64_t rows, int64_t first, int64_t count, int64_t powers,
                           const T *cosine, const T *sine)
{
    enum { L = FN(LANES) };
    const T *uc = own->cosine, *us = own->sine;
    T *sums = own->coefficient;
    for (int64_t l = 0; l < COLS; l += L) {
        FN(vec) re[GROUP] = {{0}}, im[GROUP] = {{0}};
        for (int64_t i = 0; i < rows; i += TOGETHER) {
            FN(vec) c[TOGETHER], s[TOGETHER], x[TOGETHER], y[TOGETHER];
            for (int k = 0; k < TOGETHER; k++) {
                const int64_t at = (i + k) * COLS + l;
                c[k] = *(const FN(vecu) *)(uc + at), s[k] = *(const FN(vecu) *)(us + at);
                x[k] = *(const FN(vecu) *)(cosine + at), y[k] = *(const FN(vecu) *)(sine + at);
            }
            for (int64_t j = 0; j < count; j++) {
                FN(vec) a = x[0], b = y[0];
                for (int k = 1; k < TOGETHER; k++) a += x[k], b += y[k];
                re[j] += a - (T)TOGETHER, im[j] += b;
                for (int k = 0; k < TOGETHER; k++) {
                    const FN(vec) next = x[k] * c[k] - y[k] * s[k];
                    y[k] = x[k] * s[k] + y[k] * c[k], x[k] = next;
                }
            }
        }
        for (int64_t j = 0; j < count; j++) {
            *(FN(vecu) *)(sums + (first + j) * COLS + l) = re[j];
            *(FN(vecu) *)(sums + (powers + first + j) * COLS + l) = im[j];
        }
    }
}

/* A part of a view's points along a block of directions, tile by tile. */
static void FN(sum_part)(const sigreg_run *run, const sigreg_slot *own, int64_t v, int64_t part, int64_t block)
{
    const subspace_sigreg_args *a = run->a;
    const int64_t col = block * COLS, cols = MIN(COLS, a->s - col), powers = run->powers;
    double *to = run->part + (v * run->parts + part) * 2 * powers * a->s + col;
    const T *sums = own->coefficient;
    int64_t from, end;
    share(a->n, part, run->parts, &from, &end);
    const double points = (double)(end - from);
    for (int64_t j = 0; j < 2 * powers; j++) memset(to + j * a->s, 0, (size_t)cols * sizeof *to);
    for (int64_t rows; from < end; from += rows) {
        rows = MIN(ROWS, end - from);
        const int64_t padded = FN(project)(run, own, FN(points)(run, own, v, from, rows), rows, col);
        for (int64_t first = 0; first < powers; first += GROUP) {
            const T *cosine, *sine;
            FN(begin)(run, own, padded, first, &cosine, &sine);
            FN(sum_powers)(own, padded, first, MIN(GROUP, powers - first), powers, cosine, sine);
        }
        for (int64_t j = 0; j < 2 * powers; j++)
            for (int64_t l = 0; l < cols; l++) to[j * a->s + l] += (double)sums[j * COLS + l];
    }
    for (int64_t j = 0; j < 2 * powers; j++) {
        const double below = j < powers ? points * run->below[j] : 0, root = run->root[j % powers];
        for (int64_t l = 0; l < cols; l++) to[j * a->s + l] = root * (to[j * a->s + l] + below);
    }
}

static void FN(sum_parts)(int64_t begin, int64_t end, void *arg)
{
    const sigreg_run *run = arg;
    for (int64_t slot = begin; slot < end; slot++) {
        const sigreg_slot own = slot_of(run, slot);
        int64_t from, to;
        share(run->a->v * run->parts * run->blocks, slot, run->slots, &from, &to);
        for (int64_t job = from; job < to; job++) {
            const int64_t block = job % run->blocks, part = job / run->blocks;
            FN(sum_part)(run, &own, part / run->parts, part % run->parts, block);
        }
    }
}

/* q of a block of directions; zero beyond the last one */
static void FN(coefficients)(const sigreg_run *run, const sigreg_slot *own, int64_t v, int64_t col)
{
    const subspace_sigreg_args *a = run->a;
    const int64_t cols = MIN(COLS, a->s - col), powers = run->powers;
    const double *dcos = a->doff + v * 2 * powers * a->s + col, *dsin = dcos + powers * a->s;
    T *re = own->coefficient, *im = re + powers * COLS;
    if (cols < COLS) memset(re, 0, (size_t)(2 * powers * COLS) * sizeof(T));
    for (int64_t j = 0; j < powers; j++) {
        const double t = run->root[j] * (double)(j + 1) * a->step;
        for (int64_t l = 0; l < cols; l++) {
            re[j * COLS + l] = (T)(t * dsin[j * a->s + l]);
            im[j * COLS + l] = (T)(t * dcos[j * a->s + l]);
        }
    }
}

/* dp (+)= Re (q_first u^0 + q_(first+1) u^1 + ...) base of a group, from its last knot to its first */
static void FN(horner)(const sigreg_slot *own, int64_t rows, int64_t first, int64_t count, int64_t powers,
                       const T *cosine, const T *sine)
{
    enum { L = FN(LANES) };
    const T *uc = own->cosine, *us = own->sine;
    T *dp = own->dp;
    const T *qr = (const T *)own->coefficient + first * COLS, *qi = qr + powers * COLS;
    for (int64_t l = 0; l < COLS; l += L)
        for (int64_t i = 0; i < rows; i += TOGETHER) {
            FN(vec) c[TOGETHER], s[TOGETHER], x[TOGETHER], y[TOGETHER];
            for (int k = 0; k < TOGETHER; k++) {
                const int64_t at = (i + k) * COLS + l;
                c[k] = *(const FN(vecu) *)(uc + at), s[k] = *(const FN(vecu) *)(us + at);
                x[k] = *(const FN(vecu) *)(qr + (count - 1) * COLS + l);
                y[k] = *(const FN(vecu) *)(qi + (count - 1) * COLS + l);
            }
            for (int64_t j = count - 2; j >= 0; j--) {
                const FN(vec) a = *(const FN(vecu) *)(qr + j * COLS + l), b = *(const FN(vecu) *)(qi + j * COLS + l);
                for (int k = 0; k < TOGETHER; k++) {
                    const FN(vec) next = a + x[k] * c[k] - y[k] * s[k];
                    y[k] = b + x[k] * s[k] + y[k] * c[k], x[k] = next;
                }
            }
            for (int k = 0; k < TOGETHER; k++) {
                const int64_t at = (i + k) * COLS + l;
                const FN(vec) part = x[k] * *(const FN(vecu) *)(cosine + at) - y[k] * *(const FN(vecu) *)(sine + at);
                if (first > 0) *(FN(vecu) *)(dp + at) += part;
                else *(FN(vecu) *)(dp + at) = part;
            }
        }
}

/* dz of some of a view's points, block by block of directions */
static void FN(gradient)(const sigreg_run *run, const sigreg_slot *own, int64_t v, int64_t chunk)
{
    const subspace_sigreg_args *a = run->a;
    const int64_t from = chunk * ROWS, rows = MIN(ROWS, a->n - from), powers = run->powers;
    const int64_t at = (v * a->n + from) * a->d;
    const T *z = FN(points)(run, own, v, from, rows);
    T *dz = own->dz ? own->dz : (T *)a->dz + at;
    for (int64_t col = 0; col < a->s; col += COLS) {
        const int64_t cols = MIN(COLS, a->s - col), padded = FN(project)(run, own, z, rows, col);
        FN(coefficients)(run, own, v, col);
        for (int64_t first = 0; first < powers; first += GROUP) {
            const T *cosine, *sine;
            FN(begin)(run, own, padded, first, &cosine, &sine);
            FN(horner)(own, padded, first, MIN(GROUP, powers - first), powers, cosine, sine);
        }
        GEMM(false, true, rows, a->d, cols, 1, own->dp, COLS, (const T *)a->directions + col, a->s, col > 0, dz, a->d);
    }
    if (a->s == 0) memset(dz, 0, (size_t)(rows * a->d) * sizeof(T));
    if (!own->dz) return;
    uint16_t *out = (uint16_t *)a->dz + at;
    for (int64_t i = 0; i < rows * a->d; i++)
        out[i] = a->dtype == SUBSPACE_F16 ? f32_to_f16((float)dz[i]) : f32_to_bf16((float)dz[i]);
}

static void FN(gradients)(int64_t begin, int64_t end, void *arg)
{
    const sigreg_run *run = arg;
    for (int64_t slot = begin; slot < end; slot++) {
        const sigreg_slot own = slot_of(run, slot);
        int64_t from, to;
        share(run->a->v * run->chunks, slot, run->slots, &from, &to);
        for (int64_t job = from; job < to; job++) FN(gradient)(run, &own, job / run->chunks, job % run->chunks);
    }
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

static subspace_status prepare(sigreg_run *run, subspace_ctx *ctx, const subspace_sigreg_args *a)
{
    size_t bytes = 0;
    TRY(subspace_sigreg_check(ctx, a));
    plan(run, ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "sigreg: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, bytes);
    const double work = (double)a->v * (double)a->n * (double)a->s * (double)(a->d + 8 * a->knots);
    run->slots = MAX(1, MIN(run->slots, (int64_t)(work / WORTH_A_THREAD)));
    for (int64_t j = 0; j < run->powers; j++) {
        const double t = (double)(j + 1) * a->step;
        run->below[j] = -expm1(-t * t / 2);
        run->root[j] = sqrt((j + 1 < run->powers ? 2 : 1) * a->step * exp(-t * t / 2)); /* half a step at the end */
    }
    return SUBSPACE_OK;
}

/* The parts of each view, in their order. */
static void join_parts(int64_t begin, int64_t end, void *arg)
{
    const sigreg_run *run = arg;
    const int64_t row = run->a->s, size = 2 * run->powers * row;
    for (int64_t i = begin; i < end; i++) {
        const int64_t v = i / (2 * run->powers), j = i % (2 * run->powers);
        const double *part = run->part + v * run->parts * size + j * row;
        double *to = run->a->off + i * row;
        for (int64_t l = 0; l < row; l++) {
            to[l] = part[l];
            for (int64_t k = 1; k < run->parts; k++) to[l] += part[k * size + l];
        }
    }
}

subspace_status LEVEL(subspace_sigreg)(subspace_ctx *ctx, const subspace_sigreg_args *a)
{
    sigreg_run run;
    TRY(prepare(&run, ctx, a));
    ctx->parallel_for(run.slots, 1, a->dtype == SUBSPACE_F64 ? LEVEL(sum_parts_f64) : LEVEL(sum_parts_f32), &run);
    if (run.parts > 1)
        ctx->parallel_for(a->v * 2 * run.powers, 1 + WORTH_A_THREAD / (PARTS * (a->s + 1)), join_parts, &run);
    return SUBSPACE_OK;
}

subspace_status LEVEL(subspace_sigreg_backward)(subspace_ctx *ctx, const subspace_sigreg_args *a)
{
    sigreg_run run;
    TRY(prepare(&run, ctx, a));
    ctx->parallel_for(run.slots, 1, a->dtype == SUBSPACE_F64 ? LEVEL(gradients_f64) : LEVEL(gradients_f32), &run);
    return SUBSPACE_OK;
}

#endif
