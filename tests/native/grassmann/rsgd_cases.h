// Frames, gradients and momentum for a Riemannian step.
#ifndef SUBSPACE_TESTS_RSGD_CASES_H
#define SUBSPACE_TESTS_RSGD_CASES_H
#include "native.h"

template <typename T> struct Problem {
    int64_t c, k, n;
    std::vector<T> w, g, m;
    subspace_frames f{};
    subspace_rsgd_args a{};
    int64_t skipped = -1;

    Problem(int64_t c_, int64_t k_, int64_t n_, double momentum = 0.9)
        : c(c_), k(k_), n(n_), w(frames<T>(uniform(c, k), n)), g(randoms<T>(c * k * n, 5)), m(randoms<T>(c * k * n, 6))
    {
        for (auto &v : g) v /= T(std::sqrt(double(k * n)));
        for (auto &v : m) v /= T(std::sqrt(double(k * n)));
        f = {w.data(), g.data(), m.data(), c, k, n};
        a.dtype = dtype_of<T>, a.count = 1, a.frames = &f, a.lr_value = 0.3, a.momentum = momentum;
        a.skipped = &skipped;
    }

    void step(int threads = 1)
    {
        Context ctx(threads);
        ctx.size(subspace_rsgd_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_rsgd_cpu(&ctx, &a)) << ctx.message;
    }

    double frame_error() const
    {
        double worst = 0;
        for (int64_t q = 0; q < c; q++)
            for (int64_t i = 0; i < k; i++)
                for (int64_t j = 0; j <= i; j++) {
                    double dot = i == j ? -1 : 0;
                    for (int64_t l = 0; l < n; l++)
                        dot += double(w[(q * k + i) * n + l]) * double(w[(q * k + j) * n + l]);
                    worst = std::isfinite(dot) ? std::max(worst, std::fabs(dot)) : INFINITY;
                }
        return worst;
    }
};
#endif
