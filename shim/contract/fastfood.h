/* fastfood.h - the signs, the permutation and the normal numbers of fastfood: functions of the seed and the place
 * alone, with the same bits on every device and in every version. Read by the C and the CUDA kernels.
 *
 * Philox4x32-10 (Salmon et al. 2011) as torch defines it: the key is the seed, the counter (place, stream). The
 * compiler must not join a product and a sum here: fastfood.c is compiled with -ffp-contract=off.
 */
#ifndef SUBSPACE_FASTFOOD_H
#define SUBSPACE_FASTFOOD_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FASTFOOD_FN static __host__ __device__ inline
#else
#define FASTFOOD_FN static inline
#endif

#ifdef __CUDA_ARCH__
#define TIMES(a, b) __fmul_rn(a, b)
#define PLUS(a, b) __fadd_rn(a, b)
#define ROOT(a) __fsqrt_rn(a)
#else
#define TIMES(a, b) ((a) * (b))
#define PLUS(a, b) ((a) + (b))
#define ROOT(a) sqrtf(a)
#endif

#define FASTFOOD_KEY0 0x9E3779B9u
#define FASTFOOD_KEY1 0xBB67AE85u
enum { FASTFOOD_SIGNS, FASTFOOD_NORMALS, FASTFOOD_ORDER }; /* streams */
enum { FASTFOOD_ROUNDS = 8, FASTFOOD_MOST_ROUNDS = 32 };   /* few bits mix slowly: below 8 all of them are made */

typedef struct fastfood_order { /* of 2^bits places; times is odd */
    int bits, rounds;
    uint32_t times[FASTFOOD_MOST_ROUNDS], plus[FASTFOOD_MOST_ROUNDS];
    uint32_t back[FASTFOOD_MOST_ROUNDS]; /* times back = 1 */
} fastfood_order;

/* A round of a counter's four words; the key grows by its constants after each of the ten. */
FASTFOOD_FN void fastfood_philox(uint32_t key0, uint32_t key1, uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d)
{
    const uint64_t x = UINT64_C(0xD2511F53) * *a, y = UINT64_C(0xCD9E8D57) * *c;
    *a = (uint32_t)(y >> 32) ^ *b ^ key0, *b = (uint32_t)y;
    *c = (uint32_t)(x >> 32) ^ *d ^ key1, *d = (uint32_t)x;
}

FASTFOOD_FN void fastfood_words(uint64_t seed, uint32_t place, uint32_t stream, uint32_t word[4])
{
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    word[0] = place, word[1] = 0, word[2] = stream, word[3] = 0;
    for (int round = 0; round < 10; round++, key0 += FASTFOOD_KEY0, key1 += FASTFOOD_KEY1)
        fastfood_philox(key0, key1, &word[0], &word[1], &word[2], &word[3]);
}

/* B: bit j % 32 of word j / 32 % 4 of the signs' words at j / 128; 1 is a minus. */

/* G: entries 4 i .. 4 i + 3 are of the words of the normals at i: (0, 1) make two of them, (2, 3) the others, by Box
 * and Muller's radius and angle. They are odd multiples of 2^-18 up to 6.6: none is 0, and 2^36 times the sum of their
 * squares is a whole number below 2^64, whatever the order it is added up in. Returned are the multiples. */
FASTFOOD_FN void fastfood_normals(uint32_t a, uint32_t b, int32_t *first, int32_t *second)
{
    /* u in (0, 1): 31 bits, rounded; u = 2^e m, 1/2 <= m^2 < 2, ln m by Cephes' polynomial */
    const float whole = TIMES((float)(int32_t)(a >> 1 | 1), 0x1p-31f), most = 0x1.fffffep-1f;
    const float u = whole < most ? whole : most;
    uint32_t bits;
    memcpy(&bits, &u, sizeof bits);
    const int32_t e = (int32_t)(bits - 0x3f3504f3u) >> 23;
    const uint32_t mantissa = bits - ((uint32_t)e << 23);
    float m;
    memcpy(&m, &mantissa, sizeof m);
    const float x = m - 1, xx = TIMES(x, x), power = (float)e;
    float log = 7.0376836292e-2f;
    log = PLUS(TIMES(log, x), -1.1514610310e-1f);
    log = PLUS(TIMES(log, x), 1.1676998740e-1f);
    log = PLUS(TIMES(log, x), -1.2420140846e-1f);
    log = PLUS(TIMES(log, x), 1.4249322787e-1f);
    log = PLUS(TIMES(log, x), -1.6668057665e-1f);
    log = PLUS(TIMES(log, x), 2.0000714765e-1f);
    log = PLUS(TIMES(log, x), -2.4999993993e-1f);
    log = PLUS(TIMES(log, x), 3.3333331174e-1f);
    log = PLUS(TIMES(TIMES(log, x), xx), TIMES(power, -2.12194440e-4f));
    log = PLUS(PLUS(log, TIMES(xx, -0.5f)), x);
    log = PLUS(log, TIMES(power, 0.693359375f));
    const float radius = TIMES(ROOT(TIMES(log, -2.f)), 0x1p18f);
    /* an angle of t eighths of a turn, 0 < t < 1: sine and cosine by Taylor's polynomials; three bits say which eighth
     */
    const float t = TIMES((float)(int32_t)((b & 0x7fffff) << 1 | 1), 0x1p-24f), tt = TIMES(t, t);
    float sine = 3.13361689037812e-7f, cosine = 3.59086044859151e-6f;
    sine = PLUS(TIMES(sine, tt), -3.65762041821772e-5f);
    sine = PLUS(TIMES(sine, tt), 2.49039457019272e-3f);
    sine = PLUS(TIMES(sine, tt), -8.07455121882808e-2f);
    sine = TIMES(PLUS(TIMES(sine, tt), 7.85398163397448e-1f), t);
    cosine = PLUS(TIMES(cosine, tt), -3.25991886927390e-4f);
    cosine = PLUS(TIMES(cosine, tt), 1.58543442438155e-2f);
    cosine = PLUS(TIMES(cosine, tt), -3.08425137534042e-1f);
    cosine = PLUS(TIMES(cosine, tt), 1.f);
    const int32_t along = (int32_t)TIMES(radius, cosine) | 1, across = (int32_t)TIMES(radius, sine) | 1;
    const int32_t swap = (along ^ across) & -(int32_t)(b >> 29 & 1);
    const int32_t minus0 = -(int32_t)(b >> 31), minus1 = -(int32_t)(b >> 30 & 1);
    *first = ((along ^ swap) ^ minus0) - minus0;
    *second = ((across ^ swap) ^ minus1) - minus1;
}

/* Pi: entry i is taken from place pi(i). Each round is a bijection of the numbers of `bits` bits: an odd multiple and a
 * sum carry what is low upwards, a shift by half of the bits or more, its own inverse, what is high down. */
FASTFOOD_FN fastfood_order fastfood_order_of(uint64_t seed, int bits)
{
    fastfood_order order;
    order.bits = bits, order.rounds = bits < 8 ? FASTFOOD_MOST_ROUNDS : FASTFOOD_ROUNDS;
    for (int round = 0; round < order.rounds; round++) {
        uint32_t word[4];
        fastfood_words(seed, (uint32_t)round, FASTFOOD_ORDER, word);
        const uint32_t times = word[0] | 1;
        uint32_t back = times; /* right in three bits; each step of Newton's doubles them */
        for (int step = 0; step < 4; step++) back *= 2 - times * back;
        order.times[round] = times, order.plus[round] = word[1], order.back[round] = back;
    }
    return order;
}

FASTFOOD_FN uint32_t fastfood_round(const fastfood_order *order, int round, uint32_t i)
{
    i = (i * order->times[round] + order->plus[round]) & (((uint32_t)1 << order->bits) - 1);
    return i ^ i >> (order->bits + 1) / 2;
}

FASTFOOD_FN uint32_t fastfood_round_back(const fastfood_order *order, int round, uint32_t i)
{
    i ^= i >> (order->bits + 1) / 2;
    return (i - order->plus[round]) * order->back[round] & (((uint32_t)1 << order->bits) - 1);
}

FASTFOOD_FN uint32_t fastfood_pi(const fastfood_order *order, uint32_t i)
{
    for (int round = 0; round < order->rounds; round++) i = fastfood_round(order, round, i);
    return i;
}

FASTFOOD_FN uint32_t fastfood_pi_inverse(const fastfood_order *order, uint32_t i)
{
    for (int round = order->rounds - 1; round >= 0; round--) i = fastfood_round_back(order, round, i);
    return i;
}

#endif
