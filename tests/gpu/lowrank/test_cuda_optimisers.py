"""Optimisers and tools of few dimensions, on a GPU against the CPU in float64. Never run so far: no GPU was at hand."""

import functools

import helpers
import pytest
import torch
from cases import DEVICE, PRESENT
from helpers import normal
from torch import nn

from torch_subspace import lowrank as low

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason="needs a GPU")]
close = functools.partial(helpers.close, device=torch.device(DEVICE).type, floor=1e-2)

OPTIMISERS = {
    **{f"LowRankAdamW, {projector}, {feedback}": functools.partial(
        low.LowRankAdamW, lr=1e-2, rank=6, projector=projector, error_feedback=feedback, every=2)
       for projector in ("range", "svd", "cosine", "hadamard") for feedback in (None, "int8")},
    "LowRankAdamW, hadamard, rank 64": functools.partial(low.LowRankAdamW, lr=1e-2, rank=64, projector="hadamard"),
    "Trion": functools.partial(low.Trion, lr=1e-2, rank=6),
    "CoSO": functools.partial(low.CoSO, lr=1e-2, rank=6, sketch_rank=12),
}


def trained(make, shape, device, steps=5):
    """A parameter after some steps, and at a gradient that is not finite none."""
    p = nn.Parameter(normal(*shape).to(device))
    optimizer = make([p])
    for i in range(steps):
        falling = torch.arange(1, shape[-1] + 1, dtype=torch.float64) ** -0.5  # singular values that are apart
        p.grad = (normal(*shape, seed=i + 1) * falling).to(device)
        if i == 2:
            p.grad.view(-1)[3] = torch.nan
            before = p.detach().clone()
            optimizer.step()
            assert torch.equal(p[-1], before[-1]) if len(shape) == 2 else torch.equal(p[0], before[0])
        else:
            optimizer.step()
        if isinstance(optimizer, low.CoSO) and i == 3:
            optimizer.consolidate()
    assert int(optimizer.skipped) == 1
    return p.detach()


@pytest.mark.filterwarnings("ignore:.*non-finite gradient")
@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (3, 80, 70)], ids=str)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps(name, shape):
    here, there = (trained(OPTIMISERS[name], shape, device) for device in ("cpu", DEVICE))
    close(there.cpu(), here, 1e-8)


def test_directions():
    g = normal(90, 70) * torch.arange(1, 71, dtype=torch.float64) ** -1.0
    here, there = (low.range_finder(g.to(device), 8, seed=4).cpu() for device in ("cpu", DEVICE))
    close(there @ there.mT, here @ here.mT, 1e-8)
    found = [low.cosine_columns(g.to(device), 8) for device in ("cpu", DEVICE)]
    assert torch.equal(found[0][1], found[1][1].cpu())
    close(found[1][0].cpu(), found[0][0], 1e-10)
    sketches = [low.frequent_directions_(torch.zeros(8, 70, dtype=torch.float64, device=device), g.to(device))
                for device in ("cpu", DEVICE)]
    close((sketches[1].mT @ sketches[1]).cpu(), sketches[0].mT @ sketches[0], 1e-8)


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
def test_random_subspace(kind):
    results = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).double().to(device)
        model = low.RandomSubspace(net, 12, kind=kind, seed=3)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(normal(*p.shape, seed=7))
        y = model(normal(9, 20, seed=2).to(device))
        y.square().sum().backward()
        results.append([t.cpu() for t in (y.detach(), *(p.grad for p in model.parameters() if p.requires_grad))])
    close(results[1], results[0], 1e-8)
