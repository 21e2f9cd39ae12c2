/* hadamard.cu - the Walsh-Hadamard transform of rows, on the GPU.
 *
 *     y[v,i] = scale sum_j (-1)^(number of ones in i & j) x[v,j]
 *
 * n log2(n) sums and differences a row, see hadamard.cuh: bound by memory, which is gone through once for rows that fit
 * a block's shared memory and twice or three times for longer ones. Long rows of half types are kept in float32
 * between.
 */
#include "hadamard.cuh"

enum { WIDE = 1 << 24 }; /* entries that are kept in float32 at a time, if a row is no longer */

typedef struct hadamard_run {
    int64_t group; /* rows at a time */
    void *wide;    /* [group, n]; NULL but for long rows of half types */
} hadamard_run;

static hadamard_run plan(const subspace_hadamard_args *a, char *base, size_t *bytes)
{
    hadamard_run run = {};
    run.group = a->v;
    if (!is_half(a->dtype) || a->n <= tile_of<float>()) return run;
    run.group = MAX(1, MIN(a->v, WIDE / a->n));
    run.wide = carve(base, bytes, run.group * a->n, sizeof(float));
    return run;
}

template <typename T>
static subspace_status transform(subspace_ctx *ctx, const subspace_hadamard_args *a, const hadamard_run *run)
{
    for (int64_t v = 0; v < a->v; v += run->group) {
        T *y = (T *)a->y + v * a->n;
        TRY(transform_rows<T>(ctx, MIN(run->group, a->v - v), a->n, a->scale, (const T *)a->x + v * a->n, y,
                              (acc_t<T> *)(run->wide ? run->wide : (void *)y)));
    }
    return SUBSPACE_OK;
}

extern "C" size_t subspace_hadamard_workspace_cuda(const subspace_ctx *, const subspace_hadamard_args *a)
{
    size_t bytes = 0;
    plan(a, NULL, &bytes);
    return bytes;
}

extern "C" subspace_status subspace_hadamard_cuda(subspace_ctx *ctx, const subspace_hadamard_args *a)
{
    size_t bytes = 0;
    TRY(subspace_hadamard_check(ctx, a));
    const hadamard_run run = plan(a, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "hadamard: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    DISPATCH(a->dtype, transform, ctx, a, &run);
}
