"""The Riemannian step on a GPU against the CPU kernels in float64. Never run so far: no GPU was at hand."""

import math

import pytest
import torch
from helpers import frame_error, normal, same

import torch_subspace as ts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
SHAPES = [(3, 1, 1), (5, 3, 50), (20, 8, 2048), (2, 16, 100), (2, 17, 300), (2, 33, 64), (1, 64, 1000)]  # c, k, n
SHAPES += [(700, 8, 512), (3, 8, 2047), (3, 8, 9000), (2, 16, 4096), (1, 8, 40001)]  # several blocks to a class; tiles
RULES = [(retraction, "project") for retraction in ("geodesic", "polar", "qr", "cayley")] + [("geodesic", "parallel")]


def problem(c, k, n, dtype=torch.float64):
    """A frame, a gradient and a buffer; the latter two of norm 1 per class."""
    g = torch.Generator().manual_seed(c + k + n)
    weight = torch.linalg.qr(torch.randn(c, n, k, dtype=torch.float64, generator=g)).Q.mT.contiguous()
    grad, buffer = torch.randn(2, c, k, n, dtype=torch.float64, generator=g) / math.sqrt(k * n)
    return [t.to(dtype) for t in (weight, grad, buffer)]


def compare(inputs, dtype, tolerance, **rule):
    """One step here and there; returns the new weight."""
    cpu, gpu = [t.double().clone() for t in inputs], [t.to("cuda", dtype, copy=True) for t in inputs]
    expected = ts.grassmann_step_(*cpu, **rule)
    rule = {key: v.cuda() if isinstance(v, torch.Tensor) and v.dim() else v for key, v in rule.items()}
    skipped = ts.grassmann_step_(*gpu, **rule)
    assert skipped.is_cuda and skipped.item() == expected.item()
    for a, e in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=0, atol=tolerance, equal_nan=True)
    return gpu[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("retraction, transport", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step(shape, retraction, transport, dtype):
    rule = {"lr": 0.6, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.01}
    rule |= {"retraction": retraction, "transport": transport}
    weight = compare(problem(*shape, dtype), dtype, TOLERANCE[dtype], **rule)
    assert frame_error(weight) < (5e-7 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("transport", ["project", "parallel"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nesterov(dtype, transport):
    rule = {"lr": 0.6, "momentum": 0.8, "nesterov": True, "maximize": True, "transport": transport}
    compare(problem(6, 5, 70, dtype), dtype, TOLERANCE[dtype], **rule)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])
@pytest.mark.parametrize("lr", [0.6, 20.0])
@pytest.mark.parametrize("retraction", ["geodesic", "polar", "qr", "cayley"])
@pytest.mark.parametrize("shape", [(3, 1, 9), (5, 3, 50), (20, 8, 2048), (2, 17, 300), (2, 8, 9000)], ids=str)
def test_a_step_on_the_stiefel_manifold(shape, retraction, lr, nesterov, dtype):
    rule = {"lr": lr, "momentum": 0.8, "nesterov": nesterov, "retraction": retraction, "manifold": "stiefel"}
    weight = compare(problem(*shape, dtype), dtype, (1 + lr) * TOLERANCE[dtype], **rule)
    assert frame_error(weight) < (5e-7 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lr", [20.0, 1e4])
@pytest.mark.parametrize("retraction, transport", RULES)
def test_a_long_step(retraction, transport, lr, dtype):
    rule = {"lr": lr, "momentum": 0.8, "retraction": retraction, "transport": transport}
    weight = compare(problem(3, 4, 60, dtype), dtype, 10 * lr * TOLERANCE[dtype], **rule)
    assert frame_error(weight) < (5e-7 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("drift", [1e-5, 1e-3, 1e-1])
def test_a_frame_that_has_drifted(drift):
    weight, grad, buffer = problem(3, 4, 60)
    weight += drift * normal(*weight.shape)
    compare([weight, grad, buffer], torch.float64, 1e-12, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("transport", ["project", "parallel"])
@pytest.mark.parametrize("shape", [(3, 8, 2048), (4, 8, 4100), (2, 16, 2048)], ids=str)
def test_nesterov_on_long_rows(shape, transport):
    rule = {"lr": 0.6, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "transport": transport}
    compare(problem(*shape, torch.float32), torch.float32, 1e-6, **rule)


@pytest.mark.parametrize("skip", [1, 2, 4])
def test_frames_that_begin_anywhere(skip):
    plain = [t.cuda() for t in problem(5, 8, 512, torch.float32)]
    padded = [torch.nn.functional.pad(t.flatten(), (skip, 0), value=7.0) for t in plain]
    views = [base[skip:].view_as(t) for base, t in zip(padded, plain, strict=True)]
    for tensors in (plain, views):
        ts.grassmann_step_(*tensors, lr=0.3, momentum=0.9)
    for t, v, base in zip(plain, views, padded, strict=True):
        torch.testing.assert_close(v, t, rtol=0, atol=1e-7)
        assert (base[:skip] == 7).all()


def test_ragged_and_a_step_per_class():
    inputs = [t.reshape(120, 64) for t in problem(40, 3, 64)]
    dims = [1 + i % 5 for i in range(40)]
    lr = torch.linspace(0, 1, 40, dtype=torch.float64)
    for rows in inputs[0].split(dims):
        rows.copy_(torch.linalg.qr(rows.mT).Q.mT)
    compare(inputs, torch.float64, 1e-12, lr=lr, momentum=0.9, dims=dims)


def test_many_parameters_in_one_call():
    shapes = [(1 + i % 3, 1 + i % 9, 20 + i) for i in range(100)]
    for cuda in (False, True):
        columns = zip(*(problem(*s) for s in shapes), strict=True)
        lists = [[t.cuda() if cuda else t for t in column] for column in columns]
        ts.grassmann_step_(*lists, lr=0.3, momentum=0.9)
        if not cuda:
            expected = lists
    for a, e in zip(sum(lists, []), sum(expected, []), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 3, 40), (6, 8, 2048)], ids=str)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_a_class_that_is_not_finite_disturbs_no_other(rubbish, shape):
    weight, grad, buffer = problem(*shape)
    grad[2, 1, -1] = rubbish
    after = compare([weight, grad, buffer], torch.float64, 1e-12, lr=0.3, momentum=0.9)
    assert torch.equal(after[2].cpu(), weight[2]) and not torch.equal(after[3].cpu(), weight[3])


def test_frames_stay_orthonormal():
    weight, grad, buffer = (t.cuda() for t in problem(50, 8, 256, torch.float32))
    for _ in range(2000):
        grad.normal_(std=0.02)
        ts.grassmann_step_(weight, grad, buffer, lr=0.1, momentum=0.9)
    assert frame_error(weight) < 5e-7


def test_same_bits_every_time():
    first, second = ([t.cuda() for t in problem(20, 8, 2048, torch.float32)] for _ in range(2))
    for inputs in (first, second):
        ts.grassmann_step_(*inputs, lr=0.3, momentum=0.9)
    assert same(first, second)


def test_too_many_rows_are_refused():
    with pytest.raises(RuntimeError, match="at most 256 rows"):
        ts.grassmann_step_(*(t.cuda() for t in problem(1, 257, 300)), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_opcheck(momentum):
    weight, grad, buffer = (t.cuda() for t in problem(3, 4, 24, torch.float32))
    start, lr = torch.empty(0, dtype=torch.int64, device="cuda"), torch.tensor(0.1, dtype=torch.float64)
    buffers = [buffer] if momentum else []
    arguments = ([weight], [grad], buffers, start, lr, momentum, 0.0, 0.0, False, False, 0, False)
    torch.library.opcheck(torch.ops.torch_subspace.rsgd_.default, arguments)
