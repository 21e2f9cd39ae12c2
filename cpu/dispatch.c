/* dispatch.c - choose a level's kernels once, at load; after that every call is one jump. */
#define _DEFAULT_SOURCE /* syscall */
#include "dispatch.h"
#include <stdlib.h>
#ifdef SUBSPACE_HAVE_X86_LEVELS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define SUBSPACE_LEVEL baseline
#include "cpu.h"

extern const subspace_kernels subspace_kernels_baseline;
#ifdef SUBSPACE_HAVE_X86_LEVELS
extern const subspace_kernels subspace_kernels_avx2, subspace_kernels_avx512;
#endif

static const subspace_kernels *kernels = &subspace_kernels_baseline;
static const char *chosen = "baseline";
static char available[64] = "baseline";
static bool bf16 = false, amx = false;
static _Atomic bool high = false;

static void offer(const char *name, const subspace_kernels *k, bool runs, const char *forced)
{
    if (!runs) return;
    if (*available) strcat(available, " ");
    strcat(available, name);
    if (!forced || !strcmp(forced, name)) kernels = k, chosen = name;
}

#ifdef SUBSPACE_HAVE_X86_LEVELS
/* Whether there are tiles of bf16 and Linux lets this process use them: since 5.16, if it is asked, as oneDNN asks too.
 */
static bool tiles_of_bf16(unsigned features)
{
    enum { PERMISSION = 0x1023, TILE_DATA = 18, BF16 = 1 << 22, TILES = 1 << 24 };
    return features & BF16 && features & TILES && syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) == 0;
}

/* Leaf 7's, of the register that tells of AMX. */
static unsigned features_of_leaf_7(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) ? d : 0;
}
#endif

void subspace_cpu_init(void)
{
    const char *forced = getenv("SUBSPACE_ISA");
    linalg_init();
    if (forced && !*forced) forced = NULL;
    kernels = &subspace_kernels_baseline;
    chosen = "baseline";
    *available = '\0';
    offer("baseline", &subspace_kernels_baseline, true, forced);
#ifdef SUBSPACE_HAVE_X86_LEVELS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    offer("avx2", &subspace_kernels_avx2, avx2, forced);
    const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
    const unsigned features = features_of_leaf_7();
    /* Intel's processors that have AVX512-FP16 (bit 23) begin two FMAs in every cycle and one vdpbf16ps, of twice the
     * flops, in every other: bf16 is faster widened there, but for AMX */
    const bool slow_pairs = subspace_cpu_intel() && features & (1 << 23);
    if (slow_pairs) offer("avx512_bf16", &subspace_kernels_avx512, pairs, forced);
    offer("avx512", &subspace_kernels_avx512, avx512, forced);
    if (!slow_pairs) offer("avx512_bf16", &subspace_kernels_avx512, pairs, forced);
    const bool may = !forced || !strcmp(forced, "amx_bf16"); /* nothing is asked of Linux that is not wanted */
    offer("amx_bf16", &subspace_kernels_avx512, may && pairs && tiles_of_bf16(features), forced);
#endif
    amx = !strcmp(chosen, "amx_bf16");
    bf16 = amx || !strcmp(chosen, "avx512_bf16");
}

bool subspace_cpu_bf16(void)
{
    return bf16;
}

bool subspace_cpu_amx(void)
{
    return amx;
}

bool subspace_cpu_splits(void)
{
    return amx && high;
}

void subspace_cpu_split(bool may)
{
    high = may;
}

const char *subspace_cpu_isa(void)
{
    return chosen;
}

const char *subspace_cpu_isa_available(void)
{
    return available;
}

bool subspace_cpu_intel(void)
{
#ifdef SUBSPACE_HAVE_X86_LEVELS
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

/* Every function of the contract: on to the chosen level's. */
#define TO_WORKSPACE(op)                                                                                               \
    size_t subspace_##op##_workspace_cpu(const subspace_ctx *ctx, const subspace_##op##_args *a)                       \
    {                                                                                                                  \
        return kernels->op##_workspace(ctx, a);                                                                        \
    }
#define TO_FUNCTION(fn, op)                                                                                            \
    subspace_status subspace_##fn##_cpu(subspace_ctx *ctx, const subspace_##op##_args *a)                              \
    {                                                                                                                  \
        return kernels->fn(ctx, a);                                                                                    \
    }
SUBSPACE_EACH(TO_WORKSPACE, TO_FUNCTION)
