/* rate_group.h - one group's rate and gradient, panel by panel of its points.
 *
 * A panel is [s, w] columns of Z where the points are fewer than the features, else [w, s] rows of it; the
 * microkernels of factor.h read it in z itself where rows are whole vectors, else from a padded copy. T may be double
 * where z is float.
 *
 * Included by coding_rate.c, without T and once per precision.
 */
#include "coding_rate.h"
#ifdef T /* ---------------------------------------------- read twice: T float, then T double */

/* ------------------------------------------------------------------------ rows of z, as T */

static inline void FN(widen)(subspace_dtype dtype, const void *from, int64_t at, int64_t count, T *restrict to)
{
    if (IS_F32 || dtype == SUBSPACE_F64) {
        memcpy(to, (const T *)from + at, (size_t)count * sizeof(T));
    } else {
        const float *x = (const float *)from + at;
        for (int64_t i = 0; i < count; i++) to[i] = (T)x[i];
    }
}

static inline void FN(narrow)(subspace_dtype dtype, const T *restrict from, int64_t count, void *to, int64_t at)
{
    if (IS_F32 || dtype == SUBSPACE_F64) {
        memcpy((T *)to + at, from, (size_t)count * sizeof(T));
    } else {
        float *x = (float *)to + at;
        for (int64_t i = 0; i < count; i++) x[i] = (float)from[i];
    }
}

/* Panel at .. at + w of the longer side, rows of ld, with zeros at their ends. */
static void FN(load)(const rate_job *job, int64_t at, int64_t w, T *p, int64_t ld)
{
    const int64_t d = job->run->a->d, rows = job->points ? job->m : w, cols = job->points ? w : d;
    const int64_t first = job->points ? 0 : at, column = job->points ? at : 0;
    for (int64_t i = 0; i < rows; i++) {
        FN(widen)(job->run->a->dtype, job->z, row_of(job, first + i) * d + column, cols, p + i * ld);
        for (int64_t j = cols; j < ld; j++) p[i * ld + j] = 0;
    }
}

/* The same panel of dz. */
static void FN(store)(const rate_job *job, int64_t at, int64_t w, const T *p, int64_t ld)
{
    const int64_t d = job->run->a->d, rows = job->points ? job->m : w, cols = job->points ? w : d;
    const int64_t first = job->points ? 0 : at, column = job->points ? at : 0;
    for (int64_t i = 0; i < rows; i++)
        FN(narrow)(job->run->a->dtype, p + i * ld, cols, job->dz, row_of(job, first + i) * d + column);
}

/* ------------------------------------------------------------------------------- forward */

typedef struct FN(gram_run) { /* X of a group, in parts of its longer side or in tiles of a panel */
    const rate_job *job;
    int64_t parts, ldx;
    T *x, *part; /* part: [parts - 1] more X, or one that takes turns */
    const T *p;  /* the panel of the tiles */
    int64_t w, ldp;
    bool add;
} FN(gram_run);

/* Tile (i, j) of X (+)= a P P' or a P' P */
static void FN(gram_tile)(const rate_job *job, int64_t i, int64_t j, const T *p, int64_t w, int64_t ldp, bool add, T *x,
                          int64_t ldx)
{
    const int64_t s = job->s, step = job->points ? ldp : 1;
    GEMM(!job->points, job->points, MIN(TILE, s - i), MIN(TILE, s - j), w, (T)job->alpha, p + i * step, ldp,
         p + j * step, ldp, add, x + i * ldx + j, ldx);
}

/* Can OpenBLAS read z where it is? */
static bool FN(in_place)(const rate_job *job)
{
    return job->s > SMALL && !job->rows && (IS_F32 || job->run->a->dtype == SUBSPACE_F64);
}

/* Can the microkernels? They read whole vectors of a row, and ROWS entries. */
static bool FN(direct)(const rate_job *job)
{
    return job->run->a->d % FN(LANES) == 0 && job->run->a->d % ROWS == 0 &&
           (IS_F32 || job->run->a->dtype == SUBSPACE_F64);
}

/* Pointers to a panel's rows: in z itself, if they are whole vectors. */
static void FN(small_panel)(const rate_job *job, int64_t at, int64_t w, T *p, int64_t ld, const T **row)
{
    const int64_t d = job->run->a->d, rows = job->points ? job->m : w;
    if (FN(direct)(job)) {
        const T *z = (const T *)job->z + (job->points ? at : 0);
        for (int64_t i = 0; i < rows; i++) row[i] = z + row_of(job, job->points ? i : at + i) * d;
        for (int64_t i = rows; i < ROUND(rows, ROWS); i++) row[i] = row[i - 1];
    } else {
        FN(load)(job, at, w, p, ld);
        FN(point)(rows, p, ld, row);
    }
}

/* The share of X of the part [from, to) of the longer side. */
static void FN(gram_part)(const rate_job *job, int64_t from, int64_t to, T *p, T *x, int64_t ldx)
{
    const int64_t s = job->s, d = job->run->a->d;
    const int64_t width = FN(in_place)(job) ? to - from : width_of(job);
    for (int64_t at = from; at < to; at += width) {
        const int64_t w = MIN(width, to - at), ld = ROUND(job->points ? w : s, FN(LANES));
        const bool add = at > from;
        if (FN(in_place)(job)) {
            const T *z = (const T *)job->z + at * (job->points ? 1 : d);
            for (int64_t i = 0; i < s; i += TILE)
                for (int64_t j = i; j < s; j += TILE) FN(gram_tile)(job, i, j, z, w, d, add, x, ldx);
        } else if (s > SMALL) {
            FN(load)(job, at, w, p, ld);
            for (int64_t i = 0; i < s; i += TILE)
                for (int64_t j = i; j < s; j += TILE) FN(gram_tile)(job, i, j, p, w, ld, add, x, ldx);
        } else {
            const T *row[SMALL];
            FN(small_panel)(job, at, w, p, ld, row);
            if (job->points) FN(gram_of_rows)(s, ld, (T)job->alpha, row, add, x, ldx);
            else FN(gram_of_columns)(s, w, (T)job->alpha, row, add, x, ldx);
        }
    }
}

static void FN(gram_parts)(int64_t begin, int64_t end, void *arg)
{
    const FN(gram_run) *g = arg;
    const rate_job *job = g->job;
    for (int64_t part = begin; part < end; part++) {
        int64_t from, to;
        part_of(job, part, g->parts, &from, &to);
        T *x = part ? g->part + (part - 1) * matrix_size(job->s) : g->x;
        T *p = (T *)job->run->panels + part * panel_size(job->s);
        FN(gram_part)(job, from, to, p, x, g->ldx);
    }
}

static void FN(add_part)(int64_t s, const T *part, T *x, int64_t ldx)
{
    for (int64_t i = 0; i < s; i++)
        for (int64_t j = i; j < s; j++) x[i * ldx + j] += part[i * ldx + j];
}

static void FN(gram_tiles)(int64_t begin, int64_t end, void *arg)
{
    const FN(gram_run) *g = arg;
    const int64_t down = CEIL_DIV(g->job->s, TILE);
    for (int64_t q = begin; q < end; q++) {
        int64_t i = 0, j = q; /* the q-th tile of the upper half */
        while (j >= down - i) j -= down - i, i++;
        FN(gram_tile)(g->job, i * TILE, (i + j) * TILE, g->p, g->w, g->ldp, g->add, g->x, g->ldx);
    }
}

/* X = a Z Z' or a Z' Z, the upper half */
static void FN(gram)(const rate_job *job, T *x, int64_t ldx)
{
    const int64_t s = job->s, parts = parts_of(job), down = CEIL_DIV(s, TILE);
    FN(gram_run) g = {
        .job = job, .parts = parts, .ldx = ldx, .x = x, .p = job->z, .w = job->len, .ldp = job->run->a->d};
    if (s <= SMALL && job->inside) {
        g.part = (T *)job->run->parts;
        job->run->ctx->parallel_for(parts, 1, FN(gram_parts), &g);
        for (int64_t part = 1; part < parts; part++) FN(add_part)(s, g.part + (part - 1) * matrix_size(s), x, ldx);
    } else if (s <= SMALL) {
        for (int64_t part = 0; part < parts; part++) {
            int64_t from, to;
            part_of(job, part, parts, &from, &to);
            FN(gram_part)(job, from, to, job->panel, part ? job->inverse : x, ldx);
            if (part) FN(add_part)(s, job->inverse, x, ldx);
        }
    } else if (FN(in_place)(job)) {
        job->run->ctx->parallel_for(down * (down + 1) / 2, 1, FN(gram_tiles), &g);
    } else {
        for (int64_t at = 0; at < job->len; at += g.w) {
            g.w = MIN(panel_width(s), job->len - at), g.ldp = ROUND(job->points ? g.w : s, FN(LANES));
            g.p = job->panel, g.add = at > 0;
            FN(load)(job, at, g.w, job->panel, g.ldp);
            job->run->ctx->parallel_for(down * (down + 1) / 2, 1, FN(gram_tiles), &g);
        }
    }
}

/* The Frobenius norm of X. */
static double FN(norm)(int64_t s, const T *x, int64_t ld)
{
    double sum = 0;
    for (int64_t i = 0; i < s; i++) {
        double row = 0;
#pragma omp simd reduction(+ : row)
        for (int64_t j = i + 1; j < s; j++) row += (double)x[i * ld + j] * (double)x[i * ld + j];
        sum += 2 * row + (double)x[i * ld + i] * (double)x[i * ld + i];
    }
    return sqrt(sum);
}

#if !IS_F32
/* U, and what `rate` returns, without X. */
static double FN(rate_of_points)(const rate_job *job)
{
    const int64_t s = job->s, ld = ROUND(s, FN(LANES)), d = job->run->a->d;
    const T root = sqrt(job->alpha);
    T *u = job->x, *p = job->panel, *spare = p + QR_ROWS * ld;
    for (int64_t i = 0; i < s; i++)
        for (int64_t j = i; j < s; j++) u[i * ld + j] = i == j;
    for (int64_t at = 0; at < job->len; at += QR_ROWS) {
        const int64_t w = MIN(QR_ROWS, job->len - at);
        if (!job->points) FN(load)(job, at, w, p, ld);
        for (int64_t i = 0; job->points && i < s; i++) {
            FN(widen)(job->run->a->dtype, job->z, row_of(job, i) * d + at, w, spare);
            for (int64_t l = 0; l < w; l++) p[l * ld + i] = spare[l];
        }
        for (int64_t l = 0; l < w; l++)
            for (int64_t i = 0; i < s; i++) p[l * ld + i] *= root;
        qr_update(s, w, u, ld, p, ld, spare);
    }
    return qr_half(s, u, ld, spare);
}
#endif

/* U of the group in the job's x, rows of ROUND(s, LANES); 1/2 log det(I + X), or NaN: not in this precision. */
static double FN(rate)(const rate_job *job)
{
    const int64_t s = job->s, ld = ROUND(s, FN(LANES));
    const T *u = job->x;
    FN(gram)(job, job->x, ld);
    const double norm = FN(norm)(s, u, ld), half = FN(factor)(job->run->ctx, s, job->x, ld);
    double least = INFINITY; /* an upper bound of the least eigenvalue of I + X, and mostly near it */
    for (int64_t i = 0; i < s; i++) least = MIN(least, (double)u[i * ld + i] * (double)u[i * ld + i]);
    if (isfinite(half) && norm <= (IS_F32 ? CAREFUL : LOST) * least) return half; /* neither is NaN */
#if IS_F32
    return NAN;
#else
    return FN(rate_of_points)(job);
#endif
}

/* U as the backward will find it, [s, s] without gaps and zeros below; or zeros: it is to start over in double. */
static void FN(keep)(const rate_job *job, bool made)
{
    const int64_t s = job->s, ld = ROUND(s, FN(LANES));
    T *to = (T *)job->run->a->factor + job->kept_at;
    const T *x = job->x;
    for (int64_t i = 0; i < s; i++) {
        for (int64_t j = 0; j < (made ? i : s); j++) to[i * s + j] = 0;
        if (made) memcpy(to + i * s + i, x + i * ld + i, (size_t)(s - i) * sizeof(T));
    }
}

/* ------------------------------------------------------------------------------ backward */

/* What the forward kept; false where it kept nothing. */
static bool FN(recall)(const rate_job *job)
{
    const int64_t s = job->s, ld = ROUND(s, FN(LANES));
    const T *from = (const T *)job->run->a->factor + job->kept_at;
    T *x = job->x;
    if (from[0] == 0) return false;
    for (int64_t i = 0; i < s; i++) memcpy(x + i * ld + i, from + i * s + i, (size_t)(s - i) * sizeof(T));
    return true;
}

/* A panel of dz by the microkernels: W Z, or Z W. */
static void FN(small_gradient)(const rate_job *job, int64_t at, int64_t w, T *p, T *out, int64_t ld)
{
    const int64_t s = job->s, d = job->run->a->d, ldw = ROUND(s, FN(LANES)), rows = job->points ? s : w;
    const T *inverse[SMALL], *z[SMALL];
    T *c[SMALL];
    FN(point)(s, job->inverse, ldw, inverse);
    FN(small_panel)(job, at, w, p, ld, z);
    for (int64_t i = 0; i < ROUND(rows, ROWS); i++)
        c[i] = FN(direct)(job) && i < rows
                   ? (T *)job->dz + row_of(job, job->points ? i : at + i) * d + (job->points ? at : 0)
                   : out + i * ld;
    if (job->points) FN(times)(s, ld, s, inverse, z, c);
    else FN(times)(w, ld, s, z, inverse, c);
    if (!FN(direct)(job)) FN(store)(job, at, w, out, ld);
}

/* A panel of dz by two triangular solves. */
static void FN(large_gradient)(const rate_job *job, int64_t at, int64_t w, T *p, T *out, int64_t ld)
{
    const int64_t s = job->s, rows = job->points ? s : w, cols = job->points ? w : s, ldu = ROUND(s, FN(LANES));
    FN(load)(job, at, w, p, ld);
    for (int64_t i = 0; i < rows * ld; i++) p[i] *= (T)job->scale;
    FN(solve_blocks)(!job->points, job->points, rows, cols, job->x, ldu, job->run->blocks, p, ld, out);
    FN(solve_blocks)(!job->points, !job->points, rows, cols, job->x, ldu, job->run->blocks, p, ld, out);
    FN(store)(job, at, w, p, ld);
}

static void FN(gradient_panels)(int64_t begin, int64_t end, void *arg)
{
    const rate_job *job = arg;
    const int64_t s = job->s, width = width_of(job), count = CEIL_DIV(job->len, width);
    for (int64_t slot = begin; slot < end; slot++) {
        const rate_slot own = job->inside ? slot_of(job->run, slot) : (rate_slot){.panel = job->panel, .out = job->out};
        int64_t first, last;
        share(count, slot, job->inside ? job->run->slots : 1, &first, &last);
        for (int64_t at = first * width; at < MIN(last * width, job->len); at += width) {
            const int64_t w = MIN(width, job->len - at), ld = ROUND(job->points ? w : s, FN(LANES));
            if (s > SMALL) FN(large_gradient)(job, at, w, own.panel, own.out, ld);
            else FN(small_gradient)(job, at, w, own.panel, own.out, ld);
        }
    }
}

/* dz of the group from the U in the job's x */
static void FN(gradient)(const rate_job *job)
{
    const int64_t s = job->s;
    FN(factoring) f = {.s = s, .ld = ROUND(s, FN(LANES)), .x = job->x, .blocks = (T *)job->run->blocks};
    if (s <= SMALL) FN(inverse)(s, job->x, ROUND(s, FN(LANES)), job->scale, job->out, job->inverse);
    else job->run->ctx->parallel_for(CEIL_DIV(s, BLOCK), 1, FN(invert_blocks), &f);
    if (job->inside) job->run->ctx->parallel_for(job->run->slots, 1, FN(gradient_panels), (void *)job);
    else FN(gradient_panels)(0, 1, (void *)job);
}

#endif
