"""The range finder: an orthonormal basis whatever the matrix is, nearly as good as singular vectors."""

import math

import pytest
import torch
from helpers import close, frame_error, normal, same

from torch_subspace.lowrank import cosine_columns, range_finder
from torch_subspace.lowrank.range_finder import cholesky_qr, orthonormal

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}


def decaying(m, n, seed=0):
    """Columns that become shorter as j^-1/2."""
    return normal(m, n, seed=seed) * torch.arange(1, n + 1) ** -0.5


def error(g, q):
    return ((g - g @ q @ q.mT).norm() / g.norm()).item()


def least(g, rank):
    values = torch.linalg.svdvals(g).square()
    return (values[rank:].sum() / values.sum()).sqrt().item()


MATRICES = {
    "zeros": lambda: torch.zeros(20, 30), "of rank 1": lambda: torch.ones(20, 30), "few rows": lambda: normal(3, 30),
    "of rank 3": lambda: normal(40, 3) @ normal(3, 30, seed=1), "tiny": lambda: normal(40, 30) * 1e-30,
    "huge": lambda: normal(40, 30) * 1e30, "one row": lambda: normal(1, 30), "a spike": lambda: torch.eye(30) * 1e12,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_orthonormal_whatever_the_matrix(kind, dtype):
    g = MATRICES[kind]().to(dtype)
    for rank in (1, 4, 30):
        for power in (1, 3):
            q = range_finder(g, rank, seed=0, power=power)
            assert q.dtype == dtype and q.shape == (30, rank)
            assert frame_error(q.mT) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_matrix_of_low_rank_is_found(dtype):
    for seed in range(3):
        g = (normal(50, 5, seed=seed) @ normal(5, 40, seed=seed + 9)).to(dtype)
        for rank in (5, 8):
            assert error(g, range_finder(g, rank, seed=seed)) < 20 * TOLERANCE[dtype]
        assert error(g.mT, range_finder(g.mT, 5, seed=seed)) < 20 * TOLERANCE[dtype]


@pytest.mark.parametrize("n", [256, 512])
def test_the_error_is_near_that_of_singular_vectors(n):
    """At an eighth of the columns: a tenth above the least with one power, half of that with two; cosines twice."""
    for seed in range(2):
        g, rank = decaying(n, n, seed), n // 8
        best, once, twice = least(g, rank), *(error(g, range_finder(g, rank, power=p, seed=seed)) for p in (1, 2))
        cosine = math.sqrt(1 - (cosine_columns(g, rank)[0].norm() / g.norm()) ** 2)
        assert best < twice < 1 + 0.7 * (once - 1) < 1 < 1.15 * best / once + 0.05
        assert once < 1.13 * best and twice < 1.07 * best and cosine > 1.6 * best


def test_the_more_power_the_nearer():
    g = decaying(60, 80)
    errors = [error(g, range_finder(g, 10, power=p, seed=1)) for p in (1, 2, 4, 12)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1.003 * least(g, 10)


def test_seeds_and_generators():
    g = normal(9, 12)
    first, again, other = (range_finder(g, 3, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = [range_finder(g, 3, seed=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert same(*zip(drawn))
    generator = torch.Generator().manual_seed(7)
    assert not torch.equal(range_finder(g, 3, seed=generator), range_finder(g, 3, seed=generator))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    range_finder(g, 3, seed=7), range_finder(g, 3, seed=generator)
    assert torch.equal(torch.get_rng_state(), state)
    found = range_finder(g, 3)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(range_finder(g, 3), found)
    close(range_finder(g.float(), 3, seed=7), first, 1e-4)


def test_a_batch_is_its_matrices():
    g = normal(2, 3, 9, 12)
    q = range_finder(g, 4, seed=1)
    assert q.shape == (2, 3, 12, 4)
    close(q[1, 2], range_finder(g[1, 2], 4, seed=1), 1e-12)
    assert range_finder(g[:0], 4, seed=1).shape == (0, 3, 12, 4)
    g[0, 1, 2, 3], g[1, 1, 0, 0] = math.nan, math.inf
    broken = range_finder(g, 4, seed=1)
    assert broken[0, 1].isnan().all() and broken[1, 1].isnan().all()
    close([broken[0, ::2], broken[1, ::2]], [q[0, ::2], q[1, ::2]], 1e-12)


@pytest.mark.parametrize("power", [1, 2])
def test_derivatives(power):
    g = normal(2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: range_finder(g, 2, seed=0, power=power), g)
    g = g.detach()[0].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda g: range_finder(g, 2, seed=0, power=power), g)
    close([torch.func.grad(lambda g: range_finder(g, 2, seed=0).pow(3).sum())(g.detach())],
          torch.autograd.grad(range_finder(g, 2, seed=0).pow(3).sum(), g), 1e-12)


def test_a_gradient_of_a_matrix_of_zeros_is_finite():
    g = torch.zeros(6, 5, requires_grad=True)
    (dg,) = torch.autograd.grad(range_finder(g, 2, seed=0).sum(), g)
    assert dg.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_and_autocast(dtype):
    g = normal(20, 30).to(dtype)
    wide = range_finder(g.float(), 4, seed=0)
    assert wide.dtype == torch.float32 and torch.equal(range_finder(g, 4, seed=0), wide)
    leaf = g.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = range_finder(leaf, 4, seed=0)
        (dg,) = torch.autograd.grad(found.sum(), leaf)
    assert torch.equal(found, wide) and dg.dtype == dtype


@pytest.mark.parametrize("condition", [0, 4, 8, 12])
def test_both_factorisations_are_one(condition):
    """Reflections, for a CPU, and Cholesky-QR, for a GPU, at condition numbers up to 1e12; a square of noise too."""
    for n, r in ((30, 30), (200, 32)):
        u, v = torch.linalg.qr(normal(n, r)).Q, torch.linalg.qr(normal(r, r, seed=1)).Q
        y = u * torch.logspace(0, -condition, r, dtype=torch.float64) @ v
        q = cholesky_qr(torch.stack((y, normal(n, r, seed=2))))
        assert frame_error(q.mT) < 1e-14
        close(q[0], orthonormal(y), 1e-15 * 10**condition + 1e-13)
    y = normal(40, 6).requires_grad_()
    gradients = [torch.autograd.grad(orth(y).pow(3).sum(), y) for orth in (cholesky_qr, orthonormal)]
    close(*gradients, 1e-11)


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()

    def found(g):
        return range_finder(g, 3, seed=5, power=2)

    compiled, results = torch.compile(found, fullgraph=True, backend="aot_eager"), []
    for function in (compiled, found):
        g = normal(8, 12, dtype=torch.float32).requires_grad_()
        q = function(g)
        results.append([q.detach(), *torch.autograd.grad(q.pow(3).sum(), g)])
    close(*results, 1e-5)


X = torch.randn(5, 3)


@pytest.mark.parametrize("make, error, words", [
    (lambda: range_finder(X, 4), ValueError, "range_finder: rank must be at most g's 3 columns, got 4"),
    (lambda: range_finder(X, 0), ValueError, "range_finder: rank must be >= 1, got 0"),
    (lambda: range_finder(X[0], 1), ValueError, r"g must be \(..., m, n\) with m > 0 and n > 0, got \(3,\)"),
    (lambda: range_finder(X, 2, power=0), ValueError, "power must be >= 1, got 0"),
    (lambda: range_finder(X, 2, seed=-1), ValueError, "seed must be >= 0, got -1"),
    (lambda: range_finder(X, 2, seed="1"), TypeError, "seed must be an int, a torch.Generator or None, got str '1'"),
])
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
