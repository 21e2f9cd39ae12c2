/* linalg.c - the only caller of OpenBLAS. */
#include "linalg.h"
#include <cblas.h>
#include <stddef.h>

#ifdef SUBSPACE_SCIPY_OPENBLAS /* the PyPI build prefixes every symbol, so it never meets torch's BLAS */
#define cblas_sgemm scipy_cblas_sgemm
#define cblas_dgemm scipy_cblas_dgemm
#define cblas_strsm scipy_cblas_strsm
#define cblas_dtrsm scipy_cblas_dtrsm
#define spotrf_ scipy_spotrf_
#define dpotrf_ scipy_dpotrf_
#define strtri_ scipy_strtri_
#define dtrtri_ scipy_dtrtri_
#define openblas_set_num_threads scipy_openblas_set_num_threads
#define openblas_get_config scipy_openblas_get_config
#endif

/* LAPACK's own, column-major; the last arguments are the lengths of the strings */
void spotrf_(const char *, const int *, float *, const int *, int *, size_t);
void dpotrf_(const char *, const int *, double *, const int *, int *, size_t);
void strtri_(const char *, const char *, const int *, float *, const int *, int *, size_t, size_t);
void dtrtri_(const char *, const char *, const int *, double *, const int *, int *, size_t, size_t);

static CBLAS_TRANSPOSE op(bool trans)
{
    return trans ? CblasTrans : CblasNoTrans;
}

void gemm_f32(bool transa, bool transb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
              const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    if (m == 0 || n == 0) return;
    cblas_sgemm(CblasRowMajor, op(transa), op(transb), (int)m, (int)n, (int)k, alpha, a, (int)lda, b, (int)ldb, beta, c,
                (int)ldc);
}

void gemm_f64(bool transa, bool transb, int64_t m, int64_t n, int64_t k, double alpha, const double *a, int64_t lda,
              const double *b, int64_t ldb, double beta, double *c, int64_t ldc)
{
    if (m == 0 || n == 0) return;
    cblas_dgemm(CblasRowMajor, op(transa), op(transb), (int)m, (int)n, (int)k, alpha, a, (int)lda, b, (int)ldb, beta, c,
                (int)ldc);
}

bool cholesky_f32(int64_t n, float *a, int64_t lda)
{
    int size = (int)n, stride = (int)lda, info = 0;
    if (n > 0) spotrf_("L", &size, a, &stride, &info, 1);
    return info == 0;
}

void solve_f32(bool right, bool trans, int64_t m, int64_t n, const float *u, int64_t ldu, float *b, int64_t ldb)
{
    if (m == 0 || n == 0) return;
    cblas_strsm(CblasRowMajor, right ? CblasRight : CblasLeft, CblasUpper, op(trans), CblasNonUnit, (int)m, (int)n, 1,
                u, (int)ldu, b, (int)ldb);
}

void invert_f32(int64_t n, float *u, int64_t ldu)
{
    int size = (int)n, stride = (int)ldu, info = 0;
    if (n > 0) strtri_("L", "N", &size, u, &stride, &info, 1, 1);
}

bool cholesky_f64(int64_t n, double *a, int64_t lda)
{
    int size = (int)n, stride = (int)lda, info = 0;
    if (n > 0) dpotrf_("L", &size, a, &stride, &info, 1);
    return info == 0;
}

void solve_f64(bool right, bool trans, int64_t m, int64_t n, const double *u, int64_t ldu, double *b, int64_t ldb)
{
    if (m == 0 || n == 0) return;
    cblas_dtrsm(CblasRowMajor, right ? CblasRight : CblasLeft, CblasUpper, op(trans), CblasNonUnit, (int)m, (int)n, 1,
                u, (int)ldu, b, (int)ldb);
}

void invert_f64(int64_t n, double *u, int64_t ldu)
{
    int size = (int)n, stride = (int)ldu, info = 0;
    if (n > 0) dtrtri_("L", "N", &size, u, &stride, &info, 1, 1);
}

void linalg_init(void)
{
    openblas_set_num_threads(1);
}

const char *linalg_version(void)
{
    return openblas_get_config();
}
