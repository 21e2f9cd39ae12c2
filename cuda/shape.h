/* shape.h - for the headers that say how work lies on a GPU, <op>_shape.h, and for cuda.cuh. Plain C: a launcher, its
 * kernels and the tests share them. */
#ifndef SUBSPACE_SHAPE_H
#define SUBSPACE_SHAPE_H
#include <stddef.h>
#include <stdint.h>

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b)-1) / (b))

/* A function for both sides, and for constants where the language has them. */
#ifdef __CUDACC__
#define SHAPE_FN static constexpr __host__ __device__ inline
#elif defined(__cplusplus)
#define SHAPE_FN static constexpr inline
#else
#define SHAPE_FN static inline
#endif

#endif
