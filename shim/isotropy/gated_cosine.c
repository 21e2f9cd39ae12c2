/* gated_cosine.c - torch.ops.torch_subspace.gated_cosine and its backward. */
#include "shim.h"

/* z1 and gate [v, b, k], z2 [v, n, k] */
static bool gated_args(call *c, const tensor *z1, const tensor *z2, const tensor *gate, subspace_gated_cosine_args *a)
{
    if (!require(c,
                 z1->dim == 3 && z2->dim == 3 && gate->dim == 3 && z2->size[0] == z1->size[0] &&
                     z2->size[2] == z1->size[2] && gate->size[0] == z1->size[0] && gate->size[1] == z1->size[1] &&
                     gate->size[2] == z1->size[2],
                 "expected z1 and gate [v, b, k] and z2 [v, n, k]") ||
        !require(c,
                 dtype_of(z1) >= 0 && z1->dtype == wide_dtype(z1) && z2->dtype == z1->dtype && gate->dtype == z1->dtype,
                 "z1, z2 and gate must all be float32 or all float64") ||
        !require(c, together(z1, z2) && together(z1, gate), "z1, z2 and gate are on different devices"))
        return false;
    a->dtype = (subspace_dtype)dtype_of(z1);
    a->v = z1->size[0], a->b = z1->size[1], a->n = z2->size[1], a->k = z1->size[2];
    a->z1 = z1->data, a->z2 = z2->data, a->gate = gate->data;
    return run(c, subspace_gated_cosine_check(&c->ctx, a)); /* before its sizes are used */
}

OP(gated_cosine, "gated_cosine(Tensor z1, Tensor z2, Tensor gate) -> (Tensor cosine, Tensor inverse)")
{
    call c = begin("gated_cosine");
    tensor z1 = {0}, z2 = {0}, gate = {0}, cosine = {0}, inverse = {0};
    subspace_gated_cosine_args a = {0};
    bool taken = tensor_in(&c, stack[0], &z1);
    taken &= tensor_in(&c, stack[1], &z2);
    taken &= tensor_in(&c, stack[2], &gate);
    DO(taken && gated_args(&c, &z1, &z2, &gate, &a));
    DO(on_device_of(&c, &z1));
    DO(tensor_empty(&c, &cosine, 3, (int64_t[]){a.v, a.b, a.n}, z1.dtype, &z1));
    DO(tensor_empty(&c, &inverse, 3, (int64_t[]){a.v, a.b, a.n}, z1.dtype, &z1));
    a.cosine = cosine.data, a.inverse = inverse.data;
    DO(workspace(&c, ON(subspace_gated_cosine_workspace)(&c.ctx, &a), &z1));
    run(&c, ON(subspace_gated_cosine)(&c.ctx, &a));
done:
    finish(&c, stack, 2, (tensor *const[]){&cosine, &inverse});
}

/* dz1 and dgate have two products in common, and dz2 two of its own: what nobody needs is empty. */
OP(gated_cosine_backward,
   "gated_cosine_backward(Tensor dcosine, Tensor z1, Tensor z2, Tensor gate, Tensor cosine, Tensor inverse,"
   " bool need_gates, bool need_points) -> (Tensor dz1, Tensor dz2, Tensor dgate)")
{
    call c = begin("gated_cosine_backward");
    tensor dcosine = {0}, z1 = {0}, z2 = {0}, gate = {0}, cosine = {0}, inverse = {0};
    tensor dz1 = {0}, dz2 = {0}, dgate = {0};
    subspace_gated_cosine_args a = {0};
    const bool need_gates = as_bool(stack[6]), need_points = as_bool(stack[7]);
    const int64_t none[3] = {0, 0, 0};
    bool taken = tensor_in(&c, stack[0], &dcosine);
    taken &= tensor_in(&c, stack[1], &z1);
    taken &= tensor_in(&c, stack[2], &z2);
    taken &= tensor_in(&c, stack[3], &gate);
    taken &= tensor_in(&c, stack[4], &cosine);
    taken &= tensor_in(&c, stack[5], &inverse);
    DO(taken && gated_args(&c, &z1, &z2, &gate, &a));
    const tensor *pairs[] = {&dcosine, &cosine, &inverse};
    for (int i = 0; i < 3; i++)
        DO(require(&c, pairs[i]->numel == a.v * a.b * a.n && pairs[i]->dtype == z1.dtype && together(pairs[i], &z1),
                   "dcosine, cosine and inverse must be [%lld, %lld, %lld] of z1's dtype, beside z1", (long long)a.v,
                   (long long)a.b, (long long)a.n));
    DO(on_device_of(&c, &z1));
    DO(tensor_empty(&c, &dz1, 3, need_gates ? z1.size : none, z1.dtype, &z1));
    DO(tensor_empty(&c, &dz2, 3, need_points ? z2.size : none, z1.dtype, &z1));
    DO(tensor_empty(&c, &dgate, 3, need_gates ? z1.size : none, z1.dtype, &z1));
    a.dcosine = dcosine.data, a.cosine = cosine.data, a.inverse = inverse.data;
    if (need_gates) a.dz1 = dz1.data, a.dgate = dgate.data;
    if (need_points) a.dz2 = dz2.data;
    DO(workspace(&c, ON(subspace_gated_cosine_workspace)(&c.ctx, &a), &z1));
    run(&c, ON(subspace_gated_cosine_backward)(&c.ctx, &a));
done:
    finish(&c, stack, 3, (tensor *const[]){&dz1, &dz2, &dgate});
}
