/* rsgd.c - torch.ops.torch_subspace.rsgd_: every frame of a parameter group in one call. */
#include "shim.h"
#include <stdlib.h>

/* Dims of the parameters: 3-D weights are uniform, 2-D ones share the starts of their classes. */
static bool frames_of(call *c, const tensor *w, const tensor *g, const tensor *m, const tensor *start, size_t i,
                      subspace_frames *f)
{
    const bool ragged = w->dim == 2;
    if (!require(c, w->dim == 3 || (ragged && start->numel > 0),
                 "parameter %zu: expected [c, k, n], or [rows, n] with dims", i) ||
        !require(c, !ragged || together(start, w), "parameter %zu: start is on another device", i) ||
        !require(c, g->numel == w->numel && g->dtype == w->dtype && together(g, w),
                 "parameter %zu: the gradient does not match the weight", i) ||
        !require(c, !m || (m->numel == w->numel && m->dtype == w->dtype && together(m, w)),
                 "parameter %zu: the momentum buffer does not match the weight", i))
        return false;
    *f = (subspace_frames){.weight = w->data, .grad = g->data, .buffer = m ? m->data : NULL, .n = w->size[w->dim - 1]};
    f->c = ragged ? start->numel - 1 : w->size[0];
    f->k = ragged ? 0 : w->size[1];
#ifndef SUBSPACE_DEVICE_CUDA
    const int64_t *s = start->data;
    for (int64_t j = 0; ragged && j < f->c; j++) {
        const int64_t k = s[j + 1] - s[j];
        if (!require(c, k > 0 && k <= f->n, "class %lld: need 0 < k <= n, got k=%lld, n=%lld", (long long)j,
                     (long long)k, (long long)f->n))
            return false;
        if (k > f->k) f->k = k;
    }
    return !ragged ||
           require(c, s[0] == 0 && s[f->c] == w->size[0], "parameter %zu: the dims sum to %lld, not %lld rows", i,
                   (long long)s[f->c], (long long)w->size[0]);
#else
    if (ragged)
        f->k = w->size[0] - f->c + 1 < f->n ? w->size[0] - f->c + 1 : f->n; /* a bound: starts are on the device */
    return true;
#endif
}

OP(rsgd, "rsgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] buffers, Tensor start, Tensor lr, float momentum,"
         " float dampening, float weight_decay, bool nesterov, bool maximize, int retraction, bool parallel,"
         " bool stiefel) -> Tensor")
{
    call c = begin("rsgd");
    tensor *weights = NULL, *grads = NULL, *buffers = NULL, start = {0}, lr = {0}, skipped = {0};
    size_t nw = 0, ng = 0, nm = 0;
    subspace_frames *frames = NULL;
    subspace_rsgd_args a = {.momentum = as_double(stack[5]),
                            .dampening = as_double(stack[6]),
                            .weight_decay = as_double(stack[7]),
                            .nesterov = as_bool(stack[8]),
                            .maximize = as_bool(stack[9]),
                            .retraction = (subspace_retraction)as_int(stack[10]),
                            .parallel = as_bool(stack[11]),
                            .stiefel = as_bool(stack[12])};
    bool taken = tensors_in(&c, stack[0], true, &weights, &nw);
    taken &= tensors_in(&c, stack[1], false, &grads, &ng);
    taken &= tensors_in(&c, stack[2], true, &buffers, &nm);
    taken &= tensor_in(&c, stack[3], &start);
    taken &= tensor_in(&c, stack[4], &lr);
    DO(taken &&
       require(&c, nw > 0 && ng == nw && (nm == nw || nm == 0), "%zu weights, %zu gradients, %zu buffers", nw, ng, nm));
    DO(require(&c, as_int(stack[10]) >= 0 && as_int(stack[10]) <= SUBSPACE_CAYLEY, "unknown retraction %lld",
               (long long)as_int(stack[10])));
    DO(require(&c, lr.dtype == aoti_torch_dtype_float64() && start.dtype == aoti_torch_dtype_int64(),
               "lr must be float64, start int64"));
    frames = calloc(nw, sizeof *frames);
    DO(require(&c, frames != NULL, "out of memory"));
    for (size_t i = 0; i < nw; i++) {
        DO(require(&c,
                   weights[i].dtype == weights[0].dtype && weights[i].dim == weights[0].dim &&
                       together(&weights[i], &weights[0]),
                   "parameter %zu: all frames of a call share a dtype, a device and whether their dims are ragged", i));
        DO(frames_of(&c, &weights[i], &grads[i], nm ? &buffers[i] : NULL, &start, i, &frames[i]));
    }
    a.dtype = (subspace_dtype)dtype_of(&weights[0]);
    a.count = (int64_t)nw, a.frames = frames;
    a.start = weights[0].dim == 2 ? start.data : NULL;
    a.lr_per_class = lr.dim == 1;
    DO(require(&c, lr.numel == (a.lr_per_class ? frames[0].c : 1), "lr has %lld entries for %lld classes",
               (long long)lr.numel, (long long)frames[0].c));
    if (lr.device == aoti_torch_device_type_cpu() && lr.dim == 0) /* read here: no copy to the device */
        a.lr_value = *(const double *)lr.data;
    else {
        DO(require(&c, together(&lr, &weights[0]), "lr must be on the CPU or with the weights"));
        a.lr = lr.data;
    }
    DO(on_device_of(&c, &weights[0]));
    DO(tensor_empty(&c, &skipped, 0, NULL, aoti_torch_dtype_int64(), &weights[0]));
    a.skipped = skipped.data;
    DO(workspace(&c, ON(subspace_rsgd_workspace)(&c.ctx, &a), &weights[0]));
    run(&c, ON(subspace_rsgd)(&c.ctx, &a));
done:
    free(frames), free(weights), free(grads), free(buffers);
    finish(&c, stack, 1, (tensor *const[]){&skipped});
}
