// logits: forward and backward against the definition, in memory no larger than promised.
#include "native.h"

namespace
{

struct Shape {
    int64_t b, n;
    std::vector<int64_t> start;
    bool ragged;
};

template <typename T> struct Problem {
    int64_t b, c, n, rows;
    std::vector<int64_t> start;
    std::vector<T> x, w, y, g, dx, dw, proj;
    subspace_logits_args a{};

    Problem(const Shape &s, bool normalize)
        : b(s.b), c(static_cast<int64_t>(s.start.size()) - 1), n(s.n), rows(s.start.back()), start(s.start),
          x(randoms<T>(b * n)), w(frames<T>(s.start, n)), y(b * c), g(randoms<T>(b * c, 3)), dx(b * n), dw(rows * n),
          proj(rows * b)
    {
        a.dtype = dtype_of<T>;
        a.b = b, a.c = c, a.n = n, a.rows = rows, a.k = s.ragged ? 0 : (c ? start[1] : 1);
        a.start = s.ragged ? start.data() : nullptr;
        a.gamma = 5, a.normalize = normalize;
        a.x = x.data(), a.weight = w.data(), a.logits = y.data(), a.dlogits = g.data();
        a.dx = dx.data(), a.dweight = dw.data();
    }

    double length(int64_t i) const
    {
        double sum = 0;
        for (int64_t j = 0; j < n; j++) sum += double(x[i * n + j]) * double(x[i * n + j]);
        return a.normalize ? std::max(std::sqrt(sum), 1e-12) : 1;
    }

    void check(double tolerance = ::tolerance<T>()) const
    {
        std::vector<double> edx(b * n), edw(rows * n);
        double top = 1, topx = 1e-3, topw = 1e-3;
        for (int64_t i = 0; i < b; i++) {
            const double r = 1 / length(i);
            for (int64_t q = 0; q < c; q++) {
                std::vector<double> z;
                double sum = 0;
                for (int64_t row = start[q]; row < start[q + 1]; row++) {
                    double dot = 0;
                    for (int64_t j = 0; j < n; j++) dot += double(w[row * n + j]) * double(x[i * n + j]) * r;
                    z.push_back(dot), sum += dot * dot;
                }
                const double norm = std::sqrt(sum);
                ASSERT_NEAR(a.gamma * norm, double(y[i * c + q]), tolerance * std::max(top, a.gamma * norm));
                for (int64_t row = start[q]; row < start[q + 1]; row++) {
                    const double dz = a.gamma * double(g[i * c + q]) * z[row - start[q]] / norm;
                    for (int64_t j = 0; j < n; j++) {
                        edw[row * n + j] += dz * double(x[i * n + j]) * r;
                        edx[i * n + j] += dz * double(w[row * n + j]);
                    }
                }
            }
            double dot = 0;
            for (int64_t j = 0; j < n; j++) dot += edx[i * n + j] * double(x[i * n + j]) * r;
            for (int64_t j = 0; j < n; j++)
                if (a.normalize) edx[i * n + j] = (edx[i * n + j] - dot * double(x[i * n + j]) * r) * r;
        }
        for (double v : edx) topx = std::max(topx, std::fabs(v));
        for (double v : edw) topw = std::max(topw, std::fabs(v));
        for (size_t i = 0; i < edx.size(); i++) ASSERT_NEAR(edx[i], double(dx[i]), tolerance * topx) << i;
        for (size_t i = 0; i < edw.size(); i++) ASSERT_NEAR(edw[i], double(dw[i]), tolerance * topw) << i;
    }
};

std::vector<Shape> shapes()
{
    return {{1, 1, uniform(1, 1), false},        {3, 7, uniform(5, 2), false},    {70, 40, uniform(30, 8), false},
            {270, 9, uniform(9, 3), false},      {2, 16, uniform(600, 1), false}, {4, 70, uniform(3, 64), false},
            {5, 20, {0, 1, 4, 5, 11, 13}, true}, {33, 12, {0, 12, 13}, true}};
}

template <typename T> void run_all(int threads)
{
    for (const Shape &s : shapes())
        for (const bool normalize : {true, false})
            for (const bool keep : {true, false}) {
                SCOPED_TRACE("b=" + std::to_string(s.b) + " n=" + std::to_string(s.n) +
                             " rows=" + std::to_string(s.start.back()) + (keep ? " kept" : " recomputed"));
                Problem<T> p(s, normalize);
                if (keep) p.a.proj = p.proj.data();
                Context ctx(threads);
                ctx.size(subspace_logits_workspace_cpu(&ctx, &p.a));
                ASSERT_EQ(SUBSPACE_OK, subspace_logits_cpu(&ctx, &p.a)) << ctx.message;
                ASSERT_EQ(SUBSPACE_OK, subspace_logits_backward_cpu(&ctx, &p.a)) << ctx.message;
                p.check();
            }
}

TEST_EVERY_WAY(Logits, MatchesTheDefinition, run_all)

// A float's upper half, and what a bfloat16 stands for.
uint16_t narrow(float x)
{
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float widen(uint16_t h)
{
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

std::vector<uint16_t> narrowed(std::vector<float> &v)
{
    std::vector<uint16_t> out;
    for (float &x : v) out.push_back(narrow(x)), x = widen(out.back());
    return out;
}

void widen_into(const std::vector<uint16_t> &from, std::vector<float> &to)
{
    std::transform(from.begin(), from.end(), to.begin(), widen);
}

// Where the processor multiplies them itself, bfloat16 has kernels of its own: pairs, so odd sizes are what can go
// wrong.
void run_bfloat16(int threads)
{
    std::vector<Shape> all = shapes();
    all.push_back({97, 51, uniform(111, 5), false}), all.push_back({1, 3, {0, 1, 4}, true});
    all.push_back({70, 1101, uniform(9, 7), false}); // two rows of tiles and a rest, three blocks of pairs and a rest
    for (const Shape &s : all)
        for (const bool normalize : {true, false})
            for (const bool keep : {true, false}) {
                SCOPED_TRACE("b=" + std::to_string(s.b) + " n=" + std::to_string(s.n) +
                             " rows=" + std::to_string(s.start.back()) + (keep ? " kept" : " recomputed"));
                Problem<float> p(s, normalize);
                const std::vector<uint16_t> x = narrowed(p.x), w = narrowed(p.w), g = narrowed(p.g);
                std::vector<uint16_t> y(p.y.size()), dx(p.dx.size()), dw(p.dw.size());
                p.a.dtype = SUBSPACE_BF16, p.a.x = x.data(), p.a.weight = w.data(), p.a.dlogits = g.data();
                p.a.logits = y.data(), p.a.dx = dx.data(), p.a.dweight = dw.data();
                if (keep) p.a.proj = p.proj.data();
                Context ctx(threads);
                ctx.size(subspace_logits_workspace_cpu(&ctx, &p.a));
                ASSERT_EQ(SUBSPACE_OK, subspace_logits_cpu(&ctx, &p.a)) << ctx.message;
                ASSERT_EQ(SUBSPACE_OK, subspace_logits_backward_cpu(&ctx, &p.a)) << ctx.message;
                widen_into(y, p.y), widen_into(dx, p.dx), widen_into(dw, p.dw);
                p.check(1.6e-2); // as in tests/grassmann/test_logits.py
            }
}

TEST(Logits, Bfloat16MatchesTheDefinition)
{
    run_bfloat16(1);
}

TEST(Logits, Bfloat16MatchesTheDefinitionOnThreeThreads)
{
    run_bfloat16(3);
}

// Float32 as two parts of bfloat16, where the processor multiplies tiles; elsewhere nothing is split.
struct Split {
    Split()
    {
        subspace_cpu_split(true);
    }
    ~Split()
    {
        subspace_cpu_split(false);
    }
};

TEST(Logits, SplitFloatsMatchTheDefinition)
{
    const Split split;
    std::vector<Shape> all = shapes();
    all.push_back({70, 1101, uniform(9, 7), false}), all.push_back({33, 40, uniform(40, 3), true});
    all.push_back({275, 49, uniform(7, 5), false}); // two blocks of the batch
    for (const Shape &s : all)
        for (const bool normalize : {true, false})
            for (const int threads : {1, 3}) {
                SCOPED_TRACE("b=" + std::to_string(s.b) + " n=" + std::to_string(s.n));
                Problem<float> p(s, normalize);
                if (threads == 3) p.a.proj = p.proj.data();
                Context ctx(threads);
                ctx.size(subspace_logits_workspace_cpu(&ctx, &p.a));
                ASSERT_EQ(SUBSPACE_OK, subspace_logits_cpu(&ctx, &p.a)) << ctx.message;
                ASSERT_EQ(SUBSPACE_OK, subspace_logits_backward_cpu(&ctx, &p.a)) << ctx.message;
                p.check(1e-4);
            }
}

TEST(Logits, SkipsWhatIsNotAskedFor)
{
    Problem<double> p({8, 12, uniform(5, 3), false}, true);
    p.a.dx = nullptr;
    Context ctx;
    ctx.size(subspace_logits_workspace_cpu(&ctx, &p.a));
    ASSERT_EQ(SUBSPACE_OK, subspace_logits_backward_cpu(&ctx, &p.a));
    for (double v : p.dx) ASSERT_EQ(0, v);
}

TEST(Logits, NothingToDo)
{
    for (const Shape &s : {Shape{0, 5, uniform(3, 2), false}, Shape{4, 5, uniform(0, 1), false}}) {
        Problem<float> p(s, true);
        Context ctx(3);
        p.dw.assign(p.dw.size(), 1), p.dx.assign(p.dx.size(), 1);
        ctx.size(subspace_logits_workspace_cpu(&ctx, &p.a));
        ASSERT_EQ(SUBSPACE_OK, subspace_logits_cpu(&ctx, &p.a));
        ASSERT_EQ(SUBSPACE_OK, subspace_logits_backward_cpu(&ctx, &p.a));
        for (float v : p.dx) ASSERT_EQ(0, v);
        for (float v : p.dw) ASSERT_EQ(0, v);
    }
}

TEST(Logits, HalfTypesAreWidened)
{
    // bfloat16 is the upper half of a float32: 1, 2 and 3 are exact, and so is the projection onto an axis.
    const uint16_t x[4] = {0x3f80, 0x4000, 0x4040, 0}, w[4] = {0, 0x3f80, 0, 0}, g[1] = {0x3f80};
    uint16_t y[1], dx[4], dw[4];
    subspace_logits_args a{};
    a.dtype = SUBSPACE_BF16, a.b = 1, a.c = 1, a.k = 1, a.n = 4, a.rows = 1, a.gamma = 1;
    a.x = x, a.weight = w, a.logits = y, a.dlogits = g, a.dx = dx, a.dweight = dw;
    Context ctx;
    ctx.size(subspace_logits_workspace_cpu(&ctx, &a));
    ASSERT_EQ(SUBSPACE_OK, subspace_logits_cpu(&ctx, &a));
    ASSERT_EQ(SUBSPACE_OK, subspace_logits_backward_cpu(&ctx, &a));
    EXPECT_EQ(0x4000, y[0]);
    for (int i = 0; i < 4; i++) {
        EXPECT_EQ(x[i], dw[i]);
        EXPECT_EQ(w[i], dx[i]);
    }
}

TEST(Logits, BadArgumentsAreNamed)
{
    Problem<double> p({2, 3, uniform(2, 2), false}, true);
    Context ctx;
    ctx.size(1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_logits_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "workspace"));
    p.a.k = 5, p.a.rows = 10;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_logits_cpu(&ctx, &p.a));
    EXPECT_STREQ("logits: need 0 < k <= n, got k=5, n=3", ctx.message);
}

} // namespace
