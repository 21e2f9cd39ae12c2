"""SIGReg with its gradient: ours, the published formula eager and compiled, and the matrix products alone.

The floor is what no implementation without p in memory does without: p twice, for both directions, and the gradient.
"""

import reference
import torch
import work
from harness import Case, Contender, Target, compiled, relative

from torch_subspace.isotropy import sigreg

OURS, FORMULA, FLOOR = "ours", "published formula", "floor: matrix products alone"


def inputs(views, n, d, slices, device):
    """Normal points and directions of length one."""
    seed = torch.Generator().manual_seed(0)
    directions = torch.randn(d, slices, generator=seed)
    return (torch.randn(views, n, d, generator=seed).to(device),
            (directions / directions.norm(dim=0)).to(device))


def formula(z, directions, knots=17):
    """As the papers' code has it: cosines and sines of all points, directions and knots."""
    t = torch.linspace(0, 3, knots, device=z.device)
    normal = torch.exp(-t.square() / 2)
    weight = torch.full_like(t, 2 * 3 / (knots - 1))
    weight[0] = weight[-1] = 3 / (knots - 1)
    angle = (z @ directions).unsqueeze(-1) * t
    error = (angle.cos().mean(-3) - normal).square() + angle.sin().mean(-3).square()
    return ((error @ (weight * normal)) * z.shape[-2]).mean()


def ours(z, directions):
    """The op."""
    return sigreg(z, directions=directions).mean()


def contender(name, function, shape, device):
    """The loss and its gradient."""

    def step(z, directions):
        z = z.detach().requires_grad_()
        loss = function(z, directions)
        return loss.detach(), *torch.autograd.grad(loss, z)

    def build():
        given = inputs(*shape, device)
        return lambda: step(*given)

    def check():
        z, directions = inputs(*shape, "cpu")
        found = step(*inputs(*shape, device))
        z = z.double().requires_grad_()
        loss = reference.sigreg(z, directions.double()).mean()
        return relative([t.cpu() for t in found], [loss.detach(), *torch.autograd.grad(loss, z)])

    views, n, d, _ = shape
    return Contender(name, build, check, peak=True, kept=4 * views * n * d)


def products(shape, device):
    """The matrix products and nothing else."""
    z, directions = inputs(*shape, device)

    def step():
        with torch.no_grad():
            p = z @ directions
            z @ directions
            return p @ directions.T

    return Contender(FLOOR, lambda: step, peak=True, kept=4 * shape[0] * shape[1] * shape[2])


def case(views, n, d, slices, device, must):
    """All contenders at one size."""
    shape = (views, n, d, slices)
    contenders = [products(shape, device), contender(OURS, ours, shape, device),
                  contender(FORMULA, formula, shape, device),
                  contender("torch.compile of it", compiled(formula), shape, device)]
    targets = [Target(OURS, (FORMULA,), ">=", 8, 12), Target(OURS, (FLOOR,), "<=", 2.5, 2),
               Target(OURS, (FORMULA,), "<=", 0.1, 0.05, of="peak")] if must else []
    return Case(f"V={views} n={n} d={d} slices={slices} float32", contenders, targets,
                **work.sigreg(views, n, d, slices))


def cases(device):
    """The papers' sizes: one batch, the minimal example's views and projector, a wide projector."""
    return [case(1, 512, 128, 256, device, must=True), case(4, 256, 16, 256, device, must=False),
            case(2, 512, 512, 1024, device, must=False)]
