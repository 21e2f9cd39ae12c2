"""examples/many_classes.py on a few images that are nobody's characters, and the margin that it compares with."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import close

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("matplotlib")
many_classes = pytest.importorskip("many_classes")


def test_the_margin_widens_the_angle_of_the_true_class():
    torch.manual_seed(0)
    head = many_classes.Cosine(5, scale=8, margin=0.3)
    x, y = torch.randn(7, many_classes.FEATURES), torch.arange(7) % 5
    with torch.no_grad():
        x[0] = -head.weight[0]  # an angle of π: a line of the same slope goes on
        cosine = head(x) / 8
        expected = cosine.clone()
        for i, c in enumerate(y):
            angle = math.acos(max(-1.0, min(1.0, cosine[i, c])))
            wide = angle + 0.3 <= math.pi
            expected[i, c] = math.cos(angle + 0.3) if wide else cosine[i, c] - 0.3 * math.sin(0.3)
    close(head.loss(x, y), torch.nn.functional.cross_entropy(8 * expected, y), 1e-5)
    head.loss(x, y).backward()
    assert head.weight.grad.isfinite().all()


def test_heads_are_measured_and_what_is_there_is_kept(monkeypatch, tmp_path):
    torch.manual_seed(0)
    faces = [torch.randn(5, 80, 16, 16), torch.randn(2, 80, 16, 16)]
    monkeypatch.setattr(many_classes, "glyphs", lambda: faces)
    monkeypatch.setattr(many_classes, "RATES", (1e-2,))
    heads = ("linear", "cosine, ArcFace's margin", "Grassmann, k = 8")
    monkeypatch.setattr(many_classes, "HEADS", {name: many_classes.HEADS[name][:1] for name in heads})
    monkeypatch.setattr(many_classes, "SEEDS", (0, 1))
    found, kept = {"rows": {}}, []
    many_classes.measure(found, (40, 40, 1), lambda: kept.append(json.dumps(found)))
    assert all(len(row["runs"]) == 2 and row["lr"] == 1e-2 for row in found["rows"].values())
    assert {len(run["accuracy"]) for row in found["rows"].values() for run in row["runs"]} == {80}
    assert {len(run["linear probe"]) for row in found["rows"].values() for run in row["runs"]} == {80}
    before = len(kept)
    many_classes.measure(found, (40, 40, 1), lambda: kept.append(None))
    assert len(kept) == before
    mean, half = many_classes.compared(found["rows"], "Grassmann, k = 8", "linear")["accuracy"]
    assert abs(mean) <= 1 and half >= 0
    many_classes.draw(tmp_path / "heads.png", found["rows"])
