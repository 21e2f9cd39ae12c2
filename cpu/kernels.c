/* kernels.c - the table of one instruction-set level; dispatch.c chooses among the tables. */
#include "cpu.h"

#define STRING_(x) #x
#define STRING(x) STRING_(x)

size_t LEVEL(subspace_logits_workspace)(const subspace_ctx *, const subspace_logits_args *);
subspace_status LEVEL(subspace_logits)(subspace_ctx *, const subspace_logits_args *);
subspace_status LEVEL(subspace_logits_backward)(subspace_ctx *, const subspace_logits_args *);
size_t LEVEL(subspace_cross_entropy_workspace)(const subspace_ctx *, const subspace_cross_entropy_args *);
subspace_status LEVEL(subspace_cross_entropy)(subspace_ctx *, const subspace_cross_entropy_args *);
subspace_status LEVEL(subspace_cross_entropy_backward)(subspace_ctx *, const subspace_cross_entropy_args *);
size_t LEVEL(subspace_rsgd_workspace)(const subspace_ctx *, const subspace_rsgd_args *);
subspace_status LEVEL(subspace_rsgd)(subspace_ctx *, const subspace_rsgd_args *);
size_t LEVEL(subspace_tucker_workspace)(const subspace_ctx *, const subspace_tucker_args *);
subspace_status LEVEL(subspace_tucker)(subspace_ctx *, const subspace_tucker_args *);
subspace_status LEVEL(subspace_tucker_backward)(subspace_ctx *, const subspace_tucker_args *);
size_t LEVEL(subspace_tucker_linear_workspace)(const subspace_ctx *, const subspace_tucker_linear_args *);
subspace_status LEVEL(subspace_tucker_linear)(subspace_ctx *, const subspace_tucker_linear_args *);
subspace_status LEVEL(subspace_tucker_linear_backward)(subspace_ctx *, const subspace_tucker_linear_args *);
size_t LEVEL(subspace_tucker_conv_workspace)(const subspace_ctx *, const subspace_tucker_conv_args *);
subspace_status LEVEL(subspace_tucker_conv_project)(subspace_ctx *, const subspace_tucker_conv_args *);
subspace_status LEVEL(subspace_tucker_conv_expand)(subspace_ctx *, const subspace_tucker_conv_args *);
size_t LEVEL(subspace_depthwise_workspace)(const subspace_ctx *, const subspace_depthwise_args *);
subspace_status LEVEL(subspace_depthwise)(subspace_ctx *, const subspace_depthwise_args *);
size_t LEVEL(subspace_coding_rate_workspace)(const subspace_ctx *, const subspace_coding_rate_args *);
subspace_status LEVEL(subspace_coding_rate)(subspace_ctx *, const subspace_coding_rate_args *);
subspace_status LEVEL(subspace_coding_rate_backward)(subspace_ctx *, const subspace_coding_rate_args *);
size_t LEVEL(subspace_coding_rate_soft_workspace)(const subspace_ctx *, const subspace_coding_rate_soft_args *);
subspace_status LEVEL(subspace_coding_rate_soft)(subspace_ctx *, const subspace_coding_rate_soft_args *);
subspace_status LEVEL(subspace_coding_rate_soft_backward)(subspace_ctx *, const subspace_coding_rate_soft_args *);
size_t LEVEL(subspace_sinkhorn_workspace)(const subspace_ctx *, const subspace_sinkhorn_args *);
subspace_status LEVEL(subspace_sinkhorn)(subspace_ctx *, const subspace_sinkhorn_args *);
subspace_status LEVEL(subspace_sinkhorn_backward)(subspace_ctx *, const subspace_sinkhorn_args *);

extern const subspace_kernels LEVEL(subspace_kernels);
const subspace_kernels LEVEL(subspace_kernels) = {
    .name = STRING(SUBSPACE_LEVEL),
    .logits_workspace = LEVEL(subspace_logits_workspace),
    .logits = LEVEL(subspace_logits),
    .logits_backward = LEVEL(subspace_logits_backward),
    .cross_entropy_workspace = LEVEL(subspace_cross_entropy_workspace),
    .cross_entropy = LEVEL(subspace_cross_entropy),
    .cross_entropy_backward = LEVEL(subspace_cross_entropy_backward),
    .rsgd_workspace = LEVEL(subspace_rsgd_workspace),
    .rsgd = LEVEL(subspace_rsgd),
    .tucker_workspace = LEVEL(subspace_tucker_workspace),
    .tucker = LEVEL(subspace_tucker),
    .tucker_backward = LEVEL(subspace_tucker_backward),
    .tucker_linear_workspace = LEVEL(subspace_tucker_linear_workspace),
    .tucker_linear = LEVEL(subspace_tucker_linear),
    .tucker_linear_backward = LEVEL(subspace_tucker_linear_backward),
    .tucker_conv_workspace = LEVEL(subspace_tucker_conv_workspace),
    .tucker_conv_project = LEVEL(subspace_tucker_conv_project),
    .tucker_conv_expand = LEVEL(subspace_tucker_conv_expand),
    .depthwise_workspace = LEVEL(subspace_depthwise_workspace),
    .depthwise = LEVEL(subspace_depthwise),
    .coding_rate_workspace = LEVEL(subspace_coding_rate_workspace),
    .coding_rate = LEVEL(subspace_coding_rate),
    .coding_rate_backward = LEVEL(subspace_coding_rate_backward),
    .coding_rate_soft_workspace = LEVEL(subspace_coding_rate_soft_workspace),
    .coding_rate_soft = LEVEL(subspace_coding_rate_soft),
    .coding_rate_soft_backward = LEVEL(subspace_coding_rate_soft_backward),
    .sinkhorn_workspace = LEVEL(subspace_sinkhorn_workspace),
    .sinkhorn = LEVEL(subspace_sinkhorn),
    .sinkhorn_backward = LEVEL(subspace_sinkhorn_backward),
};
