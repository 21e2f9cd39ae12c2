"""What threads.py, growth.py and overhead.py have found, as tables of docs/performance.md."""

import json
import math
import re
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
WORK_MS, SLOWER = 0.1, 1.05  # work that two threads should share; what is no noise
QUIET = 1.5  # times as fast is a matrix product with two threads, where nothing else runs
PRODUCT = "a matrix product"
STEP_GRID = 1 << 23  # numbers of the frames of each k and n, as in bench_rsgd.py
WITHIN = 0.05  # of a slope
GOAL = 15.0  # microseconds beyond torch's own call
TORCH = ("torch.mm", "torch linear", "torch conv2d", "torch SGD(fused=True)", "torch SGD, no gradients")


def run_of(script, results):
    """What a script has written, or None."""
    path = results / f"{script}.json"
    return json.loads(path.read_text()) if path.exists() else None


def missing(script):
    """A table that is not there."""
    return f"Not measured yet: `python tests/bench/{script}.py`."


def slower(found):
    """Rows whose work is worth two threads and gets slower by them."""
    return [row for row in found if row["op"] != "machine" and row["one_ms"] > WORK_MS
            and row["two_ms"] > SLOWER * row["one_ms"]]


def told(found):
    """The same in words."""
    names = [f"`{row['op']}` {row['case'].replace(' float32', '')} ({row['two_ms'] / row['one_ms']:.2f} ×)"
             for row in slower(found)]
    gain = next((row["one_ms"] / row["two_ms"] for row in found if row["case"] == PRODUCT), QUIET)
    loud = "" if gain >= QUIET else f" Other work ran beside this: two threads made {PRODUCT} {gain:.2f} times as fast."
    return f"Slower with two threads than with one, of work above 100 µs: {'; '.join(names) or 'none'}.{loud}"


def threads(place, results=RESULTS):
    """The first case of every op, and what is slower."""
    if not (run := run_of("threads", results)):
        return missing("threads")
    lines, seen = ["| op, size | one thread | two threads | gain |", "|---|---|---|---|"], set()
    for row in run["rows"]:
        if row["op"] not in seen or row["op"] == "machine":
            seen.add(row["op"])
            what = row["case"].replace(" float32", "")
            what = f"the machine: {what}" if row["op"] == "machine" else f"`{row['op']}` {what}"
            lines.append(f"| {what} | {row['one_ms']:.4g} ms | {row['two_ms']:.4g} ms | "
                         f"{row['one_ms'] / row['two_ms']:.2f} × |")
    return "\n".join([*lines, "", told(run["rows"]), "", place(run["environment"])])


def step_grid(place, results=RESULTS):
    """The step's time by k and n, of its limit and of torch's fused SGD."""
    run = run_of("rsgd", results) or {"rows": []}
    found = {}
    for row in run["rows"]:
        sizes = re.fullmatch(r"C=(\d+) k=(\d+) n=(\d+) float32", row["case"])
        if sizes and row["contender"] in ("ours: geodesic", "floor: torch SGD(fused=True)") and "p50_ms" in row:
            classes, k, n = map(int, sizes.groups())
            if classes * k * n == STEP_GRID:
                found.setdefault((k, n), {})[row["contender"].partition(":")[0]] = row
    if not found:
        return "Not measured yet: `python tests/bench/bench.py --op rsgd`."
    widths = sorted({n for _, n in found})
    lines = ["| | " + " | ".join(f"n = {n}" for n in widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for k in sorted({k for k, _ in found}):
        cells = [f"{1 / own['ours']['of_bound']:.2f}, {own['ours']['p50_ms'] / own['floor']['p50_ms']:.2f}"
                 if (own := found.get((k, n))) else "" for n in widths]
        lines.append(f"| k = {k} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Medians, {STEP_GRID} numbers in all frames.", "", place(run["environment"])])


def within(row):
    """Is the op's slope the formula's, by a twentieth?"""
    return abs(row["slope"] - row["formula"]) <= WITHIN * row["formula"]


def slope(sizes, costs):
    """Of the line through the logarithms."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(c) for c in costs]).slope


def at_the_end(row):
    """The slopes over the last two doublings, where what a call costs at any size counts least."""
    sizes = row["sizes"][-3:]
    return row | {"slope": slope(sizes, row["ms"][-3:]), "formula": slope(sizes, row["least_ms"][-3:])}


def growth(place, results=RESULTS):
    """Slopes of all sweeps."""
    if not (run := run_of("growth", results)):
        return missing("growth")
    lines = ["| op | grows | from, to | others | slope | of its formulas | | at the end | of its formulas | |",
             "|---" * 10 + "|"]
    ends = [at_the_end(row) for row in run["rows"]]
    for row, end in zip(run["rows"], ends, strict=True):
        cells = [f"{r['slope']:.2f} | {r['formula']:.2f} | " +
                 ("" if within(r) else f"{r['slope'] / r['formula'] - 1:+.0%}") for r in (row, end)]
        lines.append(f"| `{row['op']}` | {row['what']} | {row['sizes'][0]}, {row['sizes'][-1]} | {row['rest']} | "
                     f"{cells[0]} | {cells[1]} |")
    good, late = (sum(map(within, found)) for found in (run["rows"], ends))
    return "\n".join([*lines, "", f"Of {len(run['rows'])} slopes {good} are those of the formulas within 5 %, and "
                      f"{late} at the end, over the last two doublings. {place(run['environment'])}", "",
                      "![cost by size beside the machine's limit](../tests/bench/results/growth.png)"])


def overhead(place, results=RESULTS):
    """What the page shows."""
    if not (run := run_of("overhead", results)):
        return missing("overhead")
    kinds = dict.fromkeys(row["what"] for row in run["rows"])
    by = {(row["what"], row["op"]): row for row in run["rows"]}
    lines = [f"| | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for op in dict.fromkeys(row["op"] for row in run["rows"]):
        cells = []
        for what in kinds:
            row = by.get((what, op))
            added = f" ({row['added_us']:.1f})" if row and "added_us" in row else ""
            ours = row and f"+ {row['beyond_us']:.1f}{added} µs"
            cells.append("" if not row else f"{row['us']:.1f} µs" if op in TORCH else ours)
        lines.append(f"| {op if op in TORCH else f'`{op}`'} | {' | '.join(cells)} |")
    over = [f"`{r['op']}` {r['what']}" for r in run["rows"] if r.get("added_us", 0) > GOAL]
    lines += ["", "In brackets what is added to the calls of the ops themselves, made as torch makes them: checks, and "
              f"torch's ops around them. More than {GOAL:.0f} µs are added: {', '.join(over) or 'none'}.", ""]
    if seconds := run.get("import_s"):
        lines += [f"`import torch_subspace` takes {seconds['torch_subspace']:.3f} s of a processor over torch's own "
                  f"{seconds['torch']:.2f} s.", ""]
    return "\n".join([*lines, place(run["environment"])])
