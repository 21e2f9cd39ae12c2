/* tucker_linear.c - torch.ops.torch_subspace.tucker_linear_, which adds a layer's change to its output, and the
 * gradients. The base product is torch's own and happens before, in Python. */
#include "shim.h"

enum { NEED_CORE = 1, NEED_U = 2, NEED_V = 4 };

/* What both directions share: y is the output, or its gradient. v is [rn, n] or, where a->turned, [n, rn]. */
static bool linear_args(call *c, const tensor *y, const tensor *x, const tensor *core, const tensor *u, const tensor *v,
                        const tensor *seed, subspace_tucker_linear_args *a)
{
    const int64_t rn = v->dim == 2 ? v->size[a->turned] : 0, n = v->dim == 2 ? v->size[!a->turned] : 0;
    if (!require(c, x->dim == 2 && y->dim == 2 && core->dim == 2 && u->dim == 2 && v->dim == 2,
                 "expected x [t, n], y [t, m], core [rm, rn], u [m, rm] and v [rn, n], or turned [n, rn]") ||
        !require(c, y->size[0] == x->size[0] && n == x->size[1] && u->size[0] == y->size[1],
                 "x [%lld, %lld] and y [%lld, %lld] do not fit u of %lld rows and v of %lld columns",
                 (long long)x->size[0], (long long)x->size[1], (long long)y->size[0], (long long)y->size[1],
                 (long long)u->size[0], (long long)n) ||
        !require(c, core->size[0] == u->size[1] && core->size[1] == rn,
                 "core is [%lld, %lld], u and v ask for [%lld, %lld]", (long long)core->size[0],
                 (long long)core->size[1], (long long)u->size[1], (long long)rn) ||
        !require(c, dtype_of(x) >= 0 && y->dtype == x->dtype, "x and y must share a floating dtype") ||
        !require(c, core->dtype == wide_dtype(x) && u->dtype == core->dtype && v->dtype == core->dtype,
                 "core, u and v must be float32, or float64 beside a float64 x") ||
        !require(c, a->dropout == 0 || (seed->dtype == aoti_torch_dtype_int64() && seed->numel == 1),
                 "dropout needs one int64 seed"))
        return false;
    const tensor *others[] = {y, core, u, v, seed};
    for (int i = 0; i < 5 - (a->dropout == 0); i++)
        if (!require(c, others[i]->device == x->device && others[i]->index == x->index,
                     "the tensors are on different devices"))
            return false;
    a->dtype = (subspace_dtype)dtype_of(x);
    a->t = x->size[0], a->n = x->size[1], a->m = y->size[1], a->rn = rn, a->rm = u->size[1];
    a->seed = a->dropout > 0 ? seed->data : NULL;
    a->x = x->data, a->core = core->data, a->u = u->data, a->v = v->data;
    return true;
}

OP(tucker_linear, "tucker_linear_(Tensor(a!) y, Tensor x, Tensor core, Tensor u, Tensor v, Tensor seed, float scale,"
                  " float dropout, bool turned) -> ()")
{
    call c = begin("tucker_linear_");
    tensor y = {0}, x = {0}, core = {0}, u = {0}, v = {0}, seed = {0};
    subspace_tucker_linear_args a = {
        .scale = as_double(stack[6]), .dropout = as_double(stack[7]), .turned = as_bool(stack[8])};
    bool taken = tensor_inout(&c, stack[0], &y);
    taken &= tensor_in(&c, stack[1], &x);
    taken &= tensor_in(&c, stack[2], &core);
    taken &= tensor_in(&c, stack[3], &u);
    taken &= tensor_in(&c, stack[4], &v);
    taken &= tensor_in(&c, stack[5], &seed);
    DO(taken && linear_args(&c, &y, &x, &core, &u, &v, &seed, &a));
    a.y = y.data;
    DO(on_device_of(&c, &x));
    DO(workspace(&c, ON(subspace_tucker_linear_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_tucker_linear)(&c.ctx, &a));
done:
    finish(&c, stack, 0, NULL);
}

/* The gradient of x is added to dx unless that is empty; dcore, du and dv, where `need` has their bit, come flat, one
 * behind the other. */
OP(tucker_linear_backward,
   "tucker_linear_backward(Tensor(a!) dx, Tensor dy, Tensor x, Tensor core, Tensor u, Tensor v, Tensor seed,"
   " float scale, float dropout, bool turned, int need) -> Tensor")
{
    call c = begin("tucker_linear_backward");
    tensor dx = {0}, dy = {0}, x = {0}, core = {0}, u = {0}, v = {0}, seed = {0}, flat = {0};
    subspace_tucker_linear_args a = {
        .scale = as_double(stack[7]), .dropout = as_double(stack[8]), .turned = as_bool(stack[9])};
    const int64_t need = as_int(stack[10]);
    bool taken = tensor_inout(&c, stack[0], &dx);
    taken &= tensor_in(&c, stack[1], &dy);
    taken &= tensor_in(&c, stack[2], &x);
    taken &= tensor_in(&c, stack[3], &core);
    taken &= tensor_in(&c, stack[4], &u);
    taken &= tensor_in(&c, stack[5], &v);
    taken &= tensor_in(&c, stack[6], &seed);
    DO(taken && linear_args(&c, &dy, &x, &core, &u, &v, &seed, &a));
    DO(require(&c, dx.numel == 0 || (dx.numel == x.numel && dx.dtype == x.dtype && dx.device == x.device),
               "dx is not like x"));
    const int64_t sizes[] = {need & NEED_CORE ? core.numel : 0, need & NEED_U ? u.numel : 0,
                             need & NEED_V ? v.numel : 0};
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &flat, 1, (int64_t[]){sizes[0] + sizes[1] + sizes[2]}, core.dtype, &x));
    char *at = flat.data;
    const size_t item = a.dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    a.dcore = sizes[0] ? at : NULL;
    a.du = sizes[1] ? at + (size_t)sizes[0] * item : NULL;
    a.dv = sizes[2] ? at + (size_t)(sizes[0] + sizes[1]) * item : NULL;
    a.dy = dy.data, a.dx = dx.numel ? dx.data : NULL;
    DO(workspace(&c, ON(subspace_tucker_linear_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_tucker_linear_backward)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&flat});
}
