"""The cosine basis, and the columns of it that hold most of a matrix."""

import math

import pytest
import torch
from helpers import close, normal, same, threads
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_subspace.lowrank import cosine, cosine_basis, cosine_columns

LENGTHS = (1, 2, 5, 127, 128, 129, 300, 301)  # on both sides of where the transform begins


def plain(g, rank):
    """By the whole product, in float64."""
    s = g.double() @ cosine_basis(g.shape[-1], dtype=torch.float64)
    index = s.abs().sum(-2).sort(dim=-1, descending=True, stable=True).indices[..., :rank].sort(dim=-1).values
    return s.take_along_dim(index[..., None, :], -1), index


@pytest.mark.parametrize("size", LENGTHS)
def test_the_basis(size):
    q = cosine_basis(size, dtype=torch.float64)
    j, k = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    expected = math.sqrt(2 / size) * torch.cos((2 * j + 1).double() * k * math.pi / (2 * size))
    expected[:, 0] = math.sqrt(1 / size)
    close(q, expected, 1e-12)
    close(q.mT @ q, torch.eye(size), 1e-12)
    index = torch.tensor([[0], [size - 1]])
    assert torch.equal(cosine_basis(size, index, dtype=torch.float64), q[:, index].movedim(1, 0))


def test_whose_tensor_the_basis_is():
    first = cosine_basis(16)
    first.zero_()  # the caller's own: not what others will see
    assert cosine_basis(16).norm() > 3
    for size in range(2, 2 * cosine.KEPT):
        cosine_columns(normal(1, size), 1)
    assert len(cosine._cache) == cosine.KEPT
    with torch.inference_mode():
        cosine_columns(normal(3, 63), 2)
    g = normal(3, 63).requires_grad_()  # what inference made would be refused here
    cosine_columns(g, 2)[0].sum().backward()
    assert g.grad is not None
    with FakeTensorMode() as mode:  # what is kept is real
        assert cosine_columns(mode.from_tensor(normal(3, 63)), 2)[0].shape == (3, 2)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("size", LENGTHS[2:])
def test_the_largest_columns(size, rank):
    g = normal(3, 9, size, seed=1)
    columns, index = cosine_columns(g, rank)
    assert columns.shape == (3, 9, rank) and index.shape == (3, rank) and index.dtype == torch.int64
    expected = plain(g, rank)
    assert torch.equal(index, expected[1])
    close(columns, expected[0], 1e-13)
    for i in range(3):
        alone = cosine_columns(g[i], rank)
        assert torch.equal(alone[1], index[i])
        close(alone[0], columns[i], 1e-13)


def test_some_rows_at_a_time(monkeypatch):
    g = normal(2, 50, 140, seed=2)
    whole = cosine_columns(g, 7)
    for chunk in (1, 500, 10_000):
        monkeypatch.setattr(cosine, "CHUNK", chunk)
        columns, index = cosine_columns(g, 7)
        assert torch.equal(index, whole[1])
        close(columns, whole[0], 1e-14)
        columns, index = cosine_columns(g[:, None], 7)
        assert columns.shape == (2, 1, 50, 7) and index.shape == (2, 1, 7)


@pytest.mark.parametrize("size", [6, 140])
def test_of_equal_columns_the_first(size):
    """Cosines themselves as rows: a permutation of the identity."""
    q = cosine_basis(size, dtype=torch.float64)
    assert cosine_columns(torch.zeros(4, size), 3)[1].tolist() == [0, 1, 2]
    order = torch.tensor([4, 1, 3])
    columns, index = cosine_columns(q[:, order].mT * torch.tensor([[1.0], [3], [2]]), 3)
    assert index.tolist() == [1, 3, 4]
    close(columns, torch.tensor([[0.0, 0, 1], [3, 0, 0], [0, 2, 0]]), 1e-13)


def test_the_nearest_matrix_of_its_kind():
    g = normal(20, 200)
    columns, index = cosine_columns(g, 60)
    q = cosine_basis(200, index, dtype=torch.float64)
    close(columns, g @ q, 1e-13)
    assert (g - columns @ q.mT).norm() ** 2 == pytest.approx((g.norm() ** 2 - columns.norm() ** 2).item())


@pytest.mark.parametrize("size", [6, 130])
def test_derivatives(size):
    g = normal(2, 3, size).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: cosine_columns(g, 2), g)
    assert torch.autograd.gradgradcheck(lambda g: cosine_columns(g, 2)[0].square(), g)
    close([torch.func.grad(lambda g: cosine_columns(g, 2)[0].pow(3).sum())(g.detach())],
          torch.autograd.grad(cosine_columns(g, 2)[0].pow(3).sum(), g), 1e-12)
    close(torch.vmap(lambda g: cosine_columns(g, 2))(g.detach()), cosine_columns(g.detach(), 2), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_autocast(dtype):
    g = normal(7, 150).to(dtype)
    wide = cosine_columns(g.float(), 4)
    assert wide[0].dtype == torch.float32 and same(cosine_columns(g, 4), wide)
    close(wide[0], plain(g, 4)[0], 1e-6)
    leaf = g.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cosine_columns(leaf, 4)
        (dg,) = torch.autograd.grad(found[0].sum(), leaf)
    assert same((found[0].detach(), found[1]), wide) and dg.dtype == dtype


def test_sizes_of_nothing_and_not_a_number():
    columns, index = cosine_columns(torch.zeros(0, 3, 200), 2)
    assert columns.shape == (0, 3, 2) and index.shape == (0, 2)
    g = normal(2, 3, 200)
    g[1, 1, 5] = math.nan
    columns, index = cosine_columns(g, 2)
    assert same((columns[0], index[0]), cosine_columns(g[0], 2))
    assert columns[1, 1].isnan().all() and columns[1, ::2].isfinite().all()


def test_the_same_for_any_number_of_threads():
    g = normal(300, 1100, dtype=torch.float32)
    first, second = [cosine_columns(g, 9) for _ in threads(1, 2)]
    assert same(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("size", [40, 140])
def test_compile_without_graph_breaks(size):
    torch._dynamo.reset()
    compiled, results = torch.compile(cosine_columns, fullgraph=True, backend="aot_eager"), []
    for function in (compiled, cosine_columns):
        g = normal(5, size, dtype=torch.float32).requires_grad_()
        columns, index = function(g, 3)
        results.append([columns.detach(), index, *torch.autograd.grad(columns.square().sum(), g)])
    close(*results, 1e-6)


X = torch.randn(5, 3)


@pytest.mark.parametrize("make, error, words", [
    (lambda: cosine_columns(X, 4), ValueError, "cosine_columns: rank must be at most g's 3 columns, got 4"),
    (lambda: cosine_columns(X[0], 1), ValueError, r"g must be \(..., m, n\) with m > 0 and n > 0, got \(3,\)"),
    (lambda: cosine_columns(X[:0], 1), ValueError, r"got \(0, 3\)"),
    (lambda: cosine_columns(X, True), TypeError, "rank must be an int, got bool True"),
    (lambda: cosine_columns(X.long(), 1), TypeError, "g must be float32, float64, float16 or bfloat16"),
    (lambda: cosine_basis(0), ValueError, "cosine_basis: size must be >= 1, got 0"),
    (lambda: cosine_basis(3, torch.tensor([0, 3])), ValueError, "index must be in 0 to 2, got 3"),
    (lambda: cosine_basis(3, torch.tensor(1)), ValueError, r"index must be \(..., rank\), got a scalar"),
    (lambda: cosine_basis(3, dtype=torch.float16), TypeError, "dtype must be float32 or float64"),
])
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
