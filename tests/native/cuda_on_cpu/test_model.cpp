// The model itself: what the kernels rely on works as on a GPU, what a GPU punishes is caught; and cuda.cuh's own
// functions.
#include "native.h"
#include "cuda.cuh"

namespace
{

constexpr int THREADS = 96;

#define RUN(...)                                                                                                       \
    [&]() -> subspace_status {                                                                                         \
        __VA_ARGS__;                                                                                                   \
        return SUBSPACE_OK;                                                                                            \
    }()

void sums(const double *in, double *out)
{
    const int thread = (int)thread_in_block(), count = (int)(blockDim.x * blockDim.y);
    const double sum = block_sum(in[thread]), most = block_max(in[thread]);
    const double second = block_sum(1.); // the shared array is used again
    if (thread == count - 1) out[0] = sum, out[1] = most, out[2] = second;
}

TEST(Model, SumsOfABlockOfAnyShape)
{
    Context ctx;
    std::vector<double> in(THREADS), out(3);
    double sum = 0;
    for (int i = 0; i < THREADS; i++) sum += in[i] = i % 7 - 2.5;
    for (const dim3 block : {dim3(96), dim3(48, 2), dim3(8, 12)}) {
        ASSERT_EQ(SUBSPACE_OK, RUN(LAUNCH(&ctx, sums, 1, block, 0, in.data(), out.data()))) << ctx.message;
        EXPECT_EQ((std::vector<double>{sum, 3.5, THREADS}), out);
    }
    in[17] = NAN;
    ASSERT_EQ(SUBSPACE_OK, RUN(LAUNCH(&ctx, sums, 1, 32, 0, in.data(), out.data())));
    EXPECT_TRUE(std::isnan(out[0]) && std::isnan(out[1]));
}

void shuffles(int *out)
{
    const int me = (int)threadIdx.x, lane = me % WARP;
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u; // two halves of a warp, each on its own
    int v = 0;
    v += __shfl_xor_sync(ALL_LANES, me, 5) == (me ^ 5);
    v += __shfl_down_sync(ALL_LANES, me, 3) == (lane + 3 < WARP ? me + 3 : me);
    v += __shfl_up_sync(ALL_LANES, me, 3) == (lane >= 3 ? me - 3 : me);
    v += __shfl_sync(ALL_LANES, me, 9) == me / WARP * WARP + 9;
    v += __shfl_sync(ALL_LANES, me, 2, 8) == me / 8 * 8 + 2;
    v += __shfl_xor_sync(half, me, 1) == (me ^ 1);
    v += __ballot_sync(ALL_LANES, lane % 3 == 0) == 0x49249249u;
    v += __any_sync(ALL_LANES, lane == 31) && !__all_sync(ALL_LANES, lane == 31) && __all_sync(ALL_LANES, lane < 32);
    v += __syncthreads_count(me % 2) == THREADS / 2;
    v += __syncthreads_or(me == 70) && !__syncthreads_and(me == 70);
    __syncwarp();
    out[me] = v;
}

TEST(Model, WarpFunctions)
{
    Context ctx;
    std::vector<int> out(THREADS);
    ASSERT_EQ(SUBSPACE_OK, RUN(LAUNCH(&ctx, shuffles, 1, THREADS, 0, out.data())));
    EXPECT_EQ(std::vector<int>(THREADS, 10), out);
}

void leave_early(int *out) // who has left is not waited for
{
    if (threadIdx.x % 2) return;
    __syncthreads();
    if (atomicAdd(out, 1) == 0) out[1] = (int)blockDim.x;
}

TEST(Model, ThreadsMayLeaveBeforeABarrier)
{
    Context ctx;
    std::vector<int> out(2);
    ASSERT_EQ(SUBSPACE_OK, RUN(LAUNCH(&ctx, leave_early, 1, 64, 0, out.data())));
    EXPECT_EQ((std::vector<int>{32, 64}), out);
}

void first_look(int *nans, int count)
{
    DYNAMIC_SHARED(shared);
    for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x) {
        if (isnan(shared[i])) atomicAdd(nans, 1);
        shared[i] = 0;
    }
}

TEST(Model, SharedMemoryStartsAsNaNInEveryBlock)
{
    Context ctx;
    int nans = 0;
    ASSERT_EQ(SUBSPACE_OK, RUN(LAUNCH(&ctx, first_look, dim3(2, 3), 32, 100 * sizeof(double), &nans, 100)));
    EXPECT_EQ(600, nans);
}

void meet_all(unsigned *meeting, int *where, int *wrong, int rounds)
{
    for (int round = 1; round <= rounds; round++) {
        if (threadIdx.x == 0) where[blockIdx.x] = round;
        grid_sync(meeting);
        if (threadIdx.x < gridDim.x && where[threadIdx.x] != round) atomicAdd(wrong, 1);
        grid_sync(meeting);
    }
}

TEST(Model, BlocksOfACooperativeLaunchMeet)
{
    Context ctx;
    std::vector<unsigned> meeting(2);
    std::vector<int> where(4);
    int wrong = 0;
    for (int again = 0; again < 2; again++)
        ASSERT_EQ(SUBSPACE_OK,
                  RUN(LAUNCH_COOPERATIVE(&ctx, meet_all, 4, 64, 0, meeting.data(), where.data(), &wrong, 5)));
    EXPECT_EQ(0, wrong);
    EXPECT_EQ(0u, meeting[0]);
}

void pass_on(double *out)
{
    DYNAMIC_SHARED(shared);
    const unsigned blocks = 4, rank = cluster_rank();
    shared[threadIdx.x] = 100. * blockIdx.x + threadIdx.x;
    cluster_sync();
    out[blockIdx.x * blockDim.x + threadIdx.x] = *cluster_at(shared + threadIdx.x, (rank + 1) % blocks);
    cluster_sync(); /* nobody leaves while others read */
}

TEST(Model, BlocksOfAClusterReadOneAnother)
{
    Context ctx;
    device_limits limits;
    ASSERT_EQ(SUBSPACE_OK, limits_of(&ctx, &limits));
    std::vector<double> out(8 * 32);
    const subspace_status status = RUN(LAUNCH_CLUSTERS(&ctx, pass_on, 4, 8, 32, 32 * sizeof(double), out.data()));
    if (limits.major < 9) {
        ASSERT_EQ(SUBSPACE_CUDA, status);
        return;
    }
    ASSERT_EQ(SUBSPACE_OK, status) << ctx.message;
    for (int b = 0; b < 8; b++)
        for (int t = 0; t < 32; t++) ASSERT_EQ(100 * (b / 4 * 4 + (b + 1) % 4) + t, out[b * 32 + t]);
}

void nothing() {}

TEST(Model, WhatNoGpuRunsIsAnError)
{
    Context ctx;
    device_limits limits;
    ASSERT_EQ(SUBSPACE_OK, limits_of(&ctx, &limits));
    EXPECT_EQ(SUBSPACE_CUDA, RUN(LAUNCH(&ctx, nothing, 0, 32, 0)));
    EXPECT_NE(nullptr, std::strstr(ctx.message, "invalid configuration"));
    EXPECT_EQ(SUBSPACE_CUDA, RUN(LAUNCH(&ctx, nothing, 1, 1025, 0)));
    EXPECT_EQ(SUBSPACE_CUDA, RUN(LAUNCH(&ctx, nothing, dim3(1, 65536), 32, 0)));
    EXPECT_EQ(SUBSPACE_CUDA, RUN(LAUNCH(&ctx, nothing, 1, 32, limits.shared + 1)));
    EXPECT_EQ(SUBSPACE_OK, RUN(LAUNCH(&ctx, nothing, 1, 32, limits.shared)));
    EXPECT_EQ(SUBSPACE_CUDA, RUN(LAUNCH_COOPERATIVE(&ctx, nothing, 1000, 1024, 0)));
    int64_t blocks = 0;
    ASSERT_EQ(SUBSPACE_OK, resident_blocks(&ctx, &limits, nothing, 256, limits.shared, &blocks));
    EXPECT_EQ(limits.multiprocessors, blocks);
}

void nothing_static() {}

TEST(Model, StaticSharedMemoryCountsAmongWhatNeedsNoLeave)
{
    Context ctx;
    device_limits limits;
    int64_t blocks = 0;
    ASSERT_EQ(SUBSPACE_OK, limits_of(&ctx, &limits));
    ASSERT_EQ(SUBSPACE_OK, resident_blocks(&ctx, &limits, nothing_static, 256, 48 << 10, &blocks));
    EXPECT_GE(blocks, limits.multiprocessors);
    EXPECT_EQ(SUBSPACE_CUDA, resident_blocks(&ctx, &limits, nothing_static, 256, limits.shared + 1, &blocks));
}

void part_ways()
{
    if (threadIdx.x < 7) __syncthreads();
    else __syncthreads();
}

void stay_away()
{
    if (threadIdx.x != 3) __syncwarp();
}

TEST(ModelDeathTest, WhatAGpuPunishesIsCaught)
{
    testing::FLAGS_gtest_death_test_style = "threadsafe";
    Context ctx;
    EXPECT_DEATH(RUN(LAUNCH(&ctx, part_ways, 1, 32, 0)), "wait at different barriers");
    EXPECT_DEATH(RUN(LAUNCH(&ctx, stay_away, 1, 32, 0)), "wait for others that never come");
}

void hand_over(int *out, bool barrier)
{
    DYNAMIC_SHARED(shared);
    shared[threadIdx.x] = threadIdx.x;
    if (barrier) __syncthreads();
    out[threadIdx.x] = (int)shared[(threadIdx.x + 31) % 64];
}

TEST(Model, AMissingBarrierShows)
{
    Context ctx;
#ifdef __SANITIZE_THREAD__
    GTEST_SKIP() << "the sanitizer reports it, and fails the program";
#endif
    for (const bool barrier : {true, false}) {
        std::vector<int> out(64);
        int right = 0;
        ASSERT_EQ(SUBSPACE_OK, RUN(LAUNCH(&ctx, hand_over, 1, 64, 64 * sizeof(double), out.data(), barrier)));
        for (int i = 0; i < 64; i++) right += out[i] == (i + 31) % 64;
        EXPECT_EQ(barrier, right == 64);
    }
}

} // namespace
