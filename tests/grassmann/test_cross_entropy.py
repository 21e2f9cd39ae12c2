"""Fused cross-entropy over subspace logits: against the definition, against torch, its memory, and what is refused."""

import functools
import subprocess
import sys

import helpers
import pytest
import reference as ref
import torch
from hypothesis import given, settings, strategies
from kernels import only_cpu
from test_logits import SHAPES, TOLERANCE, features, frames
from torch.nn import functional as F

import torch_subspace as ts
import torch_subspace.grassmann.logits as logits_module

OP = torch.ops.torch_subspace
NAME = "subspace_cross_entropy"
close = functools.partial(helpers.close, floor=0.1)


def labels(b, c, ignore=None, seed=0):
    t = torch.randint(0, c, (b,), generator=torch.Generator().manual_seed(seed + b + c))
    if ignore is not None:
        t[::3] = ignore
    return t


def probabilities(b, c, dtype=torch.float64, seed=0):
    return torch.softmax(features(b, c, seed=seed) * 2, -1).to(dtype)


def both(x, w, target, *, gamma=25.0, normalize=True, dims=None, **options):
    """(loss, dx, dweight) of ours in x's dtype and of the reference in float64 at the same points."""
    out = []
    for ours in (True, False):
        dtype = x.dtype if ours else torch.float64
        a, b = x.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_()
        where = {"gamma": gamma, "normalize": normalize, "dims": dims}
        if ours:
            loss = ts.subspace_cross_entropy(a, b, target, **where, **options)
        else:
            loss = ref.cross_entropy(ref.logits(a, b, **where), target, **options)
        weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        out.append((loss.detach(), *torch.autograd.grad((loss * weights).sum(), (a, b))))
    return out


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("b, c, k, n", [s for s in SHAPES if s[1] > 1])
def test_matches_the_reference(b, c, k, n, dtype, soft, reduction):
    x, w = features(b, n, dtype=dtype), frames(c, k, n, dtype)
    target = probabilities(b, c, dtype) if soft else labels(b, c, -100)
    close(*both(x, w, target, reduction=reduction, gamma=10.0), TOLERANCE[dtype])
    weight = torch.rand(c, dtype=dtype, generator=torch.Generator().manual_seed(1))
    close(*both(x, w, target, reduction=reduction, label_smoothing=0.1, class_weight=weight), TOLERANCE[dtype])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(b=strategies.integers(1, 40), dims=strategies.lists(strategies.integers(1, 6), min_size=1, max_size=30),
       extra=strategies.integers(0, 20), normalize=strategies.booleans(), soft=strategies.booleans(),
       smoothing=strategies.sampled_from([0.0, 0.3, 1.0]), ignore=strategies.sampled_from([None, -100, 0]),
       dtype=strategies.sampled_from(list(TOLERANCE)))
def test_ragged_matches_the_reference_anywhere(b, dims, extra, normalize, soft, smoothing, ignore, dtype):
    n, c = max(dims) + extra, len(dims)
    w = torch.cat([frames(1, k, n, dtype, seed=i)[0] for i, k in enumerate(dims)])
    target = probabilities(b, c, dtype) if soft else labels(b, c, ignore)
    options = {} if ignore is None or soft else {"ignore_index": ignore}
    ours, truth = both(features(b, n, dtype=dtype), w, target, normalize=normalize, dims=dims, gamma=3.0,
                       label_smoothing=smoothing, **options)
    close(ours, truth, TOLERANCE[dtype], floor=0.3)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_torchs_cross_entropy_of_the_logits(reduction, soft):
    x, w = features(40, 30), frames(9, 4, 30)
    options = {"reduction": reduction, "label_smoothing": 0.2}
    weight = torch.rand(9, dtype=torch.float64)
    target = probabilities(40, 9) if soft else labels(40, 9, -100)
    expected = F.cross_entropy(ts.subspace_logits(x, w), target, weight=weight, **options)
    assert torch.allclose(ts.subspace_cross_entropy(x, w, target, class_weight=weight, **options), expected, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_half_types_give_a_float32_loss(dtype, tolerance, soft):
    x, w = features(70, 33, dtype=dtype), frames(20, 4, 33, dtype)
    ours, truth = both(x, w, probabilities(70, 20) if soft else labels(70, 20))
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype]
    close(ours[:1], truth[:1], 1e-5)
    close(ours[1:], truth[1:], tolerance)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3), (0,), (4, 0)])
def test_leading_dimensions(shape):
    x, w = features(*shape, 20), frames(5, 3, 20)
    t = labels(x.numel() // 20, 5).view(shape)
    rows = ts.subspace_cross_entropy(x, w, t, reduction="none")
    assert rows.shape == shape
    assert torch.allclose(ts.subspace_cross_entropy(x, w, t, reduction="sum"), rows.sum())
    soft = F.one_hot(t, 5).double()
    assert torch.allclose(ts.subspace_cross_entropy(x, w, soft, reduction="none"), rows, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- facts


def test_nothing_to_average_is_zero_not_nan():
    x, w = features(4, 20).requires_grad_(), frames(5, 3, 20).requires_grad_()
    for a, t in ((x, torch.full((4,), -100)), (x[:0], torch.empty(0, dtype=torch.int64))):
        for weight in (None, torch.ones(5).double()):
            loss = ts.subspace_cross_entropy(a, w, t, class_weight=weight)
            assert loss.item() == 0
            assert not any(g.any() for g in torch.autograd.grad(loss, (x, w), allow_unused=True) if g is not None)
    assert ts.subspace_cross_entropy(x, w, labels(4, 5), class_weight=torch.zeros(5).double()).item() == 0


def test_ignored_rows_count_for_nothing():
    x, w, t = features(12, 20), frames(5, 3, 20), labels(12, 5, -1)
    kept = t != -1
    ours = both(x, w, t, ignore_index=-1)[0]
    alone = both(x[kept], w, t[kept])[0]
    assert torch.allclose(ours[0], alone[0]) and torch.allclose(ours[2], alone[2], atol=1e-12)
    assert not ours[1][~kept].any() and torch.allclose(ours[1][kept], alone[1], atol=1e-12)
    assert not ts.subspace_cross_entropy(x, w, t, ignore_index=-1, reduction="none")[~kept].any()


def test_one_class_has_no_loss():
    ours = both(features(5, 20), frames(1, 3, 20), torch.zeros(5, dtype=torch.int64))[0]
    assert all(t.abs().max() < 1e-13 for t in ours)


def test_large_logits_stay_finite():
    x, w = features(6, 20, dtype=torch.float32) * 1e4, frames(5, 3, 20, torch.float32)
    ours, truth = both(x, w, labels(6, 5), normalize=False, reduction="none")
    assert all(t.isfinite().all() for t in ours)
    close(ours[:1], truth[:1], 1e-5)


def test_gradients_sum_over_classes_as_probabilities_do():
    """sum_c dL/dy_c = 0, and <W_c, dL/dW_c> = dL/dy_c y_c for a single row."""
    x, t = features(1, 4), torch.tensor([2])
    w = torch.eye(4, dtype=torch.float64)[:, None]
    _, _, dw = both(x.abs() + 1, w, t)[0]
    y = ts.subspace_logits(x.abs() + 1, w)[0]
    assert ((w * dw).sum((1, 2)) / y).sum().abs() < 1e-12


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_repeatable_for_a_number_of_threads(threads):
    x, w, t = features(300, 64).float(), frames(70, 8, 64).float(), labels(300, 70)
    for _ in helpers.threads(threads):
        assert helpers.same(both(x, w, t)[0], both(x, w, t)[0])


MEMORY = """
import re, sys, torch
import torch_subspace as ts
def peak():  # of this program alone; what getrusage tells begins at the size of the process it was started from
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(2)
B, C, n = 256, 8000, 32
x, w = torch.randn(B, n, requires_grad=True), torch.randn(C, 8, n, requires_grad=True)
t = torch.randint(0, C, (B,))
def run(b):
    if sys.argv[1] == "fused":
        ts.subspace_cross_entropy(x[:b], w, t[:b]).backward()
    else:
        z = torch.nn.functional.normalize(x[:b], dim=-1) @ w.view(-1, n).T
        torch.nn.functional.cross_entropy(25 * z.view(b, C, 8).norm(dim=-1), t[:b]).backward()
run(1)
before = peak()
run(B)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_a_tenth_of_eager():
    grown = {kind: int(subprocess.run([sys.executable, "-c", MEMORY, kind], check=True, capture_output=True).stdout)
             for kind in ("fused", "eager")}
    assert grown["eager"] > 60_000 and grown["fused"] <= grown["eager"] / 10, grown


# ------------------------------------------------------------------------------------------------- torch's machinery


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_gradcheck(soft):
    x, w = features(4, 7).requires_grad_(), frames(3, 2, 7).requires_grad_()
    target = probabilities(4, 3) if soft else torch.tensor([0, 2, -100, 1])
    weight = torch.tensor([0.5, 1.0, 2.0]).double()

    def loss(x, w):
        return ts.subspace_cross_entropy(x, w, target, gamma=3.0, class_weight=weight, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, (x, w))


def test_targets_that_learn():
    x, w = features(4, 7).requires_grad_(), frames(3, 2, 7).requires_grad_()
    target = probabilities(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: ts.subspace_cross_entropy(*a, label_smoothing=0.1), (x, w, target))


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("classes", [0, 9])
def test_opcheck(soft, classes):
    x, w = features(6, 20).requires_grad_(), frames(5, 3, 20).requires_grad_()
    none, ones = logits_module.starts(None, x.device), torch.empty(0, dtype=torch.float64)
    target = probabilities(6, 5) if soft else labels(6, 5)
    rest = (25.0, True, -100, 0.1, classes)
    torch.library.opcheck(OP.cross_entropy, (x, w, none, target, ones, *rest))
    loss, stats = OP.cross_entropy(x, w, none, target, ones, *rest)
    torch.library.opcheck(OP.cross_entropy_backward, (loss.detach(), x.detach(), w.detach(), none, target, ones, stats,
                                                      *rest, True, False))


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_compile_without_graph_breaks(weighted):
    torch._dynamo.reset()
    w = frames(5, 3, 20, torch.float32).requires_grad_()
    weight = torch.rand(5) if weighted else None

    def loss(x, w, t):
        return ts.subspace_cross_entropy(x.relu(), w, t, label_smoothing=0.1, class_weight=weight)

    compiled = torch.compile(loss, fullgraph=True)
    for b in (4, 6, 9):
        x, t = features(b, 20, dtype=torch.float32).requires_grad_(), labels(b, 5, -100)
        ours, eager = (torch.autograd.grad(f(x, w, t), (x, w)) for f in (compiled, loss))
        assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(ours, eager))


def test_autocast_gives_a_float32_loss():
    x, w = features(8, 20).float().requires_grad_(), frames(5, 3, 20).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ts.subspace_cross_entropy(x, w, labels(8, 5))
    loss.backward()
    assert loss.dtype == x.grad.dtype == w.grad.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weight": torch.arange(1, 21) / 7.0}],
                         ids=["plain", "smoothed and weighted"])
@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_soft_targets_are_not_rounded_to_half(given, options):
    """Probabilities of 1/20 + i/10^5 can't be told apart in half types: the loss must know them."""
    layer = ts.GrassmannLinear(33, 20, 4, gamma=25.0)
    x, w = features(70, 33).bfloat16().float(), layer.weight.detach().bfloat16().float()
    target = (0.05 + torch.arange(-10, 10, dtype=torch.float64) / 1e5).expand(70, 20).to(given)
    options = {"reduction": "none", **options}
    truth = both(x, w, target.double(), **options)[1][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [both(x, w, target, **options)[0][0], layer.loss(x, target, **options),
                 ts.subspace_cross_entropy(x, w, target.clone().requires_grad_(), **options)]
    found.append(layer.loss(x.bfloat16(), target, **options))
    for values in found:
        close([values.detach()], [truth], 1e-6)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("target, options, error, words", [
    (torch.tensor([0, 1, 2, 3]), {}, ValueError, r"\[0, 3\), got 3"),
    (torch.tensor([0, 1, 2, -1]), {}, ValueError, "got -1"),
    (torch.tensor([0, 1]), {}, ValueError, r"labels must be \(4,\)"),
    (torch.tensor([0, 1, 2, 0], dtype=torch.int32), {}, TypeError, "int32"),
    (torch.rand(4, 2), {}, ValueError, r"probabilities must be \(4, 3\)"),
    ([0, 1, 2, 0], {}, TypeError, "target must be a tensor"),
    (torch.tensor([0, 1, 2, 0]), {"reduction": "avg"}, ValueError, "reduction"),
    (torch.tensor([0, 1, 2, 0]), {"label_smoothing": 1.5}, ValueError, r"\[0, 1\], got 1.5"),
    (torch.tensor([0, 1, 2, 0]), {"class_weight": torch.ones(2)}, ValueError, "class_weight"),
    (torch.tensor([0, 1, 2, 0]), {"class_weight": torch.ones(3, dtype=torch.int64)}, TypeError, "class_weight"),
    (torch.tensor([0, 1, 2, 0]), {"gamma": float("inf")}, ValueError, "gamma"),
    (torch.tensor([0, 1, 2, 0]), {"dims": [1, 1]}, ValueError, "weight must be"),
])
def test_bad_input_is_named(target, options, error, words):
    with pytest.raises(error, match=words) as caught:
        ts.subspace_cross_entropy(features(4, 7), frames(3, 2, 7), target, **options)
    assert NAME in str(caught.value)


def test_no_classes():
    with pytest.raises(ValueError, match="at least one class"):
        ts.subspace_cross_entropy(features(4, 7), torch.empty(0, 2, 7).double(), labels(4, 3))


@only_cpu
def test_the_op_itself_checks_too():
    x, w, none = features(4, 7), frames(3, 2, 7), torch.empty(0, dtype=torch.int64)
    ones, rest = torch.empty(0, dtype=torch.float64), (25.0, True, -100, 0.0, 0)
    for target, words in ((torch.tensor([0, 1, 2, 3]), "target 3 of row 3"), (torch.tensor([0, 1]), "target must be"),
                          (torch.rand(4, 2).double(), "target must be"), (torch.rand(4, 3), "of the loss's dtype")):
        with pytest.raises(RuntimeError, match=words):
            OP.cross_entropy(x, w, none, target, ones, *rest)
    with pytest.raises(RuntimeError, match="class_weight"):
        OP.cross_entropy(x, w, none, labels(4, 3), torch.ones(2).double(), *rest)
    with pytest.raises(RuntimeError, match="2 classes in all, 3 of them here"):
        OP.cross_entropy(x, w, none, labels(4, 2), ones, *rest[:-1], 2)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_classes_in_two_places(soft):
    """Each has its share of lse, of the target's mass and of the loss; the gradient is that of what it returns."""
    x, w, none = features(6, 7).requires_grad_(), frames(5, 2, 7).requires_grad_(), torch.empty(0, dtype=torch.int64)
    target, weight = probabilities(6, 5) if soft else labels(6, 5), torch.linspace(0.5, 2, 5, dtype=torch.float64)
    options = {"label_smoothing": 0.1, "class_weight": weight, "reduction": "none"}
    whole, lses, masses, losses = ts.subspace_cross_entropy(x, w, target, **options), [], [], []
    for first, own in ((0, 3), (3, 2)):
        there = slice(first, first + own)
        at = target - first
        part = target[:, there].contiguous() if soft else torch.where((at >= 0) & (at < own), at, own)
        loss, (lse, mass) = OP.cross_entropy(x, w[there], none, part, weight[there], 25.0, True, -100, 0.1, 5)
        tau = weight[there] * (0.9 * (part if soft else torch.eye(own + 1).double()[part][:, :own]) + 0.1 / 5)
        logits = ts.subspace_logits(x, w[there])
        expected = (tau * (logits.logsumexp(1, keepdim=True) - logits)).sum(1)
        close(loss, expected, 1e-12)
        gradients = (torch.autograd.grad(y.sum(), (x, w), retain_graph=True) for y in (loss, expected))
        close(*gradients, 1e-12)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dx, = torch.autograd.grad(loss.sum(), x, create_graph=True)
            dx.sum().backward()
        lses.append(lse)
        masses.append(mass)
        losses.append(loss)
    lse = torch.stack(lses).logsumexp(0)
    close(sum(loss + (lse - own) * mass for loss, own, mass in zip(losses, lses, masses)), whole, 1e-12)
