"""Subspace logits: γ‖W_c x̂‖ for a batch, forward alone and with both gradients.

The floor is the matrix products alone: what a linear head of C·k outputs would take.
"""

import torch
import work
from harness import Case, Contender, Target, by_bfloat16, compiled, multiplies_bfloat16, relative
from torch.nn.functional import linear, normalize

import torch_subspace as ts
import torch_subspace.grassmann.logits as module

GAMMA = 25.0


def inputs(batch, n, classes, k, dtype, device):
    """Features, frames and the gradient of the logits."""
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n, generator=seed)
    weight = torch.linalg.qr(torch.randn(classes, n, k, generator=seed)).Q.mT.contiguous()
    gradient = torch.randn(batch, classes, generator=seed)
    return [t.to(device, dtype) for t in (x, weight, gradient)]


def formula(x, weight):
    """The logits as one would write them."""
    z = linear(normalize(x, dim=-1), weight.flatten(0, 1))
    return GAMMA * torch.linalg.vector_norm(z.unflatten(1, weight.shape[:2]), dim=2)


def ours(keep):
    """`subspace_logits` that keeps the projections for the backward, or recomputes them."""

    def logits(x, weight):
        module.KEEP_PROJECTIONS = 1 << 40 if keep else 0
        return ts.subspace_logits(x, weight, gamma=GAMMA)

    return logits


def forward(name, function, shape, device, **options):
    """A contender without gradients."""
    x, weight, _ = inputs(*shape, device)

    def build():
        return lambda: function(x, weight)

    def check():
        return relative(function(x, weight), formula(x.double(), weight.double()))

    return Contender(name, no_grad(build), no_grad(check), **options)


def no_grad(make):
    """What `make` returns, and what it does, without gradients."""

    def quiet():
        with torch.no_grad():
            made = make()
        return torch.no_grad()(made) if callable(made) else made

    return quiet


def both(name, function, shape, device, **options):
    """A contender with the gradients of x and weight."""
    x, weight, gradient = inputs(*shape, device)

    def step(x, weight, gradient):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = function(x, weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), gradient)

    def check():
        def truth():
            return [t.detach() for t in reference(x.double(), weight.double(), gradient.double())]

        return relative(step(x, weight, gradient), truth())

    def reference(x, weight, gradient):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = formula(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), gradient)

    return Contender(name, lambda: lambda: step(x, weight, gradient), check, **options)


def products(backward, shape, device):
    """The matrix products and nothing else."""
    x, weight, _ = inputs(*shape, device)
    weight = weight.flatten(0, 1)
    dz = torch.randn(shape[0], weight.shape[0], device=device, dtype=weight.dtype)

    def step():
        linear(x, weight)
        if backward:
            torch.mm(dz.T, x)
            torch.mm(dz, weight)

    return Contender("floor: matrix products alone", no_grad(lambda: step))


def pair(batch, n, classes, k, device, targets, compile=True, dtype=torch.float32, beside=None):
    """Both cases of one size; `targets` takes the names of ours, the floor and the formula. beside: another dtype that
    ours is timed in too."""
    shape = (batch, n, classes, k, dtype)
    name = f"B={batch} n={n} C={classes} k={k} {str(dtype).removeprefix('torch.')}"
    for backward in (False, True):
        make = both if backward else forward
        contenders = [products(backward, shape, device)]
        if backward:
            contenders += [make("ours: projections kept", ours(True), shape, device),
                           make("ours: projections recomputed", ours(False), shape, device)]
        else:
            contenders += [make("ours", ours(True), shape, device)]
        contenders += [make("eager formula", formula, shape, device)]
        if dtype == torch.float32 and device == "cpu" and by_bfloat16(ours):
            contenders += [make("ours: by bfloat16", by_bfloat16(ours(True)), shape, device)]
        if beside:
            name_of_it = f"ours: {str(beside).removeprefix('torch.')}"
            contenders += [make(name_of_it, ours(True), (*shape[:-1], beside), device)]
        if compile:
            contenders += [make("torch.compile of the formula", compiled(formula), shape, device)]
        yield Case(f"{name}, forward{' and backward' if backward else ''}", contenders,
                   targets(contenders[1].name, contenders[0].name, "eager formula", backward),
                   **work.logits(batch, n, classes, k, backward, dtype.itemsize), seconds=8, dtype=dtype)


def large(ours, floor, eager, backward):
    """The promises where the product dominates: near it, and ahead of eager in training."""
    found = [Target(ours, (floor,), "<=", 1.05, 1.05)]
    return found + [Target(ours, (eager,), ">=", 1.1, 1.2)] if backward else found


def small(ours, floor, eager, backward):
    """The promises at few features."""
    return [Target(ours, (eager,), ">=", 2 if backward else 2.5, 3 if backward else 4)]


def halves(ours, floor, eager, backward):
    """The promise where a processor multiplies bfloat16 itself."""
    return [Target(ours, ("ours: float32",), ">=", 1.5, 2)]


def other(ours, floor, eager, backward):
    """No promise was made for the sizes between; eager is the measure."""
    return []


def cases(device):
    """A ResNet-50 head, a small batch of a ViT, and heads of few features."""
    found = [
        *pair(256, 2048, 1000, 8, device, large),
        *pair(64, 768, 1000, 8, device, other, compile=False),
        *pair(256, 128, 100, 8, device, small),
        *pair(64, 64, 10, 4, device, small, compile=False),
    ]
    if device == "cpu" and multiplies_bfloat16():
        for batch, n in ((256, 2048), (64, 512)):
            found += pair(batch, n, 1000, 8, device, halves, compile=False, dtype=torch.bfloat16, beside=torch.float32)
    if device == "cuda":  # a batch that fills it, also in the dtype it trains in
        for dtype in (torch.bfloat16, torch.float32):
            found += pair(1024, 2048, 1000, 8, device, other, dtype=dtype, compile=dtype == torch.bfloat16)
    return found
