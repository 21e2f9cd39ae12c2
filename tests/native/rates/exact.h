// A = I + a Y Y' = L L' and what follows from it, in far more digits than what is tested: double for float, long double
// for double. By inner products, which on long double take half the time of elimination in memory.
#ifndef SUBSPACE_TESTS_EXACT_H
#define SUBSPACE_TESTS_EXACT_H
#include <cmath>
#include <type_traits>
#include <vector>

template <typename T> using wider = std::conditional_t<sizeof(T) == 8, long double, double>;

template <typename R> R dot(const R *a, const R *b, size_t n)
{
    R even = 0, odd = 0;
    for (size_t i = 0; i + 1 < n; i += 2) even += a[i] * b[i], odd += a[i + 1] * b[i + 1];
    return n % 2 ? even + odd + a[n - 1] * b[n - 1] : even + odd;
}

template <typename R> struct Factor {
    const size_t s;
    std::vector<R> lower, upper; // L and L', row by row
    R logdet = 0;

    Factor(const std::vector<R> &y, size_t s_, size_t w, R a) : s(s_), lower(s_ * s_), upper(s_ * s_)
    {
        for (size_t i = 0; i < s; i++)
            for (size_t j = 0; j <= i; j++) {
                const R x = a * dot(&y[i * w], &y[j * w], w) + (i == j) - dot(&lower[i * s], &lower[j * s], j);
                if (i == j) logdet += std::log(x);
                upper[j * s + i] = lower[i * s + j] = i == j ? std::sqrt(x) : x / lower[j * s + j];
            }
    }

    // v <- A^-1 v
    void solve(std::vector<R> &v) const
    {
        for (size_t i = 0; i < s; i++) v[i] = (v[i] - dot(&lower[i * s], v.data(), i)) / lower[i * s + i];
        for (size_t i = s; i-- > 0;) {
            const size_t after = i + 1;
            v[i] = (v[i] - dot(upper.data() + i * s + after, v.data() + after, s - after)) / lower[i * s + i];
        }
    }
};

#endif
