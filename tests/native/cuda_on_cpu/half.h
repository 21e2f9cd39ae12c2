// half.h - the two half types as storage that converts to and from float, rounding to nearest, ties to even.
#ifndef SUBSPACE_CUDA_ON_CPU_HALF_H
#define SUBSPACE_CUDA_ON_CPU_HALF_H
#include "convert.h"

#define HALF_TYPE(name, widen, narrow)                                                                                 \
    struct name {                                                                                                      \
        uint16_t bits;                                                                                                 \
        name() = default;                                                                                              \
        name(float v) : bits(narrow(v)) {}                                                                             \
        explicit name(double v) : bits(narrow(static_cast<float>(v))) {}                                               \
        explicit name(int v) : bits(narrow(static_cast<float>(v))) {}                                                  \
        operator float() const                                                                                         \
        {                                                                                                              \
            return widen(bits);                                                                                        \
        }                                                                                                              \
    };                                                                                                                 \
    struct __attribute__((aligned(4))) name##2                                                                         \
    {                                                                                                                  \
        name x, y;                                                                                                     \
    }
HALF_TYPE(__half, f16_to_f32, f32_to_f16);
HALF_TYPE(__nv_bfloat16, bf16_to_f32, f32_to_bf16);
#undef HALF_TYPE

static inline float __half2float(__half h)
{
    return h;
}
static inline __half __float2half(float f)
{
    return f;
}
static inline __half __float2half_rn(float f)
{
    return f;
}
static inline float __bfloat162float(__nv_bfloat16 h)
{
    return h;
}
static inline __nv_bfloat16 __float2bfloat16(float f)
{
    return f;
}
static inline __nv_bfloat16 __float2bfloat16_rn(float f)
{
    return f;
}
#endif
