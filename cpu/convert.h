/* convert.h - half types to float and back, in loops the compiler vectorises (no F16C needed).
 * float16: the exponent is rebased by one float multiply, which also gets subnormals right.
 * Narrowing rounds to nearest, ties to even, as torch does. Included by whoever has half types; needs nothing. */
#ifndef SUBSPACE_CONVERT_H
#define SUBSPACE_CONVERT_H
#include <stdint.h>
#include <string.h>

static inline float as_f32(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint32_t as_u32(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float bf16_to_f32(uint16_t h)
{
    return as_f32((uint32_t)h << 16);
}

static inline uint16_t f32_to_bf16(float f)
{
    const uint32_t u = as_u32(f);
    const uint32_t nan = (u & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (uint16_t)(nan ? 0x7fc0 : rounded);
}

static inline float f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, body = (uint32_t)(h & 0x7fff) << 13;
    const float value = as_f32(body) * 0x1p112f; /* exponent bias 15 -> 127 */
    const uint32_t special = body >= 0x0f800000; /* inf or NaN keep the largest exponent */
    return as_f32(sign | (special ? body | 0x7f800000 : as_u32(value)));
}

static inline uint16_t f32_to_f16(float f)
{
    const uint32_t u = as_u32(f), sign = (u >> 16) & 0x8000, body = u & 0x7fffffff;
    /* normal: rebase the exponent and round the 13 dropped bits; subnormal: let one float add round */
    const uint32_t normal = (body + 0xfff + ((body >> 13) & 1) - 0x38000000) >> 13;
    const uint32_t subnormal = as_u32(as_f32(body) + 0.5f) - 0x3f000000;
    const uint32_t big = body > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (uint16_t)(sign | (body >= 0x477ff000 ? big : body < 0x38800000 ? subnormal : normal));
}
#endif
