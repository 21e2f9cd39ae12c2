/* multiply.h - the matrix product of the panels: C (+)= A B on one thread, A read where it lies.
 *
 *     C[m, n]  row-major      A(i, l) = a[i ai + l al]      B[k, n] row-major, packed strip by strip
 *
 * Our panels are short (a few hundred rows or columns) and their A is already in an order that
 * broadcasts well, so packing B alone is enough; a general GEMM packs both and loses up to a third
 * of its speed at small n. A strip is three vectors wide. A block of B, MULTIPLY_DEPTH rows of MULTIPLY_STRIPS strips,
 * stays in L2; a microkernel holds up to MULTIPLY_ROWS x 3 vectors of C in registers.
 *
 * Included once per precision by panels.c, mode_product.h and gauss_jordan.h, each of which defines before it:
 *
 *     MULTIPLY_ROWS                     8, for 24 accumulators of 32 vector registers, or 4, for 12 of 16
 *     MULTIPLY_DEPTH, MULTIPLY_STRIPS   the block of B; `packed` has room for it
 */
#include "cpu.h"
#if !defined(MULTIPLY_ROWS) || !defined(MULTIPLY_DEPTH) || !defined(MULTIPLY_STRIPS)
#error "multiply.h: define MULTIPLY_ROWS, MULTIPLY_DEPTH and MULTIPLY_STRIPS first"
#endif
#if MULTIPLY_ROWS != 8 && MULTIPLY_ROWS != 4
#error "multiply.h: MULTIPLY_ROWS is 8 or 4"
#endif
#ifdef T

typedef T FN(vec) __attribute__((vector_size(VECTOR)));
typedef T FN(vecu) __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
enum { FN(LANES) = VECTOR / sizeof(T), FN(STRIP) = 3 * FN(LANES) };

/* C of `rows` rows and `vecs` vectors, of which `cols` columns count; b is a packed strip [k, vecs vectors]. */
static inline __attribute__((always_inline)) void FN(microkernel)(const int rows, const int vecs, int64_t k, const T *a,
                                                                  int64_t ai, int64_t al, const T *b, T *c, int64_t ldc,
                                                                  int64_t cols, bool add)
{
    enum { L = FN(LANES) };
    FN(vec) acc[8][3];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) acc[i][v] = (FN(vec)){0};
    for (int64_t l = 0; l < k; l++, b += vecs * L) {
        FN(vec) x[3];
        for (int v = 0; v < vecs; v++) x[v] = *(const FN(vecu) *)(b + v * L);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vecs; v++) acc[i][v] += a[i * ai + l * al] * x[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        T *to = c + i * ldc;
        if (cols == vecs * L) {
            for (int v = 0; v < vecs; v++) {
                if (add) acc[i][v] += *(const FN(vecu) *)(to + v * L);
                *(FN(vecu) *)(to + v * L) = acc[i][v];
            }
        } else {
            T part[3 * L] = {0};
            for (int v = 0; v < vecs; v++) memcpy(part + v * L, &acc[i][v], sizeof acc[i][v]);
            for (int64_t j = 0; j < cols; j++) to[j] = add ? to[j] + part[j] : part[j];
        }
    }
}

#define MICROKERNELS(rows)                                                                                             \
    static __attribute__((noinline)) void FN(microkernel_##rows)(int64_t vecs, int64_t k, const T *a, int64_t ai,      \
                                                                 int64_t al, const T *b, T *c, int64_t ldc,            \
                                                                 int64_t cols, bool add)                               \
    {                                                                                                                  \
        if (vecs == 3) FN(microkernel)(rows, 3, k, a, ai, al, b, c, ldc, cols, add);                                   \
        else if (vecs == 2) FN(microkernel)(rows, 2, k, a, ai, al, b, c, ldc, cols, add);                              \
        else FN(microkernel)(rows, 1, k, a, ai, al, b, c, ldc, cols, add);                                             \
    }
MICROKERNELS(8)
MICROKERNELS(4)
MICROKERNELS(1)
#undef MICROKERNELS

/* `cols` columns of `depth` rows of b as strips [depth, STRIP]; the last strip has as many vectors as it needs.
 * Row by row: whole rows are read in order, as memory likes it. */
static void FN(pack)(const T *b, int64_t ldb, int64_t depth, int64_t cols, T *restrict out)
{
    const int64_t whole = cols - cols % FN(STRIP), rest = cols - whole;
    const int64_t width = CEIL_DIV(rest, FN(LANES)) * FN(LANES);
    for (int64_t l = 0; l < depth; l++) {
        const T *restrict row = b + l * ldb;
        for (int64_t j = 0; j < whole; j += FN(STRIP))
            for (int64_t q = 0; q < FN(STRIP); q++) out[j * depth + l * FN(STRIP) + q] = row[j + q];
        for (int64_t q = 0; q < width; q++) out[whole * depth + l * width + q] = q < rest ? row[whole + q] : 0;
    }
}

/* rows x depth of A as [depth, rows]: where A runs along its columns, a line of cache holds many rows of few columns.
 */
static void FN(gather)(int64_t rows, int64_t depth, const T *a, int64_t ai, int64_t al, T *restrict out)
{
    if (rows == MULTIPLY_ROWS && ai == 1)
        for (int64_t l = 0; l < depth; l++) memcpy(out + l * MULTIPLY_ROWS, a + l * al, MULTIPLY_ROWS * sizeof(T));
    else
        for (int64_t l = 0; l < depth; l++)
            for (int64_t i = 0; i < rows; i++) out[l * rows + i] = a[i * ai + l * al];
}

/* `packed` has room for MULTIPLY_DEPTH rows of MULTIPLY_STRIPS strips. */
static void FN(multiply)(int64_t m, int64_t n, int64_t k, const T *a, int64_t ai, int64_t al, const T *b, int64_t ldb,
                         bool add, T *c, int64_t ldc, T *packed)
{
    const int64_t width = MULTIPLY_STRIPS * FN(STRIP);
    T gathered[MULTIPLY_DEPTH * MULTIPLY_ROWS];
    for (int64_t j0 = 0; j0 < n; j0 += width)
        for (int64_t l0 = 0; l0 < k; l0 += MULTIPLY_DEPTH) {
            const int64_t depth = MIN(MULTIPLY_DEPTH, k - l0), cols = MIN(width, n - j0);
            const bool plus = add || l0 > 0;
            FN(pack)(b + l0 * ldb + j0, ldb, depth, cols, packed);
            for (int64_t i = 0, rows; i < m; i += rows) {
                const T *ablock = a + i * ai + l0 * al;
                int64_t si = ai, sl = al;
                rows = m - i >= MULTIPLY_ROWS ? MULTIPLY_ROWS : m - i >= 4 ? 4 : 1;
                if (al != 1 && cols > FN(STRIP)) {
                    FN(gather)(rows, depth, ablock, ai, al, gathered);
                    ablock = gathered, si = 1, sl = rows;
                }
                for (int64_t j = 0; j < cols; j += FN(STRIP)) {
                    const int64_t here = MIN(FN(STRIP), cols - j), vecs = CEIL_DIV(here, FN(LANES));
                    const T *strip = packed + j * depth;
                    T *to = c + i * ldc + j0 + j;
                    if (rows == 8) FN(microkernel_8)(vecs, depth, ablock, si, sl, strip, to, ldc, here, plus);
                    else if (rows == 4) FN(microkernel_4)(vecs, depth, ablock, si, sl, strip, to, ldc, here, plus);
                    else FN(microkernel_1)(vecs, depth, ablock, si, sl, strip, to, ldc, here, plus);
                }
            }
        }
}

#endif
