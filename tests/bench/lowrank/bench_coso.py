"""CoSO's step: ours, and the form with an SVD of the gradient and one of the sketch, which the published code has.

Each finds directions, feeds the sketch, steps in r1 dimensions and moves the weight; without a memory of earlier tasks
and with one. The floor is the products with the gradient that ours has: three at max(r1, r2), two at r1, two with the
memory. Saved is the state.
"""

import functools

import torch
import work
from harness import Case, Contender, Target, relative
from torch import nn

from torch_subspace.lowrank import CoSO

FLOOR, OURS, SVD = "floor: matrix products alone", "ours", "the form with two SVDs"
RANK, SKETCH, LR = 50, 120, 1e-6


def weight(n, device):
    """A weight, with a gradient whose columns become shorter."""
    seed = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(n, n, generator=seed).to(device))
    p.grad = (torch.randn(n, n, generator=seed) * torch.arange(1, n + 1) ** -0.5).to(device)
    return p


def memory_of(n, count, device):
    seed = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(n, count, generator=seed))[0].to(device)


class WithSVDs:
    """The formula on the inputs' side, by torch's own operations."""

    def __init__(self, p, memory):
        self.p, self.memory, self.sketch, self.count = p, memory, None, 0
        self.mean = self.square = torch.zeros(len(p), RANK, device=p.device)

    def kept(self):
        tensors = [self.sketch, self.mean, self.square, self.basis, *([] if self.memory is None else [self.memory])]
        return sum(t.nbytes for t in tensors)

    def _shrunk(self, rows):
        _, s, vh = torch.linalg.svd(rows, full_matrices=False)
        return vh, (s[:SKETCH].square() - s[SKETCH].square()).clamp(min=0).sqrt()[:, None] * vh[:SKETCH]

    @torch.no_grad()
    def step(self):
        g = self.p.grad
        if self.memory is not None:
            g = g - (g @ self.memory) @ self.memory.mT
        vh, block = self._shrunk(g)
        self.basis = vh[:RANK].mT
        self.sketch = block if self.sketch is None else self._shrunk(torch.cat([self.sketch, block]))[1]
        low = g @ self.basis
        self.count += 1
        self.mean = self.mean.lerp(low, 0.1)
        self.square = self.square * 0.999 + 0.001 * low.square()
        root = (self.square / (1 - 0.999**self.count)).sqrt() + 1e-8
        self.p.sub_(LR / (1 - 0.9**self.count) * (self.mean / root) @ self.basis.mT)


def ours(n, count, device, lr=LR):
    p = weight(n, device)
    optimizer = CoSO([p], lr=lr, rank=RANK, sketch_rank=SKETCH)
    if count:
        optimizer.state[p] = {"step": torch.zeros(()), "memory": memory_of(n, count, device)}
    return optimizer, p


def case(n, count, device):
    """All contenders at one size."""

    @functools.lru_cache(maxsize=1)
    def made(kind):
        it = ours(n, count, device)[0] if kind == OURS else WithSVDs(
            weight(n, device), memory_of(n, count, device) if count else None)
        it.step()
        return it

    def run(kind):
        step = made(kind).step
        made.cache_clear()
        return step

    def check():
        optimizer, p = ours(n, count, device, lr=1.0)
        before = p.detach().double()
        optimizer.step()
        state = {key: t.double() for key, t in optimizer.state[p].items()}
        u = state["exp_avg"] / 0.1 / ((state["exp_avg_sq"] / 1e-3).sqrt() + 1e-8)
        return relative([(p.detach().double() - before).cpu()], [(-u @ state["basis"].mT).cpu()])

    def products():
        p = weight(n, device)
        g, q, r = p.grad, torch.randn(n, SKETCH, device=device), torch.randn(n, RANK, device=device)
        m = memory_of(n, count, device) if count else None

        @torch.no_grad()
        def step():
            if m is not None:
                torch.addmm(g, g @ m, m.mT, alpha=-1)
            g @ (g.mT @ (g @ q))
            p.addmm_(g @ r, r.mT, alpha=1e-12)

        return step

    def saved():
        return sum(t.nbytes for s in made(OURS).state.values() for t in s.values())

    contenders = [
        Contender(FLOOR, products),
        Contender(OURS, lambda: run(OURS), check, saved=saved),
        Contender(SVD, lambda: run(SVD), saved=lambda: made(SVD).kept(), note="the same up to the range finder"),
    ]
    name = f"{n}x{n} r1={RANK} r2={SKETCH} float32" + (f", memory of {count}" if count else "")
    return Case(name, contenders, [Target(OURS, (SVD,), ">=", 5, 8)], seconds=8,
                **work.coso(n, RANK, SKETCH, count))


def cases(device):
    return [case(768, 0, device), case(768, 200, device), case(1024, 0, device)]
