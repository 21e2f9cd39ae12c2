/* panels.cuh - the pass over class panels that logits and cross_entropy share.
 *
 *     forward    z = W_p x'                        one GEMM a tile; x as it is: the epilogue has r = 1/|x|
 *     backward   z kept or recomputed; the epilogue turns it into r dz, then
 *                dW_p += (r dz) x                  one GEMM a tile
 *                d    += (r dz)' W_p               one GEMM a tile
 *                dx    = d - xhat <xhat, d>
 *
 * r stays with dz, so that no normalised copy of x is written; only in float16, whose range r dz may leave, the
 * products are those of dz and of a copy of xhat.
 *
 * A tile is a panel of whole classes times a block of the batch, the batch in the fast index, so that neighbouring
 * threads add up the k rows of a class side by side, for any k. Half types go into the GEMMs as they are, z comes out
 * in float32, dz goes back in the half type. The starts of ragged classes lie on the device, where the host cannot cut
 * panels by them: then a panel is all classes.
 *
 * The epilogues read z once, 16 bytes a thread and row, 8 rows in flight and kept in registers, and write y, or dz. At
 * n = 2048, k = 8 in bfloat16 an H100's GEMM takes 47 ps an entry (b, c) (700 TFLOP/s); the 32 bytes of z take 10 ps
 * from memory (3.35 TB/s), about 6 from L2, where the tile is.
 *
 * Included by logits.cu and cross_entropy.cu, whose kernels are the epilogues.
 */
#ifndef SUBSPACE_PANELS_CUH
#define SUBSPACE_PANELS_CUH
#include "linalg.cuh"
#include "panels_rows.cuh"
#include "panels_shape.h"

typedef struct panels {
    subspace_ctx *ctx;
    const subspace_logits_args *a;
    void *proj; /* [rows of all, b] z kept by the forward, or NULL */
    panels_shape s;
    void *rnorm;   /* [b]           1 / |x_b|; NULL: not normalised */
    double *exact; /* [b]           the same in double, for the backward */
    void *xhat;    /* [b, n]        float16, for dweight: r is not part of dz then; else NULL */
    void *z, *dz;  /* [rows, block] acc_t; of x's type, the same memory where it can be */
    void *dweight; /* [rows of all, n] half types in more than one block: dweight in float32 */
    void *dx;      /* [block, n]       half types: dx of a block in float32 */
} panels;

typedef struct tile {
    int64_t c0, c1, r0, r1; /* classes and rows of the panel */
    int64_t b0, nb, ld;     /* the batch block; leading dimension of dz, and of z unless it is kept */
} tile;

/* What a kernel must know of the classes and of x. */
template <typename A> struct view {
    const int64_t *start;
    int64_t k, rows;
    const A *rnorm;
    A gamma;
    bool fold; /* dz gets r */

    __device__ int64_t row(int64_t c) const
    {
        return start ? MIN(MAX(start[c], 0), rows) : c * k; /* memory is safe whatever start holds */
    }
};

/* r goes into dz, unless a copy of xhat makes that needless or float16 forbids it. */
static inline bool panels_fold(const subspace_logits_args *a)
{
    return a->normalize && a->dtype != SUBSPACE_F16;
}

template <typename T> static view<acc_t<T>> view_of(const panels *p)
{
    const subspace_logits_args *a = p->a;
    return {a->start, a->k, a->rows, (const acc_t<T> *)p->rnorm, (acc_t<T>)a->gamma, panels_fold(a)};
}

/* z [r1 - r0, ldz]; in the backward dz [r1 - r0, t->ld], which may be the same memory. */
typedef subspace_status panels_epilogue(void *arg, const panels *, const tile *, const void *z, int64_t ldz, void *dz);

static inline tile panels_tile(const panels *p, int64_t panel, int64_t block)
{
    tile t;
    t.c0 = panel * p->s.classes, t.c1 = MIN(t.c0 + p->s.classes, p->a->c);
    t.r0 = p->a->start ? 0 : t.c0 * p->a->k, t.r1 = p->a->start ? p->a->rows : t.c1 * p->a->k;
    t.b0 = block * p->s.block, t.nb = MIN(p->s.block, p->a->b - t.b0);
    t.ld = panels_ld(t.nb);
    return t;
}

/* ------------------------------------------------------------ the epilogues' common parts
 * A block of 32 x 8 threads makes 8 classes of 128 batch rows: a thread one class and four rows. */
enum { CLASSES = PANEL_CLASSES, BATCH = PANEL_BATCH, HELD = 8, EPILOGUE_THREADS = WARP * CLASSES };

static inline dim3 panels_grid(const tile *t, int64_t classes)
{
    return dim3((unsigned)CEIL_DIV(t->c1 - t->c0, classes), (unsigned)CEIL_DIV(t->nb, BATCH));
}

static inline dim3 panels_block()
{
    return dim3(WARP, CLASSES);
}

/* out[b, c] of a block from y[c][b], neighbouring threads writing neighbouring classes */
template <typename T>
static __device__ void panels_scatter(const tile &t, int64_t c0, int64_t i0, acc_t<T> (*y)[BATCH + 4], T *out,
                                      int64_t ld)
{
    for (int at = (int)thread_in_block(); at < CLASSES * BATCH; at += EPILOGUE_THREADS) {
        const int64_t c = c0 + at % CLASSES, i = i0 + at / CLASSES;
        if (i < t.nb && c < t.c1) out[(t.b0 + i) * ld + c] = (T)y[at % CLASSES][at / CLASSES];
    }
}

/* The other way: y[c][b] = in[b, c]. Ends with a barrier. */
template <typename T>
static __device__ void panels_gather(const tile &t, int64_t c0, int64_t i0, acc_t<T> (*y)[BATCH + 4], const T *in,
                                     int64_t ld)
{
    for (int at = (int)thread_in_block(); at < CLASSES * BATCH; at += EPILOGUE_THREADS) {
        const int64_t c = c0 + at % CLASSES, i = i0 + at / CLASSES;
        y[at % CLASSES][at / CLASSES] = i < t.nb && c < t.c1 ? (acc_t<T>)in[(t.b0 + i) * ld + c] : 0;
    }
    __syncthreads();
}

/* Of one class and the four batch rows from i on */
template <typename A> struct projections {
    quad<A> r, z[HELD], norm; /* 1 / |x|, the first rows of zhat, and || zhat || of them all */
};

template <typename A>
static __device__ inline void panels_read(const tile &t, const view<A> &v, const A *z, int64_t ldz, int64_t c,
                                          int64_t i, projections<A> *p)
{
    const int64_t first = v.row(c), count = v.row(c + 1) - first, left = t.nb - i;
    const bool whole = in_fours(z, ldz);
    const A *from = z + (first - t.r0) * ldz + i;
#pragma unroll
    for (int row = 0; row < HELD; row++) p->z[row] = load4(from + row * ldz, whole, row < count ? left : 0);
    for (int j = 0; j < 4; j++) p->r.v[j] = v.rnorm && j < left ? v.rnorm[t.b0 + i + j] : 1;
    A sum[4] = {};
#pragma unroll
    for (int row = 0; row < HELD; row++)
        for (int j = 0; j < 4; j++) p->z[row].v[j] *= p->r.v[j], sum[j] += p->z[row].v[j] * p->z[row].v[j];
#pragma unroll 4
    for (int64_t row = HELD; row < count; row++) {
        const quad<A> q = load4(from + row * ldz, whole, left);
        for (int j = 0; j < 4; j++) sum[j] += (p->r.v[j] * q.v[j]) * (p->r.v[j] * q.v[j]);
    }
    for (int j = 0; j < 4; j++) p->norm.v[j] = sqrt(sum[j]);
}

/* dz = gamma dy zhat / ||zhat||, 0 where zhat is 0; times r where the GEMMs take x as it is */
template <typename T>
static __device__ inline void panels_write(const tile &t, const view<acc_t<T>> &v, const projections<acc_t<T>> &p,
                                           const acc_t<T> *dy, const acc_t<T> *z, int64_t ldz, int64_t c, int64_t i,
                                           T *dz)
{
    typedef acc_t<T> A;
    const int64_t first = v.row(c), count = v.row(c + 1) - first, left = t.nb - i;
    const bool whole = in_fours(z, ldz);
    const A *from = z + (first - t.r0) * ldz + i;
    T *to = dz + (first - t.r0) * t.ld + i;
    A factor[4];
    for (int j = 0; j < 4; j++)
        factor[j] = p.norm.v[j] > 0 ? v.gamma * dy[j] / p.norm.v[j] * (v.fold ? p.r.v[j] : 1) : 0;
#pragma unroll
    for (int row = 0; row < HELD; row++) {
        quad<T> q;
        for (int j = 0; j < 4; j++) q.v[j] = (T)(factor[j] * p.z[row].v[j]);
        if (row < count) store4(to + row * t.ld, q, true, left);
    }
    for (int64_t row = HELD; row < count; row++) {
        const quad<A> g = load4(from + row * ldz, whole, left);
        quad<T> q;
        for (int j = 0; j < 4; j++) q.v[j] = (T)(factor[j] * (p.r.v[j] * g.v[j]));
        store4(to + row * t.ld, q, true, left);
    }
}

/* ------------------------------------------------------------------------------ the pass */

/* Plan the pass and lay out its scratch from `base`; with a NULL base only *bytes is of use. */
static inline void panels_plan(panels *p, subspace_ctx *ctx, const subspace_logits_args *a, void *proj, bool backward,
                               char *base, size_t *bytes)
{
    const bool half = is_half(a->dtype), kept = proj && !backward;
    const size_t wide = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float), item = half ? 2 : wide;
    *p = panels{};
    p->ctx = ctx, p->a = a, p->proj = proj;
    p->s = panels_shape_of(a->b, a->c, a->k, a->rows, a->start != NULL, kept);
    const int64_t elements = p->s.rows * panels_ld(p->s.block);
    if (a->normalize) p->rnorm = carve(base, bytes, a->b, wide);
    if (!proj) p->z = carve(base, bytes, elements, wide);
    if (!backward) return;
    if (a->normalize) p->exact = (double *)carve(base, bytes, a->b, sizeof(double));
    p->dz = half || proj ? carve(base, bytes, elements, item) : p->z;
    if (a->normalize && a->dweight && !panels_fold(a)) p->xhat = carve(base, bytes, a->b * a->n, item);
    if (half && a->dweight && p->s.blocks > 1) p->dweight = carve(base, bytes, a->rows * a->n, wide);
    if (half && a->dx) p->dx = carve(base, bytes, p->s.block * a->n, wide);
}

template <typename T> static subspace_status normalise(const panels *p)
{
    const subspace_logits_args *a = p->a;
    if (p->rnorm)
        LAUNCH(p->ctx, normalise_rows<T>, row_grid(a->b), row_block(a->b), 0, (const T *)a->x, a->b, a->n,
               (acc_t<T> *)p->rnorm, p->exact, (T *)p->xhat);
    return SUBSPACE_OK;
}

/* z = W_p x', the part of it in the tile */
template <typename T> static subspace_status project(const panels *p, const tile *t, acc_t<T> *z, int64_t ldz)
{
    const subspace_logits_args *a = p->a;
    return gemm(p->ctx, false, true, t->r1 - t->r0, t->nb, a->n, a->dtype, (const T *)a->weight + t->r0 * a->n, a->n,
                (const T *)a->x + t->b0 * a->n, a->n, 0, is_half(a->dtype) ? SUBSPACE_F32 : a->dtype, z, ldz);
}

template <typename T> static subspace_status panels_forward(const panels *p, panels_epilogue *epilogue, void *arg)
{
    const subspace_logits_args *a = p->a;
    acc_t<T> *proj = (acc_t<T> *)p->proj;
    if (a->b == 0 || a->c == 0) return SUBSPACE_OK;
    TRY(normalise<T>(p));
    for (int64_t block = 0; block < p->s.blocks; block++)
        for (int64_t panel = 0; panel < p->s.count; panel++) {
            const tile t = panels_tile(p, panel, block);
            acc_t<T> *z = proj ? proj + t.r0 * a->b + t.b0 : (acc_t<T> *)p->z;
            const int64_t ldz = proj ? a->b : t.ld;
            TRY(project<T>(p, &t, z, ldz));
            TRY(epilogue(arg, p, &t, z, ldz, NULL));
        }
    return SUBSPACE_OK;
}

template <typename T> static subspace_status panels_backward(const panels *p, panels_epilogue *epilogue, void *arg)
{
    const subspace_logits_args *a = p->a;
    subspace_ctx *ctx = p->ctx;
    cudaStream_t stream = (cudaStream_t)ctx->stream;
    const subspace_dtype wide = is_half(a->dtype) ? SUBSPACE_F32 : a->dtype;
    const acc_t<T> *proj = (const acc_t<T> *)p->proj;
    const int64_t n = a->n;
    if (a->b == 0 || a->c == 0) { /* nothing flows back */
        const size_t dx_bytes = (size_t)(a->b * n) * sizeof(T), dweight_bytes = (size_t)(a->rows * n) * sizeof(T);
        if (a->dx && dx_bytes > 0) CUDA(ctx, cudaMemsetAsync(a->dx, 0, dx_bytes, stream));
        if (a->dweight && dweight_bytes > 0) CUDA(ctx, cudaMemsetAsync(a->dweight, 0, dweight_bytes, stream));
        return SUBSPACE_OK;
    }
    TRY(normalise<T>(p));
    for (int64_t block = 0; block < p->s.blocks; block++) {
        const T *x = (const T *)a->x + block * p->s.block * n;
        const T *xhat = p->xhat ? (const T *)p->xhat + block * p->s.block * n : x;
        T *dx = a->dx ? (T *)a->dx + block * p->s.block * n : NULL;
        void *d = p->dx ? p->dx : dx;
        for (int64_t panel = 0; panel < p->s.count; panel++) {
            const tile t = panels_tile(p, panel, block);
            const int64_t rows = t.r1 - t.r0, ldz = proj ? a->b : t.ld, at = t.r0 * n;
            const acc_t<T> *z = proj ? proj + t.r0 * a->b + t.b0 : (acc_t<T> *)p->z;
            if (!proj) TRY(project<T>(p, &t, (acc_t<T> *)p->z, ldz));
            TRY(epilogue(arg, p, &t, z, ldz, p->dz));
            if (p->dweight)
                TRY(gemm(ctx, false, false, rows, n, t.nb, a->dtype, p->dz, t.ld, xhat, n, block > 0, wide,
                         (acc_t<T> *)p->dweight + at, n));
            else if (a->dweight)
                TRY(gemm(ctx, false, false, rows, n, t.nb, a->dtype, p->dz, t.ld, xhat, n, block > 0, a->dtype,
                         (T *)a->dweight + at, n));
            if (dx)
                TRY(gemm(ctx, true, false, t.nb, n, rows, a->dtype, p->dz, t.ld, (const T *)a->weight + at, n,
                         panel > 0, wide, d, n));
        }
        const int64_t nb = MIN(p->s.block, a->b - block * p->s.block);
        if (dx && (p->exact || p->dx))
            LAUNCH(ctx, finish_dx<T>, row_grid(nb), row_block(nb), 0, x, nb, n,
                   p->exact ? p->exact + block * p->s.block : NULL, panels_fold(a), (const acc_t<T> *)d, dx);
    }
    if (p->dweight)
        LAUNCH(ctx, narrow<T>, (unsigned)MIN(CEIL_DIV(a->rows * n, 1024), 4096), 256, 0, (const acc_t<T> *)p->dweight,
               a->rows * n, (T *)a->dweight);
    return SUBSPACE_OK;
}

#endif
