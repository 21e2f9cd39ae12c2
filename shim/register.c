/* register.c - hands torch every op's schema, and the kernels of the device this file is compiled for.
 *
 * A constructor cannot throw, so it leaves a status that ops/library.py reads. Handles are kept for
 * the life of the process. The CPU library owns the schemas; the CUDA one only adds kernels. */
#include "shim.h"
#include <string.h>
#ifndef SUBSPACE_DEVICE_CUDA
#include "dispatch.h"
#include "linalg.h"
#endif

#define EXPORT __attribute__((visibility("default")))

/* What OP() left in every shim, gathered by the linker. */
extern const op __start_subspace_ops[], __stop_subspace_ops[];

static AOTITorchError add_kernels(const char *key)
{
    TorchLibraryHandle library = NULL;
    AOTITorchError error = aoti_torch_library_init_impl("torch_subspace", key, __FILE__, __LINE__, &library);
    for (const op *o = __start_subspace_ops; o != __stop_subspace_ops && !error; o++) {
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)strcspn(o->schema, "("), o->schema);
        error = torch_library_impl(library, name, o->fn, TORCH_STABLE_VERSION);
    }
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

EXPORT bool torch_subspace_cpu_intel(void)
{
    return subspace_cpu_intel();
}

EXPORT void torch_subspace_cpu_split(bool may)
{
    subspace_cpu_split(may);
}

EXPORT const char *torch_subspace_cpu_blas(void)
{
    return linalg_version();
}

/* From torch 2.12 on a schema can say that it is safe under torch.compile; before, that is assumed. */
static AOTITorchError define(TorchLibraryHandle library, const char *schema)
{
    if (!torch_library_def_with_tags || !torch_tag_pt2_compliant_tag) return aoti_torch_library_def(library, schema);
    const int32_t tag = torch_tag_pt2_compliant_tag();
    return torch_library_def_with_tags(library, schema, &tag, 1);
}

__attribute__((constructor)) static void load(void)
{
    TorchLibraryHandle library = NULL;
    subspace_cpu_init();
    status = aoti_torch_library_init_def("torch_subspace", __FILE__, __LINE__, &library);
    for (const op *o = __start_subspace_ops; o != __stop_subspace_ops && !status; o++)
        status = define(library, o->schema);
    if (!status) status = add_kernels("CPU");
}

#endif
