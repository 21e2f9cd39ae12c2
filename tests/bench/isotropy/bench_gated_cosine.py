"""Gated cosines with their gradient: ours, the form with all b × n × k gated points, eager and compiled, the identity
left to autograd, and the matrix products alone.

The floor is what no form by matrix products does without: two forward, four backward.
"""

import reference
import torch
import work
from harness import Case, Contender, Target, compiled, relative

from torch_subspace.isotropy import gated_cosine

OURS, FORMULA, FLOOR = "ours", "b x n x k form", "floor: matrix products alone"


def inputs(b, n, k, device):
    """Normal points, gates between 0 and 1, and a gradient of the cosines."""
    seed = torch.Generator().manual_seed(0)
    z1, z2, gate, dcosine = (torch.randn(*shape, generator=seed) for shape in ((b, k), (n, k), (b, k), (b, n)))
    return [t.to(device) for t in (z1, z2, gate.sigmoid(), dcosine)]


def formula(z1, z2, gate):
    """As one would write it."""
    return torch.cosine_similarity((gate * z1)[:, None], gate[:, None] * z2, dim=-1)


def identity(z1, z2, gate):
    """The products, with autograd's gradient."""
    weight = gate.square()
    held = weight * z1
    return held @ z2.T / ((held * z1).sum(1, keepdim=True) * (weight @ z2.square().T)).sqrt()


def contender(name, function, shape, device):
    """The cosines and their gradient."""

    def step(*given):
        *leaves, dcosine = given
        leaves = [t.detach().requires_grad_() for t in leaves]
        cosine = function(*leaves)
        return cosine.detach(), *torch.autograd.grad(cosine, leaves, dcosine)

    def build():
        given = inputs(*shape, device)
        return lambda: step(*given)

    def check():
        found = step(*inputs(*shape, device))
        *leaves, dcosine = (t.double() for t in inputs(*shape, "cpu"))
        leaves = [t.requires_grad_() for t in leaves]
        cosine = reference.gated_cosine(*leaves)
        truth = [cosine.detach(), *torch.autograd.grad(cosine, leaves, dcosine)]
        return relative([t.cpu() for t in found], truth)

    b, n, k = shape
    return Contender(name, build, check, peak=True, kept=4 * (b * n + (2 * b + n) * k))


def products(shape, device):
    """The matrix products and nothing else."""
    z1, z2, gate, dcosine = inputs(*shape, device)

    def step():
        with torch.no_grad():
            z1 @ z2.T, gate @ z2.T
            return dcosine @ z2, dcosine @ z2, dcosine.T @ z1, dcosine.T @ gate

    return Contender(FLOOR, lambda: step, peak=True)


def case(b, n, k, device, must):
    """All contenders at one size."""
    shape = (b, n, k)
    contenders = [products(shape, device), contender(OURS, gated_cosine, shape, device),
                  contender("identity, autograd's gradient", identity, shape, device),
                  contender(FORMULA, formula, shape, device),
                  contender("torch.compile of it", compiled(formula), shape, device)]
    targets = [Target(OURS, (FORMULA,), ">=", 20, 60)] if must else []
    return Case(f"b={b} n={n} k={k} float32", contenders, targets, **work.gated_cosine(b, n, k))


def cases(device):
    """A batch of pairs; a batch before a gallery."""
    return [case(256, 256, 256, device, must=True), case(64, 2048, 128, device, must=False)]
