/* fastfood.c - torch.ops.torch_subspace.fastfood and fastfood_adjoint: each is the other's backward. */
#include "shim.h"

/* x [v, n] and what it becomes, [v, size] */
static bool fastfood_args(call *c, const tensor *x, subspace_fastfood_args *a)
{
    if (!require(c, x->dim == 2 && dtype_of(x) >= 0, "expected a floating [v, n]")) return false;
    a->dtype = (subspace_dtype)dtype_of(x), a->v = x->size[0];
    return true;
}

OP(fastfood, "fastfood(Tensor theta, int size, int seed) -> Tensor")
{
    call c = begin("fastfood");
    tensor theta = {0}, out = {0};
    const int64_t size = as_int(stack[1]);
    subspace_fastfood_args a = {.m = size, .seed = as_int(stack[2])};
    DO(tensor_in(&c, stack[0], &theta));
    DO(fastfood_args(&c, &theta, &a));
    a.d = theta.size[1], a.theta = theta.data;
    DO(run(&c, subspace_fastfood_check(&c.ctx, &a))); /* before its sizes are used */
    DO(on_device_of(&c, &theta));
    DO(tensor_empty(&c, &out, 2, (int64_t[]){a.v, a.m}, theta.dtype, &theta));
    a.out = out.data;
    DO(workspace(&c, ON(subspace_fastfood_workspace)(&c.ctx, &a), &theta));
    run(&c, ON(subspace_fastfood)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&out});
}

OP(fastfood_adjoint, "fastfood_adjoint(Tensor x, int size, int seed) -> Tensor")
{
    call c = begin("fastfood_adjoint");
    tensor x = {0}, dtheta = {0};
    const int64_t size = as_int(stack[1]);
    subspace_fastfood_args a = {.d = size, .seed = as_int(stack[2])};
    DO(tensor_in(&c, stack[0], &x));
    DO(fastfood_args(&c, &x, &a));
    a.m = x.size[1], a.dout = x.data;
    DO(run(&c, subspace_fastfood_check(&c.ctx, &a)));
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &dtheta, 2, (int64_t[]){a.v, a.d}, x.dtype, &x));
    a.dtheta = dtheta.data;
    DO(workspace(&c, ON(subspace_fastfood_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_fastfood_adjoint)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&dtheta});
}
