// blas.cpp - cuBLAS's products on OpenBLAS. Half types are widened, summed in float32 and rounded once.
#include "cublas_v2.h"
#include "half.h"
#include <algorithm>
#include <vector>

extern "C" {
#include "linalg.h"
}

static size_t item(cudaDataType type)
{
    return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2;
}

static float load(const void *p, cudaDataType type, int64_t i)
{
    if (type == CUDA_R_16F) return static_cast<const __half *>(p)[i];
    return type == CUDA_R_16BF ? static_cast<float>(static_cast<const __nv_bfloat16 *>(p)[i])
                               : static_cast<const float *>(p)[i];
}

static void store(void *p, cudaDataType type, int64_t i, float value)
{
    if (type == CUDA_R_16F) static_cast<__half *>(p)[i] = value;
    else if (type == CUDA_R_16BF) static_cast<__nv_bfloat16 *>(p)[i] = value;
    else static_cast<float *>(p)[i] = value;
}

// `rows` rows of `cols` entries, dense
static std::vector<float> widened(const void *p, cudaDataType type, int64_t rows, int64_t cols, int64_t ld)
{
    std::vector<float> wide(static_cast<size_t>(rows * cols));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) wide[i * cols + j] = load(p, type, i * ld + j);
    return wide;
}

const char *cublasGetStatusString(cublasStatus_t status)
{
    return status == CUBLAS_STATUS_SUCCESS         ? "CUBLAS_STATUS_SUCCESS"
           : status == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                                   : "CUBLAS_STATUS_INVALID_VALUE";
}

// Column-major C = op(A) op(B) is row-major C' = op(B)' op(A)'.
cublasStatus_t cublasGemmEx_64(cublasHandle_t, cublasOperation_t opa, cublasOperation_t opb, int64_t m, int64_t n,
                               int64_t k, const void *alpha, const void *a, cudaDataType ta, int64_t lda, const void *b,
                               cudaDataType tb, int64_t ldb, const void *beta, void *c, cudaDataType tc, int64_t ldc,
                               cublasComputeType_t compute, cublasGemmAlgo_t)
{
    const bool f64 = ta == CUDA_R_64F, ta_ = opa == CUBLAS_OP_T, tb_ = opb == CUBLAS_OP_T;
    if (m < 0 || n < 0 || k < 0 || lda < std::max<int64_t>(1, ta_ ? k : m) || ldb < std::max<int64_t>(1, tb_ ? n : k) ||
        ldc < std::max<int64_t>(1, m))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (ta != tb || f64 != (tc == CUDA_R_64F) || f64 != (compute == CUBLAS_COMPUTE_64F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (item(tc) < item(ta) || (item(tc) == item(ta) && tc != ta)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (f64) {
        gemm_f64(tb_, ta_, n, m, k, *static_cast<const double *>(alpha), static_cast<const double *>(b), ldb,
                 static_cast<const double *>(a), lda, *static_cast<const double *>(beta), static_cast<double *>(c),
                 ldc);
        return CUBLAS_STATUS_SUCCESS;
    }
    const float alpha32 = *static_cast<const float *>(alpha), beta32 = *static_cast<const float *>(beta);
    if (ta == CUDA_R_32F) {
        gemm_f32(tb_, ta_, n, m, k, alpha32, static_cast<const float *>(b), ldb, static_cast<const float *>(a), lda,
                 beta32, static_cast<float *>(c), ldc);
        return CUBLAS_STATUS_SUCCESS;
    }
    const int64_t rows_a = ta_ ? m : k, cols_a = ta_ ? k : m, rows_b = tb_ ? k : n, cols_b = tb_ ? n : k;
    const std::vector<float> wa = widened(a, ta, rows_a, cols_a, lda), wb = widened(b, tb, rows_b, cols_b, ldb);
    std::vector<float> wc = beta32 != 0 ? widened(c, tc, n, m, ldc) : std::vector<float>(static_cast<size_t>(m * n));
    gemm_f32(tb_, ta_, n, m, k, alpha32, wb.data(), std::max<int64_t>(cols_b, 1), wa.data(),
             std::max<int64_t>(cols_a, 1), beta32, wc.data(), std::max<int64_t>(m, 1));
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < m; i++) store(c, tc, j * ldc + i, wc[j * m + i]);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmStridedBatchedEx_64(cublasHandle_t handle, cublasOperation_t opa, cublasOperation_t opb,
                                             int64_t m, int64_t n, int64_t k, const void *alpha, const void *a,
                                             cudaDataType ta, int64_t lda, long long stride_a, const void *b,
                                             cudaDataType tb, int64_t ldb, long long stride_b, const void *beta,
                                             void *c, cudaDataType tc, int64_t ldc, long long stride_c, int64_t count,
                                             cublasComputeType_t compute, cublasGemmAlgo_t algo)
{
    for (int64_t i = 0; i < count; i++) {
        const cublasStatus_t status = cublasGemmEx_64(
            handle, opa, opb, m, n, k, alpha, static_cast<const char *>(a) + i * stride_a * (int64_t)item(ta), ta, lda,
            static_cast<const char *>(b) + i * stride_b * (int64_t)item(tb), tb, ldb, beta,
            static_cast<char *>(c) + i * stride_c * (int64_t)item(tc), tc, ldc, compute, algo);
        if (status != CUBLAS_STATUS_SUCCESS) return status;
    }
    return CUBLAS_STATUS_SUCCESS;
}
