"""Subspace logits on a GPU against the CPU kernels in float64. Never run so far: no GPU was at hand."""

import functools

import helpers
import pytest
import torch

import torch_subspace as ts
import torch_subspace.grassmann.logits as module

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(1, 1, 1, 1), (7, 3, 2, 5), (65, 70, 3, 200), (256, 100, 8, 512), (33, 300, 1, 64)]  # b, c, k, n
close = functools.partial(helpers.close, floor=1e-2, device="cuda")


def problem(b, c, k, n, dtype):
    """x, weight and dlogits in float64, representable in dtype."""
    g = torch.Generator().manual_seed(b + c + k + n)
    x, dlogits = torch.randn(b, n, generator=g), torch.randn(b, c, generator=g)
    weight = torch.linalg.qr(torch.randn(c, n, k, generator=g)).Q.mT.contiguous()
    return tuple(t.to(dtype).double() for t in (x, weight, dlogits))


def run(x, weight, dlogits, dtype, device, **options):
    x, weight, dlogits = (t.to(device, dtype).detach() for t in (x, weight, dlogits))
    x.requires_grad_(), weight.requires_grad_()
    y = ts.subspace_logits(x, weight, **options)
    y.backward(dlogits)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, normalize, keep, monkeypatch):
    monkeypatch.setattr(module, "KEEP_PROJECTIONS", 1 << 25 if keep else 0)
    inputs = problem(*shape, dtype)
    expected = run(*inputs, torch.float64, "cpu", normalize=normalize)
    close(run(*inputs, dtype, "cuda", normalize=normalize), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ragged(dtype):
    x, weight, dlogits = problem(50, 40, 3, 64, dtype)
    dims = [1 + i % 5 for i in range(40)]
    inputs = (x, weight.reshape(120, 64), dlogits)
    expected = run(*inputs, torch.float64, "cpu", dims=dims)
    close(run(*inputs, dtype, "cuda", dims=dims), expected, TOLERANCE[dtype])


def test_many_tiles(monkeypatch):
    monkeypatch.setattr(module, "KEEP_PROJECTIONS", 0)
    inputs = problem(3000, 900, 4, 32, torch.float64)  # more than one panel
    close(run(*inputs, torch.float64, "cuda"), run(*inputs, torch.float64, "cpu"), 1e-12)
    inputs = problem(20000, 30, 2, 16, torch.float64)  # more than one block of the batch
    close(run(*inputs, torch.float64, "cuda"), run(*inputs, torch.float64, "cpu"), 1e-12)
    close(run(*inputs, torch.float16, "cuda"), run(*(t.half().double() for t in inputs), torch.float64, "cpu"), 1e-2)


def test_gradients_that_nobody_asked_for():
    x, weight, dlogits = (t.cuda() for t in problem(7, 3, 2, 5, torch.float64))
    for needs_x in (True, False):
        a, b = x.clone().requires_grad_(needs_x), weight.clone().requires_grad_(not needs_x)
        ts.subspace_logits(a, b).backward(dlogits)
        assert (a.grad is None, b.grad is None) == (not needs_x, needs_x)


def test_zero_rows_have_no_gradient():
    x = torch.zeros(4, 16, device="cuda", requires_grad=True)
    weight = torch.eye(16, device="cuda")[None, :3].clone().requires_grad_()
    ts.subspace_logits(x, weight).sum().backward()
    assert not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("b, c", [(0, 3), (4, 0), (0, 0)])
def test_empty(b, c):
    x, weight = torch.randn(b, 8, device="cuda"), torch.randn(c, 2, 8, device="cuda")
    x.requires_grad_(), weight.requires_grad_()
    ts.subspace_logits(x, weight).sum().backward()
    assert x.grad.shape == x.shape and not x.grad.any() and not weight.grad.any()


def test_gradcheck():
    x, weight, _ = problem(5, 3, 2, 6, torch.float64)
    x, weight = x.cuda().requires_grad_(), weight.cuda().requires_grad_()
    assert torch.autograd.gradcheck(ts.subspace_logits, (x, weight))


def test_same_bits_every_time():
    inputs = problem(256, 100, 8, 512, torch.float32)
    first, second = (run(*inputs, torch.float32, "cuda") for _ in range(2))
    assert helpers.same(first, second)


def test_float32_obeys_the_switch_of_tf32(monkeypatch):
    inputs = problem(256, 100, 8, 512, torch.float32)
    exact = run(*inputs, torch.float64, "cpu")[0]

    def error(allowed):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        return (run(*inputs, torch.float32, "cuda")[0].cpu().double() - exact).abs().max() / exact.abs().max()

    assert error(False) < 1e-5
    assert error(True) < 2e-3


def test_autocast():
    x, weight, _ = (t.float().cuda() for t in problem(8, 5, 3, 64, torch.float32))
    with torch.autocast("cuda", torch.bfloat16):
        assert ts.subspace_logits(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, weight, dlogits = (t.to("cuda", dtype) for t in problem(6, 5, 3, 20, torch.float32))
    none = module.starts(None, x.device)
    _, proj = OP.logits(x, weight, none, 25.0, True, True)
    torch.library.opcheck(OP.logits, (x.requires_grad_(), weight.requires_grad_(), none, 25.0, True, True))
    rest = (x.detach(), weight.detach(), none, proj, 25.0, True, True, True)
    torch.library.opcheck(OP.logits_backward, (dlogits, *rest))
