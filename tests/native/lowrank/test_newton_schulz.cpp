// newton_schulz: the iteration and its gradient against their definition, in memory no larger than promised.
#include "native.h"

namespace
{

const std::vector<double> MUON = {3.4445, -4.7750, 2.0315}, QUINTIC = {1.875, -1.25, .375};

struct Shape {
    int64_t v, m, n, steps;
    std::vector<double> triple = MUON;
};

// c [m, n] += scale a b, all double; ta: a is [k, m]
void multiply(bool ta, bool tb, int64_t m, int64_t n, int64_t k, double scale, const std::vector<double> &a,
              const std::vector<double> &b, std::vector<double> &c)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t l = 0; l < k; l++) {
            const double ail = scale * (ta ? a[l * m + i] : a[i * k + l]);
            for (int64_t j = 0; j < n; j++) c[i * n + j] += ail * (tb ? b[j * k + l] : b[l * n + j]);
        }
}

// One step at x [m, n] by its definition and, where dy is not empty, what a gradient dy of its result is at x.
void step(int64_t m, int64_t n, const double *abc, const std::vector<double> &x, std::vector<double> &y,
          const std::vector<double> &dy, std::vector<double> &dx)
{
    std::vector<double> gram(m * m), p(m * m), da(m * m), dp(m * m);
    multiply(false, true, m, m, n, 1, x, x, gram);
    multiply(false, false, m, m, m, abc[2], gram, gram, p);
    for (int64_t i = 0; i < m * m; i++) p[i] += abc[1] * gram[i] + (i % (m + 1) ? 0 : abc[0]);
    y.assign(m * n, 0);
    multiply(false, false, m, n, m, 1, p, x, y);
    if (dy.empty()) return;
    dx.assign(m * n, 0);
    multiply(true, false, m, n, m, 1, p, dy, dx);
    multiply(false, true, m, m, n, 1, dy, x, dp);
    for (int64_t i = 0; i < m * m; i++) da[i] = abc[1] * dp[i];
    multiply(false, true, m, m, m, abc[2], dp, gram, da);
    multiply(true, false, m, m, m, abc[2], gram, dp, da);
    multiply(false, false, m, n, m, 1, da, x, dx);
    multiply(true, false, m, n, m, 1, da, x, dx);
}

template <typename T> struct Problem {
    Shape s;
    int64_t entries;
    std::vector<double> coefficients;
    std::vector<T> x, y, dy, dx;
    subspace_newton_schulz_args a{};

    explicit Problem(const Shape &shape)
        : s(shape), entries(s.m * s.n), x(randoms<T>(s.v * entries)), y(s.v * entries, T(7)),
          dy(randoms<T>(s.v * entries, 2)), dx(s.v * entries, T(7))
    {
        for (int64_t k = 0; k < s.steps; k++) coefficients.insert(coefficients.end(), s.triple.begin(), s.triple.end());
        a.dtype = dtype_of<T>;
        a.v = s.v, a.m = s.m, a.n = s.n, a.steps = s.steps, a.eps = 1e-7, a.coefficients = coefficients.data();
        a.x = x.data(), a.y = y.data();
    }

    void run(Context &ctx, bool both = true)
    {
        ctx.size(subspace_newton_schulz_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_newton_schulz_cpu(&ctx, &a)) << ctx.message;
        if (!both) return;
        subspace_newton_schulz_args back = a;
        back.dy = dy.data(), back.dx = dx.data();
        ctx.size(subspace_newton_schulz_workspace_cpu(&ctx, &back));
        ASSERT_EQ(SUBSPACE_OK, subspace_newton_schulz_backward_cpu(&ctx, &back)) << ctx.message;
    }

    void check(double slack) const
    {
        for (int64_t v = 0; v < s.v; v++) {
            std::vector<std::vector<double>> xs(1, std::vector<double>(entries));
            std::vector<double> g(dy.begin() + v * entries, dy.begin() + (v + 1) * entries), next;
            double length = 0, dot = 0, largest = 0;
            for (int64_t i = 0; i < entries; i++) length += std::pow(double(x[v * entries + i]), 2);
            length = std::sqrt(length);
            for (int64_t i = 0; i < entries; i++) xs[0][i] = double(x[v * entries + i]) / length;
            for (int64_t k = 0; k < s.steps; k++) {
                xs.emplace_back();
                step(s.m, s.n, s.triple.data(), xs[k], xs[k + 1], {}, next);
            }
            for (int64_t i = 0; i < entries; i++)
                ASSERT_NEAR(xs.back()[i], double(y[v * entries + i]), slack) << v << ' ' << i;
            for (int64_t k = s.steps; k-- > 0; g = next) {
                std::vector<double> y1;
                step(s.m, s.n, s.triple.data(), xs[k], y1, g, next);
            }
            for (int64_t i = 0; i < entries; i++) dot += g[i] * xs[0][i];
            for (int64_t i = 0; i < entries; i++) g[i] = (g[i] - dot * xs[0][i]) / length;
            for (double e : g) largest = std::max(largest, std::fabs(e));
            for (int64_t i = 0; i < entries; i++)
                ASSERT_NEAR(g[i], double(dx[v * entries + i]), 10 * slack * largest) << v << ' ' << i;
        }
    }
};

// one of everything, wide, tall, square; leaves, several tiles; runs of one step, of all, and of some
std::vector<Shape> shapes()
{
    return {{1, 1, 1, 1},    {2, 3, 7, 5},  {3, 7, 3, 5}, {2, 20, 20, 3}, {1, 9, 70, 12, QUINTIC},
            {1, 70, 129, 4}, {1, 90, 66, 2}};
}

template <typename T> void run_all(int threads)
{
    for (const Shape &s : shapes()) {
        SCOPED_TRACE(std::to_string(s.m) + " x " + std::to_string(s.n) + ", " + std::to_string(s.steps) + " steps");
        Problem<T> p(s);
        Context ctx(threads);
        p.run(ctx);
        p.check(sizeof(T) == 8 ? 1e-11 : 1e-4);
    }
}

TEST_EVERY_WAY(NewtonSchulz, MatchesTheDefinition, run_all)

// More than one tile: against itself on the transposed matrix, whose Gram matrix is made the other way.
TEST(NewtonSchulz, TilesMeet)
{
    const int64_t m = looks_at_values() ? 530 : 1030, n = m + 3;
    Problem<float> wide({1, m, n, 2}), tall({1, n, m, 2});
    for (int64_t i = 0; i < m * n; i++) tall.x[i % n * m + i / n] = wide.x[i];
    Context ctx;
    wide.run(ctx, false), tall.run(ctx, false);
    for (int64_t i = 0; i < m * n; i++) ASSERT_NEAR(wide.y[i], tall.y[i % n * m + i / n], 1e-5) << i;
}

TEST(NewtonSchulz, SameBitsOnThreeThreads)
{
    std::vector<Shape> some = shapes();
    some.push_back({1, 300, 700, 2});
    some.push_back({5, 40, 60, 2});
    for (const Shape &s : some) {
        Problem<float> one(s), three(s);
        Context alone(1), together(3);
        one.run(alone), three.run(together);
        ASSERT_EQ(one.y, three.y);
        ASSERT_EQ(one.dx, three.dx);
    }
}

TEST(NewtonSchulz, EachMatrixByItself)
{
    Problem<double> p({5, 3, 4, 5});
    std::fill_n(p.x.begin(), 12, 0.);
    p.x[12 + 5] = NAN, p.x[24] = INFINITY;
    for (int i = 36; i < 48; i++) p.x[i] *= 1e-200; // below eps: not scaled up
    for (int i = 48; i < 60; i++) p.x[i] *= 1e200;  // its squares leave the range
    Context ctx;
    p.run(ctx);
    for (int i = 0; i < 12; i++) {
        EXPECT_EQ(0, p.y[i]);
        EXPECT_NEAR(p.dy[i] * std::pow(3.4445, 5) * 1e7, p.dx[i], 1e-4 * std::fabs(p.dx[i]));
        EXPECT_TRUE(std::isnan(p.y[12 + i]) && std::isnan(p.dx[12 + i]));
        EXPECT_TRUE(std::isnan(p.y[24 + i]) && std::isnan(p.dx[24 + i]));
        EXPECT_LT(std::fabs(p.y[36 + i]), 1e-185);
    }
    double length = 0;
    for (int i = 48; i < 60; i++) length += p.y[i] * p.y[i];
    EXPECT_NEAR(std::sqrt(3), std::sqrt(length), .6);
}

TEST(NewtonSchulz, HalfTypesAreWidened)
{
    // (3, 4)/5 by s <- 1.5 s - .5 s^3, at whose 1 it stands still
    const double cubic[3] = {1.5, -.5, 0};
    const uint16_t bf16[2] = {0x4040, 0x4080}, f16[2] = {0x4200, 0x4400}, ones[2][2] = {{0x3f80, 0}, {0x3c00, 0}};
    for (const auto dtype : {SUBSPACE_BF16, SUBSPACE_F16}) {
        uint16_t y[2] = {7, 7}, dx[2] = {7, 7};
        subspace_newton_schulz_args a{};
        a.dtype = dtype, a.v = 1, a.m = 1, a.n = 2, a.steps = 1, a.eps = 1e-7, a.coefficients = cubic;
        a.x = dtype == SUBSPACE_BF16 ? bf16 : f16, a.y = y, a.dy = ones[dtype == SUBSPACE_F16], a.dx = dx;
        Context ctx;
        ctx.size(subspace_newton_schulz_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_newton_schulz_cpu(&ctx, &a)) << ctx.message;
        EXPECT_EQ(dtype == SUBSPACE_BF16 ? 0x3f1a : 0x38cd, y[0]); // .6
        EXPECT_EQ(dtype == SUBSPACE_BF16 ? 0x3f4d : 0x3a66, y[1]); // .8
        ASSERT_EQ(SUBSPACE_OK, subspace_newton_schulz_backward_cpu(&ctx, &a)) << ctx.message;
        EXPECT_EQ(dtype == SUBSPACE_BF16 ? 0x3e03 : 0x3019, dx[0]); // (1 - .36)/5
        EXPECT_EQ(dtype == SUBSPACE_BF16 ? 0xbdc5 : 0xae25, dx[1]); // -.48/5
    }
}

TEST(NewtonSchulz, RunsEndBeforeRoundingDoes)
{
    Problem<float> p({1, 4, 40, 12}), square({1, 4, 4, 12});
    EXPECT_EQ(5, subspace_newton_schulz_run(&p.a, 0)); // 3.4445^8 < 2^15 < 3.4445^10
    EXPECT_EQ(2, subspace_newton_schulz_run(&p.a, 10));
    EXPECT_EQ(1, subspace_newton_schulz_run(&square.a, 0));
}

TEST(NewtonSchulz, ChecksArguments)
{
    Problem<float> p({1, 3, 4, 5});
    Context ctx;
    const auto refused = [&](const char *words) {
        ctx.size(subspace_newton_schulz_workspace_cpu(&ctx, &p.a));
        EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_newton_schulz_cpu(&ctx, &p.a));
        EXPECT_STREQ(words, ctx.message);
    };
    p.a.eps = 0;
    refused("newton_schulz: eps must be positive and finite, got 0");
    p.a.eps = 1, p.coefficients[4] = INFINITY;
    refused("newton_schulz: coefficients must be finite, got inf in step 1");
    p.coefficients[4] = 0, p.a.steps = 0;
    refused("newton_schulz: need 1 to 100 steps, got 0");
    p.a.steps = 1, p.a.m = -1;
    refused("newton_schulz: negative size: 1 matrices of -1 x 4");
    p.a.m = int64_t(1) << 31;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_newton_schulz_check(&ctx, &p.a));
    p.a.m = 3;
    ctx.size(subspace_newton_schulz_workspace_cpu(&ctx, &p.a) - 1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_newton_schulz_cpu(&ctx, &p.a));
    EXPECT_EQ(7, p.y[0]);
}

TEST(NewtonSchulz, NothingToDo)
{
    for (const Shape &s : {Shape{0, 3, 4, 5}, Shape{2, 0, 4, 5}, Shape{2, 4, 0, 5}}) {
        Problem<float> p(s);
        Context ctx;
        p.run(ctx);
    }
}

} // namespace
