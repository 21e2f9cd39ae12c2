/* rsgd.cu - Riemannian SGD on frames, a block a class, two sweeps over memory and no SVD, QR or
 * division by sigma.
 *
 *     1  dir = momentum step of the gradient; Gram of the rows [W; dir] (and M)     8 n k^2 flops
 *     2  k x k, in double:  Q = W W',  R = 1.5 I - 0.5 Q          drift repaired by one Newton-Schulz
 *        P = dir W' R,  S = dir dir' - P P' = D D',  X = a^2 S,  f, g of X          (retraction.cuh)
 *     3  W <- (f - a g P) R W + a g dir,   M <- its momentum step, or transported
 *
 * D = dir - P W is never stored. Nothing is written before the k x k part is known to be finite.
 * Traffic: W, grad and M are read, W and M written; the second read comes from L2.
 *
 * A step so long that S cancels (a^2 |dir|^2 > 10), or a frame too far from orthonormal for one
 * Newton-Schulz step, takes the careful path (rsgd_careful.cuh).
 *
 * The k x k matrices are in shared memory up to k = 16, else in the workspace; then a limited number
 * of blocks takes turns at the classes. One launch does up to CHUNK parameters: what the kernel has
 * to know of them travels in its arguments.
 */
#include "rsgd_careful.cuh"

static const int64_t CHUNK = 48;               /* their frames fit in 4 KiB of kernel arguments */
static const int64_t SHARED_K = 16;            /* k x k matrices in shared memory up to here */
static const int64_t MAX_K = 256;              /* dims of a class */
static const int64_t MAX_RAGGED_K = 64;        /* when they are ragged: the host does not know the largest */
static const int64_t SCRATCH_BYTES = 64 << 20; /* of the workspace, at most */

typedef struct rsgd_chunk {
    int64_t count, first[CHUNK + 1]; /* classes before each parameter */
    subspace_frames frames[CHUNK];
} rsgd_chunk;

typedef struct rsgd_run {
    rsgd_step step;
    const int64_t *start;
    const double *lr;
    double lr_value;
    int lr_per_class;
    int64_t k, shared_k; /* the largest; up to here the k x k matrices are in shared memory */
    size_t tile_bytes;
    double *scratch; /* [slots][scratch_size(k)] */
    unsigned long long *skipped;
} rsgd_run;

static __host__ __device__ inline int64_t rounded(int64_t k)
{
    return CEIL_DIV(k, 4) * 4;
}

/* Doubles for the k x k algebra of a class. */
static __host__ __device__ inline int64_t scratch_size(int64_t k)
{
    const int64_t kp = rounded(k);
    return (MATRICES + KXK_SCRATCH + COEFFICIENTS) * kp * kp + 2 * (kp + 1);
}

/* Point the class's matrices into its scratch. */
template <typename T> static __device__ void lay_out(rsgd_class<T> *s, double *at)
{
    const int size = s->kp * s->kp;
    double **scratch[] = {&s->q.t0, &s->q.t1, &s->q.t2, &s->q.t3};
    s->q.k = s->k;
    for (int i = 0; i < KXK_SCRATCH; i++, at += size) *scratch[i] = at;
    for (int i = 0; i < MATRICES; i++, at += size) s->mat[i] = at;
    s->coef = at;
    s->q.rows = at + COEFFICIENTS * size;
}

/* One class. False: its numbers are not finite, nothing was changed. */
template <typename T> static __device__ bool step_class(rsgd_class<T> *s)
{
    const rsgd_step *st = &s->step;
    kxk *q = &s->q;
    const int k = s->k;
    const double a = -s->lr;
    double *R = s->mat[0], *P = s->mat[1], *S = s->mat[2], *X = s->mat[3], *f = s->mat[4], *g = s->mat[5],
           *E = s->mat[6], *h = s->mat[7], *Mw = s->mat[8], *Y = s->mat[9], *Pm = s->mat[10];

    gram_of<T, T>(s, R, E, S, Mw, Y); /* R is Q for now, E = dir W' */
    double drift = 0, trace = 0;
    for (int i = 0; i < k; i++) {
        trace += S[i * k + i];
        for (int j = 0; j <= i; j++) drift = fmax(drift, fabs(R[i * k + j] - (i == j)));
        if (isnan(R[i * k + i])) trace = NAN; /* fmax drops it */
    }
    __syncthreads();
    /* written so that a NaN or an infinity takes the careful path, which tells overflow from rubbish */
    if (!(drift < 1e-2 && a * a * trace < 10)) return careful(s);

    affine(q, -0.5, 1.5, R);
    product(q, E, R, P);
    product_t(q, P, P, X);
    EACH(e, k * k) S[e] -= X[e], X[e] = a * a * S[e];
    __syncthreads();
    retraction(q, st->kind, false, sizeof(T) == 4 ? 1e-11 : 1e-19, X, f, g, st->parallel ? h : NULL);

    clear<T, T>(s);
    product(q, g, P, X);
    EACH(e, k * k) X[e] = f[e] - a * X[e];
    __syncthreads();
    product(q, X, R, E);
    put<T, T>(s, E, 0, 0);
    if (st->parallel) { /* M <- V + Y (a^2 h D - a g W), V = M' - Pm W horizontal, Y = V D' */
        if (st->blocks == 3) {
            product(q, Mw, R, Pm), product_t(q, Pm, P, X);
            EACH(e, k * k) Y[e] -= X[e];
            __syncthreads();
        } else {
            copy(q, P, Pm), copy(q, S, Y);
        }
        product(q, Y, h, S, a * a);
        product(q, S, P, X), product(q, Y, g, E);
        EACH(e, k * k) X[e] = -(Pm[e] + X[e] + a * E[e]);
        __syncthreads();
        product(q, X, R, E);
        put<T, T>(s, E, 1, 0);
        if (st->blocks == 2) affine(q, 1, 1, S);
        put<T, T>(s, S, 1, 1);
        identity(q, E);
        if (st->blocks == 3) put<T, T>(s, E, 1, 2);
    }
    affine(q, a, 0, g);
    put<T, T>(s, g, 0, 1);
    combine<T, T>(s, st->parallel ? 2 : 1, s->buffer && !st->parallel);
    return true;
}

template <typename T>
__global__ void __launch_bounds__(256)
    step_classes(const __grid_constant__ rsgd_chunk chunk, const __grid_constant__ rsgd_run run)
{
    DYNAMIC_SHARED(shared);
    for (int64_t i = blockIdx.x; i < chunk.first[chunk.count]; i += gridDim.x) {
        int at = 0;
        while (i >= chunk.first[at + 1]) at++;
        const subspace_frames *p = &chunk.frames[at];
        const int64_t c = i - chunk.first[at], row = run.start ? run.start[c] : c * p->k;
        const int64_t k = run.start ? run.start[c + 1] - row : p->k;
        bool done = false;
        if (k > 0 && k <= MIN(run.k, p->n)) {
            rsgd_class<T> s = {};
            s.step = run.step;
            s.w = (T *)p->weight + row * p->n, s.grad = (const T *)p->grad + row * p->n;
            s.buffer = p->buffer ? (T *)p->buffer + row * p->n : NULL;
            s.k = (int)k, s.kp = (int)rounded(k), s.n = p->n;
            s.lr = run.lr ? run.lr[run.lr_per_class ? c : 0] : run.lr_value;
            s.tile = (char *)shared, s.tile_bytes = run.tile_bytes;
            lay_out(&s, k <= run.shared_k ? shared + run.tile_bytes / sizeof(double)
                                          : run.scratch + blockIdx.x * scratch_size(run.k));
            done = step_class(&s);
        }
        if (!done && threadIdx.x == 0) atomicAdd(run.skipped, 1ULL);
        __syncthreads();
    }
}

/* ------------------------------------------------------------------- shapes of a launch */

static unsigned rsgd_threads(int64_t k)
{
    return k <= SHARED_K ? 128 : 256;
}

/* Tile of columns, and the 16 partial sums of every thread. */
static size_t rsgd_tile_bytes(int64_t k)
{
    return (size_t)MAX(24576, rsgd_threads(k) * 16 * (int64_t)sizeof(double));
}

static size_t rsgd_shared_bytes(int64_t k)
{
    return rsgd_tile_bytes(k) + (size_t)scratch_size(MIN(k, SHARED_K)) * sizeof(double);
}

/* How many classes are at work at once, that is blocks. */
static int64_t rsgd_slots(int64_t k, int64_t classes)
{
    const int64_t fit = k <= SHARED_K ? INT32_MAX : SCRATCH_BYTES / (scratch_size(k) * (int64_t)sizeof(double));
    return MIN(classes, MAX(fit, 1));
}

static int64_t largest_k(const subspace_rsgd_args *a)
{
    int64_t k = 1;
    for (int64_t i = 0; i < a->count; i++) k = MAX(k, a->frames[i].c ? a->frames[i].k : 1);
    return a->start ? MIN(k, MAX_RAGGED_K) : k;
}

static rsgd_run plan(const subspace_rsgd_args *a, char *base, size_t *bytes)
{
    rsgd_run r = {};
    int64_t classes = 0;
    const double mu = a->momentum, keep = mu == 0 ? 1 : 1 - a->dampening, sign = a->maximize ? -1 : 1;
    /* g = sign grad + wd W;  M' = mu M + keep g;  dir = M', or with Nesterov g + mu M' */
    r.step.mm = mu, r.step.mg = keep * sign, r.step.mw = keep * a->weight_decay, r.step.dm = 1;
    if (a->nesterov) r.step.dm = mu, r.step.dg = sign, r.step.dw = a->weight_decay;
    r.step.kind = a->retraction, r.step.parallel = a->parallel && mu != 0;
    r.step.blocks = r.step.parallel && a->nesterov ? 3 : 2;
    r.start = a->start, r.lr = (const double *)a->lr, r.lr_value = a->lr_value, r.lr_per_class = a->lr_per_class;
    r.skipped = (unsigned long long *)a->skipped;
    for (int64_t i = 0; i < a->count; i++) classes += a->frames[i].c;
    r.k = largest_k(a), r.shared_k = MIN(r.k, SHARED_K);
    r.tile_bytes = rsgd_tile_bytes(r.k);
    if (r.k > SHARED_K)
        r.scratch = (double *)carve(base, bytes, rsgd_slots(r.k, classes) * scratch_size(r.k), sizeof(double));
    return r;
}

template <typename T>
static subspace_status step_all(subspace_ctx *ctx, const subspace_rsgd_args *a, const rsgd_run *run)
{
    const size_t shared = rsgd_shared_bytes(run->k);
    if (shared > 48 << 10)
        CUDA(ctx, cudaFuncSetAttribute(step_classes<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    for (int64_t i = 0; i < a->count;) {
        rsgd_chunk chunk = {};
        for (; i < a->count && chunk.count < CHUNK; i++, chunk.count++) {
            chunk.frames[chunk.count] = a->frames[i];
            chunk.first[chunk.count + 1] = chunk.first[chunk.count] + a->frames[i].c;
        }
        const int64_t classes = chunk.first[chunk.count];
        if (classes > 0)
            LAUNCH(ctx, step_classes<T>, (unsigned)rsgd_slots(run->k, classes), rsgd_threads(run->k), shared, chunk,
                   *run);
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
    CHECK(ctx, largest_k(a) <= MAX_K, SUBSPACE_INVALID_ARGUMENT,
          "rsgd: a frame on a GPU has at most %lld rows, got k=%lld", (long long)MAX_K, (long long)largest_k(a));
    const rsgd_run run = plan(a, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL, "rsgd: workspace of %zu bytes, need %zu",
          ctx->workspace_bytes, bytes);
    CUDA(ctx, cudaMemsetAsync(a->skipped, 0, sizeof(int64_t), (cudaStream_t)ctx->stream));
    return a->dtype == SUBSPACE_F64 ? step_all<double>(ctx, a, &run) : step_all<float>(ctx, a, &run);
}
