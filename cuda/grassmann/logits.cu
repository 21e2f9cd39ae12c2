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
__global__ void __launch_bounds__(EPILOGUE_THREADS)
    write_logits(tile t, view<acc_t<T>> v, const acc_t<T> *z, int64_t ldz, T *logits, int64_t classes)
{
    __shared__ acc_t<T> y[CLASSES][BATCH + 4];
    const int64_t c0 = t.c0 + (int64_t)blockIdx.x * CLASSES, i0 = (int64_t)blockIdx.y * BATCH;
    const int64_t c = c0 + threadIdx.y, i = i0 + 4 * threadIdx.x;
    if (i < t.nb && c < t.c1) {
        projections<acc_t<T>> p;
        panels_read(t, v, z, ldz, c, i, &p);
        for (int j = 0; j < 4; j++) y[threadIdx.y][4 * threadIdx.x + j] = v.gamma * p.norm.v[j];
    }
    __syncthreads();
    panels_scatter(t, c0, i0, y, logits, classes);
}

template <typename T>
__global__ void __launch_bounds__(EPILOGUE_THREADS)
    make_dz(tile t, view<acc_t<T>> v, const acc_t<T> *z, int64_t ldz, const T *dlogits, int64_t classes, T *dz)
{
    __shared__ acc_t<T> dy[CLASSES][BATCH + 4];
    const int64_t c0 = t.c0 + (int64_t)blockIdx.x * CLASSES, i0 = (int64_t)blockIdx.y * BATCH;
    const int64_t c = c0 + threadIdx.y, i = i0 + 4 * threadIdx.x;
    projections<acc_t<T>> p;
    if (i < t.nb && c < t.c1) panels_read(t, v, z, ldz, c, i, &p); /* on its way beside dlogits */
    panels_gather(t, c0, i0, dy, dlogits, classes);
    if (i < t.nb && c < t.c1) panels_write(t, v, p, &dy[threadIdx.y][4 * threadIdx.x], z, ldz, c, i, dz);
}

template <typename T>
static subspace_status forward_tile(void *, const panels *p, const tile *t, const void *z, int64_t ldz, void *)
{
    LAUNCH(p->ctx, write_logits<T>, panels_grid(t, CLASSES), panels_block(), 0, *t, view_of<T>(p), (const acc_t<T> *)z,
           ldz, (T *)p->a->logits, p->a->c);
    return SUBSPACE_OK;
}

template <typename T>
static subspace_status backward_tile(void *, const panels *p, const tile *t, const void *z, int64_t ldz, void *dz)
{
    LAUNCH(p->ctx, make_dz<T>, panels_grid(t, CLASSES), panels_block(), 0, *t, view_of<T>(p), (const acc_t<T> *)z, ldz,
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
