/* sinkhorn.c - torch.ops.torch_subspace.sinkhorn and its backward. */
#include "shim.h"

/* plan [..., m, n]; row [..., m] and col [..., n] of the same batch, or empty: ones. */
static bool plan_args(call *c, const tensor *plan, const tensor *row, const tensor *col, subspace_sinkhorn_args *a)
{
    const int dtype = dtype_of(plan);
    const int64_t s = (int64_t)a->symmetric;
    if (!require(c, plan->dim >= 2 && (dtype == SUBSPACE_F32 || dtype == SUBSPACE_F64),
                 "expected [..., m, n] of float32 or float64") ||
        !require(c, s >= SUBSPACE_GENERAL && s <= SUBSPACE_LOOK, "symmetric is 0, 1 or 2, got %lld", (long long)s))
        return false;
    a->dtype = (subspace_dtype)dtype;
    a->m = plan->size[plan->dim - 2], a->n = plan->size[plan->dim - 1], a->v = 1;
    for (int64_t i = 0; i < plan->dim - 2; i++) a->v *= plan->size[i];
    const tensor *given[2] = {row, col};
    const int64_t size[2] = {a->m, a->n};
    for (int i = 0; i < 2; i++) {
        const tensor *t = given[i];
        if (!require(c, t->device == plan->device && t->index == plan->index, "marginals are on another device") ||
            !require(c, t->numel == 0 || (t->dtype == plan->dtype && t->numel == a->v * size[i]),
                     "marginals must be [..., m] and [..., n] of the plan's dtype, or empty"))
            return false;
    }
    a->row = row->numel ? row->data : NULL, a->col = col->numel ? col->data : NULL;
    return run(c, subspace_sinkhorn_check(&c->ctx, a));
}

OP(sinkhorn, "sinkhorn(Tensor scores, Tensor row, Tensor col, float eta, float tol, int max_iter, int symmetric,"
             " int half_steps) -> (Tensor plan, Tensor error, Tensor sweeps)")
{
    call c = begin("sinkhorn");
    tensor scores = {0}, row = {0}, col = {0}, plan = {0}, error = {0}, sweeps = {0};
    subspace_sinkhorn_args a = {.eta = as_double(stack[3]),
                                .tol = as_double(stack[4]),
                                .max_iter = as_int(stack[5]),
                                .symmetric = (subspace_symmetry)as_int(stack[6]),
                                .half_steps = as_int(stack[7])};
    bool taken = tensor_in(&c, stack[0], &scores);
    taken &= tensor_in(&c, stack[1], &row);
    taken &= tensor_in(&c, stack[2], &col);
    DO(taken && plan_args(&c, &scores, &row, &col, &a));
    DO(on_device_of(&c, &scores));
    DO(tensor_empty(&c, &plan, scores.dim, scores.size, scores.dtype, &scores));
    DO(tensor_empty(&c, &error, 1, &a.v, aoti_torch_dtype_float64(), &scores));
    DO(tensor_empty(&c, &sweeps, 1, &a.v, aoti_torch_dtype_int64(), &scores));
    a.scores = scores.data, a.plan = plan.data, a.error = error.data, a.sweeps = sweeps.data;
    DO(workspace(&c, ON(subspace_sinkhorn_workspace)(&c.ctx, &a), &scores));
    run(&c, ON(subspace_sinkhorn)(&c.ctx, &a));
done:
    finish(&c, stack, 3, (tensor *const[]){&plan, &error, &sweeps});
}

/* A gradient that is not needed is empty. */
OP(sinkhorn_backward,
   "sinkhorn_backward(Tensor dplan, Tensor plan, Tensor row, Tensor col, float eta, int symmetric, int half_steps,"
   " bool need_dscores, bool need_drow, bool need_dcol) -> (Tensor dscores, Tensor drow, Tensor dcol)")
{
    call c = begin("sinkhorn_backward");
    tensor dplan = {0}, plan = {0}, row = {0}, col = {0}, dscores = {0}, drow = {0}, dcol = {0};
    subspace_sinkhorn_args a = {
        .eta = as_double(stack[4]), .symmetric = (subspace_symmetry)as_int(stack[5]), .half_steps = as_int(stack[6])};
    const bool need_dscores = as_bool(stack[7]), need_drow = as_bool(stack[8]), need_dcol = as_bool(stack[9]);
    const int64_t none = 0;
    bool taken = tensor_in(&c, stack[0], &dplan);
    taken &= tensor_in(&c, stack[1], &plan);
    taken &= tensor_in(&c, stack[2], &row);
    taken &= tensor_in(&c, stack[3], &col);
    DO(taken && plan_args(&c, &plan, &row, &col, &a));
    DO(require(&c,
               dplan.numel == plan.numel && dplan.dtype == plan.dtype && dplan.device == plan.device &&
                   dplan.index == plan.index,
               "dplan does not match the plan"));
    DO(on_device_of(&c, &plan));
    DO(tensor_empty(&c, &dscores, need_dscores ? plan.dim : 1, need_dscores ? plan.size : &none, plan.dtype, &plan));
    DO(tensor_empty(&c, &drow, 2, (int64_t[]){need_drow ? a.v : 0, a.m}, plan.dtype, &plan));
    DO(tensor_empty(&c, &dcol, 2, (int64_t[]){need_dcol ? a.v : 0, a.n}, plan.dtype, &plan));
    a.plan = plan.data, a.dplan = dplan.data;
    a.dscores = need_dscores ? dscores.data : NULL;
    a.drow = need_drow ? drow.data : NULL, a.dcol = need_dcol ? dcol.data : NULL;
    DO(workspace(&c, ON(subspace_sinkhorn_workspace)(&c.ctx, &a), &plan));
    run(&c, ON(subspace_sinkhorn_backward)(&c.ctx, &a));
done:
    finish(&c, stack, 3, (tensor *const[]){&dscores, &drow, &dcol});
}
