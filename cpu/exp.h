/* exp.h - an exponential that the compiler vectorises. Included once per precision, by cross_entropy.c and
 * sinkhorn_gibbs.h. */
#include "convert.h"
#include "cpu.h"
#ifdef T

/* exp(x) for x <= 0: x = m log 2 + r, |r| <= log(2)/2, a Taylor polynomial, the exponent added in
 * bits. Adding MAGIC leaves m in the low bits of the mantissa. Relative error below 2 ulp. */
#if IS_F32
static inline T FN(exp_)(T x)
{
    const float magic = 0x1.8p23f;
    x = x < -87.0f ? -87.0f : x;
    const float t = x * 0x1.715476p0f + magic, m = t - magic;
    const float r = (x - m * 0x1.62e4p-1f) - m * 0x1.7f7d1c0000000p-20f;
    const float p =
        1 + r * (1 + r * (1.f / 2 + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720 + r / 5040))))));
    return as_f32(as_u32(p) + (as_u32(t) << 23));
}
#else
static inline T FN(exp_)(T x)
{
    const double magic = 0x1.8p52;
    uint64_t bits, shift;
    x = x < -708.0 ? -708.0 : x;
    const double t = x * 0x1.71547652b82fep0 + magic, m = t - magic;
    const double r = (x - m * 0x1.62e42fefa2000p-1) - m * 0x1.9ef35793c7673p-41;
    double p = 1. / 6227020800.;
    p = p * r + 1. / 479001600.;
    p = p * r + 1. / 39916800.;
    p = p * r + 1. / 3628800.;
    p = p * r + 1. / 362880.;
    p = p * r + 1. / 40320.;
    p = p * r + 1. / 5040.;
    p = p * r + 1. / 720.;
    p = p * r + 1. / 120.;
    p = p * r + 1. / 24.;
    p = p * r + 1. / 6.;
    p = p * r + 1. / 2.;
    p = p * r + 1.;
    p = p * r + 1.;
    memcpy(&bits, &p, 8), memcpy(&shift, &t, 8);
    bits += shift << 52;
    memcpy(&p, &bits, 8);
    return p;
}
#endif

#endif
