"""SIGReg on a GPU against the CPU kernel in float64: large sizes, chunks, slices of points. Never run so far."""

import functools

import helpers
import pytest
import torch

from torch_subspace.isotropy import sigreg

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
SHAPES = [(1, 1, 1, 1, 2), (3, 129, 33, 65, 5), (8, 512, 128, 256, 17), (1, 20000, 16, 40, 17), (2, 300, 768, 1024, 17),
          (1, 61, 12, 70, 100), (300, 5, 3, 2, 33), (1, 8, 4, 70000, 3)]
close = functools.partial(helpers.close, device="cuda")


def both(v, n, d, slices, knots, dtype, device):
    z = helpers.normal(v, n, d, dtype=torch.float32) * 0.8 + 0.3
    directions = torch.nn.functional.normalize(helpers.normal(d, slices, seed=1, dtype=torch.float32), dim=0)
    z = z.to(device, dtype).requires_grad_()
    loss = sigreg(z, directions=directions.to(device, dtype), knots=knots)
    dloss = torch.linspace(0.5, 1.5, v, dtype=dtype, device=device)
    return loss.detach(), torch.autograd.grad(loss, z, dloss)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    close(both(*shape, dtype, "cuda"), both(*shape, torch.float64, "cpu"), TOLERANCE[dtype])


def test_more_points_than_a_chunk_holds():
    """Of one view and of several, by the loss of all and of each half."""
    z = helpers.normal(2, 70000, 4, dtype=torch.float32).cuda()
    directions = torch.nn.functional.normalize(helpers.normal(4, 300, seed=1, dtype=torch.float32), dim=0).cuda()
    op = torch.ops.torch_subspace.sigreg
    whole = op(z, directions, 17, 3 / 16)
    halves = op(z.reshape(4, 35000, 4), directions, 17, 3 / 16).view(2, 2, 2, 16, 300).sum(1)
    close([whole], [halves], 1e-5)


def test_a_seed_is_that_of_the_cpu():
    z = helpers.normal(100, 20, dtype=torch.float64)
    close([sigreg(z.cuda(), seed=3)], [sigreg(z, seed=3)], 1e-5)


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_large_angles(size):
    z = helpers.normal(50, 3) * size
    directions = torch.eye(3, dtype=torch.float64)
    close([sigreg(z.cuda(), directions=directions.cuda())], [sigreg(z, directions=directions)], 1e-8)
