// product: stacks of matrices, either way round, against sums in double.
#include "native.h"

namespace
{

template <typename T>
subspace_product_args args(int64_t v, int64_t m, int64_t n, int64_t k, const std::vector<T> &a, const std::vector<T> &b,
                           std::vector<T> &y)
{
    subspace_product_args p{};
    p.dtype = dtype_of<T>, p.v = v, p.m = m, p.n = n, p.k = k, p.scale = 1;
    p.a = a.data(), p.b = b.data(), p.y = y.data();
    return p;
}

void run(Context &ctx, const subspace_product_args &p)
{
    ctx.size(subspace_product_workspace_cpu(&ctx, &p));
    ASSERT_EQ(SUBSPACE_OK, subspace_product_cpu(&ctx, &p)) << ctx.message;
}

// one row, panels that are not full, several of them, and stacks with a matrix for all
template <typename T> void run_all(int threads)
{
    const int64_t sizes[][4] = {{1, 1, 1, 1}, {2, 65, 7, 30}, {3, 130, 33, 5}, {1, 300, 16, 64}, {2, 4, 5, 0}};
    for (const auto &[v, m, n, k] : sizes)
        for (int kind = 0; kind < 8; kind++) {
            const bool transa = kind & 1, transb = kind & 2, shared = kind & 4;
            SCOPED_TRACE("m=" + std::to_string(m) + " kind=" + std::to_string(kind));
            const std::vector<T> a = randoms<T>(v * m * k), b = randoms<T>((shared ? 1 : v) * k * n, 2);
            std::vector<T> y = randoms<T>(v * m * n, 3), before = y;
            auto p = args(v, m, n, k, a, b, y);
            p.transa = transa, p.transb = transb, p.shared = shared, p.scale = -2, p.add = .5;
            Context ctx(threads);
            run(ctx, p);
            for (int64_t i = 0; i < v * m * n; i++) {
                const int64_t w = i / (m * n), r = i / n % m, c = i % n, of = shared ? 0 : w;
                double sum = 0;
                for (int64_t l = 0; l < k; l++)
                    sum += double(a[w * m * k + (transa ? l * m + r : r * k + l)]) *
                           double(b[of * k * n + (transb ? c * k + l : l * n + c)]);
                ASSERT_NEAR(.5 * double(before[i]) - 2 * sum, double(y[i]), 20 * tolerance<T>(1e-6)) << i;
            }
        }
}

TEST_EVERY_WAY(Product, SumsInDouble, run_all)

TEST(Product, BadArgumentsAreNamed)
{
    std::vector<float> a(12), b(12), y(12);
    Context ctx;
    auto p = args<float>(1, -3, 4, 2, a, b, y);
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_product_cpu(&ctx, &p));
    EXPECT_STREQ("product: negative size: 1 matrices of -3 x 4 x 2", ctx.message);
    p.m = int64_t(1) << 31;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_product_cpu(&ctx, &p));
    EXPECT_STREQ("product: a BLAS dimension does not fit in 32 bits: 2147483648 x 4 x 2", ctx.message);
    p.m = 3, p.dtype = SUBSPACE_BF16;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_product_cpu(&ctx, &p));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "product: dtype must be float32 or float64"));
}

} // namespace
