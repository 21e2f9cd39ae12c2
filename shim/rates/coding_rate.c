/* coding_rate.c - torch.ops.torch_subspace.coding_rate and its backward. */
#include "shim.h"

/* z [v, n, d]; order [v, n] and start [v, n+1], or both empty: one group. */
static bool rate_args(call *c, const tensor *z, const tensor *order, const tensor *start, subspace_coding_rate_args *a)
{
    const int32_t integer = aoti_torch_dtype_int64();
    if (!require(c, z->dim == 3, "z must be [v, n, d], got %lld dimensions", (long long)z->dim) ||
        !require(c, dtype_of(z) == SUBSPACE_F32 || dtype_of(z) == SUBSPACE_F64, "z must be float32 or float64"))
        return false;
    a->dtype = (subspace_dtype)dtype_of(z);
    a->v = z->size[0], a->n = z->size[1], a->d = z->size[2];
    const bool whole = order->dim == 1 && order->numel == 0 && start->dim == 1 && start->numel == 0;
    if (!require(c, order->dtype == integer && start->dtype == integer, "order and start must be int64") ||
        !require(c,
                 order->device == z->device && order->index == z->index && start->device == z->device &&
                     start->index == z->index,
                 "z, order and start are on different devices") ||
        !require(c,
                 whole || (order->dim == 2 && order->size[0] == a->v && order->size[1] == a->n && start->dim == 2 &&
                           start->size[0] == a->v && start->size[1] == a->n + 1),
                 "order must be [%lld, %lld] and start [%lld, %lld], or both empty", (long long)a->v, (long long)a->n,
                 (long long)a->v, (long long)a->n + 1))
        return false;
    if (!whole) a->order = order->data, a->start = start->data;
    a->z = z->data;
    return true;
}

OP(coding_rate,
   "coding_rate(Tensor z, Tensor order, Tensor start, float eps, bool keep) -> (Tensor rate, Tensor factor)")
{
    call c = begin("coding_rate");
    tensor z = {0}, order = {0}, start = {0}, rate = {0}, factor = {0};
    subspace_coding_rate_args a = {.eps = as_double(stack[3])};
    const bool keep = as_bool(stack[4]);
    bool taken = tensor_in(&c, stack[0], &z);
    taken &= tensor_in(&c, stack[1], &order);
    taken &= tensor_in(&c, stack[2], &start);
    DO(taken && rate_args(&c, &z, &order, &start, &a));
    DO(run(&c, subspace_coding_rate_check(&c.ctx, &a))); /* before its sizes are used */
    DO(on_device_of(&c, &z));
    DO(tensor_empty(&c, &rate, 1, &a.v, z.dtype, &z));
    DO(tensor_empty(&c, &factor, 2, (int64_t[]){a.v, keep ? subspace_coding_rate_factor(&a) : 0}, z.dtype, &z));
    a.rate = rate.data, a.factor = keep ? factor.data : NULL;
    DO(workspace(&c, ON(subspace_coding_rate_workspace)(&c.ctx, &a), &z));
    run(&c, ON(subspace_coding_rate)(&c.ctx, &a));
done:
    finish(&c, stack, 2, (tensor *const[]){&rate, &factor});
}

OP(coding_rate_backward,
   "coding_rate_backward(Tensor drate, Tensor z, Tensor order, Tensor start, Tensor factor, float eps) -> Tensor")
{
    call c = begin("coding_rate_backward");
    tensor drate = {0}, z = {0}, order = {0}, start = {0}, factor = {0}, dz = {0};
    subspace_coding_rate_args a = {.eps = as_double(stack[5])};
    bool taken = tensor_in(&c, stack[0], &drate);
    taken &= tensor_in(&c, stack[1], &z);
    taken &= tensor_in(&c, stack[2], &order);
    taken &= tensor_in(&c, stack[3], &start);
    taken &= tensor_in(&c, stack[4], &factor);
    DO(taken && rate_args(&c, &z, &order, &start, &a));
    DO(run(&c, subspace_coding_rate_check(&c.ctx, &a)));
    DO(require(&c, drate.dim == 1 && drate.numel == a.v && drate.dtype == z.dtype && factor.dtype == z.dtype,
               "drate must be [%lld] and, as factor, of z's dtype", (long long)a.v));
    DO(require(&c, factor.numel == 0 || factor.numel == a.v * subspace_coding_rate_factor(&a),
               "factor of %lld entries is not the forward's", (long long)factor.numel));
    DO(require(&c, drate.device == z.device && factor.device == z.device, "drate or factor is on another device"));
    DO(on_device_of(&c, &z));
    DO(tensor_empty(&c, &dz, z.dim, z.size, z.dtype, &z));
    a.drate = drate.data, a.factor = factor.numel ? factor.data : NULL, a.dz = dz.data;
    DO(workspace(&c, ON(subspace_coding_rate_workspace)(&c.ctx, &a), &z));
    run(&c, ON(subspace_coding_rate_backward)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&dz});
}
