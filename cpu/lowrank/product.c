/* product.c - matrix products of a low-rank step, on the CPU.
 *
 *     y <- scale op(a) op(b) + add y
 *
 * A panel of y, some rows, is one product of OpenBLAS on one thread. b is packed once for each, which of 128 rows would
 * be a fifth of the work and of 512 a twentieth: so as many rows as leave each thread a panel, up to 512, and where
 * there are not rows enough some columns alone.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "linalg.h"

enum {
    LEAST_PANEL = 64, /* rows, or columns */
    MOST_PANEL = 512,
    WORTH_A_THREAD = 1 << 18 /* multiplications */
};

typedef struct product_run {
    const subspace_product_args *a;
    int64_t rows, width;  /* of a panel */
    int64_t down, across; /* how many of them a matrix has */
} product_run;

size_t LEVEL(subspace_product_workspace)(const subspace_ctx *ctx, const subspace_product_args *a)
{
    (void)ctx, (void)a;
    return 0;
}

#define THIS_FILE "lowrank/product.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

static void FN(panels_of)(int64_t begin, int64_t end, void *arg)
{
    const product_run *run = arg;
    const subspace_product_args *p = run->a;
    for (int64_t i = begin; i < end; i++) {
        const int64_t v = i / (run->down * run->across), at = i % (run->down * run->across);
        const int64_t row = at / run->across * run->rows, rows = MIN(run->rows, p->m - row);
        const int64_t column = at % run->across * run->width, columns = MIN(run->width, p->n - column);
        const T *a = (const T *)p->a + v * p->m * p->k + row * (p->transa ? 1 : p->k);
        const T *b = (const T *)p->b + (p->shared ? 0 : v * p->k * p->n) + column * (p->transb ? p->k : 1);
        GEMM(p->transa, p->transb, rows, columns, p->k, (T)p->scale, a, MAX(1, p->transa ? p->m : p->k), b,
             MAX(1, p->transb ? p->k : p->n), (T)p->add, (T *)p->y + (v * p->m + row) * p->n + column, p->n);
    }
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

subspace_status LEVEL(subspace_product)(subspace_ctx *ctx, const subspace_product_args *a)
{
    TRY(subspace_product_check(ctx, a));
    product_run run = {.a = a};
    const int64_t threads = CEIL_DIV(MAX(ctx->threads, 1), MAX(a->v, 1)); /* of a matrix */
    run.rows = MIN(MOST_PANEL, CEIL_DIV(CEIL_DIV(a->m, threads), LEAST_PANEL) * LEAST_PANEL);
    run.rows = MAX(run.rows, 1), run.down = CEIL_DIV(a->m, run.rows);
    run.across = MAX(1, MIN(CEIL_DIV(threads, MAX(run.down, 1)), a->n / LEAST_PANEL));
    run.width = MAX(1, CEIL_DIV(a->n, run.across)), run.across = CEIL_DIV(a->n, run.width);
    const double work = (double)MIN(run.rows, a->m) * (double)run.width * (double)a->k;
    ctx->parallel_for(a->v * run.down * run.across, 1 + (int64_t)(WORTH_A_THREAD / MAX(work, 1)),
                      a->dtype == SUBSPACE_F64 ? LEVEL(panels_of_f64) : LEVEL(panels_of_f32), &run);
    return SUBSPACE_OK;
}

#endif
