"""Points and labels for the coding rate, and its reference."""

import reference as ref
import torch

import torch_subspace as ts

OP = torch.ops.torch_subspace.coding_rate
BACKWARD = torch.ops.torch_subspace.coding_rate_backward
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def points(n, d, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed + 7 * n + d)
    return torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64, generator=g), dim=-1).to(dtype)


def labels_of(n, classes, seed=0):
    """Labels with gaps, in any order, sizes uneven; None for no classes."""
    g = torch.Generator().manual_seed(seed + n)
    values = torch.randperm(3 * classes, generator=g)[:classes]
    return values[(torch.rand(n, generator=g) ** 2 * classes).long()] if classes else None


def truth(z, labels=None, eps=0.5):
    """The rate and its gradient, from z as it is, in float64."""
    z = z.detach().double().requires_grad_()
    rate = ref.coding_rate(z, labels, eps=eps)
    return rate.detach(), torch.autograd.grad(rate, z)[0]


def ours(z, labels=None, eps=0.5):
    z = z.detach().requires_grad_()
    rate = ts.coding_rate(z, labels, eps=eps)
    return rate.detach(), torch.autograd.grad(rate.sum(), z)[0]
