/* cross_entropy.c - torch.ops.torch_subspace.cross_entropy and its backward. */
#include "shim.h"

/* target: int64 [b] or [b, c] of the loss's dtype; class_weight: float64 [c], or empty for ones. */
static bool target_args(call *c, const tensor *x, const tensor *target, const tensor *class_weight,
                        subspace_cross_entropy_args *a)
{
    const bool labels = target->dtype == aoti_torch_dtype_int64();
    if (!require(c,
                 labels ? target->dim == 1 && target->numel == a->f.b
                        : target->dtype == wide_dtype(x) && target->numel == a->f.b * a->f.c,
                 "target must be int64 [b] or [b, c] of the loss's dtype, with b=%lld, c=%lld", (long long)a->f.b,
                 (long long)a->f.c) ||
        !require(c,
                 class_weight->numel == 0 ||
                     (class_weight->numel == a->f.c && class_weight->dtype == aoti_torch_dtype_float64()),
                 "class_weight must be float64 [c], c=%lld", (long long)a->f.c) ||
        !require(c, together(x, target) && (class_weight->numel == 0 || together(x, class_weight)),
                 "x, target and class_weight are on different devices"))
        return false;
    if (labels) a->label = target->data;
    else a->soft = target->data;
    a->class_weight = class_weight->numel ? class_weight->data : NULL;
    return true;
}

OP(cross_entropy,
   "cross_entropy(Tensor x, Tensor weight, Tensor start, Tensor target, Tensor class_weight, float gamma,"
   " bool normalize, int ignore_index, float label_smoothing, int classes) -> (Tensor loss, Tensor stats)")
{
    call c = begin("cross_entropy");
    tensor x = {0}, weight = {0}, start = {0}, target = {0}, class_weight = {0}, loss = {0}, stats = {0};
    subspace_cross_entropy_args a = {.f = {.gamma = as_double(stack[5]), .normalize = as_bool(stack[6])},
                                     .ignore_index = as_int(stack[7]),
                                     .label_smoothing = as_double(stack[8]),
                                     .classes = as_int(stack[9])};
    bool taken = tensor_in(&c, stack[0], &x);
    taken &= tensor_in(&c, stack[1], &weight);
    taken &= tensor_in(&c, stack[2], &start);
    taken &= tensor_in(&c, stack[3], &target);
    taken &= tensor_in(&c, stack[4], &class_weight);
    DO(taken && logits_args(&c, &x, &weight, &start, &a.f) && target_args(&c, &x, &target, &class_weight, &a));
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &loss, 1, &a.f.b, wide_dtype(&x), &x));
    DO(tensor_empty(&c, &stats, 2, (int64_t[]){2, a.f.b}, wide_dtype(&x), &x));
    a.loss = loss.data, a.stats = stats.data;
    DO(workspace(&c, ON(subspace_cross_entropy_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_cross_entropy)(&c.ctx, &a));
done:
    finish(&c, stack, 2, (tensor *const[]){&loss, &stats});
}

OP(cross_entropy_backward,
   "cross_entropy_backward(Tensor dloss, Tensor x, Tensor weight, Tensor start, Tensor target, Tensor class_weight,"
   " Tensor stats, float gamma, bool normalize, int ignore_index, float label_smoothing, int classes, bool need_dx,"
   " bool need_dweight) -> (Tensor dx, Tensor dweight)")
{
    call c = begin("cross_entropy_backward");
    tensor dloss = {0}, x = {0}, weight = {0}, start = {0}, target = {0}, class_weight = {0}, stats = {0}, dx = {0},
           dweight = {0};
    subspace_cross_entropy_args a = {.f = {.gamma = as_double(stack[7]), .normalize = as_bool(stack[8])},
                                     .ignore_index = as_int(stack[9]),
                                     .label_smoothing = as_double(stack[10]),
                                     .classes = as_int(stack[11])};
    const bool need_dx = as_bool(stack[12]), need_dweight = as_bool(stack[13]);
    bool taken = tensor_in(&c, stack[0], &dloss);
    taken &= tensor_in(&c, stack[1], &x);
    taken &= tensor_in(&c, stack[2], &weight);
    taken &= tensor_in(&c, stack[3], &start);
    taken &= tensor_in(&c, stack[4], &target);
    taken &= tensor_in(&c, stack[5], &class_weight);
    taken &= tensor_in(&c, stack[6], &stats);
    DO(taken && logits_args(&c, &x, &weight, &start, &a.f) && target_args(&c, &x, &target, &class_weight, &a));
    DO(require(&c,
               dloss.numel == a.f.b && dloss.dtype == wide_dtype(&x) && stats.numel == 2 * a.f.b &&
                   stats.dtype == wide_dtype(&x) && together(&dloss, &x) && together(&stats, &x),
               "dloss or stats does not match the forward"));
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &dx, x.dim, need_dx ? x.size : (int64_t[]){0, 0}, x.dtype, &x));
    DO(tensor_empty(&c, &dweight, weight.dim, need_dweight ? weight.size : (int64_t[]){0, 0, 0}, x.dtype, &x));
    a.dloss = dloss.data, a.stats = stats.data;
    a.f.dx = need_dx ? dx.data : NULL, a.f.dweight = need_dweight ? dweight.data : NULL;
    DO(workspace(&c, ON(subspace_cross_entropy_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_cross_entropy_backward)(&c.ctx, &a));
done:
    finish(&c, stack, 2, (tensor *const[]){&dx, &dweight});
}
