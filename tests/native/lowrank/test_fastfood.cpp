// fastfood: what is drawn, to the bit and by its statistics; products with the matrix and its transpose against their
// definition, in memory no larger than promised.
#include "native.h"

extern "C" {
#include "convert.h"
#include "fastfood.h"
}

namespace
{

int64_t power(int64_t n)
{
    int64_t p = 1;
    while (p < n) p *= 2;
    return p;
}

void hadamard(std::vector<double> &x)
{
    for (size_t h = x.size() / 2; h > 0; h /= 2)
        for (size_t i = 0; i < x.size(); i++)
            if ((i & h) == 0) {
                const double a = x[i], b = x[i + h];
                x[i] = a + b, x[i + h] = a - b;
            }
}

struct Drawn { // B, pi and G of a length
    std::vector<double> sign, normal;
    std::vector<uint32_t> place;
    double squares = 0;

    Drawn(uint64_t seed, int64_t length) : sign(length), normal(length + 3), place(length)
    {
        int bits = 0;
        while (int64_t(1) << bits < length) bits++;
        const fastfood_order order = fastfood_order_of(seed, bits);
        for (int64_t i = 0; i < length; i++) {
            uint32_t word[4];
            fastfood_words(seed, uint32_t(i / 128), FASTFOOD_SIGNS, word);
            sign[i] = word[i / 32 % 4] >> (i % 32) & 1 ? -1 : 1;
            place[i] = fastfood_pi(&order, uint32_t(i));
            if (i % 4) continue;
            int32_t n[4];
            fastfood_words(seed, uint32_t(i / 4), FASTFOOD_NORMALS, word);
            fastfood_normals(word[0], word[1], n, n + 1), fastfood_normals(word[2], word[3], n + 2, n + 3);
            for (int k = 0; k < 4; k++) normal[i + k] = n[k] * 0x1p-18;
        }
        normal.resize(length);
        for (double g : normal) squares += g * g;
    }
};

template <typename T> struct Problem {
    int64_t v, d, m;
    std::vector<T> theta, out, dout, dtheta;
    subspace_fastfood_args a{};

    Problem(int64_t v_, int64_t d_, int64_t m_, int64_t seed = 5)
        : v(v_), d(d_), m(m_), theta(randoms<T>(v * d)), out(v * m, T(7)), dout(randoms<T>(v * m, 2)),
          dtheta(v * d, T(7))
    {
        a.dtype = dtype_of<T>, a.v = v, a.d = d, a.m = m, a.seed = seed;
        a.theta = theta.data(), a.out = out.data(), a.dout = dout.data(), a.dtheta = dtheta.data();
    }

    void run(Context &ctx)
    {
        ctx.size(subspace_fastfood_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_fastfood_cpu(&ctx, &a)) << ctx.message;
        ctx.size(subspace_fastfood_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_fastfood_adjoint_cpu(&ctx, &a)) << ctx.message;
    }

    void check() const
    {
        const int64_t length = power(std::max(d, m));
        const Drawn drawn(uint64_t(a.seed), length);
        const double scale = 1 / std::sqrt(double(m) * drawn.squares);
        for (int64_t r = 0; r < v; r++) {
            std::vector<double> t(length), u(length), w(length), s(length);
            for (int64_t j = 0; j < d; j++) t[j] = drawn.sign[j] * double(theta[r * d + j]);
            hadamard(t);
            for (int64_t i = 0; i < length; i++) u[i] = drawn.normal[i] * t[drawn.place[i]] * scale;
            hadamard(u);
            for (int64_t i = 0; i < m; i++) ASSERT_NEAR(u[i], double(out[r * m + i]), 20 * tolerance<T>()) << i;
            for (int64_t i = 0; i < m; i++) w[i] = double(dout[r * m + i]);
            hadamard(w);
            for (int64_t i = 0; i < length; i++) s[drawn.place[i]] = drawn.normal[i] * w[i] * scale;
            hadamard(s);
            const double most = 20 * tolerance<T>() * std::sqrt(double(m) / double(d) + 1);
            for (int64_t j = 0; j < d; j++) ASSERT_NEAR(drawn.sign[j] * s[j], double(dtheta[r * d + j]), most) << j;
        }
    }
};

// one of everything, less than a tile, whole and broken ones, to more and to fewer, several groups of rows
struct Shape {
    int64_t v, d, m;
};

std::vector<Shape> shapes()
{
    std::vector<Shape> found{{1, 1, 1},   {2, 1, 2},      {3, 3, 2},       {2, 5, 300},
                             {9, 300, 7}, {1, 700, 1024}, {2, 1000, 4097}, {1, 5000, 3}};
    if (looks_at_values()) found.push_back({1, 300, 40000}), found.push_back({3, 40, 100000});
    return found;
}

template <typename T> void run_all(int threads)
{
    for (const Shape &s : shapes()) {
        SCOPED_TRACE("v=" + std::to_string(s.v) + " d=" + std::to_string(s.d) + " m=" + std::to_string(s.m));
        Problem<T> p(s.v, s.d, s.m);
        Context ctx(threads);
        p.run(ctx);
        p.check();
    }
}

TEST_EVERY_WAY(Fastfood, MatchesTheDefinition, run_all)

TEST(Fastfood, SameBitsOnThreeThreads)
{
    for (const Shape &s : shapes()) {
        Problem<float> one(s.v, s.d, s.m), three(s.v, s.d, s.m);
        Context alone(1), together(3);
        one.run(alone), three.run(together);
        ASSERT_EQ(one.out, three.out);
        ASSERT_EQ(one.dtheta, three.dtheta);
    }
}

// Random123's known answers, and one of each of what is made of such words: they never change
TEST(Fastfood, DrawsAreThoseOfEveryVersion)
{
    uint32_t word[4];
    fastfood_words(0, 0, 0, word);
    const uint32_t known[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    for (int i = 0; i < 4; i++) EXPECT_EQ(known[i], word[i]);
    const int32_t multiples[][2] = {{1718495, 1}, {-63, -65}, {-1, 308651}, {724937, 1108213}};
    const uint32_t words[][2] = {{0, 0}, {0xffffffff, 0xffffffff}, {0x80000000, 0xa0000000}, {12345, 987654321}};
    for (int i = 0; i < 4; i++) {
        int32_t first, second;
        fastfood_normals(words[i][0], words[i][1], &first, &second);
        EXPECT_EQ(multiples[i][0], first) << i;
        EXPECT_EQ(multiples[i][1], second) << i;
    }
    const uint32_t eight[8] = {5, 7, 4, 0, 2, 6, 3, 1}, far[3] = {31356680, 27918390, 16454330};
    const fastfood_order few = fastfood_order_of(3, 3), many = fastfood_order_of(3, 26);
    for (uint32_t i = 0; i < 8; i++) EXPECT_EQ(eight[i], fastfood_pi(&few, i));
    for (uint32_t i = 0; i < 3; i++) EXPECT_EQ(far[i], fastfood_pi(&many, 1000000 * i));
}

// The result itself, at every level and on every device: a hash of its bits
TEST(Fastfood, ResultsAreThoseOfEveryVersion)
{
    const auto hash = [](const std::vector<float> &x) {
        uint64_t h = 0xcbf29ce484222325;
        for (float v : x) {
            uint32_t bits;
            std::memcpy(&bits, &v, sizeof bits);
            h = (h ^ bits) * 0x100000001b3;
        }
        return h;
    };
    const uint64_t pinned[][2] = {{0xc781899dd4d65089, 0xd11d388345ec242c},
                                  {0x54ac15a383fc55cd, 0xa23627f4d65d41c0},
                                  {0x9c004ccc9a013e09, 0x989b490c23456283}};
    const Shape sizes[] = {{1, 3, 5}, {2, 700, 3000}, {1, 3000, 70}};
    for (int i = 0; i < 3; i++) {
        Problem<float> p(sizes[i].v, sizes[i].d, sizes[i].m, 11);
        for (size_t j = 0; j < p.theta.size(); j++) p.theta[j] = float(int(j * 37 % 101) - 50) / 64;
        for (size_t j = 0; j < p.dout.size(); j++) p.dout[j] = float(int(j * 53 % 97) - 48) / 64;
        Context ctx;
        p.run(ctx);
        EXPECT_EQ(pinned[i][0], hash(p.out)) << i;
        EXPECT_EQ(pinned[i][1], hash(p.dtheta)) << i;
    }
}

TEST(Fastfood, OrdersArePermutations)
{
    for (int bits = 0; bits <= 12; bits++)
        for (uint64_t seed = 0; seed < 20; seed++) {
            const fastfood_order order = fastfood_order_of(seed << 40 | seed, bits);
            std::vector<bool> seen(size_t(1) << bits);
            for (uint32_t i = 0; i < 1u << bits; i++) {
                const uint32_t place = fastfood_pi(&order, i);
                ASSERT_LT(place, 1u << bits);
                ASSERT_FALSE(seen[place]);
                seen[place] = true;
                ASSERT_EQ(i, fastfood_pi_inverse(&order, place));
            }
        }
}

// by chi-squared over seeds, to five standard deviations: where a place goes to, where a second one goes when the first
// is known, and of four or eight places, which order it is
TEST(Fastfood, OrdersAreUniform)
{
    constexpr int64_t seeds = 100000;
    const auto even = [](const std::vector<int64_t> &count) {
        const double kinds = double(count.size()), expected = double(seeds) / kinds;
        double chi = 0;
        for (int64_t c : count) chi += (double(c) - expected) * (double(c) - expected) / expected;
        EXPECT_LT(std::fabs(chi - (kinds - 1)), 5 * std::sqrt(2 * kinds)) << kinds;
    };
    for (int bits : {1, 2, 3, 4, 6, 8}) {
        SCOPED_TRACE(bits);
        const uint32_t n = 1u << bits, pairs[][2] = {{0, 1}, {0, n / 2}, {n - 2, n - 1}};
        std::vector<int64_t> to[3], apart[3], which(bits == 2 ? 24 : 40320);
        for (int k = 0; k < 3; k++) to[k].resize(n), apart[k].resize(n - 1);
        for (uint64_t seed = 0; seed < seeds; seed++) {
            const fastfood_order order = fastfood_order_of(seed, bits);
            for (int k = 0; k < 3; k++) {
                const uint32_t first = fastfood_pi(&order, pairs[k][0]), second = fastfood_pi(&order, pairs[k][1]);
                to[k][first]++, apart[k][(second - first - 1) % n]++;
            }
            if (bits != 2 && bits != 3) continue;
            uint32_t place[8], number = 0; // of the order, among all of them
            for (uint32_t i = 0; i < n; i++) {
                uint32_t smaller = 0;
                place[i] = fastfood_pi(&order, i);
                for (uint32_t j = 0; j < i; j++) smaller += place[j] < place[i];
                number = number * (i + 1) + smaller;
            }
            which[number]++;
        }
        for (int k = 0; k < 3; k++) even(to[k]), even(apart[k]);
        if (bits == 2 || bits == 3) even(which);
    }
}

TEST(Fastfood, NormalsAreOddMultiplesAndNeverZero)
{
    for (uint32_t a : {0u, 1u, 2u, 0x7fffffffu, 0xfffffffeu, 0xffffffffu})
        for (uint32_t b = 0; b < 64; b++) {
            int32_t n[2];
            fastfood_normals(a, b << 26 | (b % 3 == 0 ? 0u : b % 3 == 1 ? 0x3ffffffu : 0x155555u), &n[0], &n[1]);
            for (int32_t x : n) EXPECT_TRUE(x % 2 != 0 && std::abs(x) < 1735000) << a << " " << b << " " << x;
        }
}

TEST(Fastfood, HalfTypesAreWidened)
{
    // of entries that both hold: the float32 result, rounded once
    Problem<float> p(2, 3, 300);
    for (float &x : p.theta) x = std::round(x * 8) / 8;
    for (float &x : p.dout) x = std::round(x * 8) / 8;
    Context ctx;
    p.run(ctx);
    for (const auto dtype : {SUBSPACE_BF16, SUBSPACE_F16}) {
        const auto narrow = [&](const std::vector<float> &x) {
            std::vector<uint16_t> h;
            for (float v : x) h.push_back(dtype == SUBSPACE_BF16 ? f32_to_bf16(v) : f32_to_f16(v));
            return h;
        };
        const std::vector<uint16_t> theta = narrow(p.theta), dout = narrow(p.dout);
        std::vector<uint16_t> out(p.out.size()), dtheta(p.dtheta.size());
        subspace_fastfood_args a = p.a;
        a.dtype = dtype, a.theta = theta.data(), a.out = out.data(), a.dout = dout.data(), a.dtheta = dtheta.data();
        ctx.size(subspace_fastfood_workspace_cpu(&ctx, &a));
        ASSERT_EQ(SUBSPACE_OK, subspace_fastfood_cpu(&ctx, &a)) << ctx.message;
        ASSERT_EQ(SUBSPACE_OK, subspace_fastfood_adjoint_cpu(&ctx, &a)) << ctx.message;
        EXPECT_EQ(narrow(p.out), out);
        EXPECT_EQ(narrow(p.dtheta), dtheta);
    }
}

TEST(Fastfood, NoRows)
{
    Problem<float> p(0, 5, 9);
    Context ctx(3);
    p.run(ctx);
}

TEST(Fastfood, BadArgumentsAreNamed)
{
    Problem<float> p(1, 4, 9);
    Context ctx;
    ctx.size(subspace_fastfood_workspace_cpu(&ctx, &p.a) - 1);
    EXPECT_EQ(SUBSPACE_WORKSPACE_TOO_SMALL, subspace_fastfood_cpu(&ctx, &p.a));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "fastfood: workspace of "));
    p.a.d = 0;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_fastfood_cpu(&ctx, &p.a));
    EXPECT_STREQ("fastfood: both sizes must be 1 to 2^26, got 0 to 9", ctx.message);
    p.a.d = 4, p.a.m = (1 << 26) + 1;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_fastfood_adjoint_cpu(&ctx, &p.a));
    EXPECT_STREQ("fastfood: both sizes must be 1 to 2^26, got 4 to 67108865", ctx.message);
    p.a.m = 9, p.a.v = -1;
    EXPECT_EQ(SUBSPACE_INVALID_ARGUMENT, subspace_fastfood_cpu(&ctx, &p.a));
    EXPECT_STREQ("fastfood: negative number of rows: -1", ctx.message);
}

} // namespace
