/* product.cu - matrix products of a low-rank step, on the GPU: cuBLAS, all matrices of a stack at once.
 *
 *     y <- scale op(a) op(b) + add y
 *
 * float32 in full, whatever torch's TF32 switch says. Python takes torch's own products there.
 */
#include "linalg.cuh"

extern "C" size_t subspace_product_workspace_cuda(const subspace_ctx *, const subspace_product_args *)
{
    return 0;
}

extern "C" subspace_status subspace_product_cuda(subspace_ctx *ctx, const subspace_product_args *a)
{
    TRY(subspace_product_check(ctx, a));
    gemms g = {};
    g.m = a->m, g.n = a->n, g.k = a->k, g.count = a->v;
    g.transa = a->transa, g.transb = a->transb, g.exact = true;
    g.ab = g.cc = a->dtype, g.alpha = a->scale, g.beta = a->add;
    g.a = a->a, g.b = a->b, g.c = a->y;
    g.lda = MAX(1, a->transa ? a->m : a->k), g.ldb = MAX(1, a->transb ? a->k : a->n), g.ldc = a->n;
    g.stride_a = a->m * a->k, g.stride_b = a->shared ? 0 : a->k * a->n, g.stride_c = a->m * a->n;
    return gemm_all(ctx, &g);
}
