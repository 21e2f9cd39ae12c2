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
    }
HALF_TYPE(__half, f16_to_f32, f32_to_f16);
HALF_TYPE(__nv_bfloat16, bf16_to_f32, f32_to_bf16);
#undef HALF_TYPE

#endif
