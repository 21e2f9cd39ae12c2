/* coding_rate.cu - coding rate of groups of points, each on its smaller side, on the GPU.
 *
 *     a    = d / (m eps)                      m points Z of a group, d features
 *     X    = a Z Z'  (m <= d)   or  a Z' Z    s x s, tiles of the upper half
 *     h    = 1/2 log det(I + X)               cholesky.cuh, and with it (I + X)^-1 in place of X
 *     rate = sum m/n h
 *     dZ   = drate m/n a (I + a Z Z')^-1 Z = drate m/n a Z (I + a Z' Z)^-1
 *
 * How many groups there are, and how large, only the device knows: a kernel lists those that are not empty, with their
 * tiles added up, and blocks take turns at the tiles. Of one group alone the host knows the sizes; large products of it
 * are the library's, in full float32.
 *
 * float32 loses the digits of the small eigenvalues to the large ones of X. A group whose I + X is conditioned worse
 * than CAREFUL is listed again, and done again in float64 by the same kernels: without such a group they find an empty
 * list. Where float64 loses them as well, the factor is made of the points themselves (qr_update.cuh); where that is
 * too short, too, the rate and the gradient are NaN.
 *
 * The factor that is kept is the inverse, [s, s] for each group, in z's type; zeros for a group that needs care.
 *
 * Forward and backward are m d s and 2 m d s multiplications; z is read once for each 64 columns of X (from the L2 if
 * it is one group's), and once or, where s > 64, s/64 times for dZ.
 */
#include "rate_groups.cuh"
#include "linalg.cuh"

/* ----------------------------------------------------------------------------------------- X */

template <typename T> static __device__ rows<T> points_of(const rate_run &run, int64_t view, const rate_group &g)
{
    const subspace_coding_rate_args &a = run.a;
    return rows_of((const T *)a.z + view * a.n * a.d, a.order ? a.order + view * a.n + g.first : NULL, g.m, a.n, a.d);
}

template <typename C> static __device__ C *slot_of(const rate_run &run, int64_t view, const rate_group &g)
{
    return (C *)(run.slots + view * run.room + g.first * run.a.d);
}

/* A tile of X, or of a part of X; blocks (x, view) */
template <typename T, typename C>
__global__ void __launch_bounds__(RATE_THREADS, sizeof(C) == 4 ? 3 : 2) gram(const rate_run run, int careful)
{
    DYNAMIC_SHARED(shared);
    const subspace_coding_rate_args &a = run.a;
    const rate_list &l = careful ? run.careful : run.fast;
    for (int64_t view = blockIdx.y; view < a.v; view += gridDim.y) {
        const rate_group *each = l.each + view * (run.groups + 1);
        const int64_t count = l.count[2 * view], items = each[count].grams;
        for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
            const int64_t at = group_of(each, count, false, item);
            const rate_group g = each[at];
            const rate_shape shape = shape_of(g.m, a.d);
            const int64_t part = (item - g.grams) / shape.upper, s = shape.s;
            const int64_t from = rate_part_from(shape.len, part, shape.parts),
                          to = rate_part_from(shape.len, part + 1, shape.parts);
            const C alpha = shape.parts > 1 ? (C)1 : (C)((double)a.d / ((double)g.m * a.eps));
            const rows<T> z = points_of<T>(run, view, g);
            C *const x = shape.parts > 1 ? slot_of<C>(run, view, g) + part * s * s
                                         : (C *)l.x + l.small[view * run.groups + at].at;
            C sum[MY_ROWS][MY_COLS];
            int i, j;
            tile_of((int)((item - g.grams) % shape.upper), (int)CEIL_DIV(s, RATE_TILE), &i, &j);
            const int64_t i0 = (int64_t)i * RATE_TILE, j0 = (int64_t)j * RATE_TILE;
            if (shape.points) product<T, T, C, true, true>(z, i0, z, j0, i == j, from, to, (C *)shared, sum);
            else product<T, T, C, false, false>(z, i0, z, j0, i == j, from, to, (C *)shared, sum);
#pragma unroll
            for (int r = 0; r < MY_ROWS; r++)
#pragma unroll
                for (int c = 0; c < MY_COLS; c++) {
                    const int64_t row = i0 + my_row() + r, col = j0 + my_col() + c;
                    if (row < s && col < s) x[row * s + col] = alpha * sum[r][c];
                }
        }
    }
}

/* X from its parts, by the blocks that made the first of them; the library's come without a */
template <typename C> __global__ void __launch_bounds__(RATE_THREADS) fold(const rate_run run, int careful)
{
    const subspace_coding_rate_args &a = run.a;
    const rate_list &l = careful ? run.careful : run.fast;
    for (int64_t view = blockIdx.y; view < a.v; view += gridDim.y) {
        const rate_group *each = l.each + view * (run.groups + 1);
        const int64_t count = l.count[2 * view], items = each[count].grams;
        for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
            const int64_t at = group_of(each, count, false, item);
            const rate_group g = each[at];
            const rate_shape shape = shape_of(g.m, a.d);
            const int64_t s = shape.s;
            if (item - g.grams >= shape.upper || (shape.parts == 1 && (careful || !run.library))) continue;
            const C alpha = (C)((double)a.d / ((double)g.m * a.eps));
            const C *const parts = slot_of<C>(run, view, g);
            C *const x = (C *)l.x + l.small[view * run.groups + at].at;
            int i, j;
            tile_of((int)(item - g.grams), (int)CEIL_DIV(s, RATE_TILE), &i, &j);
            for (int e = (int)threadIdx.x; e < RATE_TILE * RATE_TILE; e += RATE_THREADS) {
                const int64_t row = (int64_t)i * RATE_TILE + e / RATE_TILE,
                              col = (int64_t)j * RATE_TILE + e % RATE_TILE;
                if (row >= s || col >= s) continue;
                C sum = 0;
#pragma unroll 8
                for (int64_t part = 0; part < shape.parts; part++) sum += parts[part * s * s + row * s + col];
                x[row * s + col] = alpha * sum;
            }
        }
    }
}

/* The factors that float64 has lost, from the points; a block for a view */
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) factor_points(const rate_run run, int careful, int wanted)
{
    const subspace_coding_rate_args &a = run.a;
    const rate_list &l = careful ? run.careful : run.fast;
    double *const panel = run.panels + (int64_t)blockIdx.x * QR_ROWS * run.side;
    for (int64_t view = blockIdx.x; view < a.v; view += gridDim.x) {
        const square *small = l.small + view * run.groups;
        verdict *const of = run.of + view * run.groups;
        const int64_t count = l.count[2 * view];
        int bad = 0;
        for (int64_t i = threadIdx.x; i < count; i += blockDim.x) bad |= !of[small[i].slot].good;
        if (__syncthreads_count(bad) == 0) continue;
        for (int64_t i = 0; i < count; i++) {
            const rate_group g = l.each[view * (run.groups + 1) + i];
            const rate_shape shape = shape_of(g.m, a.d);
            if (of[small[i].slot].good) continue;
            __syncthreads();
            eliminate_points(points_of<T>(run, view, g), shape.points, (double)a.d / ((double)g.m * a.eps), shape.s,
                             shape.len, wanted, (double *)l.x + small[i].at, panel, &of[small[i].slot]);
        }
        __syncthreads();
    }
}

/* ------------------------------------------------------------------------------------ results */

/* One block a view; NaN where a group failed, or start does not lead from 0 to n. */
template <typename T> __global__ void __launch_bounds__(ROW_THREADS) rate_of(const rate_run run)
{
    for (int64_t view = blockIdx.x; view < run.a.v; view += gridDim.x) {
        const rate_group *each = run.fast.each + view * (run.groups + 1);
        double sum = 0, points = 0;
        for (int64_t i = threadIdx.x; i < run.fast.count[2 * view]; i += blockDim.x) {
            const verdict of = run.of[view * run.groups + i];
            const double m = (double)each[i].m;
            points += m;
            sum += of.good ? m / (double)run.a.n * of.half : NAN;
        }
        sum = block_sum(sum), points = block_sum(points);
        if (threadIdx.x == 0) ((T *)run.a.rate)[view] = points == (double)run.a.n ? (T)sum : (T)NAN;
    }
}

/* A tile of dZ; blocks (x, view) */
template <typename T, typename C>
__global__ void __launch_bounds__(RATE_THREADS, sizeof(C) == 4 ? 3 : 2) gradient(const rate_run run, int careful)
{
    DYNAMIC_SHARED(shared);
    const subspace_coding_rate_args &a = run.a;
    const rate_list &l = careful ? run.careful : run.fast;
    const int64_t across = CEIL_DIV(a.d, RATE_TILE);
    for (int64_t view = blockIdx.y; view < a.v; view += gridDim.y) {
        const rate_group *each = l.each + view * (run.groups + 1);
        const int64_t count = l.count[2 * view], items = each[count].gradients;
        const C scale = (C)((double)((const T *)a.drate)[view] / (double)a.n * (double)a.d / a.eps);
        for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
            const int64_t at = group_of(each, count, true, item);
            if (sizeof(C) == 4 && needs_care(run, view, at)) continue;
            const rate_group g = each[at];
            const int64_t s = MIN(g.m, a.d);
            const int64_t i0 = (item - g.gradients) / across * RATE_TILE,
                          j0 = (item - g.gradients) % across * RATE_TILE;
            const rows<T> z = points_of<T>(run, view, g);
            const rows<C> inverse =
                rows_of((const C *)l.x + l.small[view * run.groups + at].at, (const int64_t *)NULL, s, s, s);
            C sum[MY_ROWS][MY_COLS];
            if (g.m <= a.d) product<C, T, C, false, false>(inverse, i0, z, j0, false, 0, s, (C *)shared, sum);
            else product<T, C, C, true, false>(z, i0, inverse, j0, false, 0, s, (C *)shared, sum);
#pragma unroll
            for (int r = 0; r < MY_ROWS; r++) {
                const int64_t row = i0 + my_row() + r, col = j0 + my_col();
                const T *const from = row < g.m ? row_at(z, row) : NULL;
                if (!from) continue;
                T *const to = (T *)a.dz + (from - (const T *)a.z);
#pragma unroll
                for (int c = 0; c < MY_COLS; c++)
                    if (col + c < a.d) to[col + c] = (T)(scale * sum[r][c]);
            }
        }
    }
}

/* drate m/n a times the one inverse of each view, for the library */
template <typename T> __global__ void __launch_bounds__(ROW_THREADS) scale_inverses(const rate_run run)
{
    const subspace_coding_rate_args &a = run.a;
    const int64_t count = run.side * run.side;
    for (int64_t view = blockIdx.y; view < a.v; view += gridDim.y) {
        const T scale = (T)((double)((const T *)a.drate)[view] / (double)a.n * (double)a.d / a.eps);
        const T *const from = (const T *)run.fast.x + run.fast.unit * view * run.fast.stride;
        T *const to = (T *)(run.slots + view * run.room);
        for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
             i += (int64_t)gridDim.x * blockDim.x)
            to[i] = scale * from[i];
    }
}

/* ---------------------------------------------------------------------------------- on the host */

static void carve_list(rate_list *l, const rate_run *run, char *base, size_t *bytes)
{
    const int64_t v = run->a.v;
    l->each = (rate_group *)carve(base, bytes, v * (run->groups + 1), sizeof(rate_group));
    l->small = (square *)carve(base, bytes, v * run->groups, sizeof(square));
    l->large = (square *)carve(base, bytes, v * run->most_large, sizeof(square));
    l->count = (int64_t *)carve(base, bytes, v * 2, sizeof(int64_t));
}

static void plan(rate_run *run, const subspace_coding_rate_args *a, bool backward, char *base, size_t *bytes)
{
    const bool f64 = a->dtype == SUBSPACE_F64;
    const int64_t limit = rate_small(sizeof(double)), v = a->v;
    *run = rate_run{};
    if (a->n <= 0 || a->d <= 0 || v <= 0) return;
    run->a = *a;
    run->backward = backward;
    run->groups = a->start ? a->n : 1;
    run->side = MIN(a->n, a->d);
    run->kept = subspace_coding_rate_factor(a);
    run->room = a->start ? a->n * a->d : rate_parts(a->n, a->d) * run->side * run->side; /* at least parts s s <= m d */
    run->most_large = run->side <= limit ? 0 : a->start ? a->n / (limit + 1) + 1 : 1;
    run->rows = run->most_large == 0 ? 0 : a->start ? a->n + RATE_TILE * run->most_large : run->side + RATE_TILE;
    run->library = !a->start && (double)run->side * (double)a->n * (double)a->d >= RATE_LARGE;
    run->slots = (double *)carve(base, bytes, v * run->room, sizeof(double));
    run->of = (verdict *)carve(base, bytes, v * run->groups, sizeof(verdict));
    carve_list(&run->fast, run, base, bytes);
    if (!f64) carve_list(&run->careful, run, base, bytes);
    run->y = carve(base, bytes, v * run->rows * RATE_TILE, sizeof(double));
    run->rest = (double *)carve(base, bytes, v * run->rows, sizeof(double));
    run->traces = (double *)carve(base, bytes, v * run->rows * 2, sizeof(double));
    run->panels = (double *)carve(base, bytes, point_blocks(run) * QR_ROWS * run->side, sizeof(double));
    run->meeting = (unsigned *)carve(base, bytes, 2, sizeof(unsigned));
    run->fast.x = a->factor ? a->factor : run->slots;
    run->fast.unit = a->factor || f64 ? 1 : 2;
    run->fast.stride = a->factor ? run->kept : run->room, run->fast.width = a->factor ? run->side : a->d;
    run->careful.x = run->slots, run->careful.unit = 1, run->careful.stride = run->room, run->careful.width = a->d;
}

/* The parts of each view's only X, without a, by the library: all views at once, or all parts but a shorter last. */
template <typename T> static subspace_status library_grams(subspace_ctx *ctx, const rate_run *run)
{
    const subspace_coding_rate_args *a = &run->a;
    const rate_shape shape = shape_of(a->n, a->d);
    const int64_t s = shape.s, whole = rate_part_from(shape.len, 1, shape.parts), along = shape.points ? 1 : a->d;
    gemms g = {};
    g.m = g.n = s, g.transa = !shape.points, g.transb = shape.points, g.exact = true;
    g.ab = g.cc = a->dtype, g.alpha = 1, g.lda = g.ldb = a->d, g.ldc = s;
    if (shape.parts == 1) {
        g.k = shape.len, g.count = a->v, g.a = g.b = a->z, g.c = run->slots;
        g.stride_a = g.stride_b = a->n * a->d, g.stride_c = run->room * (int64_t)(sizeof(double) / sizeof(T));
        return gemm_all(ctx, &g);
    }
    g.stride_a = g.stride_b = whole * along, g.stride_c = s * s;
    for (int64_t view = 0; view < a->v; view++)
        for (int last = 0; last < 2; last++) {
            const int64_t part = last ? shape.parts - 1 : 0;
            g.count = last ? 1 : shape.parts - 1, g.k = last ? shape.len - part * whole : whole;
            g.a = g.b = (const T *)a->z + view * a->n * a->d + part * whole * along;
            g.c = (T *)(run->slots + view * run->room) + part * s * s;
            TRY(gemm_all(ctx, &g));
        }
    return SUBSPACE_OK;
}

/* dZ of each view's only group by the library. */
template <typename T>
static subspace_status library_gradient(subspace_ctx *ctx, const rate_run *run, const device_limits *limits)
{
    const subspace_coding_rate_args *a = &run->a;
    const unsigned views = (unsigned)MIN(a->v, MOST_VIEWS);
    const int64_t s = run->side, inverse = run->room * (int64_t)(sizeof(double) / sizeof(T));
    const bool points = a->n <= a->d;
    gemms g = {};
    LAUNCH(ctx, scale_inverses<T>,
           dim3(rate_blocks(CEIL_DIV(s * s, ROW_THREADS), views, limits->multiprocessors), views), ROW_THREADS, 0,
           *run);
    g.m = a->n, g.n = a->d, g.k = s, g.count = a->v, g.exact = true, g.ab = g.cc = a->dtype, g.alpha = 1;
    g.a = points ? (const void *)run->slots : a->z, g.b = points ? a->z : (const void *)run->slots, g.c = a->dz;
    g.lda = points ? s : a->d, g.ldb = points ? a->d : s, g.ldc = a->d;
    g.stride_a = points ? inverse : a->n * a->d, g.stride_b = points ? a->n * a->d : inverse, g.stride_c = a->n * a->d;
    return gemm_all(ctx, &g);
}

/* X and its factor in one precision, of all groups or of those that need care. */
template <typename T, typename C>
static subspace_status factor(subspace_ctx *ctx, const rate_run *run, const device_limits *limits, bool careful)
{
    const subspace_coding_rate_args *a = &run->a;
    const rate_list *l = careful ? &run->careful : &run->fast;
    const unsigned views = (unsigned)MIN(a->v, MOST_VIEWS);
    const int64_t most = a->start ? a->n * CEIL_DIV(run->side, RATE_TILE) : RATE_BLOCKS + rate_upper(run->side);
    const dim3 grid(rate_blocks(most, views, limits->multiprocessors), views);
    const bool library = run->library && !careful;
    squares b = {};
    if (library) TRY(library_grams<T>(ctx, run));
    else LAUNCH(ctx, (gram<T, C>), grid, RATE_THREADS, rate_product_shared(sizeof(C)), *run, careful);
    if (library || MAX(a->n, a->d) >= 2 * RATE_PART) LAUNCH(ctx, fold<C>, grid, RATE_THREADS, 0, *run, careful);
    b.small = l->small, b.large = l->large, b.count = l->count, b.lists = a->v;
    b.most = b.slots = run->groups, b.most_large = run->most_large;
    b.wanted = run->backward || (a->factor && !careful) ? INVERSE : LOGDET;
    b.x = l->x, b.of = run->of, b.y = run->y, b.rest = run->rest, b.traces = run->traces, b.meeting = run->meeting;
    b.worst = sizeof(C) == 4 ? CAREFUL : LOST, b.failed = 0;
    TRY(eliminate_all(ctx, limits, sizeof(C) == 8, &b, a->start ? 1 : run->side, run->side));
    if (sizeof(C) == 8) LAUNCH(ctx, factor_points<T>, point_blocks(run), ROW_THREADS, 0, *run, careful, b.wanted);
    return SUBSPACE_OK;
}

static subspace_status list(subspace_ctx *ctx, const rate_run *run, bool careful)
{
    const int limit = rate_small(careful || run->a.dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float));
    LAUNCH(ctx, list_groups, (unsigned)MIN(run->a.v, MOST_VIEWS), LISTERS, 0, *run, careful, limit);
    return SUBSPACE_OK;
}

template <typename T, typename C>
static subspace_status gradients(subspace_ctx *ctx, const rate_run *run, const device_limits *limits, bool careful)
{
    const subspace_coding_rate_args *a = &run->a;
    const unsigned views = (unsigned)MIN(a->v, MOST_VIEWS);
    const int64_t most = (a->start ? a->n : CEIL_DIV(a->n, RATE_TILE)) * CEIL_DIV(a->d, RATE_TILE);
    if (run->library && !careful) return library_gradient<T>(ctx, run, limits);
    LAUNCH(ctx, (gradient<T, C>), dim3(rate_blocks(most, views, limits->multiprocessors), views), RATE_THREADS,
           rate_product_shared(sizeof(C)), *run, careful);
    return SUBSPACE_OK;
}

template <typename T> static subspace_status every_group(subspace_ctx *ctx, const rate_run *run)
{
    device_limits limits;
    TRY(limits_of(ctx, &limits));
    TRY(list(ctx, run, false));
    if (!run->backward || !run->a.factor) TRY((factor<T, T>(ctx, run, &limits, false)));
    if (run->backward) TRY((gradients<T, T>(ctx, run, &limits, false)));
    if (sizeof(T) == 4) {
        TRY(list(ctx, run, true));
        TRY((factor<T, double>(ctx, run, &limits, true)));
        if (run->backward) TRY((gradients<T, double>(ctx, run, &limits, true)));
    }
    if (!run->backward) LAUNCH(ctx, rate_of<T>, (unsigned)MIN(run->a.v, MOST_VIEWS), ROW_THREADS, 0, *run);
    return SUBSPACE_OK;
}

extern "C" size_t subspace_coding_rate_workspace_cuda(const subspace_ctx *, const subspace_coding_rate_args *a)
{
    size_t bytes = 0;
    rate_run run;
    plan(&run, a, false, NULL, &bytes);
    return bytes;
}

static subspace_status run_groups(subspace_ctx *ctx, const subspace_coding_rate_args *a, bool backward)
{
    size_t bytes = 0;
    rate_run run;
    TRY(subspace_coding_rate_check(ctx, a));
    plan(&run, a, backward, (char *)ctx->workspace, &bytes);
    CHECK(ctx, bytes <= ctx->workspace_bytes, SUBSPACE_WORKSPACE_TOO_SMALL,
          "coding_rate: workspace of %zu bytes, need %zu", ctx->workspace_bytes, bytes);
    if (a->v == 0) return SUBSPACE_OK;
    return a->dtype == SUBSPACE_F64 ? every_group<double>(ctx, &run) : every_group<float>(ctx, &run);
}

extern "C" subspace_status subspace_coding_rate_cuda(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    return run_groups(ctx, a, false);
}

extern "C" subspace_status subspace_coding_rate_backward_cuda(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    return run_groups(ctx, a, true);
}
