/* linalg.cu - the only caller of cuBLAS. The handle comes with its stream, workspace and math mode
 * set by its owner; cublasSetStream here would throw torch's workspace away. */
#include <cublas_v2.h>
#include "linalg.cuh"

static cudaDataType type_of(subspace_dtype dtype)
{
    static const cudaDataType types[] = {CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF};
    return types[dtype];
}

/* cuBLAS is column-major: its C' = op(B)' op(A)' is our C. */
subspace_status gemm_all(subspace_ctx *ctx, const gemms *g)
{
    const bool f64 = g->ab == SUBSPACE_F64;
    const float alpha32 = (float)g->alpha, beta32 = (float)g->beta;
    const void *alpha = f64 ? (const void *)&g->alpha : &alpha32, *beta = f64 ? (const void *)&g->beta : &beta32;
    const cublasComputeType_t compute = f64                           ? CUBLAS_COMPUTE_64F
                                        : g->exact && !is_half(g->ab) ? CUBLAS_COMPUTE_32F_PEDANTIC
                                                                      : CUBLAS_COMPUTE_32F;
    const cublasOperation_t opa = g->transa ? CUBLAS_OP_T : CUBLAS_OP_N, opb = g->transb ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasHandle_t handle = (cublasHandle_t)ctx->blas;
    if (g->m == 0 || g->n == 0 || g->count == 0) return SUBSPACE_OK;
    const cublasStatus_t status =
        g->count == 1 ? cublasGemmEx_64(handle, opb, opa, g->n, g->m, g->k, alpha, g->b, type_of(g->ab), MAX(g->ldb, 1),
                                        g->a, type_of(g->ab), MAX(g->lda, 1), beta, g->c, type_of(g->cc), g->ldc,
                                        compute, CUBLAS_GEMM_DEFAULT)
                      : cublasGemmStridedBatchedEx_64(handle, opb, opa, g->n, g->m, g->k, alpha, g->b, type_of(g->ab),
                                                      MAX(g->ldb, 1), g->stride_b, g->a, type_of(g->ab), g->lda,
                                                      g->stride_a, beta, g->c, type_of(g->cc), g->ldc, g->stride_c,
                                                      g->count, compute, CUBLAS_GEMM_DEFAULT);
    CHECK(ctx, status == CUBLAS_STATUS_SUCCESS, SUBSPACE_BLAS, "%lld products of %lld x %lld x %lld: %s",
          (long long)g->count, (long long)g->m, (long long)g->n, (long long)g->k, cublasGetStatusString(status));
    return SUBSPACE_OK;
}

subspace_status gemm(subspace_ctx *ctx, bool transa, bool transb, int64_t m, int64_t n, int64_t k, subspace_dtype ab,
                     const void *a, int64_t lda, const void *b, int64_t ldb, double beta, subspace_dtype cc, void *c,
                     int64_t ldc)
{
    const gemms g = {m, n, k, 1, transa, transb, false, ab, cc, 1, beta, a, b, c, lda, ldb, ldc, 0, 0, 0};
    return gemm_all(ctx, &g);
}
