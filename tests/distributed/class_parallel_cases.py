"""Heads, batches and what is asked of both, by the tests of class-parallel heads."""

import torch
from helpers import close, normal

import torch_subspace as ts

CLASSES, FEATURES = 7, 12
RAGGED = (2, 1, 3, 3, 1, 2, 4)


def head(dims=3, dtype=torch.float64, classes=CLASSES, **options):
    torch.manual_seed(0)
    return ts.GrassmannLinear(FEATURES, classes, dims, dtype=dtype, **options)


def batch(rows=10, classes=CLASSES, dtype=torch.float64):
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(3))
    return normal(rows, FEATURES, seed=1, dtype=dtype), labels


def whole(t, dims=None):
    """What all processes have of it, as one process holds it."""
    t = t.full_tensor().detach().clone()
    return t if dims is None else t[torch.arange(t.shape[1]) < torch.tensor(dims)[:, None]]


def results(head, x, *target, run=None, **options):
    """The logits or the loss (or what `run` makes of them), and the gradients in x and the frames."""
    x = x.clone().requires_grad_()
    head.weight.grad = None
    run = run if run is not None else head.loss if target else head
    value = run(x, *target, **options)
    value.mul(normal(1, *value.shape, seed=2, dtype=value.dtype)[0]).sum().backward()
    grad = head.weight.grad
    return value.detach(), x.grad, grad if head.class_parallel is None else whole(grad, head.dims)


def same_as_alone(alone, shared, x, *target, tolerance=1e-12, **options):
    close(results(shared, x, *target, **options), results(alone, x, *target, **options), tolerance)
