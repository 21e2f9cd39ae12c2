/* multiply_pairs.h - multiply.h's product for bf16, where the processor multiplies pairs of them (AVX512-BF16).
 *
 *     C[m, n] (+)= A B     A(i, l) = a[i ai + l al], the pair of row i's columns 2l and 2l + 1     B[k, n] row-major
 *
 * One instruction adds both products of sixteen pairs to sixteen float32 sums: twice the work of an FMA. Numbers below
 * 1.2e-38 count as 0 in it. B is packed by pairs of rows; where k is odd, a row of zeros stands beside the last, and A
 * must have a zero there too. C is float32, or bf16 rounded once where no sum is cut (k <= 2 TILES_DEPTH).
 *
 * Included once by panels.c, after the definitions that multiply.h asks for. With AMX, multiply_tiles.h does its work.
 */
#include <immintrin.h>
#include "cpu.h"

typedef uint32_t pair __attribute__((may_alias, aligned(2)));
typedef enum { SET, ADD, NARROW } how; /* C = A B, C += A B, or C = A B in bf16 */

enum { PAIR_LANES = VECTOR / sizeof(float), PAIR_STRIP = 3 * PAIR_LANES };
#define MULTIPLIES_PAIRS __attribute__((target("avx512bf16")))

/* A vector of sums into C, which begins with `at` numbers before it; the mask has those that count. */
static inline __attribute__((always_inline)) MULTIPLIES_PAIRS void put_pairs(__m512 sums, __mmask16 mask, how store,
                                                                             void *c, int64_t at)
{
    float *to = (float *)c + at;
    if (store == ADD) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, to));
    if (store != NARROW) _mm512_mask_storeu_ps(to, mask, sums);
    else _mm256_mask_storeu_epi16((uint16_t *)c + at, mask, (__m256i)_mm512_cvtneps_pbh(sums));
}

#include "multiply_tiles.h"

/* C of `rows` rows and `vecs` vectors, of which `cols` columns count; b is a packed strip [k, vecs vectors]. */
static inline __attribute__((always_inline)) MULTIPLIES_PAIRS void
pair_microkernel(const int rows, const int vecs, int64_t k, const pair *a, int64_t ai, int64_t al, const uint32_t *b,
                 how store, void *c, int64_t ldc, int64_t cols)
{
    enum { L = PAIR_LANES };
    __m512 acc[8][3];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) acc[i][v] = _mm512_setzero_ps();
    for (int64_t l = 0; l < k; l++, b += vecs * L) {
        __m512bh x[3];
        for (int v = 0; v < vecs; v++) x[v] = (__m512bh)_mm512_loadu_si512(b + v * L);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const __m512bh y = (__m512bh)_mm512_set1_epi32((int)a[i * ai + l * al]);
            for (int v = 0; v < vecs; v++) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], y, x[v]);
        }
    }
    const __mmask16 last = (__mmask16)(0xffff >> (vecs * L - cols));
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++)
            put_pairs(acc[i][v], v == vecs - 1 ? last : (__mmask16)0xffff, store, c, i * ldc + v * L);
}

#define PAIR_MICROKERNELS(rows)                                                                                        \
    static __attribute__((noinline))                                                                                   \
    MULTIPLIES_PAIRS void pair_microkernel_##rows(int64_t vecs, int64_t k, const pair *a, int64_t ai, int64_t al,      \
                                                  const uint32_t *b, how store, void *c, int64_t ldc, int64_t cols)    \
    {                                                                                                                  \
        if (vecs == 3) pair_microkernel(rows, 3, k, a, ai, al, b, store, c, ldc, cols);                                \
        else if (vecs == 2) pair_microkernel(rows, 2, k, a, ai, al, b, store, c, ldc, cols);                           \
        else pair_microkernel(rows, 1, k, a, ai, al, b, store, c, ldc, cols);                                          \
    }
PAIR_MICROKERNELS(8)
PAIR_MICROKERNELS(4)
PAIR_MICROKERNELS(1)
#undef PAIR_MICROKERNELS

/* `cols` columns of `rows` rows of b as strips [pairs of rows, STRIP], as multiply.h's pack; what a strip has beyond
 * those pairs, up to `depth` of them, is zero. */
static void pack_pairs(const uint16_t *b, int64_t ldb, int64_t rows, int64_t cols, int64_t depth,
                       uint32_t *restrict out)
{
    const int64_t pairs = CEIL_DIV(rows, 2), whole = cols - cols % PAIR_STRIP, rest = cols - whole;
    const int64_t width = CEIL_DIV(rest, PAIR_LANES) * PAIR_LANES;
    for (int64_t j = 0; j < cols && pairs < depth; j += PAIR_STRIP) {
        const int64_t wide = j < whole ? PAIR_STRIP : width;
        memset(out + j * depth + pairs * wide, 0, (size_t)((depth - pairs) * wide) * sizeof *out);
    }
    for (int64_t l = 0; l < pairs; l++) {
        const bool alone = 2 * l + 1 == rows;
        const uint16_t *restrict even = b + 2 * l * ldb, *restrict odd = alone ? even : even + ldb;
        const uint32_t upper = alone ? 0 : 0xffff0000;
        for (int64_t j = 0; j < whole; j += PAIR_STRIP)
            for (int64_t q = 0; q < PAIR_STRIP; q++)
                out[j * depth + l * PAIR_STRIP + q] = even[j + q] | ((uint32_t)odd[j + q] << 16 & upper);
        for (int64_t q = 0; q < width; q++)
            out[whole * depth + l * width + q] =
                q < rest ? even[whole + q] | ((uint32_t)odd[whole + q] << 16 & upper) : 0;
    }
}

/* `packed` has room for MULTIPLY_DEPTH pairs of rows of MULTIPLY_STRIPS strips. */
static void multiply_pairs(int64_t m, int64_t n, int64_t k, const pair *a, int64_t ai, int64_t al, const uint16_t *b,
                           int64_t ldb, how store, void *c, int64_t ldc, uint32_t *packed)
{
    const int64_t width = MULTIPLY_STRIPS * PAIR_STRIP, pairs = CEIL_DIV(k, 2);
    const bool tiles = subspace_cpu_amx();
    const int64_t most = tiles ? TILES_DEPTH : MULTIPLY_DEPTH;
    const size_t item = store == NARROW ? sizeof(uint16_t) : sizeof(float);
    uint32_t gathered[MULTIPLY_DEPTH * 8];
    for (int64_t j0 = 0; j0 < n; j0 += width)
        for (int64_t l0 = 0; l0 < pairs; l0 += most) {
            const int64_t depth = MIN(most, pairs - l0), cols = MIN(width, n - j0);
            const int64_t padded = tiles ? CEIL_DIV(depth, TILE) * TILE : depth;
            const how now = l0 > 0 ? ADD : store;
            pack_pairs(b + 2 * l0 * ldb + j0, ldb, MIN(2 * depth, k - 2 * l0), cols, padded, packed);
            if (tiles) {
                multiply_tiles(m, cols, depth, a + l0 * al, ai, al, packed, now, (char *)c + (size_t)j0 * item, ldc);
                continue;
            }
            for (int64_t i = 0, rows; i < m; i += rows) {
                const pair *ablock = a + i * ai + l0 * al;
                int64_t si = ai, sl = al;
                rows = m - i >= 8 ? 8 : m - i >= 4 ? 4 : 1;
                if (al != 1 && cols > PAIR_STRIP) {
                    for (int64_t l = 0; l < depth; l++)
                        for (int64_t q = 0; q < rows; q++) gathered[l * rows + q] = ablock[q * ai + l * al];
                    ablock = gathered, si = 1, sl = rows;
                }
                for (int64_t j = 0; j < cols; j += PAIR_STRIP) {
                    const int64_t here = MIN(PAIR_STRIP, cols - j), vecs = CEIL_DIV(here, PAIR_LANES);
                    const uint32_t *strip = packed + j * depth;
                    void *to = (char *)c + (size_t)(i * ldc + j0 + j) * item;
                    if (rows == 8) pair_microkernel_8(vecs, depth, ablock, si, sl, strip, now, to, ldc, here);
                    else if (rows == 4) pair_microkernel_4(vecs, depth, ablock, si, sl, strip, now, to, ldc, here);
                    else pair_microkernel_1(vecs, depth, ablock, si, sl, strip, now, to, ldc, here);
                }
            }
        }
}
