"""tucker_linear against its definition in float64, LoRA, torch's own layer, and the rules of torch."""

import functools
import math
import sys

import helpers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_subspace as ts

MODULE = sys.modules["torch_subspace.tucker.tucker_linear"]
OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(5, 7, 6, 3, 2), (64, 100, 130, 16, 8), (1, 33, 17, 40, 5), (300, 64, 1000, 16, 16), (130, 1, 3, 1, 1),
          (33, 500, 9, 4, 70)]  # t, n, m, r_in, r_out
close = functools.partial(helpers.close, floor=1e-3)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def problem(t, n, m, rn, rm, dtype=torch.float64):
    """x, weight, bias, core, u, v and dy."""
    g = torch.Generator().manual_seed(t + n + m + rn + rm)
    x, bias = torch.randn(t, n, generator=g), torch.randn(m, generator=g)
    weight = torch.randn(m, n, generator=g) / n**0.5
    core, u, v = torch.randn(rm, rn, generator=g), torch.randn(m, rm, generator=g), torch.randn(rn, n, generator=g)
    dy = torch.randn(t, m, generator=g)
    w = wide(dtype)
    return (x.to(dtype), weight.to(dtype), bias.to(dtype), core.to(w), (u / rm**0.5).to(w), (v / n**0.5).to(w),
            dy.to(dtype))


def formula(x, weight, bias, core, u, v, scale=1.0, mask=1.0):
    return F.linear(x, weight, bias) + scale * (x * mask) @ v.T @ core.T @ u.T


def gradients(function, tensors, dy):
    """Output and the gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    *tensors, dy = problem(*shape, dtype)
    found = gradients(lambda *a: ts.tucker_linear(*a, scale=0.7), tensors, dy)
    expected = gradients(lambda *a: formula(*a, scale=0.7), [t.double() for t in tensors], dy.double())
    close(found, expected, TOLERANCE[dtype])
    assert [f.dtype for f in found[1:]] == [t.dtype for t in tensors]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_transposed_v_is_read_and_given_its_gradient_as_it_lies(shape, dtype, dropout):
    *tensors, dy = problem(*shape, dtype)
    found = []
    for v in (tensors[-1], tensors[-1].mT.contiguous().mT):
        torch.manual_seed(3)
        found.append(gradients(lambda *a: ts.tucker_linear(*a, scale=0.7, dropout=dropout), (*tensors[:-1], v), dy))
    close(found[1], [t.double() for t in found[0]], TOLERANCE[dtype])
    assert found[1][-1].mT.is_contiguous()


def test_a_factor_of_an_adapter_gets_its_gradient_without_a_copy():
    factor = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    x, weight, bias, core, u, _, dy = problem(20, 30, 40, 4, 4)
    given = []
    factor.register_hook(given.append)
    ts.tucker_linear(x, weight, bias, core, u, factor.mT).backward(dy)
    assert given[0].is_contiguous()
    expected = gradients(lambda f: formula(x, weight, bias, core, u, f.mT), [factor], dy)[1]
    close([factor.grad], [expected], 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_dropout_draws_its_mask_again(shape, dtype):
    *tensors, dy = problem(*shape, dtype)
    torch.manual_seed(3)
    found = gradients(lambda *a: ts.tucker_linear(*a, dropout=0.3), tensors, dy)
    torch.manual_seed(3)
    mask = MODULE.dropout_mask(MODULE.draw_seed(0.3, dy.device), 0.3, tensors[0].shape, torch.float64)
    expected = gradients(lambda *a: formula(*a, mask=mask), [t.double() for t in tensors], dy.double())
    close(found, expected, TOLERANCE[dtype])
    assert torch.equal(ts.tucker_linear(*tensors, dropout=0.3, training=False), ts.tucker_linear(*tensors))


def test_dropout_drops_as_many_as_it_says_and_never_the_same():
    masks = [MODULE.dropout_mask(torch.tensor([seed]), 0.2, (1000, 100), torch.float64) for seed in (0, 1, -5)]
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, 1.25}
        assert abs((mask == 0).double().mean() - 0.2) < 0.01  # eight standard deviations
        assert abs((mask[1:] == mask[:-1]).double().mean() - 0.68) < 0.01  # rows are independent
    assert abs((masks[0] == masks[1]).double().mean() - 0.68) < 0.01


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_core_of_zeros_changes_no_bit(dtype):
    for shape in SHAPES:
        x, weight, bias, core, u, v, _ = problem(*shape, dtype)
        zero = torch.zeros_like(core)
        assert torch.equal(ts.tucker_linear(x, weight, bias, zero, u, v), F.linear(x, weight, bias))
        assert torch.equal(ts.tucker_linear(x, weight, None, zero, u, v), F.linear(x, weight))


def test_a_core_of_ones_on_the_diagonal_is_lora():
    x, weight, bias, _, _, _, _ = problem(20, 30, 40, 8, 8)
    a, b = torch.randn(8, 30, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    lora = F.linear(x, weight, bias) + 2.0 * F.linear(F.linear(x, a), b)
    close([ts.tucker_linear(x, weight, bias, torch.eye(8, dtype=torch.float64), b, a, scale=2.0)], [lora], 1e-14)


def test_gradients_are_those_of_the_composed_weight():
    x, weight, bias, core, u, v, dy = problem(20, 30, 40, 6, 5)

    def composed(x, weight, bias, core, u, v):
        return F.linear(x, ts.tucker_compose(core, [u, v.mT], scale=0.3, base=weight), bias)

    tensors = (x, weight, bias, core, u, v)
    close(gradients(lambda *a: ts.tucker_linear(*a, scale=0.3), tensors, dy), gradients(composed, tensors, dy), 1e-13)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70), st.integers(1, 70), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20),
       st.floats(-3, 3))
def test_any_shape(t, n, m, rn, rm, scale):
    *tensors, dy = problem(t, n, m, rn, rm)
    found = gradients(lambda *a: ts.tucker_linear(*a, scale=scale), tensors, dy)
    close(found, gradients(lambda *a: formula(*a, scale=scale), tensors, dy), 1e-11)


def test_leading_dimensions_views_and_empty_batches():
    x, weight, bias, core, u, v, _ = problem(24, 10, 12, 3, 4)
    y = ts.tucker_linear(x, weight, bias, core, u, v)
    assert torch.equal(ts.tucker_linear(x.view(2, 3, 4, 10), weight, bias, core, u, v), y.view(2, 3, 4, 12))
    assert ts.tucker_linear(x[0], weight, bias, core, u, v).shape == (12,)
    assert ts.tucker_linear(x[:0].view(0, 3, 10), weight, bias, core, u, v).shape == (0, 3, 12)
    strided = torch.stack([x, x], -1)[..., 0]
    turned = weight.T.contiguous().T
    found = ts.tucker_linear(strided, turned, bias, core.T.contiguous().T, u.T.contiguous().T, v.T.contiguous().T)
    close([found], [y], 1e-14)


def test_without_a_weight_only_the_change():
    x, weight, bias, core, u, v, dy = problem(24, 10, 12, 3, 4)
    found = gradients(lambda x, c, u, v: ts.tucker_linear(x, None, None, c, u, v), (x, core, u, v), dy)
    expected = gradients(lambda x, c, u, v: x @ v.T @ c.T @ u.T, (x, core, u, v), dy)
    close(found, expected, 1e-13)


@pytest.mark.parametrize("needed", range(1, 64))
def test_only_what_is_asked_for(needed):
    *tensors, dy = problem(9, 10, 12, 3, 4)
    leaves = [t.requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(tensors)]
    wanted = [t for t in leaves if t.requires_grad]
    found = torch.autograd.grad(ts.tucker_linear(*leaves), wanted, dy)
    close(found, torch.autograd.grad(formula(*leaves), wanted, dy), 1e-13)


def test_nothing_but_inputs_is_kept():
    *tensors, _ = problem(50, 60, 70, 4, 4)
    kept = []
    leaves = [t.requires_grad_(i in (0, 3, 4, 5)) for i, t in enumerate(tensors)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ts.tucker_linear(*leaves)
    assert set(kept) <= {t.data_ptr() for t in leaves} | {0}


def small():
    return [t.requires_grad_() for t in problem(3, 4, 5, 2, 3)[:6]]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_twice(dropout):
    def function(*tensors):
        torch.manual_seed(0)
        return ts.tucker_linear(*tensors, scale=1.3, dropout=dropout)

    assert torch.autograd.gradcheck(function, small())
    assert torch.autograd.gradgradcheck(function, small())


def test_forward_mode_and_functional_transforms():
    tensors = small()
    tangents = [torch.randn_like(t) for t in tensors]
    expected = torch.func.jvp(formula, tuple(t.detach() for t in tensors), tuple(tangents))
    close(torch.func.jvp(ts.tucker_linear, tuple(t.detach() for t in tensors), tuple(tangents)), expected, 1e-13)
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    mapped = torch.func.vmap(lambda x: ts.tucker_linear(x, *tensors[1:]))(x)
    close([mapped], [formula(x, *tensors[1:])], 1e-13)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_opcheck(dropout):
    x, _, _, core, u, v, dy = problem(6, 7, 8, 2, 3)
    seed = MODULE.draw_seed(dropout, x.device)
    for turned, lying in ((False, v), (True, v.mT.contiguous())):
        torch.library.opcheck(OP.tucker_linear_.default, (dy.clone(), x, core, u, lying, seed, 1.5, dropout, turned))
        for need, dx in ((7, x.clone()), (2, x.new_empty(0))):
            args = (dx, dy, x, core, u, lying, seed, 1.5, dropout, turned, need)
            torch.library.opcheck(OP.tucker_linear_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_compiled(dynamic, turned):
    torch._dynamo.reset()
    *tensors, dy = problem(24, 10, 12, 3, 4)
    if turned:
        tensors[-1] = tensors[-1].mT.contiguous().mT
    compiled = torch.compile(ts.tucker_linear, fullgraph=True, dynamic=dynamic)
    close(gradients(compiled, tensors, dy), gradients(ts.tucker_linear, tensors, dy), 1e-14)
    x, *rest = tensors
    for dropout in (0.0, 0.5):
        y = compiled(x[:7].requires_grad_(), *rest, dropout=dropout)
        y.sum().backward()
        assert y.shape == (7, 12) and y.isfinite().all()


def test_autocast_casts_the_base_and_not_the_factors():
    x, weight, bias, core, u, v, _ = problem(24, 10, 12, 3, 4, torch.float32)
    core = core.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ts.tucker_linear(x, weight, bias, core, u, v)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and core.grad.dtype == torch.float32
    close([y], [formula(x, weight, bias, core, u, v)], 3e-2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable_for_any_number_of_threads(threads):
    *tensors, dy = problem(700, 300, 400, 16, 16, torch.float32)
    for _ in helpers.threads(threads):
        first = gradients(ts.tucker_linear, tensors, dy)
        assert helpers.same(first, gradients(ts.tucker_linear, tensors, dy))
    close(first, gradients(formula, [t.double() for t in tensors], dy.double()), 5e-6)


def test_meta_tensors_have_shapes():
    *tensors, _ = (t.to("meta") for t in problem(24, 10, 12, 3, 4))
    assert ts.tucker_linear(*tensors).shape == (24, 12)


BAD = [
    ({"x": [1.0]}, TypeError, "x must be a tensor"),
    ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x must be float32"),
    ({"x": torch.tensor(1.0, dtype=torch.float64)}, ValueError, "got a scalar"),
    ({"x": torch.ones(3, 5, dtype=torch.float64)}, ValueError, "must be"),
    ({"weight": torch.ones(5, 4)}, TypeError, "share a dtype"),
    ({"weight": torch.ones(6, 4, dtype=torch.float64)}, ValueError, "weight must be"),
    ({"weight": None}, ValueError, "bias needs a weight"),
    ({"bias": torch.ones(4, dtype=torch.float64)}, ValueError, "bias must be"),
    ({"core": torch.ones(3, dtype=torch.float64)}, ValueError, "core must be"),
    ({"core": torch.ones(0, 2, dtype=torch.float64)}, ValueError, "core must be"),
    ({"u": torch.ones(5, 2, dtype=torch.float64)}, ValueError, "u must be"),
    ({"v": torch.ones(3, 4, dtype=torch.float64)}, ValueError, "v must be"),
    ({"v": torch.ones(2, 4, dtype=torch.float64, device="meta")}, ValueError, "v is on meta"),
    ({"scale": math.nan}, ValueError, "scale must be"),
    ({"scale": torch.tensor(1.0)}, ValueError, "scale must be"),
    ({"dropout": 1.0}, ValueError, "dropout must be"),
    ({"dropout": -0.1}, ValueError, "dropout must be"),
]


@pytest.mark.parametrize("change, error, words", BAD, ids=[f"{next(iter(c))}-{w}" for c, _, w in BAD])
def test_bad_input(change, error, words):
    names = ("x", "weight", "bias", "core", "u", "v")
    arguments = dict(zip(names, (t.detach() for t in small()))) | change
    options = {k: arguments.pop(k) for k in ("scale", "dropout") if k in arguments}
    with pytest.raises(error, match=f"tucker_linear: .*{words}"):
        ts.tucker_linear(**arguments, **options)


def test_the_ops_check_for_themselves():
    x, _, _, core, u, v, dy = problem(6, 7, 8, 2, 3)
    seed = torch.empty(0, dtype=torch.int64)
    for bad in ((dy[:5].clone(), x, core, u, v, seed), (dy, x, core.float(), u, v, seed), (dy, x, core.T, u, v, seed)):
        with pytest.raises(RuntimeError, match="tucker_linear_: "):
            OP.tucker_linear_(*bad, 1.0, 0.0, False)
    with pytest.raises(RuntimeError, match="dropout"):
        OP.tucker_linear_(dy, x, core, u, v, torch.zeros(1, dtype=torch.int64), 1.0, 1.5, False)
    with pytest.raises(RuntimeError, match="seed"):
        OP.tucker_linear_(dy, x, core, u, v, seed, 1.0, 0.5, False)
    with pytest.raises(RuntimeError, match="contiguous"):
        OP.tucker_linear_(torch.ones(8, 6, dtype=torch.float64).T, x, core, u, v, seed, 1.0, 0.0, False)
