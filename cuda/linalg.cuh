/* linalg.cuh - the linear algebra we take from cuBLAS. Included by whoever calls it; no kernel does. */
#ifndef SUBSPACE_LINALG_CUH
#define SUBSPACE_LINALG_CUH
#include "cuda.cuh"

/* Row-major C[m,n] = op(A) op(B) + beta C, op(A) is [m,k]; C is not read when beta is 0. A and B are
 * of type `ab`, C of `ab` or float32. Half types are summed in float32; float32 follows the math
 * mode of the caller's handle, that is torch's own TF32 switch. */
subspace_status gemm(subspace_ctx *ctx, bool transa, bool transb, int64_t m, int64_t n, int64_t k, subspace_dtype ab,
                     const void *a, int64_t lda, const void *b, int64_t ldb, double beta, subspace_dtype cc, void *c,
                     int64_t ldc);

/* `count` such products C = alpha op(A) op(B) + beta C at once, each matrix `stride` entries behind the one before;
 * a stride of 0 for A or B is one matrix for all. `exact`: float32 in full, whatever torch's TF32 switch says. */
typedef struct gemms {
    int64_t m, n, k, count;
    bool transa, transb, exact;
    subspace_dtype ab, cc;
    double alpha, beta;
    const void *a, *b;
    void *c;
    int64_t lda, ldb, ldc, stride_a, stride_b, stride_c;
} gemms;

subspace_status gemm_all(subspace_ctx *ctx, const gemms *g);

#endif
