// model.cpp - the blocks and threads of cuda_runtime.h, the devices, and the functions that stand for the CPU
// library's.
//
// A block's fibers are run in turn, each until it must wait; a fiber that waits names a counter and the value it waits
// to see change. An order of the threads other than the natural one shows a barrier that is missing between two of
// them, so each device has its own: sm_80 forwards, sm_86 backwards, sm_90 shuffled anew for every block.
#include <algorithm>
#include <cstring>
#include <functional>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sched.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <vector>
#include "cuda_runtime.h" // last: its words are used otherwise in the headers above

extern "C" {
#include "dispatch.h"
#include "linalg.h"
#include "subspace.h"
}

#ifdef ASAN
#include <sanitizer/common_interface_defs.h>
#endif

// Under the thread sanitizer each thread of a GPU is one of its own, and only what CUDA promises orders two of them: a
// launch's begin and end, __syncthreads, __syncwarp, the barrier of a cluster, __threadfence. So two threads that use
// the same shared or global memory without a barrier between them are reported, in whatever order they ran. This file
// itself is not watched.
#ifdef RACECHECK
#include <sanitizer/tsan_interface.h>
#define RELEASE(token) __tsan_release(token)
#define ACQUIRE(token) __tsan_acquire(token)
#define SWITCH_TO(fiber) __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync)
extern "C" { // volatile accesses are how blocks wait for one another: not races
#define WATCHED(n)                                                                                                     \
    void __tsan_volatile_read##n(void *) {}                                                                            \
    void __tsan_volatile_write##n(void *) {}
WATCHED(1) WATCHED(2) WATCHED(4) WATCHED(8)
}
#else
#define RELEASE(token) (void)(token)
#define ACQUIRE(token) (void)(token)
#define SWITCH_TO(fiber) (void)(fiber)
#endif

// ------------------------------------------------------------------ switching between stacks
// swap_stacks(save, load): push the registers that a call keeps, store the stack pointer in *save, go on at `load`.
#ifdef __x86_64__
extern "C" void swap_stacks(void **save, void *load);
__asm__(".text\n.p2align 4\n.globl swap_stacks\n.type swap_stacks,@function\nswap_stacks:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
        ".size swap_stacks,.-swap_stacks\n.section .note.GNU-stack,\"\",@progbits\n.text\n");

static void *first_frame(char *top, void (*entry)())
{
    void **sp = reinterpret_cast<void **>(top) - 8; // six registers, the address to return to, an odd word
    std::memset(sp, 0, 8 * sizeof *sp);
    sp[6] = reinterpret_cast<void *>(entry);
    return sp;
}
#else // slower: every switch is a system call
#include <ucontext.h>
static void swap_stacks(void **save, void *load)
{
    ucontext_t here, *there = static_cast<ucontext_t *>(load);
    *save = &here;
    swapcontext(&here, there);
}

static void *first_frame(char *top, void (*entry)())
{
    ucontext_t *c = new (top - sizeof(ucontext_t)) ucontext_t; // lies above the stack it describes
    getcontext(c);
    c->uc_stack.ss_sp = top - (128 << 10), c->uc_stack.ss_size = (128 << 10) - sizeof(ucontext_t) - 64;
    makecontext(c, entry, 0);
    return c;
}
#endif

namespace cuda_on_cpu
{
namespace
{
constexpr size_t STACK = 128 << 10, GUARD = 4096;

struct device {
    const char *name;
    int major, minor;
    size_t block_shared, shared; // bytes a block may have, bytes of a multiprocessor
    int order;
};
const device devices[] = {{"sm_80", 8, 0, 163 << 10, 164 << 10, 0},
                          {"sm_86", 8, 6, 99 << 10, 100 << 10, 1},
                          {"sm_90", 9, 0, 227 << 10, 228 << 10, 2}};
const device *gpu = &devices[2];
constexpr int MULTIPROCESSORS = 2, WARP = 32;
FOUND_AT_ONCE thread_local cudaError_t last = cudaSuccess;

[[noreturn]] void stop(const char *what, const char *kernel)
{
    std::fprintf(stderr, "cuda_on_cpu: %s: %s\n", kernel, what);
    std::abort();
}

struct fiber {
    void *sp = nullptr, *fake = nullptr;
    char *stack = nullptr; // lowest address, above the guard
    place p{};
    unsigned at = 0; // its place in the block's order
    int line = 0;
    bool done = false;
    void *watched = nullptr; // the thread sanitizer's
    struct warp *mine = nullptr;
    int lane = 0;
};

struct warp {
    unsigned here;        // lanes that wait
    unsigned asked[WARP]; // the mask that a lane waits with
    fiber *lanes[WARP];
    int line[WARP], from[WARP];
    unsigned char value[WARP][16], result[WARP][16];
    char token[WARP][2];
    unsigned turn[WARP];
};

// A lock that no sanitizer sees: it must not seem to order what the blocks do.
struct lock {
    bool *taken;
    explicit lock(bool *taken_) : taken(taken_)
    {
        while (__atomic_test_and_set(taken, __ATOMIC_ACQUIRE)) sched_yield();
    }
    ~lock()
    {
        __atomic_clear(taken, __ATOMIC_RELEASE);
    }
};

// The blocks of a cluster meet here; one that has ended is not waited for.
struct cluster {
    bool taken = false;
    unsigned live, arrived = 0, round = 0;
    std::vector<char *> shared;
    char token[2] = {};
    explicit cluster(unsigned blocks) : live(blocks), shared(blocks) {}
    void next()
    {
        arrived = 0, __atomic_fetch_add(&round, 1, __ATOMIC_SEQ_CST);
    }
    void meet()
    {
        const unsigned now = round;
        {
            lock own(&taken);
            if (++arrived == live) return next();
        }
        while (__atomic_load_n(&round, __ATOMIC_SEQ_CST) == now) sched_yield();
    }
    void leave()
    {
        lock own(&taken);
        if (--live && arrived == live) next();
    }
};

void entry();

struct crew { // stacks, kept from block to block
    std::vector<std::unique_ptr<fiber>> fibers;
    std::vector<warp> warps;
    fiber *get(size_t i)
    {
        while (fibers.size() <= i) {
            void *memory = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
            if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE)) stop("no memory for stacks", "launch");
            fibers.push_back(std::make_unique<fiber>());
            fiber *f = fibers.back().get();
            f->stack = static_cast<char *>(memory) + GUARD;
            f->sp = first_frame(f->stack + STACK, entry);
#ifdef RACECHECK // kept from block to block, as they are dear: a thread is never accused of racing with its own number
            f->watched = __tsan_create_fiber(0);
#endif
        }
        return fibers[i].get();
    }
};

struct block {
    const char *kernel;
    const std::function<void()> *body;
    std::vector<fiber *> fibers;
    std::vector<unsigned> order;
    std::vector<uint64_t> ready, met; // a bit for each place in the order: can go on; waits at the block's barrier
    char *shared;
    size_t shared_bytes;
    cluster *mates;
    unsigned rank, live, arrived = 0, round = 0, line = 0;
    int votes = 0, counted = 0;
    bool paused = false, entered = false; // entered: the stack that was left last is the scheduler's
    size_t word = 0;                      // of `ready`, that this round is at
    uint64_t ahead = 0;                   // in it: of the places that the round has passed
    fiber *now = nullptr;
    void *scheduler = nullptr, *fake = nullptr;
    const void *bottom = nullptr; // of the scheduler's stack
    size_t bottom_size = 0;
    void *watched = nullptr;
    char token[2] = {}, begun = 0;
};
char begun, ended, fenced; // more tokens
FOUND_AT_ONCE thread_local block *current = nullptr;

void set(std::vector<uint64_t> &bits, const fiber *f)
{
    bits[f->at / 64] |= uint64_t(1) << f->at % 64;
}

void release(block *b)
{
    for (size_t i = 0; i < b->met.size(); i++) b->ready[i] |= b->met[i], b->met[i] = 0;
    b->counted = b->votes, b->votes = 0, b->arrived = 0, b->round++;
}

// First thing on a fiber's stack; out of line, as it may run on another OS thread than before, with its own `current`.
__attribute__((noinline)) void arrive(void *fake)
{
#ifdef ASAN
    block *b = current;
    __sanitizer_finish_switch_fiber(fake, b->entered ? &b->bottom : nullptr, b->entered ? &b->bottom_size : nullptr);
    b->entered = false;
#else
    (void)fake;
#endif
}

// The next fiber of this round that can go on, if there is one; it is `now`.
fiber *next(block *b)
{
    for (; b->word < b->ready.size(); b->word++, b->ahead = ~uint64_t(0)) {
        const uint64_t left = b->ready[b->word] & b->ahead;
        if (!left) continue;
        const uint64_t bit = left & -left;
        b->ahead = ~(bit | (bit - 1)), b->ready[b->word] &= ~bit;
        b->now = b->fibers[b->order[64 * b->word + static_cast<size_t>(__builtin_ctzll(bit))]], here = &b->now->p;
        return b->now;
    }
    return nullptr;
}

// On with the next fiber, or at the end of a round the scheduler, until somebody sets this one's bit in `ready`.
void wait(int line)
{
    block *b = current;
    fiber *f = b->now, *to = next(b);
    f->line = line;
#ifdef ASAN
    __sanitizer_start_switch_fiber(&f->fake, to ? to->stack : b->bottom, to ? STACK : b->bottom_size);
#endif
    SWITCH_TO(to ? to->watched : b->watched);
    swap_stacks(&f->sp, to ? to->sp : b->scheduler);
    arrive(f->fake);
}

void meet(int line, bool of_cluster)
{
    block *b = current;
    if (b->arrived == 0) b->line = static_cast<unsigned>(line);
    if (b->line != static_cast<unsigned>(line)) stop("threads of a block wait at different barriers", b->kernel);
    const unsigned round = b->round;
    // two in turn: who is early at the next barrier must not seem to have been at this one
    char *token = of_cluster && b->mates ? &b->mates->token[b->mates->round & 1] : &b->token[round & 1];
    RELEASE(token);
    if (++b->arrived < b->live) {
        set(b->met, b->now);
        wait(line);
    } else {
        if (of_cluster && b->mates) b->mates->meet();
        release(b);
    }
    ACQUIRE(token);
}

__attribute__((noinline)) void run_thread()
{
    block *b = current;
    ACQUIRE(&begun);
    ACQUIRE(&b->begun);
    (*b->body)();
    RELEASE(&ended);
    b->now->done = true;
    if (--b->live && b->arrived == b->live) release(b); // who has left is not waited for
    wait(0);
}

void entry() // a fiber's whole life: one thread after the other
{
    arrive(nullptr);
    for (;;) run_thread();
}

void enter(block *b, fiber *f)
{
    b->entered = true;
#ifdef ASAN
    __sanitizer_start_switch_fiber(&b->fake, f->stack, STACK);
#endif
    SWITCH_TO(f->watched);
    swap_stacks(&b->scheduler, f->sp);
#ifdef ASAN
    __sanitizer_finish_switch_fiber(b->fake, nullptr, nullptr);
#endif
}

// Every fiber of a block to its end.
void run(block *b)
{
    current = b;
    while (b->live) {
        b->word = 0, b->ahead = ~uint64_t(0);
        fiber *first = next(b);
        if (first) enter(b, first);
        if (!first) {
            for (fiber *f : b->fibers)
                if (!f->done)
                    std::fprintf(stderr, "thread %u,%u waits at line %d\n", f->p.thread.x, f->p.thread.y, f->line);
            stop("threads wait for others that never come", b->kernel);
        }
        if (b->paused) sched_yield();
        b->paused = false;
    }
    if (b->mates) b->mates->leave();
    current = nullptr, here = nullptr;
}

bool crews_taken = false;
char crews_token; // orders the OS threads, not the fibers
std::vector<std::unique_ptr<crew>> crews;

struct hired { // a crew for as long as this lives
    std::unique_ptr<crew> c;
    hired()
    {
        lock own(&crews_taken);
        ACQUIRE(&crews_token);
        if (crews.empty()) c = std::make_unique<crew>();
        else c = std::move(crews.back()), crews.pop_back();
    }
    ~hired()
    {
        lock own(&crews_taken);
        ACQUIRE(&crews_token);
        crews.push_back(std::move(c));
        RELEASE(&crews_token);
    }
};

template <typename I> void arrange(std::vector<I> &order, std::minstd_rand &random)
{
    std::iota(order.begin(), order.end(), I(0));
    if (gpu->order == 1) std::reverse(order.begin(), order.end());
    if (gpu->order == 2) std::shuffle(order.begin(), order.end(), random);
}

struct grid {
    const char *kernel;
    dim3 blocks, threads;
    size_t shared;
    const std::function<void()> *body;
};

void run_block(const grid &g, crew *c, uint64_t index, char *shared, cluster *mates, unsigned rank)
{
    const unsigned threads = g.threads.x * g.threads.y * g.threads.z;
    std::minstd_rand random(static_cast<unsigned>(index + 1));
    block b{};
    b.kernel = g.kernel, b.body = g.body, b.shared = shared, b.shared_bytes = g.shared, b.mates = mates, b.rank = rank;
    b.live = threads;
    for (size_t i = 0; i < g.shared; i++) shared[i] = '\xff'; // NaNs
#ifdef RACECHECK
    b.watched = __tsan_get_current_fiber();
    RELEASE(&b.begun);
#endif
    c->warps.assign((threads + WARP - 1) / WARP, warp{});
    for (unsigned i = 0; i < threads; i++) {
        fiber *f = c->get(i);
        f->p.thread = {i % g.threads.x, i / g.threads.x % g.threads.y, i / g.threads.x / g.threads.y};
        f->p.block = {static_cast<unsigned>(index % g.blocks.x), static_cast<unsigned>(index / g.blocks.x % g.blocks.y),
                      static_cast<unsigned>(index / g.blocks.x / g.blocks.y)};
        f->p.threads = g.threads, f->p.blocks = g.blocks;
        f->mine = &c->warps[i / WARP], f->lane = static_cast<int>(i % WARP);
        f->mine->lanes[f->lane] = f, f->done = false;
        b.fibers.push_back(f);
    }
    b.order.resize(threads);
    arrange(b.order, random);
    b.ready.resize((threads + 63) / 64), b.met.resize(b.ready.size());
    for (unsigned at = 0; at < threads; at++) {
        fiber *f = b.fibers[b.order[at]];
        f->at = at, set(b.ready, f);
    }
    run(&b);
}

std::unique_ptr<char[]> shared_memory(size_t bytes)
{
    return std::unique_ptr<char[]>(new char[bytes]); // aligned for any type; ASan guards both ends
}

// `count` blocks from `first` on, all at once.
void run_together(const grid &g, uint64_t first, unsigned count, bool of_cluster)
{
    cluster mates(count);
    std::vector<std::unique_ptr<char[]>> memory;
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < count; i++) memory.push_back(shared_memory(g.shared)), mates.shared[i] = memory[i].get();
    for (unsigned i = 0; i < count; i++)
        threads.emplace_back([&, i] {
            hired own;
            run_block(g, own.c.get(), first + i, memory[i].get(), of_cluster ? &mates : nullptr, i);
        });
    for (std::thread &t : threads) t.join();
    ACQUIRE(&ended);
}

warp *own_warp(unsigned mask, int *lane)
{
    fiber *f = current->now;
    *lane = f->lane;
    if (!(mask >> f->lane & 1)) stop("a lane calls a warp function whose mask leaves it out", current->kernel);
    return f->mine;
}

// By moves, not by the library's memcpy, which the thread sanitizer watches even from here.
template <size_t SIZE> bool copy_if(size_t bytes, void *to, const void *from)
{
    if (bytes == SIZE) __builtin_memcpy(to, from, SIZE);
    return bytes == SIZE;
}

void copy(void *to, const void *from, size_t bytes)
{
    if (!copy_if<4>(bytes, to, from) && !copy_if<8>(bytes, to, from) && !copy_if<1>(bytes, to, from) &&
        !copy_if<2>(bytes, to, from) && !copy_if<16>(bytes, to, from))
        stop("a shuffle of no basic type", current->kernel);
}

// Wait for all lanes of the mask; the last one hands out `result` = `value` of the lane that each asked for.
void gather(warp *w, int line, unsigned mask, int lane)
{
    w->asked[lane] = mask, w->line[lane] = line;
    w->here |= 1u << lane;
    if ((w->here & mask) != mask) return wait(line);
    for (int l = 0; l < WARP; l++)
        if ((mask >> l & 1) && w->asked[l] != mask) return wait(line);
    w->here &= ~mask;
    for (int l = 0; l < WARP; l++) {
        if (!(mask >> l & 1)) continue;
        if (w->line[l] != line) stop("lanes of a warp meet at different warp functions", current->kernel);
        copy(w->result[l], w->value[w->from[l]], 16);
    }
    for (int l = 0; l < WARP; l++)
        if ((mask >> l & 1) && l != lane) set(current->ready, w->lanes[l]);
}

// __syncwarp orders memory, a shuffle does not. Lanes release into the token of their group's lowest lane.
void order(warp *w, int line, unsigned mask, int lane)
{
    const int lowest = __builtin_ctz(mask);
    char *token = &w->token[lowest][w->turn[lane]++ & 1];
    RELEASE(token);
    gather(w, line, mask, lane);
    ACQUIRE(token);
}
} // namespace

FOUND_AT_ONCE __thread place *here = nullptr;

void barrier(int line)
{
    meet(line, false);
}

void cluster_barrier(int line)
{
    meet(-line, true);
}

int vote(int line, bool value, int kind)
{
    block *b = current;
    b->votes += value;
    const unsigned live = b->live;
    meet(line, false);
    return kind == 0 ? b->counted : kind == 1 ? b->counted == static_cast<int>(live) : b->counted > 0;
}

void lanes(int line, unsigned mask)
{
    int lane;
    warp *w = own_warp(mask, &lane);
    w->from[lane] = lane;
    order(w, line, mask, lane);
}

void shuffle(int line, unsigned mask, void *value, size_t bytes, int from)
{
    int lane;
    warp *w = own_warp(mask, &lane);
    if (!(mask >> from & 1)) stop("a shuffle reads a lane that its mask leaves out", current->kernel);
    copy(w->value[lane], value, bytes);
    w->from[lane] = from;
    gather(w, line, mask, lane);
    copy(value, w->result[lane], bytes);
}

unsigned ballot(int line, unsigned mask, bool value)
{
    unsigned all = 0;
    for (int l = 0; l < WARP; l++) { // a shuffle for each lane: slow, and simple
        bool theirs = value;
        if (!(mask >> l & 1)) continue;
        shuffle(line, mask, &theirs, sizeof theirs, l);
        all |= unsigned(theirs) << l;
    }
    return all;
}

void fence()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    RELEASE(&fenced);
    ACQUIRE(&fenced);
}

void pause()
{
    block *b = current;
    b->paused = true, set(b->ready, b->now);
    wait(0);
}

void *dynamic_shared()
{
    return current->shared;
}

void *shared_of(void *mine, unsigned rank)
{
    block *b = current;
    const ptrdiff_t at = static_cast<char *>(mine) - b->shared;
    if (at < 0 || at >= static_cast<ptrdiff_t>(b->shared_bytes))
        stop("cluster_at of what is not dynamic shared memory", b->kernel);
    if (!b->mates) {
        if (rank) stop("cluster_at beyond the cluster", b->kernel);
        return mine;
    }
    if (rank >= b->mates->shared.size()) stop("cluster_at beyond the cluster", b->kernel);
    return b->mates->shared[rank] + at;
}

unsigned cluster_rank()
{
    return current->rank;
}

static int blocks_at_once(int threads, size_t shared) // on a multiprocessor
{
    const int by_threads = (gpu->minor == 6 ? 1536 : 2048) / ((threads + 31) / 32 * 32);
    return std::min({by_threads, static_cast<int>(gpu->shared / (shared + 1024)), 16});
}

void launch(kind how, const char *name, unsigned size, dim3 blocks, dim3 threads, size_t shared,
            const std::function<void()> &body)
{
    const uint64_t total = uint64_t(blocks.x) * blocks.y * blocks.z, each = uint64_t(threads.x) * threads.y * threads.z;
    const grid g = {name, blocks, threads, shared, &body};
    last = cudaErrorInvalidConfiguration;
    if (total == 0 || blocks.x > INT32_MAX || blocks.y > 65535 || blocks.z > 65535) return;
    if (each == 0 || each > 1024 || threads.z > 64) return;
    if (how == CLUSTERS && (gpu->major < 9 || size == 0 || size > 8 || blocks.x % size)) return;
    last = cudaErrorInvalidValue;
    if (shared > gpu->block_shared) return;
    if (how == COOPERATIVE) {
        const int resident = blocks_at_once(static_cast<int>(each), shared);
        last = cudaErrorCooperativeLaunchTooLarge;
        if (total > uint64_t(resident) * MULTIPROCESSORS) return;
    }
    last = cudaSuccess;
    RELEASE(&begun);
    std::minstd_rand random(static_cast<unsigned>(total));
    std::vector<uint64_t> order(how == COOPERATIVE ? 1 : how == CLUSTERS ? total / size : total);
    arrange(order, random);
    if (how == COOPERATIVE) return run_together(g, 0, static_cast<unsigned>(total), false);
    if (how == CLUSTERS && size > 1) {
        for (uint64_t first : order) run_together(g, first * size, size, true);
        return;
    }
#ifdef RACECHECK // shared memory of its own for every block, freed when none can still be accused of using it
    std::vector<std::unique_ptr<char[]>> memory;
    for (uint64_t index : order) {
        memory.push_back(shared_memory(shared));
        std::thread([&] {
            hired own;
            run_block(g, own.c.get(), index, memory.back().get(), nullptr, 0);
        }).join();
    }
    ACQUIRE(&ended);
#else
    hired own;
    const std::unique_ptr<char[]> memory = shared_memory(shared);
    for (uint64_t index : order) run_block(g, own.c.get(), index, memory.get(), nullptr, 0);
#endif
}
} // namespace cuda_on_cpu

// ------------------------------------------------------------------------------------ the runtime
using cuda_on_cpu::gpu;

cudaError_t cudaGetLastError()
{
    const cudaError_t error = cuda_on_cpu::last;
    cuda_on_cpu::last = cudaSuccess;
    return error;
}

const char *cudaGetErrorString(cudaError_t error)
{
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    default: return "invalid argument";
    }
}

cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int)
{
    *value = what == cudaDevAttrMultiProcessorCount            ? cuda_on_cpu::MULTIPROCESSORS
             : what == cudaDevAttrComputeCapabilityMajor       ? gpu->major
             : what == cudaDevAttrComputeCapabilityMinor       ? gpu->minor
             : what == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(gpu->block_shared)
                                                               : 0;
    return cudaSuccess;
}

// what a kernel may have, by its address; at first 48 KiB less what is static, for which 8 KiB stand
static std::mutex asking;
static std::map<const void *, int> allowed;

int cuda_on_cpu_allowed(const void *kernel)
{
    const std::lock_guard<std::mutex> lock(asking);
    return allowed.emplace(kernel, 40 << 10).first->second;
}

cudaError_t cuda_on_cpu_allow(const void *kernel, int bytes)
{
    const std::lock_guard<std::mutex> lock(asking);
    if (bytes < 0 || static_cast<size_t>(bytes) > gpu->block_shared) return cudaErrorInvalidValue;
    allowed[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t cuda_on_cpu_resident(int *blocks, const void *kernel, int threads, size_t shared)
{
    const bool may = shared <= static_cast<size_t>(cuda_on_cpu_allowed(kernel));
    *blocks = may ? cuda_on_cpu::blocks_at_once(threads, shared) : 0;
    return cudaSuccess;
}

// ----------------------------------------------------------- in place of cpu/dispatch.c
void subspace_cpu_init(void)
{
    const char *asked = std::getenv("SUBSPACE_ISA");
    linalg_init();
    for (const auto &d : cuda_on_cpu::devices)
        if (asked && !std::strcmp(asked, d.name)) gpu = &d;
}

const char *subspace_cpu_isa(void)
{
    return gpu->name;
}

const char *subspace_cpu_isa_available(void)
{
    return "sm_80 sm_86 sm_90";
}

bool subspace_cpu_intel(void)
{
    return true; // products stay torch's: here ours are far slower
}

void subspace_cpu_split(bool)
{
    // float32 is multiplied as such
}

#define TO_WORKSPACE(op)                                                                                               \
    size_t subspace_##op##_workspace_cpu(const subspace_ctx *ctx, const subspace_##op##_args *a)                       \
    {                                                                                                                  \
        return subspace_##op##_workspace_cuda(ctx, a);                                                                 \
    }
#define TO_FUNCTION(fn, op)                                                                                            \
    subspace_status subspace_##fn##_cpu(subspace_ctx *ctx, const subspace_##op##_args *a)                              \
    {                                                                                                                  \
        return subspace_##fn##_cuda(ctx, a);                                                                           \
    }
SUBSPACE_EACH(TO_WORKSPACE, TO_FUNCTION)
