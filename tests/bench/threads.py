"""Every op with one thread and with two, by turns: which case gains, and which is slower with two.

    python tests/bench/threads.py            # writes tests/bench/results/threads.json; about four minutes
    python tests/bench/threads.py --op rsgd --quick

Ours of every case of every bench, the least of several samples, as bench.py builds it; checks are that one's. Two rows
of the machine itself, a sum that no cache holds and a matrix product, say what two threads can bring at all. A case is
slower if its work takes more than 100 µs and two threads take longer than one by more than a twentieth. `make bench`
names those, no test does.
"""

import argparse
import json
import math
import sys
import warnings

import bench
import harness
import torch
from cost_tables import PRODUCT, RESULTS, told


def measure(function, seconds, most=30):
    """{threads: ms of a call}."""
    torch.set_num_threads(1)
    cost = min(harness.timed(function, 1) for _ in range(2))
    repeats = max(1, math.ceil(2e-3 / cost))
    found = {1: math.inf, 2: math.inf}
    for _ in range(min(max(3, int(seconds / (2 * cost * repeats))), most)):
        for threads in found:
            torch.set_num_threads(threads)
            found[threads] = min(found[threads], 1e3 * harness.timed(function, repeats))
    return found


def machine():
    """What any op is made of."""
    a, b = torch.ones(2, 1 << 24)
    c, d = torch.ones(2, 1536, 1536)
    return {"a sum in place": lambda: a.add_(b), PRODUCT: lambda: c @ d}


def rows(ops, quick):
    """One row a case, printed as it comes."""
    seconds = 0.3 if quick else 2.0
    jobs = [("machine", name, lambda f=f: f) for name, f in machine().items()]
    for op in ops:
        for case in [case for case in bench.cases(op, "cpu") if case.pictured][: 1 if quick else None]:
            ours = next(c for c in case.contenders if c.name.startswith("ours"))
            jobs.append((op, case.name, ours.build))
    for op, case, build in jobs:
        one, two = measure(build(), seconds).values()
        print(f"{op:<21} {case:<64} {one:10.4g} ms {two:10.4g} ms  {one / two:5.2f} ×", flush=True)
        yield {"op": op, "case": case, "one_ms": float(f"{one:.4g}"), "two_ms": float(f"{two:.4g}")}


def main():
    """Measure, name, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=bench.OPS, action="append", help="this op only (may be given again)")
    parser.add_argument("--quick", action="store_true", help="first case of an op, short timing, nothing is written")
    args = parser.parse_args()
    if torch.get_num_threads() < 2:
        sys.exit("threads: this machine, or OMP_NUM_THREADS, has one thread: nothing was measured")
    warnings.filterwarnings("ignore", category=FutureWarning)
    where = harness.environment("cpu", 2)
    found = list(rows(args.op or bench.OPS, args.quick))
    print(f"\n{told(found)}")
    if not args.quick and not args.op:
        (RESULTS / "threads.json").write_text(json.dumps({"environment": where, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    harness.as_chosen_at_load()
    main()
