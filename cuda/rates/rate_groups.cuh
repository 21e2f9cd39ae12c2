/* rate_groups.cuh - the groups that there are, found on the device: a kernel lists those that are not empty, with their
 * tiles added up, and blocks that take turns at the tiles find in the list whose they are. Included by coding_rate.cu.
 */
#ifndef SUBSPACE_RATE_GROUPS_CUH
#define SUBSPACE_RATE_GROUPS_CUH
#include "qr_update.cuh"

enum { LISTERS = 256 };                  /* threads of the block that lists a view's groups */
static const double CAREFUL = 100;       /* as cpu/rates/coding_rate.c */
static const int64_t MOST_VIEWS = 65535; /* in a grid; more take turns */

typedef struct rate_group {   /* a group that is not empty */
    int64_t first, m;         /* its points, in their order */
    int64_t grams, gradients; /* tiles of X, parts counted, and of dZ of all groups before */
} rate_group;

typedef struct rate_list {       /* the groups of one precision */
    rate_group *each;            /* [v, groups + 1], totals behind the last */
    square *small, *large;       /* [v, groups] of all, [v, most_large] of those too large for a block */
    int64_t *count;              /* [v, 2] */
    void *x;                     /* X, then the inverses */
    int64_t unit, stride, width; /* x[unit * (view * stride + first * width)] */
} rate_list;

typedef struct rate_run {
    subspace_coding_rate_args a;
    int64_t groups, side;     /* of a view: groups, empty ones included; the smaller of n and d */
    int64_t kept, room, rows; /* of a view: entries of its factor and its slots, rows of scratch */
    int64_t most_large;
    double *slots; /* [v, room]: X of either precision, or parts of X */
    rate_list fast, careful;
    verdict *of; /* [v, groups], in the order of `fast` */
    void *y;     /* [v, rows, 64] */
    double *rest, *traces;
    double *panels; /* [point_blocks, QR_ROWS, side] */
    unsigned *meeting;
    int backward, library;
} rate_run;

/* Blocks of the kernel that is for what float64 has lost. */
static unsigned point_blocks(const rate_run *run)
{
    return (unsigned)MIN(run->a.v, (int64_t)32);
}

/* The shape of a group. */
typedef struct rate_shape {
    int64_t s, len, parts, upper; /* the smaller and the larger of points and features; parts of X, tiles of each */
    bool points;                  /* s is m */
} rate_shape;

static __host__ __device__ inline rate_shape shape_of(int64_t m, int64_t d)
{
    return rate_shape{MIN(m, d), MAX(m, d), rate_parts(m, d), rate_upper(MIN(m, d)), m <= d};
}

/* ------------------------------------------------------------------------------------------ lists */

/* Do the numbers of the i-th group need more digits than float32 has? */
static __device__ inline bool needs_care(const rate_run &run, int64_t view, int64_t i)
{
    const rate_list &l = run.fast;
    if (run.backward && run.a.factor) return ((const float *)l.x)[l.small[view * run.groups + i].at] == 0;
    return !run.of[view * run.groups + i].good;
}

typedef struct tally {
    int64_t all, large, grams, gradients;
} tally;

static __device__ inline tally add(const tally &a, const tally &b)
{
    return tally{a.all + b.all, a.large + b.large, a.grams + b.grams, a.gradients + b.gradients};
}

static __device__ inline tally from_lane_before(const tally &t, int lanes)
{
    return tally{__shfl_up_sync(ALL_LANES, t.all, lanes), __shfl_up_sync(ALL_LANES, t.large, lanes),
                 __shfl_up_sync(ALL_LANES, t.grams, lanes), __shfl_up_sync(ALL_LANES, t.gradients, lanes)};
}

/* The sum over all threads before this one; `total` of all threads. */
static __device__ tally before_me(const tally &mine, tally *total)
{
    __shared__ tally warps[LISTERS / WARP];
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    tally sum = mine, before = {};
    *total = tally{};
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const tally other = from_lane_before(sum, lanes);
        if (lane >= lanes) sum = add(sum, other);
    }
    const tally earlier = from_lane_before(sum, 1);
    if (lane == WARP - 1) warps[warp] = sum;
    __syncthreads();
    for (int i = 0; i < LISTERS / WARP; i++) {
        if (i == warp) before = *total;
        *total = add(*total, warps[i]);
    }
    __syncthreads();
    return lane ? add(before, earlier) : before;
}

/* The groups of a view that are not empty or, in `careful`, those of them that need care. A group is no range of rows
 * where `start` is wrong; then it counts as empty. */
static __global__ void __launch_bounds__(LISTERS) list_groups(const rate_run run, int careful, int limit)
{
    const subspace_coding_rate_args &a = run.a;
    const rate_list &to = careful ? run.careful : run.fast;
    for (int64_t view = blockIdx.x; view < a.v; view += gridDim.x) {
        const int64_t *start = a.start ? a.start + view * (a.n + 1) : NULL;
        const rate_group *from = run.fast.each + view * (run.groups + 1);
        const int64_t candidates = careful ? run.fast.count[2 * view] : run.groups;
        tally done = {}, total;
        for (int64_t i0 = 0; i0 < candidates; i0 += LISTERS) {
            const int64_t i = i0 + threadIdx.x;
            rate_group g = {};
            if (!careful && start && start[i0] >= a.n) break; /* only empty ones are left */
            if (careful) {
                if (i < candidates && needs_care(run, view, i)) g = from[i];
            } else if (i < candidates) {
                g.first = start ? start[i] : 0;
                g.m = start ? start[i + 1] - start[i] : a.n;
                if (g.first < 0 || g.m < 0 || g.m > a.n - g.first) g.m = 0;
            }
            const rate_shape shape = shape_of(g.m, a.d);
            const bool some = g.m > 0, large = shape.s > limit;
            const tally mine = {some, large, some ? shape.parts * shape.upper : 0,
                                CEIL_DIV(g.m, RATE_TILE) * CEIL_DIV(a.d, RATE_TILE)};
            const tally at = add(done, before_me(mine, &total));
            if (some) {
                const int64_t work = a.start ? g.first + RATE_TILE * at.large : 0;
                const square q = {to.unit * (view * to.stride + g.first * to.width), shape.s, careful ? i : at.all,
                                  view * run.rows + work, 1};
                g.grams = at.grams, g.gradients = at.gradients;
                to.each[view * (run.groups + 1) + at.all] = g;
                to.small[view * run.groups + at.all] = q;
                if (large) to.large[view * run.most_large + at.large] = q;
            }
            done = add(done, total);
        }
        if (threadIdx.x == 0) {
            to.each[view * (run.groups + 1) + done.all] = rate_group{0, 0, done.grams, done.gradients};
            to.count[2 * view] = done.all, to.count[2 * view + 1] = done.large;
        }
    }
}

/* The group that tile `item` of a view belongs to: the last one with no more tiles before it. All threads together, as
 * many probes at a time. */
static __device__ inline int64_t group_of(const rate_group *each, int64_t count, bool gradients, int64_t item)
{
    int64_t at = 0;
    while (count > 1) {
        const int64_t step = CEIL_DIV(count, blockDim.x), probe = (threadIdx.x + 1) * step;
        const bool below = probe < count && (gradients ? each[at + probe].gradients : each[at + probe].grams) <= item;
        const int64_t passed = __syncthreads_count(below) * step;
        at += passed, count = MIN(step, count - passed);
    }
    return at;
}

#endif
