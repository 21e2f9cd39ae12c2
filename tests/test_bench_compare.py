"""tests/bench/compare.py on runs made up here."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("bench")))
from compare import main, report, runs  # noqa: E402


def run(time=2.0, limit=0.5, ratio=1.5, cpu="one", sense="<=", missing=False):
    rows = [{"case": "big", "contender": "ours", "p50_ms": time, "of_bound": limit},
            {"case": "big", "contender": "eager", "missing": "broken"} if missing else
            {"case": "big", "contender": "eager", "p50_ms": 4.0}]
    target = {"case": "big", "of": "time", "ours": "ours", "against": "eager", "ratio": ratio, "sense": sense}
    return {"environment": {"device": "cpu", "cpu": cpu, "threads": 1}, "rows": rows, "targets": [target]}


def told(old, new):
    return list(report({"op": old}, {"op": new}))


@pytest.mark.parametrize("old, new, lines", [
    (run(), run(time=2.1, ratio=1.6), ["0 of 3 figures"]),
    (run(), run(time=2.5), ["1 of 3", "worse    1.25", "2 -> 2.5"]),
    (run(), run(time=1.0, ratio=0.5), ["2 of 3", "better   2.00", "better   3.00"]),
    (run(sense=">="), run(sense=">=", ratio=0.5), ["1 of 3", "worse    3.00"]),
    (run(), run(time=9.0, cpu="two"), ["0 of 2", "one, 1 -> two, 1"]),  # as near the limit of its machine
    (run(), run(time=9.0, limit=0.25, cpu="two"), ["1 of 2", "worse    2.00", "x the limit"]),
    (run(missing=True), run(), ["0 of 2"]),
])
def test_what_has_changed_is_told(old, new, lines):
    text = "\n".join(told(old, new))
    assert all(line in text for line in lines), text


def test_a_limit_that_is_counted_anew_compares_with_nothing():
    old = run() | {"work": {"big": {"bytes": 1}}}
    new = run(time=9.0, limit=0.25, cpu="two") | {"work": {"big": {"bytes": 2}}}
    assert "0 of 1" in told(old, new)[0]


def test_folders_and_what_only_one_has(tmp_path, monkeypatch, capsys):
    for name, ops in (("old", ["a", "b"]), ("new", ["b", "c"])):
        (tmp_path / name).mkdir()
        for op in ops:
            (tmp_path / name / f"{op}.json").write_text(json.dumps(run()))
        (tmp_path / name / "plan.json").write_text("[1]")
    (tmp_path / "old/other-processor").mkdir()
    (tmp_path / "old/other-processor/a.json").write_text(json.dumps(run()))
    assert sorted(runs(tmp_path / "old")) == ["a", "b", "other-processor/a"]
    monkeypatch.setattr("sys.argv", ["compare.py", str(tmp_path / "old"), str(tmp_path / "new")])
    main()
    out = capsys.readouterr().out
    assert "a: only in the old run" in out and "c: only in the new run" in out and "b: 0 of 3" in out


def test_what_holds_no_rows(tmp_path):
    with pytest.raises(SystemExit, match="neither a folder nor a commit"):
        runs("no-such-commit")
    assert runs(tmp_path) == {}
