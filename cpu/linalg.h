/* linalg.h - the linear algebra we take from OpenBLAS. Every call runs on the calling thread. */
#ifndef SUBSPACE_LINALG_H
#define SUBSPACE_LINALG_H
#include <stdbool.h>
#include <stdint.h>

/* Row-major C[m,n] = alpha op(A) op(B) + beta C, op(A) is [m,k]; C is not read when beta is 0. */
void gemm_f32(bool transa, bool transb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
              const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
void gemm_f64(bool transa, bool transb, int64_t m, int64_t n, int64_t k, double alpha, const double *a, int64_t lda,
              const double *b, int64_t ldb, double beta, double *c, int64_t ldc);

void linalg_init(void);           /* once, at load: our copy of OpenBLAS starts no threads of its own */
const char *linalg_version(void); /* OpenBLAS's own words */
#endif
