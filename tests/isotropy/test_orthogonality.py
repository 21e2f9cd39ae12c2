"""λ-orthogonality: values and gradients, many weights in a call, where the distance is 0."""

import collections
import math
import weakref

import pytest
import reference as ref
import torch
from helpers import close, frame_error, normal, same

from torch_subspace.isotropy import LambdaOrthogonalityLoss, lambda_orthogonality

SHAPES = [(4, 6), (6, 4), (5, 5), (1, 1), (1, 7), (7, 1), (2, 3, 5), (2, 2, 5, 3),
          (257, 270), (2, 300, 258)]  # from 256 on in strips


def of(function, weight, *options):
    weight = weight.detach().requires_grad_()
    loss = function(weight, *options)
    scale = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    return loss.detach(), torch.autograd.grad((scale * loss).sum(), weight)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape):
    weight = normal(*shape)
    for lam, alpha in ((0.0, 1.0), (2.0, 3.0), (12.0, 0.5)):
        expected = of(lambda w, *o: ref.lambda_orthogonality(w, o[0], alpha=o[1]), weight, lam, alpha)
        found = of(lambda w, *o: lambda_orthogonality(w, o[0], alpha=o[1]), weight, lam, alpha)
        close(found, expected, 1e-12)
        single = of(lambda w, *o: lambda_orthogonality(w, o[0], alpha=o[1]), weight.float(), lam, alpha)
        assert single[0].dtype == single[1].dtype == torch.float32
        close(single, expected, 1e-5)


def test_many_weights_in_a_call():
    weights = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate([(4, 6), (6, 4), (1, 1), (5, 5)])]
    found = lambda_orthogonality(weights, 1.5, alpha=2.0)
    expected = torch.stack([ref.lambda_orthogonality(w, 1.5, alpha=2.0) for w in weights])
    close([found.detach()], [expected.detach()], 1e-13)
    scale = torch.tensor([1.0, 0, 3, -1], dtype=torch.float64)
    close(torch.autograd.grad((scale * found).sum(), weights), torch.autograd.grad((scale * expected).sum(), weights),
          1e-12, floor=1e-3)
    alone = lambda_orthogonality(tuple(weights), 1.5, alpha=2.0)[1]
    assert torch.equal(alone, lambda_orthogonality(weights[1], 1.5, alpha=2.0))


def test_any_sequence_of_weights():
    weights = [torch.nn.Parameter(normal(*shape)) for shape in ((4, 6), (6, 4))]
    expected = lambda_orthogonality(weights, 1.5)
    for several in (torch.nn.ParameterList(weights), collections.deque(weights), tuple(weights)):
        assert torch.equal(lambda_orthogonality(several, 1.5), expected)
    with pytest.raises(ValueError, match="weight must be weights, got an empty ParameterList"):
        lambda_orthogonality(torch.nn.ParameterList(), 1.5)


@pytest.mark.parametrize("weight", [normal(4, 6), normal(3, 2, 5, 4), [normal(4, 6), normal(6, 4), normal(1, 1)]],
                         ids=["one", "stacked", "several"])
def test_the_module_is_the_function(weight):
    each = lambda_orthogonality(weight, 1.5, alpha=2.0)
    for reduction, expected in (("mean", each.mean()), ("sum", each.sum()), ("none", each)):
        loss = LambdaOrthogonalityLoss(1.5, alpha=2.0, reduction=reduction)
        assert torch.equal(loss(weight), expected)
        assert repr(loss) == f"LambdaOrthogonalityLoss(lam=1.5, alpha=2.0, reduction={reduction!r})"
    assert torch.equal(LambdaOrthogonalityLoss(1.5)(weight), lambda_orthogonality(weight, 1.5).mean())


def test_a_layers_matrix_goes_when_its_gradient_is_there():
    """What is kept of all layers gets less while the backward runs."""
    kept, left = [], []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.append(weakref.ref(self))

    weights = [normal(4, 5, seed=i).requires_grad_() for i in range(5)]
    for w in weights:
        w.register_hook(lambda _: left.append(sum(one() is not None for one in kept)))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda packed: packed.tensor):
        loss = lambda_orthogonality(weights, 1.0).sum()
    each = len(kept) // 5
    loss.backward()
    assert left == [each * n for n in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 3, 3)], ids=str)
def test_derivatives(shape):
    weight = normal(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: lambda_orthogonality(w, 1.0, alpha=2.0), weight)
    assert torch.autograd.gradgradcheck(lambda w: lambda_orthogonality(w, 1.0, alpha=2.0), weight)
    other = normal(2, 5, seed=1).requires_grad_()
    if len(shape) == 2:
        assert torch.autograd.gradgradcheck(lambda v, w: lambda_orthogonality([v, w], 1.0), (weight, other))


def test_towards_orthonormal_rows():
    """The gradient is bounded, and 0 where they are."""
    for weight in (torch.eye(4), torch.eye(4)[:2], torch.eye(1)):
        loss, dweight = of(lambda_orthogonality, weight, 0.5)
        assert loss == 0 and not dweight.any()
        leaf = weight.clone().requires_grad_()
        (first,) = torch.autograd.grad(lambda_orthogonality(leaf, 0.5), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * torch.ones_like(first)).sum(), leaf)
        assert not second.any()
    off = normal(4, 4)
    bound = 2 * torch.sigmoid(torch.tensor(-0.5)) * 1.1
    for size in (1e-2, 1e-5, 1e-9, 1e-15):
        _, dweight = of(lambda_orthogonality, torch.eye(4, dtype=torch.float64) + size * off, 0.5)
        assert dweight.norm() < bound
    tall = torch.eye(4, dtype=torch.float64)[:, :3]  # its columns are orthonormal: the best that 4 rows of 3 can be
    loss, dweight = of(lambda_orthogonality, tall, 0.0)
    close([loss], [torch.sigmoid(torch.ones((), dtype=torch.float64))], 1e-12)
    assert not dweight.any()


def test_what_lambda_is_for():
    """Descent ends near the allowed distance where another loss pulls away from it; without, at orthonormal rows."""
    weight = normal(3, 5).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.05)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimizer.zero_grad()
        lambda_orthogonality(weight, 0.0).backward()
        optimizer.step()
    assert frame_error(weight) < 1e-3
    goal, found = normal(5, 5) * 1.5, []
    for lam in (0.5, 3.0):
        weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            ((weight - goal).square().sum() + 30 * lambda_orthogonality(weight, lam, alpha=5.0)).backward()
            optimizer.step()
        found.append(torch.linalg.matrix_norm(weight @ weight.mT - torch.eye(5)).item())
    assert found[0] < 0.7 < 1.5 < found[1] < 3.3


def test_halves_autocast_and_not_a_number():
    weight = normal(2, 5, 7).bfloat16()
    loss, dweight = of(lambda_orthogonality, weight, 1.0)
    wide = of(lambda_orthogonality, weight.float(), 1.0)
    assert loss.dtype == torch.float32 and same((loss, dweight), (wide[0], wide[1].bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(of(lambda_orthogonality, weight.float(), 1.0), wide)
    weight[1, 0, 0] = math.nan
    loss, dweight = of(lambda_orthogonality, weight, 1.0)
    assert loss.isnan().tolist() == [False, True] and dweight[0].isfinite().all() and dweight[1].isnan().all()


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 3, 5)], ids=str)
def test_a_distance_whose_square_is_beyond_float32(shape):
    weight = normal(*shape)
    expected = of(lambda_orthogonality, 1e10 * weight, 1.0)
    close(of(lambda_orthogonality, 1e10 * weight.float(), 1.0), expected, 1e-5)
    leaf = 1e10 * weight.float()
    close([torch.func.grad(lambda w: lambda_orthogonality(w, 1.0).sum())(leaf)],
          [torch.func.grad(lambda w: lambda_orthogonality(w, 1.0).sum())(leaf.double())], 1e-5)


def test_torch_func_takes_the_plain_formula():
    weight = normal(3, 4, 6)
    loss, dweight = of(lambda_orthogonality, weight[0], 1.0)
    close([torch.func.grad(lambda_orthogonality)(weight[0], 1.0)], [dweight], 1e-12)
    close([torch.vmap(lambda w: lambda_orthogonality(w, 1.0))(weight)], [lambda_orthogonality(weight, 1.0)], 1e-12)
    v = normal(4, 6, seed=1)
    found = torch.func.jvp(lambda w: lambda_orthogonality(w, 1.0), (weight[0],), (v,))
    close(found, (loss, (dweight * v).sum()), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    weights = [normal(*shape, dtype=torch.float32).requires_grad_() for shape in ((4, 6), (5, 3), (257, 260))]
    found = torch.compile(lambda_orthogonality, fullgraph=True, dynamic=dynamic, backend="aot_eager")(weights, 1.0)
    expected = lambda_orthogonality(weights, 1.0)
    close([found.detach(), *torch.autograd.grad(found.sum(), weights)],
          [expected.detach(), *torch.autograd.grad(expected.sum(), weights)], 1e-5)


W = torch.randn(3, 4)


@pytest.mark.parametrize("weight, options, error, words", [
    ("w", {}, TypeError, "lambda_orthogonality: weight must be a tensor, got str 'w'"),
    ([], {}, ValueError, r"weight must be weights, got an empty list \[\]"),
    ([W, W[0]], {}, ValueError, r"weight\[1\] must be \(..., k, n\) with k > 0 and n > 0, got \(4,\)"),
    ([W, W[None]], {}, ValueError, r"weight\[1\] must be \(k, n\), got \(1, 3, 4\)"),
    ([W, W.double()], {}, ValueError, r"got weight\[1\] of torch.float64 on cpu after torch.float32 on cpu"),
    (W[:0], {}, ValueError, r"with k > 0 and n > 0, got \(0, 4\)"),
    (W, {"alpha": 0}, ValueError, "alpha must be positive and finite, got 0"),
    (W, {"lam": math.nan}, ValueError, "lam must be a finite number, got nan"),
])
def test_bad_input_is_named(weight, options, error, words):
    with pytest.raises(error, match=words):
        lambda_orthogonality(weight, **{"lam": 1.0} | options)
    if options:
        with pytest.raises(error, match=f"LambdaOrthogonalityLoss: {words}"):
            LambdaOrthogonalityLoss(**{"lam": 1.0} | options)
    with pytest.raises(ValueError, match="Loss: reduction must be one of mean, sum, none, got 'max'"):
        LambdaOrthogonalityLoss(1.0, reduction="max")
