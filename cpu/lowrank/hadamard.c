/* hadamard.c - the Walsh-Hadamard transform of rows, on the CPU.
 *
 *     y[v,i] = scale sum_j (-1)^(number of ones in i & j) x[v,j]
 *
 * n log2(n) sums and differences a row: one pass over memory for rows of up to ROW entries, two for longer ones, see
 * hadamard.h. Half types are widened, whole rows at a time, and narrowed at the end.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "convert.h"
#include "hadamard.h"

enum { PIECE = 1 << 15 }; /* entries that a slot widens at a time */

typedef struct hadamard_run {
    const subspace_hadamard_args *a;
    hadamard_rows rows; /* of all, or of the group that is being worked on */
    int64_t from;       /* the group's first entry */
    float *wide;        /* [rows of a group, n]; NULL but for half types */
    int64_t group;      /* rows */
} hadamard_run;

static hadamard_run plan(const subspace_ctx *ctx, const subspace_hadamard_args *a, char *base, size_t *bytes)
{
    const bool half = a->dtype == SUBSPACE_F16 || a->dtype == SUBSPACE_BF16;
    hadamard_run run = {.a = a};
    run.rows = plan_rows(ctx, a->v, a->n, a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float), base, bytes);
    run.rows.scale = a->scale, run.rows.x = a->x, run.rows.y = a->y;
    run.group = MAX(1, MIN(a->v, PIECE * run.rows.slots / a->n));
    if (half) run.wide = carve(base, bytes, run.group * a->n, sizeof(float));
    return run;
}

size_t LEVEL(subspace_hadamard_workspace)(const subspace_ctx *ctx, const subspace_hadamard_args *a)
{
    size_t bytes = 0;
    plan(ctx, a, NULL, &bytes);
    return bytes;
}

#define THIS_FILE "lowrank/hadamard.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "hadamard.h"

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

static void widen_group(int64_t begin, int64_t end, void *arg)
{
    const hadamard_run *run = arg;
    const uint16_t *x = (const uint16_t *)run->a->x + run->from;
    if (run->a->dtype == SUBSPACE_F16)
        for (int64_t i = begin; i < end; i++) run->wide[i] = f16_to_f32(x[i]);
    else
        for (int64_t i = begin; i < end; i++) run->wide[i] = bf16_to_f32(x[i]);
}

static void narrow_group(int64_t begin, int64_t end, void *arg)
{
    const hadamard_run *run = arg;
    uint16_t *y = (uint16_t *)run->a->y + run->from;
    if (run->a->dtype == SUBSPACE_F16)
        for (int64_t i = begin; i < end; i++) y[i] = f32_to_f16(run->wide[i]);
    else
        for (int64_t i = begin; i < end; i++) y[i] = f32_to_bf16(run->wide[i]);
}

subspace_status LEVEL(subspace_hadamard)(subspace_ctx *ctx, const subspace_hadamard_args *a)
{
    size_t bytes = 0;
    TRY(subspace_hadamard_check(ctx, a));
    hadamard_run run = plan(ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "hadamard: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    if (a->dtype == SUBSPACE_F64) LEVEL(transform_rows_f64)(&run.rows);
    else if (!run.wide) LEVEL(transform_rows_f32)(&run.rows);
    for (int64_t v = 0; run.wide && v < a->v; v += run.group) {
        run.rows.v = MIN(run.group, a->v - v), run.rows.x = run.rows.y = run.wide, run.from = v * a->n;
        ctx->parallel_for(run.rows.v * a->n, WORTH_A_THREAD, widen_group, &run);
        LEVEL(transform_rows_f32)(&run.rows);
        ctx->parallel_for(run.rows.v * a->n, WORTH_A_THREAD, narrow_group, &run);
    }
    return SUBSPACE_OK;
}

#endif
