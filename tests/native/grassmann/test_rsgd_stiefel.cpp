// rsgd on the Stiefel manifold: the plain formulas of a step, with n x n matrices, and its facts.
#include "rsgd_cases.h"

namespace
{

using Matrix = std::vector<double>;

// a (m x l) times b (l x n)
Matrix times(const Matrix &a, const Matrix &b, int64_t m, int64_t l, int64_t n)
{
    Matrix out(m * n);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < l; j++)
            for (int64_t c = 0; c < n; c++) out[i * n + c] += a[i * l + j] * b[j * n + c];
    return out;
}

Matrix transposed(const Matrix &a, int64_t m, int64_t n)
{
    Matrix out(m * n);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) out[j * m + i] = a[i * n + j];
    return out;
}

Matrix sum(double a, const Matrix &x, double b, const Matrix &y)
{
    Matrix out(x.size());
    for (size_t i = 0; i < x.size(); i++) out[i] = a * x[i] + b * y[i];
    return out;
}

struct Stiefel {
    int64_t k, n;

    Matrix tangent(const Matrix &x, const Matrix &w) const
    {
        const Matrix inner = times(x, transposed(w, k, n), k, n, k);
        return sum(1, x, -0.5, times(sum(1, inner, 1, transposed(inner, k, k)), w, k, k, n));
    }

    // The skew n x n matrix Z with Z W' = T'
    Matrix turning(const Matrix &w, const Matrix &t) const
    {
        const Matrix wt = transposed(w, k, n), tw = times(transposed(t, k, n), w, n, k, n);
        const Matrix b = times(t, wt, k, n, k), middle = times(times(wt, b, n, k, k), w, n, k, n);
        return sum(1, sum(1, tw, -1, transposed(tw, n, n)), 1, middle);
    }

    Matrix moved(subspace_retraction kind, const Matrix &w, const Matrix &t) const
    {
        const Matrix z = turning(w, t), wt = transposed(w, k, n);
        if (kind == SUBSPACE_GEODESIC) { // exp(Z) W'
            Matrix term = wt, all = wt;
            for (int j = 1; j < 40; j++)
                term = sum(1. / j, times(z, term, n, n, k), 0, term), all = sum(1, all, 1, term);
            return transposed(all, n, k);
        }
        if (kind == SUBSPACE_CAYLEY) { // (I - Z/2)^-1 (I + Z/2) W', the inverse as a series
            Matrix term = sum(1, wt, 0.5, times(z, wt, n, n, k)), all = term;
            for (int j = 1; j < 120; j++) term = sum(0.5, times(z, term, n, n, k), 0, term), all = sum(1, all, 1, term);
            return transposed(all, n, k);
        }
        Matrix y = sum(1, w, 1, t);
        if (kind == SUBSPACE_POLAR) { // Newton-Schulz, from a matrix of singular values below the root of 3
            for (int j = 0; j < 60; j++)
                y = sum(1.5, y, -0.5, times(times(y, transposed(y, k, n), k, n, k), y, k, k, n));
            return y;
        }
        for (int64_t i = 0; i < k; i++) { // Gram and Schmidt
            for (int pass = 0; pass < 2; pass++)
                for (int64_t j = 0; j < i; j++) {
                    double dot = 0;
                    for (int64_t c = 0; c < n; c++) dot += y[i * n + c] * y[j * n + c];
                    for (int64_t c = 0; c < n; c++) y[i * n + c] -= dot * y[j * n + c];
                }
            double square = 0;
            for (int64_t c = 0; c < n; c++) square += y[i * n + c] * y[i * n + c];
            for (int64_t c = 0; c < n; c++) y[i * n + c] /= std::sqrt(square);
        }
        return y;
    }

    void step(const subspace_rsgd_args &a, Matrix &w, const Matrix &grad, Matrix &m) const
    {
        const double mu = a.momentum;
        const Matrix g = sum(a.maximize ? -1 : 1, grad, a.weight_decay, w);
        const Matrix next = sum(mu, m, mu == 0 ? 1 : 1 - a.dampening, g), dir = a.nesterov ? sum(1, g, mu, next) : next;
        const Matrix t = sum(-a.lr_value, tangent(dir, w), 0, w);
        if (mu != 0) m = tangent(next, w);
        w = moved(a.retraction, w, t);
    }
};

template <typename T>
void like_the_formula(int64_t k, int64_t n, subspace_retraction retraction, bool momentum, bool nesterov)
{
    SCOPED_TRACE("k=" + std::to_string(k) + " n=" + std::to_string(n) + " retraction=" + std::to_string(retraction) +
                 (nesterov   ? " nesterov"
                  : momentum ? " momentum"
                             : ""));
    const int64_t c = 2;
    Problem<T> p(c, k, n, momentum ? 0.8 : 0);
    p.a.stiefel = 1, p.a.retraction = retraction, p.a.nesterov = nesterov, p.a.weight_decay = 0.01, p.a.lr_value = 0.5;
    if (!momentum) p.f.buffer = nullptr;
    Matrix w(p.w.begin(), p.w.end()), m(p.m.begin(), p.m.end());
    for (int64_t q = 0; q < c; q++) {
        const auto part = [&](const auto &v) { return Matrix(v.begin() + q * k * n, v.begin() + (q + 1) * k * n); };
        Matrix wq = part(w), mq = part(m);
        Stiefel{k, n}.step(p.a, wq, part(p.g), mq);
        std::copy(wq.begin(), wq.end(), w.begin() + q * k * n), std::copy(mq.begin(), mq.end(), m.begin() + q * k * n);
    }
    p.step();
    ASSERT_EQ(0, p.skipped);
    double worst = 0;
    for (size_t i = 0; i < w.size(); i++) {
        worst = std::max(worst, std::fabs(p.w[i] - w[i]));
        if (momentum) worst = std::max(worst, std::fabs(p.m[i] - m[i]));
    }
    EXPECT_LT(worst, sizeof(T) == 4 ? 5e-7 : 1e-12);
}

constexpr subspace_retraction all[] = {SUBSPACE_GEODESIC, SUBSPACE_POLAR, SUBSPACE_QR, SUBSPACE_CAYLEY};

TEST(RsgdStiefel, AStepIsTheFormula)
{
    for (const auto retraction : all)
        for (const auto &[k, n] : std::vector<std::pair<int64_t, int64_t>>{{1, 7}, {2, 2}, {3, 50}, {8, 40}, {17, 60}})
            for (const int kind : {0, 1, 2}) {
                like_the_formula<float>(k, n, retraction, kind > 0, kind == 2);
                like_the_formula<double>(k, n, retraction, kind > 0, kind == 2);
            }
}

TEST(RsgdStiefel, FramesStayFrames)
{
    for (const auto retraction : all)
        for (const auto &[k, n] : std::vector<std::pair<int64_t, int64_t>>{{1, 9}, {2, 2}, {8, 8}, {8, 300}, {33, 100}})
            for (const double lr : {0., 0.1, 3., 1e5}) {
                SCOPED_TRACE("k=" + std::to_string(k) + " n=" + std::to_string(n) + " lr=" + std::to_string(lr) +
                             " retraction=" + std::to_string(retraction));
                Problem<float> p(3, k, n);
                Problem<double> exact(3, k, n);
                p.a.stiefel = exact.a.stiefel = 1;
                p.a.retraction = exact.a.retraction = retraction, p.a.lr_value = exact.a.lr_value = lr;
                p.step(), exact.step();
                ASSERT_EQ(0, p.skipped + exact.skipped);
                ASSERT_LT(p.frame_error(), 1e-6);
                ASSERT_LT(exact.frame_error(), 1e-12);
            }
}

// Long steps, and frames far from orthonormal, take the careful path: the same step as that of a good frame.
TEST(RsgdStiefel, TheCarefulPathIsTheSameStep)
{
    for (const auto retraction : all)
        for (const bool nesterov : {false, true}) {
            Problem<double> p(2, 5, 40), far(2, 5, 40);
            for (auto *each : {&p, &far}) {
                each->a.stiefel = 1, each->a.retraction = retraction, each->a.nesterov = nesterov;
                each->a.lr_value = 1.5;
            }
            for (auto &v : far.w) v *= 1.2; // whose polar factor is the same
            p.step(), far.step();
            for (size_t i = 0; i < p.w.size(); i++) {
                ASSERT_NEAR(p.w[i], far.w[i], 1e-12) << retraction;
                ASSERT_NEAR(p.m[i], far.m[i], 1e-12) << retraction;
            }
        }
}

TEST(RsgdStiefel, ARottenClassSpoilsNoOther)
{
    Problem<float> p(3, 3, 20), clean(3, 3, 20);
    p.a.stiefel = clean.a.stiefel = 1;
    p.g[1 * 60 + 7] = NAN;
    const auto w = p.w, m = p.m;
    p.step(), clean.step();
    EXPECT_EQ(1, p.skipped);
    for (size_t i = 0; i < w.size(); i++) {
        ASSERT_EQ(i / 60 == 1 ? w[i] : clean.w[i], p.w[i]);
        ASSERT_EQ(i / 60 == 1 ? m[i] : clean.m[i], p.m[i]);
    }
}

TEST(RsgdStiefel, TransportIsRefused)
{
    Problem<float> p(2, 3, 20);
    p.a.stiefel = p.a.parallel = 1;
    Context ctx;
    ctx.size(1 << 20);
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_rsgd_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "no parallel transport on the Stiefel manifold"));
}

} // namespace
