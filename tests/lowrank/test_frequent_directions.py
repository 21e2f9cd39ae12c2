"""Frequent directions: the bounds of the sketch, whatever the stream and its blocks."""

import math

import pytest
import torch
from helpers import close, normal

from torch_subspace.lowrank import frequent_directions_


def decaying(rows, n, power, seed=0):
    """Rows whose directions have standard deviations j^-power, in an order that drifts."""
    x = normal(rows, n, seed=seed) * torch.arange(1, n + 1).double() ** -power
    turn = torch.linalg.qr(normal(n, n, seed=seed + 1)).Q
    return torch.cat([x[: rows // 2] @ turn, x[rows // 2 :].flip(-1)])


def sketched(a, r, blocks, dtype=torch.float64):
    sketch = torch.zeros(r, a.shape[-1], dtype=dtype)
    for block in a.to(dtype).split(blocks):
        assert frequent_directions_(sketch, block) is sketch
    return sketch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [12, 40])
@pytest.mark.parametrize("r", [1, 5, 12])
@pytest.mark.parametrize("blocks", [1, 7, 60])
@pytest.mark.parametrize("power", [0, 1])
def test_the_sketch_is_below_the_stream_and_not_far(dtype, n, r, blocks, power):
    a = decaying(120, n, power)
    sketch = sketched(a, r, blocks, dtype).double()
    gap = torch.linalg.eigvalsh(a.mT @ a - sketch.mT @ sketch)
    energy = torch.linalg.svdvals(a).square()
    rounding = (1e-4 if dtype == torch.float32 else 1e-11) * float(energy.sum())
    assert gap[0] > -rounding
    for k in range(min(r, n)):
        assert gap[-1] <= energy[k:].sum() / (r - k) + rounding


def test_rows_are_orthogonal_and_descend():
    sketch = sketched(decaying(90, 30, 0.5), 6, 10)
    gram = sketch @ sketch.mT
    lengths = gram.diagonal()
    assert (lengths[:-1] >= lengths[1:]).all()
    close(gram, lengths.diag(), 1e-12)


@pytest.mark.parametrize("m, n", [(3, 20), (50, 20), (9, 9)])
def test_one_merge_is_the_formula(m, n):
    before, block = normal(4, n, seed=1), normal(m, n, seed=2)
    _, s, vh = torch.linalg.svd(torch.cat([0.7 * before, block]), full_matrices=False)
    want = (s[:4].square() - s[4].square()).clamp(min=0).sqrt()[:, None] * vh[:4]
    got = frequent_directions_(before.clone(), block, decay=0.7)
    close(got.mT @ got, want.mT @ want, 1e-12)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_directions_lose_nothing_at_any_size(size, dtype):
    a = (normal(40, 3) @ normal(3, 16, seed=1) * size).to(dtype)
    sketch = sketched(a, 4, 10, dtype).double() / size
    a = a.double() / size
    close(sketch.mT @ sketch, a.mT @ a, 1e-5 if dtype == torch.float32 else 1e-12)


def test_streams_beside_each_other():
    a = torch.stack([decaying(30, 12, 1), decaying(30, 12, 0, seed=4)])
    sketch = torch.zeros(2, 5, 12, dtype=torch.float64)
    for block in a.split(10, 1):
        frequent_directions_(sketch, block)
    for own, rows in zip(sketch, a, strict=True):
        alone = sketched(rows, 5, 10)
        close(own.mT @ own, alone.mT @ alone, 1e-12)


def test_small_and_empty():
    sketch = torch.zeros(3, 2)
    frequent_directions_(sketch, torch.tensor([[3.0, 0], [0, 4]]))  # more rows than dimensions
    close(sketch.mT @ sketch, torch.diag(torch.tensor([9.0, 16])), 1e-6)
    again = frequent_directions_(sketch.clone(), torch.empty(0, 2), decay=0.5)
    close(again.mT @ again, sketch.mT @ sketch / 4, 1e-6)
    assert not frequent_directions_(torch.zeros(2, 3), torch.zeros(5, 3)).any()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        close(frequent_directions_(torch.zeros(3, 2), torch.eye(2)).square().sum(), torch.tensor(2.0), 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["sketch", "block"])
def test_what_is_not_finite_changes_nothing(bad, where):
    sketch, block = torch.ones(2, 3), torch.ones(4, 3)
    (sketch if where == "sketch" else block)[1, 1] = bad
    before = sketch.clone()
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity"):
        frequent_directions_(sketch, block)
    assert torch.equal(sketch, before) or where == "sketch"


@pytest.mark.parametrize("sketch, block, match", [
    (torch.zeros(2, 3).half(), torch.zeros(2, 3).half(), "float32 or float64"),
    (torch.zeros(2, 3), torch.zeros(2, 3).double(), "block must be as sketch"),
    (torch.zeros(2, 3), torch.zeros(2, 4), "block must be"), (torch.zeros(0, 3), torch.zeros(2, 3), "got shape"),
    (torch.zeros(3), torch.zeros(2, 3), "got shape"), (torch.zeros(2, 2, 3), torch.zeros(3, 2, 3), "block must be"),
    (torch.zeros(9).as_strided((2, 3), (1, 1)), torch.zeros(2, 3), "no elements that share memory"),
    (torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3), "must not require a gradient")])
def test_what_does_not_fit(sketch, block, match):
    with pytest.raises((TypeError, ValueError), match=f"frequent_directions_: .*{match}"):
        frequent_directions_(sketch, block)
