// The launch shapes of cuda/: blocks that every device can run, and that together cover the work, for any sizes.
#include "native.h"

extern "C" {
#include "grassmann/panels_shape.h"
#include "grassmann/rsgd_shape.h"
#include "rates/coding_rate_shape.h"
#include "transport/sinkhorn_shape.h"
#include "tucker/depthwise_shape.h"
#include "tucker/rank_product_shape.h"
int shapes_are_c(void);
}

namespace
{

struct Device {
    int64_t shared, all; // bytes of shared memory that a block may have, and that a multiprocessor has
    int clusters, multiprocessors;
};

// sm_80, sm_86 (89, 120), sm_90 (100), and a small one
const Device devices[] = {{163 << 10, 164 << 10, 0, 108},
                          {99 << 10, 100 << 10, 0, 84},
                          {227 << 10, 228 << 10, 1, 132},
                          {99 << 10, 100 << 10, 1, 6}};
const int64_t sizes[] = {1,  2,   3,   4,   7,   8,    15,   16,   17,   31,   33,
                         64, 100, 255, 256, 257, 1000, 1024, 2048, 2049, 8192, 40000};

TEST(Shapes, AreC)
{
    EXPECT_TRUE(shapes_are_c());
}

TEST(Shapes, Rsgd)
{
    const rsgd_rule rules[] = {{4, 2, 2, 1}, {4, 3, 3, 2}, {4, 2, 3, 1}, {8, 2, 2, 1}, {8, 3, 3, 2}};
    for (const Device &d : devices)
        for (const rsgd_rule &rule : rules)
            for (int64_t k : sizes)
                for (int64_t n : sizes)
                    for (int large = 0; large <= (k > RSGD_SHARED_K); large++) {
                        if (k > n || k > RSGD_MAX_K) continue;
                        const rsgd_shape s = rsgd_shape_of(k, n, 0, large, &rule, d.clusters, d.shared);
                        SCOPED_TRACE("k=" + std::to_string(k) + " n=" + std::to_string(n) +
                                     " shared=" + std::to_string(d.shared));
                        if (k > RSGD_SHARED_K && !large) continue; // of uniform classes only large ones are launched
                        ASSERT_LE(int64_t(s.tile + s.scratch), d.shared);
                        ASSERT_EQ(0u, s.tile % 16);
                        ASSERT_TRUE(s.cluster == 1 ||
                                    (d.clusters && (s.cluster == 2 || s.cluster == 4 || s.cluster == 8)));
                        ASSERT_GE(rsgd_slice(n, unsigned(s.cluster)) * s.cluster, n);
                        if (s.kept) {
                            ASSERT_LE(rsgd_kept(k, n, unsigned(s.cluster), &rule), int64_t(s.tile));
                        }
                    }
}

TEST(Shapes, RsgdReadsTheFramesOfThePaperOnce)
{
    const rsgd_rule rule = {4, 2, 2, 1};
    const rsgd_shape s = rsgd_shape_of(8, 2048, 0, 0, &rule, 1, 227 << 10);
    EXPECT_EQ(2, s.cluster);
    EXPECT_TRUE(s.kept);
    EXPECT_EQ(3, s.per_sm);
}

TEST(Shapes, Sinkhorn)
{
    for (const Device &d : devices)
        for (int64_t v : {1, 3, 200, 5000})
            for (int64_t m : sizes)
                for (int64_t n : sizes)
                    for (int64_t size : {4, 8}) {
                        const sinkhorn_shape s = sinkhorn_shape_of(v, m, n, size, d.multiprocessors, d.shared);
                        SCOPED_TRACE("v=" + std::to_string(v) + " m=" + std::to_string(m) + " n=" + std::to_string(n));
                        ASSERT_GE(s.panels * s.rows, m);
                        ASSERT_LT((s.panels - 1) * s.rows, m);
                        ASSERT_GE(s.strips * SINKHORN_STRIP, n);
                        ASSERT_GE(s.blocks * s.share, s.panels);
                        ASSERT_GE(s.ld, n);
                        ASSERT_GE(s.groups, 1);
                        ASSERT_LE(s.groups, v);
                        ASSERT_LE(int64_t(s.shared) + SINKHORN_STATIC, d.shared);
                        if (s.shared) {
                            ASSERT_GE(int64_t(s.shared), s.share * s.rows * s.ld * size);
                        }
                        // all blocks of a group are on the device at once: registers leave room for SINKHORN_TOGETHER
                        const int64_t each = std::min<int64_t>(
                            SINKHORN_TOGETHER, d.all / (int64_t(s.shared) + SINKHORN_STATIC + SINKHORN_RESERVED));
                        ASSERT_LE(s.blocks, std::max<int64_t>(each, 1) * d.multiprocessors);
                    }
}

TEST(Shapes, CodingRate)
{
    for (size_t item : {4, 8}) {
        const int most = rate_small(item);
        EXPECT_LE(rate_elimination_threads(most), 1024);
        EXPECT_LE(rate_elimination_space(most) * item, 48u << 10);
        EXPECT_LE(rate_large_shared(item), 99u << 10);
        EXPECT_LE(rate_product_shared(item), 48u << 10);
        for (int side = 1; side <= most; side++) {
            const int tiles = (side + RATE_PANEL - 1) / RATE_PANEL;
            ASSERT_GE(rate_elimination_threads(side), tiles * (tiles + 1) / 2);
            ASSERT_EQ(0, rate_elimination_threads(side) % 32);
        }
    }
    for (int64_t m : sizes)
        for (int64_t d : sizes) {
            const int64_t parts = rate_parts(m, d), length = std::max(m, d);
            ASSERT_GE(parts, 1);
            ASSERT_LE(parts, RATE_PARTS);
            ASSERT_EQ(0, rate_part_from(length, 0, parts));
            ASSERT_EQ(length, rate_part_from(length, parts, parts));
            for (int64_t part = 0; part < parts; part++)
                ASSERT_LT(rate_part_from(length, part, parts), rate_part_from(length, part + 1, parts));
        }
}

TEST(Shapes, Panels)
{
    for (int64_t b : {0, 1, 255, 256, 4096, 4097, 100000})
        for (int64_t c : {0, 1, 7, 1000, 21841, 1000000})
            for (int64_t k : {1, 8, 64}) {
                for (int kept = 0; kept <= 1; kept++) {
                    const panels_shape s = panels_shape_of(b, c, k, c * k, 0, kept);
                    ASSERT_GE(s.block * s.blocks, b);
                    ASSERT_GE(s.classes * s.count, c);
                    if (c > 0) {
                        ASSERT_LT(s.classes * (s.count - 1), c);
                    }
                    ASSERT_EQ(s.classes * k, s.rows);
                    if (!kept && s.classes > 1) {
                        ASSERT_LE(s.rows * s.block, PANEL_TILE);
                    }
                }
                const panels_shape ragged = panels_shape_of(b, c, 0, c * k, 1, 0);
                ASSERT_GE(ragged.block * ragged.blocks, b);
                ASSERT_EQ(c * k, ragged.rows);
                const int64_t strip = panels_strip(c, b);
                ASSERT_TRUE(strip >= 16 && strip <= 128 && strip % PANEL_CLASSES == 0);
            }
}

TEST(Shapes, RankProduct)
{
    for (int64_t rows : sizes)
        for (int64_t cols : sizes)
            for (int64_t depth : {0, 1, 255, 257, 100000})
                for (int64_t count : {1, 64}) {
                    const rank_shape s = rank_shape_of(rows, cols, depth, count, 1);
                    ASSERT_EQ(RANK_THREADS, s.ty * s.tx);
                    ASSERT_GE(s.row_tiles * RANK_SIDE * s.ty, rows);
                    ASSERT_GE(s.col_tiles * RANK_SIDE * s.tx, cols);
                    ASSERT_GE(s.slices * s.slice, depth);
                    if (depth > 0) {
                        ASSERT_LT((s.slices - 1) * s.slice, depth);
                    }
                    ASSERT_LE(rank_shared(s.ty, s.tx, 8), 48u << 10);
                }
}

TEST(Shapes, Depthwise)
{
    subspace_depthwise_args a{};
    for (int64_t out : {1, 7, 14, 56, 300})
        for (int64_t kernel : {1, 3, 5, 7, 31})
            for (int64_t stride : {1, 2, 100})
                for (int64_t m : {1, 3})
                    for (int dims = 1; dims <= 3; dims++)
                        for (int item : {4, 8}) {
                            a.b = 5, a.c = 9, a.n = 4 - m, a.m = m;
                            for (int i = 0; i < 3; i++) {
                                const bool used = i >= 3 - dims;
                                a.out[i] = used ? out : 1, a.kernel[i] = used ? kernel : 1,
                                a.stride[i] = used ? stride : 1;
                                a.dilation[i] = 1;
                            }
                            const depthwise_shape s = depthwise_shape_of(&a, item);
                            if (!s.fits) continue;
                            ASSERT_LE(s.shared, 48u << 10);
                            ASSERT_GE(s.taps * s.chunks, kernel);
                            ASSERT_LE(s.groups * s.lanes, DEPTHWISE_THREADS);
                            ASSERT_GE(s.groups * s.passes, m * a.kernel[0] * a.kernel[1] * s.chunks);
                            ASSERT_GE(s.bands_y * s.height, a.out[1]);
                            ASSERT_GE(s.bands_x * s.width, a.out[2]);
                            ASSERT_TRUE(s.slices >= 1 && s.slices <= s.pieces);
                        }
}

} // namespace
