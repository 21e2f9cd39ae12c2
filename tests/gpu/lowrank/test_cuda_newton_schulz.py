"""Newton-Schulz on a GPU against the CPU kernel in float64: large sizes, blocks of rows, many matrices. Never run."""

import functools

import helpers
import pytest
import torch

from torch_subspace.lowrank import newton_schulz

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}
SHAPES = [(1, 1), (3, 129, 65), (1025, 1300), (2, 1030, 2100), (300, 5, 8), (2, 4096, 128), (70000, 2, 3)]
close = functools.partial(helpers.close, device="cuda")


def both(shape, dtype, device, **options):
    x = helpers.normal(*shape, dtype=torch.float32).to(device, dtype).requires_grad_()
    y = newton_schulz(x, **options)
    return y.detach(), torch.autograd.grad(y, x, helpers.normal(*shape, seed=1).float().to(device, dtype))[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    close(both(shape, dtype, "cuda"), both(shape, torch.float64, "cpu"), TOLERANCE[dtype], floor=1e-3)


def test_more_matrices_than_there_is_scratch_for():
    """Some of them together, by those of each half."""
    x = helpers.normal(600, 200, 300, dtype=torch.float32).cuda()
    close([newton_schulz(x, steps=2)], [torch.cat([newton_schulz(h, steps=2) for h in x.chunk(7)])], 1e-6)


def test_it_converges_in_float32():
    x = helpers.normal(512, 2048, dtype=torch.float32).cuda()
    y = newton_schulz(x, steps=12, coefficients="quintic").cpu().double()
    helpers.close([y @ y.mT], [torch.eye(512)], 1e-5)
