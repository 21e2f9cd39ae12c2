// rsgd: for the shapes in which kernels cut a class up, the plain formula of a geodesic step.
#include "rsgd_cases.h"

namespace
{

// One class by the formula, in double: W' = f W - a g D and M' its momentum step, or transported along the geodesic.
// f, g and h by their series, for steps of less than a radian.
struct Geodesic {
    int64_t k, n;
    using Rows = std::vector<double>;

    Rows rows(const Rows &x, const Rows &y, int64_t m) const // x y' for y of m columns, or x y with m = n
    {
        const bool transposed = m == k;
        Rows out(k * m);
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < m; j++)
                for (int64_t l = 0; l < (transposed ? n : k); l++)
                    out[i * m + j] += transposed ? x[i * n + l] * y[j * n + l] : x[i * k + l] * y[l * n + j];
        return out;
    }
    Rows square(const Rows &x, const Rows &y) const
    {
        Rows out(k * k);
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < k; j++)
                for (int64_t l = 0; l < k; l++) out[i * k + j] += x[i * k + l] * y[l * k + j];
        return out;
    }
    static Rows sum(double a, const Rows &x, double b, const Rows &y)
    {
        Rows out(x.size());
        for (size_t i = 0; i < x.size(); i++) out[i] = a * x[i] + b * y[i];
        return out;
    }

    void step(const subspace_rsgd_args &a, double lr, Rows &w, const Rows &grad, Rows &m) const
    {
        const double mu = a.momentum, sign = a.maximize ? -1 : 1;
        const Rows g = sum(sign, grad, a.weight_decay, w), moved = sum(mu, m, mu == 0 ? 1 : 1 - a.dampening, g);
        const Rows dir = a.nesterov ? sum(1, g, mu, moved) : moved;
        const auto horizontal = [&](const Rows &x) {
            Rows p = rows(x, w, k);
            return sum(1, x, -1, k == n ? square(p, w) : rows(p, w, n));
        };
        const auto times = [&](const Rows &x, const Rows &y) { return k == n ? square(x, y) : rows(x, y, n); };
        const Rows D = horizontal(dir), X = sum(lr * lr, rows(D, D, k), 0, Rows(k * k));
        Rows term(k * k), f(k * k), g_(k * k), h(k * k);
        for (int64_t i = 0; i < k; i++) term[i * k + i] = 1;
        double factorial = 1; // (2 j)!
        for (int j = 0; j < 16; j++, term = square(term, X)) {
            const double alternate = j % 2 ? -1 : 1;
            if (j) factorial *= (2. * j - 1) * (2. * j);
            f = sum(1, f, alternate / factorial, term), g_ = sum(1, g_, alternate / factorial / (2 * j + 1), term);
            h = sum(1, h, -alternate / factorial / ((2 * j + 1) * (2. * j + 2)), term);
        }
        const Rows before = w;
        if (a.parallel && mu != 0) {
            const Rows V = horizontal(moved), Y = rows(V, D, k);
            m = sum(1, V, 1, sum(lr * lr, times(square(Y, h), D), lr, times(square(Y, g_), before)));
        } else if (mu != 0) {
            m = moved;
        }
        w = sum(1, times(f, before), -lr, times(g_, D));
    }
};

// A step of every class against the formula; `skew` numbers before the first, so that no vector is where it should be.
template <typename T>
void like_the_formula(int64_t c, int64_t k, int64_t n, void (*change)(subspace_rsgd_args &), int64_t skew = 0)
{
    SCOPED_TRACE("c=" + std::to_string(c) + " k=" + std::to_string(k) + " n=" + std::to_string(n) +
                 " skew=" + std::to_string(skew) + (sizeof(T) == 4 ? " float32" : " float64"));
    Problem<T> p(c, k, n, 0.8);
    p.a.dampening = 0.1, p.a.weight_decay = 0.01, p.a.lr_value = 0.4;
    change(p.a);
    std::vector<double> w(p.w.begin(), p.w.end()), m(p.m.begin(), p.m.end());
    for (int64_t q = 0; q < c; q++) {
        const auto part = [&](auto &v) {
            return std::vector<double>(v.begin() + q * k * n, v.begin() + (q + 1) * k * n);
        };
        auto wq = part(w), mq = part(m);
        Geodesic{k, n}.step(p.a, p.a.lr_value, wq, part(p.g), mq);
        std::copy(wq.begin(), wq.end(), w.begin() + q * k * n), std::copy(mq.begin(), mq.end(), m.begin() + q * k * n);
    }
    for (auto *v : {&p.w, &p.g, &p.m}) v->insert(v->begin(), skew, T(7));
    p.f.weight = p.w.data() + skew, p.f.grad = p.g.data() + skew;
    p.f.buffer = p.a.momentum == 0 ? nullptr : p.m.data() + skew;
    p.step();
    ASSERT_EQ(0, p.skipped);
    double worst = 0;
    for (size_t i = 0; i < w.size(); i++) {
        worst = std::max(worst, std::fabs(p.w[i + skew] - w[i]));
        if (p.a.momentum != 0) worst = std::max(worst, std::fabs(p.m[i + skew] - m[i]));
    }
    EXPECT_LT(worst, sizeof(T) == 4 ? 5e-7 : 1e-13);
    for (int64_t i = 0; i < skew; i++) ASSERT_EQ(T(7), p.w[i]);
}

void plain(subspace_rsgd_args &) {}
void no_momentum(subspace_rsgd_args &a)
{
    a.momentum = 0;
}
void nesterov(subspace_rsgd_args &a)
{
    a.nesterov = 1;
}
void transported(subspace_rsgd_args &a)
{
    a.parallel = 1;
}
void both(subspace_rsgd_args &a)
{
    a.parallel = a.nesterov = a.maximize = 1;
}

constexpr void (*rules[])(subspace_rsgd_args &) = {plain, no_momentum, nesterov, transported, both};

TEST(Rsgd, AStepIsTheFormulaForEveryRule)
{
    for (const auto rule : rules)
        for (const int64_t k : {1, 3, 4, 7, 8, 12, 16, 17, 32}) {
            like_the_formula<float>(2, k, 75, rule), like_the_formula<double>(2, k, 75, rule);
            like_the_formula<float>(2, k, 64, rule), like_the_formula<float>(1, k, k, rule);
        }
    like_the_formula<float>(1, 64, 200, both), like_the_formula<double>(1, 64, 65, plain);
}

// As many classes as are stepped at a time, and more.
TEST(Rsgd, ClassesOfFewRowsAreTheFormula)
{
    for (const auto rule : {plain, no_momentum, nesterov})
        for (int64_t k = 2; k <= 8; k++) {
            like_the_formula<float>(13, k, 30, rule), like_the_formula<double>(13, k, 30, rule);
            like_the_formula<float>(9, k, 270, rule, 1), like_the_formula<double>(17, k, k, rule);
        }
}

// Kernels cut long rows into tiles, and share them among the blocks of a cluster.
TEST(Rsgd, LongRowsAreTheFormula)
{
    for (const auto rule : rules)
        for (const int64_t n : {2047, 2048, 2052}) like_the_formula<float>(1, 8, n, rule);
    for (const auto rule : {nesterov, both}) {
        like_the_formula<float>(1, 3, 9001, rule), like_the_formula<float>(1, 16, 3001, rule);
        like_the_formula<double>(1, 5, 4099, rule), like_the_formula<float>(1, 17, 1030, rule);
    }
    like_the_formula<float>(3, 1, 20003, plain), like_the_formula<float>(1, 8, 40001, plain);
    like_the_formula<float>(1, 8, 40000, nesterov), like_the_formula<float>(1, 33, 1200, transported);
}

TEST(Rsgd, RowsThatBeginAnywhere)
{
    for (const int64_t skew : {1, 2, 3})
        for (const auto rule : {plain, both}) {
            like_the_formula<float>(2, 8, 256, rule, skew), like_the_formula<double>(2, 4, 64, rule, skew);
            like_the_formula<float>(1, 8, 2048, rule, skew);
        }
}

TEST(Rsgd, RaggedClassesOfAllSizes)
{
    const std::vector<int64_t> start = {0, 1, 9, 12, 28, 45, 50, 90, 92};
    for (const int64_t n : {48, 400, 2500}) {
        auto w = frames<float>(start, n);
        const std::vector<double> before(w.begin(), w.end());
        auto g = randoms<float>(92 * n, 7), m = randoms<float>(92 * n, 8);
        for (auto *v : {&g, &m})
            for (auto &x : *v) x /= std::sqrt(float(8 * n));
        const std::vector<double> momentum(m.begin(), m.end());
        double lr[8];
        for (int i = 0; i < 8; i++) lr[i] = 0.05 * i;
        int64_t skipped = -1;
        const subspace_frames f = {w.data(), g.data(), m.data(), 8, std::min<int64_t>(n, 85), n};
        subspace_rsgd_args a{};
        a.dtype = SUBSPACE_F32, a.count = 1, a.frames = &f, a.start = start.data(), a.skipped = &skipped;
        a.lr = lr, a.lr_per_class = 1, a.momentum = 0.7, a.parallel = 1;
        Context ctx(3);
        ctx.size(subspace_rsgd_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_rsgd_cpu(&ctx, &a)) << ctx.message;
        EXPECT_EQ(0, skipped);
        for (int q = 0; q < 8; q++) {
            const auto part = [&](auto &v) {
                return std::vector<double>(v.begin() + start[q] * n, v.begin() + start[q + 1] * n);
            };
            auto wq = part(before), mq = part(momentum);
            Geodesic{start[q + 1] - start[q], n}.step(a, lr[q], wq, part(g), mq);
            for (size_t i = 0; i < wq.size(); i++) {
                ASSERT_NEAR(wq[i], w[start[q] * n + i], 5e-7) << q << " n=" << n;
                ASSERT_NEAR(mq[i], m[start[q] * n + i], 5e-7) << q << " n=" << n;
            }
        }
    }
}

} // namespace
