"""Fastfood with its gradient: ours, the public form with what it draws stored, and a dense matrix.

The public form keeps signs, a permutation and normal numbers, and transforms by chunks and concatenations. The floor is
one Walsh-Hadamard transform forward and one backward.
"""

import torch
import work
from harness import Case, Contender, Target, relative

from torch_subspace.lowrank import fastfood, hadamard
from torch_subspace.lowrank.fastfood import draws, plain

OURS, FLOOR, STORED, DENSE = "ours", "floor: two transforms", "stored, chunks and concatenations", "dense matrix"
SEED = 1


def chunk(x):
    """A transform, one bit of a place at a time."""
    n, width = x.shape[-1], 1
    while width < n:
        a, b = x.view(n // (2 * width), 2, width).chunk(2, 1)
        x, width = torch.cat((a + b, a - b), 1), 2 * width
    return x.view(n)


def ours(d, size, device):
    """The op."""
    return lambda theta: fastfood(theta, size, seed=SEED)


def stored(d, size, device):
    """The formula, with the same draws made beforehand."""
    length = 1 << (max(d, size) - 1).bit_length()
    signs, order, normal = (t.to(device) for t in draws(d, length, SEED, torch.device("cpu")))
    scale = float((size * normal.double().square().sum()) ** -0.5)

    def call(theta):
        x = torch.nn.functional.pad(theta * signs, (0, length - d))
        return chunk(normal * chunk(x)[order])[:size] * scale

    return call


def dense(d, size, device):
    """A product with the same matrix."""
    matrix = plain(torch.eye(d), size, SEED).mT.contiguous().to(device)
    return lambda theta: matrix @ theta


def transforms(d, size, device):
    """Of a padded vector, which is all that can't be left out."""
    length = 1 << (max(d, size) - 1).bit_length()
    return lambda theta: hadamard(torch.nn.functional.pad(theta, (0, length - d)))[:size]


def contender(name, make, d, size, device):
    """A product and, with a gradient, its transpose's."""

    def inputs():
        seed = torch.Generator().manual_seed(0)
        return [torch.randn(n, generator=seed).to(device) for n in (d, size)]

    def step(function, theta, dy):
        theta = theta.detach().requires_grad_()
        y = function(theta)
        return y.detach(), *torch.autograd.grad(y, theta, dy)

    def build():
        function, (theta, dy) = make(d, size, device), inputs()
        return lambda: step(function, theta, dy)

    def check():
        theta, dy = inputs()
        found = [t.cpu() for t in step(make(d, size, device), theta, dy)]
        return relative(found, step(lambda t: plain(t, size, SEED), theta.cpu().double(), dy.cpu().double()))

    return Contender(name, build, None if name == FLOOR else check, peak=True, kept=4 * (d + size))


def case(d, size, device, targets=(), with_dense=True):
    """All contenders at one size."""
    makers = {FLOOR: transforms, OURS: ours, STORED: stored} | ({DENSE: dense} if with_dense else {})
    contenders = [contender(name, make, d, size, device) for name, make in makers.items()]
    return Case(f"{d} to {size} float32", contenders, list(targets), **work.fastfood(d, size), seconds=4)


def cases(device):
    """A million weights from a thousand numbers, the digits' network, and a sketch."""
    return [case(1000, 1 << 20, device, [Target(OURS, (STORED,), ">=", 8, 12)], with_dense=False),
            case(200, 17610, device), case(1 << 16, 256, device, with_dense=False)]
