/* logits.cu - subspace logits on the GPU.
 *
 *     z[b,c,:]     = weight_c x_b                  panels.cuh: one GEMM a tile
 *     logits[b,c]  = gamma || z[b,c,:] || / |x_b|  one pass over the tile
 *
 *     dz[b,c,:]    = gamma dlogits z / ||z||       one pass over the tile, 0 where z is 0
 *     dweight, dx                                  panels.cuh: one GEMM each
 */
#include "panels.cuh"

template <typename T>
__global__ void write_logits(tile t, view<acc_t<T>> v, const acc_t<T> *z, int64_t ldz, T *logits, int64_t classes)
{
    __shared__ acc_t<T> y[SQUARE][SQUARE + 1];
    const int64_t c0 = t.c0 + (int64_t)blockIdx.x * SQUARE, i0 = (int64_t)blockIdx.y * SQUARE, i = i0 + threadIdx.x;
    for (int line = threadIdx.y; line < SQUARE; line += LINES)
        if (i < t.nb && c0 + line < t.c1) y[line][threadIdx.x] = v.gamma * class_norm(t, v, z, ldz, c0 + line, i);
    __syncthreads();
    panels_scatter(t, c0, i0, y, logits, classes);
}

template <typename T>
__global__ void make_dz(tile t, view<acc_t<T>> v, const acc_t<T> *z, int64_t ldz, const T *dlogits, int64_t classes,
                        T *dz)
{
    __shared__ acc_t<T> dy[SQUARE][SQUARE + 1];
    const int64_t c0 = t.c0 + (int64_t)blockIdx.x * SQUARE, i0 = (int64_t)blockIdx.y * SQUARE, i = i0 + threadIdx.x;
    panels_gather(t, c0, i0, dy, dlogits, classes);
    for (int line = threadIdx.y; line < SQUARE; line += LINES) {
        const int64_t c = c0 + line;
        if (i >= t.nb || c >= t.c1) continue;
        const acc_t<T> norm = class_norm(t, v, z, ldz, c, i);
        panels_scale(t, v, norm > 0 ? v.gamma * dy[line][threadIdx.x] / norm : 0, z, ldz, c, i, dz);
    }
}

template <typename T>
static subspace_status forward_tile(void *, const panels *p, const tile *t, const void *z, int64_t ldz, void *)
{
    LAUNCH(p->ctx, write_logits<T>, squares(t, SQUARE), dim3(SQUARE, LINES), 0, *t, view_of<T>(p), (const acc_t<T> *)z,
           ldz, (T *)p->a->logits, p->a->c);
    return SUBSPACE_OK;
}

template <typename T>
static subspace_status backward_tile(void *, const panels *p, const tile *t, const void *z, int64_t ldz, void *dz)
{
    LAUNCH(p->ctx, make_dz<T>, squares(t, SQUARE), dim3(SQUARE, LINES), 0, *t, view_of<T>(p), (const acc_t<T> *)z, ldz,
           (const T *)p->a->dlogits, p->a->c, (T *)dz);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status forward(const panels *p)
{
    return panels_forward<T>(p, forward_tile<T>, NULL);
}

template <typename T> static subspace_status backward(const panels *p)
{
    return panels_backward<T>(p, backward_tile<T>, NULL);
}

/* Enough for either direction. */
extern "C" size_t subspace_logits_workspace_cuda(const subspace_ctx *, const subspace_logits_args *a)
{
    size_t forward = 0, backward = 0;
    panels p;
    panels_plan(&p, NULL, a, a->proj, false, NULL, &forward);
    panels_plan(&p, NULL, a, a->proj, true, NULL, &backward);
    return MAX(forward, backward);
}

static subspace_status prepare(subspace_ctx *ctx, const subspace_logits_args *a, bool backward, panels *p)
{
    size_t bytes = 0;
    TRY(subspace_logits_check(ctx, a));
    panels_plan(p, ctx, a, a->proj, backward, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "logits: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, bytes);
    return SUBSPACE_OK;
}

extern "C" subspace_status subspace_logits_cuda(subspace_ctx *ctx, const subspace_logits_args *a)
{
    panels p;
    TRY(prepare(ctx, a, false, &p));
    DISPATCH(a->dtype, forward, &p);
}

extern "C" subspace_status subspace_logits_backward_cuda(subspace_ctx *ctx, const subspace_logits_args *a)
{
    panels p;
    TRY(prepare(ctx, a, true, &p));
    DISPATCH(a->dtype, backward, &p);
}
