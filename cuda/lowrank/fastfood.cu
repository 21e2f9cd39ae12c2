#include "cuda.cuh"
extern "C" size_t subspace_fastfood_workspace_cuda(const subspace_ctx *, const subspace_fastfood_args *) { return 0; }
extern "C" subspace_status subspace_fastfood_cuda(subspace_ctx *, const subspace_fastfood_args *) { return SUBSPACE_OK; }
extern "C" subspace_status subspace_fastfood_adjoint_cuda(subspace_ctx *, const subspace_fastfood_args *) { return SUBSPACE_OK; }
