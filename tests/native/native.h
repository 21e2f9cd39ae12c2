// What every native test needs: a context over plain memory, serial or on std::threads, and random frames.
#ifndef SUBSPACE_TESTS_NATIVE_H
#define SUBSPACE_TESTS_NATIVE_H
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <gtest/gtest.h>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

extern "C" {
#include "dispatch.h"
#include "subspace.h"
}

// A GPU's kernels never look at the values that they are given: what is wrong with one shows as NaN, not as an error.
inline bool looks_at_values()
{
    return std::strncmp(subspace_cpu_isa(), "sm_", 3) != 0;
}

template <typename T> constexpr subspace_dtype dtype_of = sizeof(T) == 8 ? SUBSPACE_F64 : SUBSPACE_F32;

inline void serial(int64_t count, int64_t, void (*fn)(int64_t, int64_t, void *), void *arg)
{
    if (count > 0) fn(0, count, arg);
}

inline void threaded(int64_t count, int64_t grain, void (*fn)(int64_t, int64_t, void *), void *arg)
{
    std::vector<std::thread> pool;
    const int64_t step = std::max<int64_t>(grain, (count + 2) / 3);
    for (int64_t begin = 0; begin < count; begin += step)
        pool.emplace_back(fn, begin, std::min(begin + step, count), arg);
    for (auto &t : pool) t.join();
}

// The workspace is no larger than asked for, so that ASan sees a step beyond it, and full of rubbish at first.
struct Context : subspace_ctx {
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
    explicit Context(int threads_ = 1) : subspace_ctx{}
    {
        threads = threads_;
        parallel_for = threads_ == 1 ? serial : threaded;
    }
    void size(size_t bytes)
    {
        const size_t rounded = (bytes / 64 + 1) * 64;
        memory.reset(std::aligned_alloc(64, rounded));
        std::memset(memory.get(), 0x5a, rounded);
        workspace = memory.get();
        workspace_bytes = bytes;
    }
};

template <typename T> std::vector<T> randoms(size_t count, unsigned seed = 1)
{
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    std::vector<T> v(count);
    for (auto &x : v) x = static_cast<T>(normal(engine));
    return v;
}

// Rows of every class made orthonormal by Gram-Schmidt, twice.
template <typename T> std::vector<T> frames(const std::vector<int64_t> &start, int64_t n, unsigned seed = 2)
{
    std::vector<double> w = randoms<double>(static_cast<size_t>(start.back() * n), seed);
    for (size_t c = 0; c + 1 < start.size(); c++)
        for (int64_t i = start[c]; i < start[c + 1]; i++)
            for (int pass = 0; pass < 2; pass++) {
                for (int64_t j = start[c]; j <= i; j++) {
                    double dot = 0;
                    for (int64_t l = 0; l < n; l++) dot += w[i * n + l] * w[j * n + l];
                    const double scale = i == j ? 1 / std::sqrt(dot) : dot;
                    for (int64_t l = 0; l < n; l++)
                        w[i * n + l] = i == j ? w[i * n + l] * scale : w[i * n + l] - scale * w[j * n + l];
                }
            }
    return {w.begin(), w.end()};
}

inline std::vector<int64_t> uniform(int64_t c, int64_t k)
{
    std::vector<int64_t> start;
    for (int64_t i = 0; i <= c; i++) start.push_back(i * k);
    return start;
}

template <typename T> double tolerance(double f32 = 2e-5)
{
    return sizeof(T) == 8 ? 1e-12 : f32;
}

// run<T>(threads) as three tests: of both types, and on threads.
#define TEST_EVERY_WAY(suite, fact, run)                                                                               \
    TEST(suite, fact##InFloat64)                                                                                       \
    {                                                                                                                  \
        run<double>(1);                                                                                                \
    }                                                                                                                  \
    TEST(suite, fact##InFloat32)                                                                                       \
    {                                                                                                                  \
        run<float>(1);                                                                                                 \
    }                                                                                                                  \
    TEST(suite, fact##OnThreeThreads)                                                                                  \
    {                                                                                                                  \
        run<float>(3);                                                                                                 \
    }
#endif
