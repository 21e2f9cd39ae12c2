"""Fastfood on a GPU against the CPU's, to the bit: what is drawn, folded sums, groups of rows. Never run so far."""

import pytest
import torch
from helpers import normal

from torch_subspace.lowrank import fastfood, fastfood_adjoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (3, 1, 2), (2, 3, 2), (5, 7, 300), (5, 300, 7), (1, 1000, 1 << 20), (1, 1 << 20, 1000),
          (40, 4096, 4096), (1, 1 << 22, 1), (2, 17, 1 << 21)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v, d, size", SHAPES)
def test_bits_are_those_of_the_cpu(v, d, size, dtype):
    theta, x = normal(v, d).to(dtype), normal(v, size).to(dtype)
    for seed in (0, 2**63 - 1):
        assert torch.equal(fastfood(theta.cuda(), size, seed=seed).cpu(), fastfood(theta, size, seed=seed))
        assert torch.equal(fastfood_adjoint(x.cuda(), d, seed=seed).cpu(), fastfood_adjoint(x, d, seed=seed))


def test_more_rows_than_are_worked_on_together():
    theta = normal(20, 50, dtype=torch.float32)
    assert torch.equal(fastfood(theta.cuda(), 1 << 20, seed=3).cpu(), fastfood(theta, 1 << 20, seed=3))
