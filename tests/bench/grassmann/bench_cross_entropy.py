"""Fused subspace cross-entropy with both gradients, at ImageNet-21k's number of classes: time and peak memory.

Memory is measured in a process of its own for each contender; what all of them must return, the two gradients, is
taken off. Peers: the formula of the logits and torch's cross-entropy, eager and compiled, our own logits, and at k = 1
torch's `linear_cross_entropy` (2.13 and later), whose logits have no norm: at k = 1 that is their absolute value.
"""

import torch
import work
from bench_logits import GAMMA, formula
from harness import Case, Contender, Target, by_bfloat16, compiled, multiplies_bfloat16, relative
from torch.nn.functional import cross_entropy, normalize

import torch_subspace as ts


def inputs(batch, n, classes, k, dtype, device):
    """Features, frames and labels."""
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n, generator=seed)
    # nearly orthonormal, as it is for speed and memory alone that so many frames are wanted
    weight = torch.randn(classes, k, n, generator=seed) / n**0.5
    target = torch.randint(classes, (batch,), generator=seed)
    return [t.to(device, dtype if t.is_floating_point() else None) for t in (x, weight, target)]


def eager(x, weight, target):
    """The loss as one would write it."""
    return cross_entropy(formula(x, weight), target)


def separate(x, weight, target):
    """Our logits, torch's cross-entropy."""
    return cross_entropy(ts.subspace_logits(x, weight, gamma=GAMMA), target)


def fused(x, weight, target):
    """Our loss."""
    return ts.subspace_cross_entropy(x, weight, target, gamma=GAMMA)


LINEAR, CHUNKED = "torch linear_cross_entropy", "torch linear_cross_entropy, chunked"


def linear(name):
    """torch's fused loss of a linear head."""
    options = torch.nn.LinearCrossEntropyOptions() if name == CHUNKED else None

    def loss(x, weight, target):
        return torch.nn.functional.linear_cross_entropy(GAMMA * normalize(x, dim=-1), weight[:, 0], target,
                                                        options=options)

    return loss


def contender(name, function, shape, device, check=True, **options):
    """Loss and gradients by `function`."""

    def step(x, weight, target):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = function(x, weight, target)
        return loss.detach(), *torch.autograd.grad(loss, (x, weight))

    def build():
        given = inputs(*shape, device)
        return lambda: step(*given)

    def error():  # on a part of the classes: the float64 graph of all of them would not fit everywhere
        batch, n, classes, k, dtype = shape
        x, weight, target = inputs(min(batch, 64), n, min(classes, 1000), k, dtype, device)
        found = step(x, weight, target)
        x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
        loss = eager(x, weight, target)
        return relative(found, [t.detach() for t in (loss, *torch.autograd.grad(loss, (x, weight)))])

    batch, n, classes, k, dtype = shape
    return Contender(name, build, error if check else None, peak=True, kept=dtype.itemsize * n * (batch + classes * k),
                     **options)


def case(batch, n, classes, k, device, compile=True, dtype=torch.float32, beside=None):
    """All contenders at one size. beside: another dtype that ours is timed in too."""
    shape = (batch, n, classes, k, dtype)
    contenders = [
        contender("ours: fused", fused, shape, device),
        contender("ours: logits, then cross_entropy", separate, shape, device),
        contender("eager", eager, shape, device),
    ]
    if dtype == torch.float32 and device == "cpu" and by_bfloat16(fused):
        contenders.append(contender("ours: fused, by bfloat16", by_bfloat16(fused), shape, device))
    if compile:
        contenders.append(contender("torch.compile", compiled(eager), shape, device, check=False))
    targets = [
        Target("ours: fused", ("eager",), "<=", 1.1, 1.0),
        Target("ours: fused", ("eager",), ">=", 10, 10, of="peak"),
    ]
    if beside:
        name = f"ours: {str(beside).removeprefix('torch.')}"
        contenders.append(contender(name, fused, (*shape[:-1], beside), device))
        targets = [Target("ours: fused", (name,), ">=", 1.5, 2)]
    if k == 1:
        if hasattr(torch.nn.functional, "linear_cross_entropy"):
            contenders += [contender(name, linear(name), shape, device, check=False, note="no norm: another loss")
                           for name in (LINEAR, CHUNKED)]
        else:
            contenders.append(Contender(LINEAR, lambda: None, missing="torch has it from 2.13 on"))
        targets = [Target("ours: fused", (LINEAR, CHUNKED), "<=", 1, 0.9, of=of) for of in ("p50", "peak")]
    name = f"B={batch} n={n} C={classes} k={k} {str(dtype).removeprefix('torch.')}"
    return Case(name, contenders, targets, **work.cross_entropy(batch, n, classes, k, dtype.itemsize), seconds=25,
                dtype=dtype)


def cases(device):
    """Two batches, and a direction a class, of which torch has the like; bfloat16 where it is multiplied as such; on a
    GPU a batch that fills it, also in the dtype it trains in."""
    found = [case(256, 512, 21841, 8, device), case(64, 512, 21841, 8, device, compile=False),
             *(case(256, 512, classes, 1, device, compile=False) for classes in (21841, 128256))]
    if device == "cpu" and multiplies_bfloat16():
        found += [case(batch, 512, 1000, 8, device, compile=False, dtype=torch.bfloat16, beside=torch.float32)
                  for batch in (256, 64)]
    if device == "cuda":
        found += [case(1024, 512, 21841, 8, device, dtype=torch.bfloat16),
                  case(1024, 512, 21841, 8, device, compile=False)]
    return found
