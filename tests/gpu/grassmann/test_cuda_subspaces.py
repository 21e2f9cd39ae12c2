"""Frames at work on a GPU against the CPU in float64. Never run so far: no GPU was at hand."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import DEVICE, PRESENT
from helpers import close, frame_error, normal

import torch_subspace as ts
from torch_subspace import grassmann as g

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason="needs a GPU")]


def frames(c, k, n):
    return torch.linalg.qr(normal(c, n, k, seed=c + k)).Q.mT.contiguous()


DIMS = (3, 1, 8)
CALLS = {
    "subspace_scores": (g.subspace_scores, [normal(300, 64, seed=1), frames(10, 4, 64)]),
    "subspace_scores ragged": (lambda x, w: g.subspace_scores(x, w, dims=DIMS),
                               [normal(50, 64, seed=1), frames(1, 12, 64)[0]]),
    "subspace_denoise": (lambda x, w: g.subspace_denoise(x, w, 1.3, 0.4), [normal(300, 64, seed=1), frames(10, 4, 64)]),
    "subspace_patch": (g.subspace_patch, [normal(40, 64, seed=1), normal(40, 64, seed=2), frames(1, 5, 64)[0]]),
    "subspace_patch, one each": (g.subspace_patch, [normal(9, 64, seed=1), normal(9, 64, seed=2), frames(9, 5, 64)]),
    "subspace_patch, a vector": (g.subspace_patch, [normal(9, 64, seed=1), normal(9, 64, seed=2), normal(64, seed=3)]),
    "grouped_normalize": (lambda x: g.grouped_normalize(x, (16,) * 4), [normal(200, 64, seed=1)]),
    "grouped_normalize ragged": (lambda x: g.grouped_normalize(x, DIMS), [normal(200, 12, seed=1)]),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name, dtype, tolerance):
    call, inputs = CALLS[name]
    results = []
    for device, kind in (("cpu", torch.float64), (DEVICE, dtype)):
        leaves = [t.to(device, kind, copy=True).requires_grad_() for t in inputs]
        y = call(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
        results.append([t.detach().cpu().double() for t in (y, *torch.autograd.grad((y * weights).sum(), leaves))])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=tolerance * max(1, here.abs().max().item()))


def test_what_has_no_gradient():
    weight, v = normal(5, 32, seed=1), normal(7, 32, seed=2)
    for here, there in zip(g.rowspace_split(v, weight), g.rowspace_split(v.to(DEVICE), weight.to(DEVICE)), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-12)
    y = torch.arange(60) % 3
    x = normal(60, 4, seed=3) @ normal(4, 20, seed=4) + torch.eye(20, dtype=torch.float64)[y]
    here, there = g.class_subspaces(x, y, 3), g.class_subspaces(x.to(DEVICE), y.to(DEVICE), 3).cpu()
    torch.testing.assert_close(there.mT @ there, here.mT @ here, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e19, 1e30])
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_denoising_does_not_depend_on_the_unit(size, noise):
    """Neither where a gradient is asked for nor where none is."""
    x, w = normal(50, 64, seed=1), frames(10, 4, 64)
    expected = g.subspace_denoise(x, w, noise=noise)
    for trained in (False, True):
        there = (x * size).to(DEVICE, torch.float32).requires_grad_(trained)
        found = g.subspace_denoise(there, w.to(DEVICE, torch.float32), size, noise * size)
        close(found.detach(), expected, 1e-5, device=torch.device(DEVICE).type)


@pytest.mark.parametrize("dtype, offset, tolerance", [
    (torch.float64, 0, 1e-12), (torch.float32, 0, 1e-5), (torch.bfloat16, 0, 1e-5), (torch.float64, 300, 1e-9),
    (torch.float32, 300, 1e-3),
], ids=str)
def test_clusters_of_points_on_a_gpu(dtype, offset, tolerance):
    """KSubspaces takes them to the CPU: as of the same points there in float64; halves are computed in float32."""
    w = frames(1, 7, 32)[0]
    x = torch.cat([normal(60, 2, seed=c) @ w[1 + 2 * c : 3 + 2 * c] for c in range(3)]) + offset * w[0]
    given, dim = x.to(dtype), 3 if offset else 2
    here = g.KSubspaces(3, dim, n_init=3, random_state=0).fit(given.double().numpy())
    there = g.KSubspaces(3, dim, n_init=3, random_state=0)
    labels = there.fit_predict(given.to(DEVICE))
    assert np.array_equal(labels, np.repeat(labels[::60], 60)) and len(set(labels)) == 3
    asked, one_each = normal(20, 32, seed=9).to(dtype), given[::60]
    assert np.array_equal(there.predict(one_each.to(DEVICE)), labels[::60])
    far, true = (model.transform(asked.to(device))[:, model.predict(one_each.to(device))]
                 for model, device in ((there, DEVICE), (here, "cpu")))
    np.testing.assert_allclose(far, true, rtol=tolerance)
    assert there.score(asked.to(DEVICE)) == pytest.approx(here.score(asked), rel=tolerance)


@pytest.mark.parametrize("subspaces", [None, [[0], [1], [0, 1], []]], ids=["whole", "parts"])
def test_pyvenes_intervention(subspaces, monkeypatch):
    """With stand-ins for pyvene's classes: what it does with the device's tensors is ours."""

    class Intervention(torch.nn.Module):
        def __init__(self, subspace_partition=None, **kwargs):
            super().__init__()
            self.subspace_partition = subspace_partition

    mixin = type("DistributedRepresentationIntervention", (), {})
    stub = types.SimpleNamespace(TrainableIntervention=Intervention, DistributedRepresentationIntervention=mixin)
    for name in ("pyvene", "pyvene.models", "pyvene.models.interventions"):
        monkeypatch.setitem(sys.modules, name, stub)
    spec = importlib.util.spec_from_file_location("torch_subspace.grassmann.pyvene_alone",
                                                  Path(g.__file__).with_name("pyvene.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    own = module.SubspaceIntervention(embed_dim=24, low_rank_dimension=4, subspace_partition=[[0, 1], [2, 3]]).double()
    base, source = normal(4, 6, 24, seed=1), normal(4, 6, 24, seed=2)
    results = []
    for device in ("cpu", DEVICE):
        own.to(device).zero_grad()
        y = own(base.to(device), source.to(device), subspaces)
        y.square().sum().backward()
        results.append([t.detach().cpu() for t in (y, own.patch.basis.grad)])
    close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("kind", [ts.RiemannianSGD, ts.RiemannianAdamW], ids=lambda kind: kind.__name__)
def test_modules_train_as_on_the_cpu(kind):
    """A patch and a probe, made on the CPU and moved: the same basis after some steps."""
    base, source = normal(40, 24, seed=1), normal(40, 24, seed=2)
    tokens, tree = normal(4, 9, 24, seed=3), normal(4, 8, seed=4).abs()
    patch, probe = g.SubspacePatch(24, 3, dtype=torch.float64), g.OrthogonalProbe(24, 4, dtype=torch.float64)
    starts = [{key: t.clone() for key, t in module.state_dict().items()} for module in (patch, probe)]
    ends = []
    for device in ("cpu", DEVICE):
        for module, start in zip((patch, probe), starts, strict=True):
            module.to(device).load_state_dict(start)
        optimiser = kind([*patch.parameters(), *probe.parameters()], lr=0.05)
        for _ in range(5):
            optimiser.zero_grad()
            loss = (patch(base.to(device), source.to(device)) - source.to(device)).square().sum()
            (loss + probe.loss(tokens.to(device), tree.to(device))).backward()
            optimiser.step()
        assert frame_error(patch.basis[None].detach()) < 1e-12
        ends.append([module.basis.detach().cpu().clone() for module in (patch, probe)])
    for here, there in zip(*ends, strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-9)


def test_learners_split_and_assign():
    torch.manual_seed(0)
    model = g.DynamicSubspaceLearners(10, 24).to(DEVICE)
    x, y = torch.randn(120, 10).to(DEVICE), (torch.arange(120) % 4).to(DEVICE)
    model.loss(x, y).backward()
    if model.split():
        cluster = model.assign(x)
        assert cluster.device == x.device and cluster.max() < len(model.dims)
        model.loss(x[cluster == 1], y[cluster == 1], learner=1).backward()
