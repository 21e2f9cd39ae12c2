/* multiply_tiles.h - multiply_pairs.h's product where the processor multiplies whole tiles of pairs (AMX).
 *
 *     C[m, cols] (+)= A B     A(i, l) = a[i ai + l al], ai or al 1     B packed by pack_pairs: strips [depth, STRIP]
 *
 * One instruction adds the product of 16 rows of 16 pairs and of 16 pairs of rows of 16 columns to 16 x 16 float32
 * sums, rounded as vdpbf16ps rounds. Four tiles of sums take four of operands, each used twice: of 32 rows of A, copied
 * tile by tile into L1, and of two vectors of a strip. Pairs beyond the last count as zeros on either side.
 *
 * Included once by multiply_pairs.h.
 */
#include <immintrin.h>
#include "cpu.h"

enum {
    TILE = 16,         /* rows, pairs or columns of one */
    TILES_DEPTH = 256, /* pairs of a block: its 32 rows of A take 32 KiB */
};
#define MULTIPLIES_TILES __attribute__((target("amx-tile,amx-bf16")))

/* Some of the intrinsics don't tell the compiler which memory they read. */
#define TILES_TOUCH_MEMORY() __asm__ volatile("" ::: "memory")

/* All eight tiles of 16 rows of 64 bytes: for this thread, until tiles_end. */
static inline MULTIPLIES_TILES void tiles_begin(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = TILE;
    TILES_TOUCH_MEMORY();
    _tile_loadconfig(&shape);
}

static inline MULTIPLIES_TILES void tiles_end(void)
{
    _tile_release();
}

/* The four products of two tiles of rows and two of columns, or as many of them as there are. */
static inline __attribute__((always_inline)) MULTIPLIES_TILES void
tile_products(const bool two_rows, const bool two_vecs, const uint32_t *b, int64_t ldb)
{
    _tile_loadd(6, b, ldb * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (two_rows) _tile_dpbf16ps(2, 5, 6);
    if (two_vecs) _tile_loadd(7, b + TILE, ldb * 4);
    if (two_vecs) _tile_dpbf16ps(1, 4, 7);
    if (two_rows && two_vecs) _tile_dpbf16ps(3, 5, 7);
}

/* sums[32, 32] = the product of `steps` times one or two tiles of rows and one or two of a strip, whose rows are `ldb`.
 * With `apart` numbers from the first parts of a strip to its second, those of the rows behind their first, the sum of
 * three: see multiply_split.h. */
static inline __attribute__((always_inline)) MULTIPLIES_TILES void
tile_microkernel(const bool two_rows, const bool two_vecs, int64_t steps, const uint32_t *a, const uint32_t *b,
                 int64_t ldb, int64_t apart, float *sums)
{
    enum { SIZE = TILE * TILE };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; s++, a += 2 * SIZE, b += TILE * ldb) {
        _tile_loadd(4, a, 64);
        if (two_rows) _tile_loadd(5, a + SIZE, 64);
        if (apart) tile_products(two_rows, two_vecs, b + apart, ldb);
        tile_products(two_rows, two_vecs, b, ldb);
        if (!apart) continue;
        a += 2 * SIZE;
        _tile_loadd(4, a, 64);
        if (two_rows) _tile_loadd(5, a + SIZE, 64);
        tile_products(two_rows, two_vecs, b, ldb);
    }
    _tile_stored(0, sums, 128);
    if (two_vecs) _tile_stored(1, sums + TILE, 128);
    if (two_rows) _tile_stored(2, sums + TILE * 32, 128);
    if (two_rows && two_vecs) _tile_stored(3, sums + TILE * 32 + TILE, 128);
}

static __attribute__((noinline)) MULTIPLIES_TILES void tile_sums(bool two_rows, bool two_vecs, int64_t steps,
                                                                 const uint32_t *a, const uint32_t *b, int64_t ldb,
                                                                 int64_t apart, float *sums)
{
    TILES_TOUCH_MEMORY();
    if (two_rows && two_vecs) tile_microkernel(true, true, steps, a, b, ldb, apart, sums);
    else if (two_rows) tile_microkernel(true, false, steps, a, b, ldb, apart, sums);
    else if (two_vecs) tile_microkernel(false, true, steps, a, b, ldb, apart, sums);
    else tile_microkernel(false, false, steps, a, b, ldb, apart, sums);
    TILES_TOUCH_MEMORY();
}

/* v' of 16 x 16: bit by bit, lanes whose number has it change places with those of the other row whose has it not */
static inline __attribute__((always_inline)) void transpose_tile(__m512i *v)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int h = 1; h < TILE; h *= 2) {
        const __m512i bit = _mm512_set1_epi32(h), other = _mm512_xor_si512(lane, bit), second = _mm512_set1_epi32(TILE);
        const __mmask16 has = _mm512_test_epi32_mask(lane, bit);
        const __m512i upper = _mm512_mask_or_epi32(lane, has, other, second);
        const __m512i lower = _mm512_mask_or_epi32(other, has, lane, second);
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) {
            if (i & h) continue;
            const __m512i p = v[i], q = v[i | h];
            v[i] = _mm512_permutex2var_epi32(p, upper, q), v[i | h] = _mm512_permutex2var_epi32(p, lower, q);
        }
    }
}

/* Up to 32 rows of A, `depth` pairs, as tiles [steps][2][16, 16] with zeros beyond either end. */
static void gather_tiles(int64_t rows, int64_t depth, const pair *a, int64_t ai, int64_t al, uint32_t *restrict out)
{
    for (int64_t l = 0; l < depth; l += TILE)
        for (int64_t i = 0; i < 2 * TILE; i += TILE, out += TILE * TILE) {
            const int64_t m = MAX(0, MIN(TILE, rows - i)), d = MIN(TILE, depth - l);
            const int64_t lines = al == 1 ? m : d; /* that run through memory, as do their entries: */
            const __mmask16 mask = (__mmask16)(0xffff >> (TILE - (al == 1 ? d : m)));
            __m512i v[TILE];
#pragma GCC unroll 16
            for (int64_t q = 0; q < TILE; q++) {
                const pair *from = a + (al == 1 ? (i + q) * ai + l : (l + q) * al + i);
                v[q] = q < lines ? _mm512_maskz_loadu_epi32(mask, from) : _mm512_setzero_si512();
            }
            if (al != 1) transpose_tile(v);
#pragma GCC unroll 16
            for (int64_t q = 0; q < TILE; q++) _mm512_storeu_si512(out + q * TILE, v[q]);
        }
}

/* Rows of sums [.., 32] into C, of `cols` columns up to 32. */
static MULTIPLIES_PAIRS void put_sums(int64_t rows, int64_t cols, const float *sums, how store, void *c, int64_t ldc)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j += TILE) {
            const __mmask16 mask = (__mmask16)(cols - j >= TILE ? 0xffff : 0xffff >> (TILE - (cols - j)));
            put_pairs(_mm512_loadu_ps(sums + i * 32 + j), mask, store, c, i * ldc + j);
        }
}

/* Gathered rows of A times all strips of a packed block of B. */
static void rows_times_strips(int64_t rows, int64_t cols, int64_t steps, const uint32_t *a, const uint32_t *packed,
                              int64_t apart, how store, void *c, int64_t ldc)
{
    const size_t item = store == NARROW ? sizeof(uint16_t) : sizeof(float);
    float sums[32 * 32] __attribute__((aligned(64)));
    for (int64_t j = 0; j < cols; j += PAIR_STRIP) {
        const int64_t here = MIN(PAIR_STRIP, cols - j), width = CEIL_DIV(here, TILE) * TILE;
        for (int64_t v = 0; v < here; v += 32) {
            const uint32_t *strip = packed + j * steps * TILE + v;
            tile_sums(rows > TILE, here - v > TILE, steps, a, strip, width, apart, sums);
            put_sums(rows, MIN(32, here - v), sums, store, (char *)c + (size_t)(j + v) * item, ldc);
        }
    }
}

/* `m` rows of A times a packed block of B. */
static void multiply_tiles(int64_t m, int64_t cols, int64_t depth, const pair *a, int64_t ai, int64_t al,
                           const uint32_t *packed, how store, void *c, int64_t ldc)
{
    const size_t item = store == NARROW ? sizeof(uint16_t) : sizeof(float);
    uint32_t gathered[2 * TILE * TILES_DEPTH] __attribute__((aligned(64)));
    tiles_begin();
    for (int64_t i = 0; i < m; i += 32) {
        const int64_t rows = MIN(32, m - i);
        gather_tiles(rows, depth, a + i * ai, ai, al, gathered);
        rows_times_strips(rows, cols, CEIL_DIV(depth, TILE), gathered, packed, 0, store,
                          (char *)c + (size_t)(i * ldc) * item, ldc);
    }
    tiles_end();
}
