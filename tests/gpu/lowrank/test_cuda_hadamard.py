"""The Walsh-Hadamard transform on a GPU against the CPU's, to the bit: all numbers of passes, halves. Never run yet."""

import pytest
import torch
from helpers import normal

from torch_subspace.lowrank import hadamard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1000, 2), (77, 16), (33, 32), (5, 64), (300, 2048), (9, 4096), (70, 8192), (3, 1 << 14),
          (2, 1 << 17), (1, 1 << 20), (1, 1 << 22), (1, 1 << 24)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_cpu(shape, dtype):
    x = normal(*shape).to(dtype)
    for normalize in (False, True):
        assert torch.equal(hadamard(x.cuda(), normalize=normalize).cpu(), hadamard(x, normalize=normalize))


def test_the_longest_row():
    x = normal(1 << 26, dtype=torch.float32).cuda()
    found = hadamard(hadamard(x, normalize=True), normalize=True)
    assert (found - x).abs().max() < 1e-4


def test_more_rows_than_are_kept_in_float32_at_a_time():
    x = normal(9, 1 << 21).half()
    assert torch.equal(hadamard(x.cuda(), normalize=True).cpu(), hadamard(x, normalize=True))


def test_memory_that_is_not_aligned():
    x = normal(3 * 64 + 1, dtype=torch.float32)
    assert torch.equal(hadamard(x.cuda()[1:].view(3, 64)).cpu(), hadamard(x[1:].view(3, 64)))
