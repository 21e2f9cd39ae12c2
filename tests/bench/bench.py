"""Benchmarks of every op against what else there is, as ratios within one run.

    python tests/bench/bench.py                       # all ops: half an hour on two cores with nothing else to do
    python tests/bench/bench.py --op rsgd --quick     # a first look at one
    python tests/bench/bench.py --device cuda         # on a GPU (see gpu_timing.py): under ten minutes
    python tests/bench/bench.py --device cuda --missing   # only what the last one did not reach, or got no time of ours

Contenders are checked against a float64 reference first, then timed in turn. The rows go to results/<op>.json, with
the machine, versions and commit, and as a picture to results/<op>.png; those of another processor, that were there, are
kept (processors.py). Those of a GPU go to <op>_cuda.json, after every case, and to the table gpu.md. There the first
case of every op comes before any op's second.
"""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import gpu_table
import gpu_timing
import harness
import processors
import torch

HERE = Path(__file__).resolve().parent
OPS = sorted(harness.FILES)
FIRST = (  # on a GPU, which may be lent for some minutes only
    "rsgd", "logits", "cross_entropy", "sinkhorn", "coding_rate", "coding_rate_soft", "tucker_linear", "tucker_conv")
HANGS = 100  # seconds of a case on a GPU above which it is given up


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, action="append", help="this op only (may be given again)")
    parser.add_argument("--quick", action="store_true", help="first case of an op, short timing, nothing is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=540, help="on a GPU: no case begins later than this")
    parser.add_argument("--missing", action="store_true", help="on a GPU: keep the rows that are there")
    parser.add_argument("--after", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the rows and pictures")
    parser.add_argument("--peak", nargs=3, metavar=("OP", "CASE", "CONTENDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(op, device):
    """The cases of an op's bench file."""
    return importlib.import_module(harness.FILES[op].stem).cases(device)


def find(op, device, case, contender):
    """One contender by its names."""
    case = next(c for c in cases(op, device) if c.name == case)
    return next(c for c in case.contenders if c.name == contender)


def peak_in_new_process(op, args, case, contender):
    """Peak memory of a contender's function, measured by this file in a process of its own."""
    # memory that is freed goes back to the system at once, or it would hide what the next call takes
    env = {name: value for name, value in os.environ.items() if name not in harness.KEEPS_PAGES}
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--threads", str(args.threads), "--peak", op, case, contender]
    return int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[-1])


def show(case, rows, verdicts):
    """Print one case."""
    print(f"\n{case.name}")
    width = max(len(row["contender"]) for row in rows)
    loop = "loop" if any("loop_ms" in row for row in rows) else ""
    print(f"  {'':<{width}}  {'p20':>9} {'p50':>9} {'p80':>9} {loop:>9} ms  {'bound':>6} {'error':>8} "
          f"{'peak':>9} {'extra':>9} {'saved':>9} MiB")
    for row in rows:
        name = f"  {row['contender']:<{width}}"
        if "missing" in row:
            print(f"{name}  missing: {row['missing']}")
            continue
        times = " ".join(f"{row[key]:9.4f}" if key in row else " " * 9
                         for key in ("p20_ms", "p50_ms", "p80_ms", "loop_ms"))
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
              f"{v['reached']}")


def bench(op, args):
    """Run, print and store one op."""
    where = harness.environment(args.device, args.threads)
    print(f"\n=== {op}: {', '.join(f'{k} {v}' for k, v in where.items() if k not in ('blas', 'system'))}")
    rows, verdicts, work, pictured = [], [], {}, set()
    for case in cases(op, args.device)[: 1 if args.quick else None]:
        torch._dynamo.reset()
        found = harness.run(case, 0.2 if args.quick else 1.0,
                            lambda name, case=case: peak_in_new_process(op, args, case.name, name))
        judged = harness.verdicts(case, found)
        show(case, found, judged)
        rows += found
        verdicts += judged
        work[case.name] = {"bytes": case.bytes, "flops": case.flops}
        pictured |= {case.name} if case.pictured else set()
    if not args.quick:
        processors.keep(args.results, op, where)
        store(args.results, op, where, rows, verdicts, work=work)
        draw(args.results, op, op, where, [row for row in rows if row["case"] in pictured])


def planned(ops):
    """(op, case) in order of importance: the first case of every op, then the second, ..."""
    turns = itertools.zip_longest(*([(op, case) for case in cases(op, "cuda")] for op in ops))
    return [pair for turn in turns for pair in turn if pair]


def kept(args, op, where):
    """Rows of an earlier run on the same GPU, commit and torch; of its cases those that have all times of ours."""
    path = args.results / f"{op}_cuda.json"
    if not args.missing or not path.exists():
        return []
    found = json.loads(path.read_text())
    if any(found["environment"].get(key) != where.get(key) for key in ("device", "commit", "torch")):
        return []
    wrong = {row["case"] for row in found["rows"] if row["contender"].startswith("ours") and "missing" in row}
    return [row for row in found["rows"] if args.after or row["case"] not in wrong]


def go_on(after, end):
    """With the cases from this one on, in a process that has the GPU anew: a kernel has failed or hangs."""
    print("on in a new process", flush=True)
    left = ["--missing", "--after", str(after), "--seconds", f"{end - time.perf_counter():.0f}"]
    os.execv(sys.executable, [sys.executable, *sys.argv, *left])


def bench_on_gpu(ops, args, top, end):
    """The same on a GPU. What DESIGN promises is of a CPU, but for the figures in gpu_table.py."""
    where = harness.environment("cuda", args.threads) | {"ceilings": top}
    print(f"\n=== {', '.join(f'{k} {v}' for k, v in where.items() if k not in ('blas', 'system', 'ceilings'))}")
    plan = planned(ops)[: len(ops) if args.quick else None]
    rows = {op: kept(args, op, where) for op in ops}
    if not args.quick:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / "plan.json").write_text(json.dumps([(op, case.name) for op, case in plan]))
    for i, (op, case) in enumerate(plan):
        if i < args.after or case.name in {row["case"] for row in rows[op]}:
            continue
        if time.perf_counter() > end:
            print(f"\n{op}, {case.name}: not reached")
            continue
        print(f"\n{op}")
        torch._dynamo.reset()

        def keep(found, op=op, case=case):
            rows[op] += found
            show(case, found, [])
            sys.stdout.flush()
            if not args.quick:  # early: the machine may be taken back
                store(args.results, f"{op}_cuda", where, rows[op], [])
                gpu_table.write(args.results)

        def give_up(why, case=case, keep=keep, i=i):
            keep([{"case": case.name, "contender": c.name, "missing": why} for c in case.contenders])
            go_on(i + 1, end)

        clock = threading.Timer(HANGS, give_up, [f"took more than {HANGS} s"])
        clock.start()
        try:
            found = harness.run_on_gpu(case, 0.2 if args.quick else 1.0, top)
        except RuntimeError as problem:
            give_up(harness.said(problem))
        finally:
            clock.cancel()
        keep(found)
        if gpu_timing.broken():
            go_on(i + 1, end)
    for op in () if args.quick else filter(rows.get, ops):
        draw(args.results, f"{op}_cuda", op, where, rows[op])


def store(results, name, where, rows, verdicts, **more):
    """Write the rows."""

    def rounded(rows):
        return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]

    results.mkdir(parents=True, exist_ok=True)
    found = {"environment": rounded([where])[0], "rows": rounded(rows), "targets": rounded(verdicts), **more}
    (results / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def draw(results, name, op, where, rows):
    """Write the picture, where matplotlib is."""
    try:
        import chart
    except ImportError as error:
        print(f"no picture: {error}")
    else:
        chart.draw(results / f"{name}.png", op, where, rows)


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
    if args.device == "cpu":
        for op in args.op or OPS:
            bench(op, args)
    elif not torch.cuda.is_available():
        print("there is no GPU: nothing was measured")
    else:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 means float32
        top = gpu_timing.ceilings()
        print(", ".join(f"{name} {value / 1e12:.3g} T{'B' if name in ('copy', 'sum') else 'FLOP'}/s"
                        for name, value in top.items()))
        ops = args.op or [*FIRST, *(op for op in OPS if op not in FIRST)]
        bench_on_gpu(ops, args, top, start + args.seconds)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    harness.as_chosen_at_load(**{} if "--peak" in sys.argv else harness.KEEPS_PAGES)
    main()
