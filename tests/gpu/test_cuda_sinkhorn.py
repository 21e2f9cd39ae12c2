"""Sinkhorn on a GPU against the CPU kernels in float64. Never run so far: no GPU was at hand."""

import math

import pytest
import torch

from torch_subspace.sinkhorn import sinkhorn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OP, BACKWARD = torch.ops.torch_subspace.sinkhorn, torch.ops.torch_subspace.sinkhorn_backward
TIGHT = {torch.float64: 1e-13, torch.float32: 1e-6}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}
SIZES = [((), 1, 1), ((), 1, 7), ((), 7, 1), ((2,), 5, 9), ((3,), 64, 64), ((), 257, 300), ((), 1024, 1024)]
each_dtype = pytest.mark.parametrize("dtype", TIGHT, ids=str)


def problem(batch, m, n, dtype):
    g = torch.Generator().manual_seed(m + n)
    scores = torch.rand(*batch, m, n, generator=g, dtype=torch.float64)
    row, col = (torch.rand(*batch, k, generator=g, dtype=torch.float64) + 0.2 for k in (m, n))
    col = col * (row.sum(-1) / col.sum(-1))[..., None]
    return tuple(t.to(dtype).double() for t in (scores, row, col))


def run(inputs, dtype, device, **options):
    scores, row, col = (None if t is None else t.to(device, dtype).detach().requires_grad_() for t in inputs)
    tol = TIGHT[dtype] if device == "cuda" else 1e-13
    plan = sinkhorn(scores, row=row, col=col, tol=tol, max_iter=2000, **options)
    dplan = torch.randn(plan.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan.backward(dplan.to(device, dtype))
    return [plan.detach(), *(t.grad for t in (scores, row, col) if t is not None and t.grad is not None)]


def close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.is_cuda and a.shape == e.shape
        torch.testing.assert_close(a.cpu().double(), e, rtol=0, atol=tolerance * max(e.abs().max().item(), 1e-1))


@each_dtype
@pytest.mark.parametrize("mode", ["implicit", "cpp"])
@pytest.mark.parametrize("eta", [0.5, 0.1])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_general(size, eta, mode, dtype):
    inputs = problem(*size, dtype)
    options = {"eta": eta, "mode": mode, "symmetric": False}
    close(run(inputs, dtype, "cuda", **options), run(inputs, torch.float64, "cpu", **options), TOLERANCE[dtype])


@each_dtype
@pytest.mark.parametrize("n", [1, 30, 257, 1024])
def test_symmetric(n, dtype):
    z = torch.nn.functional.normalize(torch.randn(2, n, 8, dtype=torch.float64), dim=-1)
    s = (z @ z.mT).abs().to(dtype).double()
    inputs = (s + s.mT) / 2, torch.rand(2, n, dtype=torch.float64).to(dtype).double() + 0.5, None
    ours, theirs = (run(inputs, t, d, symmetric=True) for t, d in ((dtype, "cuda"), (torch.float64, "cpu")))
    close(ours, theirs, TOLERANCE[dtype])
    assert torch.equal(ours[0], ours[0].mT)


@each_dtype
def test_any_range_and_masked_entries(dtype):
    scores, row, col = problem((), 90, 70, dtype)
    scores = scores + torch.linspace(0, 64, 90, dtype=torch.float64)[:, None]
    scores[3, ::2] = -math.inf
    ours = run((scores, row, col), dtype, "cuda")
    close(ours, run((scores, row, col), torch.float64, "cpu"), 20 * TOLERANCE[dtype])
    assert not ours[0][3, ::2].any() and not ours[1][3, ::2].any()


def test_no_iterations():
    scores, row, col = (t.cuda() for t in problem((), 6, 5, torch.float64))
    plan = sinkhorn(scores, row=row, col=col, max_iter=0)
    assert torch.allclose(plan, torch.exp((scores - scores.max()) / 0.1))


def test_what_does_not_exist_is_nan():
    scores = torch.rand(2, 9, 9, device="cuda")
    scores[0, 4] = -math.inf
    assert sinkhorn(scores).isnan().any((1, 2)).tolist() == [True, False]


def test_gradcheck():
    scores, row, col = (t.cuda().requires_grad_() for t in problem((), 5, 4, torch.float64))

    def function(scores, row, col):
        return sinkhorn(scores, eta=0.5, tol=1e-13, row=row, col=col * (row.sum() / col.sum()))

    assert torch.autograd.gradcheck(function, (scores, row, col), atol=1e-6)


def test_same_bits_every_time():
    inputs = problem((3,), 200, 150, torch.float32)
    first, second = (run(inputs, torch.float32, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_waits_for_the_device():
    scores = torch.rand(100, 100, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sinkhorn(scores).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_empty_batch():
    scores = torch.rand(0, 4, 4, device="cuda", requires_grad=True)
    sinkhorn(scores).sum().backward()
    assert scores.grad.shape == (0, 4, 4)


def test_opcheck():
    scores, row, col = (t[None].cuda() for t in problem((), 6, 9, torch.float64))
    arguments = 0.3, 1e-6, 20, 0, 0
    torch.library.opcheck(OP, (scores.requires_grad_(), row.requires_grad_(), col.requires_grad_(), *arguments))
    plan, *_ = OP(scores.detach(), row.detach(), col.detach(), *arguments)
    torch.library.opcheck(BACKWARD, (torch.randn_like(plan), plan, row.detach(), col.detach(), 0.3, 0, 0, *[True] * 3))
