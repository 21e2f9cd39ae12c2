/* tucker_conv.cu - the pointwise ends of a convolution's adapter on the GPU.
 *
 *     project    z = f' x~        df = sum x~ w'      x~ = drop(x)
 *     expand     x += drop(f z)
 *
 * float32 and float64 without dropout are GEMMs of cuBLAS, a strided batch of them where channels come first; df is one
 * GEMM with channels last. Else x is read as it is, and dropped, on its way into the tiles of rank_product.cuh, in
 * float32, and written with one rounding: no copies, x read once (twice by expand, which writes it) while r is at most
 * 64, a launch each. df is one sum over batch and positions, in slices added up in order.
 *
 * Bytes of an entry of x: its size for z and for df, twice that for expand; flops 2 r. From r of about 16 on (half
 * types; 32 in float32) the multiply-adds are the limit on an H100, not the memory.
 */
#include "rank_product.cuh"

typedef subspace_tucker_conv_args conv_args;

/* One position an image is channels last, too. */
static bool last(const conv_args *a)
{
    return a->last || a->p == 1;
}

static dropping drop_of(const conv_args *a)
{
    return {a->dropout > 0 ? a->seed : NULL, a->dropout};
}

/* No more than GEMMs? */
static bool plain(const conv_args *a)
{
    return !is_half(a->dtype) && !(a->dropout > 0);
}

static int64_t df_slices(const conv_args *a)
{
    return rank_shape_of(a->n, a->r, a->b * a->p, 1, true).slices;
}

template <typename T> static subspace_status project_z(subspace_ctx *ctx, const conv_args *a)
{
    typedef acc_t<T> W;
    const int64_t b = a->b, n = a->n, p = a->p, r = a->r;
    const subspace_dtype d = a->dtype;
    const rank_side left = a->dropout > 0 ? LEFT : NOTHING, right = a->dropout > 0 ? RIGHT : NOTHING;
    const T *x = (const T *)a->x;
    const W *f = (const W *)a->f;
    W *z = (W *)a->z;
    if (last(a)) {
        if (plain(a)) return gemm(ctx, false, false, b * p, r, n, d, x, n, f, r, 0, d, z, r);
        return rank_multiply(
            ctx,
            rank_job<T, W, W>{
                1, b * p, r, n, n, {x, 0, n, 0, 1, 0, 0}, {f, 0, 1, 0, r, 0, 0}, 1, NULL, z, drop_of(a), left, 0},
            false);
    }
    if (plain(a)) {
        const gemms g = {r, p, n, b, true, false, false, d, d, 1, 0, f, x, z, r, p, p, 0, n * p, r * p};
        return gemm_all(ctx, &g);
    }
    return rank_multiply(
        ctx,
        rank_job<W, T, W>{
            b, r, p, n, n, {f, 0, 1, 0, r, 0, 0}, {x, n * p, 1, 0, p, 0, 0}, 1, NULL, z, drop_of(a), right, 0},
        false);
}

template <typename T> static subspace_status project_df(subspace_ctx *ctx, const conv_args *a)
{
    typedef acc_t<T> W;
    const int64_t b = a->b, n = a->n, p = a->p, r = a->r, slices = df_slices(a);
    const subspace_dtype d = a->dtype;
    const T *x = (const T *)a->x;
    const W *w = (const W *)a->w;
    W *df = (W *)a->df, *part = slices > 1 ? (W *)ctx->workspace : df;
    if (last(a) && plain(a)) return gemm(ctx, true, false, n, r, b * p, d, x, n, w, r, 0, d, df, r);
    rank_job<T, W, W> job = {1,
                             n,
                             r,
                             b * p,
                             p,
                             {x, 0, p, n * p, 1, 0, 0},
                             {w, 0, p, r * p, 1, 0, 0},
                             1,
                             NULL,
                             part,
                             drop_of(a),
                             a->dropout > 0 ? LEFT : NOTHING,
                             0};
    if (last(a)) {
        job.steps = job.depth;
        job.left.line = job.right.line = 1, job.left.inner = n, job.right.inner = r;
    }
    TRY(rank_multiply(ctx, job, true));
    return slices > 1 ? join(ctx, (const W *)part, slices, n * r, 1, df) : SUBSPACE_OK;
}

template <typename T> static subspace_status project(subspace_ctx *ctx, const conv_args *a)
{
    if (a->b * a->p == 0) {
        if (a->df)
            CUDA(ctx, cudaMemsetAsync(a->df, 0, (size_t)(a->n * a->r) * sizeof(acc_t<T>), (cudaStream_t)ctx->stream));
        return SUBSPACE_OK;
    }
    if (a->z) TRY(project_z<T>(ctx, a));
    return a->df ? project_df<T>(ctx, a) : SUBSPACE_OK;
}

template <typename T> static subspace_status expand(subspace_ctx *ctx, const conv_args *a)
{
    typedef acc_t<T> W;
    const int64_t b = a->b, n = a->n, p = a->p, r = a->r;
    const subspace_dtype d = a->dtype;
    const rank_side change = a->dropout > 0 ? CHANGE : NOTHING;
    const W *f = (const W *)a->f, *z = (const W *)a->z;
    T *x = (T *)a->x;
    if (b * p == 0) return SUBSPACE_OK;
    if (last(a)) {
        if (plain(a)) return gemm(ctx, false, true, b * p, n, r, d, z, r, f, r, 1, d, x, n);
        return rank_multiply(
            ctx,
            rank_job<W, W, T>{
                1, b * p, n, r, r, {z, 0, r, 0, 1, 0, 0}, {f, 0, r, 0, 1, 0, 0}, 1, x, x, drop_of(a), change, 0},
            false);
    }
    if (plain(a)) {
        const gemms g = {n, p, r, b, false, false, false, d, d, 1, 1, f, z, x, r, p, p, 0, r * p, n * p};
        return gemm_all(ctx, &g);
    }
    return rank_multiply(
        ctx,
        rank_job<W, W, T>{
            b, n, p, r, r, {f, 0, r, 0, 1, 0, 0}, {z, r * p, 1, 0, p, 0, 0}, 1, x, x, drop_of(a), change, 0},
        false);
}

/* The slices of df. */
extern "C" size_t subspace_tucker_conv_workspace_cuda(const subspace_ctx *, const subspace_tucker_conv_args *a)
{
    if (!a->df || a->b <= 0 || a->n <= 0 || a->p <= 0 || a->r <= 0 || (last(a) && plain(a))) return 0;
    const int64_t slices = df_slices(a);
    return slices > 1 ? (size_t)(slices * a->n * a->r) * (a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float))
                      : 0;
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    TRY(subspace_tucker_conv_check(ctx, a));
    const size_t bytes = subspace_tucker_conv_workspace_cuda(ctx, a);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "tucker_conv: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_tucker_conv_project_cuda(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    TRY(prepare(ctx, a));
    DISPATCH(a->dtype, project, ctx, a);
}

extern "C" subspace_status subspace_tucker_conv_expand_cuda(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    TRY(prepare(ctx, a));
    DISPATCH(a->dtype, expand, ctx, a);
}
