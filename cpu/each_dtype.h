/* each_dtype.h - a file for each precision. One that computes in T includes this with its own name in THIS_FILE where
 * its maths begins: from there on it is read once more for float, and then goes on for double.
 *
 *     #include "cpu.h"
 *     #ifndef T                                       once: includes, types, constants
 *     ...
 *     #define THIS_FILE "family/op.c"
 *     #include "each_dtype.h"
 *     #endif
 *     ...                                             twice: the maths, T float, then T double
 *     #ifdef LAST_T                                   once: the contract, by the functions of both
 *     ...
 *     #endif
 *
 * A header with maths in T is included in the first place for its types ("without T"), in the second for the maths.
 *
 *     T           float            double
 *     FN(name)    name_f32_LEVEL   name_f64_LEVEL
 *     GEMM        gemm_f32         gemm_f64         (linalg.h)
 *     IS_F32      1                0
 *
 * To a debugger and to gcov every line has its own number, and to an editor, which reads the file itself from top to
 * bottom, every type is there before the functions that use it. (clangd wants two things of such a file: that an
 * #include comes before the #ifndef, which is taken for the guard of the whole file else, and a declaration before this
 * include.)
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
#define LAST_T
