"""The coding rate of soft memberships on a GPU against the CPU kernel in float64. Never run so far."""

import functools

import helpers
import pytest
import torch

import torch_subspace.rates.coding_rate_soft as module
from torch_subspace.rates.coding_rate_soft import soft_rate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
SHAPES = [(1, 1, 1, 1), (2, 30, 7, 3), (1, 40, 5, 33), (3, 60, 33, 40), (1, 300, 130, 5), (1, 9, 30, 40),
          (1, 512, 64, 512), (2, 2048, 96, 12), (1, 400, 256, 3), (1, 700, 300, 40), (1, 6000, 80, 3)]
close = functools.partial(helpers.close, device="cuda")


def problem(v, n, d, k):
    """Unit features and weights in float64, representable in float32; one column is empty."""
    g = torch.Generator().manual_seed(v + n + d + k)
    z = torch.nn.functional.normalize(torch.randn(v, n, d, generator=g), dim=-1)
    weights = torch.rand(v, n, k, generator=g)
    if k > 2:
        weights[:, :, 1] = 0
    return z.double(), weights.double()


def both(z, weights):
    """rate, dz and dweights"""
    leaves = z.detach().requires_grad_(), weights.detach().requires_grad_()
    rate = soft_rate(*leaves, 0.5)
    drate = torch.linspace(0.5, 1.5, len(rate), dtype=z.dtype, device=z.device)
    return rate.detach(), *torch.autograd.grad(rate, leaves, drate)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "made again"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(monkeypatch, shape, dtype, keep):
    z, weights = problem(*shape)
    truth = both(z, weights)
    if not keep:
        monkeypatch.setattr(module, "KEEP_INVERSES", 0)
    close(both(z.to("cuda", dtype), weights.to("cuda", dtype)), truth, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(2, 60, 8, 40), (1, 300, 130, 5), (1, 300, 200, 300)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_care_where_features_have_collapsed(shape, dtype):
    z, weights = problem(*shape)
    z[-1] = (z[-1, :1] + 1e-3 * z[-1]) * 300
    z = z.float().double()
    op = torch.ops.torch_subspace.coding_rate_soft
    _, inverse, stats = op(z.to("cuda", dtype), weights.to("cuda", dtype), 0.5, True)
    assert (stats[-1, 1] == -1).all() and not inverse[-1].any() and (stats[:-1, 1] >= 0).all()
    close(both(z.to("cuda", dtype), weights.to("cuda", dtype)), both(z, weights), 1e-5)


def test_tf32_is_never_used():
    z, weights = (t.float().cuda() for t in problem(1, 512, 64, 512))
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        found = []
        for torch.backends.cuda.matmul.allow_tf32 in (False, True):
            found.append(both(z, weights))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert helpers.same(*found)


def test_bad_values_give_nan():
    for where in range(2):
        for value in (float("nan"), float("inf")) if where == 0 else (float("nan"), float("inf"), -1.0):
            inputs = [t.cuda() for t in problem(2, 30, 7, 3)]
            inputs[where][1, 3, 2] = value
            rate = soft_rate(*inputs, 0.5)
            assert rate[0].isfinite() and rate[1].isnan()


def test_nothing_to_sum():
    for shape in ((0, 5, 3, 4), (2, 5, 3, 0), (2, 5, 3, 4)):
        z, weights = (t.cuda() for t in problem(*shape))
        rate, dz, dweights = both(z, 0 * weights)
        assert not rate.any() and not dz.any() and not dweights.any()


def test_same_bits_every_time():
    z, weights = (t.float().cuda() for t in problem(*SHAPES[6]))
    assert helpers.same(both(z, weights), both(z, weights))


def test_opcheck():
    z, weights = (t.float().cuda().requires_grad_() for t in problem(2, 20, 5, 4))
    torch.library.opcheck(torch.ops.torch_subspace.coding_rate_soft, (z, weights, 0.5, True))
