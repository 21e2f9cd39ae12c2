"""Newton-Schulz: values and gradients against the reference, its facts, coefficients, torch, bad input."""

import math

import numpy as np
import pytest
import reference as ref
import torch
from helpers import close, normal, same, threads
from hypothesis import given, settings, strategies
from kernels import only_cpu
from torch.optim._muon import _zeropower_via_newtonschulz

from torch_subspace.lowrank import newton_schulz
from torch_subspace.lowrank.newton_schulz import COEFFICIENTS, check_steps

OP = torch.ops.torch_subspace.newton_schulz
BACKWARD = torch.ops.torch_subspace.newton_schulz_backward
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-4}
MUON = COEFFICIENTS["muon"][0]
SHAPES = [(1, 1), (3, 7), (7, 3), (2, 20, 20), (9, 70), (70, 129), (2, 3, 90, 66), (300, 700)]


def of(function, x, *args, **options):
    """Its value, and the gradient for a fixed one of it, that bfloat16 holds."""
    x = x.detach().requires_grad_()
    y = function(x, *args, **options)
    return y.detach(), torch.autograd.grad(y, x, normal(*y.shape, seed=5).bfloat16().to(y.dtype))[0]


def triples(steps, coefficients):
    flat = check_steps("", steps, coefficients)
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def truth(x, steps=5, coefficients="muon", **options):
    return of(ref.newton_schulz, x.double(), triples(steps, coefficients), **options)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype):
    x = normal(*shape).to(dtype)
    found = of(newton_schulz, x)
    assert found[0].dtype == found[1].dtype == dtype
    close(found, truth(x), TOLERANCE[dtype], floor=1e-3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=strategies.integers(1, 90), n=strategies.integers(1, 140), steps=strategies.integers(1, 12),
       name=strategies.sampled_from(["quintic", "cubic", "muon"]), size=strategies.floats(-6, 30))
def test_matches_the_reference_anywhere(m, n, steps, name, size):
    x = normal(m, n) * 10**size
    (y, dx), (ey, edx) = of(newton_schulz, x, steps=steps, coefficients=name), truth(x, steps, name)
    close([y, dx * x.norm()], [ey, edx * x.norm()], 1e-7, floor=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 40), (40, 9), (8, 8)], ids=str)
def test_halves_are_computed_in_float32_and_rounded_once(shape, dtype):
    x = normal(*shape).to(dtype)
    y, dx = of(newton_schulz, x)
    wide_y, wide_dx = of(newton_schulz, x.float())
    assert torch.equal(y, wide_y.to(dtype)) and torch.equal(dx, wide_dx.to(dtype))


def test_runs_on_the_gram_matrix_are_as_good_as_the_head_of_the_kernel_says():
    """float32, the largest singular value of the error, where most digits go: singular values 1/i."""
    u, v = (torch.linalg.qr(normal(n, 128, seed=n)).Q for n in (128, 512))
    for spectrum in (torch.ones(128), 1 / torch.arange(1, 129)):
        x = (u * spectrum.double()) @ v.mT
        error = newton_schulz(x.float()).double() - ref.newton_schulz(x, triples(5, "muon"))
        assert torch.linalg.matrix_norm(error, 2) < 1e-3
    square = normal(128, 128)
    error = newton_schulz(square.float()).double() - ref.newton_schulz(square, triples(5, "muon"))
    assert torch.linalg.matrix_norm(error, 2) < 2e-5


def test_it_is_what_muon_does():
    x = normal(40, 100, dtype=torch.float32)
    theirs = _zeropower_via_newtonschulz(x, MUON, 5, 1e-7).float()
    close([newton_schulz(x)], [theirs], 5e-2)


def test_any_size_of_entries():
    """Also where squares leave the range of the dtype; what is shorter than eps stays short."""
    x = normal(6, 11)
    expected = newton_schulz(x)
    for size, dtype in ((1e200, torch.float64), (1e-200, torch.float64), (1e30, torch.float32), (1e-30, torch.float32)):
        close([newton_schulz((x * size).to(dtype), eps=1e-250)], [expected], 1e-5)
    assert newton_schulz(x * 1e-12).abs().max() < 3e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_matrix_that_is_not_finite_is_nan_and_no_other(dtype, bad):
    x = normal(3, 5, 8).to(dtype)
    expected = of(newton_schulz, x)
    x[1, 2, 3] = bad
    found = of(newton_schulz, x)
    for f, e in zip(found, expected, strict=True):
        assert f[1].isnan().all() and torch.equal(f[::2], e[::2])


def test_zeros_stay_zeros():
    x = torch.zeros(2, 3, 4, dtype=torch.float64)
    x[1] = normal(3, 4)
    y, dx = of(newton_schulz, x)
    assert not y[0].any() and torch.equal(y[1], newton_schulz(x[1])) and dx.isfinite().all()


def test_nothing():
    for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0)):
        x = torch.zeros(shape, requires_grad=True)
        y = newton_schulz(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape


def test_memory_of_any_order():
    x = normal(2, 24, 40)
    expected = of(newton_schulz, x)
    for other in (x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 0], x.repeat(1, 2, 2)[:, 24:, :40]):
        assert not other.is_contiguous()
        assert same(of(newton_schulz, other), expected)


# -------------------------------------------------------------------------------------------------- facts, coefficients


@pytest.mark.parametrize("name, steps", [("cubic", 30), ("quintic", 14), ("polar_express", 8)])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)], ids=str)
def test_it_goes_towards_the_orthogonal_factor(name, steps, shape):
    x = normal(*shape)
    close([newton_schulz(x, steps=steps, coefficients=name)], [ref.orthonormal(x)], 1e-9)


def test_muons_steps_come_near_one():
    """Singular values from 2e-3 up, of the length."""
    s = torch.logspace(math.log10(2e-3), 0, 400, dtype=torch.float64)
    for a, b, c in triples(5, "muon"):
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.68 and s.max() < 1.21


def best_quintic(low, high):
    """Of a s + b s³ + c s⁵ the nearest to 1 on [low, high], by Remez' exchange: its errors alternate at four points."""
    points, error, before = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high]), 0.0, 1.0
    while abs(error - before) > 1e-15:
        before = error
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], 1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        points[1:3] = np.sqrt((-3 * b + np.array([-1, 1]) * math.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return np.array([a, b, c])


def test_polar_express_is_the_best_of_each_step():
    """arXiv 2505.16932, from [1e-3, 1] on; with its cushion: no step is for less than .024 of the interval."""
    low, high, cushion = 1e-3, 1.0, 0.02407327424182761
    for triple in COEFFICIENTS["polar_express"]:
        if low / high > 1 - 5e-6:
            best = np.array(COEFFICIENTS["quintic"][0])
        else:
            best = best_quintic(max(low, cushion * high), high)
        if low < cushion * high:  # what it leaves is to lie around 1 all the same
            best = best * 2 / sum(best @ [s, s**3, s**5] for s in (low, high))
        np.testing.assert_allclose(triple, best, rtol=1e-8)
        low = best @ [low, low**3, low**5]
        high = 2 - low


def test_coefficients_by_hand():
    x = normal(6, 9)
    assert torch.equal(newton_schulz(x), newton_schulz(x, coefficients=MUON))
    assert torch.equal(newton_schulz(x), newton_schulz(x, coefficients=[list(MUON)] * 5))
    each = [(2, -1.5, 0.5), (1.5, -0.5, 0)]
    close([newton_schulz(x, steps=4, coefficients=each)],
          [ref.newton_schulz(x, [each[0], each[1], each[1], each[1]])], 1e-12)
    assert torch.equal(newton_schulz(x, steps=1, coefficients=each), newton_schulz(x, steps=1, coefficients=each[0]))


# --------------------------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 3)], ids=str)
@pytest.mark.parametrize("steps, name", [(3, "muon"), (2, "polar_express")])
def test_derivatives(shape, steps, name):
    x = normal(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, steps=steps, coefficients=name), x)
    assert torch.autograd.gradgradcheck(lambda x: newton_schulz(x, steps=steps, coefficients=name), x)
    short = (1e-3 * normal(*shape)).requires_grad_()  # below eps the length is a constant
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, steps=2, eps=1.0), short)


def test_torch_func_takes_the_plain_formula():
    x, v, dy = normal(3, 6, 9), normal(6, 9, seed=1), normal(6, 9, seed=5).bfloat16().double()
    y, dx = of(newton_schulz, x[0])

    def weighted(x):
        return (newton_schulz(x) * dy).sum()

    close([torch.func.grad(weighted)(x[0])], [dx], 1e-10)
    close(torch.func.jvp(weighted, (x[0],), (v,)), ((y * dy).sum(), (dx * v).sum()), 1e-10)
    close([torch.vmap(newton_schulz)(x)], [newton_schulz(x)], 1e-11)
    x[1] = 0
    each = torch.vmap(torch.func.grad(weighted))(x)
    close(list(each[::2]), [of(newton_schulz, t)[1] for t in x[::2]], 1e-10)
    assert each[1].isfinite().all()


@pytest.mark.parametrize("shape, dtype", [((2, 4, 7), torch.float64), ((1, 5, 3), torch.bfloat16)], ids=str)
def test_opcheck(shape, dtype):
    x, flat = normal(*shape).to(dtype), check_steps("", 2, "muon")
    torch.library.opcheck(OP, (x.clone().requires_grad_(), flat, 1e-7))
    torch.library.opcheck(BACKWARD, (x.clone(), x.clone().requires_grad_(), flat, 1e-7))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: newton_schulz(x, steps=4), fullgraph=True, dynamic=dynamic)
    for m, n in ((6, 9), (12, 7)):
        x = normal(2, m, n)
        close(of(compiled, x), of(newton_schulz, x, steps=4), 1e-12)


def test_meta_and_autocast():
    assert newton_schulz(torch.empty(3, 4, 5, device="meta")).shape == (3, 4, 5)
    x = normal(2, 40, 12, dtype=torch.float32)
    expected = of(newton_schulz, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(of(newton_schulz, x), expected)
        assert newton_schulz(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(300, 700), (5, 40, 60), (520, 520), (17, 30, 30)], ids=str)
def test_same_bits_for_any_number_of_threads(shape):
    x = normal(*shape, dtype=torch.float32)
    results = [of(newton_schulz, x, steps=2) for _ in threads(1, 2, 3, 16)]
    assert all(same(results[0], r) for r in results[1:])


# ----------------------------------------------------------------------------------------------------------- bad input

X = torch.randn(4, 6)


@pytest.mark.parametrize("x, options, error, words", [
    ([1.0], {}, TypeError, "x must be a tensor, got list"),
    (X.long(), {}, TypeError, "x must be float32, .* got torch.int64"),
    (X[0], {}, ValueError, r"x must be \(..., m, n\), got \(6,\)"),
    (X, {"steps": 0}, ValueError, "steps must be >= 1, got 0"),
    (X, {"steps": 101}, ValueError, "steps must be <= 100, got 101"),
    (X, {"steps": 2.5}, TypeError, "steps must be an int, got float 2.5"),
    (X, {"coefficients": "newton"}, ValueError, "coefficients must be one of muon, cubic, .*, got 'newton'"),
    (X, {"coefficients": 3.0}, TypeError, "coefficients must be a name, three numbers or several triples, got float"),
    (X, {"coefficients": ()}, ValueError, r"three numbers or several triples, got tuple \(\)"),
    (X, {"coefficients": (1, 2)}, ValueError, r"three numbers or several triples, got tuple \(1, 2\)"),
    (X, {"coefficients": [(1, 2, 3), (1, 2)]}, ValueError, "three numbers or several triples, got list"),
    (X, {"coefficients": (1, 2, math.nan)}, ValueError, "coefficients must be finite numbers, got nan"),
    (X, {"coefficients": (1, 2, "3")}, TypeError, "coefficients must be finite numbers, got str '3'"),
    (X, {"eps": 0}, ValueError, "eps must be positive and from 1e-300 to 1e300, got 0"),
    (X, {"eps": math.inf}, ValueError, "eps must be positive and from 1e-300 to 1e300, got inf"),
])
def test_bad_input_is_named(x, options, error, words):
    with pytest.raises(error, match=words) as caught:
        newton_schulz(x, **options)
    assert str(caught.value).startswith("newton_schulz: ")


@only_cpu
def test_the_op_itself_checks_too():
    """Whoever calls torch.ops directly gets an error, never a crash."""
    x, flat = X[None], [1.5, -0.5, 0.0]
    assert OP(x, flat, 1e-7).shape == x.shape
    for bad in ((X, flat, 1e-7), (x.long(), flat, 1e-7), (x, [], 1e-7), (x, flat[:2], 1e-7), (x, flat * 101, 1e-7),
                (x, [1.0, math.nan, 0.0], 1e-7), (x, flat, 0.0), (x, flat, math.nan)):
        with pytest.raises(RuntimeError, match="newton_schulz: "):
            OP(*bad)
    for bad in ((x.double(), x, flat, 1e-7), (X, x, flat, 1e-7), (x[..., :5], x, flat, 1e-7), (x, x, [1.0], 1e-7)):
        with pytest.raises(RuntimeError, match="newton_schulz_backward: |newton_schulz: "):
            BACKWARD(*bad)
