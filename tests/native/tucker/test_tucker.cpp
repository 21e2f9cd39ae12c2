// tucker: composition and its gradients against the definition, in memory no larger than promised.
#include "native.h"

namespace
{

struct Shape {
    std::vector<int64_t> d, r; // r of 0: no factor
};

int64_t volume(const std::vector<int64_t> &sizes)
{
    int64_t v = 1;
    for (int64_t s : sizes) v *= s;
    return v;
}

template <typename T> struct Problem {
    std::vector<int64_t> d, r;
    std::vector<std::vector<T>> factor, dfactor;
    std::vector<T> core, base, out, dout, dcore;
    subspace_tucker_args a{};

    explicit Problem(const Shape &s) : d(s.d), r(s.r), factor(s.d.size()), dfactor(s.d.size())
    {
        a.dtype = dtype_of<T>, a.modes = static_cast<int64_t>(d.size()), a.scale = 0.5;
        for (size_t i = 0; i < d.size(); i++) {
            if (r[i]) {
                factor[i] = randoms<T>(d[i] * r[i], 10 + unsigned(i)), dfactor[i].resize(d[i] * r[i]);
                a.factor[i] = factor[i].data(), a.dfactor[i] = dfactor[i].data();
            } else r[i] = d[i];
            a.d[i] = d[i], a.r[i] = r[i];
        }
        core = randoms<T>(volume(r), 1), base = randoms<T>(volume(d), 2), dout = randoms<T>(volume(d), 3);
        out.resize(volume(d)), dcore.resize(volume(r));
        a.core = core.data(), a.base = base.data(), a.out = out.data(), a.dout = dout.data(), a.dcore = dcore.data();
    }

    double entry(size_t mode, int64_t i, int64_t j) const
    {
        return factor[mode].empty() ? i == j : double(factor[mode][i * r[mode] + j]);
    }

    /* x along `mode` times the factor, or times its transpose; sizes follow */
    std::vector<double> along(size_t mode, std::vector<int64_t> &size, const std::vector<double> &x, bool back) const
    {
        const int64_t from = size[mode], to = back ? r[mode] : d[mode];
        int64_t pre = 1, post = 1;
        for (size_t i = 0; i < mode; i++) pre *= size[i];
        for (size_t i = mode + 1; i < size.size(); i++) post *= size[i];
        std::vector<double> y(pre * to * post);
        for (int64_t p = 0; p < pre; p++)
            for (int64_t i = 0; i < to; i++)
                for (int64_t j = 0; j < from; j++) {
                    const double u = back ? entry(mode, j, i) : entry(mode, i, j);
                    for (int64_t q = 0; q < post; q++) y[(p * to + i) * post + q] += u * x[(p * from + j) * post + q];
                }
        size[mode] = to;
        return y;
    }

    static void near(const std::vector<double> &truth, const T *found)
    {
        double top = 1e-3;
        for (double v : truth) top = std::max(top, std::fabs(v));
        for (size_t i = 0; i < truth.size(); i++) ASSERT_NEAR(truth[i], double(found[i]), tolerance<T>() * top) << i;
    }

    void check_forward() const
    {
        std::vector<int64_t> size = r;
        std::vector<double> y(core.begin(), core.end());
        for (size_t i = 0; i < d.size(); i++) y = along(i, size, y, false);
        for (size_t i = 0; i < y.size(); i++) y[i] = a.scale * y[i] + (a.base ? double(base[i]) : 0);
        near(y, out.data());
    }

    void check_backward() const
    {
        std::vector<int64_t> size = d;
        std::vector<double> g(dout.begin(), dout.end());
        for (double &v : g) v *= a.scale;
        std::vector<double> whole = g;
        for (size_t i = 0; i < d.size(); i++) whole = along(i, size, whole, true);
        if (a.dcore) near(whole, dcore.data());
        for (size_t mode = 0; mode < d.size(); mode++) {
            if (!a.dfactor[mode]) continue;
            std::vector<int64_t> back = d;
            std::vector<double> x = g,
                                u(d[mode] * r[mode]); // dU = unfold(x) unfold(core)', x the others' share of dout
            for (size_t i = 0; i < d.size(); i++)
                if (i != mode) x = along(i, back, x, true);
            int64_t post = 1;
            for (size_t i = mode + 1; i < d.size(); i++) post *= r[i];
            const int64_t pre = volume(r) / r[mode] / post;
            for (int64_t p = 0; p < pre; p++)
                for (int64_t i = 0; i < d[mode]; i++)
                    for (int64_t j = 0; j < r[mode]; j++)
                        for (int64_t q = 0; q < post; q++)
                            u[i * r[mode] + j] +=
                                x[(p * d[mode] + i) * post + q] * double(core[(p * r[mode] + j) * post + q]);
            near(u, dfactor[mode].data());
        }
    }
};

std::vector<Shape> shapes()
{
    return {{{1, 1}, {1, 1}},
            {{7, 5}, {0, 0}},
            {{40, 33}, {4, 6}},
            {{300, 500}, {16, 9}},
            {{700, 3}, {5, 2}},
            {{3, 700}, {2, 5}},
            {{5, 6}, {9, 11}},
            {{64, 48, 3, 3}, {8, 6, 3, 2}},
            {{130, 70, 3, 3}, {17, 5, 0, 0}},
            {{64, 64, 1, 1}, {4, 4, 1, 1}},
            {{20, 16, 5}, {0, 4, 3}},
            {{4, 1, 30, 2}, {0, 1, 3, 2}},
            {{6, 5, 4, 3, 2}, {2, 3, 0, 2, 5}},
            {{3, 4, 2, 5, 3, 2}, {2, 2, 2, 2, 2, 2}},
            {{2, 600, 20}, {2, 8, 0}},
            {{50, 2, 40}, {60, 0, 30}},
            {{90, 80}, {70, 66}},
            {{9, 85, 3}, {2, 70, 0}},
            {{3, 4, 90}, {2, 0, 66}}};
}

template <typename T> void run_all(int threads)
{
    for (const Shape &s : shapes())
        for (const bool based : {true, false}) {
            SCOPED_TRACE("d0=" + std::to_string(s.d[0]) + " d1=" + std::to_string(s.d[1]) +
                         " modes=" + std::to_string(s.d.size()) + (based ? " on a base" : ""));
            Problem<T> p(s);
            if (!based) p.a.base = nullptr;
            Context ctx(threads);
            p.a.dout = nullptr;
            ctx.size(subspace_tucker_workspace_cpu(&ctx, &p.a));
            ASSERT_EQ(SUBSPACE_OK, subspace_tucker_cpu(&ctx, &p.a)) << ctx.message;
            p.check_forward();
            p.a.dout = p.dout.data();
            ctx.size(subspace_tucker_workspace_cpu(&ctx, &p.a));
            ASSERT_EQ(SUBSPACE_OK, subspace_tucker_backward_cpu(&ctx, &p.a)) << ctx.message;
            p.check_backward();
        }
}

TEST(Tucker, MatchesTheDefinitionInFloat64)
{
    run_all<double>(1);
}
TEST(Tucker, MatchesTheDefinitionInFloat32)
{
    run_all<float>(1);
}
TEST(Tucker, MatchesTheDefinitionOnThreeThreads)
{
    run_all<float>(3);
    run_all<double>(3);
}

TEST(Tucker, AnyGradientsMayBeLeftOut)
{
    for (const Shape &s : shapes())
        for (unsigned need = 0; need < 2u << s.d.size(); need++) {
            Problem<double> p(s);
            if (!(need & 1)) p.a.dcore = nullptr;
            for (size_t i = 0; i < s.d.size(); i++)
                if (!(need >> (i + 1) & 1)) p.a.dfactor[i] = nullptr;
            if (volume(p.d) > 20000) continue;
            Context ctx(3);
            ctx.size(subspace_tucker_workspace_cpu(&ctx, &p.a));
            ASSERT_EQ(SUBSPACE_OK, subspace_tucker_backward_cpu(&ctx, &p.a)) << ctx.message;
            p.check_backward();
            for (size_t i = 0; i < s.d.size(); i++) {
                if (p.a.dfactor[i]) continue;
                for (double v : p.dfactor[i]) ASSERT_EQ(0, v);
            }
        }
}

TEST(Tucker, InPlaceIsTheSame)
{
    Problem<float> p({{200, 300}, {7, 8}}), q({{200, 300}, {7, 8}});
    q.a.out = q.base.data(), q.a.base = q.base.data();
    for (Problem<float> *one : {&p, &q}) {
        Context ctx(3);
        ctx.size(subspace_tucker_workspace_cpu(&ctx, &one->a));
        ASSERT_EQ(SUBSPACE_OK, subspace_tucker_cpu(&ctx, &one->a));
    }
    EXPECT_EQ(p.out, q.base);
}

TEST(Tucker, HalfTypesAreWidened)
{
    // bfloat16 is the upper half of a float32; 1 + 3 * 2 = 7 and 2 + 3 * 4 = 14 are exact
    const uint16_t base[2] = {0x3f80, 0x4000}, dout[2] = {0x3f80, 0x3f80};
    const float core[2] = {2, 4}, u[1] = {3};
    uint16_t out[2];
    float dcore[2], du[1];
    subspace_tucker_args a{};
    a.dtype = SUBSPACE_BF16, a.modes = 2, a.scale = 1;
    a.d[0] = a.r[0] = 1, a.d[1] = a.r[1] = 2;
    a.core = core, a.factor[0] = u, a.base = base, a.out = out, a.dout = dout, a.dcore = dcore, a.dfactor[0] = du;
    Context ctx;
    ctx.size(subspace_tucker_workspace_cpu(&ctx, &a));
    ASSERT_EQ(SUBSPACE_OK, subspace_tucker_cpu(&ctx, &a));
    ASSERT_EQ(SUBSPACE_OK, subspace_tucker_backward_cpu(&ctx, &a));
    EXPECT_EQ(0x40e0, out[0]);
    EXPECT_EQ(0x4160, out[1]);
    EXPECT_EQ(3, dcore[0]);
    EXPECT_EQ(3, dcore[1]);
    EXPECT_EQ(6, du[0]);
}

TEST(Tucker, BadArgumentsAreNamed)
{
    Problem<double> p({{20, 30}, {2, 3}});
    Context ctx;
    ctx.size(subspace_tucker_workspace_cpu(&ctx, &p.a) - 1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_tucker_backward_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "workspace"));
    ctx.size(0);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_tucker_cpu(&ctx, &p.a));
    p.a.factor[1] = nullptr;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_tucker_cpu(&ctx, &p.a));
    EXPECT_STREQ("tucker: mode 1 without a factor keeps its size, got d=30, r=3", ctx.message);
    p.a.r[1] = 0;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_tucker_backward_cpu(&ctx, &p.a));
    EXPECT_STREQ("tucker: mode 1: need sizes above 0, got d=30, r=0", ctx.message);
    p.a.modes = 7;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_tucker_cpu(&ctx, &p.a));
    EXPECT_STREQ("tucker: need 2 to 6 modes, got 7", ctx.message);
    p.a.modes = 2, p.a.r[1] = int64_t(1) << 50;
    p.a.factor[1] = p.core.data();
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_tucker_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "do not fit"));
}

} // namespace
