// tucker_conv: the pointwise ends against their definition, in memory no larger than promised.
#include "native.h"

extern "C" {
#include "dropout.h"
}

namespace
{

struct Shape {
    int64_t b, n, p, r;
};

template <typename T> struct Problem {
    Shape s;
    int64_t seed = 12345;
    std::vector<T> x, f, z, w, df, before;
    subspace_tucker_conv_args a{};

    Problem(const Shape &shape, bool last, double dropout)
        : s(shape), x(randoms<T>(s.b * s.n * s.p)), f(randoms<T>(s.n * s.r, 2)), z(s.b * s.r * s.p),
          w(randoms<T>(s.b * s.r * s.p, 3)), df(s.n * s.r), before(x)
    {
        a.dtype = dtype_of<T>;
        a.b = s.b, a.n = s.n, a.p = s.p, a.r = s.r, a.last = last;
        a.dropout = dropout, a.seed = dropout > 0 ? &seed : nullptr;
        a.x = x.data(), a.f = f.data(), a.z = z.data(), a.w = w.data(), a.df = df.data();
    }

    // where entry (b, c, p) of `channels` lies
    int64_t at(int64_t b, int64_t c, int64_t p, int64_t channels) const
    {
        return a.last ? (b * s.p + p) * channels + c : (b * channels + c) * s.p + p;
    }

    double drop(int64_t i) const
    {
        return a.dropout > 0 ? dropout_factor(static_cast<uint64_t>(seed), static_cast<uint64_t>(i), a.dropout) : 1;
    }

    void check_project() const
    {
        std::vector<double> edf(s.n * s.r);
        const double bound = tolerance<T>() * std::sqrt(double(s.n)) * 4;
        for (int64_t b = 0; b < s.b; b++)
            for (int64_t p = 0; p < s.p; p++)
                for (int64_t q = 0; q < s.r; q++) {
                    double sum = 0;
                    for (int64_t c = 0; c < s.n; c++) {
                        const int64_t i = at(b, c, p, s.n);
                        const double v = double(before[i]) * drop(i);
                        sum += v * double(f[c * s.r + q]);
                        edf[c * s.r + q] += v * double(w[at(b, q, p, s.r)]);
                    }
                    const double ours = a.z ? double(z[at(b, q, p, s.r)]) : sum;
                    ASSERT_NEAR(sum, ours, bound) << b << " " << p << " " << q;
                }
        for (size_t i = 0; a.df && i < edf.size(); i++)
            ASSERT_NEAR(edf[i], double(df[i]), tolerance<T>() * 4 * std::sqrt(double(s.b * s.p + 1))) << i;
        ASSERT_EQ(before, x);
    }

    void check_expand() const
    {
        for (int64_t b = 0; b < s.b; b++)
            for (int64_t c = 0; c < s.n; c++)
                for (int64_t p = 0; p < s.p; p++) {
                    const int64_t i = at(b, c, p, s.n);
                    double sum = 0;
                    for (int64_t q = 0; q < s.r; q++) sum += double(f[c * s.r + q]) * double(z[at(b, q, p, s.r)]);
                    const double expected = double(before[i]) + drop(i) * sum;
                    ASSERT_NEAR(expected, double(x[i]),
                                tolerance<T>() * 4 * std::sqrt(double(s.r)) * std::max(1.0, std::abs(expected)))
                        << b << " " << c << " " << p;
                }
    }
};

std::vector<Shape> shapes()
{
    return {{1, 1, 1, 1},    {3, 5, 7, 2},  {2, 40, 49, 16},   {1, 33, 300, 17}, {2, 70, 1000, 8},
            {5, 300, 20, 4}, {9, 64, 1, 3}, {1, 12, 5000, 50}, {2, 2000, 150, 5}};
}

template <typename T> void run_all(int threads)
{
    for (const Shape &s : shapes())
        for (const bool last : {false, true})
            for (const double dropout : {0.0, 0.3}) {
                SCOPED_TRACE("b=" + std::to_string(s.b) + " n=" + std::to_string(s.n) + " p=" + std::to_string(s.p) +
                             " r=" + std::to_string(s.r) + (last ? " last" : " first") + (dropout > 0 ? " drop" : ""));
                Problem<T> p(s, last, dropout);
                Context ctx(threads);
                ctx.size(subspace_tucker_conv_workspace_cpu(&ctx, &p.a));
                ASSERT_EQ(SUBSPACE_OK, subspace_tucker_conv_project_cpu(&ctx, &p.a)) << ctx.message;
                p.check_project();
                const std::vector<T> z = p.z, df = p.df;
                ASSERT_EQ(SUBSPACE_OK, subspace_tucker_conv_project_cpu(&ctx, &p.a)) << ctx.message;
                ASSERT_EQ(z, p.z);
                ASSERT_EQ(df, p.df);
                ASSERT_EQ(SUBSPACE_OK, subspace_tucker_conv_expand_cpu(&ctx, &p.a)) << ctx.message;
                p.check_expand();
            }
}

TEST(TuckerConv, MatchesTheDefinitionInFloat64)
{
    run_all<double>(1);
}
TEST(TuckerConv, MatchesTheDefinitionInFloat32)
{
    run_all<float>(1);
}
TEST(TuckerConv, MatchesTheDefinitionOnThreeThreads)
{
    run_all<float>(3);
    run_all<double>(3);
}

TEST(TuckerConv, SkipsWhatIsNotAskedFor)
{
    for (const bool last : {false, true})
        for (const bool need_z : {false, true}) {
            Problem<double> p({2, 20, 33, 5}, last, 0);
            (need_z ? p.a.df : p.a.z) = nullptr;
            if (need_z) p.a.w = nullptr;
            Context ctx;
            ctx.size(subspace_tucker_conv_workspace_cpu(&ctx, &p.a));
            ASSERT_EQ(SUBSPACE_OK, subspace_tucker_conv_project_cpu(&ctx, &p.a));
            p.check_project();
            for (double v : need_z ? p.df : p.z) ASSERT_EQ(0, v);
        }
}

TEST(TuckerConv, NothingToDo)
{
    for (const Shape &s : {Shape{0, 5, 7, 2}, Shape{3, 5, 0, 2}})
        for (const bool last : {false, true}) {
            Problem<float> p(s, last, 0.5);
            Context ctx(3);
            p.df.assign(p.df.size(), 1);
            ctx.size(subspace_tucker_conv_workspace_cpu(&ctx, &p.a));
            ASSERT_EQ(SUBSPACE_OK, subspace_tucker_conv_project_cpu(&ctx, &p.a));
            ASSERT_EQ(SUBSPACE_OK, subspace_tucker_conv_expand_cpu(&ctx, &p.a));
            for (float v : p.df) ASSERT_EQ(0, v);
        }
}

TEST(TuckerConv, ZeroLeavesEveryBitAlone)
{
    for (const bool last : {false, true}) {
        Problem<float> p({2, 20, 33, 5}, last, 0);
        Context ctx;
        ctx.size(subspace_tucker_conv_workspace_cpu(&ctx, &p.a));
        ASSERT_EQ(SUBSPACE_OK, subspace_tucker_conv_expand_cpu(&ctx, &p.a));
        ASSERT_EQ(p.before, p.x);
    }
}

TEST(TuckerConv, HalfTypesAreWidenedAndRoundedOnce)
{
    // bfloat16 is the upper half of a float32: 1, 2, 3 and their sums are exact
    uint16_t x[4] = {0x3f80, 0x4000, 0x4040, 0};
    const float f[4] = {1, 2, 3, 4}, w[1] = {2};
    float z[1], df[4];
    subspace_tucker_conv_args a{};
    a.dtype = SUBSPACE_BF16, a.b = 1, a.n = 4, a.p = 1, a.r = 1;
    a.x = x, a.f = f, a.z = z, a.w = w, a.df = df;
    for (const int last : {0, 1}) {
        a.last = last;
        Context ctx;
        ctx.size(subspace_tucker_conv_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_tucker_conv_project_cpu(&ctx, &a));
        EXPECT_EQ(14, z[0]);
        for (int i = 0; i < 4; i++) EXPECT_EQ(i < 3 ? 2 * (i + 1) : 0, df[i]);
    }
    z[0] = -1; // 1 - 1, 2 - 2, 3 - 3, 0 - 4
    Context ctx;
    ctx.size(subspace_tucker_conv_workspace_cpu(&ctx, &a));
    ASSERT_EQ(SUBSPACE_OK, subspace_tucker_conv_expand_cpu(&ctx, &a));
    for (int i = 0; i < 4; i++) EXPECT_EQ(i < 3 ? 0 : 0xc080, x[i]);
}

TEST(TuckerConv, BadArgumentsAreNamed)
{
    Problem<double> p({4, 3, 300, 2}, false, 0);
    Context ctx;
    ctx.size(subspace_tucker_conv_workspace_cpu(&ctx, &p.a) - 1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_tucker_conv_project_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "workspace"));
    p.a.dropout = 0.5;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_tucker_conv_expand_cpu(&ctx, &p.a));
    EXPECT_STREQ("tucker_conv: dropout 0.5 needs a seed", ctx.message);
    p.a.dropout = 1;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_tucker_conv_expand_cpu(&ctx, &p.a));
    p.a.dropout = 0, p.a.r = 0;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_tucker_conv_project_cpu(&ctx, &p.a));
    EXPECT_STREQ("tucker_conv: need channels and rank above 0, got n=3, r=0", ctx.message);
    p.a.r = 2, p.a.w = nullptr;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_tucker_conv_project_cpu(&ctx, &p.a));
    EXPECT_STREQ("tucker_conv: df needs w", ctx.message);
}

} // namespace
