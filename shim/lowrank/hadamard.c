/* hadamard.c - torch.ops.torch_subspace.hadamard: it is its own backward, up to the scale's being the same. */
#include "shim.h"

OP(hadamard, "hadamard(Tensor x, float scale) -> Tensor")
{
    call c = begin("hadamard");
    tensor x = {0}, y = {0};
    subspace_hadamard_args a = {.scale = as_double(stack[1])};
    DO(tensor_in(&c, stack[0], &x));
    DO(require(&c, x.dim == 2 && dtype_of(&x) >= 0, "expected a floating x [v, n]"));
    a.dtype = (subspace_dtype)dtype_of(&x), a.v = x.size[0], a.n = x.size[1], a.x = x.data;
    DO(run(&c, subspace_hadamard_check(&c.ctx, &a))); /* before its sizes are used */
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &y, 2, x.size, x.dtype, &x));
    a.y = y.data;
    DO(workspace(&c, ON(subspace_hadamard_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_hadamard)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&y});
}
