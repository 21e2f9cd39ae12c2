/* gated_cosine.c - cosines of points under gates, of all pairs, and their gradients, on the CPU.
 *
 *     cos[i,j] = <g_i z1_i, g_i z2_j> / (|g_i z1_i| |g_i z2_j|)           products of vectors are entry by entry
 *              = <w_i y_i, z2_j> R[i,j]        w = g²,  y_i = z1_i / |g_i z1_i|,  R[i,j] = <w_i, z2_j²>^(-1/2)
 *
 *     V = dcos R        P = V cos R        q = V z2        s_i = <w_i y_i, q_i>
 *     dz1   = w (q - s y) / |g z1|
 *     dgate = g (y (2 q - s y) - P z2²)
 *     dz2   = V' (w y) - z2 (P' w)
 *
 * Two products forward, four backward; all else is one pass over a tile or a row. No difference is taken forward, so no
 * digits are lost. A cosine does not change with the length of z1_i, z2_j or g_i: all rows are first divided by their
 * largest entry, so that squares neither overflow nor vanish. Nothing of b × n entries is made but the cosines, R, and
 * a tile of V and P for each thread: the jobs of rows i and those of rows j both make theirs.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include <float.h>

enum {
    ROWS = 128,  /* gates of a tile, */
    COLS = 256,  /* and points */
    DEPTH = 128, /* features that are summed in one run: sums of sums have fewer roundings behind one another */
    WORTH_A_THREAD = 1 << 18, /* multiplications */
};

typedef struct gated_slot {       /* scratch of one thread, backward only */
    void *along, *across, *outer; /* [ROWS, COLS] of V and of P; [COLS, k] of P' w */
} gated_slot;

typedef struct gated_run {
    const subspace_ctx *ctx;
    const subspace_gated_cosine_args *a;
    int64_t row_blocks, col_blocks, slots; /* of a view; threads */
    void *weight, *held;                   /* [v, b, k] w and w y, */
    void *points, *squares;                /* [v, n, k] z2 and z2², all of rows divided by their largest entries, */
    void *unit1, *unitg, *unit2;           /* [v, b], [v, b], [v, n] which are these */
    void *inverse;                         /* [v, b] 1 / |g z1| */
    char *scratch;
    size_t slot_bytes;
} gated_run;

static gated_slot lay_out(const subspace_gated_cosine_args *a, char *base, size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    gated_slot slot = {0};
    if (!a->dcosine) return slot;
    slot.along = carve(base, bytes, ROWS * COLS, item);
    slot.across = carve(base, bytes, ROWS * COLS, item);
    slot.outer = carve(base, bytes, COLS * a->k, item);
    return slot;
}

static void plan(gated_run *run, const subspace_ctx *ctx, const subspace_gated_cosine_args *a, char *base,
                 size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const double work = (double)a->v * (double)a->b * (double)a->n * (double)a->k;
    *run = (gated_run){.ctx = ctx, .a = a, .row_blocks = CEIL_DIV(a->b, ROWS), .col_blocks = CEIL_DIV(a->n, COLS)};
    run->slots = MAX(1, MIN(ctx->threads, (int64_t)MIN(work / WORTH_A_THREAD, 1 << 20)));
    run->weight = carve(base, bytes, a->v * a->b * a->k, item);
    run->held = carve(base, bytes, a->v * a->b * a->k, item);
    run->points = carve(base, bytes, a->v * a->n * a->k, item);
    run->squares = carve(base, bytes, a->v * a->n * a->k, item);
    run->unit1 = carve(base, bytes, a->v * a->b, item);
    run->unitg = carve(base, bytes, a->v * a->b, item);
    run->unit2 = carve(base, bytes, a->v * a->n, item);
    run->inverse = carve(base, bytes, a->v * a->b, item);
    lay_out(a, NULL, &run->slot_bytes);
    run->scratch = carve(base, bytes, run->slots * (int64_t)run->slot_bytes, 1);
}

size_t LEVEL(subspace_gated_cosine_workspace)(const subspace_ctx *ctx, const subspace_gated_cosine_args *a)
{
    size_t bytes = 0;
    gated_run run;
    plan(&run, ctx, a, NULL, &bytes);
    return bytes;
}

#define THIS_FILE "isotropy/gated_cosine.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#if IS_F32
typedef int32_t FN(bits);
#else
typedef int64_t FN(bits);
#endif

/* Of a row: its largest magnitude, or the least normal number; NaN if an entry is not finite. Without their signs,
 * numbers are in the order of their bits, and what is not finite comes last. */
static T FN(unit)(int64_t k, const T *restrict x)
{
    const T least = IS_F32 ? (T)FLT_MIN : (T)DBL_MIN, infinite = (T)INFINITY;
    FN(bits) largest = 0, beyond;
    T unit;
#pragma omp simd reduction(max : largest)
    for (int64_t l = 0; l < k; l++) {
        FN(bits) size;
        memcpy(&size, x + l, sizeof size);
        size &= IS_F32 ? INT32_MAX : INT64_MAX;
        largest = size > largest ? size : largest;
    }
    memcpy(&beyond, &infinite, sizeof beyond);
    memcpy(&unit, &largest, sizeof unit);
    return largest >= beyond ? (T)NAN : MAX(unit, least);
}

/* square^(-1/2), and 0 of one that can't be told from 0; NaN stays. */
static inline T FN(inverse_root)(T square)
{
    const T nothing = IS_F32 ? (T)(FLT_MIN / FLT_EPSILON) : (T)(DBL_MIN / DBL_EPSILON);
    return square <= nothing ? 0 : 1 / sqrt(square);
}

static void FN(prepare_gates)(int64_t begin, int64_t end, void *arg)
{
    const gated_run *run = arg;
    const int64_t k = run->a->k;
    for (int64_t i = begin; i < end; i++) {
        const T *restrict z = (const T *)run->a->z1 + i * k, *restrict g = (const T *)run->a->gate + i * k;
        T *restrict weight = (T *)run->weight + i * k, *restrict held = (T *)run->held + i * k;
        const T unit1 = FN(unit)(k, z), unitg = FN(unit)(k, g);
        T square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t l = 0; l < k; l++) {
            const T gate = g[l] / unitg, point = z[l] / unit1;
            weight[l] = gate * gate, held[l] = weight[l] * point;
            square += held[l] * point;
        }
        const T inverse = FN(inverse_root)(square);
        for (int64_t l = 0; l < k; l++) held[l] *= inverse;
        ((T *)run->unit1)[i] = unit1, ((T *)run->unitg)[i] = unitg, ((T *)run->inverse)[i] = inverse;
    }
}

static void FN(prepare_points)(int64_t begin, int64_t end, void *arg)
{
    const gated_run *run = arg;
    const int64_t k = run->a->k;
    for (int64_t j = begin; j < end; j++) {
        const T *restrict z = (const T *)run->a->z2 + j * k;
        T *restrict points = (T *)run->points + j * k, *restrict squares = (T *)run->squares + j * k;
        const T unit = FN(unit)(k, z);
        for (int64_t l = 0; l < k; l++) points[l] = z[l] / unit, squares[l] = points[l] * points[l];
        ((T *)run->unit2)[j] = unit;
    }
}

static void FN(prepare)(const gated_run *run)
{
    const int64_t grain = 1 + WORTH_A_THREAD / (16 * run->a->k);
    run->ctx->parallel_for(run->a->v * run->a->b, grain, FN(prepare_gates), (void *)run);
    run->ctx->parallel_for(run->a->v * run->a->n, grain, FN(prepare_points), (void *)run);
}

/* ---------------------------------------------------------------------------------------------------------- forward */

/* A tile of left right' */
static void FN(product)(int64_t rows, int64_t cols, int64_t k, const T *left, const T *right, T *to, int64_t ld)
{
    for (int64_t l = 0; l < k; l += DEPTH)
        GEMM(false, true, rows, cols, MIN(DEPTH, k - l), 1, left + l, k, right + l, k, l > 0, to, ld);
}

static void FN(cosines)(int64_t begin, int64_t end, void *arg)
{
    const gated_run *run = arg;
    const subspace_gated_cosine_args *a = run->a;
    const int64_t n = a->n, k = a->k;
    for (int64_t job = begin; job < end; job++) {
        const int64_t col = job % run->col_blocks * COLS, block = job / run->col_blocks;
        const int64_t v = block / run->row_blocks, row = block % run->row_blocks * ROWS;
        const int64_t rows = MIN(ROWS, a->b - row), cols = MIN(COLS, n - col);
        const int64_t gate = (v * a->b + row) * k, point = (v * n + col) * k, at = (v * a->b + row) * n + col;
        T *cosine = (T *)a->cosine + at, *inverse = (T *)a->inverse + at;
        FN(product)(rows, cols, k, (const T *)run->held + gate, (const T *)run->points + point, cosine, n);
        FN(product)(rows, cols, k, (const T *)run->weight + gate, (const T *)run->squares + point, inverse, n);
        for (int64_t i = 0; i < rows; i++) {
            T *restrict c = cosine + i * n, *restrict r = inverse + i * n;
            for (int64_t j = 0; j < cols; j++) r[j] = FN(inverse_root)(r[j]), c[j] *= r[j];
        }
    }
}

/* --------------------------------------------------------------------------------------------------------- backward */

/* A tile of V and P. */
static void FN(tile)(const gated_run *run, const gated_slot *own, int64_t v, int64_t row, int64_t rows, int64_t col,
                     int64_t cols)
{
    const subspace_gated_cosine_args *a = run->a;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = (v * a->b + row + i) * a->n + col;
        const T *restrict d = (const T *)a->dcosine + at, *restrict c = (const T *)a->cosine + at;
        const T *restrict r = (const T *)a->inverse + at;
        T *restrict along = (T *)own->along + i * COLS, *restrict across = (T *)own->across + i * COLS;
        for (int64_t j = 0; j < cols; j++) along[j] = d[j] * r[j], across[j] = along[j] * c[j] * r[j];
    }
}

/* dz1 and dgate of a block of gates, where q and P z2² are first */
static void FN(of_gates)(const gated_run *run, const gated_slot *own, int64_t v, int64_t block)
{
    const subspace_gated_cosine_args *a = run->a;
    const int64_t k = a->k, row = block * ROWS, rows = MIN(ROWS, a->b - row), first = v * a->b + row;
    T *dz1 = (T *)a->dz1 + first * k, *dgate = (T *)a->dgate + first * k;
    for (int64_t col = 0; col < a->n; col += COLS) {
        const int64_t cols = MIN(COLS, a->n - col), point = (v * a->n + col) * k;
        FN(tile)(run, own, v, row, rows, col, cols);
        GEMM(false, false, rows, k, cols, 1, own->along, COLS, (const T *)run->points + point, k, col > 0, dz1, k);
        GEMM(false, false, rows, k, cols, 1, own->across, COLS, (const T *)run->squares + point, k, col > 0, dgate, k);
    }
    if (a->n == 0) memset(dz1, 0, (size_t)(rows * k) * sizeof(T)), memset(dgate, 0, (size_t)(rows * k) * sizeof(T));
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = first + i;
        const T *restrict z = (const T *)a->z1 + at * k, *restrict g = (const T *)a->gate + at * k;
        const T *restrict weight = (const T *)run->weight + at * k, *restrict held = (const T *)run->held + at * k;
        const T unit1 = ((T *)run->unit1)[at], unitg = ((T *)run->unitg)[at], inverse = ((T *)run->inverse)[at];
        T *restrict q = dz1 + i * k, *restrict p = dgate + i * k, s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t l = 0; l < k; l++) s += held[l] * q[l];
        for (int64_t l = 0; l < k; l++) {
            const T y = inverse * (z[l] / unit1), rest = q[l] - s * y;
            p[l] = g[l] / unitg * (y * (q[l] + rest) - p[l]) / unitg;
            q[l] = inverse * weight[l] * rest / unit1;
        }
    }
}

/* dz2 of a block of points */
static void FN(of_points)(const gated_run *run, const gated_slot *own, int64_t v, int64_t block)
{
    const subspace_gated_cosine_args *a = run->a;
    const int64_t k = a->k, col = block * COLS, cols = MIN(COLS, a->n - col), first = v * a->n + col;
    T *dz2 = (T *)a->dz2 + first * k, *outer = own->outer;
    for (int64_t row = 0; row < a->b; row += ROWS) {
        const int64_t rows = MIN(ROWS, a->b - row), gate = (v * a->b + row) * k;
        FN(tile)(run, own, v, row, rows, col, cols);
        GEMM(true, false, cols, k, rows, 1, own->along, COLS, (const T *)run->held + gate, k, row > 0, dz2, k);
        GEMM(true, false, cols, k, rows, 1, own->across, COLS, (const T *)run->weight + gate, k, row > 0, outer, k);
    }
    if (a->b == 0) memset(dz2, 0, (size_t)(cols * k) * sizeof(T));
    if (a->b == 0) return;
    for (int64_t j = 0; j < cols; j++) {
        const T *restrict point = (const T *)run->points + (first + j) * k, *restrict across = outer + j * k;
        const T unit = ((T *)run->unit2)[first + j];
        T *restrict d = dz2 + j * k;
        for (int64_t l = 0; l < k; l++) d[l] = (d[l] - point[l] * across[l]) / unit;
    }
}

/* The blocks of gates, then those of points: none needs another's result. */
static void FN(gradients)(int64_t begin, int64_t end, void *arg)
{
    const gated_run *run = arg;
    const subspace_gated_cosine_args *a = run->a;
    const int64_t gates = a->dz1 ? a->v * run->row_blocks : 0, points = a->dz2 ? a->v * run->col_blocks : 0;
    for (int64_t slot = begin; slot < end; slot++) {
        size_t bytes = 0;
        const gated_slot own = lay_out(a, run->scratch + (size_t)slot * run->slot_bytes, &bytes);
        for (int64_t job = slot; job < gates + points; job += run->slots)
            if (job < gates) FN(of_gates)(run, &own, job / run->row_blocks, job % run->row_blocks);
            else FN(of_points)(run, &own, (job - gates) / run->col_blocks, (job - gates) % run->col_blocks);
    }
}

static void FN(forward)(const gated_run *run)
{
    FN(prepare)(run);
    run->ctx->parallel_for(run->a->v * run->row_blocks * run->col_blocks,
                           1 + WORTH_A_THREAD / (2 * ROWS * COLS * run->a->k), FN(cosines), (void *)run);
}

static void FN(backward)(const gated_run *run)
{
    FN(prepare)(run);
    run->ctx->parallel_for(run->slots, 1, FN(gradients), (void *)run);
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

static subspace_status prepare(gated_run *run, subspace_ctx *ctx, const subspace_gated_cosine_args *a)
{
    size_t bytes = 0;
    TRY(subspace_gated_cosine_check(ctx, a));
    plan(run, ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "gated_cosine: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

subspace_status LEVEL(subspace_gated_cosine)(subspace_ctx *ctx, const subspace_gated_cosine_args *a)
{
    gated_run run;
    TRY(prepare(&run, ctx, a));
    if (a->dtype == SUBSPACE_F64) LEVEL(forward_f64)(&run);
    else LEVEL(forward_f32)(&run);
    return SUBSPACE_OK;
}

subspace_status LEVEL(subspace_gated_cosine_backward)(subspace_ctx *ctx, const subspace_gated_cosine_args *a)
{
    gated_run run;
    TRY(prepare(&run, ctx, a));
    if (a->dtype == SUBSPACE_F64) LEVEL(backward_f64)(&run);
    else LEVEL(backward_f32)(&run);
    return SUBSPACE_OK;
}

#endif
