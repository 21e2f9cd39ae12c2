"""Products of stacks of matrices on a GPU, in float32 in full whatever torch's TF32 switch says. Never run yet."""

import itertools

import pytest
import torch
from helpers import normal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OP = torch.ops.torch_subspace.product_


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("transa, transb", [*itertools.product((False, True), repeat=2)])
@pytest.mark.parametrize("v, m, n, k, shared", [(1, 1000, 128, 4096, False), (7, 65, 33, 20, False),
                                                (5, 200, 9, 300, True)])
def test_values(v, m, n, k, shared, transa, transb, dtype, tolerance):
    a, b = normal(v, *((k, m) if transa else (m, k))), normal(1 if shared else v, *((n, k) if transb else (k, n)))
    a, b, y = (t.to("cuda", dtype) for t in (a, b, normal(v, m, n, seed=2)))
    truth = 0.5 * y.double() + (a.mT if transa else a).double() @ (b.mT if transb else b).double()
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        OP(y, a, b, transa, transb, 1.0, 0.5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert (y.double() - truth).abs().max() <= tolerance * k**0.5


def test_what_is_not_read():
    y = torch.full((1, 3, 4), torch.nan, device="cuda")
    OP(y, torch.ones(1, 3, 2, device="cuda"), torch.ones(1, 2, 4, device="cuda"), False, False, 1.0, 0.0)
    assert bool((y == 2).all())
