// coding_rate_soft: rate and gradients against the definition, in memory no larger than promised.
#include "exact.h"
#include "native.h"

namespace
{

struct Shape {
    int64_t v, n, d, k;
};

// What the definition says of one class: half the logdet of A and its inverse.
template <typename R> struct Truth {
    R h = 0;
    std::vector<R> inverse;

    Truth(int64_t n, int64_t d, int64_t k, int64_t which, double eps, const double *z, const double *w)
    {
        R t = 0;
        std::vector<R> y(d * n), column(d);
        for (int64_t i = 0; i < n; i++) {
            t += w[i * k + which];
            const R root = std::sqrt(static_cast<R>(w[i * k + which]));
            for (int64_t j = 0; j < d; j++) y[j * n + i] = root * z[i * d + j];
        }
        inverse.assign(d * d, 0);
        if (t == 0) return;
        const Factor<R> factor(y, d, n, d / (t * eps));
        h = factor.logdet / 2;
        for (int64_t q = 0; q < d; q++) {
            std::fill(column.begin(), column.end(), 0), column[q] = 1;
            factor.solve(column);
            std::copy(column.begin(), column.end(), inverse.begin() + q * d);
        }
    }
};

template <typename T> struct Problem {
    std::vector<T> z, weights, rate, inverse, stats, drate, dz, dweights;
    subspace_coding_rate_soft_args a{};

    explicit Problem(const Shape &s, double length = 1)
    {
        a.dtype = dtype_of<T>, a.v = s.v, a.n = s.n, a.d = s.d, a.k = s.k, a.eps = 0.5;
        z = randoms<T>(s.v * s.n * s.d), weights = randoms<T>(s.v * s.n * s.k, 2), drate = randoms<T>(s.v, 3);
        for (auto &x : z) x = static_cast<T>(length * x / std::sqrt(double(s.d)));
        for (size_t i = 0; i < weights.size(); i++) weights[i] = s.k > 2 && i % s.k == 1 ? T(0) : std::fabs(weights[i]);
        rate.assign(s.v, T(7)), dz.assign(z.size(), T(7)), dweights.assign(weights.size(), T(7));
        inverse.assign(s.v * s.k * s.d * (s.d + 1) / 2, T(7)), stats.assign(s.v * 2 * s.k, T(7));
        a.z = z.data(), a.weights = weights.data(), a.rate = rate.data();
        a.inverse = inverse.data(), a.stats = stats.data();
    }

    void forward(Context &ctx)
    {
        a.drate = nullptr, a.dz = a.dweights = nullptr;
        ctx.size(subspace_coding_rate_soft_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_coding_rate_soft_cpu(&ctx, &a)) << ctx.message;
    }

    void backward(Context &ctx)
    {
        a.drate = drate.data(), a.dz = dz.data(), a.dweights = dweights.data();
        ctx.size(subspace_coding_rate_soft_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_coding_rate_soft_backward_cpu(&ctx, &a)) << ctx.message;
    }

    void check(double tolerance) const
    {
        using R = wider<T>;
        const int64_t n = a.n, d = a.d, k = a.k;
        for (int64_t v = 0; v < a.v; v++) {
            const std::vector<double> zv(z.begin() + v * n * d, z.begin() + (v + 1) * n * d);
            const std::vector<R> exact(zv.begin(), zv.end());
            const std::vector<double> wv(weights.begin() + v * n * k, weights.begin() + (v + 1) * n * k);
            std::vector<double> ez(n * d), ew(n * k);
            double value = 0;
            for (int64_t c = 0; c < k; c++) {
                const Truth<R> truth(n, d, k, c, a.eps, zv.data(), wv.data());
                double t = 0, trace = 0;
                for (int64_t i = 0; i < n; i++) t += wv[i * k + c];
                for (int64_t j = 0; j < d; j++) trace += static_cast<double>(truth.inverse[j * d + j]);
                value += t * static_cast<double>(truth.h) / n;
                for (int64_t i = 0; t > 0 && i < n; i++) {
                    double q = 0;
                    for (int64_t r = 0; r < d; r++) {
                        const R y = dot(&truth.inverse[r * d], &exact[i * d], d);
                        q += zv[i * d + r] * static_cast<double>(y);
                        ez[i * d + r] += drate[v] * d / (n * a.eps) * wv[i * k + c] * static_cast<double>(y);
                    }
                    ew[i * k + c] =
                        drate[v] * ((static_cast<double>(truth.h) - (d - trace) / 2) / n + d / (2 * n * a.eps) * q);
                }
            }
            ASSERT_NEAR(value, double(rate[v]), tolerance * std::fabs(value));
            near(ez, dz.data() + v * n * d, tolerance), near(ew, dweights.data() + v * n * k, tolerance);
        }
    }

    static void near(const std::vector<double> &expected, const T *found, double tolerance)
    {
        double most = 0;
        for (double e : expected) most = std::max(most, std::fabs(e));
        for (size_t i = 0; i < expected.size(); i++) ASSERT_NEAR(expected[i], double(found[i]), tolerance * most) << i;
    }
};

// one of everything, class by class, face-split, n < d, more than one band, tile and block of rows
std::vector<Shape> shapes()
{
    return {{1, 1, 1, 1},   {2, 30, 7, 3},   {1, 20, 5, 33},  {3, 31, 17, 40},
            {1, 9, 33, 50}, {1, 40, 130, 2}, {1, 530, 19, 34}};
}

template <typename T> void run_all(int threads, double length = 1)
{
    int which = 0;
    for (const Shape &s : shapes()) {
        SCOPED_TRACE(which++);
        Problem<T> p(s, length);
        Context ctx(threads);
        p.forward(ctx);
        p.backward(ctx);
        p.check(tolerance<T>(1e-5));
        p.a.inverse = p.a.stats = nullptr; // not kept: made again
        std::fill(p.rate.begin(), p.rate.end(), T(7));
        p.forward(ctx);
        p.backward(ctx);
        p.check(tolerance<T>(1e-5));
    }
}

TEST_EVERY_WAY(CodingRateSoft, MatchesTheDefinition, run_all)

template <typename T> void one_point(double tolerance) // in eight dimensions: nothing but cancellation
{
    Problem<T> p({1, 1, 8, 3}, 300);
    Context ctx;
    p.forward(ctx);
    EXPECT_EQ(-1, p.stats[3]);
    for (T x : p.inverse) ASSERT_EQ(0, x);
    p.backward(ctx);
    p.check(tolerance);
}

TEST(CodingRateSoft, FeaturesOfAnyLength)
{
    run_all<float>(3, 300);
    run_all<float>(1, 1e-3);
    one_point<float>(1e-5);
    one_point<double>(1e-9);
}

// Matrices that a GPU has in registers, and just not; more pairs than one tile of F has room for.
template <typename T> void sizes()
{
    for (const Shape &s :
         {Shape{2, 90, 64, 2}, Shape{1, 99, 65, 1}, Shape{1, 190, 128, 1}, Shape{1, 199, 129, 1}, Shape{1, 220, 177, 3},
          Shape{1, 300, 256, 1}, Shape{1, 320, 257, 1}, Shape{1, 5300, 80, 1}}) {
        SCOPED_TRACE(s.d);
        Problem<T> p(s);
        Context ctx;
        p.a.inverse = s.n % 2 ? nullptr : p.a.inverse, p.a.stats = s.n % 2 ? nullptr : p.a.stats;
        p.forward(ctx);
        p.backward(ctx);
        p.check(tolerance<T>(1e-5));
    }
}

TEST(CodingRateSoft, SizesInFloat32)
{
    sizes<float>();
}
TEST(CodingRateSoft, SizesInFloat64)
{
    sizes<double>();
}

// Features nearly all alike, or long: with care, in classes too many to have their float64 matrices at once.
TEST(CodingRateSoft, Collapsed)
{
    for (const Shape &s : {Shape{1, 40, 20, 3}, Shape{2, 150, 90, 1}, Shape{1, 30, 180, 2}, Shape{1, 70, 66, 500}}) {
        SCOPED_TRACE(s.d);
        Problem<float> p(s);
        for (size_t i = 0; i < p.z.size(); i++) p.z[i] = 30 * std::sin(float(i % s.d)) + p.z[i];
        Context ctx(3);
        p.forward(ctx);
        EXPECT_EQ(-1, p.stats[s.k]);
        p.backward(ctx);
        p.check(1e-5);
    }
}

TEST(CodingRateSoft, OnlyTheGradientsAskedFor)
{
    for (const Shape &s : {Shape{2, 30, 7, 3}, Shape{3, 31, 17, 40}}) {
        Problem<double> p(s);
        Context ctx;
        p.forward(ctx);
        p.backward(ctx);
        const auto dz = p.dz, dweights = p.dweights;
        std::fill(p.dz.begin(), p.dz.end(), 7), std::fill(p.dweights.begin(), p.dweights.end(), 7);
        p.a.dweights = nullptr;
        ASSERT_EQ(SUBSPACE_OK, subspace_coding_rate_soft_backward_cpu(&ctx, &p.a)) << ctx.message;
        EXPECT_EQ(dz, p.dz);
        p.a.dz = nullptr, p.a.dweights = p.dweights.data();
        ASSERT_EQ(SUBSPACE_OK, subspace_coding_rate_soft_backward_cpu(&ctx, &p.a)) << ctx.message;
        EXPECT_EQ(dweights, p.dweights);
    }
}

// As LongPointsOfRankOne of coding_rate, with weights: q_i = c_i^2 |u|^2 / (1 + a sum), a = d / (t eps).
template <typename T> void long_points_of_rank_one()
{
    for (const Shape &s : {Shape{1, 40, 12, 2}, Shape{1, 20, 6, 40}, Shape{1, 9, 9, 1}, Shape{1, 70, 66, 2}})
        for (int exponent : {-40, 0, 10, 17, 25, 30, 60}) {
            if (!looks_at_values() && (s.n > 40 || exponent % 10 == 7 || exponent == 0)) continue; // a matter of time
            Problem<T> p(s);
            Context ctx(2);
            const int64_t n = s.n, d = s.d, k = s.k;
            std::vector<double> u(d), c(n), dz(n * d), dw(n * k), t(k), sum(k);
            double square = 0, rate = 0, longest = 0;
            for (int64_t j = 0; j < d; j++) u[j] = double(j * 37 % 19) - 9.5, square += u[j] * u[j];
            for (int64_t i = 0; i < n; i++) c[i] = std::ldexp(double(i % 3 + 1), exponent);
            for (int64_t i = 0; i < n * d; i++) p.z[i] = T(c[i / d] * u[i % d]);
            for (int64_t i = 0; i < n * k; i++) {
                t[i % k] += double(p.weights[i]);
                sum[i % k] += double(p.weights[i]) * c[i / k] * c[i / k] * square;
            }
            for (int64_t q = 0; q < k; q++) {
                const double a = double(d) / (t[q] * p.a.eps), x = t[q] == 0 ? 0 : a * sum[q];
                if (t[q] == 0) continue;
                rate += t[q] / 2 * std::log1p(x) / double(n);
                longest = std::max(longest, std::sqrt(x));
                for (int64_t i = 0; i < n; i++) {
                    const double at = double(d) / (double(n) * p.a.eps) / (1 + x);
                    dw[i * k + q] = double(p.drate[0]) *
                                    ((std::log1p(x) / 2 - x / (1 + x) / 2) / double(n) + at / 2 * c[i] * c[i] * square);
                    for (int64_t j = 0; j < d; j++)
                        dz[i * d + j] += double(p.drate[0]) * at * double(p.weights[i * k + q]) * c[i] * u[j];
                }
            }
            ctx.size(subspace_coding_rate_soft_workspace_cpu(&ctx, &p.a));
            const auto status = subspace_coding_rate_soft_cpu(&ctx, &p.a);
            if (exponent == 60) { // float64 can't tell either
                if (looks_at_values()) EXPECT_EQ(SUBSPACE_NUMERICAL, status) << s.n << " x " << s.d;
                else EXPECT_TRUE(std::isnan(p.rate[0])) << p.rate[0];
                continue;
            }
            ASSERT_EQ(SUBSPACE_OK, status) << ctx.message;
            for (bool keep : {true, false}) {
                p.a.inverse = keep ? p.inverse.data() : nullptr, p.a.stats = keep ? p.stats.data() : nullptr;
                p.forward(ctx);
                p.backward(ctx);
                EXPECT_NEAR(rate, double(p.rate[0]), 1e-5 * rate) << s.n << " x " << s.d << " 2^" << exponent;
                Problem<T>::near(dw, p.dweights.data(), 1e-4);
                const double unit = std::fabs(double(p.drate[0])) * std::sqrt(double(d) / double(n));
                for (int64_t i = 0; i < n * d; i++)
                    ASSERT_NEAR(dz[i], double(p.dz[i]), (1e-4 + 4e-15 * longest) * unit) << exponent;
            }
        }
}

TEST(CodingRateSoft, LongPointsOfRankOneFloat)
{
    long_points_of_rank_one<float>();
}

TEST(CodingRateSoft, LongPointsOfRankOneDouble)
{
    long_points_of_rank_one<double>();
}

TEST(CodingRateSoft, NothingToSum)
{
    for (const Shape &s : {Shape{0, 5, 3, 4}, Shape{2, 5, 3, 0}}) {
        Problem<float> p(s);
        Context ctx(3);
        p.forward(ctx);
        p.backward(ctx);
        for (float x : p.rate) EXPECT_EQ(0, x);
        for (float x : p.dz) EXPECT_EQ(0, x);
    }
}

TEST(CodingRateSoft, BadArgumentsAreNamed)
{
    Problem<float> p({2, 9, 3, 4});
    Context ctx;
    const auto fails = [&](subspace_status status, const char *message) {
        ctx.size(subspace_coding_rate_soft_workspace_cpu(&ctx, &p.a));
        EXPECT_EQ(status, subspace_coding_rate_soft_cpu(&ctx, &p.a));
        EXPECT_STREQ(message, ctx.message);
    };
    const auto bad_value = [&](subspace_status status, const char *message) {
        if (looks_at_values()) return fails(status, message);
        p.forward(ctx);
        EXPECT_TRUE(std::isfinite(p.rate[0]) && std::isnan(p.rate[1])) << message;
    };
    const float z = p.z[30], w = p.weights[(9 + 7) * 4 + 2];
    p.weights[(9 + 7) * 4 + 2] = -0.5f;
    bad_value(SUBSPACE_INVALID_ARGUMENT,
              "coding_rate_soft: weights must be >= 0, got -0.5 at view 1, point 7, class 2");
    p.weights[(9 + 7) * 4 + 2] = NAN;
    bad_value(SUBSPACE_NUMERICAL, "coding_rate_soft: the weight at view 1, point 7, class 2 is not finite");
    p.weights[(9 + 7) * 4 + 2] = w, p.z[30] = INFINITY;
    bad_value(SUBSPACE_NUMERICAL, "coding_rate_soft: z is not finite, or its length overflows, at view 1, point 1");
    p.z[30] = z, p.a.eps = 0;
    fails(SUBSPACE_INVALID_ARGUMENT, "coding_rate_soft: eps must be positive and finite, got 0");
    p.a.eps = 0.5, p.a.d = 0;
    fails(SUBSPACE_INVALID_ARGUMENT,
          "coding_rate_soft: need points and features, at most 2^31 - 1 of each, got n=9, d=0");
    p.a.d = 3;
    ctx.size(subspace_coding_rate_soft_workspace_cpu(&ctx, &p.a) - 1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_coding_rate_soft_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "workspace"));
}

} // namespace
