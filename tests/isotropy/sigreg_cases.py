"""Points and directions for SIGReg, and its reference."""

import reference as ref
import torch
from helpers import normal

from torch_subspace.isotropy import sigreg

OP = torch.ops.torch_subspace.sigreg
BACKWARD = torch.ops.torch_subspace.sigreg_backward
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPES = [  # views, n, d, slices, knots: one of everything, a tile, its edges, several parts and groups of knots
    (1, 1, 1, 1, 2), (2, 7, 5, 3, 17), (1, 128, 16, 64, 17), (3, 129, 33, 65, 5), (1, 300, 70, 130, 17),
    (2, 50, 9, 20, 18), (1, 61, 12, 70, 40), (1, 2100, 8, 24, 17), (1, 17, 200, 4, 33),
]


def problem(v, n, d, slices, dtype=torch.float64, seed=0):
    """Points not quite normal, and directions of length one."""
    z = normal(v, n, d, seed=seed) * 0.8 + 0.3
    directions = torch.nn.functional.normalize(normal(d, slices, seed=seed + 1), dim=0)
    return z.to(dtype), directions.to(dtype)


def of(function, z, directions, **options):
    """Losses, and the gradient for a fixed one of them."""
    z = z.detach().requires_grad_()
    loss = function(z, directions, **options)
    dloss = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()].view(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, z, dloss)[0]


def ours(z, directions, **options):
    return of(lambda z, directions, **options: sigreg(z, directions=directions, **options), z, directions, **options)


def truth(z, directions, **options):
    return of(ref.sigreg, z.double(), directions.double(), **options)
