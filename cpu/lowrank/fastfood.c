#include "cpu.h"
size_t LEVEL(subspace_fastfood_workspace)(const subspace_ctx *ctx, const subspace_fastfood_args *a)
{
    (void)ctx, (void)a;
    return 0;
}
subspace_status LEVEL(subspace_fastfood)(subspace_ctx *ctx, const subspace_fastfood_args *a)
{
    (void)ctx, (void)a;
    return SUBSPACE_OK;
}
subspace_status LEVEL(subspace_fastfood_adjoint)(subspace_ctx *ctx, const subspace_fastfood_args *a)
{
    (void)ctx, (void)a;
    return SUBSPACE_OK;
}
