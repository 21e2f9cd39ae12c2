"""Float32 by products of bfloat16, where a processor has AMX; elsewhere the word changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import LEVEL

import torch_subspace as ts

AMX = LEVEL == "amx_bf16"


@pytest.fixture
def high():
    ts.set_float32_matmul_precision("high")
    yield
    ts.set_float32_matmul_precision("highest")


def made(batch, n, classes, k, dtype=torch.float32):
    seed = torch.Generator().manual_seed(batch + n)
    x, weight = torch.randn(batch, n, generator=seed), torch.randn(classes, k, n, generator=seed) / n**0.5
    gradient = torch.randn(batch, classes, generator=seed)
    return [t.to(dtype) for t in (x, weight, gradient)]


def logits(x, weight, gradient, normalize=True):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = ts.subspace_logits(x, weight, normalize=normalize)
    return y.detach(), *torch.autograd.grad(y, (x, weight), gradient)


def loss(x, weight, gradient):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    value = ts.subspace_cross_entropy(x, weight, gradient.argmax(1))
    return value.detach(), *torch.autograd.grad(value, (x, weight))


def errors(found, truth):
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth, strict=True)]


# a row of tiles and more, blocks of pairs and more, fewer than a tile of either
SIZES = [(16, 32, 16, 1), (33, 65, 17, 3), (70, 531, 9, 7), (300, 40, 100, 8), (5, 64, 30, 2), (64, 7, 3, 1)]


@pytest.mark.parametrize("function", [logits, loss])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_high_is_right_to_sixteen_bits(function, size, high):
    given_ = made(*size)
    found, truth = function(*given_), function(*(t.double() for t in given_))
    assert max(errors(found, truth)) < 4e-5
    ts.set_float32_matmul_precision("highest")
    exact = function(*given_)
    assert max(errors(exact, truth)) < 4e-6
    if not AMX or min(size[0], size[1], size[2] * size[3]) < 16:
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    else:
        assert not torch.equal(found[1], exact[1])


@given(st.integers(1, 80), st.integers(8, 300), st.integers(1, 30), st.integers(1, 5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_size(batch, n, classes, k, normalize):
    given_ = made(batch, n, classes, min(k, n))
    ts.set_float32_matmul_precision("high")
    try:
        found = logits(*given_, normalize)
    finally:
        ts.set_float32_matmul_precision("highest")
    for a, b in zip(found, logits(*(t.double() for t in given_), normalize), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
def test_what_is_not_finite_is_seen_and_touches_no_other_row(value, high):
    x, weight, _ = made(32, 64, 20, 2)
    x[3, 5] = value
    found = ts.subspace_logits(x, weight, normalize=False)
    x[3, 5] = 0
    others = torch.arange(32) != 3
    assert torch.equal(found[others], ts.subspace_logits(x, weight, normalize=False)[others])
    assert not found[3].isfinite().any()


def test_float16_is_right_to_its_own_bits(high):
    given_ = made(64, 300, 30, 4, torch.float16)
    found, truth = logits(*given_), logits(*(t.double() for t in given_))
    for a, b in zip(found, truth, strict=True):
        assert (a - b.half()).abs().max() <= 2.0**-10 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_row_depends_on_its_block(dtype, high):
    x, weight, _ = made(264, 64, 20, 4, dtype)  # 256 and 8
    assert torch.equal(ts.subspace_logits(x, weight)[200:], ts.subspace_logits(x[200:], weight))


def test_float64_is_left_alone(high):
    given_ = made(32, 64, 20, 2, torch.float64)
    found = logits(*given_)
    ts.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(found, logits(*given_), strict=True))


def test_the_word_is_kept_and_a_wrong_one_changes_nothing(high):
    assert ts.get_float32_matmul_precision() == "high"
    with pytest.raises(ValueError, match="precision: precision must be one of highest, high, got .medium."):
        ts.set_float32_matmul_precision("medium")
    assert ts.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_compiled_graph_obeys_it_too():
    x, weight, _ = made(64, 128, 20, 2)
    compiled = torch.compile(lambda x: ts.subspace_logits(x, weight), fullgraph=True)
    exact = compiled(x)
    assert torch.equal(exact, ts.subspace_logits(x, weight))
    ts.set_float32_matmul_precision("high")
    try:
        assert torch.equal(compiled(x), ts.subspace_logits(x, weight))
        assert torch.equal(compiled(x), exact) is not AMX
    finally:
        ts.set_float32_matmul_precision("highest")
