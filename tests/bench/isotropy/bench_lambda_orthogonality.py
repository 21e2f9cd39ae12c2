"""λ-orthogonality of many layers with its gradient: ours, the formula eager and compiled, the matrix products alone.

The floor is a whole product forward and one backward; half of the first would do, which torch has no function for.
"""

import reference
import torch
import work
from harness import Case, Contender, Target, compiled, relative

from torch_subspace.isotropy import lambda_orthogonality

OURS, FORMULA, FLOOR = "ours", "formula", "floor: matrix products alone"
LAM = 1.0


def weights(layers, d, device):
    """Near orthonormal rows, as weights start."""
    seed = torch.Generator().manual_seed(0)
    return [(torch.randn(d, d, generator=seed) / d**0.5).to(device) for _ in range(layers)]


def ours(layers):
    """All layers in a call."""
    return lambda_orthogonality(layers, LAM).sum()


def formula(layers):
    """As one would write it."""
    total = 0
    for w in layers:
        f = torch.linalg.matrix_norm(w @ w.T - torch.eye(len(w), device=w.device))
        total = total + torch.sigmoid(f - LAM) * f
    return total


def contender(name, function, shape, device):
    """The loss of all layers and its gradient."""

    def step(given):
        leaves = [w.detach().requires_grad_() for w in given]
        loss = function(leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def build():
        given = weights(*shape, device)
        return lambda: step(given)

    def check():
        found = step(weights(*shape, device))
        leaves = [w.double().requires_grad_() for w in weights(*shape, "cpu")]
        loss = sum(reference.lambda_orthogonality(w, LAM) for w in leaves)
        return relative([t.cpu() for t in found], [loss.detach(), *torch.autograd.grad(loss, leaves)])

    layers, d = shape
    return Contender(name, build, check, peak=True, kept=4 * layers * d * d)


def products(shape, device):
    """The matrix products and nothing else."""
    given = weights(*shape, device)

    def step():
        with torch.no_grad():
            return [(w @ w.T) @ w for w in given]

    return Contender(FLOOR, lambda: step, peak=True)


def cases(device):
    """The layers of a small transformer."""
    shape = (24, 768)
    contenders = [products(shape, device), contender(OURS, ours, shape, device),
                  contender(FORMULA, formula, shape, device),
                  contender("torch.compile of it", compiled(formula), shape, device)]
    return [Case(f"{shape[0]} layers {shape[1]}x{shape[1]} float32", contenders,
                 [Target(OURS, (FORMULA,), ">=", 1.7, 2)], **work.lambda_orthogonality(*shape))]
