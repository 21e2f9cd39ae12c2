/* sinkhorn_gibbs.cuh - the scores of one plan: are they numbers, are they symmetric, how far apart; the Gibbs kernel
 *
 *     K_ij = exp((scores_ij - high) / eta + alpha_i + beta_j)
 *
 * of symmetric scores from their upper half; the sweeps in the log domain that find alpha and beta where scores are too
 * far apart for T; and what becomes the plan. Each block makes its rows. As in cpu/transport/sinkhorn_gibbs.h.
 *
 * Included by sinkhorn.cu.
 */
#ifndef SUBSPACE_SINKHORN_GIBBS_CUH
#define SUBSPACE_SINKHORN_GIBBS_CUH
#include "sinkhorn.cuh"

template <typename T> struct domain;
template <> struct domain<float> {
    static constexpr double RANGE = 40;   /* exp(-RANGE) is well within the exponent, */
    static constexpr float LOWEST = -87;  /* exp(LOWEST) as well, just */
    static constexpr double LIMIT = 1e25; /* for f and g, and 1 over them */
    static constexpr float LARGEST = FLT_MAX;
    static constexpr double EPSILON = FLT_EPSILON, ROUNDING = 1. / (1 << 11);
};
template <> struct domain<double> {
    static constexpr double RANGE = 200, LOWEST = -708, LIMIT = 1e100, LARGEST = DBL_MAX;
    static constexpr double EPSILON = DBL_EPSILON, ROUNDING = 1. / (1 << 26);
};

/* Decides between the two problems; the largest score, and how far below it the smallest finite one is, NaN if a score
 * is no number or none is finite. */
template <typename T> static __device__ inline double inspect(sinkhorn_run<T> &r, double *most)
{
    const T *s = r.scores + r.at * r.m * r.n;
    const bool promised = r.given == SUBSPACE_SYMMETRIC && r.half_steps == 0;
    bool look = r.given == SUBSPACE_LOOK && r.half_steps == 0 && r.m == r.n;
    double high = -INFINITY, low = -INFINITY, off = look ? 0 : INFINITY; /* low: of the negatives */
    if (look) { /* rows' first scores against columns', before the rest */
        int differs = 0;
        for (int64_t i = r.begin + threadIdx.x; i < r.end; i += THREADS) {
            const double x = (double)s[i], y = (double)s[i * r.n];
            differs |= marginal(r.row, r.at * r.m + i) != marginal(r.col, r.at * r.n + i) ||
                       fabs(x - y) > domain<T>::ROUNDING * fmax(fabs(x), fabs((double)s[0]));
        }
        look = !__syncthreads_or(differs);
        if (!look) off = INFINITY;
    }
    const walk w = look || promised ? across_pairs(r) : along_rows(r);
    for (int64_t i = w.i; i < r.end; i += w.rows)
        for (int64_t j = w.j; j < r.n; j += AHEAD * w.step) {
            T x[AHEAD], y[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int64_t to = MIN(j + a * w.step, r.n - 1); /* the last more than once */
                x[a] = s[promised && to < i ? to * r.n + i : i * r.n + to];
                y[a] = look ? s[to * r.n + i] : x[a];
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                high = larger(high, x[a] <= domain<T>::LARGEST ? (double)x[a] : NAN);
                if (x[a] > -INFINITY) low = larger(low, -(double)x[a]);
                if (x[a] != y[a]) off = larger(off, fabs((double)x[a] - (double)y[a]));
            }
        }
    report(r, 0, high, low);
    report(r, 1, off, -INFINITY);
    meet(r);
    const double2 *all = r.report + 2 * r.turn * r.shape.blocks;
    high = low = off = -INFINITY;
    for (int64_t b = threadIdx.x; b < r.shape.blocks; b += THREADS) {
        high = larger(high, all[b].x), low = larger(low, all[b].y);
        off = larger(off, all[r.shape.blocks + b].x);
    }
    flip(&r.turn);
    high = block_max(high), low = block_max(low), off = block_max(off);
    if (threadIdx.x == 0) r.symmetric = promised || off <= 8 * domain<T>::EPSILON * fmax(fabs(high), fabs(low));
    __syncthreads();
    *most = high;
    return high > -INFINITY ? (high + low) * r.scale : NAN;
}

/* K, or its logarithm without alpha and beta, where nothing is cut off. */
template <bool EXP, typename T> static __device__ inline T gibbs_entry(T x, T up)
{
    if (!EXP) return x;
    x += up;
    return x < domain<T>::LOWEST ? (T)0 : exp(x);
}

template <bool EXP, typename T> static __device__ inline void fill(const sinkhorn_run<T> &r, double high_)
{
    const T *s = r.scores + r.at * r.m * r.n, high = (T)high_, scale = (T)r.scale;
    const walk w = r.symmetric ? across_pairs(r) : along_rows(r);
    for (int64_t i = w.i; i < r.end; i += w.rows) {
        const T up = (T)r.alpha[i];
        T *k = row_of(r, i);
        for (int64_t j = w.j; j < r.n; j += AHEAD * w.step) {
            T x[AHEAD], shift[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int64_t to = MIN(j + a * w.step, r.n - 1);
                x[a] = s[r.symmetric && to < i ? to * r.n + i : i * r.n + to];
            }
            ahead(shift, r.beta + j, w.step, r.n - j);
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
                if (j + a * w.step < r.n) k[j + a * w.step] = gibbs_entry<EXP>((x[a] - high) * scale, up + shift[a]);
        }
    }
    __syncthreads();
}

/* ------------------------------------------------------------------------------------------------- the log domain */

/* log sum_j exp(k_j + shift_j), by a warp. */
template <typename T> static __device__ inline double log_sum(const T *k, int64_t n, const double *shift)
{
    double most = -INFINITY, sum = 0;
    for (int64_t j = lane_of(); j < n; j += WARP) most = larger(most, (double)(k[j] + (T)shift[j]));
    most = warp_max(most);
    for (int64_t j = lane_of(); j < n && most > -INFINITY; j += WARP) sum += (double)exp(k[j] + (T)shift[j] - (T)most);
    return most + log(warp_sum(sum));
}

/* The columns' largest k_ij + alpha_i, or the sums of their exponentials over what is largest, of each panel. */
template <bool LARGEST, typename T> static __device__ inline void log_columns(const sinkhorn_run<T> &r)
{
    for (int64_t t = r.first; t < r.last; t++)
        for (int64_t j = threadIdx.x; j < r.n; j += THREADS) {
            T most = -INFINITY;
            double sum = 0;
            for (int64_t i = t * r.shape.rows; i < MIN(r.m, (t + 1) * r.shape.rows); i++) {
                const T x = row_of(r, i)[j] + (T)r.alpha[i];
                if (LARGEST) most = x > most ? x : most;
                else sum += (double)exp(x - (T)r.y[j]);
            }
            r.partial[0][t * r.shape.ld + j] = LARGEST ? most : (T)sum;
        }
}

/* Sweeps in the log domain. After rows and columns once, no sum is further from its marginal than sum(row) / min(col);
 * the symmetric potential halves its way there. False if a row or column has no score. */
template <typename T> static __device__ inline bool log_sweeps(sinkhorn_run<T> &r)
{
    for (int sweep = 0; sweep < 64; sweep++) {
        double *to = r.symmetric ? r.beta : r.alpha, far = 0;
        const double *from = r.symmetric ? r.alpha : r.beta;
        for (int64_t i = r.begin + warp_of(); i < r.end; i += WARPS) {
            const double sum = log_sum(row_of(r, i), r.n, from);
            const double next = log((double)marginal(r.row, r.at * r.m + i)) - sum, before = r.alpha[i];
            far = larger(far, sum > -INFINITY ? fabs(next - before) : NAN);
            __syncwarp();
            if (lane_of() == 0) to[i] = r.symmetric ? 0.5 * (before + next) : next;
        }
        __syncthreads();
        if (!r.symmetric) log_columns<true>(r);
        report(r, 0, far, 0);
        meet(r);
        far = collect(r, 1).x;
        if (!(far >= 0)) return false;
        if (!r.symmetric) break;
        __syncthreads();
        if (threadIdx.x == 0) r.beta = r.alpha, r.alpha = to; /* to and fro */
        __syncthreads();
        if (far <= domain<T>::RANGE / 2) break;
    }
    if (r.symmetric || r.half_steps == 1) return true;
    double missing = 0;
    for (int64_t s = first_strip(r); s < r.shape.strips; s += strip_step(r)) {
        const int64_t j = strip_column(s);
        const double most = strip_total<true>(r, r.partial[0], s);
        if (!owner(r, j)) continue;
        if (!(most > -INFINITY)) missing = NAN;
        r.y[j] = most;
    }
    report(r, 0, missing, 0);
    meet(r);
    if (!(collect(r, 1).x >= 0)) return false;
    log_columns<false>(r);
    meet(r);
    for (int64_t s = first_strip(r); s < r.shape.strips; s += strip_step(r)) {
        const int64_t j = strip_column(s);
        const double sum = strip_total<false>(r, r.partial[0], s);
        if (owner(r, j)) r.beta[j] = log((double)marginal(r.col, r.at * r.n + j)) - r.y[j] - log(sum);
    }
    meet(r);
    return true;
}

/* ------------------------------------------------------------------------------------------------------- the plan */

/* What f and g have become goes into K: g is x[1 - now], the next one. */
template <typename T> static __device__ inline void absorb(sinkhorn_run<T> &r, double high)
{
    T *x = r.x[r.now ^ 1], *f = r.symmetric ? x : r.f;
    for (int64_t i = r.begin + threadIdx.x; i < r.end; i += THREADS) {
        r.alpha[i] += log((double)f[i]);
        f[i] = 1;
    }
    for (int64_t s = first_strip(r); s < r.shape.strips && !r.symmetric; s += strip_step(r)) {
        const int64_t j = strip_column(s);
        if (!owner(r, j)) continue;
        r.beta[j] += log((double)x[j]);
        x[j] = 1;
    }
    meet(r);
    fill<true>(r, high);
}

/* f K g: the product f_i f_j is the same for (i, j) and (j, i). Or NaN. */
template <typename T> static __device__ inline void write_plan(const sinkhorn_run<T> &r, bool exists)
{
    const T *x = r.x[r.now], *f = r.symmetric ? x : r.f;
    const walk w = along_rows(r);
    for (int64_t i = w.i; i < r.end; i += w.rows) {
        const T *k = row_of(r, i);
        T *plan = r.plan + (r.at * r.m + i) * r.n;
        const double fi = exists ? (double)f[i] : NAN;
        for (int64_t j = w.j; j < r.n; j += AHEAD * WARP) {
            T kij[AHEAD], g[AHEAD];
            ahead(kij, k + j, WARP, r.n - j), ahead(g, x + j, WARP, r.n - j);
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
                if (j + a * WARP < r.n) plan[j + a * WARP] = exists ? (T)(fi * (double)g[a] * (double)kij[a]) : (T)NAN;
        }
    }
}

#endif
