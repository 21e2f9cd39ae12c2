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

// Sizes about those of panels and strips; sums of more panels, and of longer rows, than are read at a time.
template <typename T> void run_borders()
{
    for (const auto &[v, m, n] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 7, 8},
                                                                                    {1, 8, 9},
                                                                                    {2, 9, 7},
                                                                                    {1, 16, 31},
                                                                                    {1, 17, 33},
                                                                                    {1, 31, 129},
                                                                                    {1, 5, 2100},
                                                                                    {1, 530, 40},
                                                                                    {1, 8201, 3}}) {
        SCOPED_TRACE(testing::Message() << v << " " << m << " " << n);
        Problem<T> p(v, m, n, false, 0);
        p.solve(1);
        p.check();
    }
    for (const int64_t n : {7, 8, 9, 31, 33, 129, 136}) {
        SCOPED_TRACE(n);
        Problem<T> p(1, n, n, true, 0);
        p.solve(1);
        p.check();
    }
}

TEST(Sinkhorn, BordersOfPanelsInFloat64)
{
    run_borders<double>();
}
TEST(Sinkhorn, BordersOfPanelsInFloat32)
{
    run_borders<float>();
}

// What f and g cannot hold goes into the kernel.
TEST(Sinkhorn, PotentialsOfAnySize)
{
    for (const bool symmetric : {false, true}) {
        Problem<double> p(2, 30, 30, symmetric, 0);
        for (int64_t i = 0; i < 1800; i++)
            if (i % 900) p.scores[i] -= 35;
        p.a.eta = 0.2, p.a.tol = 1e-11;
        for (auto *marginal : {&p.row, &p.col})
            for (double &x : *marginal) x *= 1e140;
        p.solve(1);
        p.check();
        EXPECT_EQ(symmetric, p.plan[1] == p.plan[30]);
    }
}

// Every plan of a batch is what it is alone, bit for bit: with fewer blocks, or streamed instead of kept.
template <typename T> void run_batches(int64_t v, int64_t m, int64_t n, bool symmetric, double spread)
{
    Problem<T> all(v, m, n, symmetric, spread), one(1, m, n, symmetric, 0);
    all.a.eta = one.a.eta = 1;
    all.solve(1);
    for (int64_t b = 0; b < v; b++) {
        const auto part = [b](const std::vector<T> &x, int64_t size) {
            return std::vector<T>(x.begin() + b * size, x.begin() + (b + 1) * size);
        };
        const auto put = [&](std::vector<T> &to, const std::vector<T> &from, int64_t size) {
            std::copy(from.begin() + b * size, from.begin() + (b + 1) * size, to.begin());
        };
        put(one.scores, all.scores, m * n), put(one.dplan, all.dplan, m * n);
        put(one.row, all.row, m), put(one.col, all.col, n);
        one.solve(1);
        EXPECT_EQ(one.plan, part(all.plan, m * n)) << b;
        EXPECT_EQ(one.dscores, part(all.dscores, m * n)) << b;
        EXPECT_EQ(one.drow, part(all.drow, m)) << b;
        EXPECT_EQ(one.error[0], all.error[b]) << b;
        EXPECT_EQ(one.sweeps[0], all.sweeps[b]) << b;
    }
}

TEST(Sinkhorn, ManyPlans)
{
    for (const bool symmetric : {false, true}) {
        run_batches<float>(13, 12, 12, symmetric, 0);
        run_batches<double>(5, 40, symmetric ? 40 : 33, symmetric, 10);
        run_batches<float>(3, 130, symmetric ? 130 : 121, symmetric, 0);
    }
}

// -inf, NaN and both problems side by side, in either domain.
TEST(Sinkhorn, PlansOfDifferentKinds)
{
    for (const double far : {0., 300.}) {
        const int64_t n = 37;
        Problem<double> p(4, n, n, true, 0);
        p.a.symmetric = SUBSPACE_LOOK, p.a.col = p.row.data(), p.a.tol = 1e-10, p.a.max_iter = 5000;
        for (int64_t b = 0; b < 4; b++)
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < n; j++) {
                    double &s = p.scores[(b * n + i) * n + j];
                    s = s / 4 + far * (i % 2 + j % 2);
                    if (std::abs(i - j) > 25) s = -INFINITY;
                }
        p.scores[n * n + 1] += 0.25;                           // not symmetric
        if (!looks_at_values()) p.scores[2 * n * n + 5] = NAN; // not a plan
        p.solve(1);
        for (int64_t b = 0; b < 4; b++) {
            const double *plan = &p.plan[b * n * n], *gradient = &p.dscores[b * n * n];
            const bool exists = b != 2 || looks_at_values();
            EXPECT_EQ(exists, p.error[b] <= p.a.tol);
            bool alike = true;
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < n; j++) {
                    const double x = plan[i * n + j], g = gradient[i * n + j];
                    ASSERT_EQ(exists, std::isfinite(x) && std::isfinite(g)) << b;
                    ASSERT_TRUE(!exists || std::abs(i - j) <= 25 || (x == 0 && g == 0)) << b;
                    alike = alike && x == plan[j * n + i];
                }
            EXPECT_EQ(b == 0 || b == 3 || (b == 2 && exists), alike) << b;
        }
    }
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

// Asked between sweeps, the caller ends the op, and as long as it doesn't nothing is different.
static int questions_left;

TEST(Sinkhorn, StopsWhenTheCallerSaysSo)
{
    if (!looks_at_values()) GTEST_SKIP(); // nobody can ask from a GPU
    const int64_t shapes[][3] = {{1, 20, 30}, {7, 20, 20}, {1, 200, 200}};
    for (const auto &s : shapes)
        for (bool symmetric : {false, true}) {
            if (symmetric && s[1] != s[2]) continue;
            Problem<float> p(s[0], s[1], s[2], symmetric, symmetric ? 30 : 1);
            Context ctx;
            ctx.size(subspace_sinkhorn_workspace_cpu(&ctx, &p.a));
            ASSERT_EQ(SUBSPACE_OK, subspace_sinkhorn_cpu(&ctx, &p.a)) << ctx.message;
            const std::vector<float> plan = p.plan;
            ctx.interrupted = [] { return 0; };
            ASSERT_EQ(SUBSPACE_OK, subspace_sinkhorn_cpu(&ctx, &p.a)) << ctx.message;
            EXPECT_EQ(plan, p.plan);
            p.a.tol = 0, p.a.max_iter = INT64_MAX, questions_left = 5;
            ctx.interrupted = [] { return --questions_left < 0 ? 1 : 0; };
            EXPECT_EQ(SUBSPACE_INTERRUPTED, subspace_sinkhorn_cpu(&ctx, &p.a));
            EXPECT_STREQ("sinkhorn: interrupted", ctx.message);
        }
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
    const auto no_plan = [&](int64_t b) { // a GPU says so with NaN
        ctx.size(bytes);
        EXPECT_EQ(SUBSPACE_OK, subspace_sinkhorn_cpu(&ctx, &p.a));
        EXPECT_TRUE(std::isnan(p.error[b]));
        for (int i = 0; i < 400; i++) ASSERT_TRUE(std::isnan(p.plan[400 * b + i]));
        EXPECT_FALSE(std::isnan(p.error[1 - b]) || std::isnan(p.plan[400 * (1 - b)]));
    };
    const auto wrong = [&](const char *words) {
        if (looks_at_values()) refused(SUBSPACE_NUMERICAL, words);
        else no_plan(1);
    };
    p.scores[405] += 0.5;
    if (looks_at_values())
        refused(SUBSPACE_INVALID_ARGUMENT,
                "sinkhorn: scores are not symmetric: plan 1 differs from its transpose by up to 0.5");
    p.scores[405] = p.scores[400 + 5 * 20] = NAN;
    wrong("sinkhorn: score (1, 0, 5) is nan");
    p.scores[400 + 5 * 20] = 1;
    p.a.symmetric = SUBSPACE_GENERAL, p.a.col = p.row.data();
    for (int i = 0; i < 20; i++) p.scores[400 + 20 * i + 5] = -INFINITY;
    wrong("sinkhorn: column 5 of plan 1 has no score above -inf");
    p.a.half_steps = 2;
    refused(SUBSPACE_INVALID_ARGUMENT, "sinkhorn: half steps end with the rows, so their number is odd, got 2");
    p.a.half_steps = 0, p.a.eta = -1;
    refused(SUBSPACE_INVALID_ARGUMENT, "sinkhorn: eta must be positive and finite, got -1");
}

} // namespace
