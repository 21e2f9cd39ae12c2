/* rsgd.h - what a thread steps a class with, and the two passes over the class: columns of the rows [W; dir] (and M')
 * packed, a tile at a time, then their Gram matrix or linear combinations of them.
 *
 * Included by rsgd_careful.h, without T and once per precision.
 */
#ifndef SUBSPACE_RSGD_H /* -------------------------------------------------------- read once */
#define SUBSPACE_RSGD_H
#include "retraction.h"

enum {
    SMALL_K = 16,            /* up to here our own register blocks, above GEMM */
    FLUSH = 2048,            /* columns summed in working precision before they are added up in double */
    WORTH_A_THREAD = 1 << 15 /* elements: about 15 microseconds */
};

/* M' = mm M + mg grad + mw W,   dir = dm M' + dg grad + dw W */
typedef struct rsgd_step {
    double mm, mg, mw, dm, dg, dw;
    subspace_retraction kind;
    bool parallel, stiefel, tangent; /* tangent: M is kept so */
} rsgd_step;

typedef struct rsgd_slot { /* what one thread works with */
    rsgd_step step;
    const subspace_frames *frames;
    int64_t row, k, kp; /* first row of the class, its rows, rounded up to a multiple of 4 */
    int64_t blocks, width;
    bool small;
    double lr;
    kxk q;
    double *gram;
    double *R, *P, *S, *X, *f, *g, *E, *h, *Pm, *Y; /* [kp, kp] of the k x k part */
    void *pack, *acc, *coef, *dir;
} rsgd_slot;

#endif
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

typedef T FN(vec) __attribute__((vector_size(VECTOR)));
typedef T FN(vecu) __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
enum { FN(LANES) = VECTOR / sizeof(T), FN(QUARTER) = FN(LANES) < 4 ? FN(LANES) : 4 };
typedef T FN(quarter) __attribute__((vector_size(FN(QUARTER) *sizeof(T)), may_alias)); /* a quarter or so of a vec */

/* The columns j0 .. j0+m of W, dir and, with three blocks, M' packed as [blocks kp, width] with
 * zeros in the padding; W only on demand. With `write` M' also goes back to the buffer. */
static void FN(load)(const rsgd_slot *s, int64_t j0, int64_t m, bool with_w, bool write, T *restrict pack)
{
    const subspace_frames *p = s->frames;
    const int64_t n = p->n, width = s->width, kp = s->kp;
    const T mg = (T)s->step.mg, mm = (T)s->step.mm, mw = (T)s->step.mw;
    const T dm = (T)s->step.dm, dg = (T)s->step.dg, dw = (T)s->step.dw;
    for (int64_t i = 0; i < s->k; i++) {
        const int64_t at = (s->row + i) * n + j0;
        const T *restrict w = (const T *)p->weight + at, *restrict g = (const T *)p->grad + at;
        T *restrict buffer = p->buffer ? (T *)p->buffer + at : NULL;
        T *restrict pw = pack + i * width, *restrict pd = pw + kp * width, *restrict pm = pd + kp * width;
        if (with_w) memcpy(pw, w, (size_t)m * sizeof(T));
        if (buffer)
            for (int64_t j = 0; j < m; j++) pd[j] = mm * buffer[j] + mg * g[j];
        else
            for (int64_t j = 0; j < m; j++) pd[j] = mg * g[j];
        if (mw != 0)
            for (int64_t j = 0; j < m; j++) pd[j] += mw * w[j];
        if (write) memcpy(buffer, pd, (size_t)m * sizeof(T));
        if (s->blocks == 3) memcpy(pm, pd, (size_t)m * sizeof(T));
        if (dg != 0) { /* Nesterov: dir = dm M' + dg g + dw w */
            for (int64_t j = 0; j < m; j++) pd[j] = dm * pd[j] + dg * g[j];
            if (dw != 0)
                for (int64_t j = 0; j < m; j++) pd[j] += dw * w[j];
        }
    }
    for (int64_t b = 0; b < s->blocks; b++) { /* the padding: columns up to a whole vector pair, rows up to kp */
        const int64_t padded = MIN(width, CEIL_DIV(m, 2 * FN(LANES)) * 2 * FN(LANES));
        for (int64_t i = 0; i < s->k && m < padded; i++)
            memset(pack + (b * kp + i) * width + m, 0, (size_t)(padded - m) * sizeof(T));
        for (int64_t i = s->k; i < kp; i++) memset(pack + (b * kp + i) * width, 0, (size_t)padded * sizeof(T));
    }
}

/* acc[4][4] += rows a .. a+3 times rows b .. b+3, lane by lane; of a block on the diagonal the lower half. */
static inline __attribute__((always_inline)) void FN(dots_of)(const bool diagonal, const T *a, int64_t lda, const T *b,
                                                              int64_t ldb, int64_t m, FN(vec) *acc)
{
    FN(vec) c[16];
    for (int i = 0; i < 16; i++) c[i] = acc[i];
    for (int64_t j = 0; j < m; j += FN(LANES)) {
        FN(vec) x[4], y[4];
        for (int i = 0; i < 4; i++) x[i] = *(const FN(vecu) *)(a + i * lda + j);
        for (int i = 0; i < 4 && !diagonal; i++) y[i] = *(const FN(vecu) *)(b + i * ldb + j);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (!diagonal || i / 4 >= i % 4) c[i] += x[i / 4] * (diagonal ? x : y)[i % 4];
    }
    for (int i = 0; i < 16; i++) acc[i] = c[i];
}

static void FN(dots)(const T *a, int64_t lda, const T *b, int64_t ldb, int64_t m, FN(vec) *acc)
{
    if (a == b) FN(dots_of)(true, a, lda, b, ldb, m, acc);
    else FN(dots_of)(false, a, lda, b, ldb, m, acc);
}

/* gram += the lanes of the accumulators, which start again from zero. */
static void FN(flush)(const rsgd_slot *s, FN(vec) *acc, double *gram)
{
    const int64_t groups = s->blocks * s->kp / 4, ld = s->blocks * s->kp;
    for (int64_t bi = 0; bi < groups; bi++)
        for (int64_t bj = 0; bj <= bi; bj++, acc += 16)
            for (int i = 0; i < 16; i++) {
                const FN(quarter) *quarters = (const FN(quarter) *)&acc[i];
                FN(quarter) sum = quarters[0];
                for (int l = 1; l < FN(LANES) / FN(QUARTER); l++) sum += quarters[l];
                double total = 0;
                for (int l = 0; l < FN(QUARTER); l++) total += (double)sum[l];
                gram[(4 * bi + i / 4) * ld + 4 * bj + i % 4] += total;
                acc[i] = (FN(vec)){0};
            }
}

/* gram[i, j], j <= i in blocks of 4, of the packed rows over all n columns. */
static void FN(gram_of)(const rsgd_slot *s, double *gram)
{
    const int64_t n = s->frames->n, ld = s->blocks * s->kp, groups = ld / 4;
    T *pack = s->pack;
    FN(vec) *acc = s->acc;
    memset(gram, 0, (size_t)(ld * ld) * sizeof *gram);
    if (!s->small) {
        T *c = s->acc;
        for (int64_t j0 = 0; j0 < n; j0 += s->width) {
            const int64_t m = MIN(s->width, n - j0);
            FN(load)(s, j0, m, true, false, pack);
            GEMM(false, true, ld, ld, m, 1, pack, s->width, pack, s->width, 0, c, ld);
            for (int64_t i = 0; i < ld * ld; i++) gram[i] += (double)c[i];
        }
        return;
    }
    memset(acc, 0, (size_t)(groups * (groups + 1) / 2 * 16) * sizeof *acc);
    for (int64_t j0 = 0, since = 0; j0 < n; j0 += s->width) {
        const int64_t m = MIN(s->width, n - j0);
        const bool in_place = s->k == s->kp && m % FN(LANES) == 0; /* W needs no padding: read where it is */
        const T *w = in_place ? (const T *)s->frames->weight + s->row * n + j0 : pack;
        FN(vec) *c = acc;
        FN(load)(s, j0, m, !in_place, false, pack);
        for (int64_t bi = 0; bi < groups; bi++)
            for (int64_t bj = 0; bj <= bi; bj++, c += 16) {
                const bool wi = in_place && 4 * bi < s->kp, wj = in_place && 4 * bj < s->kp;
                const int64_t lda = wi ? n : s->width, ldb = wj ? n : s->width;
                FN(dots)((wi ? w : pack) + 4 * bi * lda, lda, (wj ? w : pack) + 4 * bj * ldb, ldb, m, c);
            }
        since += m;
        if (since >= FLUSH || j0 + m == n) FN(flush)(s, acc, gram), since = 0;
    }
}

/* Rows i0 .. i0+3 of out = coef pack for one tile, coef [.., depth]. */
static inline void FN(combine4)(const T *coef, int64_t depth, const T *pack, int64_t width, int64_t m, T *const *out)
{
    enum { L = FN(LANES) };
    for (int64_t j = 0; j < m; j += 2 * L) {
        FN(vec) a[4] = {{0}}, b[4] = {{0}};
        for (int64_t l = 0; l < depth; l++) {
            const FN(vec) x = *(const FN(vecu) *)(pack + l * width + j),
                          y = *(const FN(vecu) *)(pack + l * width + j + L);
            for (int i = 0; i < 4; i++) a[i] += coef[i * depth + l] * x, b[i] += coef[i * depth + l] * y;
        }
        for (int i = 0; i < 4; i++) {
            if (!out[i]) continue;
            if (j + 2 * L <= m) {
                *(FN(vecu) *)(out[i] + j) = a[i], *(FN(vecu) *)(out[i] + j + L) = b[i];
            } else {
                T tail[2 * L];
                memcpy(tail, &a[i], sizeof a[i]), memcpy(tail + L, &b[i], sizeof b[i]);
                memcpy(out[i] + j, tail, (size_t)(m - j) * sizeof(T));
            }
        }
    }
}

/* [W; M] <- coef [W; dir; M], coef [outputs kp, blocks kp]: the second pass. */
static void FN(combine)(const rsgd_slot *s, const T *coef, int64_t outputs)
{
    const subspace_frames *p = s->frames;
    const int64_t n = p->n, kp = s->kp, depth = s->blocks * kp;
    T *pack = s->pack, *target[2] = {p->weight, p->buffer};
    for (int64_t j0 = 0; j0 < n; j0 += s->width) {
        const int64_t m = MIN(s->width, n - j0);
        FN(load)(s, j0, m, true, p->buffer && outputs == 1, pack);
        for (int64_t o = 0; o < outputs; o++) {
            T *out = target[o] + s->row * n + j0;
            const T *c = coef + o * kp * depth;
            if (!s->small) GEMM(false, false, s->k, m, depth, 1, c, depth, pack, s->width, 0, out, n);
            else
                for (int64_t i = 0; i < s->k; i += 4) {
                    T *rows[4];
                    for (int64_t r = 0; r < 4; r++) rows[r] = i + r < s->k ? out + (i + r) * n : NULL;
                    FN(combine4)(c + i * depth, depth, pack, s->width, m, rows);
                }
        }
    }
}

#endif
