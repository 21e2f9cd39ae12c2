/* coding_rate.c - coding rate of groups of points, each on its smaller side.
 *
 *     a    = d / (m eps)                      m points Z of a group, d features
 *     X    = a Z Z'  (m <= d)   or  a Z' Z    s x s, the upper half, panel by panel of Z
 *     U'U  = I + X                            factor.h, with h = 1/2 log det(I + X)
 *     rate = sum m/n h
 *     dZ   = drate m/n a (I + a Z Z')^-1 Z = drate m/n a Z (I + a Z' Z)^-1
 *
 * rate_group.h does a group, in panels of Z: with s <= SMALL by the microkernels of factor.h and the whole inverse,
 * above by OpenBLAS's products and two triangular solves made of them. Here groups are dealt to the threads.
 *
 * float32 loses the digits of the small eigenvalues to the large ones of X, so a group whose I + X is conditioned worse
 * than CAREFUL starts over in double, by the same functions; its kept factor is marked by a 0 in front. Where double
 * loses them as well, U is made of the points themselves (qr_update.h), and where that is too short, too, it is said.
 *
 * The threads share the groups; of a group that is more than a thread's share, they share the panels and tiles instead.
 * Either way every number is computed in the same order: results do not depend on the number of threads.
 * Memory: for each thread a group's panels and matrices, and s x s doubles, of a large group s x BLOCK more.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "rate_group.h"

static void plan(rate_run *run, subspace_ctx *ctx, const subspace_coding_rate_args *a, char *base, size_t *bytes)
{
    const int64_t side = MIN(a->n, a->d), threads = MAX(1, ctx->threads);
    const int64_t parts = MIN(PARTS, CEIL_DIV(MAX(a->n, a->d), PANEL_WIDTH));
    *run = (rate_run){.ctx = ctx, .a = a, .slots = threads, .side = side};
    if (side <= 0 || a->v <= 0) return;
    lay_out(side, NULL, &run->slot_bytes);
    run->half = carve(base, bytes, a->v * (a->start ? a->n : 1), sizeof(double));
    run->large = carve(base, bytes, matrix_size(side), sizeof(double));
    run->blocks = carve(base, bytes, side > SMALL ? ROUND(side, BLOCK) * BLOCK : 0, sizeof(double));
    run->parts = carve(base, bytes, parts * matrix_size(MIN(side, SMALL)), sizeof(double));
    run->panels = carve(base, bytes, parts * MAX(PANEL, panel_size(MIN(side, SMALL))), sizeof(double));
    run->scratch = carve(base, bytes, threads * (int64_t)run->slot_bytes, 1);
}

size_t LEVEL(subspace_coding_rate_workspace)(const subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    size_t bytes = 0;
    rate_run run;
    plan(&run, (subspace_ctx *)(uintptr_t)ctx, a, NULL, &bytes);
    return bytes;
}

#define THIS_FILE "rates/coding_rate.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "rate_group.h"

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

#define F32(name) LEVEL(name##_f32)
#define F64(name) LEVEL(name##_f64)

/* m/n h of a group, in float32 if that is enough, else in double; NaN: it failed. */
static double rate_of(const rate_job *job)
{
    const subspace_coding_rate_args *a = job->run->a;
    const bool f32 = a->dtype == SUBSPACE_F32;
    double half = f32 ? F32(rate)(job) : F64(rate)(job);
    if (f32 && a->factor) F32(keep)(job, !isnan(half));
    if (!f32 && a->factor) F64(keep)(job, !isnan(half));
    if (f32 && isnan(half)) half = F64(rate)(job);
    return (double)job->m / (double)a->n * half;
}

/* dz of a group; NaN: it failed */
static double gradient_of(const rate_job *job)
{
    const subspace_coding_rate_args *a = job->run->a;
    if (a->dtype == SUBSPACE_F32) {
        if (a->factor ? F32(recall)(job) : !isnan(F32(rate)(job))) {
            F32(gradient)(job);
            return 0;
        }
    } else if (a->factor && F64(recall)(job)) {
        F64(gradient)(job);
        return 0;
    }
    if (isnan(F64(rate)(job))) return NAN;
    F64(gradient)(job);
    return 0;
}

/* Group g of view v; false: it is empty. */
static bool group(const rate_run *run, int64_t v, int64_t g, rate_job *job)
{
    const subspace_coding_rate_args *a = run->a;
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    const int64_t *start = a->start ? a->start + v * (a->n + 1) + g : NULL;
    const int64_t first = start ? start[0] : 0, m = start ? start[1] - first : a->n;
    if (m == 0) return false;
    *job = (rate_job){.run = run, .m = m, .s = MIN(m, a->d), .len = MAX(m, a->d), .points = m <= a->d};
    job->rows = a->order ? a->order + v * a->n + first : NULL;
    job->z = (const char *)a->z + (size_t)(v * a->n * a->d) * item;
    job->dz = a->dz ? (char *)a->dz + (size_t)(v * a->n * a->d) * item : NULL;
    job->kept_at = v * subspace_coding_rate_factor(a) + (start ? first * MIN(a->n, a->d) : 0);
    job->alpha = (double)a->d / ((double)m * a->eps);
    if (run->backward) {
        const double drate = item == 8 ? ((const double *)a->drate)[v] : (double)((const float *)a->drate)[v];
        job->scale = drate * (double)m / (double)a->n * job->alpha;
    }
    return true;
}

/* Multiplications, and what a row costs beside them. */
static double work_of(const rate_job *job)
{
    return (double)job->s * (double)job->s * (double)job->len + 4096 * (double)job->m;
}

/* Is the group so large that the threads share it? The answer does not change its numbers. */
static bool inside(const rate_run *run, const rate_job *job)
{
    return job->s > SMALL || (work_of(job) > WORTH_SHARING && work_of(job) * (double)run->ctx->threads > run->work);
}

/* The groups of view v are 0 .. groups - 1, the last ones empty. */
static inline int64_t groups(const rate_run *run)
{
    return run->a->start ? run->a->n : 1;
}

static void do_group(rate_job *job, int64_t v, int64_t g)
{
    const rate_run *run = job->run;
    run->half[v * groups(run) + g] = run->backward ? gradient_of(job) : rate_of(job);
}

/* Threads that the groups are spread over, as far as it is worth waking them. */
static int64_t spread_slots(const rate_run *run)
{
    return MAX(1, MIN(run->slots, (int64_t)(run->spread / WORTH_A_THREAD)));
}

/* Each slot takes the groups whose share of the work, added up in order, falls to it. */
static void spread(int64_t begin, int64_t end, void *arg)
{
    const rate_run *run = arg;
    const int64_t slots = spread_slots(run);
    const double step = run->spread / (double)slots;
    for (int64_t slot = begin; slot < end; slot++) {
        const rate_slot own = slot_of(run, slot);
        double before = 0;
        for (int64_t v = 0; v < run->a->v; v++)
            for (int64_t g = 0; g < groups(run); g++) {
                rate_job job;
                if (!group(run, v, g, &job) || inside(run, &job)) continue;
                const int64_t owner = MIN((int64_t)(before / step), slots - 1);
                before += work_of(&job);
                if (owner != slot) continue;
                job.x = own.x, job.inverse = own.inverse, job.panel = own.panel, job.out = own.out;
                do_group(&job, v, g);
            }
    }
}

/* Every row of order must be a row of z, and start rise from 0 to n: they are addresses. */
static subspace_status check_groups(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    for (int64_t v = 0; a->start && v < a->v; v++) {
        const int64_t *order = a->order + v * a->n, *start = a->start + v * (a->n + 1);
        int64_t bad = start[0] != 0 || start[a->n] != a->n;
        for (int64_t i = 0; i < a->n; i++) bad |= order[i] < 0 || order[i] >= a->n || start[i] > start[i + 1];
        CHECK(ctx, !bad, SUBSPACE_INVALID_ARGUMENT,
              "coding_rate: view %lld: order and start are not groups of %lld rows", (long long)v, (long long)a->n);
    }
    return SUBSPACE_OK;
}

/* All the work there is, then how much of it is spread. */
static void measure(rate_run *run)
{
    rate_job job;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t v = 0; v < run->a->v; v++)
            for (int64_t g = 0; g < groups(run); g++) {
                if (!group(run, v, g, &job)) continue;
                if (pass == 0) run->work += work_of(&job);
                else if (!inside(run, &job)) run->spread += work_of(&job);
            }
}

/* The groups that the threads share, one after the other. */
static void shared(const rate_run *run)
{
    const rate_slot own = slot_of(run, 0);
    rate_job job;
    for (int64_t v = 0; v < run->a->v; v++)
        for (int64_t g = 0; g < groups(run); g++) {
            if (!group(run, v, g, &job) || !inside(run, &job)) continue;
            job.inside = true;
            job.x = run->large, job.inverse = own.inverse, job.panel = own.panel, job.out = own.out;
            do_group(&job, v, g);
        }
}

/* The sum of each view's groups, in their order. */
static subspace_status sum_groups(const rate_run *run)
{
    const subspace_coding_rate_args *a = run->a;
    rate_job job;
    for (int64_t v = 0; v < a->v; v++) {
        double sum = 0;
        for (int64_t g = 0; g < groups(run); g++) {
            const double half = group(run, v, g, &job) ? run->half[v * groups(run) + g] : 0;
            CHECK(
                run->ctx, !isnan(half), SUBSPACE_NUMERICAL,
                "coding_rate: view %lld, group %lld: the factorisation failed; z holds values that are not finite or "
                "beyond float64's range, or points so long, of low rank, that float64 rounds their rate away: scale z",
                (long long)v, (long long)g);
            sum += half;
        }
        if (run->backward) continue;
        if (a->dtype == SUBSPACE_F64) ((double *)a->rate)[v] = sum;
        else ((float *)a->rate)[v] = (float)sum;
    }
    return SUBSPACE_OK;
}

static subspace_status every_group(subspace_ctx *ctx, const subspace_coding_rate_args *a, bool backward)
{
    size_t bytes = 0;
    rate_run run;
    TRY(subspace_coding_rate_check(ctx, a));
    TRY(check_groups(ctx, a));
    plan(&run, ctx, a, ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "coding_rate: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    if (a->v == 0) return SUBSPACE_OK;
    run.backward = backward;
    measure(&run);
    if (run.spread > 0) ctx->parallel_for(spread_slots(&run), 1, spread, &run);
    shared(&run);
    return sum_groups(&run);
}

subspace_status LEVEL(subspace_coding_rate)(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    return every_group(ctx, a, false);
}

subspace_status LEVEL(subspace_coding_rate_backward)(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    return every_group(ctx, a, true);
}

#endif
