"""Matrix products of the optimisers: against float64, through our library and through torch alike."""

import itertools

import helpers
import pytest
import torch
from helpers import normal
from torch.utils.flop_counter import FlopCounterMode

import torch_subspace as ts
from torch_subspace.lowrank import product as module
from torch_subspace.lowrank.product import add_product_, product

OP = torch.ops.torch_subspace.product_
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}
SIZES = [(1, 1, 1, 1), (1, 700, 5, 33), (3, 65, 130, 7), (2, 1, 9, 300), (1, 1025, 16, 64), (1, 128, 128, 3000)]
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


class Taken:
    """Which way products go: whether `ours`, and how many have gone that way."""

    def __init__(self, ours, monkeypatch):
        self.ours, self.count, into = ours, 0, module._into
        monkeypatch.setattr(module, "outruns_torch", lambda: ours)
        monkeypatch.setattr(module, "WORTH", 0)
        monkeypatch.setattr(module, "PANEL", 0)

        def counted(*given):
            self.count += 1
            into(*given)

        monkeypatch.setattr(module, "_into", counted)

    def more(self, function):
        """Of these calls."""
        before = self.count
        function()
        return self.count - before


@pytest.fixture(params=[True, False], ids=["by our library", "by torch"])
def outruns(request, monkeypatch):
    """Whichever this processor would take."""
    return Taken(request.param, monkeypatch)


def close(found, truth, sizes, dtype):
    """Up to rounding of a sum of so many."""
    v, m, n, k = sizes
    assert found.shape == truth.shape and found.dtype == dtype
    assert torch.all((found.double() - truth).abs() <= TOLERANCE[dtype] * (k + 10) ** 0.5 * 5)


def operands(sizes, dtype, transa=False, transb=False):
    v, m, n, k = sizes
    a, b = normal(v, *((k, m) if transa else (m, k))), normal(v, *((n, k) if transb else (k, n)), seed=1)
    return a.to(dtype), b.to(dtype), normal(v, m, n, seed=2).to(dtype)


# ---------------------------------------------------------------------------------------------------------- the op


@each_dtype
@pytest.mark.parametrize("transa, transb", [*itertools.product((False, True), repeat=2)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(sizes, transa, transb, dtype):
    a, b, y = operands(sizes, dtype, transa, transb)
    wide = (a.mT if transa else a).double() @ (b.mT if transb else b).double()
    truth = 0.5 * wide - 2 * y.double()
    OP(y, a, b, transa, transb, 0.5, -2.0)
    close(y, truth, sizes, dtype)


@each_dtype
def test_one_matrix_for_all(dtype):
    a, b, y = operands((4, 30, 6, 20), dtype)
    OP(y, a, b[:1], False, False, 1.0, 0.0)
    close(y, a.double() @ b[0].double(), (4, 30, 6, 20), dtype)


def test_what_is_not_read():
    """A factor of 0 for y is no product with it."""
    a, b, y = operands((1, 9, 4, 5), torch.float32)
    y.fill_(torch.nan)
    OP(y, a, b, False, False, 1.0, 0.0)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("v, m, n, k", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty(v, m, n, k):
    a, b, y = operands((v, m, n, k), torch.float32)
    truth = y * 0.5
    OP(y, a, b, False, False, 1.0, 0.5)
    assert torch.equal(y, truth)


@each_dtype
@pytest.mark.parametrize("sizes", [*SIZES, (1, 30, 500, 400), (2, 10, 130, 600), (1, 600, 600, 50)], ids=str)
def test_same_bits_every_time_with_any_threads(sizes, dtype):
    """Of few rows threads get columns."""
    a, b, y = operands(sizes, dtype)
    for _ in helpers.threads(1, 2, 3, 16):
        first, second = y.clone(), y.clone()
        for own in (first, second):
            OP(own, a, b, False, False, 1.0, 1.0)
        assert torch.equal(first, second)
        close(first, y.double() + a.double() @ b.double(), sizes, dtype)


@pytest.mark.parametrize("transa, transb", [(False, False), (True, True)])
def test_opcheck(transa, transb):
    a, b, y = operands((2, 5, 4, 3), torch.float32, transa, transb)
    torch.library.opcheck(OP, (y, a, b, transa, transb, 1.0, 0.5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def function(y, a, b):
        y = y.clone()
        OP(y, a, b, False, False, 1.0, 0.5)
        return 2 * y

    fast = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes in ((1, 5, 4, 3), (2, 7, 3, 9)):
        a, b, y = operands(sizes, torch.float32)
        torch.testing.assert_close(fast(y, a, b), function(y, a, b))


@pytest.mark.parametrize("words, call", [
    ("expected stacks of matrices", lambda o, x: OP(x(3, 4), x(1, 3, 2), x(1, 2, 4), False, False, 1.0, 0.0)),
    (r"y \[1, 3, 4\] does not fit a \[1, 3, 2\] and b \[1, 3, 4\]",
     lambda o, x: OP(x(1, 3, 4), x(1, 3, 2), x(1, 3, 4), False, False, 1.0, 0.0)),
    (r"a \[1, 3, 2\] transposed", lambda o, x: OP(x(1, 3, 4), x(1, 3, 2), x(1, 2, 4), True, False, 1.0, 0.0)),
    (r"b \[3, 2, 4\]", lambda o, x: OP(x(2, 3, 4), x(2, 3, 2), x(3, 2, 4), False, False, 1.0, 0.0)),
    ("all be float32 or all float64",
     lambda o, x: OP(x(1, 3, 4), x(1, 3, 2).double(), x(1, 2, 4), False, False, 1.0, 0.0)),
    ("all be float32 or all float64",
     lambda o, x: OP(x(1, 3, 4).half(), x(1, 3, 2).half(), x(1, 2, 4).half(), False, False, 1.0, 0.0)),
    ("must be", lambda o, x: OP(x(1, 4, 3).mT, x(1, 3, 2), x(1, 2, 4), False, False, 1.0, 0.0)),
])
def test_what_does_not_fit_is_named(words, call):
    with pytest.raises(RuntimeError, match=rf"product_.*{words}"):
        call(OP, torch.ones)


# ------------------------------------------------------------------------------------------------------- from Python


@each_dtype
def test_orientations_and_stacks(outruns, dtype):
    a, b = normal(70, 40).to(dtype), normal(40, 9, seed=1).to(dtype)
    several, single = normal(3, 70, 40, seed=2).to(dtype), normal(3, 40, 9, seed=3).to(dtype)
    for x, y in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT), (b.mT, a.mT), (several, b),
                 (several, single), (several[:1], single[:1]), (several.mT.contiguous().mT, single), (a[:0, :], b),
                 (a[:, :0], b[:0])):
        truth, found = x.double() @ y.double(), []
        taken = outruns.more(lambda x=x, y=y, found=found: found.append(product(x, y)))
        assert taken == (outruns.ours and len(x) > 0)
        close(found[0], truth, (1, 1, 1, 40), dtype)
    y, truth = normal(70, 9, seed=4).to(dtype), a.double() @ b.double()
    for own, ours in ((y.clone(), True), (y.mT.contiguous().mT, False)):  # ours writes rows
        expected = 0.5 * own.double() - 3 * truth
        assert outruns.more(lambda own=own: add_product_(own, a, b, 0.5, -3.0)) == (outruns.ours and ours)
        close(own, expected, (1, 70, 9, 40 * 9), dtype)
    y = normal(3, 70, 9, seed=5).to(dtype)
    truth = y.double() + several.double() @ single.double()
    assert outruns.more(lambda: add_product_(y, several, single, 1.0)) == outruns.ours
    close(y, truth, (1, 1, 1, 40), dtype)


@each_dtype
def test_what_blas_does_not_read_as_it_lies(outruns, dtype):
    """Slices, steps and stacks whose matrices lie apart; broadcasts; vectors: torch's, without a copy."""
    a, b = normal(70, 40).to(dtype), normal(40, 9, seed=1).to(dtype)
    several, single = normal(3, 70, 40, seed=2).to(dtype), normal(3, 40, 9, seed=3).to(dtype)
    for x, y in ((a, torch.stack((b, b), -1)[..., 0]), (normal(70, 80).to(dtype)[:, :40], b), (a[::2], b),
                 (several.transpose(0, 1).contiguous().transpose(0, 1), single), (a, single), (several[:1], single),
                 (several, single[:1]), (a, b[:, :1]), (a[:1], b), (a, b[:, 0]), (a[0], b), (a.expand(3, 70, 40), b)):
        truth, found = x.double() @ y.double(), []
        assert not outruns.more(lambda x=x, y=y, found=found: found.append(product(x, y)))
        close(found[0], truth, (1, 1, 1, 40), dtype)


def test_a_step_is_seen_by_autograd(outruns):
    """As every write in place: a graph that has kept the weight must not go on with another."""
    w, x, a, b = normal(20, 30), normal(5, 20, seed=1).requires_grad_(), normal(20, 4, seed=2), normal(4, 30, seed=3)
    y, version = x @ w, w._version
    assert outruns.more(lambda: add_product_(w, a, b, 1.0)) == outruns.ours
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tensors_that_are_more_than_memory(outruns):
    """What is negative by a bit, what inference mode has made, and what a dispatch mode looks at."""
    a, b = normal(20, 4), normal(4, 30, seed=1)
    y = torch._neg_view(normal(20, 30, seed=2))
    truth = y.clone() + a @ b
    assert not outruns.more(lambda: add_product_(y, a, b, 1.0))
    torch.testing.assert_close(y.clone(), truth)
    with torch.inference_mode():
        made = normal(20, 30)
        assert outruns.more(lambda: add_product_(made, a, b, 1.0)) == outruns.ours
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        add_product_(made, a, b, 1.0)
    with FlopCounterMode(display=False) as flops:
        product(a, b)
    assert flops.get_total_flops() == 2 * 20 * 4 * 30


def test_what_torch_is_left(outruns):
    """Gradients, transforms and dtypes that the op has not."""
    a, b = normal(6, 4).requires_grad_(), normal(4, 3, seed=1)
    product(a, b).sum().backward()
    torch.testing.assert_close(a.grad, b.sum(1).expand(6, 4))
    with torch.no_grad():
        torch.testing.assert_close(product(a, b), a @ b)
    both = torch.stack((b, b))
    torch.testing.assert_close(torch.func.vmap(product, (None, 0))(b.mT, both), b.mT @ both)
    assert torch.func.jvp(lambda t: product(t, b), (a.detach(),), (torch.ones(6, 4, dtype=a.dtype),))[1].any()
    assert product(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16
    assert product(a.detach().to("meta"), b.to("meta")).shape == (6, 3)


@pytest.mark.parametrize("projector", ["range", "svd", "cosine"])
def test_an_optimisers_steps_are_the_same_either_way(monkeypatch, projector):
    def trained(ours):
        monkeypatch.setattr(module, "outruns_torch", lambda: ours)
        monkeypatch.setattr(module, "WORTH", 0)
        monkeypatch.setattr(module, "PANEL", 0)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.Tanh(), torch.nn.Linear(60, 30)).double()
        opt, x = ts.lowrank.LowRankAdamW(model.parameters(), lr=1e-2, rank=8, projector=projector), normal(16, 40)
        for _ in range(5):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-6, atol=1e-8)
