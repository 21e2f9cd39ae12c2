"""The fused cross-entropy on a GPU against the CPU kernels in float64. Never run so far: no GPU was at hand."""

import functools

import helpers
import pytest
import torch

import torch_subspace as ts
from torch_subspace.grassmann.logits import starts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
OPTIONS = [{}, {"label_smoothing": 0.1}, {"reduction": "none", "normalize": False, "gamma": 2.0}]
SHAPES = [(2, 2, 1, 3), (9, 40, 3, 12), (70, 300, 2, 64), (64, 2000, 4, 128)]  # b, c, k, n
close = functools.partial(helpers.close, floor=1e-2, device="cuda")


def problem(b, c, k, n, dtype, soft):
    g = torch.Generator().manual_seed(b + c + k + n)
    x = torch.randn(b, n, generator=g).to(dtype).double()
    weight = torch.linalg.qr(torch.randn(c, n, k, generator=g)).Q.mT.contiguous().to(dtype).double()
    if soft:
        return x, weight, torch.randn(b, c, generator=g).softmax(-1).double()
    target = torch.randint(c, (b,), generator=g)
    target[::7] = -100
    return x, weight, target


def run(x, weight, target, dtype, device, **options):
    x, weight = (t.to(device, dtype).detach().requires_grad_() for t in (x, weight))
    target = target.to(device)  # probabilities are never rounded to half
    options = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in options.items()}
    loss = ts.subspace_cross_entropy(x, weight, target, **options)
    loss.sum().backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, soft, weighted, options):
    inputs = problem(*shape, dtype, soft)
    if weighted:
        options = options | {"class_weight": torch.linspace(0.5, 2, shape[1], dtype=torch.float64)}
    ours, truth = run(*inputs, dtype, "cuda", **options), run(*inputs, torch.float64, "cpu", **options)
    close(ours[:1], truth[:1], min(TOLERANCE[dtype], 2e-5))
    close(ours[1:], truth[1:], TOLERANCE[dtype])


def test_ragged():
    x, weight, target = problem(50, 40, 3, 64, torch.float64, False)
    dims = [1 + i % 5 for i in range(40)]
    inputs = (x, weight.reshape(120, 64), target)
    close(run(*inputs, torch.float64, "cuda", dims=dims), run(*inputs, torch.float64, "cpu", dims=dims), 1e-12)


def test_many_panels():
    inputs = problem(1024, 5000, 2, 16, torch.float64, False)
    close(run(*inputs, torch.float64, "cuda"), run(*inputs, torch.float64, "cpu"), 1e-12)


def test_memory_is_that_of_a_tile():
    x = torch.randn(512, 64, device="cuda", requires_grad=True)
    weight = torch.randn(20000, 8, 64, device="cuda", requires_grad=True)
    target = torch.randint(20000, (512,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ts.subspace_cross_entropy(x, weight, target).backward()
    gradients = 4 * (x.numel() + weight.numel())
    # eager keeps 327 MB of projections alone
    assert torch.cuda.max_memory_allocated() - before < gradients + 64 * 2**20


def test_a_label_out_of_range_gives_nan_in_its_row_only():
    x, weight = torch.randn(4, 16, device="cuda"), torch.randn(5, 2, 16, device="cuda")
    target = torch.tensor([0, 5, -100, -3], device="cuda")
    loss = ts.subspace_cross_entropy(x, weight, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, True] and loss[2] == 0


def test_empty_batch():
    x = torch.randn(0, 8, device="cuda", requires_grad=True)
    weight = torch.randn(3, 2, 8, device="cuda", requires_grad=True)
    loss = ts.subspace_cross_entropy(x, weight, torch.empty(0, dtype=torch.int64, device="cuda"))
    loss.backward()
    assert loss == 0 and not weight.grad.any()


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_gradcheck(soft):
    x, weight, target = (t.cuda() for t in problem(8, 3, 2, 6, torch.float64, soft))
    x.requires_grad_(), weight.requires_grad_()

    def loss(x, weight):
        return ts.subspace_cross_entropy(x, weight, target, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, (x, weight))


def test_same_bits_every_time():
    inputs = problem(64, 2000, 4, 128, torch.float32, False)
    first, second = (run(*inputs, torch.float32, "cuda") for _ in range(2))
    assert helpers.same(first, second)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_opcheck(soft):
    x, weight, target = (t.cuda() for t in problem(6, 5, 3, 20, torch.float64, soft))
    none, ones = starts(None, x.device), torch.empty(0, dtype=torch.float64, device="cuda")
    rest = (25.0, True, -100, 0.1, 0)
    loss, stats = OP.cross_entropy(x, weight, none, target, ones, *rest)
    torch.library.opcheck(OP.cross_entropy, (x.requires_grad_(), weight.requires_grad_(), none, target, ones, *rest))
    arguments = (loss, x.detach(), weight.detach(), none, target, ones, stats, *rest, True, False)
    torch.library.opcheck(OP.cross_entropy_backward, arguments)
