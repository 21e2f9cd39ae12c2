/* sums.h - the sums of the lanes of several vectors at once. Included once per precision, by rates/factor.h and
 * grassmann/rsgd.h, after their FN(vec) and FN(LANES). */
#include "cpu.h"
#ifdef T

/* Of v and w lane j of the one whose half it is, by bit h of j; and the lane that is to be added to it. */
#undef STAYS
#undef COMES
#undef EVERY_LANE
#define STAYS(j, h) (j) + ((j) & (h) ? FN(LANES) : 0)
#define COMES(j, h) ((j) ^ (h)) + ((j) & (h) ? FN(LANES) : 0)
#if VECTOR / (IS_F32 ? 4 : 8) == 16
#define EVERY_LANE(F, h)                                                                                               \
    F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h), F(8, h), F(9, h), F(10, h), F(11, h),      \
        F(12, h), F(13, h), F(14, h), F(15, h)
#elif VECTOR / (IS_F32 ? 4 : 8) == 8
#define EVERY_LANE(F, h) F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h)
#elif VECTOR / (IS_F32 ? 4 : 8) == 4
#define EVERY_LANE(F, h) F(0, h), F(1, h), F(2, h), F(3, h)
#else
#define EVERY_LANE(F, h) F(0, h), F(1, h)
#endif

/* Lane i of the result is the sum of the lanes of v[i], of LANES vectors; v is overwritten. */
static inline __attribute__((always_inline)) FN(vec) FN(sums)(FN(vec) *v)
{
#define HALVE(half)                                                                                                    \
    if (FN(LANES) > (half))                                                                                            \
        _Pragma("GCC unroll 8") for (int i = 0; i < (half); i++) v[i] =                                                \
            __builtin_shufflevector(v[i], v[i + (half)], EVERY_LANE(STAYS, (half) & (FN(LANES) - 1))) +                \
            __builtin_shufflevector(v[i], v[i + (half)], EVERY_LANE(COMES, (half) & (FN(LANES) - 1)));
    HALVE(8)
    HALVE(4)
    HALVE(2)
    HALVE(1)
#undef HALVE
    return v[0];
}

#endif
