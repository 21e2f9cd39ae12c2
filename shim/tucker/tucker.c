/* tucker.c - torch.ops.torch_subspace.tucker_compose, into a new tensor or a given one, and its backward. */
#include "shim.h"
#include <stdlib.h>

/* core and factors; a factor without entries is the identity. dtype is that of base, out or dout. */
static bool tucker_args(call *c, const tensor *core, const tensor *factor, size_t count, const tensor *like,
                        subspace_tucker_args *a)
{
    const int dtype = dtype_of(like);
    if (!require(c, core->dim >= 2 && core->dim <= SUBSPACE_MODES, "expected a core of 2 to %d dimensions, got %lld",
                 (int)SUBSPACE_MODES, (long long)core->dim) ||
        !require(c, (int64_t)count == core->dim, "a core of %lld dimensions needs as many factors, got %zu",
                 (long long)core->dim, count) ||
        !require(c, dtype >= 0 && wide_dtype(like) == core->dtype,
                 "core and factors must be float32, or float64 beside a float64 base"))
        return false;
    a->dtype = (subspace_dtype)dtype, a->modes = core->dim, a->core = core->data;
    for (size_t i = 0; i < count; i++) {
        const tensor *f = &factor[i];
        a->r[i] = a->d[i] = core->size[i];
        if (f->numel == 0) continue;
        if (!require(c, f->dim == 2 && f->size[1] == core->size[i], "factor %zu must be [d, %lld]", i,
                     (long long)core->size[i]) ||
            !require(c, f->dtype == core->dtype, "factor %zu must have the core's dtype", i) ||
            !require(c, f->device == core->device && f->index == core->index, "factor %zu is on another device", i))
            return false;
        a->d[i] = f->size[0], a->factor[i] = f->data;
    }
    return true;
}

/* base, out or dout: of the composed sizes, on the core's device */
static bool composed(call *c, const tensor *t, const char *what, const tensor *core, const subspace_tucker_args *a)
{
    bool same = t->dim == a->modes;
    for (int64_t i = 0; same && i < a->modes; i++) same = t->size[i] == a->d[i];
    return require(c, same, "%s does not have the composed shape", what) &&
           require(c, t->device == core->device && t->index == core->index, "%s is on another device than core", what);
}

/* tucker_compose(Tensor core, Tensor[] factors, Tensor[] base, float scale) -> Tensor, and with a last argument
 * tucker_compose_out(..., Tensor(a!) out) -> ()                                      an empty base list is zero */
static void compose(StableIValue *stack, bool given)
{
    call c = begin(given ? "tucker_compose_out" : "tucker_compose");
    tensor core = {0}, out = {0}, *factor = NULL, *base = NULL;
    size_t factors = 0, bases = 0;
    subspace_tucker_args a = {.scale = as_double(stack[3])};
    bool taken = tensor_in(&c, stack[0], &core);
    taken &= tensors_in(&c, stack[1], false, &factor, &factors);
    taken &= tensors_in(&c, stack[2], false, &base, &bases);
    if (given) taken &= tensor_inout(&c, stack[4], &out);
    DO(taken && require(&c, bases <= 1, "expected one base or none, got %zu", bases));
    DO(tucker_args(&c, &core, factor, factors, given ? &out : bases ? base : &core, &a));
    DO(!bases || composed(&c, base, "base", &core, &a));
    DO(!given || composed(&c, &out, "out", &core, &a));
    DO(require(&c, !given || !bases || base->dtype == out.dtype, "base and out must share a dtype"));
    DO(on_device_of(&c, &core));
    if (!given) DO(tensor_empty(&c, &out, a.modes, a.d, bases ? base->dtype : core.dtype, &core));
    a.base = bases ? base->data : NULL, a.out = out.data;
    DO(run(&c, subspace_tucker_check(&c.ctx, &a))); /* before sizes are multiplied */
    DO(workspace(&c, ON(subspace_tucker_workspace)(&c.ctx, &a), &core));
    run(&c, ON(subspace_tucker)(&c.ctx, &a));
done:
    free(factor), free(base);
    finish(&c, stack, !given, (tensor *const[]){&out});
}

OP(tucker_compose, "tucker_compose(Tensor core, Tensor[] factors, Tensor[] base, float scale) -> Tensor")
{
    compose(stack, false);
}

OP(tucker_compose_out,
   "tucker_compose_out(Tensor core, Tensor[] factors, Tensor[] base, float scale, Tensor(a!) out) -> ()")
{
    compose(stack, true);
}

/* The gradients one after the other in one flat tensor: of the core with bit 0 of need, of factor i with bit i + 1. */
OP(tucker_compose_backward,
   "tucker_compose_backward(Tensor dout, Tensor core, Tensor[] factors, float scale, int need) -> Tensor")
{
    call c = begin("tucker_compose_backward");
    tensor dout = {0}, core = {0}, flat = {0}, *factor = NULL;
    size_t factors = 0, item = 0;
    const int64_t need = as_int(stack[4]);
    int64_t size = 0;
    subspace_tucker_args a = {.scale = as_double(stack[3])};
    bool taken = tensor_in(&c, stack[0], &dout);
    taken &= tensor_in(&c, stack[1], &core);
    taken &= tensors_in(&c, stack[2], false, &factor, &factors);
    DO(taken && tucker_args(&c, &core, factor, factors, &dout, &a));
    DO(composed(&c, &dout, "dout", &core, &a));
    DO(on_device_of(&c, &core));
    if (need & 1) size += core.numel;
    for (size_t i = 0; i < factors; i++)
        if (need >> (i + 1) & 1) size += factor[i].numel;
    DO(tensor_empty(&c, &flat, 1, &size, core.dtype, &core));
    item = a.dtype == SUBSPACE_F64 ? sizeof(double) : sizeof(float);
    a.dout = dout.data, size = 0;
    if (need & 1) a.dcore = flat.data, size += core.numel;
    for (size_t i = 0; i < factors; i++)
        if ((need >> (i + 1) & 1) && factor[i].numel)
            a.dfactor[i] = (char *)flat.data + (size_t)size * item, size += factor[i].numel;
    DO(run(&c, subspace_tucker_check(&c.ctx, &a)));
    DO(workspace(&c, ON(subspace_tucker_workspace)(&c.ctx, &a), &core));
    run(&c, ON(subspace_tucker_backward)(&c.ctx, &a));
done:
    free(factor);
    finish(&c, stack, 1, (tensor *const[]){&flat});
}
