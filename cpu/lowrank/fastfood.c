/* fastfood.c - a product with a random matrix that is not stored, and with its transpose, on the CPU.
 *
 *     t = H_D B pad(theta)            D, M and L: the least powers of two no less than d, m and both
 *     u_i = G_i t[pi(i) mod D]        i < L: H_L of what is zero beyond D is L / D times H_D of it
 *     f_i = u_i + u_(i+M) + ...       i < M: only the first m entries of H_L u are wanted
 *     out = H_M f / sqrt(m sum G^2)
 *
 * and the transpose of each in the other order for the adjoint, where u is gathered by pi's inverse. Two short
 * transforms and one pass over L normal numbers and places, made TILE at a time for all rows of a group (fastfood.h).
 * Entries of u are added up in the order in which H_L does it, and the sum of G^2 is exact: all slots, levels and
 * devices give the bits of the formula with H_L itself.
 */
#include "cpu.h"

#ifndef T /* ---------------------------------------------- read once: what the maths is about */

#include "fastfood.h"
#include "hadamard.h"
#include "widen.h"

enum {
    TILE = 256,          /* normal numbers, signs or places at a time: words for whole signs' words */
    GROUP = 1 << 18,     /* entries of the rows that are worked on together, if one row has no more */
    TILES_A_THREAD = 32, /* at least */
    FOLDED = 3,          /* bits of a place that are summed over in one step */
};

typedef struct fold_step { /* from rows of `from` entries to rows of 1 / 2^bits as many */
    const void *x;
    void *y;
    int64_t from;
    int bits;
    bool permuted;
} fold_step;

typedef struct fastfood_run {
    const subspace_ctx *ctx;
    const subspace_fastfood_args *a;
    bool adjoint, folded;
    int64_t from, rows; /* the rows that are being worked on, of at most `group` */
    int64_t group, slots;
    int64_t count, sharers;    /* of what is done tile by tile: entries, and slots that get some */
    int64_t ins, outs;         /* entries of a row of what comes in and goes out: d and m, or m and d */
    int64_t in, out, length;   /* the powers of two: D, M (or M, D) and L */
    hadamard_rows first, last; /* transforms of the rows that come in, and go out */
    void *t, *u, *f;           /* [group, in], [group, L], [group, out] T; some share their memory, see plan() */
    void *between;             /* [2, group, ...] T: what is between u and f */
    fold_step step;
    uint64_t *squares; /* [slots] sums of squares of G's multiples of 2^-18 */
    fastfood_order order;
    double scale;
    bool direct; /* the last transform goes to the result itself */
} fastfood_run;

static int bits_of(int64_t n)
{
    return n > 1 ? 64 - __builtin_clzll((uint64_t)n - 1) : 0;
}

static void plan(fastfood_run *run, const subspace_ctx *ctx, const subspace_fastfood_args *a, bool adjoint, char *base,
                 size_t *bytes)
{
    const size_t item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    *run = (fastfood_run){.ctx = ctx, .a = a, .adjoint = adjoint};
    run->ins = adjoint ? a->m : a->d, run->outs = adjoint ? a->d : a->m;
    run->in = (int64_t)1 << bits_of(run->ins), run->out = (int64_t)1 << bits_of(run->outs);
    run->length = MAX(run->in, run->out), run->slots = MAX(1, ctx->threads);
    run->group = MAX(1, MIN(a->v, GROUP / run->length));
    /* the result itself, where a row of it has all entries of the last transform; and nothing that is not read again */
    run->direct = !adjoint && a->m == run->out && (a->dtype == SUBSPACE_F32 || a->dtype == SUBSPACE_F64);
    run->folded = adjoint || run->length > run->out;
    run->t = run->u = carve(base, bytes, run->group * run->in, item);
    if (!adjoint || run->in < run->length)
        run->u = run->direct && !run->folded ? NULL : carve(base, bytes, run->group * run->length, item);
    run->f = run->folded ? carve(base, bytes, run->group * run->out, item) : run->u;
    run->between =
        run->length >> FOLDED > run->out ? carve(base, bytes, 2 * run->group * (run->length >> FOLDED), item) : NULL;
    run->squares = carve(base, bytes, run->slots, sizeof(uint64_t));
    run->first = plan_rows(ctx, run->group, run->in, item, base, bytes);
    run->last = plan_rows(ctx, run->group, run->out, item, base, bytes);
}

size_t LEVEL(subspace_fastfood_workspace)(const subspace_ctx *ctx, const subspace_fastfood_args *a)
{
    size_t forward = 0, adjoint = 0;
    fastfood_run run;
    plan(&run, ctx, a, false, NULL, &forward);
    plan(&run, ctx, a, true, NULL, &adjoint);
    return MAX(forward, adjoint);
}

/* fn over `count` entries, each slot some tiles of them */
static void each_tile(fastfood_run *run, int64_t count, void (*fn)(int64_t, int64_t, void *))
{
    run->count = count, run->sharers = MAX(1, MIN(run->slots, count / (TILE * TILES_A_THREAD)));
    run->ctx->parallel_for(run->sharers, 1, fn, run);
}

static void tiles_of(const fastfood_run *run, int64_t slot, int64_t *begin, int64_t *end)
{
    share(CEIL_DIV(run->count, TILE), slot, run->sharers, begin, end);
    *begin *= TILE, *end = MIN(*end * TILE, run->count);
}

/* The words of `count` counters, round by round */
static void words_of(const fastfood_run *run, uint32_t stream, int64_t from, int count, uint32_t word[4][TILE / 4])
{
    uint32_t key0 = (uint32_t)(uint64_t)run->a->seed, key1 = (uint32_t)((uint64_t)run->a->seed >> 32);
    for (int i = 0; i < count; i++)
        word[0][i] = (uint32_t)from + (uint32_t)i, word[1][i] = 0, word[2][i] = stream, word[3][i] = 0;
    for (int round = 0; round < 10; round++, key0 += FASTFOOD_KEY0, key1 += FASTFOOD_KEY1)
#pragma omp simd
        for (int i = 0; i < count; i++) fastfood_philox(key0, key1, &word[0][i], &word[1][i], &word[2][i], &word[3][i]);
}

/* G of a tile, as multiples of 2^-18; returns the sum of the squares of those that there are. */
static uint64_t normals_of(const fastfood_run *run, int64_t from, int64_t count, int32_t *normal)
{
    uint32_t word[4][TILE / 4];
    int32_t n[4][TILE / 4];
    words_of(run, FASTFOOD_NORMALS, from / 4, TILE / 4, word);
#pragma omp simd
    for (int i = 0; i < TILE / 4; i++) fastfood_normals(word[0][i], word[1][i], &n[0][i], &n[1][i]);
#pragma omp simd
    for (int i = 0; i < TILE / 4; i++) fastfood_normals(word[2][i], word[3][i], &n[2][i], &n[3][i]);
    for (int i = 0; i < TILE / 4; i++)
        for (int k = 0; k < 4; k++) normal[4 * i + k] = n[k][i];
    int64_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (int64_t)normal[i] * normal[i];
    return (uint64_t)sum;
}

/* pi, or its inverse, of a tile's places, which `place` holds */
static void permute(const fastfood_run *run, bool back, uint32_t *place)
{
    const fastfood_order order = run->order;
    for (int k = 0; k < order.rounds; k++)
        if (back)
            for (int i = 0; i < TILE; i++) place[i] = fastfood_round_back(&order, order.rounds - 1 - k, place[i]);
        else
            for (int i = 0; i < TILE; i++) place[i] = fastfood_round(&order, k, place[i]);
}

/* Signs of a tile: words whose sign bits they are */
static void signs_of(const fastfood_run *run, int64_t from, uint32_t *sign)
{
    uint32_t word[4][TILE / 4];
    words_of(run, FASTFOOD_SIGNS, from / 128, TILE / 128, word);
    for (int i = 0; i < TILE; i++) sign[i] = word[i / 32 % 4][i / 128] << (31 - i % 32) & 0x80000000;
}

/* From u to f, by steps between two halves of a buffer */
static void fold_all(fastfood_run *run, void (*fold)(int64_t, int64_t, void *))
{
    const size_t item = run->a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    char *half[2] = {run->between, (char *)run->between + (size_t)(run->group * (run->length >> FOLDED)) * item};
    run->step = (fold_step){.x = run->u, .from = run->length, .permuted = run->adjoint};
    for (int turn = 0, left = bits_of(run->length) - bits_of(run->out);; turn ^= 1) {
        run->step.bits = MIN(left, FOLDED), left -= run->step.bits;
        run->step.y = left > 0 ? half[turn] : run->f;
        each_tile(run, run->step.from >> run->step.bits, fold);
        if (left == 0) return;
        run->step.x = run->step.y, run->step.from >>= run->step.bits, run->step.permuted = false;
    }
}

#define THIS_FILE "lowrank/fastfood.c"
#include "each_dtype.h"
#endif /* ------------------------------------------- read twice: T float, then T double */

#include "hadamard.h"
#include "widen.h"

/* The rows that come in, in T, zero beyond their end; forward with B's signs */
static void FN(enter)(int64_t begin, int64_t end, void *arg)
{
    const fastfood_run *run = arg;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t from, to;
        for (tiles_of(run, slot, &from, &to); from < to; from += TILE) {
            const int64_t count = MIN(TILE, to - from), given = MAX(0, MIN(count, run->ins - from));
            uint32_t sign[TILE] = {0};
            if (!run->adjoint) signs_of(run, from, sign);
            for (int64_t r = 0; r < run->rows; r++) {
                T *t = (T *)run->t + r * run->in + from;
                FN(widen)(run->a->dtype, run->adjoint ? run->a->dout : run->a->theta, (run->from + r) * run->ins + from,
                          given, t);
                memset(t + given, 0, (size_t)(count - given) * sizeof(T));
                for (int64_t i = 0; i < given; i++) t[i] = sign[i] ? -t[i] : t[i];
            }
        }
    }
}

/* u_i = G_i t[pi(i) mod D], or G_i t[i mod M] */
static void FN(mix)(int64_t begin, int64_t end, void *arg)
{
    const fastfood_run *run = arg;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t from, to;
        run->squares[slot] = 0;
        for (tiles_of(run, slot, &from, &to); from < to; from += TILE) {
            const int64_t count = MIN(TILE, to - from);
            const uint32_t mask = (uint32_t)run->in - 1;
            int32_t normal[TILE];
            uint32_t place[TILE];
            T g[TILE];
            run->squares[slot] += normals_of(run, from, count, normal);
            for (int i = 0; i < TILE; i++) g[i] = (T)normal[i] * (T)0x1p-18, place[i] = (uint32_t)(from + i);
            if (!run->adjoint) permute(run, false, place);
            for (int64_t r = 0; r < run->rows; r++) {
                const T *t = (T *)run->t + r * run->in;
                T *u = (T *)run->u + r * run->length + from;
                T tile[TILE] = {0}; /* u may be t */
                for (int64_t i = 0; i < count; i++) tile[i] = g[i] * t[place[i] & mask];
                memcpy(u, tile, (size_t)count * sizeof(T));
            }
        }
    }
}

/* A step on the way from u to f: of each row's `from` entries the sums of those that differ in `bits` bits of their
 * place, the highest ones, and in nothing else; highest first, as H_L would do. The adjoint takes u's by pi's inverse.
 */
static void FN(fold)(int64_t begin, int64_t end, void *arg)
{
    const fastfood_run *run = arg;
    const fold_step *step = &run->step;
    const int64_t to = step->from >> step->bits;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t first, last;
        for (tiles_of(run, slot, &first, &last); first < last; first += TILE) {
            const int64_t count = MIN(TILE, last - first), parts = (int64_t)1 << step->bits;
            uint32_t place[1 << FOLDED][TILE];
            for (int64_t k = 0; k < parts; k++) {
                for (int i = 0; i < TILE; i++) place[k][i] = (uint32_t)(k * to + first + i);
                if (step->permuted) permute(run, true, place[k]);
            }
            for (int64_t r = 0; r < run->rows; r++) {
                const T *x = (const T *)step->x + r * step->from;
                T part[1 << FOLDED][TILE];
                for (int64_t k = 0; k < parts; k++)
                    for (int64_t i = 0; i < count; i++) part[k][i] = x[place[k][i]];
                for (int64_t h = parts / 2; h > 0; h /= 2)
                    for (int64_t k = 0; k < h; k++)
                        for (int64_t i = 0; i < count; i++) part[k][i] += part[k + h][i];
                memcpy((T *)step->y + r * to + first, part[0], (size_t)count * sizeof(T));
            }
        }
    }
}

/* The rows that go out, narrowed; of the adjoint with B's signs */
static void FN(leave)(int64_t begin, int64_t end, void *arg)
{
    const fastfood_run *run = arg;
    const subspace_dtype dtype = run->a->dtype;
    void *result = run->adjoint ? run->a->dtheta : run->a->out;
    for (int64_t slot = begin; slot < end; slot++) {
        int64_t from, to;
        for (tiles_of(run, slot, &from, &to); from < to; from += TILE) {
            const int64_t count = MIN(TILE, to - from);
            uint32_t sign[TILE] = {0};
            if (run->adjoint) signs_of(run, from, sign);
            for (int64_t r = 0; r < run->rows; r++) {
                const int64_t at = (run->from + r) * run->outs + from;
                const T *x = (const T *)run->last.y + r * run->out + from;
                T y[TILE];
                for (int64_t i = 0; i < count; i++) y[i] = sign[i] ? -x[i] : x[i];
                if (dtype == SUBSPACE_F16)
                    for (int64_t i = 0; i < count; i++) ((uint16_t *)result)[at + i] = f32_to_f16((float)y[i]);
                else if (dtype == SUBSPACE_BF16)
                    for (int64_t i = 0; i < count; i++) ((uint16_t *)result)[at + i] = f32_to_bf16((float)y[i]);
                else memcpy((T *)result + at, y, (size_t)count * sizeof(T));
            }
        }
    }
}

static void FN(transform_group)(fastfood_run *run)
{
    T *result = (T *)run->a->out + run->from * run->out;
    uint64_t squares = 0;
    if (run->direct && !run->folded) run->u = run->f = result;
    each_tile(run, run->in, FN(enter));
    run->first.v = run->rows, run->first.x = run->first.y = run->t;
    FN(transform_rows)(&run->first);
    each_tile(run, run->length, FN(mix));
    for (int64_t slot = 0; slot < run->sharers; slot++) squares += run->squares[slot];
    if (run->folded) fold_all(run, FN(fold));
    run->last.v = run->rows, run->last.x = run->f, run->last.y = run->direct ? result : run->f;
    run->last.scale = 1 / sqrt((double)run->a->m * ((double)squares * 0x1p-36));
    FN(transform_rows)(&run->last);
    if (!run->direct) each_tile(run, run->outs, FN(leave));
}

#ifdef LAST_T /* ---------------------------------------------------- read once: the contract */

static subspace_status product(subspace_ctx *ctx, const subspace_fastfood_args *a, bool adjoint)
{
    fastfood_run run;
    TRY(subspace_fastfood_check(ctx, a));
    const size_t need = LEVEL(subspace_fastfood_workspace)(ctx, a);
    CHECK(ctx, need <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "fastfood: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, need);
    plan(&run, ctx, a, adjoint, ctx->workspace, &(size_t){0});
    run.order = fastfood_order_of((uint64_t)a->seed, bits_of(run.length));
    for (run.from = 0; run.from < a->v; run.from += run.group) {
        run.rows = MIN(run.group, a->v - run.from);
        if (a->dtype == SUBSPACE_F64) LEVEL(transform_group_f64)(&run);
        else LEVEL(transform_group_f32)(&run);
    }
    return SUBSPACE_OK;
}

subspace_status LEVEL(subspace_fastfood)(subspace_ctx *ctx, const subspace_fastfood_args *a)
{
    return product(ctx, a, false);
}

subspace_status LEVEL(subspace_fastfood_adjoint)(subspace_ctx *ctx, const subspace_fastfood_args *a)
{
    return product(ctx, a, true);
}

#endif
