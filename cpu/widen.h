/* widen.h - entries of any dtype as what we compute in. Included by whoever has half types, once per precision. */
#include "convert.h"
#include "cpu.h"
#ifdef T

/* dst = src[at ..], `count` of them */
static void FN(widen)(subspace_dtype dtype, const void *src, int64_t at, int64_t count, T *restrict dst)
{
    const uint16_t *h = (const uint16_t *)src + at;
    if (dtype == SUBSPACE_F16)
        for (int64_t i = 0; i < count; i++) dst[i] = f16_to_f32(h[i]);
    else if (dtype == SUBSPACE_BF16)
        for (int64_t i = 0; i < count; i++) dst[i] = bf16_to_f32(h[i]);
    else memcpy(dst, (const T *)src + at, (size_t)count * sizeof(T));
}

#endif
