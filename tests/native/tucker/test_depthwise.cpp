// depthwise: the weight gradient, of other grouped convolutions too, against its definition, in memory no larger than
// promised.
#include "native.h"

namespace
{

struct Shape {
    int64_t b, c, m, in[3], kernel[3], stride[3], padding[3], dilation[3], n = 1;
};

template <typename T> struct Problem {
    std::vector<T> x, dy, dw;
    subspace_depthwise_args a{};

    explicit Problem(const Shape &s)
    {
        a.dtype = dtype_of<T>;
        a.b = s.b, a.c = s.c, a.n = s.n, a.m = s.m;
        int64_t in = s.b * s.c * s.n, out = s.b * s.c * s.m, taps = s.c * s.m * s.n;
        for (int i = 0; i < 3; i++) {
            a.in[i] = s.in[i], a.kernel[i] = s.kernel[i], a.stride[i] = s.stride[i];
            a.padding[i] = s.padding[i], a.dilation[i] = s.dilation[i];
            a.out[i] = (s.in[i] + 2 * s.padding[i] - s.dilation[i] * (s.kernel[i] - 1) - 1) / s.stride[i] + 1;
            in *= a.in[i], out *= a.out[i], taps *= a.kernel[i];
        }
        x = randoms<T>(in), dy = randoms<T>(out, 3), dw.assign(taps, T(7));
        a.x = x.data(), a.dy = dy.data(), a.dweight = dw.data();
    }

    double expected(int64_t output, int64_t p, const int64_t *k) const
    {
        double sum = 0;
        for (int64_t b = 0; b < a.b; b++)
            for (int64_t z = 0; z < a.out[0]; z++)
                for (int64_t y = 0; y < a.out[1]; y++)
                    for (int64_t w = 0; w < a.out[2]; w++) {
                        const int64_t o[3] = {z, y, w};
                        int64_t i[3];
                        bool inside = true;
                        for (int j = 0; j < 3; j++) {
                            i[j] = o[j] * a.stride[j] + k[j] * a.dilation[j] - a.padding[j];
                            inside = inside && i[j] >= 0 && i[j] < a.in[j];
                        }
                        if (!inside) continue;
                        const int64_t channel = output / a.m * a.n + p;
                        const int64_t from = ((b * a.c * a.n + channel) * a.in[0] + i[0]) * a.in[1] + i[1];
                        const int64_t by = ((b * a.c * a.m + output) * a.out[0] + z) * a.out[1] + y;
                        sum += double(x[from * a.in[2] + i[2]]) * double(dy[by * a.out[2] + w]);
                    }
        return sum;
    }

    void check() const
    {
        int64_t at = 0;
        for (int64_t row = 0; row < a.c * a.m * a.n; row++)
            for (int64_t kz = 0; kz < a.kernel[0]; kz++)
                for (int64_t ky = 0; ky < a.kernel[1]; ky++)
                    for (int64_t kx = 0; kx < a.kernel[2]; kx++, at++) {
                        const int64_t k[3] = {kz, ky, kx};
                        const double e = expected(row / a.n, row % a.n, k);
                        ASSERT_NEAR(e, double(dw[at]), tolerance<T>() * std::max(10., std::fabs(e))) << at;
                    }
    }
};

std::vector<Shape> shapes()
{
    return {
        {1, 1, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
        {2, 5, 1, {1, 14, 14}, {1, 7, 7}, {1, 1, 1}, {0, 3, 3}, {1, 1, 1}},
        {2, 2, 1, {1, 9, 40}, {1, 5, 9}, {1, 1, 1}, {0, 2, 4}, {1, 1, 1}},
        {3, 2, 3, {1, 17, 15}, {1, 3, 5}, {1, 2, 2}, {0, 1, 2}, {1, 1, 1}},
        {1, 2, 1, {1, 20, 21}, {1, 3, 3}, {1, 1, 1}, {0, 6, 6}, {1, 6, 6}},
        {2, 2, 1, {1, 19, 23}, {1, 4, 6}, {1, 3, 2}, {0, 0, 1}, {1, 2, 3}},
        {1, 2, 1, {1, 18, 18}, {1, 6, 6}, {1, 4, 6}, {0, 5, 1}, {1, 2, 2}},
        {1, 2, 1, {1, 30, 30}, {1, 2, 2}, {1, 7, 9}, {0, 1, 0}, {1, 1, 1}},
        {1, 2, 1, {1, 2, 2}, {1, 3, 3}, {1, 1, 1}, {0, 5, 5}, {1, 2, 2}},
        {2, 2, 2, {5, 6, 7}, {3, 2, 3}, {1, 2, 1}, {1, 0, 2}, {1, 1, 2}},
        {2, 3, 1, {1, 1, 33}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}},
        {2, 1, 2, {1, 150, 170}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
        {1, 1, 300, {1, 1, 20}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}},
        {1, 2, 1, {1, 2, 9000}, {1, 1, 20}, {1, 2, 3}, {0, 0, 10}, {1, 1, 400}},
        {70, 20, 1, {1, 7, 7}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
        {2, 3, 4, {1, 14, 20}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, 4},
        {2, 2, 3, {1, 15, 17}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {1, 1, 1}, 2},
        {1, 2, 5, {1, 20, 9}, {1, 5, 4}, {1, 1, 2}, {0, 2, 0}, {1, 2, 1}, 3},
        {2, 1, 3, {4, 6, 7}, {2, 3, 3}, {1, 2, 1}, {1, 0, 2}, {1, 1, 2}, 2},
        {1, 1, 40, {1, 6, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, 12},
        {1, 1, 3, {1, 6, 6}, {1, 20, 20}, {1, 1, 1}, {0, 9, 9}, {1, 1, 1}, 12},
    };
}

template <typename T> void run_all(int threads)
{
    int which = 0;
    for (const Shape &s : shapes()) {
        SCOPED_TRACE(which++);
        Problem<T> p(s);
        Context ctx(threads);
        ctx.size(subspace_depthwise_workspace_cpu(&ctx, &p.a));
        ASSERT_EQ(SUBSPACE_OK, subspace_depthwise_cpu(&ctx, &p.a)) << ctx.message;
        p.check();
    }
}

TEST_EVERY_WAY(Depthwise, MatchesTheDefinition, run_all)

TEST(Depthwise, NothingToSum)
{
    for (const Shape &s : {Shape{0, 3, 2, {1, 5, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
                           Shape{2, 0, 1, {1, 5, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
                           Shape{2, 3, 1, {1, 0, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}}}) {
        Problem<float> p(s);
        Context ctx(3);
        ctx.size(subspace_depthwise_workspace_cpu(&ctx, &p.a));
        ASSERT_EQ(SUBSPACE_OK, subspace_depthwise_cpu(&ctx, &p.a)) << ctx.message;
        for (float v : p.dw) ASSERT_EQ(0, v);
    }
}

TEST(Depthwise, HalfTypesAreWidened)
{
    // 1, 2, 3 in both half types; windows of two: dw[k] = sum_o dy[o] x[o + k] = (1 + 2 2, 2 + 2 3)
    const uint16_t bf16[3] = {0x3f80, 0x4000, 0x4040}, f16[3] = {0x3c00, 0x4000, 0x4200};
    for (const auto dtype : {SUBSPACE_BF16, SUBSPACE_F16}) {
        const uint16_t *values = dtype == SUBSPACE_BF16 ? bf16 : f16;
        float dw[2] = {0, 0};
        subspace_depthwise_args a{};
        a.dtype = dtype, a.b = a.c = a.n = a.m = 1;
        for (int i = 0; i < 3; i++) a.in[i] = a.out[i] = a.kernel[i] = a.stride[i] = a.dilation[i] = 1;
        a.in[2] = 3, a.out[2] = 2, a.kernel[2] = 2;
        a.x = values, a.dy = values, a.dweight = dw;
        Context ctx;
        ctx.size(subspace_depthwise_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_depthwise_cpu(&ctx, &a)) << ctx.message;
        EXPECT_EQ(5, dw[0]);
        EXPECT_EQ(8, dw[1]);
    }
}

TEST(Depthwise, BadArgumentsAreNamed)
{
    Problem<double> p(shapes()[1]);
    Context ctx;
    ctx.size(subspace_depthwise_workspace_cpu(&ctx, &p.a) - 1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_depthwise_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "workspace"));
    p.a.out[1] = 15;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_depthwise_cpu(&ctx, &p.a));
    EXPECT_STREQ("depthwise: dimension 1 of 14 entries has 14 windows, got dy of 15", ctx.message);
    p.a.stride[1] = 0;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_depthwise_cpu(&ctx, &p.a));
    EXPECT_STREQ("depthwise: need kernel, stride, dilation > 0 and padding >= 0, got 7, 0, 1, 3", ctx.message);
}

} // namespace
