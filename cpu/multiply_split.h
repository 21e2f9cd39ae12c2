/* multiply_split.h - multiply.h's product of float32 by three products of bf16, where a processor has tiles (AMX).
 *
 *     x = x1 + x2 + rest, x1 and x2 bf16, |x2| <= 2^-8 |x|, |rest| <= 2^-17 |x|       C (+)= A1 B2 + A1 B1 + A2 B1
 *
 * What is left out, A2 B2 and the rests, is some 2^-16 of |A| |B|, of either sign. Numbers below 1.2e-38 count as 0,
 * also as second parts: bits are lost below 1e-33. An infinity, and what rounds to one (from 3.396e38 on), gives NaN,
 * as its products with both parts may differ in sign. Both parts of both factors are packed as pairs, as
 * multiply_pairs.h has them; each loaded tile is used twice or more.
 *
 * Included once by panels.c, for float, behind multiply_pairs.h.
 */
#include "cpu.h"

enum { SPLIT_DEPTH = 128 }; /* pairs of a block: both parts of 32 rows of A take 32 KiB */
_Static_assert(2 * SPLIT_DEPTH <= MULTIPLY_DEPTH, "both parts of a block of B fit where multiply has one");

/* The parts of a vector, in the lower halves of the lanes. */
static inline __attribute__((always_inline)) MULTIPLIES_PAIRS void split(__m512 x, __m512i *first, __m512i *second)
{
    *first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    const __m512 near = (__m512)_mm512_slli_epi32(*first, 16);
    const __m512 rest = _mm512_sub_ps(x, near);
    *second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest));
}

/* Of two vectors the pairs. */
static inline __attribute__((always_inline)) MULTIPLIES_PAIRS void split_pairs(__m512 even, __m512 odd, __m512i *first,
                                                                               __m512i *second)
{
    __m512i p, q;
    split(even, first, second), split(odd, &p, &q);
    *first = _mm512_or_si512(*first, _mm512_slli_epi32(p, 16));
    *second = _mm512_or_si512(*second, _mm512_slli_epi32(q, 16));
}

/* pack_pairs of the parts of `rows` rows of b: the second part `apart` after the first. */
static MULTIPLIES_PAIRS void pack_split(const float *b, int64_t ldb, int64_t rows, int64_t cols, int64_t depth,
                                        int64_t apart, uint32_t *restrict out)
{
    for (int64_t l = 0; l < depth; l++) {
        const float *even = b + MIN(2 * l, rows - 1) * ldb, *odd = b + MIN(2 * l + 1, rows - 1) * ldb;
        const __mmask16 has_even = 2 * l < rows ? 0xffff : 0, has_odd = 2 * l + 1 < rows ? 0xffff : 0;
        for (int64_t j = 0; j < cols; j += PAIR_STRIP) {
            const int64_t width = MIN(PAIR_STRIP, CEIL_DIV(cols - j, TILE) * TILE);
            for (int64_t v = 0; v < width; v += TILE) {
                const __mmask16 mask = (__mmask16)(cols - j - v >= TILE ? 0xffff : 0xffff >> (TILE - (cols - j - v)));
                __m512i first, second;
                split_pairs(_mm512_maskz_loadu_ps(mask & has_even, even + j + v),
                            _mm512_maskz_loadu_ps(mask & has_odd, odd + j + v), &first, &second);
                _mm512_storeu_si512(out + j * depth + l * width + v, first);
                _mm512_storeu_si512(out + apart + j * depth + l * width + v, second);
            }
        }
    }
}

/* Up to 32 rows of A, `length` of its columns, as tiles [steps][2 parts][2][16, 16] with zeros beyond either end. */
static MULTIPLIES_PAIRS void gather_split(int64_t rows, int64_t length, const float *a, int64_t ai, int64_t al,
                                          uint32_t *restrict out)
{
    enum { SIZE = TILE * TILE };
    for (int64_t l = 0; l < length; l += 2 * TILE, out += 2 * SIZE)
        for (int64_t i = 0; i < 2 * TILE; i += TILE, out += SIZE) {
            const int64_t m = MAX(0, MIN(TILE, rows - i)), d = MIN(2 * TILE, length - l);
            __m512i first[TILE], second[TILE];
            if (al == 1) { /* a row's 32 columns are 16 pairs as they lie */
                const uint32_t mask = 0xffffffff >> (2 * TILE - d);
                for (int64_t q = 0; q < TILE; q++) {
                    const float *from = a + (i + q) * ai + l;
                    const uint32_t here = q < m ? mask : 0;
                    __m512i x1, x2, y1, y2;
                    split(_mm512_maskz_loadu_ps((__mmask16)here, from), &x1, &x2);
                    split(_mm512_maskz_loadu_ps((__mmask16)(here >> 16), from + TILE), &y1, &y2);
                    uint32_t *to = out + q * TILE;
                    _mm256_storeu_si256((__m256i_u *)to, _mm512_cvtepi32_epi16(x1));
                    _mm256_storeu_si256((__m256i_u *)(to + TILE / 2), _mm512_cvtepi32_epi16(y1));
                    _mm256_storeu_si256((__m256i_u *)(to + 2 * SIZE), _mm512_cvtepi32_epi16(x2));
                    _mm256_storeu_si256((__m256i_u *)(to + 2 * SIZE + TILE / 2), _mm512_cvtepi32_epi16(y2));
                }
                continue;
            }
            const __mmask16 mask = (__mmask16)(m > 0 ? 0xffff >> (TILE - m) : 0);
#pragma GCC unroll 16
            for (int64_t q = 0; q < TILE; q++) {
                const float *from = a + (l + 2 * q) * al + i;
                split_pairs(_mm512_maskz_loadu_ps(2 * q < d ? mask : 0, from),
                            _mm512_maskz_loadu_ps(2 * q + 1 < d ? mask : 0, from + al), first + q, second + q);
            }
            transpose_tile(first), transpose_tile(second);
#pragma GCC unroll 16
            for (int64_t q = 0; q < TILE; q++) {
                _mm512_storeu_si512(out + q * TILE, first[q]);
                _mm512_storeu_si512(out + 2 * SIZE + q * TILE, second[q]);
            }
        }
}

/* As multiply of multiply.h, and `packed` has the same room. */
static void multiply_split(int64_t m, int64_t n, int64_t k, const float *a, int64_t ai, int64_t al, const float *b,
                           int64_t ldb, bool add, float *c, int64_t ldc, uint32_t *packed)
{
    const int64_t width = MULTIPLY_STRIPS * PAIR_STRIP, apart = SPLIT_DEPTH * width;
    uint32_t gathered[4 * TILE * SPLIT_DEPTH] __attribute__((aligned(64)));
    for (int64_t j0 = 0; j0 < n; j0 += width)
        for (int64_t l0 = 0; l0 < k; l0 += 2 * SPLIT_DEPTH) {
            const int64_t length = MIN(2 * SPLIT_DEPTH, k - l0), cols = MIN(width, n - j0);
            const int64_t steps = CEIL_DIV(length, 2 * TILE);
            pack_split(b + l0 * ldb + j0, ldb, length, cols, steps * TILE, apart, packed);
            tiles_begin();
            for (int64_t i = 0; i < m; i += 32) {
                const int64_t rows = MIN(32, m - i);
                gather_split(rows, length, a + i * ai + l0 * al, ai, al, gathered);
                rows_times_strips(rows, cols, steps, gathered, packed, apart, add || l0 > 0 ? ADD : SET,
                                  c + i * ldc + j0, ldc);
            }
            tiles_end();
        }
}
