// coding_rate: rates and gradients against their definition, in memory no larger than promised.
#include "exact.h"
#include "native.h"
#include <numeric>

namespace
{

using Groups = std::vector<std::vector<int64_t>>; // rows of each group of a view

// logdet(I + a Y Y') and X = (I + a Y Y')^-1 Y in place of Y [s, w]
template <typename R> R solve(std::vector<R> &y, size_t s, size_t w, R a)
{
    const Factor<R> factor(y, s, w, a);
    std::vector<R> column(s);
    for (size_t j = 0; j < w; j++) {
        for (size_t i = 0; i < s; i++) column[i] = y[i * w + j];
        factor.solve(column);
        for (size_t i = 0; i < s; i++) y[i * w + j] = column[i];
    }
    return factor.logdet;
}

template <typename T> struct Problem {
    std::vector<T> z, rate, factor, drate, dz;
    std::vector<double> true_rate, true_dz; // for the z of the first check
    std::vector<int64_t> order, start;
    std::vector<Groups> views;
    subspace_coding_rate_args a{};

    Problem(int64_t n, int64_t d, std::vector<Groups> views_, double size = 1, double eps = 0.5) : views(views_)
    {
        const auto v = int64_t(views.size());
        z = randoms<T>(v * n * d, unsigned(n + d)), drate = randoms<T>(v, 3);
        for (auto &x : z) x *= T(size / std::sqrt(double(d)));
        rate.assign(v, T(7)), dz.assign(v * n * d, T(7));
        a.dtype = dtype_of<T>;
        a.v = v, a.n = n, a.d = d, a.eps = eps;
        for (const auto &groups : views) {
            int64_t at = 0;
            for (size_t g = 0; g <= size_t(n); g++) {
                start.push_back(at);
                if (g >= groups.size()) continue;
                order.insert(order.end(), groups[g].begin(), groups[g].end());
                at += int64_t(groups[g].size());
            }
        }
        if (views[0].size()) a.order = order.data(), a.start = start.data();
        factor.assign(v * subspace_coding_rate_factor(&a), T(7));
        a.z = z.data(), a.rate = rate.data(), a.factor = factor.data(), a.drate = drate.data(), a.dz = dz.data();
    }

    void run(int threads, bool keep)
    {
        Context ctx(threads);
        std::fill(rate.begin(), rate.end(), T(7)), std::fill(dz.begin(), dz.end(), T(7));
        a.factor = keep ? factor.data() : nullptr;
        ctx.size(subspace_coding_rate_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_coding_rate_cpu(&ctx, &a)) << ctx.message;
        ctx.size(subspace_coding_rate_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_coding_rate_backward_cpu(&ctx, &a)) << ctx.message;
    }

    void solve_all()
    {
        using R = wider<T>;
        const auto n = size_t(a.n), d = size_t(a.d);
        true_dz.assign(dz.size(), 0);
        for (size_t v = 0; v < views.size(); v++) {
            Groups groups = views[v];
            if (groups.empty()) {
                groups.resize(1);
                for (size_t i = 0; i < n; i++) groups[0].push_back(int64_t(i));
            }
            R total = 0;
            for (const auto &rows : groups) {
                const size_t m = rows.size();
                if (m == 0) continue;
                const bool points = m < d; // the smaller side, as a matter of time
                std::vector<R> y(m * d);
                const auto at = [&](size_t l, size_t j) { return points ? l * d + j : j * m + l; };
                for (size_t l = 0; l < m; l++)
                    for (size_t j = 0; j < d; j++) y[at(l, j)] = z[(v * n + size_t(rows[l])) * d + j];
                const R alpha = R(d) / (R(m) * R(a.eps)), share = R(m) / R(n);
                total += share / 2 * solve(y, std::min(m, d), std::max(m, d), alpha);
                for (size_t l = 0; l < m; l++)
                    for (size_t j = 0; j < d; j++)
                        true_dz[(v * n + size_t(rows[l])) * d + j] = double(drate[v] * share * alpha * y[at(l, j)]);
            }
            true_rate.push_back(double(total));
        }
    }

    void check()
    {
        if (true_rate.empty()) solve_all();
        for (size_t v = 0; v < views.size(); v++)
            EXPECT_NEAR(true_rate[v], double(rate[v]), tolerance<T>(1e-5) * true_rate[v]);
        double worst = 0, largest = 0;
        for (size_t i = 0; i < dz.size(); i++) {
            largest = std::max(largest, std::fabs(true_dz[i]));
            worst = std::max(worst, std::fabs(true_dz[i] - dz[i]));
        }
        EXPECT_LE(worst, tolerance<T>(1e-5) * largest);
    }
};

// n rows dealt to `groups` groups of uneven sizes, some of them empty, in an order of their own for each view
std::vector<Groups> dealt(int64_t n, size_t groups, size_t views = 1)
{
    std::vector<Groups> all;
    std::mt19937 engine(5);
    for (size_t v = 0; v < views; v++) {
        std::vector<int64_t> rows(n);
        std::iota(rows.begin(), rows.end(), 0);
        std::shuffle(rows.begin(), rows.end(), engine);
        Groups dealt_to(groups);
        for (size_t i = 0; i < size_t(n); i++)
            if (groups) dealt_to[size_t(double(groups) * std::pow(double(i) / double(n), 2))].push_back(rows[i]);
        all.push_back(dealt_to);
    }
    return all;
}

template <typename T> class CodingRate : public testing::Test
{
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(CodingRate, Types);

TYPED_TEST(CodingRate, EverySmallSide)
{
    for (int64_t n = 1; n <= 36; n += 1 + n / 9)
        for (int64_t d = 1; d <= 36; d += 1 + d / 9)
            for (size_t groups : {0, 1, 3}) {
                Problem<TypeParam> p(n, d, dealt(n, groups));
                p.run(1, groups != 1);
                p.check();
                ASSERT_FALSE(testing::Test::HasFailure()) << n << " x " << d << " in " << groups;
            }
}

TYPED_TEST(CodingRate, LargeSidesAndThreads)
{
    const int64_t shapes[][3] = {{70, 66, 2},   {64, 130, 0},  {300, 20, 2},  {20, 700, 0},
                                 {257, 258, 0}, {290, 260, 1}, {1400, 40, 0}, {40, 300, 40}};
    for (const auto &s : shapes) {
        Problem<TypeParam> p(s[0], s[1], dealt(s[0], size_t(s[2])));
        for (int threads : {1, 3}) {
            p.run(threads, threads == 1);
            p.check();
            ASSERT_FALSE(testing::Test::HasFailure()) << s[0] << " x " << s[1] << " in " << s[2];
        }
    }
}

// The GPU's kernels have panels of 8, tiles and large panels of 64, and matrices in registers up to 64, 128, 176 or
// 256.
TYPED_TEST(CodingRate, BordersOfPanelsAndTiles)
{
    for (int64_t s : {7, 8, 9, 63, 64, 65, 127, 128, 129, 175, 176, 177, 255, 256, 257, 300})
        for (bool points : {true, false}) {
            if (s > 129 && points == (s % 2 == 0)) continue; // a matter of time
            Problem<TypeParam> p(points ? s : s + 5, points ? s + 5 : s, dealt(points ? s : s + 5, 1));
            p.run(1, points);
            p.check();
            ASSERT_FALSE(testing::Test::HasFailure()) << s;
        }
}

TYPED_TEST(CodingRate, LongGroups)
{
    const int64_t shapes[][3] = {{5000, 12, 0}, {4500, 9, 2},  {9, 4200, 2},
                                 {20, 3100, 0}, {2100, 70, 1}, {3000, 100, 0}};
    for (const auto &s : shapes) {
        Problem<TypeParam> p(s[0], s[1], dealt(s[0], size_t(s[2])));
        p.run(2, s[2] == 0);
        p.check();
        ASSERT_FALSE(testing::Test::HasFailure()) << s[0] << " x " << s[1] << " in " << s[2];
    }
}

TYPED_TEST(CodingRate, ManyGroupsAndEmptyOnes)
{
    Problem<TypeParam> many(1400, 3, dealt(1400, 1300, 2));
    many.run(1, true);
    many.check();
    Groups groups = dealt(370, 1)[0], others{{}, {}, {}, {}, {}, {}}; // 300 and 60 and 9 and 1 of them
    const auto rows = groups[0].begin();
    others[1].assign(rows, rows + 1), others[2].assign(rows + 1, rows + 301), others[4].assign(rows + 301, rows + 310);
    others[5].assign(rows + 310, rows + 370);
    Problem<TypeParam> p(370, 290, {others});
    for (bool keep : {false, true}) {
        p.run(1, keep);
        p.check();
    }
}

TYPED_TEST(CodingRate, Views)
{
    for (size_t groups : {0, 5}) {
        Problem<TypeParam> p(50, 17, dealt(50, groups, 4));
        p.run(3, true);
        p.check();
    }
    for (auto shape : {std::pair<int64_t, int64_t>{265, 280}, {280, 265}}) {
        Problem<TypeParam> p(shape.first, shape.second, dealt(shape.first, 0, 2));
        p.run(3, shape.first < shape.second);
        p.check();
    }
}

TYPED_TEST(CodingRate, SameBitsForAnyNumberOfThreads)
{
    const int64_t shapes[][3] = {{900, 30, 12}, {1400, 40, 0}, {280, 270, 0}, {600, 270, 2}};
    for (const auto &s : shapes) {
        Problem<TypeParam> one(s[0], s[1], dealt(s[0], size_t(s[2])));
        one.run(1, true);
        for (int threads : {2, 3, 7}) {
            Problem<TypeParam> other(s[0], s[1], dealt(s[0], size_t(s[2])));
            other.run(threads, threads != 2);
            EXPECT_EQ(one.rate, other.rate);
            EXPECT_EQ(one.dz, other.dz);
        }
    }
}

// Points so alike, or so long, that float32 alone would lose what is left of the digits.
TYPED_TEST(CodingRate, HardForFloat)
{
    const int64_t shapes[][3] = {{30, 12, 0}, {12, 30, 2}, {70, 20, 4}, {262, 330, 0}, {200, 190, 1}};
    for (const auto &s : shapes)
        for (double size : {1e-3, 1., 1e3}) {
            Problem<TypeParam> p(s[0], s[1], dealt(s[0], size_t(s[2])), size, 1e-4);
            for (size_t i = 0; i < p.z.size(); i++)
                p.z[i] = TypeParam(size * std::sin(double(i % size_t(s[1]))) + 0.01 * p.z[i]);
            for (bool keep : {false, true}) {
                p.run(2, keep);
                if (sizeof(TypeParam) == 4) p.check(); // float64 has no wider type to turn to
            }
        }
}

// Points c_i u of a group, all exactly on one line: 1/2 log(1 + a |c|^2 |u|^2), dz_i = drate m/n a / (1 + ...) c_i u.
// The gradient is compared in the scale of the longest there can be, drate m/n sqrt(a) / 2: a long point's is less than
// what rounding the points does to it.
TYPED_TEST(CodingRate, LongPointsOfRankOne)
{
    typedef TypeParam T;
    const int64_t shapes[][3] = {{40, 12, 0}, {12, 40, 0},   {1, 9, 0},    {23, 6, 3},
                                 {20, 30, 2}, {190, 188, 0}, {270, 280, 1}};
    for (const auto &s : shapes)
        for (int exponent : {-40, 0, 10, 17, 25, 30, 60}) {
            if (!looks_at_values() && (s[0] > 100 || exponent % 10 == 7 || exponent == 0)) continue; // a matter of time
            Problem<T> p(s[0], s[1], dealt(s[0], size_t(s[2])));
            const size_t n = size_t(s[0]), d = size_t(s[1]);
            std::vector<double> u(d), c(n), dz(n * d);
            double square = 0, rate = 0, unit = 0, longest = 0;
            for (size_t j = 0; j < d; j++) u[j] = double(j * 37 % 19) - 9.5, square += u[j] * u[j];
            for (size_t i = 0; i < n; i++) c[i] = std::ldexp(double(i % 3 + 1), exponent);
            for (size_t i = 0; i < n * d; i++) p.z[i] = T(c[i / d] * u[i % d]);
            Groups groups = p.views[0].empty() ? dealt(s[0], 1)[0] : p.views[0];
            for (const auto &rows : groups) {
                const double m = double(rows.size()), a = double(d) / (m * p.a.eps), share = m / double(n);
                double sum = 0;
                for (int64_t i : rows) sum += c[size_t(i)] * c[size_t(i)];
                if (rows.empty()) continue;
                rate += share / 2 * std::log1p(a * sum * square);
                longest = std::max(longest, std::sqrt(a * sum * square));
                unit = std::max(unit, std::fabs(double(p.drate[0])) * share * std::sqrt(a) / 2);
                for (int64_t i : rows)
                    for (size_t j = 0; j < d; j++)
                        dz[size_t(i) * d + j] =
                            double(p.drate[0]) * share * a / (1 + a * sum * square) * c[size_t(i)] * u[j];
            }
            Context ctx(2);
            ctx.size(subspace_coding_rate_workspace_cpu(&ctx, &p.a));
            const auto status = subspace_coding_rate_cpu(&ctx, &p.a);
            if (exponent == 60 && s[0] > 1) { // float64 can't tell either
                if (looks_at_values()) EXPECT_EQ(SUBSPACE_NUMERICAL, status) << s[0] << " x " << s[1];
                else EXPECT_TRUE(std::isnan(p.rate[0])) << p.rate[0];
                continue;
            }
            ASSERT_EQ(SUBSPACE_OK, status) << ctx.message;
            for (bool keep : {true, false}) {
                p.run(2, keep);
                EXPECT_NEAR(rate, double(p.rate[0]), 1e-5 * rate) << s[0] << " x " << s[1] << " 2^" << exponent;
                for (size_t i = 0; i < n * d; i++)
                    ASSERT_NEAR(dz[i], double(p.dz[i]), (2e-5 + 4e-15 * longest) * unit) << exponent;
            }
        }
}

TYPED_TEST(CodingRate, ReportsValuesThatAreNotFinite)
{
    for (auto shape : {std::pair<int64_t, int64_t>{12, 5}, {5, 12}, {270, 280}}) {
        Problem<TypeParam> p(shape.first, shape.second, dealt(shape.first, 1, 2));
        p.z.back() = TypeParam(NAN);
        Context ctx;
        ctx.size(subspace_coding_rate_workspace_cpu(&ctx, &p.a));
        if (!looks_at_values()) {
            p.run(1, true);
            EXPECT_TRUE(std::isfinite(p.rate[0]) && std::isnan(p.rate[1]));
            EXPECT_TRUE(std::isfinite(p.dz[0]) && std::isnan(p.dz.back()));
            continue;
        }
        EXPECT_EQ(SUBSPACE_NUMERICAL, subspace_coding_rate_cpu(&ctx, &p.a));
        EXPECT_NE(nullptr, std::strstr(ctx.message, "coding_rate: view 1, group 0: the factorisation failed"))
            << ctx.message;
    }
}

TYPED_TEST(CodingRate, RefusesWhatItCannotDo)
{
    Context ctx;
    const auto message_of = [&](auto change) {
        Problem<TypeParam> p(6, 4, dealt(6, 2));
        ctx.size(subspace_coding_rate_workspace_cpu(&ctx, &p.a));
        change(p);
        ctx.message[0] = 0;
        EXPECT_NE(SUBSPACE_OK, subspace_coding_rate_cpu(&ctx, &p.a));
        return std::string(ctx.message);
    };
    typedef Problem<TypeParam> P;
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.a.n = 0; }).find("need points and features"));
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.a.d = 0; }).find("need points and features"));
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.a.v = -1; }).find("negative number of views"));
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.a.eps = 0; }).find("eps must be positive"));
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.a.eps = NAN; }).find("eps must be positive"));
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.a.dtype = SUBSPACE_F16; }).find("float32 or float64"));
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.a.start = nullptr; }).find("go together"));
    EXPECT_NE(std::string::npos, message_of([&](P &) { ctx.workspace_bytes -= 64; }).find("workspace of"));
    if (!looks_at_values()) return;
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.order[3] = 6; }).find("are not groups of 6 rows"));
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.order[0] = -1; }).find("are not groups of 6 rows"));
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.start[1] = 7; }).find("are not groups of 6 rows"));
    EXPECT_NE(std::string::npos, message_of([](P &p) { p.start[6] = 5; }).find("are not groups of 6 rows"));
}

// Kernels that can't look at order and start stay within their memory all the same, and make the rate NaN.
TYPED_TEST(CodingRate, WrongGroupsMakeTheRateNan)
{
    if (looks_at_values()) GTEST_SKIP();
    typedef Problem<TypeParam> P;
    const auto rate_of = [](auto change) {
        P p(6, 4, dealt(6, 2));
        change(p);
        p.run(1, true);
        return p.rate[0];
    };
    EXPECT_TRUE(std::isfinite(rate_of([](P &) {})));
    EXPECT_TRUE(std::isnan(rate_of([](P &p) { p.order[3] = 6; })));
    EXPECT_TRUE(std::isnan(rate_of([](P &p) { p.order[0] = -1; })));
    EXPECT_TRUE(std::isnan(rate_of([](P &p) { p.start[1] = 7; })));
    EXPECT_TRUE(std::isnan(rate_of([](P &p) { p.start[0] = -3; })));
}

} // namespace
