/* product.c - matrix products of a low-rank step, on the CPU.
 *
 *     y <- scale op(a) op(b) + add y
 *
 * A panel of y's rows is one product of OpenBLAS on one thread. How many rows, y's own number says: the bits are the
 * same for any number of threads. b is packed once for each panel, which of 128 rows would be a fifth of the work, of
 * 512 a twentieth; but of few rows two threads want a share each.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "linalg.h"

enum {
    LEAST_PANEL = 64,
    MOST_PANEL = 512,
    WORTH_A_THREAD = 1 << 18 /* multiplications */
};

typedef struct product_run {
    const subspace_product_args *a;
    int64_t panel, panels; /* rows of one, and how many a matrix has */
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
        const int64_t v = i / run->panels, row = i % run->panels * run->panel, rows = MIN(run->panel, p->m - row);
        const T *a = (const T *)p->a + v * p->m * p->k + row * (p->transa ? 1 : p->k);
        const T *b = (const T *)p->b + (p->shared ? 0 : v * p->k * p->n);
        GEMM(p->transa, p->transb, rows, p->n, p->k, (T)p->scale, a, MAX(1, p->transa ? p->m : p->k), b,
             MAX(1, p->transb ? p->k : p->n), (T)p->add, (T *)p->y + (v * p->m + row) * p->n, p->n);
    }
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

subspace_status LEVEL(subspace_product)(subspace_ctx *ctx, const subspace_product_args *a)
{
    TRY(subspace_product_check(ctx, a));
    product_run run = {.a = a};
    run.panel = MIN(MOST_PANEL, MAX(LEAST_PANEL, CEIL_DIV(a->m, 4 * LEAST_PANEL) * LEAST_PANEL));
    run.panels = CEIL_DIV(a->m, run.panel);
    const double work = (double)MIN(run.panel, a->m) * (double)a->n * (double)a->k;
    ctx->parallel_for(a->v * run.panels, 1 + (int64_t)(WORTH_A_THREAD / MAX(work, 1)),
                      a->dtype == SUBSPACE_F64 ? LEVEL(panels_of_f64) : LEVEL(panels_of_f32), &run);
    return SUBSPACE_OK;
}

#endif
