// sinkhorn: marginals and gradients on the bare contract, in memory no larger than promised.
#include "native.h"

namespace
{

template <typename T> struct Problem {
    std::vector<T> scores, row, col, plan, dplan, dscores, drow, dcol;
    std::vector<double> error;
    std::vector<int64_t> sweeps;
    subspace_sinkhorn_args a{};

    Problem(int64_t v, int64_t m, int64_t n, bool symmetric = false, double spread = 1)
    {
        a.dtype = dtype_of<T>, a.v = v, a.m = m, a.n = n;
        a.eta = 0.2, a.tol = sizeof(T) == 8 ? 1e-12 : 1e-6, a.max_iter = 2000;
        a.symmetric = symmetric ? SUBSPACE_SYMMETRIC : SUBSPACE_GENERAL;
        scores = randoms<T>(v * m * n), dplan = randoms<T>(v * m * n, 2);
        row = randoms<T>(v * m, 3), col = randoms<T>(v * n, 4);
        for (auto *marginal : {&row, &col})
            for (T &x : *marginal) x = T(0.3) + std::fabs(x);
        for (int64_t b = 0; b < v; b++) {
            double rows = 0, cols = 0;
            for (int64_t i = 0; i < m; i++) rows += row[b * m + i];
            for (int64_t j = 0; j < n; j++) cols += col[b * n + j];
            for (int64_t j = 0; j < n; j++) col[b * n + j] = T(col[b * n + j] * rows / cols);
            T *s = &scores[b * m * n];
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++) {
                    s[i * n + j] = T(0.3) * s[i * n + j] + T(spread * (i + j));
                    if (symmetric && j < i) s[i * n + j] = s[j * n + i];
                }
        }
        plan.assign(v * m * n, T(7)), dscores = plan;
        drow.assign(v * m, T(7)), dcol.assign(v * n, T(7));
        error.assign(v, -1), sweeps.assign(v, -1);
        a.scores = scores.data(), a.row = row.data(), a.col = symmetric ? nullptr : col.data();
        a.plan = plan.data(), a.error = error.data(), a.sweeps = sweeps.data();
        a.dplan = dplan.data(), a.dscores = dscores.data();
        a.drow = drow.data(), a.dcol = symmetric ? nullptr : dcol.data();
    }

    void solve(int threads)
    {
        Context ctx(threads);
        ctx.size(subspace_sinkhorn_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_sinkhorn_cpu(&ctx, &a)) << ctx.message;
        ASSERT_EQ(SUBSPACE_OK, subspace_sinkhorn_backward_cpu(&ctx, &a)) << ctx.message;
    }

    double weight(int64_t b) const // <plan, dplan>
    {
        double sum = 0;
        for (int64_t i = b * a.m * a.n; i < (b + 1) * a.m * a.n; i++) sum += double(plan[i]) * double(dplan[i]);
        return sum;
    }

    // sums reach their marginals; the gradient is orthogonal to shifts, which change nothing
    void check() const
    {
        const double most = sizeof(T) == 8 ? 1e-11 : 3e-6;
        for (int64_t b = 0; b < a.v; b++) {
            EXPECT_LE(error[b], a.tol);
            EXPECT_LE(sweeps[b], a.max_iter);
            std::vector<double> cols(a.n), shifts(a.n);
            double largest = 0;
            for (size_t i = 0; i < plan.size(); i++)
                largest = std::max(largest, std::fabs(double(plan[i]) * dplan[i]) / a.eta);
            for (int64_t i = 0; i < a.m; i++) {
                double sum = 0, shift = 0;
                for (int64_t j = 0; j < a.n; j++) {
                    const int64_t at = (b * a.m + i) * a.n + j;
                    sum += plan[at], cols[j] += plan[at], shift += dscores[at], shifts[j] += dscores[at];
                }
                ASSERT_NEAR(1, sum / row[b * a.m + i], most) << i;
                ASSERT_NEAR(0, shift, 20 * most * largest) << i;
            }
            for (int64_t j = 0; j < a.n; j++) {
                ASSERT_NEAR(1, cols[j] / (a.col ? col : row)[b * a.n + j], most) << j;
                ASSERT_NEAR(0, shifts[j], 20 * most * largest) << j;
            }
        }
    }
};

template <typename T> void run_all(int threads)
{
    int which = 0;
    for (const bool symmetric : {false, true})
        for (const auto &[v, m, n, spread] :
             std::vector<std::tuple<int64_t, int64_t, int64_t, double>>{{1, 1, 1, 1},
                                                                        {1, 1, 9, 1},
                                                                        {1, 9, 1, 1},
                                                                        {3, 5, 7, 0},
                                                                        {2, 16, 16, 0},
                                                                        {1, 17, 35, 0.1},
                                                                        {7, 33, 18, 1},
                                                                        {1, 200, 190, 0},
                                                                        {1, 300, 300, 0.5},
                                                                        {2, 260, 270, 3}}) {
            SCOPED_TRACE(which++);
            Problem<T> p(v, m, symmetric ? m : n, symmetric, spread);
            p.solve(threads);
            p.check();
        }
}

TEST(Sinkhorn, ReachesItsMarginalsInFloat64)
{
    run_all<double>(1);
}
TEST(Sinkhorn, ReachesItsMarginalsInFloat32)
{
    run_all<float>(1);
}
TEST(Sinkhorn, ReachesItsMarginalsOnThreeThreads)
{
    run_all<double>(3);
}

TEST(Sinkhorn, GradientsAreDifferences)
{
    for (const bool symmetric : {false, true})
        for (const int64_t half_steps : {0, 1, 5}) {
            if (symmetric && half_steps) continue;
            Problem<double> p(1, 6, symmetric ? 6 : 4, symmetric, 0);
            p.a.tol = 1e-14, p.a.half_steps = half_steps;
            p.solve(1);
            const double h = 1e-6;
            const auto differ = [&](std::vector<double> &x, const std::vector<double> &along) {
                double value[2];
                for (int side = 0; side < 2; side++) {
                    const auto kept = x;
                    for (size_t i = 0; i < x.size(); i++) x[i] += (side ? h : -h) * along[i];
                    Context ctx;
                    ctx.size(subspace_sinkhorn_workspace_cpu(&ctx, &p.a));
                    EXPECT_EQ(SUBSPACE_OK, subspace_sinkhorn_cpu(&ctx, &p.a)) << ctx.message;
                    value[side] = p.weight(0);
                    x = kept;
                }
                return (value[1] - value[0]) / (2 * h);
            };
            const auto inner = [](const std::vector<double> &x, const std::vector<double> &y) {
                double sum = 0;
                for (size_t i = 0; i < x.size(); i++) sum += x[i] * y[i];
                return sum;
            };
            auto along = randoms<double>(p.scores.size(), 9);
            for (int64_t i = 0; symmetric && i < 6; i++)
                for (int64_t j = 0; j < i; j++) along[i * 6 + j] = along[j * 6 + i];
            if (half_steps < 2) { // later column potentials depend on the scores too
                EXPECT_NEAR(inner(p.dscores, along), differ(p.scores, along), 1e-7);
            }
            if (symmetric) {
                const auto rows = randoms<double>(6, 10);
                EXPECT_NEAR(inner(p.drow, rows), differ(p.row, rows), 1e-7);
            }
        }
}

TEST(Sinkhorn, LooksForSymmetry)
{
    Problem<double> p(2, 40, 40, true, 0), q(2, 40, 40, true, 0);
    q.a.symmetric = SUBSPACE_LOOK, q.a.col = q.row.data();
    p.solve(1), q.solve(1);
    EXPECT_EQ(p.plan, q.plan);
    EXPECT_EQ(p.sweeps, q.sweeps);
    q.scores[1] += 1e-3; // the first plan only
    q.solve(1);
    EXPECT_NE(q.plan[1], q.plan[40]);
    EXPECT_EQ(p.sweeps[1], q.sweeps[1]);
    EXPECT_NE(p.sweeps[0], q.sweeps[0]);
}

TEST(Sinkhorn, WhatIsNotAskedForIsNotWritten)
{
    for (const bool symmetric : {false, true}) {
        Problem<float> p(2, 20, 20, symmetric, 0), q(2, 20, 20, symmetric, 0);
        q.a.dscores = nullptr, q.a.dcol = nullptr;
        p.solve(1), q.solve(1);
        EXPECT_EQ(p.drow, q.drow);
        EXPECT_EQ(7, q.dscores[0]);
    }
}

TEST(Sinkhorn, NoPlans)
{
    Problem<float> p(0, 3, 3);
    p.solve(3);
}

TEST(Sinkhorn, BadArgumentsAreNamed)
{
    Problem<double> p(2, 20, 20, true);
    Context ctx;
    const size_t bytes = subspace_sinkhorn_workspace_cpu(&ctx, &p.a);
    const auto refused = [&](subspace_status status, const char *words) {
        ctx.size(bytes);
        EXPECT_EQ(status, subspace_sinkhorn_cpu(&ctx, &p.a));
        EXPECT_STREQ(words, ctx.message);
    };
    ctx.size(bytes / 4);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_sinkhorn_cpu(&ctx, &p.a));
    p.scores[405] += 0.5;
    refused(SUBSPACE_INVALID_ARGUMENT,
            "sinkhorn: scores are not symmetric: plan 1 differs from its transpose by up to 0.5");
    p.scores[405] = p.scores[400 + 5 * 20] = NAN;
    refused(SUBSPACE_NUMERICAL, "sinkhorn: score (1, 0, 5) is nan");
    p.scores[400 + 5 * 20] = 1;
    p.a.symmetric = SUBSPACE_GENERAL, p.a.col = p.row.data();
    for (int i = 0; i < 20; i++) p.scores[400 + 20 * i + 5] = -INFINITY;
    refused(SUBSPACE_NUMERICAL, "sinkhorn: column 5 of plan 1 has no score above -inf");
    p.a.half_steps = 2;
    refused(SUBSPACE_INVALID_ARGUMENT, "sinkhorn: half steps end with the rows, so their number is odd, got 2");
    p.a.half_steps = 0, p.a.eta = -1;
    refused(SUBSPACE_INVALID_ARGUMENT, "sinkhorn: eta must be positive and finite, got -1");
}

} // namespace
