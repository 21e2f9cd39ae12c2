/* sigreg.c - torch.ops.torch_subspace.sigreg and its backward. */
#include "shim.h"

/* z [v, n, d], directions [d, s] */
static bool sigreg_args(call *c, const tensor *z, const tensor *directions, subspace_sigreg_args *a)
{
    if (!require(c, z->dim == 3 && directions->dim == 2 && directions->size[0] == z->size[2],
                 "expected z [v, n, d] and directions [d, s]") ||
        !require(c, dtype_of(z) >= 0 && directions->dtype == wide_dtype(z),
                 "z must be floating and directions float64 for float64, else float32") ||
        !require(c, together(z, directions), "z and directions are on different devices"))
        return false;
    a->dtype = (subspace_dtype)dtype_of(z);
    a->v = z->size[0], a->n = z->size[1], a->d = z->size[2], a->s = directions->size[1];
    a->z = z->data, a->directions = directions->data;
    return true;
}

OP(sigreg, "sigreg(Tensor z, Tensor directions, int knots, float step) -> Tensor")
{
    call c = begin("sigreg");
    tensor z = {0}, directions = {0}, off = {0};
    subspace_sigreg_args a = {.knots = as_int(stack[2]), .step = as_double(stack[3])};
    bool taken = tensor_in(&c, stack[0], &z);
    taken &= tensor_in(&c, stack[1], &directions);
    DO(taken && sigreg_args(&c, &z, &directions, &a));
    DO(run(&c, subspace_sigreg_check(&c.ctx, &a))); /* before its sizes are used */
    DO(on_device_of(&c, &z));
    DO(tensor_empty(&c, &off, 4, (int64_t[]){a.v, 2, a.knots - 1, a.s}, aoti_torch_dtype_float64(), &z));
    a.off = off.data;
    DO(workspace(&c, ON(subspace_sigreg_workspace)(&c.ctx, &a), &z));
    run(&c, ON(subspace_sigreg)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&off});
}

OP(sigreg_backward, "sigreg_backward(Tensor doff, Tensor z, Tensor directions, float step) -> Tensor")
{
    call c = begin("sigreg_backward");
    tensor doff = {0}, z = {0}, directions = {0}, dz = {0};
    subspace_sigreg_args a = {.step = as_double(stack[3])};
    bool taken = tensor_in(&c, stack[0], &doff);
    taken &= tensor_in(&c, stack[1], &z);
    taken &= tensor_in(&c, stack[2], &directions);
    DO(taken && sigreg_args(&c, &z, &directions, &a));
    DO(require(&c,
               doff.dim == 4 && doff.size[0] == a.v && doff.size[1] == 2 && doff.size[3] == a.s &&
                   doff.dtype == aoti_torch_dtype_float64() && together(&doff, &z),
               "doff must be float64 [%lld, 2, knots - 1, %lld], beside z", (long long)a.v, (long long)a.s));
    a.knots = doff.size[2] + 1;
    DO(run(&c, subspace_sigreg_check(&c.ctx, &a)));
    DO(on_device_of(&c, &z));
    DO(tensor_empty(&c, &dz, z.dim, z.size, z.dtype, &z));
    a.doff = doff.data, a.dz = dz.data;
    DO(workspace(&c, ON(subspace_sigreg_workspace)(&c.ctx, &a), &z));
    run(&c, ON(subspace_sigreg_backward)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&dz});
}
