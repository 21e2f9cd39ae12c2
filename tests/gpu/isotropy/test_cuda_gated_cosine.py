"""Gated cosines on a GPU against the CPU kernel in float64: large sizes, many views, vectors of 0. Never run so far."""

import functools

import helpers
import pytest
import torch

from torch_subspace.isotropy import gated_cosine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
SHAPES = [(1, 1, 1, 1), (3, 129, 65, 33), (1, 2000, 3000, 64), (1, 4, 70000, 3), (5000, 2, 3, 5), (1, 30, 20, 5000)]
close = functools.partial(helpers.close, device="cuda", floor=1e-3)


def inputs(v, b, n, k, dtype, device):
    made = [helpers.normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(((v, b, k), (v, n, k)))]
    return [t.to(device, dtype) for t in (*made, helpers.normal(v, b, k, seed=2).float().sigmoid())]


def both(*given):
    leaves = [t.requires_grad_() for t in given]
    cosine = gated_cosine(*leaves)
    weight = torch.linspace(-1, 2, cosine.numel(), dtype=torch.float64).view(cosine.shape).to(cosine)
    return cosine.detach(), *torch.autograd.grad(cosine, leaves, weight)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    close(both(*inputs(*shape, dtype, "cuda")), both(*inputs(*shape, torch.float64, "cpu")), TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units_and_vectors_of_0(scale):
    z1, z2, gate = inputs(1, 5, 6, 7, torch.float32, "cpu")
    z1, z2, gate = scale * z1, scale * z2, scale * gate
    z1[0, 1], z2[0, 2], gate[0, 3] = 0, 0, 0
    cosine = gated_cosine(*(t.cuda() for t in (z1, z2, gate)))
    close([cosine], [gated_cosine(z1, z2, gate)], 1e-5)
    z1[0, 0, 0], z2[0, 4, 1] = torch.inf, torch.nan
    cosine = gated_cosine(*(t.cuda() for t in (z1, z2, gate))).cpu()
    assert torch.equal(cosine.isnan(), gated_cosine(z1, z2, gate).isnan())
