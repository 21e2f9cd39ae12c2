/* coding_rate.h - what coding_rate.c and rate_group.h have in common: the sizes, one call's run, one group's job.
 * Included by rate_group.h, without T and, for factor.h, once per precision. */
#include "factor.h"
#include "qr_update.h"
#ifndef SUBSPACE_CODING_RATE_H
#define SUBSPACE_CODING_RATE_H

enum {
    TILE = 64,                /* of a large Gram matrix */
    PARTS = 16,               /* of a long group's Gram matrix, at most */
    CHUNK = 64,               /* rows of z in a panel of a small group */
    PANEL = 1 << 15,          /* entries of a panel, */
    PANEL_WIDTH = 256,        /* or its width where the side is long */
    WORTH_A_THREAD = 1 << 19, /* multiplications */
    WORTH_SHARING = 1 << 20,  /* of a group */
};
#define CAREFUL 100.0 /* about the condition number of I + X from which on float32 would lose more than 1e-5 */

typedef struct rate_slot { /* scratch of one thread */
    void *x, *inverse, *panel, *out;
} rate_slot;

typedef struct rate_run {
    subspace_ctx *ctx;
    const subspace_coding_rate_args *a;
    bool backward;
    int64_t slots, side; /* side: the largest there can be */
    char *scratch;       /* [slots][slot_bytes] */
    size_t slot_bytes;
    void *large, *parts, *panels; /* of a group that the threads share: X, the parts of X and their panels, */
    void *blocks;                 /* and the inverses of U's diagonal blocks where it is large */
    double *half;                 /* [v, n] m/n h of each group, NaN: failed; [v] without groups */
    double work, spread;          /* multiplications of all groups; of those that are spread */
} rate_run;

typedef struct rate_job { /* one group */
    const rate_run *run;
    int64_t m, s, len;   /* points; the smaller and the larger of points and features */
    bool points, inside; /* points: s is m; inside: the threads share this group */
    const int64_t *rows; /* [m] or NULL: 0 .. m-1 */
    const void *z;       /* the view's */
    void *dz;
    int64_t kept_at;     /* of its factor, in entries */
    double alpha, scale; /* a, and drate m/n a */
    void *x, *inverse, *panel, *out;
} rate_job;

static inline int64_t row_of(const rate_job *job, int64_t i)
{
    return job->rows ? job->rows[i] : i;
}

/* Columns or rows of a panel: with its matrix it stays in the cache. */
static inline int64_t panel_width(int64_t s)
{
    return MAX(PANEL_WIDTH, PANEL / ROUND(s, 16) / 64 * 64);
}

/* Of small groups the microkernels take CHUNK rows at a time. */
static inline int64_t width_of(const rate_job *job)
{
    return job->s > SMALL || job->points ? panel_width(job->s) : CHUNK;
}

/* Entries of a panel and of a square matrix, padding included. */
static inline int64_t panel_size(int64_t s)
{
    return panel_width(s) * ROUND(s, 16);
}

static inline int64_t matrix_size(int64_t s)
{
    return ROUND(s, 16) * ROUND(s, 16);
}

/* A Gram matrix of a long group is the sum of some parts, always the same ones. */
static inline int64_t parts_of(const rate_job *job)
{
    return job->s > SMALL ? 1 : MIN(PARTS, CEIL_DIV(job->len, panel_width(job->s)));
}

/* Parts end where vectors do: the microkernels read whole ones, and what is beyond a part's end belongs to the next. */
static inline void part_of(const rate_job *job, int64_t part, int64_t parts, int64_t *from, int64_t *to)
{
    share(CEIL_DIV(job->len, 16), part, parts, from, to);
    *from *= 16, *to = MIN(*to * 16, job->len);
}

/* One thread's scratch; with a NULL base it only adds up the size. A matrix is never larger than SMALL here, for the
 * threads share the groups above; their panels are larger then. */
static rate_slot lay_out(int64_t side, char *base, size_t *bytes)
{
    const int64_t s = MIN(side, SMALL);
    rate_slot slot;
    slot.x = carve(base, bytes, matrix_size(s), sizeof(double));
    slot.inverse = carve(base, bytes, matrix_size(s), sizeof(double));
    slot.panel = carve(base, bytes, MAX(PANEL, panel_size(side)), sizeof(double));
    slot.out = carve(base, bytes, MAX(PANEL, panel_size(MIN(side, SMALL))), sizeof(double));
    return slot;
}

static rate_slot slot_of(const rate_run *run, int64_t slot)
{
    size_t bytes = 0;
    return lay_out(run->side, run->scratch + (size_t)slot * run->slot_bytes, &bytes);
}

#endif
