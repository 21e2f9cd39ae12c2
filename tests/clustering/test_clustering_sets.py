"""examples/clustering_sets.py: it measures, keeps what it has measured, takes up what is new; its sets are sound."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import optional

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def examples(monkeypatch):
    for name in ("matplotlib", "PIL", "tqdm"):
        optional(name)
    monkeypatch.syspath_prepend(ROOT / "examples")


def test_a_quick_run_is_kept_and_not_repeated(examples, tmp_path, monkeypatch, capsys):
    import clustering_sets

    path = tmp_path / "found.json"
    clustering_sets.main(["--quick", "--output", str(path)])
    found = json.loads(path.read_text())
    assert set(found["sets"]) == set(clustering_sets.QUICK)
    for entry in found["sets"].values():
        assert set(entry["algorithms"]) == {"k-means", "Gaussian mixture", "spectral", "Ward", "HDBSCAN", "ours"}
        assert entry["best other"] != "ours" and entry["difference"]["ours"]["half"] is None
    assert found["sets"]["subspaces"]["algorithms"]["ours"]["acc"]["mean"] > 0.5
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "ours less" in capsys.readouterr().out

    # one row is of other settings, one is missing: only these are measured
    found["rows"][0]["key"] = "another"
    del found["rows"][3]
    path.write_text(json.dumps(found))
    again, run = [], clustering_sets.run

    def counted(model, *parts):
        again.append(type(model).__name__)
        return run(model, *parts)

    monkeypatch.setattr(clustering_sets, "run", counted)
    clustering_sets.main(["--quick", "--output", str(path)])
    assert again == ["KMeans", "AgglomerativeClustering"]
    assert len(json.loads(path.read_text())["rows"]) == len(found["rows"]) + 1


def test_sets_are_what_they_say(examples):
    from clustering_data import SETS

    for name in ("iris", "wine", "cancer", "patches", "subspaces", "curves"):
        x, y = SETS[name].draw(0)
        same, _ = SETS[name].draw(0)
        assert x.dtype == np.float32 and x.ndim == 2 and y.dtype == np.int64 and len(x) == len(y), name
        assert np.isfinite(x).all() and set(y) == set(range(y.max() + 1)), name
        np.testing.assert_array_equal(x, same, name)
    shape = SETS["patches"].images["image_shape"]
    assert np.prod(shape) == SETS["patches"].draw(0)[0].shape[1]


def test_differences_are_paired(examples):
    from clustering_report import paired

    mean, half = paired([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])  # the seeds' own ups and downs cancel
    assert abs(mean - 0.1) < 1e-12 and half < 1e-12
    mean, half = paired([0.3, 0.1, 0.2], [0.0, 0.0, 0.0])
    assert abs(mean - 0.2) < 1e-12 and abs(half - 4.303 * 0.1 / 3**0.5) < 1e-4
