/* depthwise.c - torch.ops.torch_subspace.depthwise: the gradient of a depthwise, or grouped, convolution's weight. */
#include "shim.h"

/* An int[] argument of `count` entries, into the last of three; the list is taken over. */
static bool ints_in(call *c, StableIValue v, int64_t count, const char *what, int64_t *to)
{
    StableListHandle l = (StableListHandle)(uintptr_t)v;
    StableIValue item = 0;
    size_t size = 0;
    bool ok = torch_list_size(l, &size) == 0 && size == (size_t)count;
    for (size_t i = 0; ok && i < size; i++) {
        ok = torch_list_get_item(l, i, &item) == 0;
        if (ok) to[3 - size + i] = as_int(item);
    }
    torch_delete_list(l);
    return require(c, ok, "%s must have %lld entries", what, (long long)count);
}

OP(depthwise, "depthwise(Tensor x, Tensor dy, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups)"
              " -> Tensor")
{
    call c = begin("depthwise");
    tensor x = {0}, dy = {0}, dweight = {0};
    subspace_depthwise_args a = {
        .in = {1, 1, 1}, .out = {1, 1, 1}, .kernel = {1, 1, 1}, .stride = {1, 1, 1}, .dilation = {1, 1, 1}};
    bool taken = tensor_in(&c, stack[0], &x);
    taken &= tensor_in(&c, stack[1], &dy);
    const int64_t dims = taken && x.dim >= 3 && x.dim <= 5 ? x.dim - 2 : 0;
    taken &= ints_in(&c, stack[2], dims, "kernel", a.kernel);
    taken &= ints_in(&c, stack[3], dims, "stride", a.stride);
    taken &= ints_in(&c, stack[4], dims, "padding", a.padding);
    taken &= ints_in(&c, stack[5], dims, "dilation", a.dilation);
    DO(taken && require(&c, dims > 0 && dy.dim == x.dim, "expected x [b, c, ...] and dy of one to three dimensions"));
    DO(require(&c, x.dtype == dy.dtype && dtype_of(&x) >= 0, "x and dy must share a floating dtype"));
    DO(require(&c, x.device == dy.device && x.index == dy.index, "x and dy are on different devices"));
    const int64_t groups = as_int(stack[6]);
    a.c = groups;
    const bool fit = a.c > 0 ? x.size[1] % a.c == 0 && dy.size[1] % a.c == 0 && x.size[1] > 0 && dy.size[1] > 0
                             : a.c == 0 && x.size[1] == 0 && dy.size[1] == 0;
    DO(require(&c, x.size[0] == dy.size[0] && fit, "dy [%lld, %lld, ...] is not of x [%lld, %lld, ...] in %lld groups",
               (long long)dy.size[0], (long long)dy.size[1], (long long)x.size[0], (long long)x.size[1],
               (long long)a.c));
    a.dtype = (subspace_dtype)dtype_of(&x);
    a.b = x.size[0], a.n = a.c ? x.size[1] / a.c : 1, a.m = a.c ? dy.size[1] / a.c : 1;
    int64_t size[5] = {a.c * a.m, a.n};
    for (int64_t i = 0; i < dims; i++) {
        a.in[3 - dims + i] = x.size[2 + i], a.out[3 - dims + i] = dy.size[2 + i];
        size[2 + i] = a.kernel[3 - dims + i];
    }
    a.x = x.data, a.dy = dy.data;
    DO(run(&c, subspace_depthwise_check(&c.ctx, &a))); /* before its sizes are used */
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &dweight, x.dim, size, wide_dtype(&x), &x));
    a.dweight = dweight.data;
    DO(workspace(&c, ON(subspace_depthwise_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_depthwise)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&dweight});
}
