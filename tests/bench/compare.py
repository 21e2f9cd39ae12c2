"""Two runs of the benchmarks side by side: what has changed by more than a tenth.

    python tests/bench/compare.py HEAD~5 tests/bench/results      # commits or folders: what was, what is
    make bench-compare OLD=HEAD~5 NEW=HEAD

Runs on the same processor and number of threads are compared by their times. Other machines are compared by what a
time is of the machine's own limit, which each run measures beside its cases; rows without one, and sizes of memory,
are left to the promises: a ratio to a contender of the same run stands on any machine.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "tests/bench/results"
CHANGED = 1.1


def runs(where, root=ROOT):
    """{name of a file of rows, before it a processor's folder: its content} of a folder, or of a commit."""
    where = Path(where) if Path(where).is_dir() else where
    if isinstance(where, Path):
        paths = sorted(path.relative_to(where) for path in Path(where).rglob("*.json"))
        texts = {str(path.with_suffix("")): (where / path).read_text() for path in paths}
    else:
        def git(*command):
            return subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout

        try:
            names = git("ls-tree", "-r", "--name-only", f"{where}:{RESULTS}").split()
        except subprocess.CalledProcessError as problem:
            raise SystemExit(f"compare: {where} is neither a folder nor a commit with {RESULTS}: "
                             f"{problem.stderr.strip()}") from None
        texts = {name.removesuffix(".json"): git("show", f"{where}:{RESULTS}/{name}") for name in names
                 if name.endswith(".json")}
    found = {name: json.loads(text) for name, text in texts.items()}
    rows = {"environment", "rows", "targets"}
    return {name: run for name, run in found.items() if isinstance(run, dict) and rows <= run.keys()}


def machine(run):
    """What times depend on."""
    return tuple(run["environment"].get(key) for key in ("device", "cpu", "family", "instruction set",
                                                      "threads"))


def cost(row, alone):
    """What a row took: milliseconds, or with another machine beside it multiples of the machine's limit."""
    if not alone:
        return row.get("p50_ms")
    return 1 / row["of_bound"] if row.get("of_bound") else None


def changes(old, new):
    """(what, before, now, unit, times) of all that two runs of an op share. times > 1 is worse."""
    alone = machine(old) != machine(new)
    unit = "x the limit" if alone else "ms"
    before = {(row["case"], row["contender"]): row for row in old["rows"]}
    work = [run.get("work", {}) for run in (old, new)]
    for row in new["rows"]:
        name = (row["case"], row["contender"])
        if alone and work[0].get(row["case"]) != work[1].get(row["case"]):
            continue  # the limit is counted in another way
        pair = [cost(r, alone) for r in (before.get(name, {}), row)]
        if all(pair):
            yield " | ".join(name), *pair, unit, pair[1] / pair[0]
    promised = {(t["case"], t["ours"], t.get("of")): t for t in old.get("targets", ()) if t["ratio"]}
    for t in new.get("targets", ()):
        was = promised.get((t["case"], t["ours"], t.get("of")))
        if was and t["ratio"] and was["against"] == t["against"]:
            times = t["ratio"] / was["ratio"] if t["sense"] == "<=" else was["ratio"] / t["ratio"]
            yield f"{t['case']} | {t['ours']} : {t['against']} ({t['of']})", was["ratio"], t["ratio"], "times", times


def report(old, new):
    """Lines: by op what both have, how much, and what has changed."""
    for name in sorted(old.keys() | new.keys()):
        if name not in new or name not in old:
            yield f"{name}: only in the {'old' if name in old else 'new'} run"
            continue
        found = list(changes(old[name], new[name]))
        told = [c for c in found if not 1 / CHANGED <= c[-1] <= CHANGED]
        machines = [", ".join(str(part) for part in machine(run)[1:] if part is not None)
                    for run in (old[name], new[name])]
        where = machines[0] if len(set(machines)) == 1 else " -> ".join(machines)
        yield f"{name}: {len(told)} of {len(found)} figures have changed by more than {CHANGED - 1:.0%} ({where})"
        for what, was, now, unit, times in sorted(told, key=lambda c: -c[-1]):
            sense = f"{'worse ' if times > 1 else 'better'} {max(times, 1 / times):6.2f}"
            yield f"  {sense}   {was:10.4g} -> {now:<10.4g} {unit:<12} {what}"


def main():
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="a commit, or a folder of rows")
    parser.add_argument("new", nargs="?", default=str(ROOT / RESULTS), help="the same; default: the rows of this tree")
    args = parser.parse_args()
    old, new = runs(args.old), runs(args.new)
    if not old or not new:
        sys.exit(f"compare: no rows in {args.old if not old else args.new}")
    print("\n".join(report(old, new)))


if __name__ == "__main__":
    main()
