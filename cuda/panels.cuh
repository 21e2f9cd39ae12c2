/* panels.cuh - the sweep over class panels that logits and cross_entropy share.
 *
 *     forward    z = W_p x'                        one GEMM a tile; x as it is: the epilogue has r = 1/|x|
 *     backward   z kept or recomputed; the epilogue turns it into dz, then
 *                dW_p  += dz xhat                  one GEMM a tile
 *                dxhat += dz' W_p                  one GEMM a tile
 *                dx     = r (dxhat - xhat <xhat, dxhat>)
 *
 * A tile is a panel of whole classes times a block of the batch, the batch in the fast index, so
 * that neighbouring threads add up the k rows of a class side by side, for any k. Half types go into
 * the GEMMs as they are, z comes out in float32, dz goes back in the half type. The starts of ragged
 * classes lie on the device, where the host cannot cut panels by them: then a panel is all classes.
 */
#ifndef SUBSPACE_PANELS_CUH
#define SUBSPACE_PANELS_CUH
#include "linalg.cuh"

static const int64_t TILE = 1 << 22;       /* elements of z: 16 MiB of float32 stay in the L2 of a large GPU */
static const int64_t BLOCK = 16384;        /* batch rows in a block */
static const int64_t RAGGED_BLOCK = 128;   /* at least so many when a panel is all rows */
static const int64_t KEPT_BLOCK = 1 << 20; /* z is kept whole: as many as a grid takes */
enum { SQUARE = 32, LINES = 8 };           /* epilogues work on 32 classes x 32 batch rows, by 32 x 8 threads */
#define NORM_EPS 1e-12                     /* as torch.nn.functional.normalize */

typedef struct panels {
    subspace_ctx *ctx;
    const subspace_logits_args *a;
    void *proj;             /* [rows of all, b] z kept by the forward, or NULL */
    int64_t classes, count; /* classes in a panel, panels */
    int64_t rows;           /* most rows in a panel */
    int64_t block, blocks;  /* batch rows in a block, blocks */
    void *rnorm;            /* [b]           1 / |x_b|; NULL: not normalised */
    void *xhat;             /* [b, n]        of x's type; for dweight only */
    void *z, *dz;           /* [rows, block] acc_t; of x's type, the same memory where it can be */
    void *dweight;          /* [rows of all, n] half types in more than one block: dweight in float32 */
    void *dx;               /* [block, n]       half types: dx of a block in float32 */
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

    __device__ int64_t row(int64_t c) const
    {
        return start ? MIN(MAX(start[c], 0), rows) : c * k; /* memory is safe whatever start holds */
    }
    __device__ A r(int64_t i) const
    {
        return rnorm ? rnorm[i] : 1;
    }
};

template <typename T> static view<acc_t<T>> view_of(const panels *p)
{
    const subspace_logits_args *a = p->a;
    return {a->start, a->k, a->rows, (const acc_t<T> *)p->rnorm, (acc_t<T>)a->gamma};
}

/* z [r1 - r0, ldz]; in the backward dz [r1 - r0, t->ld], which may be the same memory. */
typedef subspace_status panels_epilogue(void *arg, const panels *, const tile *, const void *z, int64_t ldz, void *dz);

static inline dim3 squares(const tile *t, int64_t strip)
{
    return dim3((unsigned)CEIL_DIV(t->c1 - t->c0, strip), (unsigned)CEIL_DIV(t->nb, SQUARE));
}

static inline tile panels_tile(const panels *p, int64_t panel, int64_t block)
{
    tile t;
    t.c0 = panel * p->classes, t.c1 = MIN(t.c0 + p->classes, p->a->c);
    t.r0 = p->a->start ? 0 : t.c0 * p->a->k, t.r1 = p->a->start ? p->a->rows : t.c1 * p->a->k;
    t.b0 = block * p->block, t.nb = MIN(p->block, p->a->b - t.b0);
    t.ld = CEIL_DIV(t.nb, 8) * 8; /* tensor cores like aligned rows */
    return t;
}

/* ------------------------------------------------------------ the epilogues' common parts */

/* out[b, c] of a square from y[c][b], neighbouring threads writing neighbouring classes */
template <typename T>
static __device__ void panels_scatter(const tile &t, int64_t c0, int64_t i0, acc_t<T> (*y)[SQUARE + 1], T *out,
                                      int64_t ld)
{
    const int64_t c = c0 + threadIdx.x;
    for (int i = threadIdx.y; i < SQUARE; i += LINES)
        if (i0 + i < t.nb && c < t.c1) out[(t.b0 + i0 + i) * ld + c] = (T)y[threadIdx.x][i];
}

/* The other way: y[c][b] = in[b, c]. Ends with a barrier. */
template <typename T>
static __device__ void panels_gather(const tile &t, int64_t c0, int64_t i0, acc_t<T> (*y)[SQUARE + 1], const T *in,
                                     int64_t ld)
{
    const int64_t c = c0 + threadIdx.x;
    for (int i = threadIdx.y; i < SQUARE; i += LINES)
        if (i0 + i < t.nb && c < t.c1) y[threadIdx.x][i] = (acc_t<T>)in[(t.b0 + i0 + i) * ld + c];
    __syncthreads();
}

/* || zhat_c || of batch row i: the root of the sum of (r z[row, i])^2 */
template <typename A>
static __device__ A class_norm(const tile &t, const view<A> &v, const A *z, int64_t ldz, int64_t c, int64_t i)
{
    const int64_t last = v.row(c + 1);
    const A r = v.r(t.b0 + i);
    A sum = 0;
    for (int64_t row = v.row(c); row < last; row++) {
        const A x = r * z[(row - t.r0) * ldz + i];
        sum += x * x;
    }
    return sqrt(sum);
}

/* dz = factor zhat, for class c and batch row i */
template <typename T>
static __device__ void panels_scale(const tile &t, const view<acc_t<T>> &v, acc_t<T> factor, const acc_t<T> *z,
                                    int64_t ldz, int64_t c, int64_t i, T *dz)
{
    const int64_t last = v.row(c + 1);
    const acc_t<T> r = v.r(t.b0 + i);
    for (int64_t row = v.row(c); row < last; row++)
        dz[(row - t.r0) * t.ld + i] = (T)(factor * (r * z[(row - t.r0) * ldz + i]));
}

/* ------------------------------------------------------------------ kernels over rows of x */

/* r = 1 / max(|x|, 1e-12), and xhat where asked; the length is summed in double: it cannot overflow. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) normalise_rows(const T *x, int64_t n, acc_t<T> *rnorm, T *xhat)
{
    const int64_t b = blockIdx.x;
    double sum = 0;
    for (int64_t j = threadIdx.x; j < n; j += ROW_THREADS) {
        const double v = (double)(acc_t<T>)x[b * n + j];
        sum += v * v;
    }
    const double length = sqrt(block_sum(sum)), r = 1 / MAX(length, NORM_EPS);
    if (threadIdx.x == 0) rnorm[b] = (acc_t<T>)r;
    for (int64_t j = threadIdx.x; xhat && j < n; j += ROW_THREADS)
        xhat[b * n + j] = (T)(acc_t<T>)(r * (double)(acc_t<T>)x[b * n + j]);
}

/* dx = r (d - xhat <xhat, d>): the part along x does not change a normalised row. */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    finish_dx(const T *x, int64_t n, const acc_t<T> *rnorm, const acc_t<T> *d, T *dx)
{
    const int64_t b = blockIdx.x;
    const acc_t<T> r = rnorm ? rnorm[b] : 1;
    double dot = 0;
    if (rnorm) {
        for (int64_t j = threadIdx.x; j < n; j += ROW_THREADS)
            dot += (double)(r * (acc_t<T>)x[b * n + j]) * (double)d[b * n + j];
        dot = block_sum(dot);
        if (r >= (acc_t<T>)(1 / NORM_EPS)) dot = 0; /* the clamped length is a constant */
    }
    for (int64_t j = threadIdx.x; j < n; j += ROW_THREADS)
        dx[b * n + j] = (T)(rnorm ? r * (d[b * n + j] - (acc_t<T>)dot * (r * (acc_t<T>)x[b * n + j])) : d[b * n + j]);
}

template <typename T> __global__ void narrow(const acc_t<T> *src, int64_t count, T *dst)
{
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x)
        dst[i] = (T)src[i];
}

/* ------------------------------------------------------------------------------ the sweep */

/* Plan the sweep and lay out its scratch from `base`; with a NULL base only *bytes is of use. */
static inline void panels_plan(panels *p, subspace_ctx *ctx, const subspace_logits_args *a, void *proj, bool backward,
                               char *base, size_t *bytes)
{
    const bool half = is_half(a->dtype), kept = proj && !backward;
    const size_t wide = a->dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float), item = half ? 2 : wide;
    *p = panels{};
    p->ctx = ctx, p->a = a, p->proj = proj;
    p->block = kept ? KEPT_BLOCK : BLOCK;
    if (!kept && a->start) p->block = MAX(RAGGED_BLOCK, MIN(BLOCK, TILE / MAX(a->rows, 1)));
    p->block = MAX(MIN(p->block, a->b), 1);
    p->blocks = CEIL_DIV(a->b, p->block);
    p->classes = MAX(a->c, 1);
    if (!kept && !a->start) p->classes = MIN(p->classes, MAX(1, TILE / (p->block * MAX(a->k, 1))));
    p->count = CEIL_DIV(a->c, p->classes);
    if (p->count > 1) p->classes = CEIL_DIV(a->c, p->count); /* panels of one size */
    p->rows = a->start ? a->rows : p->classes * a->k;

    const int64_t elements = p->rows * CEIL_DIV(p->block, 8) * 8;
    if (a->normalize) p->rnorm = carve(base, bytes, a->b, wide);
    if (!proj) p->z = carve(base, bytes, elements, wide);
    if (!backward) return;
    p->dz = half || proj ? carve(base, bytes, elements, item) : p->z;
    if (a->normalize && a->dweight) p->xhat = carve(base, bytes, a->b * a->n, item);
    if (half && a->dweight && p->blocks > 1) p->dweight = carve(base, bytes, a->rows * a->n, wide);
    if (half && a->dx) p->dx = carve(base, bytes, p->block * a->n, wide);
}

template <typename T> static subspace_status normalise(const panels *p)
{
    const subspace_logits_args *a = p->a;
    if (p->rnorm)
        LAUNCH(p->ctx, normalise_rows<T>, (unsigned)a->b, ROW_THREADS, 0, (const T *)a->x, a->n, (acc_t<T> *)p->rnorm,
               (T *)p->xhat);
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
    for (int64_t block = 0; block < p->blocks; block++)
        for (int64_t panel = 0; panel < p->count; panel++) {
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
    for (int64_t block = 0; block < p->blocks; block++) {
        const T *x = (const T *)a->x + block * p->block * n;
        const T *xhat = p->xhat ? (const T *)p->xhat + block * p->block * n : x;
        T *dx = a->dx ? (T *)a->dx + block * p->block * n : NULL;
        void *d = p->dx ? p->dx : dx;
        for (int64_t panel = 0; panel < p->count; panel++) {
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
        if (dx && (p->rnorm || p->dx))
            LAUNCH(ctx, finish_dx<T>, (unsigned)MIN(p->block, a->b - block * p->block), ROW_THREADS, 0, x, n,
                   p->rnorm ? (const acc_t<T> *)p->rnorm + block * p->block : NULL, (const acc_t<T> *)d, dx);
    }
    if (p->dweight)
        LAUNCH(ctx, narrow<T>, (unsigned)MIN(CEIL_DIV(a->rows * n, 1024), 4096), 256, 0, (const acc_t<T> *)p->dweight,
               a->rows * n, (T *)a->dweight);
    return SUBSPACE_OK;
}

#endif
