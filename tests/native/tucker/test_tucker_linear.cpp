// tucker_linear: both directions against their definition, in memory no larger than promised.
#include "native.h"

extern "C" {
#include "dropout.h"
}

namespace
{

struct Shape {
    int64_t t, n, m, rn, rm;
};

template <typename T> struct Problem {
    Shape s;
    double dropout;
    int64_t seed = -12345;
    std::vector<T> x, core, u, v, y0, y, dy, dx0, dx, dcore, du, dv;
    subspace_tucker_linear_args a{};

    Problem(const Shape &shape, double dropout_, bool turned = false)
        : s(shape), dropout(dropout_), x(randoms<T>(s.t * s.n)), core(randoms<T>(s.rm * s.rn, 2)),
          u(randoms<T>(s.m * s.rm, 3)), v(randoms<T>(s.rn * s.n, 4)), y0(randoms<T>(s.t * s.m, 5)), y(y0),
          dy(randoms<T>(s.t * s.m, 6)), dx0(randoms<T>(s.t * s.n, 7)), dx(dx0), dcore(s.rm * s.rn, T(9)),
          du(s.m * s.rm, T(9)), dv(s.rn * s.n, T(9))
    {
        a.dtype = dtype_of<T>;
        a.t = s.t, a.n = s.n, a.m = s.m, a.rn = s.rn, a.rm = s.rm;
        a.scale = 0.7, a.dropout = dropout, a.seed = dropout > 0 ? &seed : nullptr;
        a.x = x.data(), a.core = core.data(), a.u = u.data(), a.v = v.data(), a.y = y.data();
        a.turned = turned;
        if (turned) turn(v, s.rn, s.n);
        a.dy = dy.data(), a.dx = dx.data(), a.dcore = dcore.data(), a.du = du.data(), a.dv = dv.data();
    }

    static void turn(std::vector<T> &matrix, int64_t rows, int64_t cols)
    {
        const std::vector<T> was = matrix;
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++) matrix[j * rows + i] = was[i * cols + j];
    }

    double mask(int64_t i) const
    {
        return dropout > 0 ? dropout_factor(static_cast<uint64_t>(seed), static_cast<uint64_t>(i), dropout) : 1;
    }

    using Matrix = std::vector<double>;

    // op(A) op(B), A and B in double
    static Matrix times(const Matrix &p, bool tp, const Matrix &q, bool tq, int64_t rows, int64_t cols, int64_t k)
    {
        Matrix out(rows * cols);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++)
                for (int64_t l = 0; l < k; l++)
                    out[i * cols + j] += p[tp ? l * rows + i : i * k + l] * q[tq ? j * k + l : l * cols + j];
        return out;
    }

    static void near(const Matrix &expected, const std::vector<T> &found, const char *what)
    {
        double top = 1e-3;
        for (double e : expected) top = std::max(top, std::abs(e));
        for (size_t i = 0; i < expected.size(); i++)
            ASSERT_NEAR(expected[i], double(found[i]), tolerance<T>() * top) << what << " " << i;
    }

    void check() const
    {
        Matrix xd(x.begin(), x.end()), c(core.begin(), core.end()), uu(u.begin(), u.end()), vv(v.begin(), v.end());
        Matrix g(dy.begin(), dy.end());
        std::vector<T> as_v = dv;
        if (a.turned) {
            std::vector<T> v_by_rows = v;
            turn(v_by_rows, s.n, s.rn), turn(as_v, s.n, s.rn);
            vv.assign(v_by_rows.begin(), v_by_rows.end());
        }
        for (size_t i = 0; i < xd.size(); i++) xd[i] *= mask(static_cast<int64_t>(i));
        const Matrix z1 = times(xd, false, vv, true, s.t, s.rn, s.n);
        Matrix z2 = times(z1, false, c, true, s.t, s.rm, s.rn), h = times(g, false, uu, false, s.t, s.rm, s.m);
        for (auto &e : z2) e *= a.scale;
        for (auto &e : h) e *= a.scale;
        Matrix ye = times(z2, false, uu, true, s.t, s.m, s.rm);
        for (size_t i = 0; i < ye.size(); i++) ye[i] += double(y0[i]);
        const Matrix k = times(h, false, c, false, s.t, s.rn, s.rm);
        Matrix dxe = times(k, false, vv, false, s.t, s.n, s.rn);
        for (size_t i = 0; i < dxe.size(); i++) dxe[i] = double(dx0[i]) + dxe[i] * mask(static_cast<int64_t>(i));
        near(ye, y, "y");
        near(dxe, dx, "dx");
        near(times(g, true, z2, false, s.m, s.rm, s.t), du, "du");
        near(times(h, true, z1, false, s.rm, s.rn, s.t), dcore, "dcore");
        near(times(k, true, xd, false, s.rn, s.n, s.t), as_v, "dv");
    }
};

const Shape shapes[] = {{1, 1, 1, 1, 1},
                        {3, 5, 7, 2, 3},
                        {65, 130, 33, 16, 8},
                        {200, 64, 500, 5, 17},
                        {7, 600, 9, 40, 2},
                        {300, 20, 20, 33, 33},
                        {129, 481, 97, 3, 16},
                        {0, 5, 6, 2, 2},
                        // as wide as a tile of some level and precision, in two blocks of columns
                        {117, 384, 384, 8, 8},
                        {301, 192, 192, 8, 8},
                        {605, 96, 96, 8, 8},
                        {1205, 48, 48, 8, 8}};

template <typename T> class TuckerLinear : public testing::Test
{
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(TuckerLinear, Types);

TYPED_TEST(TuckerLinear, AgreesWithItsDefinition)
{
    for (const Shape &shape : shapes)
        for (double dropout : {0.0, 0.3})
            for (int threads : {1, 2, 3})
                for (bool turned : {false, true}) {
                    Problem<TypeParam> p(shape, dropout, turned);
                    Context ctx(threads);
                    ctx.size(subspace_tucker_linear_workspace_cpu(&ctx, &p.a));
                    ASSERT_EQ(SUBSPACE_OK, subspace_tucker_linear_cpu(&ctx, &p.a)) << ctx.message;
                    ASSERT_EQ(SUBSPACE_OK, subspace_tucker_linear_backward_cpu(&ctx, &p.a)) << ctx.message;
                    p.check();
                }
}

TYPED_TEST(TuckerLinear, LeavesOutWhatIsNotAskedFor)
{
    for (int left = 0; left < 16; left++) {
        Problem<TypeParam> whole({9, 30, 20, 4, 3}, 0), part({9, 30, 20, 4, 3}, 0);
        if (left & 1) part.a.dx = nullptr;
        if (left & 2) part.a.dcore = nullptr;
        if (left & 4) part.a.du = nullptr;
        if (left & 8) part.a.dv = nullptr;
        Context ctx;
        ctx.size(subspace_tucker_linear_workspace_cpu(&ctx, &whole.a));
        ASSERT_EQ(SUBSPACE_OK, subspace_tucker_linear_backward_cpu(&ctx, &whole.a)) << ctx.message;
        ASSERT_EQ(SUBSPACE_OK, subspace_tucker_linear_backward_cpu(&ctx, &part.a)) << ctx.message;
        EXPECT_EQ(left & 1 ? part.dx0 : whole.dx, part.dx);
        EXPECT_EQ(left & 2 ? std::vector<TypeParam>(part.dcore.size(), 9) : whole.dcore, part.dcore);
        EXPECT_EQ(left & 4 ? std::vector<TypeParam>(part.du.size(), 9) : whole.du, part.du);
        EXPECT_EQ(left & 8 ? std::vector<TypeParam>(part.dv.size(), 9) : whole.dv, part.dv);
    }
}

TYPED_TEST(TuckerLinear, IsRepeatable)
{
    Problem<TypeParam> first({300, 200, 150, 16, 16}, 0.1), second({300, 200, 150, 16, 16}, 0.1);
    for (auto *p : {&first, &second}) {
        Context ctx(3);
        ctx.size(subspace_tucker_linear_workspace_cpu(&ctx, &p->a));
        ASSERT_EQ(SUBSPACE_OK, subspace_tucker_linear_cpu(&ctx, &p->a)) << ctx.message;
        ASSERT_EQ(SUBSPACE_OK, subspace_tucker_linear_backward_cpu(&ctx, &p->a)) << ctx.message;
    }
    EXPECT_EQ(first.y, second.y);
    EXPECT_EQ(first.dx, second.dx);
    EXPECT_EQ(first.du, second.du);
    EXPECT_EQ(first.dv, second.dv);
}

TEST(TuckerLinearErrors, SayWhatIsWrong)
{
    const auto message = [](auto change) {
        Problem<float> p({4, 5, 6, 2, 3}, 0);
        Context ctx;
        ctx.size(subspace_tucker_linear_workspace_cpu(&ctx, &p.a));
        change(p.a, ctx);
        EXPECT_NE(SUBSPACE_OK, subspace_tucker_linear_cpu(&ctx, &p.a));
        EXPECT_EQ(p.y0, p.y);
        return std::string(ctx.message);
    };
    EXPECT_EQ("tucker_linear: need sizes above 0, got 4 rows, 0 inputs, 6 outputs, ranks 3 and 2",
              message([](auto &a, auto &) { a.n = 0; }));
    EXPECT_EQ("tucker_linear: dropout must be in [0, 1), got 1", message([](auto &a, auto &) { a.dropout = 1; }));
    EXPECT_EQ("tucker_linear: dropout 0.5 needs a seed", message([](auto &a, auto &) { a.dropout = 0.5; }));
    EXPECT_NE(std::string::npos,
              message([](auto &, auto &ctx) { ctx.workspace_bytes = 1; }).find("workspace of 1 bytes, need"));
}

TEST(Dropout, IsUniformAndDependsOnTheSeed)
{
    double sum = 0, squares = 0, same = 0;
    const int count = 1 << 20;
    for (uint64_t i = 0; i < count; i++) {
        const double r = dropout_uniform(7, i);
        ASSERT_GE(r, 0);
        ASSERT_LT(r, 1);
        sum += r, squares += r * r, same += (r < 0.5) == (dropout_uniform(8, i) < 0.5f);
    }
    EXPECT_NEAR(0.5, sum / count, 0.002);
    EXPECT_NEAR(1.0 / 3, squares / count, 0.002);
    EXPECT_NEAR(0.5, same / count, 0.003);
}

} // namespace
