// cross_entropy: against the logits op and the definition of the loss, for labels and soft targets.
#include "native.h"

namespace
{

template <typename T> struct Problem {
    int64_t b, c, n, rows;
    std::vector<int64_t> start, label;
    std::vector<T> x, w, soft, loss, stats, dloss, dx, dw;
    std::vector<double> weight;
    subspace_cross_entropy_args a{};

    Problem(int64_t b_, int64_t n_, std::vector<int64_t> start_, bool use_soft, double smoothing)
        : b(b_), c(static_cast<int64_t>(start_.size()) - 1), n(n_), rows(start_.back()), start(start_),
          x(randoms<T>(b * n)), w(frames<T>(start, n)), soft(b * c), loss(b), stats(2 * b), dloss(randoms<T>(b, 4)),
          dx(b * n), dw(rows * n)
    {
        for (int64_t i = 0; i < b; i++) {
            label.push_back(i % 5 == 4 ? -100 : (i * 7) % c);
            for (int64_t q = 0; q < c; q++) soft[i * c + q] = T(1 + (i + q) % 3) / T(2 * c);
        }
        for (int64_t q = 0; q < c; q++) weight.push_back(0.5 + double(q % 4));
        a.f.dtype = dtype_of<T>;
        a.f.b = b, a.f.c = c, a.f.n = n, a.f.rows = rows, a.f.start = start.data();
        a.f.gamma = 5, a.f.normalize = 1;
        a.f.x = x.data(), a.f.weight = w.data(), a.f.dx = dx.data(), a.f.dweight = dw.data();
        a.label = use_soft ? nullptr : label.data(), a.soft = use_soft ? soft.data() : nullptr;
        a.class_weight = weight.data(), a.ignore_index = -100, a.label_smoothing = smoothing;
        a.loss = loss.data(), a.stats = stats.data(), a.dloss = dloss.data();
    }

    // loss and the gradient of the logits from the definition, then the logits op's own backward
    void check(Context &ctx)
    {
        std::vector<T> y(b * c), dy(b * c), ddx(b * n), ddw(rows * n);
        subspace_logits_args f = a.f;
        f.logits = y.data(), f.dlogits = dy.data(), f.dx = ddx.data(), f.dweight = ddw.data();
        ctx.size(subspace_logits_workspace_cpu(&ctx, &f));
        ASSERT_EQ(SUBSPACE_OK, subspace_logits_cpu(&ctx, &f));
        for (int64_t i = 0; i < b; i++) {
            double most = -1e300, sum = 0, expected = 0, mass = 0;
            std::vector<double> tau(c);
            for (int64_t q = 0; q < c; q++) most = std::max(most, double(y[i * c + q]));
            for (int64_t q = 0; q < c; q++) sum += std::exp(double(y[i * c + q]) - most);
            const bool ignored = a.label && label[i] < 0;
            for (int64_t q = 0; q < c && !ignored; q++) {
                const double t = a.label ? double(label[i] == q) : double(soft[i * c + q]);
                tau[q] = weight[q] * ((1 - a.label_smoothing) * t + a.label_smoothing / double(c));
                expected += tau[q] * (most + std::log(sum) - double(y[i * c + q]));
                mass += tau[q];
            }
            ASSERT_NEAR(expected, double(loss[i]), tolerance<T>() * std::max(1., std::fabs(expected)));
            for (int64_t q = 0; q < c; q++)
                dy[i * c + q] = T(double(dloss[i]) * (mass * std::exp(double(y[i * c + q]) - most) / sum - tau[q]));
        }
        ASSERT_EQ(SUBSPACE_OK, subspace_logits_backward_cpu(&ctx, &f));
        double topx = 1e-3, topw = 1e-3;
        for (T v : ddx) topx = std::max(topx, std::fabs(double(v)));
        for (T v : ddw) topw = std::max(topw, std::fabs(double(v)));
        for (size_t i = 0; i < dx.size(); i++) ASSERT_NEAR(double(ddx[i]), double(dx[i]), tolerance<T>() * topx) << i;
        for (size_t i = 0; i < dw.size(); i++) ASSERT_NEAR(double(ddw[i]), double(dw[i]), tolerance<T>() * topw) << i;
    }
};

template <typename T> void run_all(int threads)
{
    const std::vector<std::vector<int64_t>> starts = {
        uniform(2, 1), uniform(100, 3), uniform(600, 1), {0, 1, 4, 5, 11}};
    for (const auto &start : starts)
        for (const int64_t b : {1, 20, 300})
            for (const bool soft : {false, true})
                for (const double smoothing : {0.0, 0.2}) {
                    SCOPED_TRACE("rows=" + std::to_string(start.back()) + " b=" + std::to_string(b));
                    Problem<T> p(b, 11, start, soft, smoothing);
                    Context ctx(threads);
                    ctx.size(subspace_cross_entropy_workspace_cpu(&ctx, &p.a));
                    ASSERT_EQ(SUBSPACE_OK, subspace_cross_entropy_cpu(&ctx, &p.a)) << ctx.message;
                    ASSERT_EQ(SUBSPACE_OK, subspace_cross_entropy_backward_cpu(&ctx, &p.a)) << ctx.message;
                    p.check(ctx);
                }
}

TEST_EVERY_WAY(CrossEntropy, MatchesTheDefinition, run_all)

// Classes in two places: each has the shares of its own, and with lse and sum tau of all the gradient of the whole.
template <typename T> void run_parts(int threads)
{
    const int64_t c = 100, cut = 37, b = 50;
    Problem<T> all(b, 11, uniform(c, 3), false, 0.2);
    Context ctx(threads);
    ctx.size(subspace_cross_entropy_workspace_cpu(&ctx, &all.a));
    ASSERT_EQ(SUBSPACE_OK, subspace_cross_entropy_cpu(&ctx, &all.a)) << ctx.message;
    ASSERT_EQ(SUBSPACE_OK, subspace_cross_entropy_backward_cpu(&ctx, &all.a)) << ctx.message;

    std::vector<T> loss(b), stats(2 * b), dx(b * all.n), dw(all.rows * all.n), sum_dx(b * all.n);
    std::vector<double> sum(b), mass(b), lses(2 * b), losses(2 * b), masses(2 * b);
    for (int pass = 0; pass < 2; pass++)
        for (int part = 0; part < 2; part++) {
            const int64_t first = part ? cut : 0, own = part ? c - cut : cut;
            std::vector<int64_t> label = all.label;
            for (auto &l : label)
                if (l >= 0) l = l >= first && l < first + own ? l - first : own;
            subspace_cross_entropy_args a = all.a;
            a.f.c = own, a.f.rows = 3 * own, a.f.start = nullptr, a.f.k = 3, a.classes = c;
            a.f.weight = all.w.data() + 3 * first * all.n, a.f.dweight = dw.data() + 3 * first * all.n;
            a.class_weight = all.weight.data() + first, a.label = label.data();
            a.loss = loss.data(), a.stats = stats.data(), a.f.dx = dx.data();
            ctx.size(subspace_cross_entropy_workspace_cpu(&ctx, &a));
            if (pass == 0) {
                ASSERT_EQ(SUBSPACE_OK, subspace_cross_entropy_cpu(&ctx, &a)) << ctx.message;
                for (int64_t i = 0; i < b; i++) {
                    lses[part * b + i] = double(stats[i]), masses[part * b + i] = double(stats[b + i]);
                    losses[part * b + i] = double(loss[i]), sum[i] += std::exp(double(stats[i]));
                    mass[i] += double(stats[b + i]);
                }
            } else {
                for (int64_t i = 0; i < b; i++) stats[i] = T(std::log(sum[i])), stats[b + i] = T(mass[i]);
                ASSERT_EQ(SUBSPACE_OK, subspace_cross_entropy_backward_cpu(&ctx, &a)) << ctx.message;
                for (size_t i = 0; i < dx.size(); i++) sum_dx[i] += dx[i];
            }
        }
    for (int64_t i = 0; i < b; i++) {
        double whole = 0;
        for (int part = 0; part < 2; part++)
            whole += losses[part * b + i] + (std::log(sum[i]) - lses[part * b + i]) * masses[part * b + i];
        ASSERT_NEAR(double(all.loss[i]), whole, 10 * tolerance<T>());
    }
    for (size_t i = 0; i < dx.size(); i++) ASSERT_NEAR(double(all.dx[i]), double(sum_dx[i]), 10 * tolerance<T>());
    for (size_t i = 0; i < dw.size(); i++) ASSERT_NEAR(double(all.dw[i]), double(dw[i]), 10 * tolerance<T>());

    all.a.classes = 99;
    ASSERT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_cross_entropy_cpu(&ctx, &all.a));
    ASSERT_STREQ("cross_entropy: 99 classes in all, 100 of them here", ctx.message);
}

TEST_EVERY_WAY(CrossEntropy, PartsAreThoseOfTheWhole, run_parts)

TEST(CrossEntropy, WorkspaceDoesNotGrowWithTheLogits)
{
    Problem<float> small(4096, 2, uniform(1000, 4), false, 0);
    Problem<float> large(4096, 2, uniform(16000, 4), false, 0);
    Context ctx;
    EXPECT_LT(subspace_cross_entropy_workspace_cpu(&ctx, &large.a),
              subspace_cross_entropy_workspace_cpu(&ctx, &small.a) * 3);
}

TEST(CrossEntropy, WrongLabelsAreNamed)
{
    Problem<double> p(3, 8, uniform(4, 2), false, 0);
    p.label[2] = 4;
    Context ctx;
    ctx.size(subspace_cross_entropy_workspace_cpu(&ctx, &p.a));
    if (looks_at_values()) {
        EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_cross_entropy_cpu(&ctx, &p.a));
        EXPECT_STREQ("cross_entropy: target 4 of row 2 is not in [0, 4)", ctx.message);
    } else {
        EXPECT_EQ(SUBSPACE_OK, subspace_cross_entropy_cpu(&ctx, &p.a));
        EXPECT_TRUE(std::isnan(p.loss[2]) && !std::isnan(p.loss[0]));
    }
    p.label[2] = 0, p.a.label_smoothing = 2;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_cross_entropy_cpu(&ctx, &p.a));
}

} // namespace
