"""Fastfood: values to the bit, what is drawn, lengths, the adjoint, derivatives, torch's habits, bad input."""

import math

import pytest
import reference
import torch
from helpers import close, normal, threads
from kernels import only_cpu

from torch_subspace.lowrank import fastfood, fastfood_adjoint
from torch_subspace.lowrank.fastfood import _philox, draws, plain, plain_adjoint

OP, ADJOINT = torch.ops.torch_subspace.fastfood, torch.ops.torch_subspace.fastfood_adjoint
CPU = torch.device("cpu")
WIDE = [torch.float32, torch.float64]
SIZES = [(1, 1), (1, 2), (2, 1), (3, 2), (2, 7), (5, 100), (100, 5), (30, 300), (300, 30), (64, 64), (129, 600)]


def matrix(size, d, seed):
    length = 1 << (max(size, d) - 1).bit_length()
    return reference.fastfood(*draws(d, length, seed, CPU), size)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("d, size", SIZES)
def test_matches_the_reference(d, size, dtype, tolerance):
    theta, x, p = normal(3, d).to(dtype), normal(3, size, seed=1).to(dtype), matrix(size, d, 7)
    found, back = fastfood(theta, size, seed=7), fastfood_adjoint(x, d, seed=7)
    assert found.dtype == back.dtype == dtype
    close(found, theta.double() @ p.mT, tolerance)
    close(back, x.double() @ p, tolerance)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("v, d, size", [(3, 5, 300), (2, 300, 5), (1, 1000, 40000), (1, 40000, 3), (40, 700, 1024),
                                        (1, 3, 1 << 18), (300, 17, 70)])
def test_bits_are_those_of_the_formula(v, d, size, dtype):
    """With whole transforms, without what the kernels leave out or fold."""
    theta, x = normal(v, d, dtype=dtype), normal(v, size, seed=1, dtype=dtype)
    assert torch.equal(fastfood(theta, size, seed=3), plain(theta, size, 3))
    assert torch.equal(fastfood_adjoint(x, d, seed=3), plain_adjoint(x, d, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d, size", [(5, 300), (300, 5), (8, 8)])
def test_halves_are_rounded_once(d, size, dtype):
    theta, x = normal(4, d).to(dtype), normal(4, size).to(dtype)
    assert torch.equal(fastfood(theta, size, seed=1), fastfood(theta.float(), size, seed=1).to(dtype))
    assert torch.equal(fastfood_adjoint(x, d, seed=1), fastfood_adjoint(x.float(), d, seed=1).to(dtype))


def test_values_are_those_of_every_version():
    """A saved seed means the same matrix for good."""
    theta, x = torch.tensor([1.0, -2.0, 0.5]), torch.arange(6.0) - 2
    for found, pinned in (
        (fastfood(theta, 5, seed=11),
         ["-0x1.c254a8p+0", "-0x1.d4ca1cp-1", "-0x1.0719c2p+0", "0x1.123b96p+0", "0x1.917e24p-1"]),
        (fastfood(theta.double(), 1000, seed=2**63 - 1)[[0, 500, 999]],
         ["-0x1.ec6f25a0a0ceap-9", "-0x1.eefed31ef0fe2p-7", "-0x1.1a989e0a4e028p-14"]),
        (fastfood_adjoint(x, 3, seed=0), ["0x1.86d452p-2", "0x1.16028p+1", "0x1.c3ee0ep-1"]),
    ):
        assert found.tolist() == [float.fromhex(value) for value in pinned]


def test_any_dimensions_and_memory():
    theta = normal(2, 3, 20)
    expected = fastfood(theta.view(6, 20), 33, seed=5).view(2, 3, 33)
    assert torch.equal(fastfood(theta, 33, seed=5), expected)
    assert torch.equal(fastfood(theta[1, 2], 33, seed=5), expected[1, 2])
    for other in (theta.mT.contiguous().mT, torch.stack([theta, theta], -1)[..., 0]):
        assert not other.is_contiguous()
        assert torch.equal(fastfood(other, 33, seed=5), expected)
        assert torch.equal(fastfood_adjoint(other, 7, seed=5), fastfood_adjoint(theta, 7, seed=5))
    nothing = torch.zeros(0, 4, requires_grad=True)
    fastfood(nothing, 9, seed=0).sum().backward()
    assert nothing.grad.shape == (0, 4) and fastfood_adjoint(nothing, 3, seed=0).shape == (0, 3)
    assert fastfood(torch.empty(2, 4, device="meta"), 9, seed=0).shape == (2, 9)


def test_not_a_number_stays_in_its_row():
    theta = normal(3, 10)
    theta[1, 4] = math.inf
    found = fastfood(theta, 50, seed=0)
    assert not found[1].isfinite().any() and found[::2].isfinite().all()


# ----------------------------------------------------------------------------------------------------------- its facts


@pytest.mark.parametrize("d, size", [(40, 64), (64, 64), (1, 1), (1, 1024)])
def test_columns_have_length_one_where_no_row_is_left_out(d, size):
    columns = fastfood(torch.eye(d, dtype=torch.float64), size, seed=4)
    close(columns.norm(dim=1), torch.ones(d), 1e-12)


@pytest.mark.parametrize("d, size", [(3, 33), (20, 100), (50, 5)])
def test_lengths_are_kept_on_average(d, size):
    """Of a column, and of any vector: its squared length, over many seeds, to five of its standard errors."""
    theta = normal(2, d)
    theta[0] = torch.eye(d, dtype=torch.float64)[d // 2]
    squares = torch.stack([fastfood(theta, size, seed=seed).square().sum(1) for seed in range(600)])
    expected, spread = theta.square().sum(1), squares.std(0) / math.sqrt(600)
    assert ((squares.mean(0) - expected).abs() < 5 * spread).all()
    assert (squares.std(0) / expected < 4 * math.sqrt(2 / size)).all()


def test_entries_are_nearly_normal():
    entries = fastfood(torch.eye(8, dtype=torch.float64), 5000, seed=1) * math.sqrt(5000)
    assert abs(entries.mean()) < 0.03 and abs(entries.var() - 1) < 0.04
    assert abs(entries.pow(4).mean() / entries.var() ** 2 - 3) < 0.15
    close(entries @ entries.mT / 5000, torch.eye(8), 0.08, absolute=True)


def test_the_adjoint_is_exact():
    theta, x = normal(30), normal(700)
    close(fastfood(theta, 700, seed=9) @ x, theta @ fastfood_adjoint(x, 30, seed=9), 1e-12)


def test_seeds_differ():
    theta = normal(8)
    results = [fastfood(theta, 64, seed=seed) for seed in (0, 1, 2**32, 2**32 + 1, 2**63 - 1)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(results[1], fastfood(theta, 64, seed=1))
    state = torch.get_rng_state()
    fastfood(theta, 64, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- what is drawn


def test_words_are_philox_as_random123_has_it():
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(word) for word in _philox(0, torch.zeros(1, dtype=torch.int64), 0)] == known


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
def test_normal_numbers_are_normal(seed):
    """By Kolmogorov and Smirnov's distance, moments, and what follows one another."""
    n = 1 << 18
    signs, _, g = draws(n, n, seed, CPU)
    g = g.double()
    exact = torch.special.ndtr(g.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert max((steps[1:] - exact).max(), (exact - steps[:-1]).max()) * math.sqrt(n) < 1.8  # p = 0.003
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(g.pow(power).mean() - moment) < 4 * math.sqrt(variance / n)
    for lag in (1, 2, 3, 4, 256):
        assert abs((g[lag:] * g[:-lag]).mean()) < 4 / math.sqrt(n)
        assert abs((signs[lag:] * signs[:-lag]).mean()) < 4 / math.sqrt(n)
    assert abs(signs.mean()) < 4 / math.sqrt(n) and set(signs.unique().tolist()) == {-1.0, 1.0}
    assert (g != 0).all() and torch.equal(g * 2**18, (g * 2**18).round())


@pytest.mark.parametrize("bits", [0, 1, 5, 12])
def test_orders_are_permutations(bits):
    """Uniform ones, which tests/native asks."""
    orders = torch.stack([draws(1, 1 << bits, seed, CPU)[1] for seed in (0, 1, 2**50)])
    assert torch.equal(orders.sort(1).values, torch.arange(1 << bits).expand(3, -1))
    assert bits < 2 or len({tuple(order) for order in orders.tolist()}) == 3


# --------------------------------------------------------------------------------------------------- torch's habits


@pytest.mark.parametrize("d, size", [(3, 5), (5, 3), (1, 1), (4, 8)])
def test_derivatives(d, size):
    theta, x = normal(2, d).requires_grad_(), normal(2, size).requires_grad_()
    for check, power in ((torch.autograd.gradcheck, 1), (torch.autograd.gradgradcheck, 3)):
        assert check(lambda t, power=power: fastfood(t, size, seed=2).pow(power), theta)
        assert check(lambda t, power=power: fastfood_adjoint(t, d, seed=2).pow(power), x)


def test_nothing_is_saved_for_the_backward():
    theta, saved = torch.randn(4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = fastfood(theta, 64, seed=0)
    assert not saved
    (dtheta,) = torch.autograd.grad(y, theta, torch.ones_like(y))
    assert torch.equal(dtheta, fastfood_adjoint(torch.ones(64), 4, seed=0))


def test_torch_func_takes_the_plain_formula():
    theta, v = normal(2, 3, 6)
    call = lambda t: fastfood(t, 20, seed=1)  # noqa: E731
    back = lambda t: fastfood_adjoint(t, 6, seed=1)  # noqa: E731
    close(torch.func.grad(lambda t: call(t).pow(2).sum())(theta), 2 * back(call(theta)), 1e-12)
    value, tangent = torch.func.jvp(call, (theta,), (v,))
    assert torch.equal(value, call(theta)) and torch.equal(tangent, call(v))
    assert torch.equal(torch.vmap(call)(theta), call(theta))
    assert torch.equal(torch.vmap(back)(value), back(value))
    assert torch.equal(torch.func.jvp(back, (value,), (tangent,))[1], back(tangent))


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v, d, size", [(2, 5, 12), (1, 12, 5), (0, 3, 4)])
def test_opcheck(v, d, size, dtype):
    torch.library.opcheck(OP, (normal(v, d).to(dtype).requires_grad_(), size, 3))
    torch.library.opcheck(ADJOINT, (normal(v, size).to(dtype).requires_grad_(), d, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda t, x: fastfood(t, x.shape[0], seed=5) * x, fullgraph=True, dynamic=dynamic)
    for d, size in ((7, 30), (9, 50)):
        x = normal(size, seed=1, dtype=torch.float32)
        a = normal(d, dtype=torch.float32).requires_grad_()
        b = a.detach().clone().requires_grad_()
        found, expected = compiled(a, x), fastfood(b, size, seed=5) * x
        close(found.detach(), expected.detach(), 1e-6)
        found.sum().backward(), expected.sum().backward()
        close(a.grad, b.grad, 1e-6)


def test_autocast_changes_nothing():
    theta = normal(3, 10, dtype=torch.float32)
    expected = fastfood(theta, 40, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastfood(theta, 40, seed=0), expected)
        assert fastfood_adjoint(theta.half(), 4, seed=0).dtype == torch.float16


@pytest.mark.parametrize("v, d, size, dtype", [(1, 100, 150000, torch.float32), (3, 40000, 500, torch.float64),
                                               (50, 300, 4096, torch.bfloat16)])
def test_same_bits_for_any_number_of_threads(v, d, size, dtype):
    theta, x = normal(v, d).to(dtype), normal(v, size).to(dtype)
    results = [(fastfood(theta, size, seed=1), fastfood_adjoint(x, d, seed=1)) for _ in threads(1, 2, 3, 16)]
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


def test_it_trains():
    """A least-squares problem of 400 unknowns in 60 dimensions, solved as well as its subspace allows."""
    p = fastfood(torch.eye(60, dtype=torch.float64), 400, seed=1).mT
    target = p @ normal(60)
    theta = torch.zeros(60, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (fastfood(theta, 400, seed=1) - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure() < 1e-8


# ---------------------------------------------------------------------------------------------------------- bad input

X = torch.randn(6)


@pytest.mark.parametrize("function", [fastfood, fastfood_adjoint], ids=["fastfood", "fastfood_adjoint"])
@pytest.mark.parametrize("x, size, seed, error, words", [
    ([1.0], 3, 0, TypeError, "must be a tensor, got list"),
    (X.long(), 3, 0, TypeError, "must be float32, .* got torch.int64"),
    (X[:0], 3, 0, ValueError, r"must be \(..., n\) with n from 1 to 2\^26, got \(0,\)"),
    (X[0], 3, 0, ValueError, r"got \(\)"),
    (X[:1].expand((1 << 26) + 1), 3, 0, ValueError, r"got \(67108865,\)"),
    (X, 0, 0, ValueError, "size must be >= 1, got 0"),
    (X, 2.5, 0, TypeError, "size must be an int, got float 2.5"),
    (X, (1 << 26) + 1, 0, ValueError, r"size must be <= 2\^26, got 67108865"),
    (X, 3, -1, ValueError, "seed must be >= 0, got -1"),
    (X, 3, 2**63, ValueError, "seed is too large"),
    (X, 3, None, TypeError, "seed must be an int, got None"),
])
def test_bad_input_is_named(function, x, size, seed, error, words):
    with pytest.raises(error, match=words) as caught:
        function(x, size, seed=seed)
    assert str(caught.value).startswith(f"{function.__name__}: ")


@only_cpu
def test_the_op_itself_checks_too():
    for op in (OP, ADJOINT):
        row = X[None]
        for bad in ((X, 3, 0), (row[:, :0], 3, 0), (row, 0, 0), (row, (1 << 26) + 1, 0), (row.long(), 3, 0)):
            with pytest.raises(RuntimeError, match="fastfood"):
                op(*bad)
