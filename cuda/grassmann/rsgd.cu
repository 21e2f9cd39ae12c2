/* rsgd.cu - Riemannian SGD on frames, every number read once and written once, no SVD, QR or
 * division by sigma.
 *
 *     1  dir = momentum step of the gradient; Gram of the rows [W; dir] (and M)     8 n k^2 flops
 *     2  k x k, in double:  Q = W W',  R = 1.5 I - 0.5 Q          drift repaired by one Newton-Schulz
 *        P = dir W' R,  S = dir dir' - P P' = D D',  X = a^2 S,  f, g of X          (retraction.cuh)
 *     3  W <- (f - a g P) R W + a g dir,   M <- its momentum step, or transported
 *
 * On the Stiefel manifold f and g are of B = a skew(P) too, and M keeps its tangent part; the rest is the same.
 *
 * D = dir - P W is never stored. Nothing is written before the k x k part is known to be finite.
 *
 * A class belongs to the blocks of a cluster, each with a slice of its columns in shared memory: they exchange their
 * shares of the Gram matrix, and each does the k x k part for itself (rsgd_shape.h: who has how much). For k = 8,
 * n = 2048, float32 that is two blocks of 72 KiB, three blocks a multiprocessor: 198 of 1000 classes are at work on an
 * H200, which must turn one over every 14 us to keep up with its memory; load, algebra and store of different
 * classes overlap. 20 k n bytes a class: 328 MB, 73 us at 4.5 TB/s. What does not fit, or has no clusters, passes over
 * memory twice, tile by tile.
 *
 * A step so long that S cancels (a^2 |dir|^2 > 10), or a frame too far from orthonormal for one
 * Newton-Schulz step, takes the careful path (rsgd_careful.cuh).
 *
 * One launch does up to CHUNK parameters of a shape: what the kernel has to know of them travels in its arguments.
 */
#include "rsgd_careful.cuh"

static const int64_t CHUNK = 48; /* their frames fit in 4 KiB of kernel arguments */

typedef struct rsgd_chunk {
    int64_t count, first[CHUNK + 1]; /* classes before each parameter */
    subspace_frames frames[CHUNK];
} rsgd_chunk;

typedef struct rsgd_run {
    rsgd_step step;
    const int64_t *start;
    const double *lr;
    double lr_value;
    int lr_per_class, cluster;
    size_t tile_bytes;
    double *scratch; /* [slots][scratch_size] of large classes */
    int64_t slots, scratch_size;
    unsigned long long *skipped;
} rsgd_run;

/* Point the class's matrices into its scratch, as counted in rsgd_scratch_of. */
template <typename T> static __device__ inline void lay_out(rsgd_class<T> *s, double *at)
{
    const rsgd_rule *rule = &s->step->rule;
    const int k = s->k, rows = rule->blocks * k;
    s->gram = at, at += rsgd_pairs(rows) * 16;
    s->coef = at, at += rule->outputs * rows * s->kp;
    s->mats = at, at += rsgd_matrices(rule) * k * k;
    s->q.scratch = matrix(s, AT_SCRATCH), s->q.spare = matrix(s, AT_SPARE);
    s->q.rows = at, s->q.values = at + 2 * (k + 1);
}

/* The k x k part: from the Gram matrix (R is Q at first, E = dir W') to the coefficients. By the team of q. */
template <typename T, bool STIEFEL> static __device__ inline void algebra(rsgd_class<T> *s)
{
    const rsgd_step *st = s->step;
    kxk *q = &s->q;
    const int k = s->k;
    const double a = -s->lr;
    double *R = matrix(s, AT_R), *P = matrix(s, AT_P), *S = matrix(s, AT_S), *X = matrix(s, AT_X), *f = matrix(s, AT_F),
           *g = matrix(s, AT_G), *E = matrix(s, AT_E), *Pm = matrix(s, AT_PM), *h = matrix(s, AT_H),
           *Mw = matrix(s, AT_MW), *Y = matrix(s, AT_Y);

    affine(q, -0.5, 1.5, R);
    product(q, E, R, P);
    EACH_OF(q, e, k * k)
    {
        const int i = quotient(e, q->inverse), j = e - i * k;
        S[e] -= row_times_row(P + i * k, P + j * k, k);
        X[e] = a * a * S[e];
    }
    meet(q);
    const double tolerance = sizeof(T) == 4 ? 1e-11 : 1e-19;
    if (STIEFEL) skew(q, a, P, Pm), stiefel(*q, st->kind, false, tolerance, Pm, X, f, g, E, S);
    else retraction(q, st->kind, tolerance, X, f, g, st->parallel ? h : NULL);
    EACH_OF(q, e, k * k)
    {
        const int i = quotient(e, q->inverse), j = e - i * k;
        X[e] = f[e] - a * row_times_column(g + i * k, P + j, k);
    }
    meet(q);
    if (a != 0) product(q, X, R, E);
    else identity(q, E); /* a step of no length leaves every bit, drift included */
    put<T, T>(s, E, 0, 0), put<T, T>(s, g, 0, 1, a);
    if (st->rule.blocks == 3) put<T, T>(s, NULL, 0, 2);
    if (STIEFEL && st->tangent) { /* M <- M' - sym(M' W') W */
        if (st->rule.blocks == 3) product(q, Mw, R, P), put<T, T>(s, NULL, 1, 1);
        negative_symmetric(q, P, X), product(q, X, R, E);
        put<T, T>(s, E, 1, 0);
        identity(q, E);
        put<T, T>(s, E, 1, st->rule.blocks - 1);
    }
    if (STIEFEL || !st->parallel) return;

    /* M <- V + Y (a^2 h D - a g W), V = M' - Pm W horizontal, Y = V D' */
    if (st->rule.blocks == 3) {
        product(q, Mw, R, Pm), product_t(q, Pm, P, X);
        EACH_OF(q, e, k * k) Y[e] -= X[e];
        meet(q);
    } else {
        copy(q, P, Pm), copy(q, S, Y);
    }
    product(q, Y, h, S, a * a);
    product(q, S, P, X), product(q, Y, g, E);
    EACH_OF(q, e, k * k) X[e] = -(Pm[e] + X[e] + a * E[e]);
    meet(q);
    product(q, X, R, E);
    put<T, T>(s, E, 1, 0);
    if (st->rule.blocks == 2) affine(q, 1, 1, S);
    put<T, T>(s, S, 1, 1);
    identity(q, E);
    if (st->rule.blocks == 3) put<T, T>(s, E, 1, 2);
}

/* By value, as the careful path: the Grassmannian's keeps its registers. */
template <typename T> static __device__ __noinline__ void stiefel_algebra(rsgd_class<T> c)
{
    algebra<T, true>(&c);
}

/* One class. False: its numbers are not finite, nothing was changed. */
template <typename T, bool LARGE> static __device__ inline bool step_class(rsgd_class<T> *s)
{
    const int k = s->k, thread = (int)threadIdx.x, threads = (int)blockDim.x, outputs = s->step->rule.outputs;
    const bool one_warp = !LARGE && k <= RSGD_WARP_K, write = s->buffer && outputs == 1;
    const bool kept = s->end - s->begin <= s->width;
    const double a = -s->lr;
    double trace = 0;
    const bool near = gram_of(s, matrix(s, AT_R), matrix(s, AT_E), matrix(s, AT_S), matrix(s, AT_MW), matrix(s, AT_Y));
#pragma unroll 4
    for (int i = 0; i < k; i++) trace += matrix(s, AT_S)[i * (k + 1)];
    __syncthreads();
    /* written so that a NaN or an infinity takes the careful path, which tells overflow from rubbish */
    if (!(near && a * a * trace < 10)) return s->rank || careful(*s);

    const int first = one_warp ? WARP : 0; /* while one warp does the algebra the others write M' */
    s->q.thread = thread, s->q.threads = one_warp ? WARP : threads;
    if (kept && write && thread >= first)
        keep_momentum<T, T>(s, s->begin, (int)(s->end - s->begin), s->width, thread - first, threads - first);
    if ((!one_warp || thread < WARP) && s->step->stiefel) stiefel_algebra(*s);
    else if (!one_warp || thread < WARP) algebra<T, false>(s);
    __syncthreads();
    combine<T, T>(s, s->width, s->width, true, outputs, write && !kept);
    return true;
}

template <typename T, bool LARGE>
__global__ void __launch_bounds__(RSGD_THREADS, sizeof(T) == 4 && !LARGE ? RSGD_FULL : 2)
    step_classes(const __grid_constant__ rsgd_chunk chunk, const __grid_constant__ rsgd_run run)
{
    DYNAMIC_SHARED(shared);
    const unsigned cluster = (unsigned)run.cluster, rank = cluster > 1 ? cluster_rank() : 0;
    for (int64_t i = blockIdx.x / cluster; i < chunk.first[chunk.count]; i += gridDim.x / cluster) {
        int at = 0;
        while (i >= chunk.first[at + 1]) at++;
        const subspace_frames *p = &chunk.frames[at];
        const int64_t c = i - chunk.first[at], row = run.start ? run.start[c] : c * p->k;
        const int64_t k = run.start ? run.start[c + 1] - row : p->k;
        bool done = false;
        const int64_t most = MIN(p->n, run.start ? MIN(p->k, (int64_t)RSGD_RAGGED_K) : p->k);
        if ((k > RSGD_SHARED_K && k <= most) != LARGE) continue; /* another launch's */
        if (k > 0 && k <= most) {
            rsgd_class<T> s = {};
            const int held = (int)rsgd_round(run.step.rule.held * k, 4);
            const int64_t slice = rsgd_slice(p->n, cluster);
            s.step = &run.step;
            s.w = (T *)p->weight + row * p->n, s.grad = (const T *)p->grad + row * p->n;
            s.buffer = p->buffer ? (T *)p->buffer + row * p->n : NULL;
            s.k = (int)k, s.kp = (int)rsgd_padded(k), s.n = p->n;
            s.begin = MIN(rank * slice, p->n), s.end = MIN(s.begin + slice, p->n);
            s.width = slice * held * (int64_t)sizeof(T) <= (int64_t)run.tile_bytes
                          ? (int)slice
                          : tile_width<T>(run.tile_bytes, held, 0);
            s.aligned =
                p->n % (16 / sizeof(T)) == 0 && ((uintptr_t)s.w | (uintptr_t)s.grad | (uintptr_t)s.buffer) % 16 == 0;
            s.cluster = cluster, s.rank = rank;
            s.lr = run.lr ? run.lr[run.lr_per_class ? c : 0] : run.lr_value;
            s.tile = (char *)shared, s.tile_bytes = run.tile_bytes;
            s.q.k = s.k, s.q.inverse = inverse_of(s.k), s.q.thread = (int)threadIdx.x, s.q.threads = (int)blockDim.x;
            lay_out(&s, LARGE ? run.scratch + blockIdx.x * run.scratch_size : shared + run.tile_bytes / sizeof(double));
            done = step_class<T, LARGE>(&s);
        }
        if (!done && rank == 0 && threadIdx.x == 0) atomicAdd(run.skipped, 1ULL);
        __syncthreads();
    }
}

/* ------------------------------------------------------------------- shapes of a launch */

/* Rows of a parameter's largest class. */
static int64_t most_rows(const subspace_rsgd_args *a, int64_t i)
{
    const subspace_frames *p = &a->frames[i];
    return p->c <= 0 ? 0 : a->start ? MIN(p->k, (int64_t)RSGD_RAGGED_K) : p->k;
}

static rsgd_run plan(const subspace_rsgd_args *a, char *base, size_t *bytes)
{
    rsgd_run r = {};
    rsgd_rule *rule = &r.step.rule;
    int64_t classes = 0, k = 0;
    const double mu = a->momentum, keep = mu == 0 ? 1 : 1 - a->dampening, sign = a->maximize ? -1 : 1;
    /* g = sign grad + wd W;  M' = mu M + keep g;  dir = M', or with Nesterov g + mu M' */
    rsgd_weights<double> *by = &r.step.exact;
    by->mm = mu, by->mg = keep * sign, by->mw = keep * a->weight_decay, by->dm = 1;
    if (a->nesterov) by->dm = mu, by->dg = sign, by->dw = a->weight_decay;
    r.step.single = {(float)by->mm, (float)by->mg, (float)by->mw, (float)by->dm, (float)by->dg, (float)by->dw};
    r.step.kind = a->retraction, r.step.parallel = a->parallel && mu != 0;
    r.step.stiefel = a->stiefel != 0, r.step.tangent = a->stiefel && mu != 0;
    rule->item = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    rule->outputs = r.step.parallel || r.step.tangent ? 2 : 1;
    rule->blocks = rule->outputs == 2 && a->nesterov ? 3 : 2;
    rule->held = a->nesterov && mu != 0 ? 3 : 2;
    r.start = a->start, r.lr = (const double *)a->lr, r.lr_value = a->lr_value, r.lr_per_class = a->lr_per_class;
    r.skipped = (unsigned long long *)a->skipped;
    for (int64_t i = 0; i < a->count; i++)
        if (most_rows(a, i) > RSGD_SHARED_K) k = MAX(k, most_rows(a, i)), classes += a->frames[i].c;
    if (k > 0) {
        r.scratch_size = rsgd_scratch(MIN(k, (int64_t)RSGD_MAX_K), rule);
        r.slots = MIN(classes, MAX(RSGD_SCRATCH_BYTES / (r.scratch_size * (int64_t)sizeof(double)), 1));
        r.scratch = (double *)carve(base, bytes, r.slots * r.scratch_size, sizeof(double));
    }
    return r;
}

template <typename T, bool LARGE>
static subspace_status launch(subspace_ctx *ctx, const rsgd_chunk *chunk, const rsgd_run *run, size_t shared)
{
    const int64_t classes = chunk->first[chunk->count], slots = LARGE ? run->slots : INT32_MAX / RSGD_CLUSTER;
    const unsigned blocks = (unsigned)(MIN(classes, slots) * run->cluster);
    if (run->cluster > 1)
        LAUNCH_CLUSTERS(ctx, (step_classes<T, LARGE>), run->cluster, blocks, RSGD_THREADS, shared, *chunk, *run);
    else LAUNCH(ctx, (step_classes<T, LARGE>), blocks, RSGD_THREADS, shared, *chunk, *run);
    return SUBSPACE_OK;
}

/* Parameters of a kind of shape go together; the kinds are few. A ragged one is in two launches, which take the classes
 * of up to SHARED_K rows and those above. */
enum { KINDS = 13 };

static int kind_of(const subspace_rsgd_args *a, int64_t i, bool large, const rsgd_rule *rule, bool clusters,
                   const device_limits *limits, rsgd_shape *shape)
{
    const int64_t k = most_rows(a, i);
    if (k == 0 || (large ? k <= RSGD_SHARED_K : k > RSGD_SHARED_K && !a->start)) return -1;
    *shape = rsgd_shape_of(k, a->frames[i].n, a->start != NULL, large, rule, clusters, (int64_t)limits->shared);
    int kind = shape->per_sm;
    for (int cluster = shape->cluster; cluster > 1; cluster /= 2) kind += RSGD_FULL;
    return large ? 0 : kind;
}

template <typename T> static subspace_status step_all(subspace_ctx *ctx, const subspace_rsgd_args *a, rsgd_run *run)
{
    const rsgd_rule *rule = &run->step.rule;
    device_limits limits;
    rsgd_shape shape;
    unsigned present = 0;
    bool clusters;
    TRY(limits_of(ctx, &limits));
    TRY(clusters_of(ctx, step_classes<T, false>, &clusters));
    for (int64_t i = 0; i < 2 * a->count; i++) {
        const int kind = kind_of(a, i / 2, i % 2, rule, clusters, &limits, &shape);
        if (kind >= 0) present |= 1u << kind;
    }
    for (int kind = 0; kind < KINDS; kind++) {
        if (!(present >> kind & 1)) continue;
        rsgd_chunk chunk = {};
        size_t tile = 0, scratch = 0;
        for (int64_t i = 0; i < a->count; i++) {
            if (kind_of(a, i, kind == 0, rule, clusters, &limits, &shape) == kind) {
                chunk.frames[chunk.count] = a->frames[i];
                chunk.first[chunk.count + 1] = chunk.first[chunk.count] + a->frames[i].c;
                chunk.count++;
                run->cluster = shape.cluster;
                tile = MAX(tile, shape.tile), scratch = MAX(scratch, shape.scratch);
            }
            if (chunk.count == 0 || (chunk.count < CHUNK && i + 1 < a->count)) continue;
            run->tile_bytes = tile;
            if (kind == 0) TRY((launch<T, true>(ctx, &chunk, run, tile)));
            else TRY((launch<T, false>(ctx, &chunk, run, tile + scratch)));
            chunk.count = 0, tile = scratch = 0;
        }
    }
    return SUBSPACE_OK;
}

extern "C" size_t subspace_rsgd_workspace_cuda(const subspace_ctx *, const subspace_rsgd_args *a)
{
    size_t bytes = 0;
    plan(a, NULL, &bytes);
    return bytes;
}

extern "C" subspace_status subspace_rsgd_cuda(subspace_ctx *ctx, const subspace_rsgd_args *a)
{
    size_t bytes = 0;
    TRY(subspace_rsgd_check(ctx, a));
    for (int64_t i = 0; i < a->count; i++)
        CHECK(ctx, most_rows(a, i) <= RSGD_MAX_K, SUBSPACE_INVALID_ARGUMENT,
              "rsgd: a frame on a GPU has at most %d rows, got k=%lld", (int)RSGD_MAX_K, (long long)most_rows(a, i));
    rsgd_run run = plan(a, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "rsgd: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, bytes);
    CUDA(ctx, cudaMemsetAsync(a->skipped, 0, sizeof(int64_t), (cudaStream_t)ctx->stream));
    return a->dtype == SUBSPACE_F64 ? step_all<double>(ctx, a, &run) : step_all<float>(ctx, a, &run);
}
