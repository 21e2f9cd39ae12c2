/* register.c - the schemas, and the kernels of the device this file is compiled for.
 *
 * A constructor cannot throw, so it leaves a status that ops/library.py reads. Handles are kept for
 * the life of the process. The CPU library owns the schemas; the CUDA one only adds kernels. */
#define _GNU_SOURCE
#include "shim.h"
#include <dlfcn.h>
#ifndef SUBSPACE_DEVICE_CUDA
#include "dispatch.h"
#include "linalg.h"
#endif

#define EXPORT __attribute__((visibility("default")))

typedef struct op {
    const char *name, *schema;
    kernel *fn;
} op;

static const op ops[] = {
    {"logits",
     "logits(Tensor x, Tensor weight, Tensor start, float gamma, bool normalize, bool keep)"
     " -> (Tensor logits, Tensor proj)",
     shim_logits},
    {"logits_backward",
     "logits_backward(Tensor dlogits, Tensor x, Tensor weight, Tensor start, Tensor proj, float gamma, bool normalize,"
     " bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)",
     shim_logits_backward},
    {"cross_entropy",
     "cross_entropy(Tensor x, Tensor weight, Tensor start, Tensor target, Tensor class_weight, float gamma,"
     " bool normalize, int ignore_index, float label_smoothing) -> (Tensor loss, Tensor stats)",
     shim_cross_entropy},
    {"cross_entropy_backward",
     "cross_entropy_backward(Tensor dloss, Tensor x, Tensor weight, Tensor start, Tensor target, Tensor class_weight,"
     " Tensor stats, float gamma, bool normalize, int ignore_index, float label_smoothing, bool need_dx,"
     " bool need_dweight) -> (Tensor dx, Tensor dweight)",
     shim_cross_entropy_backward},
    {"rsgd_",
     "rsgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] buffers, Tensor start, Tensor lr, float momentum,"
     " float dampening, float weight_decay, bool nesterov, bool maximize, int retraction, bool parallel) -> Tensor",
     shim_rsgd},
    {"tucker_compose", "tucker_compose(Tensor core, Tensor[] factors, Tensor[] base, float scale) -> Tensor",
     shim_tucker_compose},
    {"tucker_compose_out",
     "tucker_compose_out(Tensor core, Tensor[] factors, Tensor[] base, float scale, Tensor(a!) out) -> ()",
     shim_tucker_compose_out},
    {"tucker_compose_backward",
     "tucker_compose_backward(Tensor dout, Tensor core, Tensor[] factors, float scale, int need) -> Tensor",
     shim_tucker_compose_backward},
    {"tucker_linear_",
     "tucker_linear_(Tensor(a!) y, Tensor x, Tensor core, Tensor u, Tensor v, Tensor seed, float scale, float dropout)"
     " -> ()",
     shim_tucker_linear},
    {"tucker_linear_backward",
     "tucker_linear_backward(Tensor(a!) dx, Tensor dy, Tensor x, Tensor core, Tensor u, Tensor v, Tensor seed,"
     " float scale, float dropout, int need) -> Tensor",
     shim_tucker_linear_backward},
    {"tucker_project",
     "tucker_project(Tensor x, Tensor f, Tensor w, Tensor seed, float dropout, bool last, bool need_z, bool need_df)"
     " -> (Tensor z, Tensor df)",
     shim_tucker_project},
    {"tucker_expand_", "tucker_expand_(Tensor(a!) x, Tensor z, Tensor f, Tensor seed, float dropout, bool last) -> ()",
     shim_tucker_expand},
    {"depthwise", "depthwise(Tensor x, Tensor dy, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
     shim_depthwise},
    {"coding_rate",
     "coding_rate(Tensor z, Tensor order, Tensor start, float eps, bool keep) -> (Tensor rate, Tensor factor)",
     shim_coding_rate},
    {"coding_rate_backward",
     "coding_rate_backward(Tensor drate, Tensor z, Tensor order, Tensor start, Tensor factor, float eps) -> Tensor",
     shim_coding_rate_backward},
    {"coding_rate_soft",
     "coding_rate_soft(Tensor z, Tensor weights, float eps, bool keep) -> (Tensor rate, Tensor inverse, Tensor stats)",
     shim_coding_rate_soft},
    {"coding_rate_soft_backward",
     "coding_rate_soft_backward(Tensor drate, Tensor z, Tensor weights, Tensor inverse, Tensor stats, float eps,"
     " bool need_dz, bool need_dweights) -> (Tensor dz, Tensor dweights)",
     shim_coding_rate_soft_backward},
    {"sinkhorn",
     "sinkhorn(Tensor scores, Tensor row, Tensor col, float eta, float tol, int max_iter, int symmetric,"
     " int half_steps) -> (Tensor plan, Tensor error, Tensor sweeps)",
     shim_sinkhorn},
    {"sinkhorn_backward",
     "sinkhorn_backward(Tensor dplan, Tensor plan, Tensor row, Tensor col, float eta, int symmetric, int half_steps,"
     " bool need_dscores, bool need_drow, bool need_dcol) -> (Tensor dscores, Tensor drow, Tensor dcol)",
     shim_sinkhorn_backward},
};

enum { OPS = sizeof ops / sizeof *ops };

static AOTITorchError add_kernels(const char *key)
{
    TorchLibraryHandle library = NULL;
    AOTITorchError error = aoti_torch_library_init_impl("torch_subspace", key, __FILE__, __LINE__, &library);
    for (int i = 0; i < OPS && !error; i++)
        error = torch_library_impl(library, ops[i].name, ops[i].fn, TORCH_STABLE_VERSION);
    return error;
}

static int status = -1; /* 0 once everything is registered */

#ifdef SUBSPACE_DEVICE_CUDA

EXPORT int torch_subspace_cuda_status(void)
{
    return status;
}

EXPORT int torch_subspace_cuda_version(void)
{
    return SUBSPACE_CUDA_VERSION; /* of the toolkit, e.g. 13000 */
}

__attribute__((constructor)) static void load(void)
{
    status = add_kernels("CUDA");
}

#else

EXPORT int torch_subspace_cpu_status(void)
{
    return status;
}

EXPORT const char *torch_subspace_cpu_isa(void)
{
    return subspace_cpu_isa();
}

EXPORT const char *torch_subspace_cpu_isa_available(void)
{
    return subspace_cpu_isa_available();
}

EXPORT const char *torch_subspace_cpu_blas(void)
{
    return linalg_version();
}

/* From torch 2.12 on a schema can say that it is safe under torch.compile; before, that is assumed. */
static AOTITorchError define(TorchLibraryHandle library, const char *schema)
{
    __typeof__(&torch_library_def_with_tags) with_tags = dlsym(RTLD_DEFAULT, "torch_library_def_with_tags");
    __typeof__(&torch_tag_pt2_compliant_tag) compliant = dlsym(RTLD_DEFAULT, "torch_tag_pt2_compliant_tag");
    if (!with_tags || !compliant) return aoti_torch_library_def(library, schema);
    const int32_t tag = compliant();
    return with_tags(library, schema, &tag, 1);
}

__attribute__((constructor)) static void load(void)
{
    TorchLibraryHandle library = NULL;
    subspace_cpu_init();
    status = aoti_torch_library_init_def("torch_subspace", __FILE__, __LINE__, &library);
    for (int i = 0; i < OPS && !status; i++) status = define(library, ops[i].schema);
    if (!status) status = add_kernels("CPU");
}

#endif
