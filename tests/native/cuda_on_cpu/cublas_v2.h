// cublas_v2.h - the two products of cuBLAS that cuda/linalg.cu calls, on OpenBLAS: see blas.cpp.
#ifndef SUBSPACE_CUDA_ON_CPU_CUBLAS_H
#define SUBSPACE_CUDA_ON_CPU_CUBLAS_H
#include <cstdint>

typedef enum cudaDataType_t { CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF } cudaDataType;
typedef enum {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
} cublasStatus_t;
typedef enum { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC, CUBLAS_COMPUTE_64F } cublasComputeType_t;
typedef enum { CUBLAS_GEMM_DEFAULT } cublasGemmAlgo_t;
typedef struct cublasContext *cublasHandle_t;

const char *cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasGemmEx_64(cublasHandle_t, cublasOperation_t, cublasOperation_t, int64_t m, int64_t n, int64_t k,
                               const void *alpha, const void *a, cudaDataType, int64_t lda, const void *b, cudaDataType,
                               int64_t ldb, const void *beta, void *c, cudaDataType, int64_t ldc, cublasComputeType_t,
                               cublasGemmAlgo_t);
cublasStatus_t cublasGemmStridedBatchedEx_64(cublasHandle_t, cublasOperation_t, cublasOperation_t, int64_t m, int64_t n,
                                             int64_t k, const void *alpha, const void *a, cudaDataType, int64_t lda,
                                             long long stride_a, const void *b, cudaDataType, int64_t ldb,
                                             long long stride_b, const void *beta, void *c, cudaDataType, int64_t ldc,
                                             long long stride_c, int64_t count, cublasComputeType_t, cublasGemmAlgo_t);
#endif
