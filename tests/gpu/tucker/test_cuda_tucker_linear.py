"""The linear layer with a Tucker change on a GPU against the CPU kernels in float64. Never run so far: no GPU was at
hand."""

import functools

import helpers
import pytest
import torch
import torch.nn.functional as F

import torch_subspace as ts
from torch_subspace.tucker.tucker_linear import draw_seed, dropout_mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [  # t, n, m, r_in, r_out
    (1, 1, 1, 1, 1), (3, 5, 7, 2, 3), (130, 64, 48, 16, 16), (5, 300, 9, 3, 5), (700, 20, 31, 4, 6), (9, 4, 3, 11, 7),
    (512, 768, 1024, 16, 16),
]
close = functools.partial(helpers.close, floor=0.1, device="cuda")


def problem(t, n, m, rn, rm, dtype):
    """x, weight, bias, core, u, v and dy in float64; the first three and the last representable in dtype."""
    g = torch.Generator().manual_seed(t + n + m + rn + rm)
    shapes = [((t, n), 1), ((m, n), n), ((m,), 1), ((rm, rn), rn), ((m, rm), rm), ((rn, n), n), ((t, m), 1)]
    drawn = [torch.randn(s, generator=g, dtype=torch.float64) / fan**0.5 for s, fan in shapes]
    return [a.float().double() if i in (3, 4, 5) else a.to(dtype).double() for i, a in enumerate(drawn)]


def run(inputs, dy, dtype, device, **options):
    """Values and gradients; core, u and v stay wide."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [None if a is None else a.to(device, wide if i > 2 else dtype).detach().requires_grad_()
              for i, a in enumerate(inputs)]
    y = ts.tucker_linear(*leaves, **options)
    y.backward(dy.to(device, dtype))
    return [y.detach(), *(a.grad for a in leaves if a is not None)]


@pytest.mark.parametrize("form", ["full", "no bias", "change only"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, form):
    *inputs, dy = problem(*shape, dtype)
    inputs[2] = inputs[2] if form == "full" else None
    inputs[1] = None if form == "change only" else inputs[1]
    expected = run(inputs, dy, torch.float64, "cpu", scale=-0.75)
    ours = run(inputs, dy, dtype, "cuda", scale=-0.75)
    assert ours[0].dtype == dtype and ours[-1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(ours, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_transposed_v(shape, dtype, dropout):
    """Read as it lies, as an adapter's factor does; its gradient likewise."""
    *inputs, dy = problem(*shape, dtype)
    found = []
    for v in (inputs[-1], inputs[-1].mT.contiguous().mT):
        torch.manual_seed(5)
        found.append(run((*inputs[:-1], v), dy, dtype, "cuda", scale=-0.75, dropout=dropout))
    assert found[1][-1].mT.is_contiguous()
    close(found[1], [t.double().cpu() for t in found[0]], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dropout_is_the_mask_of_its_seed(dtype):
    """The same mask as on the CPU, where the seed is drawn by another generator."""
    x, _, _, core, u, v, dy = problem(130, 64, 48, 16, 16, dtype)
    torch.manual_seed(7)
    y, dx, dcore, du, dv = run((x, None, None, core, u, v), dy, dtype, "cuda", dropout=0.3)
    torch.manual_seed(7)
    seed = draw_seed(0.3, torch.device("cuda"))
    mask = dropout_mask(seed.cpu(), 0.3, x.shape, torch.float64)
    assert torch.equal(mask, dropout_mask(seed, 0.3, x.shape, torch.float64).cpu())
    truth = run((x * mask, None, None, core, u, v), dy, torch.float64, "cpu")
    truth[1] = truth[1] * mask
    close((y, dx, dcore, du, dv), truth, TOLERANCE[dtype])


def test_dropout_repeats_with_the_generator_and_only_then():
    *inputs, _ = (a.cuda() for a in problem(40, 33, 21, 4, 3, torch.float64))
    torch.manual_seed(1)
    first, second = (ts.tucker_linear(*inputs, dropout=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, ts.tucker_linear(*inputs, dropout=0.5)) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_core_of_zeros_is_the_frozen_layer_to_the_bit(dtype):
    x, weight, bias, core, u, v, dy = problem(130, 64, 48, 16, 16, dtype)
    ours = run((x, weight, bias, core * 0, u, v), dy, dtype, "cuda")
    x, weight, bias, dy = (a.to("cuda", dtype) for a in (x, weight, bias, dy))
    assert torch.equal(ours[0], F.linear(x, weight, bias)) and torch.equal(ours[1], dy @ weight)


def test_strided_inputs():
    *inputs, dy = problem(30, 20, 11, 3, 4, torch.float64)
    expected = run(inputs, dy, torch.float64, "cpu")
    leaves = [(a.cuda() if a.dim() == 1 else a.mT.contiguous().cuda().mT).requires_grad_() for a in inputs]
    y = ts.tucker_linear(*leaves)
    close((y.detach(), *torch.autograd.grad(y, leaves, dy.mT.contiguous().cuda().mT)), expected, 1e-12)


def test_gradients_that_nobody_asked_for():
    *inputs, dy = problem(30, 20, 11, 3, 4, torch.float64)
    expected = run(inputs, dy, torch.float64, "cpu")[1:]
    for wanted in (0,), (3,), (4,), (5,), (0, 3), (3, 4, 5):
        leaves = [a.cuda().requires_grad_(i in wanted) for i, a in enumerate(inputs)]
        ts.tucker_linear(*leaves).backward(dy.cuda())
        assert [i for i, a in enumerate(leaves) if a.grad is not None] == list(wanted)
        close([leaves[i].grad for i in wanted], [expected[i] for i in wanted], 1e-12)


def test_no_rows():
    _, weight, bias, core, u, v, _ = (a.cuda() for a in problem(1, 20, 11, 3, 4, torch.float32))
    leaves = [a.requires_grad_() for a in (core, u, v)]
    x = torch.empty(2, 0, 20, device="cuda", dtype=torch.float64, requires_grad=True)
    y = ts.tucker_linear(x, weight, bias, *leaves)
    y.sum().backward()
    assert y.shape == (2, 0, 11) and x.grad.shape == x.shape and not any(a.grad.any() for a in leaves)


def test_gradcheck():
    leaves = [a.cuda().requires_grad_() for a in problem(4, 5, 3, 2, 3, torch.float64)[:6]]
    assert torch.autograd.gradcheck(ts.tucker_linear, leaves)
    assert torch.autograd.gradgradcheck(ts.tucker_linear, leaves)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(dtype, dropout):
    *inputs, dy = problem(512, 768, 1024, 16, 16, dtype)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(inputs, dy, dtype, "cuda", dropout=dropout))
    assert helpers.same(*results)


def test_autocast():
    inputs = [a.float().cuda() for a in problem(30, 20, 11, 3, 4, torch.float32)[:6]]
    with torch.autocast("cuda", torch.bfloat16):
        assert ts.tucker_linear(*inputs).dtype == torch.bfloat16


def test_a_graph_can_be_captured():
    *inputs, _ = (a.float().cuda() for a in problem(130, 64, 48, 16, 16, torch.float32))
    eager = ts.tucker_linear(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ts.tucker_linear(*inputs)
    graph.replay()
    torch.testing.assert_close(y, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, _, _, core, u, v, dy = problem(6, 20, 5, 3, 2, dtype)
    x, dy = (a.to("cuda", dtype) for a in (x, dy))
    core, u, v = (a.float().cuda() for a in (core, u, v))
    for more in ((torch.empty(0, dtype=torch.int64).cuda(), 2.0, 0.0), (torch.tensor([99]).cuda(), 2.0, 0.3)):
        torch.library.opcheck(OP.tucker_linear_, (dy.clone(), x, core, u, v, *more))
        torch.library.opcheck(OP.tucker_linear_backward, (x.clone(), dy, x, core, u, v, *more, 7))
