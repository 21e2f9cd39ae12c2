"""Averages of frames are frames, of subspaces whatever their bases, and the averages that torch keeps."""

import math

import pytest
import torch
from helpers import frame_error, optional
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import torch_subspace as ts
from torch_subspace.grassmann import FrameAverage, average_frames


def stack(seed, c=4, k=3, n=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(c, n, k, generator=g, dtype=dtype)).Q.mT.contiguous()


def near(w, by, seed=9):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr((w + by * torch.randn(w.shape, generator=g, dtype=w.dtype)).mT).Q.mT.contiguous()


def rotated(w, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*w.shape[:-1], w.shape[-2], generator=g, dtype=w.dtype)).Q @ w


def projector(w):
    return w.mT @ w


@pytest.mark.parametrize("of", ["subspaces", "bases"])
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
def test_the_mean_is_a_frame(of, dtype, most):
    w = stack(0).to(dtype)
    mean = average_frames([w, near(w, 0.1), near(w, 0.2, 3)], [1, 2, 0.5], of=of)
    assert mean.shape == w.shape and mean.dtype == dtype and frame_error(mean) < most


@pytest.mark.parametrize("of", ["subspaces", "bases"])
def test_of_equal_frames_it_is_that_frame(of):
    w = stack(1)
    torch.testing.assert_close(average_frames([w, w, w], of=of), w, rtol=0, atol=1e-14)
    torch.testing.assert_close(average_frames(w[None], of=of), w, rtol=0, atol=1e-14)
    torch.testing.assert_close(average_frames([stack(2), w], [0, 1], of="bases"), w, rtol=0, atol=1e-14)


def test_bases_do_not_matter_to_subspaces():
    w, v = stack(0), near(stack(0), 0.3)
    one, two = average_frames([w, v]), average_frames([w, rotated(v)])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    torch.testing.assert_close(projector(average_frames([rotated(w), v])), projector(one), rtol=0, atol=1e-12)
    turned = average_frames([w, rotated(w)], of="bases")
    assert (projector(turned) - projector(w)).abs().max() < 1e-12  # the same span here, by another basis


def test_it_is_the_nearest_of_all():
    """No other span has a smaller sum of squared chordal distances, and no other frame one of squared differences."""
    stacks, shares = [near(stack(0), 0.2, seed) for seed in range(4)], torch.tensor([1.0, 2.0, 1.0, 0.5]).double()

    def cost(w, of):
        far = [projector(w) - projector(t) if of == "subspaces" else w - t for t in stacks]
        return sum(s * d.square().sum((-2, -1)) for s, d in zip(shares, far))

    for of in ("subspaces", "bases"):
        best = average_frames(stacks, shares, of=of)
        for seed in range(20):
            assert (cost(best, of) <= cost(near(best, 0.02, seed), of) + 1e-12).all()


def test_ragged_frames():
    dims = (1, 3, 2)
    w, v = (torch.cat([stack(s + i, 1, k)[0] for i, k in enumerate(dims)]) for s in (0, 50))
    for of in ("subspaces", "bases"):
        mean = average_frames([w, v], of=of, dims=dims).split(dims)
        for a, b, m in zip(w.split(dims), v.split(dims), mean, strict=True):
            torch.testing.assert_close(m, average_frames([a[None], b[None]], of=of)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [None, 0.8])
@pytest.mark.parametrize("subspace_dim", [2, (1, 2, 3, 2)], ids=["uniform", "ragged"])
def test_the_average_that_torch_keeps(decay, subspace_dim):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), ts.GrassmannLinear(8, 4, subspace_dim))
    ours = AveragedModel(model, avg_fn=FrameAverage(decay))
    torchs = AveragedModel(model, avg_fn=get_ema_avg_fn(decay) if decay else None)
    optimiser = ts.RiemannianSGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(25):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(4, (16,))).backward()
        optimiser.step()
        ours.update_parameters(model)
        torchs.update_parameters(model)
    assert ours.module[1].frame_error() < 1e-6 < 1e-3 < torchs.module[1].frame_error()
    torch.testing.assert_close(ours.module[0].weight, torchs.module[0].weight)


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_averages_of_timm_take_the_nearest_frames(kind):
    """Its classes average entry by entry; `orthonormalize_` is the docs' line for them."""
    utils = optional("timm.utils")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), ts.GrassmannLinear(8, 4, 2))
    average = getattr(utils, kind)(model, decay=0.9)
    optimiser = ts.RiemannianSGD(model.parameters(), lr=0.5)
    x, y = torch.randn(16, 6), torch.arange(16) % 4
    for _ in range(2):  # and it goes on from there
        for _ in range(20):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
            average.update(model)
        mean = average.module[1].weight.detach().double()
        assert average.module[1].frame_error() > 1e-2
        with pytest.warns(RuntimeWarning, match="orthonormalize_"):
            average.module(x)
        for layer in average.module.modules():
            if isinstance(layer, ts.GrassmannLinear):
                layer.orthonormalize_()
        assert average.module[1].frame_error() < 1e-6
        u, _, vh = torch.linalg.svd(mean, full_matrices=False)
        torch.testing.assert_close(average.module[1].weight.double(), u @ vh, rtol=0, atol=1e-6)
        ts.grassmann.watch.again(average.module[1])


def test_the_average_of_lightning_swaps_frames():
    """Its WeightAveraging hands `avg_fn` on to AveragedModel, and swaps the values around a validation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), ts.GrassmannLinear(8, 4, 2))
    average = AveragedModel(model, device=None, use_buffers=True, avg_fn=FrameAverage(decay=0.9))
    optimiser = ts.RiemannianAdamW(model.parameters(), lr=0.1)
    x, y = torch.randn(16, 6), torch.arange(16) % 4
    for _ in range(10):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
        average.update_parameters(model)
        for _ in range(2):
            assert model[2].frame_error() < 1e-6
            for p, q in zip(model.parameters(), average.module.parameters()):
                p.data, q.data = q.data.clone(), p.data.clone()
    assert average.module[2].frame_error() < 1e-6 and not torch.equal(average.module[2].weight, model[2].weight)


def test_buffers_that_count():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), ts.GrassmannLinear(8, 4, 2))
    average = AveragedModel(model, avg_fn=FrameAverage(0.9), use_buffers=True)
    for _ in range(3):
        model(torch.randn(16, 6))
        average.update_parameters(model)
    assert average.module[1].num_batches_tracked == 3 and average.module[2].frame_error() < 1e-6


@pytest.mark.parametrize("error, call", [
    ("frames are empty", lambda w: average_frames([])),
    ("frames\\[1\\] is", lambda w: average_frames([w, w[:2]])),
    ("weights must be 2 numbers", lambda w: average_frames([w, w], [1])),
    ("weights must be 2 numbers", lambda w: average_frames([w, w], [1, -1])),
    ("weights must be 2 numbers", lambda w: average_frames([w, w], [math.nan, 1])),
    ("of must be one of", lambda w: average_frames([w, w], of="planes")),
    ("cancel", lambda w: average_frames([w, -w], of="bases")),
    ("decay must be", lambda w: FrameAverage(1.0)),
    ("of must be one of", lambda w: FrameAverage(of="planes")),
])
def test_bad_values(error, call):
    with pytest.raises(ValueError, match=error):
        call(stack(0))


def test_bad_types():
    with pytest.raises(TypeError, match="frames\\[0\\] must be a tensor, got list"):
        average_frames([[1.0]])
    with pytest.raises(TypeError, match="share float32 or float64"):
        average_frames([stack(0), stack(0).float()])
    with pytest.raises(TypeError, match="share float32 or float64"):
        average_frames([stack(0).half()] * 2)
    w, v = stack(0, 1, 1, 2), torch.tensor([[[0.0, 1.0]]]).double()
    w = torch.tensor([[[1.0, 0.0]]]).double()
    with pytest.raises(ValueError, match="no span is nearest"):
        average_frames([w, v])
    for of in ("subspaces", "bases"):
        with pytest.raises(ValueError, match="average_frames: frames.1. are not finite"):
            average_frames([stack(0), stack(0) * float("nan")], of=of)
