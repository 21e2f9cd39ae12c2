/* tucker_conv.c - torch.ops.torch_subspace.tucker_project and tucker_expand_: the pointwise ends of a
 * convolution's adapter, x [b, n, p], or [b, p, n] with the channels last. */
#include "shim.h"

static bool conv_args(call *c, const tensor *x, const tensor *f, const tensor *seed, subspace_tucker_conv_args *a)
{
    const int channels = a->last ? 2 : 1;
    if (!require(c, x->dim == 3 && f->dim == 2, "expected x of 3 dimensions and f [n, r]") ||
        !require(c, x->size[channels] == f->size[0], "x has %lld channels but f has %lld rows",
                 (long long)x->size[channels], (long long)f->size[0]) ||
        !require(c, dtype_of(x) >= 0 && f->dtype == wide_dtype(x),
                 "x must be floating point, and f float64 beside float64, else float32") ||
        !require(c, x->device == f->device && x->index == f->index, "x and f are on different devices") ||
        !require(c, a->dropout == 0 || (seed->dtype == aoti_torch_dtype_int64() && seed->numel == 1),
                 "dropout needs one int64 seed") ||
        !require(c, a->dropout == 0 || (seed->device == x->device && seed->index == x->index),
                 "x and seed are on different devices"))
        return false;
    a->dtype = (subspace_dtype)dtype_of(x);
    a->b = x->size[0], a->n = f->size[0], a->p = x->size[3 - channels], a->r = f->size[1];
    a->x = x->data, a->f = f->data;
    a->seed = a->dropout > 0 ? seed->data : NULL;
    return true;
}

/* z and w: x with the rank in the place of the channels */
static bool inner(call *c, const tensor *t, const char *name, const tensor *x, const subspace_tucker_conv_args *a)
{
    return require(c,
                   t->dim == 3 && t->size[0] == a->b && t->size[a->last ? 1 : 2] == a->p &&
                       t->size[a->last ? 2 : 1] == a->r,
                   "%s must be x with %lld channels", name, (long long)a->r) &&
           require(c, t->dtype == wide_dtype(x), "%s must be float64 beside float64, else float32", name) &&
           require(c, t->device == x->device && t->index == x->index, "x and %s are on different devices", name);
}

/* w is read only for df. */
OP(tucker_project,
   "tucker_project(Tensor x, Tensor f, Tensor w, Tensor seed, float dropout, bool last, bool need_z, bool need_df)"
   " -> (Tensor z, Tensor df)")
{
    call c = begin("tucker_project");
    tensor x = {0}, f = {0}, w = {0}, seed = {0}, z = {0}, df = {0};
    subspace_tucker_conv_args a = {.dropout = as_double(stack[4]), .last = as_bool(stack[5])};
    const bool need_z = as_bool(stack[6]), need_df = as_bool(stack[7]);
    bool taken = tensor_in(&c, stack[0], &x);
    taken &= tensor_in(&c, stack[1], &f);
    taken &= tensor_in(&c, stack[2], &w);
    taken &= tensor_in(&c, stack[3], &seed);
    DO(taken && conv_args(&c, &x, &f, &seed, &a));
    DO(!need_df || inner(&c, &w, "w", &x, &a));
    const int64_t size[3] = {a.b, a.last ? a.p : a.r, a.last ? a.r : a.p};
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &z, 3, need_z ? size : (int64_t[]){0, 0, 0}, wide_dtype(&x), &x));
    DO(tensor_empty(&c, &df, 2, need_df ? f.size : (int64_t[]){0, 0}, wide_dtype(&x), &x));
    a.z = need_z ? z.data : NULL, a.df = need_df ? df.data : NULL, a.w = need_df ? w.data : NULL;
    DO(workspace(&c, ON(subspace_tucker_conv_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_tucker_conv_project)(&c.ctx, &a));
done:
    finish(&c, stack, 2, (tensor *const[]){&z, &df});
}

OP(tucker_expand, "tucker_expand_(Tensor(a!) x, Tensor z, Tensor f, Tensor seed, float dropout, bool last) -> ()")
{
    call c = begin("tucker_expand_");
    tensor x = {0}, z = {0}, f = {0}, seed = {0};
    subspace_tucker_conv_args a = {.dropout = as_double(stack[4]), .last = as_bool(stack[5])};
    bool taken = tensor_inout(&c, stack[0], &x);
    taken &= tensor_in(&c, stack[1], &z);
    taken &= tensor_in(&c, stack[2], &f);
    taken &= tensor_in(&c, stack[3], &seed);
    DO(taken && conv_args(&c, &x, &f, &seed, &a));
    DO(inner(&c, &z, "z", &x, &a));
    a.z = z.data;
    DO(on_device_of(&c, &x));
    DO(workspace(&c, ON(subspace_tucker_conv_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_tucker_conv_expand)(&c.ctx, &a));
done:
    finish(&c, stack, 0, NULL);
}
