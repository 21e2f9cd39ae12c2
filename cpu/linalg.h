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

/* Cholesky A = U'U of a row-major matrix, of which the upper half is read and overwritten; false: not positive
 * definite. (Column-major this is the lower triangle, which OpenBLAS factors faster.) */
bool cholesky_f32(int64_t n, float *a, int64_t lda);
bool cholesky_f64(int64_t n, double *a, int64_t lda);

/* Row-major X with X op(U) = B (right) or op(U) X = B (left), U upper triangular; B [m,n] becomes X. */
void solve_f32(bool right, bool trans, int64_t m, int64_t n, const float *u, int64_t ldu, float *b, int64_t ldb);
void solve_f64(bool right, bool trans, int64_t m, int64_t n, const double *u, int64_t ldu, double *b, int64_t ldb);

/* U becomes its inverse, which is upper triangular too; the lower half is not touched. */
void invert_f32(int64_t n, float *u, int64_t ldu);
void invert_f64(int64_t n, double *u, int64_t ldu);

void linalg_init(void);           /* once, at load: our copy of OpenBLAS starts no threads of its own */
const char *linalg_version(void); /* OpenBLAS's own words */
#endif
