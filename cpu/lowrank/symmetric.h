/* symmetric.h - the product that is known to be symmetric: half of it is computed, and mirrored.
 *
 *     C = scale (L_0 R_0 + L_1 R_1) + add E + diagonal I          C, E [m, m], row-major
 *
 * Gram matrices are symmetric, and so is the product of symmetric matrices that commute, such as polynomials of one.
 * C is cut into blocks of at most TILE rows. A pair of blocks off the diagonal is one GEMM; a block on it is halved
 * down to LEAF: (1 + LEAF/m)/2 of the operations of the whole product, in products as large as that allows. The blocks
 * are the same for any number of threads.
 *
 * Included by newton_schulz.c, once without T and once per precision.
 */
#include "cpu.h"
#ifndef T

enum {
    TILE = 256, /* rows and columns of a product that a thread makes, at most */
    LEAF = 64,  /* rows of what is computed as a whole on the diagonal */
    PATCH = 16, /* rows and columns that are mirrored at one go: a cache line of each */
};

typedef struct half_product {
    int64_t m, k;                   /* C is [m, m], the sums run over k */
    const void *left[2], *right[2]; /* [m, k] or, transa, [k, m]; [k, m] or, transb, [m, k]; one or two of each */
    bool transa, transb;
    int64_t ld; /* of all of them */
    double scale, add, diagonal;
    const void *also; /* E; not read when add is 0 */
    void *c;
} half_product;

/* Job `job` of blocks (blocks + 1) / 2 is the pair of blocks (*i, *j), i <= j. */
static void pair_of(int64_t blocks, int64_t job, int64_t *i, int64_t *j)
{
    for (*i = 0; job >= blocks - *i; ++*i) job -= blocks - *i;
    *j = *i + job;
}

#else

/* Rows i0 .. i1, columns j0 .. j1, and their mirror image. */
static void FN(block)(const half_product *p, int64_t i0, int64_t i1, int64_t j0, int64_t j1)
{
    T *c = p->c;
    const T *e = p->also, scale = (T)p->scale, add = (T)p->add;
    const int64_t m = p->m, ld = p->ld;
    for (int t = 0; t < 2 && p->left[t]; t++)
        GEMM(p->transa, p->transb, i1 - i0, j1 - j0, p->k, scale, (const T *)p->left[t] + (p->transa ? i0 : i0 * ld),
             ld, (const T *)p->right[t] + (p->transb ? j0 * ld : j0), ld, (T)(t > 0), c + i0 * m + j0, m);
    if (p->add != 0)
        for (int64_t i = i0; i < i1; i++)
            for (int64_t j = j0; j < j1; j++) c[i * m + j] += add * e[i * m + j];
    if (i0 == j0)
        for (int64_t i = i0; i < i1; i++) c[i * m + i] += (T)p->diagonal;
    for (int64_t i = i0; i < i1; i += PATCH)
        for (int64_t j = MAX(i, j0); j < j1; j += PATCH)
            for (int64_t k = j; k < MIN(j + PATCH, j1); k++)
                for (int64_t l = i; l < MIN(i + PATCH, MIN(i1, k)); l++) c[k * m + l] = c[l * m + k];
}

/* Rows and columns from .. to. */
static void FN(triangle)(const half_product *p, int64_t from, int64_t to)
{
    if (to - from <= LEAF) {
        FN(block)(p, from, to, from, to);
        return;
    }
    const int64_t half = from + CEIL_DIV(to - from, 2 * PATCH) * PATCH;
    FN(triangle)(p, from, half);
    FN(triangle)(p, half, to);
    FN(block)(p, from, half, half, to);
}

static void FN(half_blocks)(int64_t begin, int64_t end, void *arg)
{
    const half_product *p = arg;
    const int64_t blocks = CEIL_DIV(p->m, TILE);
    for (int64_t job = begin; job < end; job++) {
        int64_t i, j, i0, i1, j0, j1;
        pair_of(blocks, job, &i, &j);
        share(p->m, i, blocks, &i0, &i1);
        share(p->m, j, blocks, &j0, &j1);
        if (i == j) FN(triangle)(p, i0, i1);
        else FN(block)(p, i0, i1, j0, j1);
    }
}

#endif
