"""Benchmarks of every op against what else there is, as ratios within one run.

    python tests/bench/bench.py                       # all ops: under ten minutes on two cores
    python tests/bench/bench.py --op rsgd --quick     # a first look at one

Contenders are checked against a float64 reference first, then timed in turn. The rows go to results/<op>.json, with
the machine, versions and commit, and as a picture to results/<op>.png.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import harness
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # tests/reference.py
OPS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, action="append", help="this op only (may be given again)")
    parser.add_argument("--quick", action="store_true", help="first case of an op, short timing, nothing is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the rows and pictures")
    parser.add_argument("--peak", nargs=3, metavar=("OP", "CASE", "CONTENDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(op, device):
    """The cases of an op's bench file."""
    return importlib.import_module(f"bench_{op}").cases(device)


def find(op, device, case, contender):
    """One contender by its names."""
    case = next(c for c in cases(op, device) if c.name == case)
    return next(c for c in case.contenders if c.name == contender)


def peak_in_new_process(op, args, case, contender):
    """Peak memory of a contender's function, measured by this file in a process of its own."""
    if args.device == "cuda":
        return harness.peak_memory(find(op, args.device, case, contender).build(), args.device)
    # memory that is freed goes back to the system at once, or it would hide what the next call takes
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--threads", str(args.threads), "--peak", op, case, contender]
    return int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[-1])


def show(case, rows, verdicts):
    """Print one case."""
    print(f"\n{case.name}")
    width = max(len(row["contender"]) for row in rows)
    print(f"  {'':<{width}}  {'p20':>9} {'p50':>9} {'p80':>9} ms  {'bound':>6} {'error':>8} "
          f"{'peak':>9} {'extra':>9} {'saved':>9} MiB")  # fmt: skip
    for row in rows:
        name = f"  {row['contender']:<{width}}"
        if "missing" in row:
            print(f"{name}  missing: {row['missing']}")
            continue
        times = " ".join(f"{row[key]:9.3f}" for key in ("p20_ms", "p50_ms", "p80_ms"))
        bound = f"{row['of_bound']:.0%}" if "of_bound" in row else ""
        error = f"{row['error']:.0e}" if "error" in row else ""
        keys = ("peak_mib", "beyond_results_mib", "saved_mib")
        memory = [f"{row[key]:9.1f}" if key in row else " " * 9 for key in keys]
        print(f"{name}  {times}     {bound:>6} {error:>8} {' '.join(memory)}  {row.get('note', '')}".rstrip())
    for v in verdicts:
        if v["ratio"] is None:
            print(f"  not comparable: {v['ours']} against {v['against']}")
            continue
        sense = "≤" if v["sense"] == "<=" else "≥"
        what = f"{v['ours']} against {v['against']}" if v["sense"] == "<=" else f"{v['against']} against {v['ours']}"
        print(f"  {v['of']}, {what}: {v['ratio']:.2f} (must {sense} {v['must']:g}, stretch {sense} {v['stretch']:g}): "
              f"{v['reached']}")  # fmt: skip


def bench(op, args):
    """Run, print and store one op."""
    where = harness.environment(args.device, args.threads)
    print(f"\n=== {op}: {', '.join(f'{k} {v}' for k, v in where.items() if k not in ('blas', 'system'))}")
    rows, verdicts = [], []
    chosen = cases(op, args.device)[: 1 if args.quick else None]
    for case in chosen:
        torch._dynamo.reset()
        found = harness.run(case, args.device, 0.2 if args.quick else 1.0,
                            lambda name, case=case: peak_in_new_process(op, args, case.name, name))  # fmt: skip
        judged = harness.verdicts(case, found)
        show(case, found, judged)
        rows += found
        verdicts += judged
    if args.quick:
        return
    args.results.mkdir(parents=True, exist_ok=True)
    name = op if args.device == "cpu" else f"{op}_{args.device}"
    rounded = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    shown = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in verdicts]
    text = json.dumps({"environment": where, "rows": rounded, "targets": shown}, indent=1, ensure_ascii=False)
    (args.results / f"{name}.json").write_text(text + "\n")
    try:
        import chart
    except ImportError as error:
        print(f"no picture: {error}")
    else:
        chart.draw(args.results / f"{name}.png", op, where, rows)


def main():
    """Run what the command line asks for."""
    args = arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(args.threads)
    if args.peak:
        op, case, contender = args.peak
        print(harness.peak_memory(find(op, "cpu", case, contender).build(), "cpu"))
        return
    start = time.perf_counter()
    for op in args.op or OPS:
        bench(op, args)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
