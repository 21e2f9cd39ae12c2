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
subspace_status gemm(subspace_ctx *ctx, bool transa, bool transb, int64_t m, int64_t n, int64_t k, subspace_dtype ab,
                     const void *a, int64_t lda, const void *b, int64_t ldb, double beta, subspace_dtype cc, void *c,
                     int64_t ldc)
{
    const bool f64 = ab == SUBSPACE_F64;
    const double one64 = 1;
    const float one32 = 1, beta32 = (float)beta;
    const cublasStatus_t status =
        cublasGemmEx((cublasHandle_t)ctx->blas, transb ? CUBLAS_OP_T : CUBLAS_OP_N, transa ? CUBLAS_OP_T : CUBLAS_OP_N,
                     (int)n, (int)m, (int)k, f64 ? (const void *)&one64 : &one32, b, type_of(ab), (int)ldb, a,
                     type_of(ab), (int)lda, f64 ? (const void *)&beta : &beta32, c, type_of(cc), (int)ldc,
                     f64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    CHECK(ctx, status == CUBLAS_STATUS_SUCCESS, SUBSPACE_BLAS, "gemm of %lld x %lld x %lld: %s", (long long)m,
          (long long)n, (long long)k, cublasGetStatusString(status));
    return SUBSPACE_OK;
}
