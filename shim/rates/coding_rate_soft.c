/* coding_rate_soft.c - torch.ops.torch_subspace.coding_rate_soft and its backward. */
#include "shim.h"

/* z [v, n, d] and weights [v, n, k] */
static bool soft_args(call *c, const tensor *z, const tensor *weights, subspace_coding_rate_soft_args *a)
{
    if (!require(c, z->dim == 3 && weights->dim == 3, "expected z [v, n, d] and weights [v, n, k]") ||
        !require(c, z->size[0] == weights->size[0] && z->size[1] == weights->size[1],
                 "weights [%lld, %lld, ...] are not of z [%lld, %lld, ...]", (long long)weights->size[0],
                 (long long)weights->size[1], (long long)z->size[0], (long long)z->size[1]) ||
        !require(c, z->dtype == weights->dtype && dtype_of(z) >= 0 && z->dtype == wide_dtype(z),
                 "z and weights must both be float32 or both float64") ||
        !require(c, z->device == weights->device && z->index == weights->index,
                 "z and weights are on different devices"))
        return false;
    a->dtype = (subspace_dtype)dtype_of(z);
    a->v = z->size[0], a->n = z->size[1], a->d = z->size[2], a->k = weights->size[2];
    a->z = z->data, a->weights = weights->data;
    return run(c, subspace_coding_rate_soft_check(&c->ctx, a)); /* before its sizes are used */
}

OP(coding_rate_soft,
   "coding_rate_soft(Tensor z, Tensor weights, float eps, bool keep) -> (Tensor rate, Tensor inverse, Tensor stats)")
{
    call c = begin("coding_rate_soft");
    tensor z = {0}, weights = {0}, rate = {0}, inverse = {0}, stats = {0};
    subspace_coding_rate_soft_args a = {.eps = as_double(stack[2])};
    const bool keep = as_bool(stack[3]);
    bool taken = tensor_in(&c, stack[0], &z);
    taken &= tensor_in(&c, stack[1], &weights);
    DO(taken && soft_args(&c, &z, &weights, &a));
    DO(on_device_of(&c, &z));
    DO(tensor_empty(&c, &rate, 1, &a.v, z.dtype, &z));
    DO(tensor_empty(&c, &inverse, 3, keep ? (int64_t[]){a.v, a.k, a.d * (a.d + 1) / 2} : (int64_t[]){0, 0, 0}, z.dtype,
                    &z));
    DO(tensor_empty(&c, &stats, 3, keep ? (int64_t[]){a.v, 2, a.k} : (int64_t[]){0, 0, 0}, z.dtype, &z));
    a.rate = rate.data;
    if (keep) a.inverse = inverse.data, a.stats = stats.data;
    DO(workspace(&c, ON(subspace_coding_rate_soft_workspace)(&c.ctx, &a), &z));
    run(&c, ON(subspace_coding_rate_soft)(&c.ctx, &a));
done:
    finish(&c, stack, 3, (tensor *const[]){&rate, &inverse, &stats});
}

/* Without inverse and stats the forward is done again. */
OP(coding_rate_soft_backward,
   "coding_rate_soft_backward(Tensor drate, Tensor z, Tensor weights, Tensor inverse, Tensor stats, float eps,"
   " bool need_dz, bool need_dweights) -> (Tensor dz, Tensor dweights)")
{
    call c = begin("coding_rate_soft_backward");
    tensor drate = {0}, z = {0}, weights = {0}, inverse = {0}, stats = {0}, dz = {0}, dweights = {0};
    subspace_coding_rate_soft_args a = {.eps = as_double(stack[5])};
    const bool need_dz = as_bool(stack[6]), need_dweights = as_bool(stack[7]);
    const int64_t none[3] = {0, 0, 0};
    bool taken = tensor_in(&c, stack[0], &drate);
    taken &= tensor_in(&c, stack[1], &z);
    taken &= tensor_in(&c, stack[2], &weights);
    taken &= tensor_in(&c, stack[3], &inverse);
    taken &= tensor_in(&c, stack[4], &stats);
    DO(taken && soft_args(&c, &z, &weights, &a));
    DO(require(&c, drate.numel == a.v && drate.dtype == z.dtype, "drate does not have the rates' shape"));
    const bool kept = inverse.numel > 0;
    DO(require(&c,
               !kept || (inverse.numel == a.v * a.k * (a.d * (a.d + 1) / 2) && stats.numel == a.v * 2 * a.k &&
                         inverse.dtype == z.dtype && stats.dtype == z.dtype),
               "inverse and stats are not the forward's"));
    DO(on_device_of(&c, &z));
    DO(tensor_empty(&c, &dz, 3, need_dz ? z.size : none, z.dtype, &z));
    DO(tensor_empty(&c, &dweights, 3, need_dweights ? weights.size : none, z.dtype, &z));
    a.drate = drate.data;
    a.inverse = kept ? inverse.data : NULL, a.stats = kept ? stats.data : NULL;
    a.dz = need_dz ? dz.data : NULL, a.dweights = need_dweights ? dweights.data : NULL;
    DO(workspace(&c, ON(subspace_coding_rate_soft_workspace)(&c.ctx, &a), &z));
    run(&c, ON(subspace_coding_rate_soft_backward)(&c.ctx, &a));
done:
    finish(&c, stack, 2, (tensor *const[]){&dz, &dweights});
}
