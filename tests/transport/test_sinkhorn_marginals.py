"""Sinkhorn where a marginal has zeros, and where a signal comes while it sweeps."""

import math
import os
import signal
import threading
import time

import pytest
import reference as ref
import torch
from helpers import close, normal
from sinkhorn_cases import TIGHT, affinity, each_dtype, problem

from torch_subspace import sinkhorn

only_main_thread = pytest.mark.skipif(threading.current_thread() is not threading.main_thread(),
                                      reason="signals are for the main thread")


def emptied(m, n, rows, columns, dtype=torch.float64):
    """Scores, marginals with zeros there and equal sums, and a weight for each entry of the plan."""
    scores, row, col = problem(m, n, dtype)
    row[rows], col[columns] = 0, 0
    col *= row.sum() / col.sum()
    return *(t.requires_grad_() for t in (scores, row, col)), normal(m, n, seed=3, dtype=dtype)


def of_the_rest(scores, row, col, weight, eta):
    """Plan and gradients of the rows and columns that have mass, in the whole's shape."""
    scores, row, col = (t.detach().double().requires_grad_() for t in (scores, row, col))
    i, j = row > 0, col > 0
    plan = torch.zeros_like(scores)
    plan[i[:, None] & j] = ref.sinkhorn(scores[i][:, j], eta=eta, row=row[i], col=col[j], sweeps=400).flatten()
    return plan, torch.autograd.grad((plan * weight.double()).sum(), (scores, row, col))


@each_dtype
@pytest.mark.parametrize("m, n, rows, columns",
                         [(5, 7, [1], []), (7, 5, [1, 3], [0, 4]), (6, 6, [2], [2]), (3, 3, [2], [])])
def test_rows_and_columns_without_mass(m, n, rows, columns, dtype):
    scores, row, col, weight = emptied(m, n, rows, columns, dtype)
    plan = sinkhorn(scores, eta=0.3, row=row, col=col, tol=TIGHT[dtype], max_iter=2000)
    dscores, drow, dcol = torch.autograd.grad((plan * weight).sum(), (scores, row, col))
    expected, (es, er, ec) = of_the_rest(scores, row, col, weight, 0.3)
    assert not plan[rows].any() and not plan[:, columns].any()
    assert not dscores[rows].any() and not dscores[:, columns].any()
    close((plan, dscores), (expected, es), 20 * TIGHT[dtype])
    # the marginals' gradients, which are defined up to a shift of one against the other
    i, j = row > 0, col > 0
    shift = (drow[i].double() - er[i]).mean()
    close((drow[i] - shift, dcol[j] + shift), (er[i], ec[j]), 20 * TIGHT[dtype], floor=1.0)


@each_dtype
def test_the_gradient_of_a_zero_is_that_from_above(dtype):
    """A little of a row that had nothing, and of a column: the plan's change by finite differences."""
    scores, row, col, weight = emptied(8, 11, [1, 4], [], dtype)
    plan = sinkhorn(scores, eta=0.1, row=row, col=col, tol=TIGHT[dtype], max_iter=2000)
    drow, dcol = torch.autograd.grad((plan * weight).sum(), (row, col))
    scores, row, col, weight = (t.detach().double() for t in (scores, row, col, weight))
    col, more = col * (row.sum() / col.sum()), 1e-7 * (torch.arange(8) == 1)
    row_more, col_more = row + more, col + more.sum() * (torch.arange(11) == 5)
    values = [(sinkhorn(scores, eta=0.1, row=r, col=c, tol=1e-14, max_iter=9000) * weight).sum()
              for r, c in ((row, col), (row_more, col_more))]
    assert abs((values[1] - values[0]) / 1e-7 - (drow[1] + dcol[5])) < 1e-4


def test_zeros_in_symmetric_batched_half_and_cpp_plans():
    scores, keep = affinity(9), (torch.arange(9) != 4)
    mass = keep.double()
    for options in ({}, {"symmetric": True}, {"symmetric": False}):
        plan = sinkhorn(scores, row=mass, col=mass, tol=1e-12, max_iter=3000, **options)
        small = sinkhorn(scores[keep][:, keep], tol=1e-12, max_iter=3000, **options)
        close(plan[keep][:, keep], small, 1e-10)
        assert not plan[4].any() and not plan[:, 4].any()
    both = torch.stack([mass, torch.ones(9, dtype=torch.float64)])
    plans = sinkhorn(scores.expand(2, 9, 9), row=both, col=both, tol=1e-12, max_iter=3000)
    close(plans[0], sinkhorn(scores, row=mass, col=mass, tol=1e-12, max_iter=3000), 1e-10)
    close(plans[1], sinkhorn(scores, tol=1e-12, max_iter=3000), 1e-10)
    assert sinkhorn(scores.half(), row=mass.half(), col=mass.half()).dtype == torch.float32
    plan = sinkhorn(scores, row=mass, col=mass, mode="cpp")
    close(plan.sum(1), mass, 1e-12)
    assert not plan[4].any() and not plan[:, 4].any()


def test_the_symmetric_gradient_of_a_zero():
    scores, weight = affinity(7), normal(7, 7, seed=2)
    mass = torch.tensor([1.0, 0.5, 0, 2, 0.3, 0, 1], dtype=torch.float64, requires_grad=True)

    def loss(mass, symmetric):
        return (sinkhorn(scores, row=mass, col=mass, symmetric=symmetric, tol=1e-13, max_iter=5000) * weight).sum()

    general, = torch.autograd.grad(loss(mass, False), mass)
    close(torch.autograd.grad(loss(mass, True), mass), (general,), 1e-9)


def test_padding_may_be_masked_besides():
    """A smaller problem in a larger frame: marginals of 0, scores of -inf or anything else."""
    scores, row, col, weight = emptied(6, 8, [4, 5], [6, 7])
    expected, (es, _, _) = of_the_rest(scores, row, col, weight, 0.2)
    for fill in (-math.inf, 7.0):
        padded = scores.detach().clone()
        padded[4:], padded[:, 6:] = fill, fill
        padded.requires_grad_()
        plan = sinkhorn(padded, eta=0.2, row=row, col=col, tol=1e-13, max_iter=2000)
        close((plan, *torch.autograd.grad((plan * weight).sum(), padded)), (expected, es), 1e-10)


def test_zeros_under_compile_and_torch_func():
    scores, row, col, weight = emptied(5, 7, [1], [3])

    def loss(scores, row, col):
        return (sinkhorn(scores, eta=0.5, row=row, col=col, tol=1e-12, max_iter=100) * weight).sum()

    expected = torch.autograd.grad(loss(scores, row, col), (scores, row, col))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(scores, row, col)
    close(torch.autograd.grad(compiled, (scores, row, col)), expected, 1e-10)
    dscores = torch.func.grad(loss)(scores.detach(), row.detach(), col.detach())
    close(dscores, expected[0], 1e-10)


@pytest.mark.parametrize("arguments, error, words", [
    ({"row": torch.tensor([1.0, -0.5, 2.5])}, ValueError,
     "row must be positive and finite, or 0 but not everywhere, got entries in .-0.5, 2.5"),
    ({"row": torch.tensor([1.0, math.nan, 2.0])}, ValueError, "row must be positive"),
    ({"row": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "equal sums"),
    ({"row": torch.zeros(3), "col": torch.zeros(3)}, ValueError, "row must be positive"),
    ({"tol": math.nan}, ValueError, "tol must be a number of at least 0, got nan"),
    ({"tol": "tight"}, TypeError, "tol must be a number of at least 0, got str .tight"),
    ({"eta": None}, TypeError, "eta must be a positive finite number, got None"),
    ({"max_iter": math.inf}, ValueError, "max_iter must be an int of at least 0, got inf"),
    ({"max_iter": math.nan}, ValueError, "max_iter must be"),
    ({"max_iter": [3]}, TypeError, "max_iter must be a number, an int of at least 0, got list"),
])
def test_what_is_no_marginal_and_no_number_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        sinkhorn(torch.rand(3, 3), **arguments)


class Stopped(Exception):
    pass


def stop(*_):
    raise Stopped


@only_main_thread
@pytest.mark.parametrize("shape, options", [((40, 40), {}), ((6, 30, 30), {}), ((2, 300, 300), {"symmetric": True})])
def test_a_signal_is_heard_whatever_max_iter_is(shape, options):
    """And its handler's own exception comes out; a handler that returns changes nothing."""
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    scores = (scores + scores.mT) / 2
    heard = []
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        start = time.monotonic()
        with pytest.raises(Stopped):
            sinkhorn(scores, eta=0.02, tol=0, max_iter=10**12, **options)
        assert time.monotonic() - start < 1.0
        timer.join()
        signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        sweeps = 200_000 // scores[..., 0, 0].numel() // (scores.shape[-1] // 30) ** 2
        with pytest.warns(RuntimeWarning, match="sweeps a row"):
            heard_plan = sinkhorn(scores, eta=0.02, tol=0, max_iter=sweeps, **options)
        timer.join()
        with pytest.warns(RuntimeWarning, match="sweeps a row"):
            assert torch.equal(sinkhorn(scores, eta=0.02, tol=0, max_iter=sweeps, **options), heard_plan)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)
