/* product.c - torch.ops.torch_subspace.product_: y <- scale op(a) op(b) + add y of stacks of matrices, in place. A b of
 * one matrix is for all of a's. */
#include "shim.h"

OP(product, "product_(Tensor(a!) y, Tensor a, Tensor b, bool transa, bool transb, float scale, float add) -> ()")
{
    call c = begin("product_");
    tensor y = {0}, a = {0}, b = {0};
    subspace_product_args p = {.transa = as_bool(stack[3]),
                               .transb = as_bool(stack[4]),
                               .scale = as_double(stack[5]),
                               .add = as_double(stack[6])};
    bool taken = tensor_inout(&c, stack[0], &y);
    taken &= tensor_in(&c, stack[1], &a);
    taken &= tensor_in(&c, stack[2], &b);
    DO(taken && require(&c, y.dim == 3 && a.dim == 3 && b.dim == 3,
                        "expected stacks of matrices: y [v, m, n], a [v, m, k] and b [v or 1, k, n]"));
    p.v = y.size[0], p.m = y.size[1], p.n = y.size[2], p.k = a.size[1 + !p.transa];
    p.shared = b.size[0] == 1;
    DO(require(&c,
               a.size[0] == p.v && a.size[1 + p.transa] == p.m && b.size[1 + p.transb] == p.k &&
                   b.size[1 + !p.transb] == p.n && (p.shared || b.size[0] == p.v),
               "y [%lld, %lld, %lld] does not fit a [%lld, %lld, %lld]%s and b [%lld, %lld, %lld]%s", (long long)p.v,
               (long long)p.m, (long long)p.n, (long long)a.size[0], (long long)a.size[1], (long long)a.size[2],
               p.transa ? " transposed" : "", (long long)b.size[0], (long long)b.size[1], (long long)b.size[2],
               p.transb ? " transposed" : ""));
    DO(require(&c, y.dtype == a.dtype && y.dtype == b.dtype && y.dtype == wide_dtype(&y),
               "y, a and b must all be float32 or all float64"));
    DO(require(&c, together(&y, &a) && together(&y, &b), "the tensors are on different devices"));
    p.dtype = (subspace_dtype)dtype_of(&y), p.a = a.data, p.b = b.data, p.y = y.data;
    DO(on_device_of(&c, &y));
    DO(workspace(&c, ON(subspace_product_workspace)(&c.ctx, &p), &y));
    run(&c, ON(subspace_product)(&c.ctx, &p));
done:
    finish(&c, stack, 0, NULL);
}
