"""Sinkhorn as an op of torch: shapes, types, autograd, torch.func, torch.compile and threads."""

import math
import warnings

import pytest
import torch
from helpers import same, threads
from sinkhorn_cases import BACKWARD, OP, affinity, each_dtype, marginal_error, problem

from torch_subspace.transport.sinkhorn import sinkhorn

# ------------------------------------------------------------------------------------------------- shapes and types


@pytest.mark.parametrize("symmetric", [True, None, False])
@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,), (2, 0), ()], ids=str)
def test_batches_are_their_plans(batch, symmetric):
    count = math.prod(batch)
    scores = torch.stack([affinity(30, seed=i) for i in range(max(count, 1))])[:count].reshape(*batch, 30, 30)
    row = torch.rand(*batch, 30, dtype=torch.float64) + 0.5
    leaf = scores.clone().requires_grad_()
    options = {"symmetric": symmetric, "max_iter": 2000}
    plan = sinkhorn(leaf, row=row, col=row, **options)
    dplan = torch.randn_like(plan)
    plan.backward(dplan)
    assert plan.shape == scores.shape and leaf.grad.shape == scores.shape
    for s, r, p, d, g in zip(*(t.reshape(count, *t.shape[len(batch):])
                               for t in (scores, row, plan.detach(), dplan, leaf.grad))):
        one = s.clone().requires_grad_()
        alone = sinkhorn(one, row=r, col=r, **options)
        alone.backward(d)
        assert torch.equal(alone, p) and torch.equal(one.grad, g)


def test_one_marginal_for_a_whole_batch():
    scores, row, col = problem(8, 6, batch=(4,))
    row, col = row[0].requires_grad_(), col[0]
    plan = sinkhorn(scores, row=row, col=col)
    assert torch.allclose(plan.sum(-1), row.expand(4, 8), rtol=1e-5)
    dplan = torch.randn_like(plan)
    plan.backward(dplan)
    total = torch.zeros(8, dtype=torch.float64)
    for s, d in zip(scores, dplan):
        one = row.detach().clone().requires_grad_()
        sinkhorn(s, row=one, col=col).backward(d)
        total += one.grad
    assert torch.allclose(row.grad, total)


def test_memory_of_any_order():
    scores, row, col = problem(20, 30)
    plan = sinkhorn(scores, row=row, col=col)
    for other in (scores.mT.contiguous().mT, torch.stack([scores, scores], -1)[..., 0]):
        assert not other.is_contiguous()
        assert torch.equal(sinkhorn(other, row=row, col=col), plan)
    leaf = scores.clone().requires_grad_()
    sinkhorn(leaf, row=row, col=col).sum().backward()  # an expanded gradient
    assert leaf.grad.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [None, True])
def test_half_types_are_computed_in_float32(dtype, symmetric):
    scores = affinity(60).to(dtype).requires_grad_()
    plan = sinkhorn(scores, symmetric=symmetric)
    assert plan.dtype == torch.float32
    assert torch.equal(plan.detach(), sinkhorn(scores.detach().float(), symmetric=symmetric))
    plan.square().sum().backward()
    assert scores.grad.dtype == dtype and scores.grad.isfinite().all()
    skew = affinity(60).to(dtype)
    skew[3, 4] += 0.5
    with pytest.raises(ValueError, match="not symmetric"):
        sinkhorn(skew, symmetric=True)


def test_autocast_rounds_nothing():
    scores = affinity(40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plan = sinkhorn(scores)
        product = sinkhorn(torch.nn.functional.normalize(torch.randn(40, 8), dim=-1) @ torch.randn(8, 40))
    assert torch.equal(plan, sinkhorn(scores)) and product.dtype == torch.float32


def test_no_iterations():
    scores, row, col = problem(4, 5)
    with pytest.warns(RuntimeWarning, match="after 0 sweeps"):
        plan = sinkhorn(scores, row=row, col=col, max_iter=0, eta=0.5)
    assert torch.allclose(plan, torch.exp((scores - scores.max()) / 0.5))
    with pytest.warns(RuntimeWarning, match="after 0 sweeps"):
        plan = sinkhorn(affinity(9), max_iter=0)
    assert torch.allclose(plan, torch.exp((affinity(9) - affinity(9).max()) / 0.1))


def test_stopping_early_warns_with_the_error():
    scores, row, col = problem(30, 20)
    for symmetric, inputs in ((False, (scores, row, col)), (True, (affinity(30), None, None))):
        options = {"row": inputs[1], "col": inputs[2], "symmetric": symmetric, "eta": 0.05}
        with pytest.warns(RuntimeWarning, match=r"after 3 sweeps .* off by \d\.\de-\d+ .*tol is 1e-12") as caught:
            plan = sinkhorn(inputs[0], max_iter=3, tol=1e-12, **options)
        told = float(str(caught[0].message).split("off by ")[1].split()[0])
        assert told == pytest.approx(marginal_error(plan, inputs[1], inputs[2]), rel=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(affinity(30), mode="cpp", max_iter=0)
        sinkhorn(scores, row=row, col=col)


# ---------------------------------------------------------------------------------------------------------- machinery


def test_gradcheck():
    scores, row, col = problem(5, 4)
    scores.requires_grad_(), row.requires_grad_(), col.requires_grad_()

    def function(scores, row, col):
        return sinkhorn(scores, eta=0.5, tol=1e-13, max_iter=500, row=row, col=col * (row.sum() / col.sum()))

    assert torch.autograd.gradcheck(function, (scores, row, col), atol=1e-6)
    square = torch.rand(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: sinkhorn(s, eta=0.5, tol=1e-13, max_iter=500), square, atol=1e-6)
    found = affinity(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sinkhorn(s, eta=0.5, tol=1e-13, max_iter=500), found, atol=1e-6)


def test_gradcheck_of_symmetric_scores():
    scores, row = torch.rand(5, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.3

    def function(scores, row):
        return sinkhorn((scores + scores.mT) / 2, eta=0.5, tol=1e-13, row=row, symmetric=True)

    assert torch.autograd.gradcheck(function, (scores.requires_grad_(), row.requires_grad_()), atol=1e-6)


@each_dtype
def test_opcheck(dtype):
    scores, row, col = (t[None] for t in problem(6, 9, dtype))
    none = torch.empty(0, dtype=dtype)
    square = affinity(7, dtype=dtype)[None]
    for inputs in ((scores, row, col, 0.3, 1e-6, 100, 0, 0), (scores, row, col, 0.3, 1e-6, 100, 0, 5),
                   (square, none, none, 0.3, 1e-6, 100, 1, 0), (square, none, none, 0.3, 1e-6, 100, 2, 0)):
        leaves = [t.clone().requires_grad_() if t.numel() else t for t in inputs[:3]]
        torch.library.opcheck(OP, (*leaves, *inputs[3:]))
        plan, *_ = OP(*inputs)
        for need in ((True, True, True), (True, False, False), (False, True, False)):
            need = need if inputs[1].numel() else (need[0], False, False)
            arguments = torch.randn_like(plan), plan, *inputs[1:4], *inputs[6:], *need
            torch.library.opcheck(BACKWARD, arguments)


def test_there_is_no_second_derivative():
    scores = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64)
    (first,) = torch.autograd.grad((sinkhorn(scores) * weight).sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


def test_torch_func_and_forward_mode_take_the_plain_formula():
    scores, row, col = problem(6, 8)
    options = {"eta": 0.5, "row": row, "col": col}
    plan = sinkhorn(scores, **options, tol=1e-13)
    v = torch.randn_like(scores)
    primal, tangent = torch.func.jvp(lambda s: sinkhorn(s, **options), (scores,), (v,))
    assert torch.allclose(primal, plan, atol=1e-10)
    leaf = scores.clone().requires_grad_()
    dplan = torch.randn_like(plan)
    sinkhorn(leaf, **options, tol=1e-13).backward(dplan)
    assert torch.allclose((tangent * dplan).sum(), (leaf.grad * v).sum(), rtol=1e-6)
    many = torch.rand(3, 6, 8, dtype=torch.float64)
    assert torch.allclose(torch.vmap(lambda s: sinkhorn(s, **options))(many), sinkhorn(many, **options), atol=1e-6)
    square = affinity(7)
    for mode, symmetric in (("implicit", True), ("cpp", None)):
        one = torch.vmap(lambda s, m=mode, y=symmetric: sinkhorn(s, mode=m, symmetric=y))(square[None])[0]
        assert torch.allclose(one, sinkhorn(square, mode=mode, symmetric=symmetric), atol=1e-6)


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()

    def step(scores, row, col, symmetric, mode):
        return sinkhorn(scores, eta=0.3, row=row, col=col, symmetric=symmetric, mode=mode).square().sum()

    compiled = torch.compile(step, fullgraph=True)
    scores, row, col = problem(12, 9, torch.float32)
    square = affinity(20, dtype=torch.float32)
    for inputs in ((scores, row, col, None, "implicit"), (square, None, None, None, "implicit"),
                   (square, None, None, True, "implicit"), (square, None, None, None, "cpp")):
        ours, theirs = (inputs[0].clone().requires_grad_() for _ in range(2))
        compiled(ours, *inputs[1:]).backward()
        step(theirs, *inputs[1:]).backward()
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("batch", [(), (40,)], ids=str)
def test_same_bits_for_the_same_number_of_threads(symmetric, batch):
    size = 300 if not batch else 24
    scores = affinity(size, dtype=torch.float32).expand(*batch, size, size).contiguous()
    dplan = torch.randn_like(scores)
    results = {}
    for count in threads(1, 2, 3, 2, 1, 3):
        leaf = scores.clone().requires_grad_()
        plan = sinkhorn(leaf, symmetric=symmetric, max_iter=2000)
        plan.backward(dplan)
        now = plan.detach(), leaf.grad
        for a, b in zip(now, results.setdefault(count, now)):
            assert torch.equal(a, b)
    for plan, grad in results.values():
        assert torch.allclose(plan, results[1][0], atol=2e-6) and torch.allclose(grad, results[1][1], atol=2e-4)


def test_the_input_is_left_alone():
    scores, row, col = problem(9, 9)
    kept = [t.clone() for t in (scores, row, col)]
    sinkhorn(scores.requires_grad_(), row=row, col=col).sum().backward()
    assert same((scores, row, col), kept)
