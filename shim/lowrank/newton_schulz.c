/* newton_schulz.c - torch.ops.torch_subspace.newton_schulz and its backward. */
#include "shim.h"

/* A float[] argument of `steps` times three entries; the list is taken over. */
static bool coefficients_in(call *c, StableIValue v, double *to, int64_t *steps)
{
    StableListHandle l = (StableListHandle)(uintptr_t)v;
    StableIValue item = 0;
    size_t size = 0;
    bool ok = torch_list_size(l, &size) == 0 && size % 3 == 0 && size > 0 && size <= 3 * SUBSPACE_STEPS;
    for (size_t i = 0; ok && i < size; i++) {
        ok = torch_list_get_item(l, i, &item) == 0;
        if (ok) to[i] = as_double(item);
    }
    torch_delete_list(l);
    *steps = (int64_t)size / 3;
    return require(c, ok, "coefficients must be three for each of 1 to %d steps, got %lld", (int)SUBSPACE_STEPS,
                   (long long)size);
}

/* x [v, m, n] */
static bool newton_schulz_args(call *c, const tensor *x, subspace_newton_schulz_args *a)
{
    if (!require(c, x->dim == 3 && dtype_of(x) >= 0, "expected x [v, m, n], floating")) return false;
    a->dtype = (subspace_dtype)dtype_of(x);
    a->v = x->size[0], a->m = x->size[1], a->n = x->size[2];
    a->x = x->data;
    return run(c, subspace_newton_schulz_check(&c->ctx, a));
}

OP(newton_schulz, "newton_schulz(Tensor x, float[] coefficients, float eps) -> Tensor")
{
    call c = begin("newton_schulz");
    tensor x = {0}, y = {0};
    double coefficients[3 * SUBSPACE_STEPS];
    subspace_newton_schulz_args a = {.coefficients = coefficients, .eps = as_double(stack[2])};
    bool taken = tensor_in(&c, stack[0], &x);
    taken &= coefficients_in(&c, stack[1], coefficients, &a.steps);
    DO(taken && newton_schulz_args(&c, &x, &a));
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &y, 3, x.size, x.dtype, &x));
    a.y = y.data;
    DO(workspace(&c, ON(subspace_newton_schulz_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_newton_schulz)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&y});
}

OP(newton_schulz_backward, "newton_schulz_backward(Tensor dy, Tensor x, float[] coefficients, float eps) -> Tensor")
{
    call c = begin("newton_schulz_backward");
    tensor dy = {0}, x = {0}, dx = {0};
    double coefficients[3 * SUBSPACE_STEPS];
    subspace_newton_schulz_args a = {.coefficients = coefficients, .eps = as_double(stack[3])};
    bool taken = tensor_in(&c, stack[0], &dy);
    taken &= tensor_in(&c, stack[1], &x);
    taken &= coefficients_in(&c, stack[2], coefficients, &a.steps);
    DO(taken && newton_schulz_args(&c, &x, &a));
    DO(require(&c,
               dy.dim == 3 && dy.size[0] == a.v && dy.size[1] == a.m && dy.size[2] == a.n && dy.dtype == x.dtype &&
                   together(&dy, &x),
               "dy must be as x is, [%lld, %lld, %lld]", (long long)a.v, (long long)a.m, (long long)a.n));
    DO(on_device_of(&c, &x));
    DO(tensor_empty(&c, &dx, 3, x.size, x.dtype, &x));
    a.dy = dy.data, a.dx = dx.data;
    DO(workspace(&c, ON(subspace_newton_schulz_workspace)(&c.ctx, &a), &x));
    run(&c, ON(subspace_newton_schulz_backward)(&c.ctx, &a));
done:
    finish(&c, stack, 1, (tensor *const[]){&dx});
}
