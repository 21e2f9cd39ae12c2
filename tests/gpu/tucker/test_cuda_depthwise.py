"""The depthwise weight gradient on a GPU against the CPU kernel in float64. Never run so far: no GPU was at hand."""

import pytest
import torch

from torch_subspace.tucker.depthwise import depthwise_weight_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [  # b, c, m, in, kernel, stride, padding, dilation, and n where it is not 1: c groups of n channels
    (1, 1, 1, (1,), (1,), (1,), (0,), (1,)),
    (2, 2, 2, (40,), (9,), (2,), (4,), (3,)),
    (8, 96, 1, (14, 14), (7, 7), (1, 1), (3, 3), (1, 1)),
    (3, 2, 3, (17, 15), (3, 5), (2, 2), (1, 2), (1, 1)),
    (2, 2, 1, (19, 23), (4, 6), (3, 2), (0, 1), (2, 3)),
    (2, 3, 2, (5, 6, 7), (3, 2, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2)),
    (8, 32, 4, (28, 28), (3, 3), (1, 1), (1, 1), (1, 1), 4),  # ResNeXt
    (1, 2, 3, (60, 60), (60, 60), (1, 1), (30, 30), (1, 1), 2),  # fits no shared memory
]


def problem(b, c, m, size, kernel, stride, padding, dilation, n=1, *, dtype):
    """x and dy in float64, representable in dtype, and the geometry."""
    g = torch.Generator().manual_seed(b + c + m + sum(size))
    out = [(w + 2 * p - d * (k - 1) - 1) // s + 1 for w, k, s, p, d in zip(size, kernel, stride, padding, dilation)]
    x, dy = torch.randn(b, c * n, *size, generator=g), torch.randn(b, c * m, *out, generator=g)
    return x.to(dtype).double(), dy.to(dtype).double(), kernel, stride, padding, dilation, c


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    x, dy, *geometry = problem(*shape, dtype=dtype)
    truth = depthwise_weight_gradient(x, dy, *geometry)
    ours = depthwise_weight_gradient(x.to("cuda", dtype), dy.to("cuda", dtype), *geometry)
    assert ours.is_cuda and ours.dtype == dtype and ours.shape == truth.shape
    assert (ours.cpu().double() - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max().clamp(min=0.1)


def test_its_derivatives():
    x, dy, *geometry = problem(*SHAPES[4], dtype=torch.float64)
    inputs = x.cuda().requires_grad_(), dy.cuda().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, dy: depthwise_weight_gradient(x, dy, *geometry), inputs, fast_mode=True)


def test_same_bits_every_time():
    x, dy, *geometry = problem(*SHAPES[2], dtype=torch.float32)
    x, dy = x.float().cuda(), dy.float().cuda()
    assert torch.equal(depthwise_weight_gradient(x, dy, *geometry), depthwise_weight_gradient(x, dy, *geometry))


def test_nothing_to_sum():
    x, dy = torch.randn(0, 4, 5, 5, device="cuda"), torch.randn(0, 8, 5, 5, device="cuda")
    assert not depthwise_weight_gradient(x, dy, (3, 3), (1, 1), (1, 1), (1, 1)).any()
    x, dy = torch.randn(2, 0, 5, 5, device="cuda"), torch.randn(2, 0, 5, 5, device="cuda")
    assert depthwise_weight_gradient(x, dy, (3, 3), (1, 1), (1, 1), (1, 1)).shape == (0, 1, 3, 3)


def test_opcheck():
    x, dy, *geometry = problem(*SHAPES[3], dtype=torch.float32)
    op = torch.ops.torch_subspace.depthwise
    torch.library.opcheck(op, (x.float().cuda().requires_grad_(), dy.float().cuda().requires_grad_(), *geometry))
