// sigreg: the characteristic function and its gradient against their definition, in memory no larger than promised.
#include "native.h"

namespace
{

struct Shape {
    int64_t v, n, d, s, knots;
};

template <typename T> struct Problem {
    Shape s;
    std::vector<T> z, directions, dz;
    std::vector<double> off, doff;
    subspace_sigreg_args a{};

    explicit Problem(const Shape &shape)
        : s(shape), z(randoms<T>(s.v * s.n * s.d)), directions(randoms<T>(s.d * s.s, 2)), dz(s.v * s.n * s.d, T(7)),
          off(s.v * 2 * (s.knots - 1) * s.s, 7), doff(randoms<double>(off.size(), 3))
    {
        for (T &x : directions) x /= static_cast<T>(std::sqrt(double(s.d)));
        a.dtype = dtype_of<T>;
        a.v = s.v, a.n = s.n, a.d = s.d, a.s = s.s, a.knots = s.knots, a.step = 3. / double(s.knots - 1);
        a.z = z.data(), a.directions = directions.data(), a.off = off.data(), a.doff = doff.data(), a.dz = dz.data();
    }

    void run(Context &ctx)
    {
        ctx.size(subspace_sigreg_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_sigreg_cpu(&ctx, &a)) << ctx.message;
        ctx.size(subspace_sigreg_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_sigreg_backward_cpu(&ctx, &a)) << ctx.message;
    }

    void check() const
    {
        std::vector<double> eoff(off.size()), edz(dz.size());
        const int64_t powers = s.knots - 1, size = powers * s.s;
        for (int64_t i = 0; i < s.v * s.n; i++)
            for (int64_t l = 0; l < s.s; l++) {
                double p = 0, dp = 0;
                for (int64_t k = 0; k < s.d; k++) p += double(z[i * s.d + k]) * double(directions[k * s.s + l]);
                for (int64_t j = 0; j < powers; j++) {
                    const double t = double(j + 1) * a.step, normal = std::exp(-t * t / 2);
                    const double root = std::sqrt((j + 1 < powers ? 2 : 1) * a.step * normal);
                    const int64_t at = i / s.n * 2 * size + j * s.s + l;
                    eoff[at] += root * (std::cos(t * p) - normal), eoff[at + size] += root * std::sin(t * p);
                    dp += root * t * (doff[at + size] * std::cos(t * p) - doff[at] * std::sin(t * p));
                }
                for (int64_t k = 0; k < s.d; k++) edz[i * s.d + k] += dp * double(directions[k * s.s + l]);
            }
        double largest = 0;
        for (double e : edz) largest = std::max(largest, std::fabs(e));
        for (size_t i = 0; i < off.size(); i++) ASSERT_NEAR(eoff[i], off[i], tolerance<T>() * double(s.n + 1)) << i;
        for (size_t i = 0; i < dz.size(); i++) ASSERT_NEAR(edz[i], double(dz[i]), tolerance<T>() * largest) << i;
    }
};

// one of everything, a tile, its edges, more than a part of points, a group of knots, a block of directions
std::vector<Shape> shapes()
{
    return {{1, 1, 1, 1, 2},     {2, 7, 5, 3, 17},   {1, 128, 16, 64, 17}, {3, 129, 9, 65, 5},
            {1, 61, 12, 70, 40}, {2, 50, 3, 20, 18}, {1, 2100, 2, 5, 17},  {1, 17, 60, 33, 33}};
}

template <typename T> void run_all(int threads)
{
    for (const Shape &s : shapes()) {
        SCOPED_TRACE("n=" + std::to_string(s.n) + " s=" + std::to_string(s.s) + " knots=" + std::to_string(s.knots));
        Problem<T> p(s);
        Context ctx(threads);
        p.run(ctx);
        p.check();
    }
}

TEST_EVERY_WAY(Sigreg, MatchesTheDefinition, run_all)

TEST(Sigreg, SameBitsOnThreeThreads)
{
    for (const Shape &s : shapes()) {
        Problem<float> one(s), three(s);
        Context alone(1), together(3);
        one.run(alone), three.run(together);
        ASSERT_EQ(one.off, three.off);
        ASSERT_EQ(one.dz, three.dz);
    }
}

TEST(Sigreg, HalfTypesAreWidened)
{
    // p = 1, 2 along one direction, in both half types; step pi: cos -1, 1 and sin 0, 0
    const uint16_t bf16[2] = {0x3f80, 0x4000}, f16[2] = {0x3c00, 0x4000};
    for (const auto dtype : {SUBSPACE_BF16, SUBSPACE_F16}) {
        const float direction = 1;
        double off[2] = {7, 7}, doff[2] = {0, 1};
        uint16_t dz[2] = {7, 7};
        subspace_sigreg_args a{};
        a.dtype = dtype, a.v = 1, a.n = 2, a.d = a.s = 1, a.knots = 2, a.step = 3.14159265358979324;
        a.z = dtype == SUBSPACE_BF16 ? bf16 : f16, a.directions = &direction;
        a.off = off, a.doff = doff, a.dz = dz;
        const double normal = std::exp(-a.step * a.step / 2), root = std::sqrt(a.step * normal);
        Context ctx;
        ctx.size(subspace_sigreg_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_sigreg_cpu(&ctx, &a)) << ctx.message;
        EXPECT_NEAR(-2 * normal * root, off[0], 1e-6);
        EXPECT_NEAR(0, off[1], 1e-6);
        ASSERT_EQ(SUBSPACE_OK, subspace_sigreg_backward_cpu(&ctx, &a)) << ctx.message;
        EXPECT_EQ(dz[0], dz[1] | 0x8000); // -root step and root step: of one size, the first one negative
        EXPECT_EQ(0, dz[1] & 0x8000);
        EXPECT_NE(0, dz[1]);
    }
}

TEST(Sigreg, LargeAnglesAreReduced)
{
    Problem<double> p({1, 40, 1, 1, 3});
    for (int64_t i = 0; i < 40; i++) p.z[i] = std::pow(10., double(i) / 5 - 2) * (i % 2 ? 1 : -1);
    p.directions[0] = 1;
    Context ctx;
    p.run(ctx);
    for (int64_t i = 0; i < 40; i++) { // up to 6e5: the angle itself is known to 1e-10
        const double x = p.z[i], root[2] = {std::sqrt(2 * 1.5 * std::exp(-1.125)), std::sqrt(1.5 * std::exp(-4.5))};
        double dz = 0;
        for (int j = 0; j < 2; j++) {
            const double t = 1.5 * (j + 1);
            dz += root[j] * t * (p.doff[j + 2] * std::cos(t * x) - p.doff[j] * std::sin(t * x));
        }
        EXPECT_NEAR(dz, p.dz[i], 1e-9) << x;
    }
    for (double x : {1e12, 1e20, 1e300}) {
        p.z.assign(40, x);
        p.run(ctx);
        EXPECT_TRUE(std::isfinite(p.off[0]) && std::isfinite(p.dz[3])) << x;
    }
    for (double x : {HUGE_VAL, std::nan("")}) {
        p.z[5] = x;
        p.run(ctx);
        EXPECT_TRUE(std::isnan(p.off[0]) && std::isnan(p.off[3]) && std::isnan(p.dz[5])) << x;
    }
}

TEST(Sigreg, NothingToSum)
{
    for (const Shape &s : {Shape{2, 0, 3, 4, 5}, Shape{0, 5, 3, 4, 5}}) {
        Problem<float> p(s);
        Context ctx(3);
        p.run(ctx);
        for (double x : p.off) ASSERT_EQ(0, x);
    }
}

TEST(Sigreg, BadArgumentsAreNamed)
{
    Problem<float> p({1, 4, 3, 2, 5});
    Context ctx;
    const auto refused = [&](const char *words) {
        ctx.size(1 << 20);
        EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_sigreg_cpu(&ctx, &p.a));
        EXPECT_STREQ(words, ctx.message);
        EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_sigreg_backward_cpu(&ctx, &p.a));
    };
    ctx.size(subspace_sigreg_workspace_cpu(&ctx, &p.a) - 1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_sigreg_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "sigreg: workspace of "));
    p.a.knots = 1;
    refused("sigreg: need 2 to 4096 knots, got 1");
    p.a.knots = 4097;
    refused("sigreg: need 2 to 4096 knots, got 4097");
    p.a.knots = 5, p.a.step = 0;
    refused("sigreg: step must be positive and finite, got 0");
    p.a.step = 1, p.a.s = 0;
    refused("sigreg: need features and directions, got 1 views of 4 points, 3 features, 0 directions");
    p.a.s = int64_t(1) << 31;
    refused("sigreg: a BLAS dimension does not fit in 32 bits: features 3, directions 2147483648");
}

} // namespace
