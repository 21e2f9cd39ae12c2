"""intrinsic_dimension finds the least dimension that reaches the target, and trains no more than it needs to."""

import pytest
import torch
from torch import nn

import torch_subspace as ts


def find(score, **options):
    """With scores by dimension, 1 for the whole module of 1000 numbers."""
    def fit(model):
        return score(len(model.theta)) if isinstance(model, ts.lowrank.RandomSubspace) else 1.0

    return ts.lowrank.intrinsic_dimension(lambda: nn.Linear(100, 10, bias=False), fit, kind="sparse", **options)


@pytest.mark.parametrize("needed", [1, 2, 3, 15, 16, 17, 100, 333, 999, 1000])
def test_the_least_is_found(needed):
    found = find(lambda d: float(d >= needed), tolerance=1e-9)
    assert (found.dim, found.size, found.target) == (needed, 1000, 0.9)
    assert len(found.scores) <= 18 and list(found.scores)[0] == 16


@pytest.mark.parametrize("needed", [40, 700])
def test_up_to_the_tolerance(needed):
    found = find(lambda d: d / needed, threshold=1.0, tolerance=0.2, start=10)
    assert needed <= found.dim <= 1.2 * needed + 1
    assert len(found.scores) < 12


def test_where_none_reaches_it():
    found = find(lambda d: 0.1, most=60)
    assert found.dim is None and max(found.scores) == 60
    assert str(found) == "sparse: none up to 60 of 1000 dimensions reach 0.9, of 1"
    assert find(lambda d: float("nan")).dim is None
    assert find(lambda d: 1.0, start=500, most=3).dim == 1


def test_seeds_draw_the_module_and_what_it_sees():
    """Each seed has a module and a projection of its own; torch's generator goes on as if nothing had been."""
    seen = []

    def fit(model):
        base = getattr(model, "module", model)
        seen.append((base.weight[0, 0].item(), getattr(model, "seed", None), torch.rand(()).item()))
        return 1.0

    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    found = ts.lowrank.intrinsic_dimension(lambda: nn.Linear(3, 1, bias=False), fit, seeds=(5, 6), start=1,
                                           kind="dense")
    assert torch.equal(torch.rand(()), expected)
    assert found.scores == {1: [1.0, 1.0]} and found.dim == 1
    assert seen[0] == (*seen[2][:1], None, seen[2][2]) and seen[1][0] == seen[3][0] != seen[0][0]
    assert [seed for _, seed, _ in seen] == [None, None, 5, 6]


def test_picture_and_bar(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found = find(lambda d: float(d >= 20), verbose=True)
    axes = found.plot(tmp_path / "d90.png")
    assert (tmp_path / "d90.png").stat().st_size > 1000
    assert found.plot(axes=axes) is axes
    assert "d = 16" in capsys.readouterr().err


def test_what_make_and_fit_return_is_checked():
    with pytest.raises(TypeError, match="intrinsic_dimension: what make returns must be an nn.Module, got int 3"):
        ts.lowrank.intrinsic_dimension(lambda: 3, lambda model: 1.0)
    with pytest.raises(TypeError, match="intrinsic_dimension: fit must return a number, got None"):
        ts.lowrank.intrinsic_dimension(lambda: nn.Linear(2, 2), lambda model: None)
    for score in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match=f"the whole module's score must be positive and finite, got {score}"):
            ts.lowrank.intrinsic_dimension(lambda: nn.Linear(2, 2), lambda model: score)  # noqa: B023
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="intrinsic_dimension: make must return a new module each time, got"):
        ts.lowrank.intrinsic_dimension(lambda: module, lambda model: 1.0)
    with pytest.raises(ValueError, match="make must return a module with parameters that require a gradient, got ReLU"):
        ts.lowrank.intrinsic_dimension(nn.ReLU, lambda model: 1.0)
    with pytest.raises(TypeError, match="intrinsic_dimension: seeds must be a sequence of ints"):
        ts.lowrank.intrinsic_dimension(lambda: nn.Linear(2, 2), lambda model: 1.0, seeds=[])


@pytest.mark.parametrize("kind", ["fastfood", "dense"])
def test_digits_need_some_hundred(kind):
    """The network 64-100-100-10 of 17 610 numbers, briefly trained: d90 lies between 60 and 260, whatever the seed."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]

    def make():
        return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))

    def fit(model):
        whole = not isinstance(model, ts.lowrank.RandomSubspace)
        opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3 if whole else 0.06)
        for step in range(150):
            at = torch.arange(step * 200, step * 200 + 200) % 1200
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[at]), y[at]).backward()
            opt.step()
        with torch.no_grad():
            return (model(x[1200:]).argmax(1) == y[1200:]).double().mean()

    found = ts.lowrank.intrinsic_dimension(make, fit, kind=kind, start=120, tolerance=0.5)
    assert found.size == 17610 and found.baseline > 0.93
    assert 60 <= found.dim <= 260
