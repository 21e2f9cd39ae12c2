"""evidence_brief.py, evidence_heads.py and example_tables.py of tests/bench, on results made up here."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("bench")))
import evidence_brief  # noqa: E402
import evidence_heads  # noqa: E402
import example_tables  # noqa: E402


@pytest.mark.parametrize(("names", "means", "cell"), [
    (["ours"], ["1%"], "ours: 1%"),
    (["ours", "ours"], ["1%", "2%"], "ours: 1% / 2%"),
    (["ours", "ours"], ["1%", "1%"], "ours: 1%"),
    (["theirs", "others"], ["1%", "1%"], "theirs: 1% / others: 1%"),
])
def test_a_name_is_told_once_in_a_row(names, means, cell):
    assert evidence_brief.told(names, means) == cell


def test_a_line_has_a_difference_for_each_pair():
    ours, theirs = [0.5, 0.7], [0.4, 0.6]
    line = evidence_brief.line("task", ("ours", ours, "LoRA", theirs), ("ours", ours, "all", ours))
    assert line == "| task | ours: 60.0% | LoRA: 50.0% / all: 60.0% | +10.0 ± 0.0 / +0.0 ± 0.0 |"


def test_differences_are_paired():
    assert evidence_heads.points_of([0.1, 0.2, 0.3], [0.0, 0.2, 0.4]) == "+0.0 ± 24.8"  # 4.303 * 10 / √3


def test_only_heads_that_were_measured_are_compared():
    methods = ["frozen, linear head", "frozen, Grassmann head", "our cores alone, Grassmann head", "ours, linear head"]
    assert evidence_heads.further(methods) == [("frozen, Grassmann head", "frozen, linear head")]


def test_gamma_table_takes_what_has_been_measured(tmp_path, monkeypatch):
    def task(name, classes, validation, gammas):
        rows = {g: {"validation": validation, "accuracy": [0.5, 0.6, 0.7], "lr": 0.1} for g in gammas}
        return {"name": name, "classes": classes, "rows": rows, "n": 8, "k": 2, "auto": 4.0, "epochs": 3}

    tasks = [task("normalised", 100, {"0.1": 0.5}, ("1", "2", "4", "8", "16", "25")),
             task("many", 3755, {}, ("2", "4", "25")), {"name": "begun", "classes": 5, "rows": {}}]
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/gamma.json").write_text(json.dumps(
        {"setting": {"seeds": 3, "threads": 1, "torch": "2"}, "tasks": tasks}))
    monkeypatch.setattr(example_tables, "ROOT", tmp_path)
    _, _, normalised, many, _, footer = example_tables.gamma_table().splitlines()
    none = "+0.0 ± 0.0"
    assert normalised == f"| normalised | 100 | 8 | 2 | 4 | 60.0% (0.1) | {' | '.join([none] * 5)} |"
    assert many == f"| many | 3755 | 8 | 2 | 4 | 60.0% (0.1) |  | {none} |  |  | {none} |"
    assert "of 3755 classes it is one for all" in footer and "100 classes" not in footer


def test_texts_have_a_dash_where_a_method_was_not_measured(monkeypatch):
    """Further methods may stand in some of the cases alone; one that has begun leaves its case out."""
    def row(*right):
        return {"lr": 0.1, "runs": [{"right": r, "parameters": 7} for r in right]}

    few, ours = "spectral adapter, Grassmann head", "ours, Grassmann head"
    full, more = {ours: row("11", "10", "11")}, {ours: row("11", "10", "11"), few: row("01", "10", "00")}
    begun = {ours: row("11", "10", "11"), few: row("01")}
    shots = {"4": full, "8": more, "9": begun}
    found = {"setting": {"seeds": 3, "epochs": 1, "threads": 1, "torch": "2"}, "peaks": {}, "states": {few: 2**20},
             "tasks": {"a": {"shots": shots, "validation": {key: dict.fromkeys(rows) for key, rows in shots.items()}}}}
    monkeypatch.setattr(evidence_heads, "result", lambda name: found)
    table = evidence_heads.texts()
    assert f"| {few} | – | 33.3% ± 28.9 (0.1) | 7 | 1.00 MiB | – |" in table and "9 a class" not in table
    assert f"| {few} | – | +50.0 ± " in table
