"""Sinkhorn: plans and gradients against float64 references, facts of doubly stochastic plans, bad input."""

import math

import pytest
import reference as ref
import torch
from helpers import close, normal
from hypothesis import given, settings, strategies
from kernels import only_cpu
from sinkhorn_cases import BACKWARD, OP, TIGHT, affinity, each_dtype, marginal_error, problem

from torch_subspace.transport.sinkhorn import sinkhorn

VALUE = {torch.float64: 1e-11, torch.float32: 1e-5}
GRADIENT = {torch.float64: 1e-10, torch.float32: 3e-5}


SIZES = [(1, 1), (1, 6), (6, 1), (2, 3), (7, 5), (16, 16), (17, 33), (60, 90), (150, 131)]

# ------------------------------------------------------------------------------------------------------------- values


@each_dtype
@pytest.mark.parametrize("eta", [1.0, 0.1, 0.03])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_reference(size, eta, dtype):
    scores, row, col = problem(*size, dtype)
    scores.requires_grad_(), row.requires_grad_(), col.requires_grad_()
    plan = sinkhorn(scores, eta=eta, tol=TIGHT[dtype], max_iter=1000, row=row, col=col)
    wide = [t.detach().double() for t in (scores, row, col)]
    wide[2] = wide[2] * (wide[1].sum() / wide[2].sum())
    truth = ref.sinkhorn(wide[0], eta=eta, row=wide[1], col=wide[2], sweeps=600)
    assert plan.dtype == dtype
    assert marginal_error(plan.detach(), row.detach(), col.detach()) <= 1.5 * TIGHT[dtype]
    close(plan.detach(), truth, VALUE[dtype])
    dplan = normal(*size, seed=1, dtype=dtype)
    plan.backward(dplan)
    expected = ref.sinkhorn_gradient(truth, dplan.double(), eta=eta)
    scale = (truth * dplan.double()).abs().max() / eta
    for ours, theirs, s in zip((scores.grad, row.grad, col.grad), expected, (scale, scale * eta, scale * eta)):
        assert (ours.double() - theirs).abs().max() <= GRADIENT[dtype] * max(s, theirs.abs().max())
    assert abs(row.grad.sum() - col.grad.sum()) <= 1e-5 * row.grad.abs().sum()


@each_dtype
@pytest.mark.parametrize("eta", [0.175, 0.1, 0.05])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 64, 100, 149, 290])
def test_symmetric_matches_the_reference(n, eta, dtype):
    scores = affinity(n, dtype=dtype)
    wide = scores.double()
    truth = ref.sinkhorn_symmetric(wide, eta=eta)
    dplan = normal(n, n, seed=n, dtype=dtype)
    general, *_ = ref.sinkhorn_gradient(truth, dplan.double(), eta=eta)
    scale = (truth * dplan.double()).abs().max() / eta
    for symmetric, expected in ((True, (general + general.mT) / 2), (None, general)):
        s = scores.clone().requires_grad_()
        plan = sinkhorn(s, eta=eta, tol=TIGHT[dtype], symmetric=symmetric)
        assert torch.equal(plan, plan.mT)
        assert marginal_error(plan.detach()) <= 1.5 * TIGHT[dtype]
        close(plan.detach(), truth, VALUE[dtype])
        plan.backward(dplan)
        assert (s.grad.double() - expected).abs().max() <= GRADIENT[dtype] * scale
        if symmetric:
            assert torch.equal(s.grad, s.grad.mT)


@each_dtype
def test_symmetric_with_marginals(dtype):
    scores, eta = affinity(70, dtype=dtype), 0.1
    row = (torch.rand(70, dtype=torch.float64) + 0.2).to(dtype).requires_grad_()
    s = scores.clone().requires_grad_()
    plan = sinkhorn(s, tol=TIGHT[dtype], row=row, symmetric=True)
    truth = ref.sinkhorn_symmetric(scores.double(), eta=eta, row=row.detach().double())
    close(plan.detach(), truth, VALUE[dtype])
    dplan = torch.randn(70, 70, dtype=dtype)
    plan.backward(dplan)
    ds, dr, dc = ref.sinkhorn_gradient(truth, dplan.double(), eta=eta)
    scale = (truth * dplan.double()).abs().max() / eta
    assert (s.grad.double() - (ds + ds.mT) / 2).abs().max() <= GRADIENT[dtype] * scale
    assert (row.grad.double() - (dr + dc)).abs().max() <= GRADIENT[dtype] * scale * eta * 10
    both = [row.detach().clone().requires_grad_() for _ in range(2)]  # given twice, they share the gradient
    sinkhorn(scores, tol=TIGHT[dtype], row=both[0], col=both[1], symmetric=True).backward(dplan)
    for t in both:
        torch.testing.assert_close(t.grad, row.grad / 2, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=strategies.data(), dtype=strategies.sampled_from(list(TIGHT)))
def test_matches_the_reference_anywhere(data, dtype):
    m, n = (data.draw(strategies.integers(1, 40)) for _ in range(2))
    eta = data.draw(strategies.floats(0.04, 5))
    scores, row, col = problem(m, n, dtype, seed=data.draw(strategies.integers(0, 99)))
    scores = scores * data.draw(strategies.floats(0, 1)) + data.draw(strategies.sampled_from([0.0, -3.0, 7.0]))
    plan = sinkhorn(scores, eta=eta, tol=TIGHT[dtype], max_iter=3000, row=row, col=col)
    assert marginal_error(plan, row, col) <= 1.5 * TIGHT[dtype]
    wide = row.double(), col.double() * (row.double().sum() / col.double().sum())
    truth = ref.sinkhorn(scores.double(), eta=eta, row=wide[0], col=wide[1], sweeps=1000)
    close(plan, truth, 3 * VALUE[dtype])


# ---------------------------------------------------------------------------------------------------- hard scores


@each_dtype
@pytest.mark.parametrize("symmetric", [True, None])
def test_the_log_domain(symmetric, dtype):
    """eta 1/200 on cosines, and rows whose scores differ by thousands of eta."""
    scores = affinity(96, dtype=dtype)
    plan = sinkhorn(scores, eta=1 / 200, tol=TIGHT[dtype], symmetric=symmetric)
    assert marginal_error(plan) <= 1.5 * TIGHT[dtype] and plan.isfinite().all()
    shift = torch.linspace(-40, 30, 96, dtype=dtype)
    shifted = scores + shift + shift[:, None]  # the same plan
    eta, sweeps = 0.1, 300
    plan = sinkhorn(shifted, eta=eta, tol=TIGHT[dtype], max_iter=sweeps, symmetric=symmetric)
    truth = ref.sinkhorn_symmetric(scores.double(), eta=eta)
    rounding = 140 * torch.finfo(dtype).eps / eta
    close(plan, truth, VALUE[dtype] + 4 * rounding)
    assert marginal_error(plan) <= 1.5 * TIGHT[dtype]


@each_dtype
def test_the_log_domain_with_marginals_and_gradient(dtype):
    scores, row, col = problem(40, 25, dtype)
    far = torch.linspace(0, 64, 40, dtype=dtype)[:, None] - torch.linspace(32, 0, 25, dtype=dtype)
    leaf = (scores + far).requires_grad_()
    plan = sinkhorn(leaf, eta=0.125, tol=TIGHT[dtype], row=row, col=col)
    wide = row.double(), col.double() * (row.double().sum() / col.double().sum())
    truth = ref.sinkhorn((leaf.detach() - far).double(), eta=0.125, row=wide[0], col=wide[1])
    rounding = 96 * torch.finfo(dtype).eps / 0.125
    close(plan.detach(), truth, VALUE[dtype] + 4 * rounding)
    dplan = torch.randn_like(plan)
    plan.backward(dplan)
    expected, *_ = ref.sinkhorn_gradient(truth, dplan.double(), eta=0.125)
    close(leaf.grad, expected, GRADIENT[dtype] + 20 * rounding)


@pytest.mark.parametrize("symmetric", [True, False])
@each_dtype
def test_a_huge_offset_changes_nothing(dtype, symmetric):
    scores = (affinity(50, dtype=dtype) * 64).round() / 64
    one, other = (sinkhorn(scores + c, symmetric=symmetric, max_iter=500) for c in (0.0, 2.0**14))
    assert torch.equal(one, other)


@each_dtype
@pytest.mark.parametrize("symmetric", [True, None, False])
def test_masked_entries_are_zeros(symmetric, dtype):
    scores, eta = affinity(40, dtype=dtype), 0.1
    band = (torch.arange(40) - torch.arange(40)[:, None]).abs() < 12
    scores[~band] = -math.inf
    s = scores.clone().requires_grad_()
    plan = sinkhorn(s, eta=eta, tol=TIGHT[dtype], max_iter=3000, symmetric=symmetric)
    assert not plan[~band].any() and plan[band].all()
    truth = ref.sinkhorn_symmetric(scores.double(), eta=eta)
    close(plan.detach(), truth, VALUE[dtype] * (1 if symmetric is not False else 5))
    dplan = torch.randn_like(plan)
    plan.backward(dplan)
    expected, *_ = ref.sinkhorn_gradient(truth, dplan.double(), eta=eta)
    expected = (expected + expected.mT) / 2 if symmetric else expected
    assert not s.grad[~band].any()
    assert (s.grad.double() - expected).abs().max() <= 5 * GRADIENT[dtype] * expected.abs().max()


def test_a_bipartite_plan():
    """P with an eigenvalue of -1: the symmetric system is singular, the gradient is not."""
    s = torch.full((6, 6), -math.inf, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    s[:3, 3:] = torch.rand(3, 3, generator=g, dtype=torch.float64)
    s[3:, :3] = s[:3, 3:].mT
    leaf = s.clone().requires_grad_()
    plan = sinkhorn(leaf, eta=0.5, tol=1e-12, symmetric=True, max_iter=2000)
    dplan = torch.randn(6, 6, generator=g, dtype=torch.float64)
    plan.backward(dplan)
    expected, *_ = ref.sinkhorn_gradient(plan.detach(), dplan, eta=0.5)
    close(leaf.grad, (expected + expected.mT) / 2, 1e-9)


@only_cpu
@pytest.mark.parametrize("bad, words", [(math.nan, "nan"), (math.inf, "inf")])
@pytest.mark.parametrize("symmetric", [None, True, False])
def test_a_score_that_is_no_number(symmetric, bad, words):
    scores = torch.stack([affinity(20), affinity(20)])
    scores[1, 3, 5] = scores[1, 5, 3] = bad
    with pytest.raises(RuntimeError, match=rf"sinkhorn: score \(1, 3, 5\) is {words}"):
        sinkhorn(scores, symmetric=symmetric)


@only_cpu
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_an_empty_row_or_column(scale):
    for where, words in (((4, slice(None)), "row 4 of plan 0"), ((slice(None), 7), "column 7 of plan 0")):
        scores = torch.rand(20, 20) * scale
        scores[where] = -math.inf
        with pytest.raises(RuntimeError, match=f"sinkhorn: {words} has no score above -inf"):
            sinkhorn(scores)
    with pytest.raises(RuntimeError, match="no score above -inf"):
        sinkhorn(torch.full((3, 3), -math.inf))


# -------------------------------------------------------------------------------------------------------- facts


def test_the_symmetric_step_needs_few_sweeps():
    """At most 20 to 1e-6, where the alternating iteration may take hundreds."""
    for n, d, eta in ((300, 32, 0.1), (300, 32, 0.175), (256, 8, 0.05), (200, 16, 1 / 80), (500, 64, 0.1)):
        _, error, sweeps = OP(affinity(n, d, torch.float32)[None], *[torch.empty(0)] * 2, eta, 1e-6, 100, 1, 0)
        assert error.item() <= 1e-6 and sweeps.item() <= 20


def test_relaxation_saves_sweeps():
    """Plain sweeps shrink the error by sigma_2^2 each: what is needed follows from the plan itself."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(200, 2, generator=g), torch.rand(200, 2, generator=g)
    scores = -(x[:, None] - y).square().sum(-1)
    plan, error, sweeps = OP(scores[None], *[torch.empty(0)] * 2, 0.02, 1e-6, 1000, 0, 0)
    plain = math.log(1e-6) / math.log(torch.linalg.svdvals(plan[0].double())[1].item() ** 2)
    assert error.item() <= 1e-6 and sweeps.item() < 0.6 * plain


@pytest.mark.parametrize("n", [1000, 2500])
def test_float32_reaches_1e_6(n):
    for symmetric in (True, False):
        plan = sinkhorn(affinity(n, 64, torch.float32), eta=0.175, symmetric=symmetric, max_iter=500)
        assert marginal_error(plan) <= 1.5e-6


def test_shifts_of_rows_and_columns_change_nothing_and_have_no_gradient():
    scores, row, col = problem(12, 9)
    shifted = scores + torch.randn(12, 1, dtype=torch.float64) + torch.randn(9, dtype=torch.float64)
    options = {"row": row, "col": col, "tol": 1e-13, "eta": 0.3}
    assert torch.allclose(sinkhorn(scores, **options), sinkhorn(shifted, **options), atol=1e-11)
    scores.requires_grad_()
    (sinkhorn(scores, **options) * torch.randn(12, 9, dtype=torch.float64)).sum().backward()
    assert scores.grad.sum(0).abs().max() <= 1e-10 and scores.grad.sum(1).abs().max() <= 1e-10


def test_a_permutation_of_the_rows_permutes_the_plan():
    scores, row, col = problem(30, 20)
    order = torch.randperm(30)
    plan = sinkhorn(scores, row=row, col=col, tol=1e-13)
    assert torch.allclose(sinkhorn(scores[order], row=row[order], col=col, tol=1e-13), plan[order], atol=1e-11)
    assert torch.allclose(sinkhorn(scores.mT, row=col, col=row, tol=1e-13), plan.mT, atol=1e-11)


def test_the_symmetric_plan_is_the_general_one():
    scores = affinity(80)
    one, other = (sinkhorn(scores, tol=1e-12, max_iter=5000, symmetric=s) for s in (True, False))
    assert torch.allclose(one, other, atol=1e-10)


def test_found_out_symmetry_keeps_the_general_gradient():
    """Zeros are symmetric too, but whoever learns scores from there must be able to leave symmetry."""
    scores = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    dplan = torch.randn(5, 5, dtype=torch.float64)
    sinkhorn(scores).backward(dplan)
    expected, *_ = ref.sinkhorn_gradient(torch.full((5, 5), 0.2, dtype=torch.float64), dplan)
    assert torch.allclose(scores.grad, expected) and not torch.allclose(scores.grad, scores.grad.mT)


def test_a_product_that_is_symmetric_up_to_rounding_is_found_out():
    c = torch.nn.functional.normalize(torch.randn(200, 48), dim=-1)
    scores = (c @ c.mT).abs()
    scores[3, 100] *= 1 + 1e-7
    plan = sinkhorn(scores)
    assert torch.equal(plan, plan.mT)
    scores[3, 100] += 1e-3
    assert not torch.equal(sinkhorn(scores, max_iter=2000), sinkhorn(scores, max_iter=2000).mT)


# ----------------------------------------------------------------------------------------------- the public code's


@each_dtype
@pytest.mark.parametrize("eta", [0.175, 0.1, 1 / 200])
@pytest.mark.parametrize("n", [1, 5, 64, 130])
def test_cpp_mode_is_five_half_steps(n, eta, dtype):
    scores = torch.stack([affinity(n, dtype=dtype), affinity(n, 3, dtype, seed=1)])
    ours, theirs = scores.clone().requires_grad_(), scores.double().requires_grad_()
    plan, truth = sinkhorn(ours, eta=eta, mode="cpp"), ref.sinkhorn_half_steps(theirs, eta=eta)
    close(plan.detach(), truth.detach(), VALUE[dtype])
    dplan = torch.randn(2, n, n, dtype=dtype)
    plan.backward(dplan), truth.backward(dplan.double())
    scale = (truth.detach() * dplan.double()).abs().max() / eta
    assert (ours.grad.double() - theirs.grad).abs().max() <= GRADIENT[dtype] * scale


def test_cpp_mode_of_a_rectangle():
    scores, row, col = problem(9, 7)
    scores.requires_grad_(), row.requires_grad_()
    plan = sinkhorn(scores, row=row, col=col, mode="cpp")
    assert torch.allclose(plan.sum(1), row)
    dplan = torch.randn(9, 7, dtype=torch.float64)
    plan.backward(dplan)
    x = (plan * dplan).sum(1) / row
    assert torch.allclose(row.grad, x)
    assert torch.allclose(scores.grad, plan * (dplan - x[:, None]) / 0.1)


# ---------------------------------------------------------------------------------------------------------- bad input

S, R, C = (t.float() for t in problem(4, 3))


@pytest.mark.parametrize("arguments, error, words", [
    (([[1.0]], {}), TypeError, "scores must be a tensor, got list"),
    ((torch.ones(3, 3).long(), {}), TypeError, "int64"),
    ((torch.ones(3), {}), ValueError, r"\(..., m, n\)"),
    ((torch.ones(3, 0), {}), ValueError, "rows and columns"),
    ((S, {}), ValueError, r"marginals of ones need a square plan, got \(4, 3\)"),
    ((S, {"row": R}), ValueError, "square plan"),
    ((S, {"row": R[:2], "col": C}), ValueError, r"row must be \(4,\)"),
    ((S, {"row": R, "col": C.tolist()}), TypeError, "col must be a floating tensor, got list"),
    ((S, {"row": R, "col": C.long()}), TypeError, "col must be a floating tensor, got torch.int64"),
    ((S, {"row": R, "col": C.to("meta")}), ValueError, "one device"),
    ((S, {"row": R, "col": 2 * C}), ValueError, "equal sums"),
    ((S, {"row": R * 0, "col": C}), ValueError, "row must be positive"),
    ((S, {"row": R / 0, "col": C}), ValueError, "row must be positive and finite"),
    ((S[:3], {"row": R[:3], "symmetric": False}), ValueError, "equal sums"),
    ((S, {"symmetric": True}), ValueError, r"symmetric scores are square, got \(4, 3\)"),
    pytest.param((S[:3], {"symmetric": True}), ValueError,
                 "scores are not symmetric: plan 0 differs from its transpose by up to", marks=only_cpu),
    ((affinity(3), {"row": C, "col": 2 * C, "symmetric": True}), ValueError, "equal row and col"),
    ((S[:3], {"symmetric": "yes"}), ValueError, "symmetric must be None, True or False"),
    ((S[:3], {"eta": 0}), ValueError, "eta must be a positive finite number, got 0"),
    ((S[:3], {"eta": math.nan}), ValueError, "eta"),
    ((S[:3], {"tol": -1e-6}), ValueError, "tol must be"),
    ((S[:3], {"max_iter": -1}), ValueError, "max_iter must be an int of at least 0, got -1"),
    ((S[:3], {"max_iter": 1.5}), ValueError, "max_iter"),
    ((S[:3], {"mode": "official"}), ValueError, 'mode must be "implicit" or "cpp"'),
])
def test_bad_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        sinkhorn(arguments[0], **arguments[1])
    assert "sinkhorn" in str(caught.value)


def test_the_op_itself_checks_too():
    """Whoever calls torch.ops directly gets an error, never a crash."""
    none = torch.empty(0)
    s, r, c = S[None], R[None], C[None]
    for bad in ((s.half(), r, c, 0.1, 1e-6, 10, 0, 0), (s[0, 0], r, c, 0.1, 1e-6, 10, 0, 0),
                (s, none, none, 0.1, 1e-6, 10, 0, 0), (s, c, r, 0.1, 1e-6, 10, 0, 0),
                (s, r.double(), c, 0.1, 1e-6, 10, 0, 0), (s, r, c, 0.0, 1e-6, 10, 0, 0),
                (s, r, c, 0.1, 1e-6, -1, 0, 0), (s, r, c, 0.1, 1e-6, 10, 3, 0), (s, r, none, 0.1, 1e-6, 10, 1, 0),
                (s, r, c, 0.1, 1e-6, 10, 0, 4), (s[:, :0], none, c, 0.1, 1e-6, 10, 0, 0)):
        with pytest.raises(RuntimeError, match="sinkhorn: "):
            OP(*bad)
    with pytest.raises(RuntimeError, match="sinkhorn_backward: dplan does not match"):
        BACKWARD(s[:, :2], s, r, c, 0.1, 0, 0, True, False, False)
