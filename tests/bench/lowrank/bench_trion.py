"""Trion's step of one matrix: ours, torch's Muon, LowRankAdamW along cosines, and the least that the step does.

The floor is Fourier's transform of the momentum, both products with the basis and Newton-Schulz of r columns.
"""

import reference
import torch
import work
from harness import Case, Contender, Target, relative

from torch_subspace.lowrank import LowRankAdamW, Trion, cosine_basis, newton_schulz
from torch_subspace.lowrank.newton_schulz import COEFFICIENTS

OURS, MUON, FLOOR = "ours", "torch.optim.Muon, bfloat16", "floor: transform, products, Newton-Schulz"
ADAMW, LOW = "torch.optim.AdamW", "ours: LowRankAdamW, cosines"


def inputs(m, n, device):
    """A weight and its gradient."""
    seed = torch.Generator().manual_seed(0)
    return [torch.randn(m, n, generator=seed).to(device) for _ in range(2)]


def stepped(make, m, n, device):
    """An optimiser of one parameter that has a gradient, and the parameter."""
    weight, grad = inputs(m, n, device)
    p = torch.nn.Parameter(weight)
    p.grad = grad
    return make([p]), p


def floor(m, n, rank, device):
    """What no step of this kind does without."""
    weight, momentum = inputs(m, n, device)
    short = min(m, n)
    if m < n:
        weight, momentum = weight.T.contiguous(), momentum.T.contiguous()
    basis = cosine_basis(short, torch.arange(rank, device=device)).T.contiguous()
    columns = momentum[:, :rank].contiguous()

    def step():
        torch.fft.rfft(momentum)
        torch.addmm(momentum, columns, basis, alpha=-0.05, out=momentum)
        return torch.addmm(weight, newton_schulz(columns), basis, alpha=-0.02, out=weight)

    return Contender(FLOOR, lambda: step)


def contender(name, make, m, n, device, check=None, note=""):
    """One step."""

    def build():
        optimizer, _ = stepped(make, m, n, device)
        return optimizer.step

    return Contender(name, build, check, note=note, peak=True)


def case(m, n, rank, device, must, stretch):
    """All contenders at one size."""

    def make(params):
        return Trion(params, lr=0.02, rank=rank, weight_decay=0.0)

    def check():
        """The weight's change in the first step, of a power of two."""
        optimizer, p = stepped(make, m, n, device)
        before = p.detach().cpu().double()
        optimizer.step()
        momentum = inputs(m, n, "cpu")[1].double()
        momentum = momentum.T if m < n else momentum
        rotated = momentum @ cosine_basis(min(m, n), dtype=torch.float64)
        index = rotated.abs().sum(0).topk(rank).indices
        triples = COEFFICIENTS["muon"] * 5
        update = reference.newton_schulz(rotated[:, index], triples) @ cosine_basis(min(m, n), index,
                                                                                    dtype=torch.float64).T
        update = (update.T if m < n else update) * max(1, m / n) ** 0.5
        return relative(p.detach().cpu().double(), before - 0.02 * update)

    contenders = [floor(m, n, rank, device), contender(OURS, make, m, n, device, check),
                  contender(MUON, torch.optim.Muon, m, n, device, note="full rank, in bfloat16"),
                  contender(LOW, lambda params: LowRankAdamW(params, rank=rank, projector="cosine"), m, n, device,
                            note="another step"),
                  contender(ADAMW, torch.optim.AdamW, m, n, device, note="another step")]
    return Case(f"{m}x{n} rank {rank} float32", contenders,
                [Target(OURS, (MUON,), ">=", must, stretch), Target(OURS, (FLOOR,), "<=", 2, 1.4)],
                **work.trion(m, n, rank), seconds=4)


def cases(device):
    """Square, tall and wide."""
    return [case(1024, 1024, 128, device, 2, 4), case(4096, 1024, 128, device, 2.5, 4),
            case(1024, 4096, 128, device, 2.5, 4)]
