"""threads.py, growth.py and overhead.py of tests/bench, on functions and runs made up here."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("bench")))
import cost_tables  # noqa: E402
import growth  # noqa: E402
import harness  # noqa: E402
import overhead  # noqa: E402
import threads  # noqa: E402
import torch  # noqa: E402

WHERE = {"cpu": "one"}


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def written(folder, script, rows, **more):
    (folder / f"{script}.json").write_text(json.dumps({"environment": WHERE, "rows": rows, **more}))
    return getattr(cost_tables, script)(lambda where: where["cpu"], folder)


@pytest.mark.parametrize("script", ["threads", "growth", "overhead"])
def test_what_is_not_measured_is_said(script, tmp_path):
    assert getattr(cost_tables, script)(None, tmp_path) == f"Not measured yet: `python tests/bench/{script}.py`."


# ---------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def clock(monkeypatch):
    """Functions say how many seconds they take."""
    monkeypatch.setattr(harness, "timed", lambda function, repeats: function())


def test_threads_are_what_is_measured(clock):
    assert threads.measure(lambda: 2e-3 * torch.get_num_threads(), 0.05) == {1: 2, 2: 4}


def test_what_two_threads_slow_down_is_named(tmp_path):
    rows = [{"op": op, "case": f"{op} float32", "one_ms": one, "two_ms": two} for op, one, two in (
        ("machine", 1.0, 1.0), ("good", 1.0, 0.5), ("noise", 1.0, 1.04), ("tiny", 0.09, 0.2), ("slow", 1.0, 1.3))]
    assert [row["op"] for row in cost_tables.slower(rows)] == ["slow"]
    text = written(tmp_path, "threads", rows)
    assert "| `good` good | 1 ms | 0.5 ms | 2.00 × |" in text and "above 100 µs: `slow` slow (1.30 ×)." in text
    assert cost_tables.told(rows[:4]).endswith(": none.")
    machine = {"op": "machine", "case": cost_tables.PRODUCT, "one_ms": 1.0}
    assert "1.25 times" in cost_tables.told([machine | {"two_ms": 0.8}])
    assert cost_tables.told([machine | {"two_ms": 0.6}]).endswith(": none.")


# ----------------------------------------------------------------------------------------------------------- growth


def test_a_slope_is_the_exponent():
    sizes = growth.doubled(4, 5)
    assert sizes == [4, 8, 16, 32, 64] and growth.slope(sizes, [3 * s**2.5 for s in sizes]) == pytest.approx(2.5)


def test_a_sweep(clock):
    def make(n, k):
        ours = harness.Contender("ours", lambda: lambda: n * k**1.5)
        return harness.Case("", [harness.Contender("floor", lambda: 1 / 0), ours], bytes=n * k, flops=n * k**2)

    row = growth.sweep("op", make, {"n": 2, "k": 1}, "n", [2, 4, 8], 2, (1.0, 2.0))
    assert row["least_ms"] == [2000, 4000, 8000] and row["formula"] == row["slope"] == 1 and row["rest"] == "k=1"
    row = growth.sweep("op", make, {"n": 1, "k": 1}, "k", [8, 16], 1, (1.0, 2.0))
    assert row["formula"] == 2 and row["slope"] == 1.5


def test_slopes_in_a_table(tmp_path):
    row = {"op": "op", "what": "n", "rest": "k=1", "sizes": [2, 4, 8, 16], "slope": 1.04, "formula": 1.0,
           "ms": [9.0, 10.0, 20.0, 40.0], "least_ms": [1.0, 2.0, 4.0, 8.0]}
    text = written(tmp_path, "growth", [row, row | {"slope": 1.5, "ms": [2.0, 4.0, 16.0, 64.0]}])
    assert "| 1.04 | 1.00 |  | 1.00 | 1.00 |  |" in text and "| 1.50 | 1.00 | +50% | 2.00 | 1.00 | +100% |" in text
    assert "Of 2 slopes 1 are" in text and "and 1 at the end" in text


@pytest.mark.parametrize("op, make, sizes, grown", growth.SWEEPS, ids=[op for op, *_ in growth.SWEEPS])
def test_formulas_grow_as_the_ops_are_said_to(op, make, sizes, grown):
    """What a case of twice the size must do: at least as much, in what is a factor twice."""
    small = {name: max(2, size // 32) for name, size in sizes.items()}
    least = make(**small)
    for what in grown:
        more = make(**small | {what: 2 * small[what]})
        assert 1 < more.flops / least.flops <= 8 and more.bytes > least.bytes, what


# -------------------------------------------------------------------------------------------------- the step by k and n


def test_the_step_by_k_and_n(tmp_path):
    assert "bench.py --op rsgd" in cost_tables.step_grid(None, tmp_path)
    rows = [{"case": f"C={(1 << 23) // (k * n) + more} k={k} n={n} float32", "contender": contender, "p50_ms": ms,
             "of_bound": 4 / ms}
            for k, n, more in ((1, 64, 0), (8, 64, 0), (8, 128, 0), (8, 256, 1))
            for contender, ms in (("ours: geodesic", 8.0), ("ours: qr", 9.0), ("floor: torch SGD(fused=True)", 5.0))]
    (tmp_path / "rsgd.json").write_text(json.dumps({"environment": WHERE, "rows": rows}))
    lines = cost_tables.step_grid(lambda where: where["cpu"], tmp_path).splitlines()
    assert lines[0] == "| | n = 64 | n = 128 |"
    assert lines[2:4] == ["| k = 1 | 2.00, 1.60 |  |", "| k = 8 | 2.00, 1.60 | 2.00, 1.60 |"]
    from bench_rsgd import GRID
    assert GRID == cost_tables.STEP_GRID


# --------------------------------------------------------------------------------------------------------- overhead


def test_every_op_has_a_tiny_call():
    made = overhead.functions()
    ops = {op for _, op in made} - set(cost_tables.TORCH)
    families = Path(__file__).parents[1] / "shim"
    assert ops == {path.stem for path in families.glob("*/*.c") if path.parent.name != "contract"}
    for row in overhead.measure(made, 1):
        assert 0 < row["us"] < math.inf and (row["beyond_us"] == 0) == (row["op"] in cost_tables.TORCH), row
        assert ("added_us" in row) == (row["op"] not in cost_tables.TORCH), row


def test_overhead_in_a_table(tmp_path):
    rows = [{"what": "forward", "op": op, "us": us, "beyond_us": us - 4} | more for op, us, more in (
        ("torch.mm", 4.0, {}), ("logits", 10.0, {"added_us": 2.5}), ("rsgd", 30.0, {"added_us": 15.1}))]
    text = written(tmp_path, "overhead", rows)
    assert "| torch.mm | 4.0 µs |" in text and "| `logits` | + 6.0 (2.5) µs |" in text
    assert "More than 15 µs are added: `rsgd` forward." in text and "import" not in text
    seconds = overhead.import_seconds(1)
    assert 0 < seconds["torch_subspace"] < seconds["torch"]
    text = written(tmp_path, "overhead", rows, import_s={"torch": 1.234, "torch_subspace": 0.0456})
    assert "`import torch_subspace` takes 0.046 s of a processor over torch's own 1.23 s." in text
