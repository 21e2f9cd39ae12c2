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


def sentences(z):
    return z.unflatten(0, (-1, 4))


PROBE, LEARNERS = ts.grassmann.OrthogonalProbe(8, 3, 4, 5), ts.grassmann.DynamicSubspaceLearners(8, 6)
MATRIX = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
FUNCTIONS = {  # of points, which are as many as they like; of a function and its module one, the other has its own test
    **{f"von_neumann_entropy, {of}": lambda z, of=of: ts.isotropy.von_neumann_entropy(z, of=of)
       for of in ("points", "covariance", "directions")},
    "ridge_transition": lambda z: ts.isotropy.ridge_transition(z[:-1], z[1:], eta=0.1),
    "procrustes": lambda z: ts.isotropy.procrustes(z, z @ MATRIX + 0.1 * z.square()),
    "GroupLassoLoss": lambda z: ts.isotropy.GroupLassoLoss((3, 4, 1))(z.mT),
    "LambdaOrthogonalityLoss": lambda z: ts.isotropy.LambdaOrthogonalityLoss(0.5)([z, z[1:].mT]),
    "SimilarityDistillationLoss": lambda z: ts.isotropy.SimilarityDistillationLoss(tau=2.0, alpha=1.0)(
        (z @ z.mT).detach(), (z + 1) @ z.mT),
    "simlap_loss": lambda z: ts.isotropy.simlap_loss(z[:-1], z[1:], z[1:].sigmoid(), LABELS[: len(z) - 1],
                                                     LABELS[1 : len(z)]),
    "SIGRegLoss": lambda z: ts.isotropy.SIGRegLoss(5)(z[None], seed=0),
    "LeJEPALoss": lambda z: ts.isotropy.LeJEPALoss(0.1, num_slices=5)(torch.stack([z, z.square()]), seed=0),
    "koopman_information_loss": lambda z: ts.isotropy.koopman_information_loss(z[None, :-1], z[None, 1:], k=2),
    "subspace_scores": lambda z: ts.grassmann.subspace_scores(z, MATRIX.unflatten(0, (2, 4))),
    "OrthogonalProbe.distances": lambda z: PROBE.distances(sentences(z)),
    "OrthogonalProbe.loss": lambda z: PROBE.loss(sentences(z), sentences(z)[:, 1:, 0].abs()),
    "DynamicSubspaceLearners": lambda z: LEARNERS(z),
    "DynamicSubspaceLearners.loss": lambda z: LEARNERS.loss(z, LABELS[: len(z)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function(name):
    compiled = torch.compile(FUNCTIONS[name], dynamic=True, fullgraph=True, backend="aot_eager")
    for count in (24, 16):
        z = Z[:count].clone().requires_grad_()
        results = compiled(z), FUNCTIONS[name](z)
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), z)[0] for t in results))


IN_PLACE = {
    "prox_group_lasso_": lambda w: ts.isotropy.prox_group_lasso_(w, [1] * w.shape[0], 0.1),
    "tucker_compose": lambda w: ts.tucker_compose(w.new_ones(2, 2), [w.new_ones(n, 2) for n in w.shape], out=w),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_may_be_transposed(name):
    compiled = torch.compile(IN_PLACE[name], dynamic=True, fullgraph=True, backend="aot_eager")
    for count in (24, 16):
        weights = [Z[:count, :5].clone().mT for _ in range(2)]
        compiled(weights[0])
        IN_PLACE[name](weights[1])
        torch.testing.assert_close(*weights)


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
