/* panels_pairs.h - the products of panels.c for bf16, where the processor multiplies pairs of them.
 *
 *     forward    z         = scale W x_s'        x_s = x / 2^e, scale = 2^e / |x|: both factors as they came, exactly
 *     backward   dW_p     (+)= (scale dz) x_s    dz rounded to bf16, as torch's own bf16 layers hand it on
 *                dxhat     += dz' W_p
 *
 * 2^e is the power of two that brings |x| to [1, 2), so that sums neither overflow nor vanish. All sums are float32,
 * and nothing is widened: not W, not x, and where the batch is one block not dW. Included once by panels.c.
 */
#include "multiply_pairs.h"
_Static_assert(BLOCK <= 2 * TILES_DEPTH && TILES_DEPTH <= MULTIPLY_DEPTH, "dweight is narrowed as it is stored");

/* x_s, scale and 1/|x| of each row; the length is summed in double */
static void pairs_normalise(int64_t begin, int64_t end, void *arg)
{
    const panels *p = arg;
    const int64_t n = p->a->n;
    for (int64_t i = begin; i < end; i++) {
        const uint16_t *restrict row = (const uint16_t *)p->a->x + i * n;
        uint16_t *restrict out = (uint16_t *)p->xhat + i * n;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += (double)bf16_to_f32(row[j]) * (double)bf16_to_f32(row[j]);
        const double length = sqrt(sum), r = 1 / MAX(length, NORM_EPS);
        const int e = length > 0 && length <= DBL_MAX ? ilogb(length) : 0;
        const double down = ldexp(1, -e);
        ((float *)p->rnorm)[i] = (float)r;
        ((float *)p->scale)[i] = (float)(ldexp(1, e) * r);
        for (int64_t j = 0; j < n; j++) out[j] = f32_to_bf16((float)(bf16_to_f32(row[j]) * down));
    }
}

static const uint16_t *pairs_x(const panels *p)
{
    return p->xhat ? p->xhat : p->a->x;
}

/* xt[j, i] = x_s[i, j] for 16 rows of the batch at a time: of 16 pairs of columns, where there are so many, by
 * registers */
static void pairs_transpose(int64_t begin, int64_t end, void *arg)
{
    const panels *p = arg;
    const int64_t n = p->a->n, b = p->a->b;
    const uint16_t *x = pairs_x(p);
    uint16_t *xt = p->xt;
    for (int64_t i0 = begin * 16; i0 < MIN(end * 16, b); i0 += 16) {
        const int64_t whole = b - i0 < 16 ? 0 : n / 32 * 32;
        for (int64_t j = 0; j < whole; j += 32) {
            __m512i v[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(x + (i0 + i) * n + j);
            transpose_tile(v);
#pragma GCC unroll 16
            for (int l = 0; l < 16; l++) {
                uint16_t *to = xt + (j + 2 * l) * b + i0;
                _mm256_storeu_si256((__m256i_u *)to, _mm512_cvtepi32_epi16(v[l]));
                _mm256_storeu_si256((__m256i_u *)(to + b), _mm512_cvtepi32_epi16(_mm512_srli_epi32(v[l], 16)));
            }
        }
        for (int64_t j = whole; j < n; j++)
            for (int64_t i = i0; i < MIN(i0 + 16, b); i++) xt[j * b + i] = x[i * n + j];
    }
}

static void pairs_prepare(const panels *p, int64_t grain, bool transposed)
{
    const int64_t b = p->a->b;
    if (p->xhat) p->ctx->parallel_for(b, grain, pairs_normalise, (void *)p);
    if (transposed) p->ctx->parallel_for(CEIL_DIV(b, 16), CEIL_DIV(grain, 16), pairs_transpose, (void *)p);
}

/* The panel's z. Rows of an odd length get a zero at their end. */
static void pairs_project(const panels *p, const tile *t, float *z, int64_t ld, uint32_t *packed)
{
    const int64_t n = p->a->n, length = n + n % 2, rows = t->r1 - t->r0;
    const uint16_t *w = (const uint16_t *)p->a->weight + t->r0 * n;
    if (n % 2) {
        uint16_t *padded = (uint16_t *)p->wide + t->slot * p->rows * length;
        for (int64_t r = 0; r < rows; r++) {
            memcpy(padded + r * length, w + r * n, (size_t)n * sizeof *w);
            padded[r * length + n] = 0;
        }
        w = padded;
    }
    multiply_pairs(rows, t->nb, n, (const pair *)w, length / 2, 1, (const uint16_t *)p->xt + t->b0, p->a->b, SET, z, ld,
                   packed);
    if (!p->a->normalize) return;
    const float *restrict scale = (const float *)p->scale + t->b0;
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
        for (int64_t i = 0; i < t->nb; i++) z[r * ld + i] *= scale[i];
}

/* dz of the round's i-th panel in pairs of rows, as dz' is read */
static void pairs_of_rows(const panels *p, const tile *t, int64_t i, const float *z)
{
    const int64_t rows = t->r1 - t->r0, nb = t->nb;
    uint32_t *restrict out = (uint32_t *)p->down + i * CEIL_DIV(p->rows, 2) * p->block;
    for (int64_t r = 0; r < rows; r += 2, out += nb) {
        const float *even = z + r * nb, *odd = r + 1 < rows ? even + nb : even;
        const uint32_t upper = r + 1 < rows ? 0xffff0000 : 0;
        for (int64_t j = 0; j < nb; j++) out[j] = f32_to_bf16(even[j]) | ((uint32_t)f32_to_bf16(odd[j]) << 16 & upper);
    }
}

/* dW_p = (scale dz) x_s in bf16, or added to a float32 sum over several blocks. */
static void pairs_dweight(const panels *p, const tile *t, const float *z, uint32_t *packed)
{
    const int64_t n = p->a->n, rows = t->r1 - t->r0, length = t->nb + t->nb % 2;
    const float *scale = p->scale;
    uint16_t *dz = (uint16_t *)p->across + t->slot * p->rows * (p->block + 1);
    for (int64_t r = 0; r < rows; r++) {
        const float *restrict from = z + r * t->nb;
        uint16_t *restrict to = dz + r * length;
        if (p->a->normalize)
            for (int64_t i = 0; i < t->nb; i++) to[i] = f32_to_bf16(from[i] * scale[t->b0 + i]);
        else
            for (int64_t i = 0; i < t->nb; i++) to[i] = f32_to_bf16(from[i]);
        if (t->nb % 2) to[t->nb] = 0;
    }
    const how store = !p->dweight ? NARROW : t->b0 > 0 ? ADD : SET;
    void *out = p->dweight ? (void *)((float *)p->dweight + t->r0 * n) : (uint16_t *)p->a->dweight + t->r0 * n;
    multiply_pairs(rows, n, t->nb, (const pair *)dz, length / 2, 1, pairs_x(p) + t->b0 * n, n, store, out, n, packed);
}

/* What dz of the round's i-th panel is for: dW_p now, dx later. */
static void pairs_dz(const panels *p, const tile *t, int64_t i, const float *z, uint32_t *packed)
{
    if (p->a->dx) pairs_of_rows(p, t, i, z);
    if (p->a->dweight) pairs_dweight(p, t, z, packed);
}

/* Rows i0.. and columns j0.. of dxhat (+)= dz' W_p, `h` and `m` of them, for the round's i-th panel. */
static void pairs_dx(const panels *p, const tile *t, int64_t i, bool add, int64_t i0, int64_t h, int64_t j0, int64_t m,
                     float *dx, uint32_t *packed)
{
    const int64_t n = p->a->n;
    const pair *dz = (const pair *)p->down + i * CEIL_DIV(p->rows, 2) * p->block;
    multiply_pairs(h, m, t->r1 - t->r0, dz + i0, 1, t->nb, (const uint16_t *)p->a->weight + t->r0 * n + j0, n,
                   add ? ADD : SET, dx + i0 * n + j0, n, packed);
}

/* dx = (dxhat - xhat <xhat, dxhat>) / |x| of a row, as row_of_dx of panels.c */
static void pairs_row_of_dx(const panels *p, int64_t i, float *restrict d)
{
    const int64_t n = p->a->n;
    const uint16_t *restrict x = pairs_x(p) + i * n;
    const float r = ((const float *)p->rnorm)[i], scale = ((const float *)p->scale)[i];
    double dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < n; j++) dot += (double)bf16_to_f32(x[j]) * (double)d[j];
    dot *= (double)scale * (double)scale;
    if (r >= (float)(1 / NORM_EPS)) dot = 0; /* the clamped length is a constant */
    for (int64_t j = 0; j < n; j++) d[j] = r * (d[j] - (float)dot * bf16_to_f32(x[j]));
}
