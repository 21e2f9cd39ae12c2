/* dispatch.c - choose a level's kernels once, at load; after that every call is one jump. */
#include "dispatch.h"
#include <stdlib.h>
#define SUBSPACE_LEVEL baseline
#include "cpu.h"

extern const subspace_kernels subspace_kernels_baseline;
#ifdef SUBSPACE_HAVE_X86_LEVELS
extern const subspace_kernels subspace_kernels_avx2, subspace_kernels_avx512;
#endif

static const subspace_kernels *kernels = &subspace_kernels_baseline;
static char available[64] = "baseline";

static void offer(const subspace_kernels *k, bool runs, const char *forced)
{
    if (!runs) return;
    if (k != &subspace_kernels_baseline) {
        strcat(available, " ");
        strcat(available, k->name);
    }
    if (!forced || !strcmp(forced, k->name)) kernels = k;
}

void subspace_cpu_init(void)
{
    const char *forced = getenv("SUBSPACE_ISA");
    linalg_init();
    if (forced && !*forced) forced = NULL;
    strcpy(available, "baseline");
    kernels = &subspace_kernels_baseline;
    offer(&subspace_kernels_baseline, true, forced);
#ifdef SUBSPACE_HAVE_X86_LEVELS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    offer(&subspace_kernels_avx2, avx2, forced);
    offer(&subspace_kernels_avx512, avx512, forced);
#endif
}

const char *subspace_cpu_isa(void)
{
    return kernels->name;
}

const char *subspace_cpu_isa_available(void)
{
    return available;
}

size_t subspace_logits_workspace_cpu(const subspace_ctx *ctx, const subspace_logits_args *a)
{
    return kernels->logits_workspace(ctx, a);
}

subspace_status subspace_logits_cpu(subspace_ctx *ctx, const subspace_logits_args *a)
{
    return kernels->logits(ctx, a);
}

subspace_status subspace_logits_backward_cpu(subspace_ctx *ctx, const subspace_logits_args *a)
{
    return kernels->logits_backward(ctx, a);
}

size_t subspace_cross_entropy_workspace_cpu(const subspace_ctx *ctx, const subspace_cross_entropy_args *a)
{
    return kernels->cross_entropy_workspace(ctx, a);
}

subspace_status subspace_cross_entropy_cpu(subspace_ctx *ctx, const subspace_cross_entropy_args *a)
{
    return kernels->cross_entropy(ctx, a);
}

subspace_status subspace_cross_entropy_backward_cpu(subspace_ctx *ctx, const subspace_cross_entropy_args *a)
{
    return kernels->cross_entropy_backward(ctx, a);
}

size_t subspace_rsgd_workspace_cpu(const subspace_ctx *ctx, const subspace_rsgd_args *a)
{
    return kernels->rsgd_workspace(ctx, a);
}

subspace_status subspace_rsgd_cpu(subspace_ctx *ctx, const subspace_rsgd_args *a)
{
    return kernels->rsgd(ctx, a);
}

size_t subspace_tucker_workspace_cpu(const subspace_ctx *ctx, const subspace_tucker_args *a)
{
    return kernels->tucker_workspace(ctx, a);
}

subspace_status subspace_tucker_cpu(subspace_ctx *ctx, const subspace_tucker_args *a)
{
    return kernels->tucker(ctx, a);
}

subspace_status subspace_tucker_backward_cpu(subspace_ctx *ctx, const subspace_tucker_args *a)
{
    return kernels->tucker_backward(ctx, a);
}

size_t subspace_tucker_linear_workspace_cpu(const subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    return kernels->tucker_linear_workspace(ctx, a);
}

subspace_status subspace_tucker_linear_cpu(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    return kernels->tucker_linear(ctx, a);
}

subspace_status subspace_tucker_linear_backward_cpu(subspace_ctx *ctx, const subspace_tucker_linear_args *a)
{
    return kernels->tucker_linear_backward(ctx, a);
}

size_t subspace_tucker_conv_workspace_cpu(const subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    return kernels->tucker_conv_workspace(ctx, a);
}

subspace_status subspace_tucker_conv_project_cpu(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    return kernels->tucker_conv_project(ctx, a);
}

subspace_status subspace_tucker_conv_expand_cpu(subspace_ctx *ctx, const subspace_tucker_conv_args *a)
{
    return kernels->tucker_conv_expand(ctx, a);
}

size_t subspace_depthwise_workspace_cpu(const subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    return kernels->depthwise_workspace(ctx, a);
}

subspace_status subspace_depthwise_cpu(subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    return kernels->depthwise(ctx, a);
}

size_t subspace_coding_rate_workspace_cpu(const subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    return kernels->coding_rate_workspace(ctx, a);
}

subspace_status subspace_coding_rate_cpu(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    return kernels->coding_rate(ctx, a);
}

subspace_status subspace_coding_rate_backward_cpu(subspace_ctx *ctx, const subspace_coding_rate_args *a)
{
    return kernels->coding_rate_backward(ctx, a);
}

size_t subspace_coding_rate_soft_workspace_cpu(const subspace_ctx *ctx, const subspace_coding_rate_soft_args *a)
{
    return kernels->coding_rate_soft_workspace(ctx, a);
}

subspace_status subspace_coding_rate_soft_cpu(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a)
{
    return kernels->coding_rate_soft(ctx, a);
}

subspace_status subspace_coding_rate_soft_backward_cpu(subspace_ctx *ctx, const subspace_coding_rate_soft_args *a)
{
    return kernels->coding_rate_soft_backward(ctx, a);
}

size_t subspace_sinkhorn_workspace_cpu(const subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    return kernels->sinkhorn_workspace(ctx, a);
}

subspace_status subspace_sinkhorn_cpu(subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    return kernels->sinkhorn(ctx, a);
}

subspace_status subspace_sinkhorn_backward_cpu(subspace_ctx *ctx, const subspace_sinkhorn_args *a)
{
    return kernels->sinkhorn_backward(ctx, a);
}
