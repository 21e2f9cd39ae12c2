// rsgd: the facts of a step - frames stay frames, travel as far as asked, and never spoil a neighbour.
#include "rsgd_cases.h"

namespace
{

template <typename T> void frames_stay_frames(double bound, int threads)
{
    for (const auto &[k, n] : std::vector<std::pair<int64_t, int64_t>>{{1, 1},
                                                                       {1, 9},
                                                                       {2, 2},
                                                                       {3, 50},
                                                                       {4, 64},
                                                                       {5, 513},
                                                                       {8, 8},
                                                                       {8, 1000},
                                                                       {16, 40},
                                                                       {17, 60},
                                                                       {33, 100},
                                                                       {64, 64}})
        for (const auto retraction : {SUBSPACE_GEODESIC, SUBSPACE_POLAR, SUBSPACE_QR, SUBSPACE_CAYLEY})
            for (const double lr : {0., 0.1, 3., 1e5}) {
                SCOPED_TRACE("k=" + std::to_string(k) + " n=" + std::to_string(n) + " lr=" + std::to_string(lr) +
                             " retraction=" + std::to_string(retraction));
                Problem<T> p(3, k, n);
                p.a.retraction = retraction, p.a.lr_value = lr;
                p.step(threads);
                ASSERT_EQ(0, p.skipped);
                ASSERT_LT(p.frame_error(), bound);
            }
}

TEST(Rsgd, FramesStayFramesInFloat64)
{
    frames_stay_frames<double>(1e-12, 1);
}
TEST(Rsgd, FramesStayFramesInFloat32)
{
    frames_stay_frames<float>(1e-6, 1);
}
TEST(Rsgd, FramesStayFramesOnThreeThreads)
{
    frames_stay_frames<float>(1e-6, 3);
}

TEST(Rsgd, OneDirectionTurnsByItsLength)
{
    for (const bool parallel : {false, true})
        for (const bool nesterov : {false, true}) {
            Problem<double> p(1, 1, 4, 0.5);
            p.w = {1, 0, 0, 0}, p.g = {7, 2, 0, 0}, p.m = {0, 0, 0, 0};
            p.a.lr_value = 0.1, p.a.parallel = parallel, p.a.nesterov = nesterov;
            p.step();
            const double angle = 0.1 * (nesterov ? 3 : 2); // g + momentum buf
            EXPECT_NEAR(std::cos(angle), p.w[0], 1e-15);
            EXPECT_NEAR(-std::sin(angle), p.w[1], 1e-15);
            EXPECT_NEAR(parallel ? 2 * std::sin(angle) : 7, p.m[0], 1e-14);
            EXPECT_NEAR(parallel ? 2 * std::cos(angle) : 2, p.m[1], 1e-14);
        }
}

TEST(Rsgd, ManyParametersAreTheSameAsOneByOne)
{
    Problem<float> p(5, 8, 100), q(3, 2, 30);
    auto p2 = p;
    auto q2 = q;
    p2.f.weight = p2.w.data(), p2.f.grad = p2.g.data(), p2.f.buffer = p2.m.data(), p2.a.frames = &p2.f;
    q2.f.weight = q2.w.data(), q2.f.grad = q2.g.data(), q2.f.buffer = q2.m.data(), q2.a.frames = &q2.f;
    p2.a.skipped = &p2.skipped, q2.a.skipped = &q2.skipped;
    p2.step(), q2.step();
    const subspace_frames both[] = {p.f, q.f};
    p.a.frames = both, p.a.count = 2;
    p.step(3);
    for (size_t i = 0; i < p.w.size(); i++) ASSERT_NEAR(p.w[i], p2.w[i], 1e-7);
    for (size_t i = 0; i < q.w.size(); i++) ASSERT_NEAR(q.w[i], q2.w[i], 1e-7);
}

TEST(Rsgd, RaggedClassesAndAStepForEach)
{
    const std::vector<int64_t> start = {0, 3, 4, 12, 14};
    const int64_t n = 20;
    auto w = frames<double>(start, n);
    const auto before = w;
    const auto g = randoms<double>(14 * n, 7);
    const double lr[4] = {0.1, 0, 0.2, 0.3};
    int64_t skipped;
    const subspace_frames f = {w.data(), g.data(), nullptr, 4, 8, n};
    subspace_rsgd_args a{};
    a.dtype = SUBSPACE_F64, a.count = 1, a.frames = &f, a.start = start.data(), a.skipped = &skipped;
    a.lr = lr, a.lr_per_class = 1;
    Context ctx(3);
    ctx.size(subspace_rsgd_workspace_cpu(&ctx, &a));
    ASSERT_EQ(SUBSPACE_OK, subspace_rsgd_cpu(&ctx, &a)) << ctx.message;
    for (int64_t q = 0; q < 4; q++) {
        double moved = 0;
        for (int64_t i = start[q]; i < start[q + 1]; i++) {
            for (int64_t l = 0; l < n; l++) moved = std::max(moved, std::fabs(w[i * n + l] - before[i * n + l]));
            for (int64_t j = start[q]; j <= i; j++) {
                double dot = 0;
                for (int64_t l = 0; l < n; l++) dot += w[i * n + l] * w[j * n + l];
                ASSERT_NEAR(i == j, dot, 1e-13);
            }
        }
        EXPECT_EQ(lr[q] > 0, moved > 1e-3) << q;
    }
}

TEST(Rsgd, ARottenClassSpoilsNoOther)
{
    for (const float rotten : {NAN, INFINITY}) {
        Problem<float> p(4, 3, 20), clean(4, 3, 20);
        p.g[1 * 60 + 7] = rotten;
        const auto w = p.w, m = p.m;
        p.step(), clean.step();
        EXPECT_EQ(1, p.skipped);
        for (size_t i = 0; i < w.size(); i++) {
            const bool hit = i / 60 == 1;
            ASSERT_EQ(hit ? w[i] : clean.w[i], p.w[i]);
            ASSERT_EQ(hit ? m[i] : clean.m[i], p.m[i]);
        }
    }
}

TEST(Rsgd, ParametersOfAllShapesInOneCall)
{
    std::vector<Problem<float>> alone, together;
    for (int i = 0; i < 60; i++) {
        const int64_t k = i % 7 == 6 ? 20 : 1 + i % 9, n = i % 11 == 10 ? 3000 : 20 + 3 * i;
        alone.emplace_back(1 + i % 3, k, n);
    }
    together = alone;
    std::vector<subspace_frames> all;
    for (size_t i = 0; i < alone.size(); i++) {
        auto &p = alone[i], &q = together[i];
        p.f = {p.w.data(), p.g.data(), p.m.data(), p.c, p.k, p.n}, p.a.frames = &p.f, p.a.skipped = &p.skipped;
        p.step();
        all.push_back({q.w.data(), q.g.data(), q.m.data(), q.c, q.k, q.n});
    }
    auto a = together[0].a;
    int64_t skipped = -1;
    a.frames = all.data(), a.count = static_cast<int64_t>(all.size()), a.skipped = &skipped;
    Context ctx(3);
    ctx.size(subspace_rsgd_workspace_cpu(&ctx, &a));
    ASSERT_EQ(SUBSPACE_OK, subspace_rsgd_cpu(&ctx, &a)) << ctx.message;
    EXPECT_EQ(0, skipped);
    for (size_t i = 0; i < alone.size(); i++)
        for (size_t j = 0; j < alone[i].w.size(); j++) {
            ASSERT_NEAR(alone[i].w[j], together[i].w[j], 2e-7) << i;
            ASSERT_NEAR(alone[i].m[j], together[i].m[j], 2e-7) << i;
        }
}

TEST(Rsgd, LongRowsOfARottenClassStayAsTheyAre)
{
    for (const auto &[k, n] : std::vector<std::pair<int64_t, int64_t>>{{8, 2048}, {3, 9001}, {20, 600}})
        for (const bool at_the_end : {false, true}) {
            Problem<float> p(3, k, n), clean(3, k, n);
            p.g[k * n + (at_the_end ? k * n - 1 : 0)] = NAN;
            const auto w = p.w, m = p.m;
            p.step(), clean.step();
            EXPECT_EQ(1, p.skipped);
            for (int64_t i = 0; i < 3 * k * n; i++) {
                const bool hit = i / (k * n) == 1;
                ASSERT_EQ(hit ? w[i] : clean.w[i], p.w[i]);
                ASSERT_EQ(hit ? m[i] : clean.m[i], p.m[i]);
            }
        }
}

TEST(Rsgd, LongRowsGoFarAndComeBackFromDrift)
{
    for (const double drift : {0., 0.5})
        for (const bool parallel : {false, true}) {
            Problem<float> p(2, 8, 2048);
            for (size_t i = 0; i < p.w.size(); i++) p.w[i] += float(drift) * p.g[i];
            p.a.lr_value = drift != 0 ? 0.1 : 500, p.a.parallel = parallel, p.a.nesterov = parallel;
            p.step();
            EXPECT_EQ(0, p.skipped);
            EXPECT_LT(p.frame_error(), 1e-6);
        }
}

// Checkpoint code takes such a step while it loads. Frames near and far from orthonormal, each way to step.
TEST(Rsgd, AStepOfNoLengthLeavesEveryBit)
{
    for (const float off : {1.0f, 1.001f, 1.3f})
        for (const int64_t k : {1, 3, 8, 20})
            for (const bool parallel : {false, true}) {
                Problem<float> p(4, k, 100);
                for (auto &v : p.w) v *= off;
                p.a.lr_value = 0, p.a.parallel = parallel;
                const auto w = p.w, m = p.m;
                p.step();
                EXPECT_EQ(w, p.w) << "k " << k << " off " << off << " parallel " << parallel;
                EXPECT_EQ(0, p.skipped);
                for (size_t i = 0; i < m.size() && !parallel; i++) EXPECT_NEAR(0.9f * m[i] + p.g[i], p.m[i], 1e-6f);
            }
}

TEST(Rsgd, BadArgumentsAreNamed)
{
    Problem<float> p(2, 3, 20);
    p.f.buffer = nullptr;
    Context ctx;
    ctx.size(1 << 20);
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_rsgd_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "momentum 0.9 needs a buffer"));
    p.f.buffer = p.m.data(), p.f.k = 30;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_rsgd_cpu(&ctx, &p.a));
    p.f.k = 3, p.a.dtype = SUBSPACE_F16;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_rsgd_cpu(&ctx, &p.a));
    Problem<float> large(2, 17, 20); // for which every device's kernel needs one
    ctx.size(8);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_rsgd_cpu(&ctx, &large.a));
}

} // namespace
