"""examples/mcr2.py: its splits keep unknown classes unknown, its scores tell what they should."""

from pathlib import Path

import pytest
import torch
from helpers import optional


@pytest.fixture
def mcr2(monkeypatch):
    for name in ("matplotlib", "sklearn", "tqdm"):
        optional(name)
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    import mcr2

    return mcr2


def planted(mcr2):
    """Six classes, each around an axis of its own."""
    torch.manual_seed(0)
    label = torch.arange(6).repeat_interleave(60)
    image = torch.eye(6)[label] * 2 - 1 + 0.1 * torch.randn(360, 6)
    return mcr2.Digits(image, label, (5, 3, 0, 1), (2, 4), seed=0)


def test_classes_are_numbered_known_ones_first(mcr2):
    data = planted(mcr2)
    assert data.known == 4 and sorted(data.y.unique().tolist()) == list(range(6))
    assert data.x[data.y == 0].argmax(1).eq(5).all() and data.held_out[data.truth == 4].argmax(1).eq(2).all()
    rows = data.few(3)
    assert data.y[rows].bincount().tolist() == [40, 40, 40, 40, 3, 3]


def test_scores_of_classes_that_stand_apart(mcr2):
    data = planted(mcr2)
    functions = mcr2.features(None, data, None, None)
    assert mcr2.open_set(data, *functions)["nearest subspace"] > 0.99
    found = mcr2.further(data, *functions)
    assert set(found) == {f"{readout}, {shots}" for readout in mcr2.STYLES for shots in mcr2.SHOTS}
    assert min(found[f"{readout}, 50"] for readout in mcr2.STYLES) > 0.95
