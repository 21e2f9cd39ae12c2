// gated_cosine: cosines and gradients against their definition, in memory no larger than promised.
#include "native.h"

namespace
{

struct Shape {
    int64_t v, b, n, k;
};

template <typename T> struct Problem {
    Shape s;
    std::vector<T> z1, gate, z2, dcosine, cosine, inverse, dz1, dgate, dz2;
    subspace_gated_cosine_args a{};

    explicit Problem(const Shape &shape)
        : s(shape), z1(randoms<T>(s.v * s.b * s.k)), gate(randoms<T>(z1.size(), 2)), z2(randoms<T>(s.v * s.n * s.k, 3)),
          dcosine(randoms<T>(s.v * s.b * s.n, 4)), cosine(dcosine.size(), T(7)), inverse(dcosine.size(), T(7)),
          dz1(z1.size(), T(7)), dgate(z1.size(), T(7)), dz2(z2.size(), T(7))
    {
        a.dtype = dtype_of<T>;
        a.v = s.v, a.b = s.b, a.n = s.n, a.k = s.k;
        a.z1 = z1.data(), a.gate = gate.data(), a.z2 = z2.data();
        a.cosine = cosine.data(), a.inverse = inverse.data();
    }

    void forward(Context &ctx)
    {
        a.dcosine = nullptr;
        ctx.size(subspace_gated_cosine_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_gated_cosine_cpu(&ctx, &a)) << ctx.message;
    }

    void run(Context &ctx)
    {
        forward(ctx);
        a.dcosine = dcosine.data(), a.dz1 = dz1.data(), a.dgate = dgate.data(), a.dz2 = dz2.data();
        ctx.size(subspace_gated_cosine_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_gated_cosine_backward_cpu(&ctx, &a)) << ctx.message;
    }

    void check() const
    {
        std::vector<double> c(cosine.size()), d1(z1.size()), dg(z1.size()), d2(z2.size());
        for (int64_t i = 0; i < s.v * s.b; i++)
            for (int64_t j = 0; j < s.n; j++) {
                const int64_t at = i * s.n + j, q = (i / s.b * s.n + j) * s.k, p = i * s.k;
                double first = 0, second = 0, both = 0;
                for (int64_t l = 0; l < s.k; l++) {
                    const double x = double(gate[p + l]) * double(z1[p + l]);
                    const double y = double(gate[p + l]) * double(z2[q + l]);
                    first += x * x, second += y * y, both += x * y;
                }
                const double lengths = std::sqrt(first * second), d = double(dcosine[at]);
                c[at] = both / lengths;
                for (int64_t l = 0; l < s.k; l++) {
                    const double g = double(gate[p + l]), x = g * double(z1[p + l]), y = g * double(z2[q + l]);
                    const double dx = d * (y / lengths - c[at] * x / first),
                                 dy = d * (x / lengths - c[at] * y / second);
                    d1[p + l] += g * dx, d2[q + l] += g * dy;
                    dg[p + l] += double(z1[p + l]) * dx + double(z2[q + l]) * dy;
                }
            }
        near(c, cosine), near(d1, dz1), near(dg, dgate), near(d2, dz2);
    }

    static void near(const std::vector<double> &expected, const std::vector<T> &found)
    {
        double largest = 1;
        for (double e : expected) largest = std::max(largest, std::fabs(e));
        for (size_t i = 0; i < found.size(); i++)
            ASSERT_NEAR(expected[i], double(found[i]), tolerance<T>() * largest) << i;
    }
};

// one of everything, a tile and its edges in gates, points and features, several views
std::vector<Shape> shapes()
{
    return {{1, 1, 1, 1}, {2, 7, 5, 3}, {1, 128, 256, 8}, {1, 129, 257, 5}, {3, 2, 1, 130}, {1, 1, 300, 129}};
}

template <typename T> void run_all(int threads)
{
    for (const Shape &s : shapes()) {
        SCOPED_TRACE("b=" + std::to_string(s.b) + " n=" + std::to_string(s.n) + " k=" + std::to_string(s.k));
        Problem<T> p(s);
        Context ctx(threads);
        p.run(ctx);
        p.check();
    }
}

TEST_EVERY_WAY(GatedCosine, MatchesTheDefinition, run_all)

TEST(GatedCosine, SameBitsOnThreeThreads)
{
    for (const Shape &s : shapes()) {
        Problem<float> one(s), three(s);
        Context alone(1), together(3);
        one.run(alone), three.run(together);
        ASSERT_EQ(one.cosine, three.cosine);
        ASSERT_EQ(one.dz1, three.dz1);
        ASSERT_EQ(one.dgate, three.dgate);
        ASSERT_EQ(one.dz2, three.dz2);
    }
}

TEST(GatedCosine, OnlyWhatIsAskedFor)
{
    const Shape s{2, 5, 6, 4};
    Problem<float> all(s), gates(s), points(s);
    Context ctx;
    all.run(ctx);
    for (Problem<float> *p : {&gates, &points}) {
        p->forward(ctx);
        p->a.dcosine = p->dcosine.data();
        if (p == &gates) p->a.dz1 = p->dz1.data(), p->a.dgate = p->dgate.data();
        else p->a.dz2 = p->dz2.data();
        ctx.size(subspace_gated_cosine_workspace_cpu(&ctx, &p->a));
        ASSERT_EQ(SUBSPACE_OK, subspace_gated_cosine_backward_cpu(&ctx, &p->a)) << ctx.message;
    }
    EXPECT_EQ(all.dz1, gates.dz1);
    EXPECT_EQ(all.dgate, gates.dgate);
    EXPECT_EQ(all.dz2, points.dz2);
    for (float x : points.dz1) ASSERT_EQ(7, x);
    for (float x : gates.dz2) ASSERT_EQ(7, x);
}

// rows of 0 have cosines and gradients of 0; a row that is not finite has cosines of NaN; units do not matter
TEST(GatedCosine, ZerosNaNsAndUnits)
{
    const Shape s{1, 4, 5, 6};
    Context ctx;
    Problem<float> p(s);
    for (int64_t l = 0; l < s.k; l++) p.z1[s.k + l] = p.gate[2 * s.k + l] = p.z2[3 * s.k + l] = 0;
    p.run(ctx);
    for (int64_t i = 0; i < s.b; i++)
        for (int64_t j = 0; j < s.n; j++) ASSERT_EQ(i == 1 || i == 2 || j == 3, p.cosine[i * s.n + j] == 0);
    for (int64_t l = 0; l < s.k; l++) {
        for (int64_t i : {s.k, 2 * s.k}) ASSERT_TRUE(p.dz1[i + l] == 0 && p.dgate[i + l] == 0);
        ASSERT_EQ(0, p.dz2[3 * s.k + l]);
        ASSERT_TRUE(std::isfinite(p.dz1[l]) && std::isfinite(p.dgate[l]) && std::isfinite(p.dz2[l]));
    }
    for (const float unit : {1e-36f, 1e37f}) {
        Problem<float> plain(s), scaled(s);
        for (std::vector<float> *x : {&scaled.z1, &scaled.z2, &scaled.gate})
            for (float &y : *x) y *= unit;
        plain.run(ctx), scaled.run(ctx);
        for (size_t i = 0; i < plain.cosine.size(); i++) ASSERT_NEAR(plain.cosine[i], scaled.cosine[i], 1e-5) << unit;
    }
    for (const float bad : {HUGE_VALF, std::nanf("")}) {
        Problem<float> q(s);
        q.z1[s.k] = q.z2[2 * s.k + 1] = q.gate[3 * s.k + 5] = bad;
        q.forward(ctx);
        for (int64_t i = 0; i < s.b; i++)
            for (int64_t j = 0; j < s.n; j++)
                ASSERT_EQ(i == 1 || i == 3 || j == 2, std::isnan(q.cosine[i * s.n + j])) << i << " " << j;
    }
}

TEST(GatedCosine, NothingToCompare)
{
    for (const Shape &s : {Shape{2, 0, 3, 4}, Shape{2, 3, 0, 4}, Shape{0, 2, 3, 4}}) {
        Problem<float> p(s);
        Context ctx(3);
        p.run(ctx);
        for (float x : p.dz1) ASSERT_EQ(0, x);
        for (float x : p.dgate) ASSERT_EQ(0, x);
        for (float x : p.dz2) ASSERT_EQ(0, x);
    }
}

TEST(GatedCosine, BadArgumentsAreNamed)
{
    Problem<float> p({1, 4, 3, 2});
    Context ctx;
    const auto refused = [&](const char *words) {
        ctx.size(1 << 20);
        EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_gated_cosine_cpu(&ctx, &p.a));
        EXPECT_STREQ(words, ctx.message);
        EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_gated_cosine_backward_cpu(&ctx, &p.a));
    };
    ctx.size(subspace_gated_cosine_workspace_cpu(&ctx, &p.a) - 1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_gated_cosine_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "gated_cosine: workspace of "));
    p.a.dz1 = p.dz1.data();
    refused("gated_cosine: dz1 and dgate go together");
    p.a.dz1 = nullptr, p.a.k = 0;
    refused("gated_cosine: need features, got 1 views of 4 gates, 3 points, 0 features");
    p.a.k = 2, p.a.n = int64_t(1) << 31;
    refused("gated_cosine: a BLAS dimension does not fit in 32 bits: gates 4, points 2147483648, features 2");
    p.a.n = 3, p.a.dtype = SUBSPACE_BF16;
    refused("gated_cosine: float32 or float64, got dtype 3");
}

} // namespace
