/* each_dtype.h - compile the second half of THIS_FILE for float, then for double.
 *
 *     T           float            double
 *     FN(name)    name_f32_LEVEL   name_f64_LEVEL
 *     GEMM        gemm_f32         gemm_f64         (linalg.h)
 *     IS_F32      1                0
 */
#define T float
#define FN(name) LEVEL(name##_f32)
#define GEMM gemm_f32
#define IS_F32 1
#include THIS_FILE
#undef T
#undef FN
#undef GEMM
#undef IS_F32

#define T double
#define FN(name) LEVEL(name##_f64)
#define GEMM gemm_f64
#define IS_F32 0
#include THIS_FILE
#undef T
#undef FN
#undef GEMM
#undef IS_F32
