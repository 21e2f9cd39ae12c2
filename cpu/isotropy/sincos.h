/* sincos.h - sine and cosine that the compiler vectorises. Included once per precision, by sigreg.c. */
#include "convert.h"
#include "cpu.h"
#ifndef SUBSPACE_SINCOS_H
#define SUBSPACE_SINCOS_H

/* angle = scale x in quarter turns: scale as the sum of two numbers of the type x has */
typedef struct quarter_turns {
    double high, low;
} quarter_turns;

static inline quarter_turns in_quarter_turns(double scale, bool f32)
{
    const double quarters = scale * 0x1.45f306dc9c883p-1; /* 2 / pi */
    const double high = f32 ? (double)(float)quarters : quarters;
    return (quarter_turns){high, quarters - high};
}

#endif
#ifdef T

/* The quarter turns y = scale x are a whole number and r, |r| <= 1/2; adding MAGIC leaves the whole number in the low
 * bits of the mantissa. sin and cos of r are polynomials, float's with the least largest error (2e-9), double's
 * Taylor's; the whole number says which of them is the sine, and the signs. Beyond 2^22 (2^51) quarter turns x has no
 * digits left for an angle, and r is 0; of what is not finite both are NaN. */
static inline void FN(sincos)(T x, T high, T low, T *restrict sine, T *restrict cosine)
{
#if IS_F32
    typedef uint32_t bits;
    const T magic = 0x1.8p23f, most = 0x1p22f;
#else
    typedef uint64_t bits;
    const T magic = 0x1.8p52, most = 0x1p51;
#endif
    const int top = 8 * sizeof(T) - 2;
    const T y = x * high, t = y + magic, whole = t - magic, rest = (x * high - whole) + x * low;
    const T r = fabs(y) < most ? rest : 0 * y, q = r * r;
#if IS_F32
    const T s = r * (0x1.921fb4p0f + q * (-0x1.4abba8p-1f + q * (0x1.465a3ep-4f + q * -0x1.2cf5d4p-8f)));
    const T c = 1 + q * (-0x1.3bd3ccp0f + q * (0x1.03c1dep-2f + q * (-0x1.55c664p-6f + q * 0x1.d9f7bcp-11f)));
#else
    T s = -0x1.6fadb9f155744p-31, c = 0x1.20c62c2f2d7f5p-34;
    s = s * q + 0x1.e8f434d018d63p-25;
    s = s * q - 0x1.e3074fde8871fp-19;
    s = s * q + 0x1.50783487ee782p-13;
    s = s * q - 0x1.32d2cce62bd86p-8;
    s = s * q + 0x1.466bc6775aae2p-4;
    s = s * q - 0x1.4abbce625be53p-1;
    s = s * q + 0x1.921fb54442d18p0;
    s = s * r;
    c = c * q - 0x1.b6e24f44b128fp-28;
    c = c * q + 0x1.f9d38a3763cc3p-22;
    c = c * q - 0x1.a6d1f2a204a8cp-16;
    c = c * q + 0x1.e1f506891babbp-11;
    c = c * q - 0x1.55d3c7e3cbffap-6;
    c = c * q + 0x1.03c1f081b5ac4p-2;
    c = c * q - 0x1.3bd3cc9be45dep0;
    c = c * q + 1;
#endif
    bits turn, sb, cb, odd;
    memcpy(&turn, &t, sizeof t), memcpy(&sb, &s, sizeof s), memcpy(&cb, &c, sizeof c);
    odd = -(turn & 1); /* an odd number of quarter turns changes one for the other */
    const bits swap = (sb ^ cb) & odd, one = sb ^ swap ^ ((turn & 2) << (top)),
               other = cb ^ swap ^ (((turn + 1) & 2) << (top));
    memcpy(sine, &one, sizeof one), memcpy(cosine, &other, sizeof other);
}

#endif
