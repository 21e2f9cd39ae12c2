/* logits.c - torch.ops.torch_subspace.logits and its backward: tensors in, subspace_logits_args out. */
#include "shim.h"

bool logits_args(call *c, const tensor *x, const tensor *weight, const tensor *start, subspace_logits_args *a)
{
    const bool ragged = weight->dim == 2;
    if (!require(c, x->dim == 2 && (weight->dim == 3 || ragged),
                 "expected x [b, n] and weight [c, k, n] or [rows, n]") ||
        !require(c, x->size[1] == weight->size[weight->dim - 1], "x has %lld features but weight has %lld",
                 (long long)x->size[1], (long long)weight->size[weight->dim - 1]) ||
        !require(c, x->dtype == weight->dtype && dtype_of(x) >= 0, "x and weight must share a floating dtype") ||
        !require(c, together(x, weight) && (!ragged || together(x, start)),
                 "x, weight and start are on different devices") ||
        !require(c, !ragged || (start->dtype == aoti_torch_dtype_int64() && start->dim == 1 && start->numel > 0),
                 "a ragged weight needs the int64 starts of its classes"))
        return false;
    a->dtype = (subspace_dtype)dtype_of(x);
    a->b = x->size[0], a->n = x->size[1];
    a->c = ragged ? start->numel - 1 : weight->size[0];
    a->k = ragged ? 0 : weight->size[1];
    a->rows = ragged ? weight->size[0] : a->c * a->k;
    a->start = ragged ? start->data : NULL;
    a->x = x->data, a->weight = weight->data;
#ifndef SUBSPACE_DEVICE_CUDA /* host-readable: never trust them with memory */
    for (int64_t i = 0; ragged && i <= a->c; i++)
        if (!require(c,
                     i == 0 ? a->start[0] == 0 : a->start[i] > a->start[i - 1] && a->start[i] - a->start[i - 1] <= a->n,
                     "class %lld: need 0 < k <= n = %lld", (long long)i - 1, (long long)a->n))
            return false;
    if (ragged && !require(c, a->start[a->c] == a->rows, "the dims sum to %lld but weight has %lld rows",
                           (long long)a->start[a->c], (long long)a->rows))
        return false;
#endif
    return true;
}

OP(logits, "logits(Tensor x, Tensor weight, Tensor start, float gamma, bool normalize, bool keep) -> (Tensor logits,"
           " Tensor proj)")
{
    call c = begin("logits");
    tensor x = {0}, weight = {0}, start = {0}, logits = {0}, proj = {0};
    subspace_logits_args a = {.gamma = as_double(stack[3]), .normalize = as_bool(stack[4])};
    const bool keep = as_bool(stack[5]);
    bool taken = tensor_in(&c, stack[0], &x);
    taken &= tensor_in(&c, stack[1], &weight);
    taken &= tensor_in(&c, stack[2], &start);
    DO(taken && logits_args(&c, &x, &weight, &start, &a));
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &logits, 2, (int64_t[]){a.b, a.c}, x.dtype, &x));
    DO(tensor_empty(&c, &proj, 2, keep ? (int64_t[]){a.rows, a.b} : (int64_t[]){0, 0}, wide_dtype(&x), &x));
    a.logits = logits.data, a.proj = keep ? proj.data : NULL;
    DO(workspace(&c, ON(subspace_logits_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_logits)(&c.ctx, &a));
done:
    finish(&c, stack, 2, (tensor *const[]){&logits, &proj});
}

/* An empty proj is recomputed. */
OP(logits_backward, "logits_backward(Tensor dlogits, Tensor x, Tensor weight, Tensor start, Tensor proj, float gamma,"
                    " bool normalize, bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)")
{
    call c = begin("logits_backward");
    tensor dlogits = {0}, x = {0}, weight = {0}, start = {0}, proj = {0}, dx = {0}, dweight = {0};
    subspace_logits_args a = {.gamma = as_double(stack[5]), .normalize = as_bool(stack[6])};
    const bool need_dx = as_bool(stack[7]), need_dweight = as_bool(stack[8]);
    bool taken = tensor_in(&c, stack[0], &dlogits);
    taken &= tensor_in(&c, stack[1], &x);
    taken &= tensor_in(&c, stack[2], &weight);
    taken &= tensor_in(&c, stack[3], &start);
    taken &= tensor_in(&c, stack[4], &proj);
    DO(taken && logits_args(&c, &x, &weight, &start, &a));
    DO(require(&c, dlogits.numel == a.b * a.c && dlogits.dtype == x.dtype && together(&dlogits, &x),
               "dlogits does not have the logits' shape"));
    DO(require(&c,
               proj.numel == 0 || (proj.numel == a.rows * a.b && proj.dtype == wide_dtype(&x) && together(&proj, &x)),
               "proj is not the forward's"));
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &dx, x.dim, need_dx ? x.size : (int64_t[]){0, 0}, x.dtype, &x));
    DO(tensor_empty(&c, &dweight, weight.dim, need_dweight ? weight.size : (int64_t[]){0, 0, 0}, x.dtype, &x));
    a.dlogits = dlogits.data, a.proj = proj.numel ? proj.data : NULL;
    a.dx = need_dx ? dx.data : NULL, a.dweight = need_dweight ? dweight.data : NULL;
    DO(workspace(&c, ON(subspace_logits_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_logits_backward)(&c.ctx, &a));
done:
    finish(&c, stack, 2, (tensor *const[]){&dx, &dweight});
}
