"""Frames at work on a GPU against the CPU in float64. Never run so far: no GPU was at hand."""

import pytest
import torch
from helpers import frame_error, normal

import torch_subspace as ts
from torch_subspace import grassmann as g

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


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
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        leaves = [t.to(device, kind, copy=True).requires_grad_() for t in inputs]
        y = call(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
        results.append([t.detach().cpu().double() for t in (y, *torch.autograd.grad((y * weights).sum(), leaves))])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=tolerance * max(1, here.abs().max().item()))


def test_what_has_no_gradient():
    weight, v = normal(5, 32, seed=1), normal(7, 32, seed=2)
    for here, there in zip(g.rowspace_split(v, weight), g.rowspace_split(v.cuda(), weight.cuda()), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-12)
    y = torch.arange(60) % 3
    x = normal(60, 4, seed=3) @ normal(4, 20, seed=4) + torch.eye(20, dtype=torch.float64)[y]
    here, there = g.class_subspaces(x, y, 3), g.class_subspaces(x.cuda(), y.cuda(), 3).cpu()
    torch.testing.assert_close(there.mT @ there, here.mT @ here, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [ts.RiemannianSGD, ts.RiemannianAdamW], ids=lambda kind: kind.__name__)
def test_modules_train_as_on_the_cpu(kind):
    """A patch and a probe, made on the CPU and moved: the same basis after some steps."""
    base, source = normal(40, 24, seed=1), normal(40, 24, seed=2)
    tokens, tree = normal(4, 9, 24, seed=3), normal(4, 8, seed=4).abs()
    patch, probe = g.SubspacePatch(24, 3, dtype=torch.float64), g.OrthogonalProbe(24, 4, dtype=torch.float64)
    starts = [{key: t.clone() for key, t in module.state_dict().items()} for module in (patch, probe)]
    ends = []
    for device in ("cpu", "cuda"):
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
    model = g.DynamicSubspaceLearners(10, 24).cuda()
    x, y = torch.randn(120, 10).cuda(), (torch.arange(120) % 4).cuda()
    model.loss(x, y).backward()
    if model.split():
        cluster = model.assign(x)
        assert cluster.is_cuda and cluster.max() < len(model.dims)
        model.loss(x[cluster == 1], y[cluster == 1], learner=1).backward()
