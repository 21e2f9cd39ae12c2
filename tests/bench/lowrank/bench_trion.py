"""Trion's step of a matrix, and of a small model's: ours, torch's Muon, LowRankAdamW along cosines, and the least that
it does.

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


def stepped(make, device, *shapes):
    """An optimiser of parameters that have gradients, and the first of them."""
    parameters = []
    for m, n in shapes:
        weight, grad = inputs(m, n, device)
        parameters.append(p := torch.nn.Parameter(weight))
        p.grad = grad
    return make(parameters), parameters[0]


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


def steps(rank, device, shapes, check=None):
    """One step of each: ours, Muon's, and others of other kinds."""
    made = {OURS: (ours(rank), check, ""), MUON: (torch.optim.Muon, None, "full rank, in bfloat16"),
            LOW: (lambda params: LowRankAdamW(params, rank=rank, projector="cosine"), None, "another step"),
            ADAMW: (torch.optim.AdamW, None, "another step")}
    return [Contender(name, lambda make=make: stepped(make, device, *shapes)[0].step, held, note=note, peak=True)
            for name, (make, held, note) in made.items()]


def ours(rank):
    """Trion."""
    return lambda params: Trion(params, lr=0.02, rank=rank, weight_decay=0.0)


def case(m, n, rank, device, must, stretch):
    """All contenders at one size."""

    def check():
        """The weight's change in the first step, of a power of two."""
        optimizer, p = stepped(ours(rank), device, (m, n))
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

    contenders = [floor(m, n, rank, device), *steps(rank, device, [(m, n)], check)]
    return Case(f"{m}x{n} rank {rank} float32", contenders,
                [Target(OURS, (MUON,), ">=", must, stretch), Target(OURS, (FLOOR,), "<=", 2, 1.4)],
                **work.trion(m, n, rank), seconds=4)


def model(rank, device):
    """The matrices of a MiniLM's six layers."""
    shapes = [*[(384, 384)] * 4, (1536, 384), (384, 1536)] * 6
    return Case(f"a MiniLM's layers rank {rank} float32", steps(rank, device, shapes),
                [Target(OURS, (MUON,), ">=", 2, 4)], **work.trion_model(shapes, rank), seconds=4)


def cases(device):
    """Square, tall and wide, and a model's."""
    return [case(1024, 1024, 128, device, 2, 4), case(4096, 1024, 128, device, 2.5, 4),
            case(1024, 4096, 128, device, 2.5, 4), case(4096, 4096, 128, device, 2.5, 4), model(128, device)]
