"""torch.compile(dynamic=True, fullgraph=True) of every op, layer and loss: sizes and numbers are symbols."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import torch_subspace as ts

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import cases  # noqa: E402
from helpers import close  # noqa: E402

TABLE = [case for case in cases.CASES if case.compiles]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_every_op(case):
    leaves = cases.cast(case, case.make(), torch.float32, "cpu")
    compiled = torch.compile(case.call, dynamic=True, fullgraph=True, backend="aot_eager")
    made = cases.both(case, leaves)
    close(cases.both(dataclasses.replace(case, call=compiled), leaves), made, 1e-5)


Z, LABELS = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4
MODULES = {
    "layer": (lambda: ts.GrassmannLinear(8, 4, 2), (Z,)),
    "ragged layer": (lambda: ts.GrassmannLinear(8, 4, (1, 2, 3, 2)), (Z,)),
    "CodingRateLoss": (ts.CodingRateLoss, (Z,)),
    "MCR2Loss": (ts.MCR2Loss, (Z, LABELS)),
    "MLCLoss": (ts.MLCLoss, (Z, Z)),
    "adapted layer": (lambda: ts.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), ts.TuckerConfig(rank=2)), (Z,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_module(name):
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    module = make()
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend="aot_eager")
    for count in (24, 16):
        given = [t[:count] for t in inputs]
        torch.testing.assert_close(compiled(*given), module(*given))


@pytest.mark.parametrize("kind", [ts.RiemannianSGD, ts.RiemannianAdamW], ids=lambda kind: kind.__name__)
def test_both_optimisers(kind):
    """A step may break the graph, where it counts; its values are those of plain code."""
    torch.manual_seed(0)
    layers = [ts.GrassmannLinear(8, 4, 2), ts.GrassmannLinear(8, 4, 2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimisers = [kind(layer.parameters(), lr=0.1) for layer in layers]
    steps = [optimisers[0].step, torch.compile(optimisers[1].step, dynamic=True, backend="aot_eager")]
    for _ in range(3):
        for layer, step in zip(layers, steps, strict=True):
            layer.weight.grad = torch.autograd.grad(layer(Z).square().sum(), layer.weight)[0]
            step()
    torch.testing.assert_close(*(layer.weight for layer in layers))
