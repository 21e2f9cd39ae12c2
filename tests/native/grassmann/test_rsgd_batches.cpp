// rsgd: frames of few rows are stepped several at a time; each as if it were alone, and beside whatever others.
#include "rsgd_cases.h"

namespace
{

constexpr subspace_retraction retractions[] = {SUBSPACE_GEODESIC, SUBSPACE_POLAR, SUBSPACE_QR, SUBSPACE_CAYLEY};

// Steps every class of `p` by itself, with its own lr if there are any; the classes that were skipped.
template <typename T> int64_t step_one_by_one(Problem<T> &p, const std::vector<double> &lr)
{
    int64_t skipped = 0;
    const int64_t size = p.k * p.n;
    for (int64_t q = 0; q < p.c; q++) {
        auto a = p.a;
        const subspace_frames f = {p.w.data() + q * size,
                                   p.g.data() + q * size,
                                   p.a.momentum == 0 ? nullptr : p.m.data() + q * size,
                                   1,
                                   p.k,
                                   p.n};
        int64_t bad = -1;
        a.frames = &f, a.skipped = &bad, a.lr = nullptr, a.lr_per_class = 0;
        if (!lr.empty()) a.lr_value = lr[q];
        Context ctx;
        ctx.size(subspace_rsgd_workspace_cpu(&ctx, &a));
        EXPECT_EQ(SUBSPACE_OK, subspace_rsgd_cpu(&ctx, &a)) << ctx.message;
        skipped += bad;
    }
    return skipped;
}

// `change` makes the problem, `lr` is one for each class or empty.
template <typename T, typename Change>
void together_as_alone(int64_t c, int64_t k, int64_t n, const std::vector<double> &lr, Change change, int threads = 1)
{
    SCOPED_TRACE("c=" + std::to_string(c) + " k=" + std::to_string(k) + " n=" + std::to_string(n) +
                 (sizeof(T) == 4 ? " float32" : " float64"));
    Problem<T> p(c, k, n);
    change(p);
    if (p.a.momentum == 0) p.f.buffer = nullptr;
    auto alone = p;
    p.f.weight = p.w.data(), p.f.grad = p.g.data(), p.f.buffer = p.f.buffer ? p.m.data() : nullptr;
    if (!lr.empty()) p.a.lr = lr.data(), p.a.lr_per_class = 1;
    p.step(threads);
    ASSERT_EQ(step_one_by_one(alone, lr), p.skipped);
    for (size_t i = 0; i < p.w.size(); i++) {
        const auto class_of = i / (k * n);
        ASSERT_NEAR(alone.w[i], p.w[i], sizeof(T) == 4 ? 2e-7 : 1e-14) << class_of;
        ASSERT_NEAR(alone.m[i], p.m[i], sizeof(T) == 4 ? 2e-7 : 1e-14) << class_of;
    }
}

TEST(RsgdBatches, EveryNumberOfClassesAndRows)
{
    for (int64_t k = 2; k <= 9; k++)
        for (const int64_t c : {2, 7, 8, 9, 21})
            for (const int64_t n : {9, 64, 75, 300}) {
                together_as_alone<float>(c, k, n, {}, [](auto &) {});
                together_as_alone<double>(c, k, n, {}, [](auto &p) { p.a.weight_decay = 0.01; });
            }
}

TEST(RsgdBatches, EveryRetractionAndRule)
{
    for (const auto retraction : retractions)
        for (const int rule : {0, 1, 2, 3})
            for (const int64_t k : {3, 4, 8}) {
                const auto change = [&](auto &p) {
                    p.a.retraction = retraction, p.a.nesterov = rule == 1, p.a.maximize = rule == 3;
                    if (rule == 2) p.a.momentum = 0;
                    if (rule == 3) p.a.weight_decay = 0.1, p.a.dampening = 0.2;
                };
                together_as_alone<float>(19, k, 40, {}, change, 2), together_as_alone<double>(19, k, 40, {}, change);
            }
}

// From a step of no length to one for the careful path: as many terms, doublings and iterations as each class needs.
TEST(RsgdBatches, StepsOfEveryLengthBesideEachOther)
{
    const std::vector<double> lr = {0.3, 0, 1e-6, 1.6, 0.01, 2.2, 1e5, 0.1, 0.7, 3, 1e-3, 0, 1, 0.5, 1e-9, 2, 0.2};
    for (const auto retraction : retractions)
        for (const int64_t k : {2, 4, 6, 8}) {
            const auto change = [&](auto &p) { p.a.retraction = retraction; };
            together_as_alone<float>(17, k, 33, lr, change), together_as_alone<double>(17, k, 33, lr, change);
        }
}

TEST(RsgdBatches, BadClassesAmongGoodOnes)
{
    for (const auto retraction : retractions)
        for (const int64_t k : {2, 5, 8}) {
            const int64_t size = k * 30;
            const auto change = [&](auto &p) {
                p.a.retraction = retraction;
                for (int64_t i = 0; i < size; i++) p.w[3 * size + i] *= 1.3f, p.w[10 * size + i] *= 1.001f;
                p.g[5 * size + 7] = NAN, p.g[12 * size + size - 1] = INFINITY;
            };
            together_as_alone<float>(18, k, 30, {}, change), together_as_alone<double>(18, k, 30, {}, change);
            Problem<float> p(18, k, 30);
            change(p);
            const auto w = p.w, m = p.m;
            p.step();
            EXPECT_EQ(2, p.skipped);
            for (const int64_t q : {5, 12})
                for (int64_t i = q * size; i < (q + 1) * size; i++) {
                    ASSERT_EQ(w[i], p.w[i]);
                    ASSERT_EQ(m[i], p.m[i]);
                }
        }
}

TEST(RsgdBatches, RaggedClassesShareOne)
{
    const std::vector<int64_t> start = {0, 3, 5, 13, 17, 24, 26, 34, 35, 40, 42, 59, 62, 70, 74, 80, 82, 87, 95, 98};
    const int64_t n = 40, rows = start.back(), c = int64_t(start.size()) - 1;
    for (const auto retraction : retractions) {
        auto w = frames<double>(start, n);
        auto g = randoms<double>(rows * n, 7), m = randoms<double>(rows * n, 8);
        for (auto *v : {&g, &m})
            for (auto &x : *v) x /= std::sqrt(double(8 * n));
        auto w1 = w, m1 = m;
        int64_t skipped = -1;
        const subspace_frames f = {w.data(), g.data(), m.data(), c, 17, n};
        subspace_rsgd_args a{};
        a.dtype = SUBSPACE_F64, a.count = 1, a.frames = &f, a.start = start.data(), a.skipped = &skipped;
        a.lr_value = 0.3, a.momentum = 0.7, a.retraction = retraction;
        Context ctx;
        ctx.size(subspace_rsgd_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_rsgd_cpu(&ctx, &a)) << ctx.message;
        a.start = nullptr;
        for (int64_t q = 0; q < c; q++) {
            const int64_t at = start[q] * n;
            const subspace_frames one = {&w1[at], &g[at], &m1[at], 1, start[q + 1] - start[q], n};
            a.frames = &one;
            ctx.size(subspace_rsgd_workspace_cpu(&ctx, &a));
            ASSERT_EQ(SUBSPACE_OK, subspace_rsgd_cpu(&ctx, &a)) << ctx.message;
        }
        for (size_t i = 0; i < w.size(); i++) {
            ASSERT_NEAR(w1[i], w[i], 1e-14) << retraction;
            ASSERT_NEAR(m1[i], m[i], 1e-14) << retraction;
        }
    }
}

} // namespace
