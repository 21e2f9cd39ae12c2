// hadamard: rows against sums and differences taken one bit at a time, to the bit, in memory no larger than promised.
#include "native.h"

namespace
{

template <typename T> std::vector<T> transformed(std::vector<T> x, int64_t n, double scale)
{
    for (int64_t h = n / 2; h > 0; h /= 2)
        for (size_t i = 0; i < x.size(); i++)
            if ((i & h) == 0) {
                const T a = x[i], b = x[i + h];
                x[i] = a + b, x[i + h] = a - b;
            }
    for (T &v : x) v *= static_cast<T>(scale);
    return x;
}

template <typename T> subspace_hadamard_args args(int64_t v, int64_t n, const std::vector<T> &x, std::vector<T> &y)
{
    subspace_hadamard_args a{};
    a.dtype = dtype_of<T>, a.v = v, a.n = n, a.scale = 1;
    a.x = x.data(), a.y = y.data();
    return a;
}

void run(Context &ctx, const subspace_hadamard_args &a)
{
    ctx.size(subspace_hadamard_workspace_cpu(&ctx, &a));
    ASSERT_EQ(SUBSPACE_OK, subspace_hadamard_cpu(&ctx, &a)) << ctx.message;
}

// every length up to beyond what fits a cache or a block, rows that do not fill a vector or a block, and many of them
template <typename T> void run_all(int threads)
{
    const bool model = !looks_at_values(); // slow
    for (int bits = 0; bits <= (model ? 15 : 18); bits++)
        for (int64_t v : {1, 2, 3, 7, 40}) {
            const int64_t n = int64_t(1) << bits;
            if (v * n > (model ? 1 << 15 : 1 << 20) && v > 1) continue;
            SCOPED_TRACE("v=" + std::to_string(v) + " n=" + std::to_string(n));
            const std::vector<T> x = randoms<T>(v * n);
            std::vector<T> y(v * n, T(7));
            auto a = args(v, n, x, y);
            a.scale = v == 2 ? 1 / std::sqrt(double(n)) : 1;
            Context ctx(threads);
            run(ctx, a);
            ASSERT_EQ(transformed(x, n, a.scale), y);
        }
}

TEST_EVERY_WAY(Hadamard, SumsAndDifferencesToTheBit, run_all)

TEST(Hadamard, InPlace)
{
    for (int64_t n : {1 << 4, 1 << 10, 1 << 15}) {
        std::vector<float> x = randoms<float>(n);
        const std::vector<float> expected = transformed(x, n, 1);
        auto a = args(1, n, x, x);
        Context ctx;
        run(ctx, a);
        ASSERT_EQ(expected, x);
    }
}

TEST(Hadamard, HalfTypesAreWidened)
{
    // small whole numbers, which all types hold: 1, 2, 3, 4 and then zeros have the sums 10, -2, -4, 0, again and again
    for (const auto dtype : {SUBSPACE_BF16, SUBSPACE_F16})
        for (int64_t n : {4, 1 << 6, 1 << 14}) {
            const bool b = dtype == SUBSPACE_BF16;
            const uint16_t one[4] = {uint16_t(b ? 0x3f80 : 0x3c00), uint16_t(b ? 0x4000 : 0x4000),
                                     uint16_t(b ? 0x4040 : 0x4200), uint16_t(b ? 0x4080 : 0x4400)};
            const uint16_t sums[4] = {uint16_t(b ? 0x4120 : 0x4900), uint16_t(b ? 0xc000 : 0xc000),
                                      uint16_t(b ? 0xc080 : 0xc400), 0};
            std::vector<uint16_t> x(3 * n), y(3 * n, 7);
            for (int64_t i = 0; i < 4; i++)
                for (int64_t v = 0; v < 3; v++) x[v * n + i] = one[i];
            subspace_hadamard_args a{};
            a.dtype = dtype, a.v = 3, a.n = n, a.scale = 1, a.x = x.data(), a.y = y.data();
            Context ctx(3);
            run(ctx, a);
            for (int64_t i = 0; i < 3 * n; i++) ASSERT_EQ(sums[i % 4], y[i]) << i;
        }
}

TEST(Hadamard, NoRows)
{
    std::vector<float> x, y;
    Context ctx(3);
    run(ctx, args(0, 1 << 15, x, y));
}

TEST(Hadamard, BadArgumentsAreNamed)
{
    std::vector<uint16_t> x(1 << 15), y(1 << 15);
    subspace_hadamard_args a{};
    a.dtype = SUBSPACE_F16, a.v = 1, a.n = 1 << 15, a.scale = 1, a.x = x.data(), a.y = y.data();
    Context ctx;
    ctx.size(subspace_hadamard_workspace_cpu(&ctx, &a) - 1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_hadamard_cpu(&ctx, &a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "hadamard: workspace of "));
    for (int64_t n : {int64_t(0), int64_t(12), int64_t(1) << 27}) {
        a.n = n;
        EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_hadamard_cpu(&ctx, &a));
        EXPECT_EQ("hadamard: the length must be a power of two, at most 2^26, got " + std::to_string(n), ctx.message);
    }
    a.n = 4, a.v = -1;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_hadamard_cpu(&ctx, &a));
    EXPECT_STREQ("hadamard: negative number of rows: -1", ctx.message);
}

} // namespace
