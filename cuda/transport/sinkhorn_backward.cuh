/* sinkhorn_backward.cuh - the gradient through a plan P. G = dplan, and R, C are P's own row and column sums: the
 * matrices below are then exactly semidefinite, and what they ask exactly solvable.
 *
 *     general      [R  P ] [x]   [(P o G) 1 ]        dscores = P o (G - x 1' - 1 y') / eta, drow = x, dcol = y
 *                  [P' C ] [y] = [(P o G)' 1]
 *     symmetric    (R + P) x = (P o Gs) 1            dscores = P o (Gs - x 1' - 1 x') / eta, drow = 2 x
 *     half steps   x = (P o G) 1 / row               dscores = P o (G - x 1') / eta, drow = x, dcol = 0
 *
 * with Gs = (G + G') / 2, so that (P o Gs) 1 is half the row and column sums of P o G. By conjugate gradients, scaled
 * by R and C: p is made on the way, p' A p is known from the rows (p_i (R_i p_i + 2 (P y)_i), and C_j p_j^2), and the
 * blocks meet twice a step. As in cpu/transport/sinkhorn_backward.h.
 *
 * Included by sinkhorn.cu.
 */
#ifndef SUBSPACE_SINKHORN_BACKWARD_CUH
#define SUBSPACE_SINKHORN_BACKWARD_CUH
#include "sinkhorn.cuh"

/* Row sums of P and P o G, and unless they are not needed their column sums of each panel. */
template <typename T> static __device__ inline void sums(const sinkhorn_run<T> &r, bool columns)
{
    const T *g = r.dplan + r.at * r.m * r.n;
    for (int64_t t0 = r.first; t0 < r.last; t0 += span_of(r)) {
        const int64_t t1 = MIN(r.last, t0 + span_of(r));
        for (int64_t i = t0 * r.shape.rows + warp_of(); i < MIN(r.end, t1 * r.shape.rows); i += WARPS) {
            const T *p = row_of(r, i), *gi = g + i * r.n;
            double sum = 0, sum_g = 0;
            for (int64_t j0 = lane_of(); j0 < r.n; j0 += FLUSH * WARP) {
                T some = 0, some_g = 0;
#pragma unroll 8
                for (int64_t j = j0; j < MIN(r.n, j0 + FLUSH * WARP); j += WARP) some += p[j], some_g += p[j] * gi[j];
                sum += (double)some, sum_g += (double)some_g;
            }
            sum = warp_sum(sum), sum_g = warp_sum(sum_g);
            if (lane_of() == 0) r.diagonal[i] = (T)sum, r.rhs[i] = (T)sum_g;
        }
        if (columns) panel_sums<false>(r, t0, t1, g);
    }
}

/* --------------------------------------------------------------------------------------------- conjugate gradients */

enum { BEGIN, STEP, SHIFT };

/* What its owner does with an entry, and what that adds to a sum:
 *
 *     BEGIN   s = 0, z = rhs / diagonal                                             rhs z
 *     STEP    s += alpha p, rhs -= alpha out, z = rhs / diagonal                    rhs z
 *     SHIFT   nothing                                                               s */
template <int WHAT, typename T>
static __device__ inline double own_entry(const sinkhorn_run<T> &r, int64_t i, T alpha, T out)
{
    if (WHAT == SHIFT) return (double)r.s[i];
    T rhs = r.rhs[i];
    if (WHAT == STEP) r.rhs[i] = rhs -= alpha * out;
    const T z = rhs / r.diagonal[i];
    r.s[i] = WHAT == STEP ? r.s[i] + alpha * r.p[r.now][i] : (T)0;
    r.z[i] = z;
    return (double)rhs * (double)z;
}

/* The same for all: a warp has a panel's rows, or a strip's columns, whose totals it needs. */
template <int WHAT, typename T> static __device__ inline void own_entries(const sinkhorn_run<T> &r, T alpha, double *to)
{
    for (int64_t t = r.first + warp_of(); t < r.last; t += WARPS) {
        double sum = 0;
        for (int64_t i = t * r.shape.rows + lane_of(); i < MIN(r.m, (t + 1) * r.shape.rows); i += WARP) {
            if (WHAT == BEGIN && r.symmetric) r.rhs[i] = (T)(0.5 * ((double)r.rhs[i] + r.y[i]));
            sum += own_entry<WHAT>(r, i, alpha, r.f[i]);
        }
        sum = warp_sum(sum);
        if (lane_of() == 0) to[t] = sum;
    }
    for (int64_t s = first_strip(r); s < r.shape.strips && !r.symmetric; s += strip_step(r)) {
        const int64_t j = strip_column(s), i = r.columns + j;
        double sum = 0, total = 0, total_g = 0;
        if (WHAT != SHIFT) total = strip_total<false>(r, r.partial[0], s);
        if (WHAT == BEGIN) total_g = strip_total<false>(r, r.partial[1], s);
        if (owner(r, j)) {
            if (WHAT == BEGIN) r.diagonal[i] = (T)total, r.rhs[i] = (T)total_g;
            if (WHAT == STEP) total += (double)r.diagonal[i] * (double)r.p[r.now][i];
            sum = own_entry<WHAT>(r, i, alpha, (T)total);
        }
        sum = warp_sum(WHAT == SHIFT ? -sum : sum);
        if (lane_of() == 0) to[r.shape.panels + s] = sum;
    }
}

/* p = z + beta p, the next; out = R p + P p of the rows, P' p of each panel, and the terms of p' A p. */
template <typename T> static __device__ inline void products(const sinkhorn_run<T> &r, bool first, T beta, double *to)
{
    const T *z = r.z, *before = r.p[r.now];
    T *p = r.p[r.now ^ 1];
    const combination<T> y = {z + r.columns, first ? NULL : before + r.columns, beta};
    const combination<T> x = {z, first ? NULL : before, beta};
    for (int64_t t0 = r.first; t0 < r.last; t0 += span_of(r)) {
        const int64_t t1 = MIN(r.last, t0 + span_of(r));
        for (int64_t i = t0 * r.shape.rows + warp_of(); i < MIN(r.end, t1 * r.shape.rows); i += WARPS) {
            const double product = row_product(row_of(r, i), r.n, r.wide, y);
            if (lane_of() > 0) continue;
            const T next = entry(x, i);
            const double own = (double)r.diagonal[i] * (double)next;
            p[i] = next, r.f[i] = (T)(own + product);
            r.term[i] = (double)next * (own + (r.symmetric ? product : 2 * product));
        }
        __syncthreads();
        for (int64_t t = t0 + warp_of(); t < t1; t += WARPS) {
            double sum = 0;
            for (int64_t i = t * r.shape.rows + lane_of(); i < MIN(r.m, (t + 1) * r.shape.rows); i += WARP)
                sum += r.term[i];
            sum = warp_sum(sum);
            if (lane_of() == 0) to[t] = sum;
        }
        if (!r.symmetric) panel_sums<true>(r, t0, t1, (const T *)p);
    }
    for (int64_t s = first_strip(r); s < r.shape.strips && !r.symmetric; s += strip_step(r)) {
        const int64_t j = strip_column(s);
        double sum = 0;
        if (owner(r, j)) {
            const T next = entry(y, j);
            p[r.columns + j] = next;
            sum = (double)r.diagonal[r.columns + j] * (double)next * (double)next;
        }
        sum = warp_sum(sum);
        if (lane_of() == 0) to[r.shape.panels + s] = sum;
    }
}

template <typename T> static __device__ inline void conjugate_gradients(sinkhorn_run<T> &r)
{
    const double enough = sizeof(T) == sizeof(double) ? 1e-13 : 1e-7;
    const int64_t terms = r.shape.panels + (r.symmetric ? 0 : r.shape.strips);
    if (r.symmetric) {
        for (int64_t s = first_strip(r); s < r.shape.strips; s += strip_step(r)) {
            const int64_t j = strip_column(s);
            const double total = strip_total<false>(r, r.partial[1], s);
            if (owner(r, j)) r.y[j] = total;
        }
        meet(r);
    }
    own_entries<BEGIN>(r, (T)0, r.sums[0]);
    meet(r);
    const double first = add_up(r.sums[0], terms);
    double now = first, before = 0;
    for (int step = 0; step < MOST_STEPS && now > enough * enough * first; step++) {
        products(r, step == 0, (T)(step ? now / before : 0), r.sums[1]);
        meet(r);
        flip(&r.now);
        const double curvature = add_up(r.sums[1], terms);
        if (!(curvature > 0)) break; /* nothing but the null space is left */
        own_entries<STEP>(r, (T)(now / curvature), r.sums[0]);
        meet(r);
        before = now, now = add_up(r.sums[0], terms);
    }
}

/* -------------------------------------------------------------------------------------------------- the gradients */

/* Of the null vector (1, -1) x and y get as much as makes their sums equal; P does not see it. */
template <typename T> static __device__ inline void write_marginals(const sinkhorn_run<T> &r)
{
    const bool half = r.half_steps > 0;
    T shift = 0;
    if (!half && !r.symmetric) {
        own_entries<SHIFT>(r, (T)0, r.sums[2]);
        meet(r);
        shift = (T)(add_up(r.sums[2], r.shape.panels + r.shape.strips) / (double)(r.m + r.n));
    }
    for (int64_t i = r.begin + threadIdx.x; i < r.end && r.drow; i += THREADS)
        r.drow[r.at * r.m + i] = r.symmetric ? 2 * r.s[i] : r.s[i] - shift;
    for (int64_t s = first_strip(r); s < r.shape.strips && r.dcol; s += strip_step(r)) {
        const int64_t j = strip_column(s);
        if (owner(r, j)) r.dcol[r.at * r.n + j] = half || r.symmetric ? 0 : r.s[r.columns + j] + shift;
    }
}

/* dscores = P o (G - (x_i + y_j)) / eta */
template <typename T> static __device__ inline void write_scores(const sinkhorn_run<T> &r)
{
    const T *g = r.dplan + r.at * r.m * r.n, scale = (T)r.scale, *y = r.half_steps > 0 ? NULL : r.s + r.columns;
    T *ds = r.dscores + r.at * r.m * r.n;
    const walk w = r.symmetric ? across_pairs(r) : along_rows(r);
    for (int64_t i = w.i; i < r.end; i += w.rows) {
        const T *p = row_of(r, i), x = r.s[i];
        for (int64_t j = w.j; j < r.n; j += AHEAD * w.step) {
            T pij[AHEAD], gij[AHEAD], gji[AHEAD] = {}, add[AHEAD] = {};
            ahead(pij, p + j, w.step, r.n - j), ahead(gij, g + i * r.n + j, w.step, r.n - j);
            if (r.symmetric) ahead(gji, g + j * r.n + i, w.step * r.n, (r.n - j) * r.n);
            if (y) ahead(add, y + j, w.step, r.n - j);
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const T gs = r.symmetric ? (T)0.5 * (gij[a] + gji[a]) : gij[a];
                if (j + a * w.step < r.n) ds[i * r.n + j + a * w.step] = scale * pij[a] * (gs - (x + add[a]));
            }
        }
    }
}

template <typename T>
static __global__ void __launch_bounds__(THREADS, SINKHORN_TOGETHER) differentiate(const sinkhorn_run<T> all)
{
    DYNAMIC_SHARED(shared);
    __shared__ sinkhorn_run<T> r;
    const bool half = all.half_steps > 0;
    if (threadIdx.x == 0) {
        r = all;
        enter_group(r);
        r.symmetric = all.given == SUBSPACE_SYMMETRIC && !half;
        if (r.symmetric) r.columns = 0;
    }
    __syncthreads();
    for (int64_t v = r.group; v < all.v; v += all.shape.groups) {
        meet(r); /* nobody needs the last plan's vectors any more, or its share of shared memory */
        if (threadIdx.x == 0) take_plan(r, v, (T *)shared);
        __syncthreads();
        for (int64_t i = r.begin + warp_of(); i < r.end && r.shape.shared > 0; i += WARPS)
            for (int64_t j = lane_of(); j < r.n; j += AHEAD * WARP) {
                T p[AHEAD];
                ahead(p, r.plan + (v * r.m + i) * r.n + j, WARP, r.n - j);
#pragma unroll
                for (int a = 0; a < AHEAD; a++)
                    if (j + a * WARP < r.n) row_of(r, i)[j + a * WARP] = p[a];
            }
        __syncthreads();
        sums(r, !half);
        meet(r);
        if (!half) conjugate_gradients(r);
        else {
            for (int64_t i = r.begin + threadIdx.x; i < r.end; i += THREADS)
                r.s[i] = r.rhs[i] / marginal(r.row, v * r.m + i);
            __syncthreads();
        }
        if (r.dscores) write_scores(r);
        if (r.drow || r.dcol) write_marginals(r);
    }
}

#endif
