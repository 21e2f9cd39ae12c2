/* dropout.h - which entries are dropped: a function of the seed and the entry's place alone, so that
 * the backward draws the forward's mask again. Read by the C and the CUDA kernels.
 *
 * SplitMix64 (Steele, Lea & Flood 2014) in counter mode; the top 24 bits are a uniform float32.
 */
#ifndef SUBSPACE_DROPOUT_H
#define SUBSPACE_DROPOUT_H
#include <stdint.h>

#ifdef __CUDACC__
#define DROPOUT_FN static __host__ __device__ inline
#else
#define DROPOUT_FN static inline
#endif

/* Uniform in [0, 1), a multiple of 2^-24. */
DROPOUT_FN float dropout_uniform(uint64_t seed, uint64_t index)
{
    uint64_t h = seed + (index + 1) * UINT64_C(0x9E3779B97F4A7C15);
    h = (h ^ (h >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    h = (h ^ (h >> 27)) * UINT64_C(0x94D049BB133111EB);
    h ^= h >> 31;
    return (float)(uint32_t)(h >> 40) * 0x1p-24f;
}

/* What an entry is multiplied by: 0, or 1 / (1 - dropout). */
DROPOUT_FN double dropout_factor(uint64_t seed, uint64_t index, double dropout)
{
    return dropout_uniform(seed, index) < (float)dropout ? 0.0 : 1.0 / (1.0 - dropout);
}
#endif
