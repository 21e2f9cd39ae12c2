"""What the ops reach on a GPU beside what DESIGN wants of them: results/gpu.md from results/*_cuda.json.

    python tests/bench/gpu_table.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
# op, start of the case's name, our contender, what was promised: {key: (what, limit)}; ms hold for an H200
WANTED = [
    ("rsgd", "C=1000 k=8 n=2048 ", "ours: geodesic", {"p50_ms": ("≤ 110 µs on an H200", 0.110),
                                                      "over": ("≤ 1.4 × the traffic", 1.4)}),
    ("sinkhorn", "n=1024 ", "ours", {"p50_ms": ("≤ 0.5 ms on an H200", 0.5)}),
]
UNVERIFIED = "# On a GPU\n\nNo GPU has run this: the figures of DESIGN are unverified.\n"


def promises(op, row, device):
    """What was promised of a row, and whether it holds; "" where nothing was."""
    words = []
    for wanted_op, case, contender, limits in WANTED:
        if (op, contender) != (wanted_op, row["contender"]) or not row["case"].startswith(case):
            continue
        for key, (what, limit) in limits.items():
            value = 1 / row["of_bound"] if key == "over" else row[key]
            if key == "p50_ms" and "H200" not in device:
                words.append(f"{what}: another GPU")
            else:
                words.append(f"{what}: {'reached' if value <= limit else 'missed'} ({value:.3g})")
    return "; ".join(words)


def best_other(rows, case):
    """The fastest contender of a case that is neither ours nor a floor."""
    others = [row for row in rows if row["case"] == case and "p50_ms" in row
              and not row["contender"].startswith(("ours", "floor"))]
    return min(others, key=lambda row: row["p50_ms"], default=None)


def line(op, row, rows, device):
    """A row of the table."""
    if "missing" in row:
        return f"| `{op}` | {row['case']} | {row['contender']} | {row['missing']} | | | | |"
    rates = [f"{row[key]:.4g} {unit}" for key, unit in (("gb_s", "GB/s"), ("tflop_s", "TFLOP/s")) if key in row]
    share = f"{row['of_bound']:.0%}" if "of_bound" in row else ""
    other = best_other(rows, row["case"])
    against = f"{other['p50_ms'] / row['p50_ms']:.2f} × {other['contender']}" if other else ""
    scale, unit = (1e3, "µs") if row["p50_ms"] < 1 else (1, "ms")
    low, middle, high = (f"{row[key] * scale:.4g}" for key in ("p20_ms", "p50_ms", "p80_ms"))
    time = f"{middle} {unit} ({low} to {high})"
    return (f"| `{op}` | {row['case']} | {row['contender']} | {time} | {', '.join(rates)} | {share} | {against} | "
            f"{promises(op, row, device)} |")


def place(where):
    """GPU, versions, clocks and ceilings of a run, in two lines."""
    known = [f"{where['device']} ({where['multiprocessors']} multiprocessors, {where['memory_gib']:.0f} GiB, "
             f"{where['l2_mib']:.0f} MiB of L2)", f"CUDA {where['cuda']}", f"torch {where['torch']}"]
    known += [f"{name.replace('clocks.', 'clock ')} {where[name]}" for name in
              ("driver version", "clocks.max.sm", "clocks.mem", "power.limit") if name in where]
    top = ", ".join(f"{name} {value / 1e12:.3g} {'TB/s' if name in ('copy', 'sum') else 'TFLOP/s'}"
                    for name, value in where["ceilings"].items())
    return f"{'; '.join(known)}; commit {where['commit']}; {where['date'][:10]}.", f"Measured ceilings: {top}."


def write(results=RESULTS):
    """Write gpu.md, if there are results; returns it."""
    found = [(path.stem.removesuffix("_cuda"), json.loads(path.read_text()))
             for path in sorted(results.glob("*_cuda.json"))]
    if not found:
        return UNVERIFIED
    order = {op: i for i, (op, *_) in enumerate(WANTED)}
    found.sort(key=lambda pair: order.get(pair[0], len(order)))
    lines = ["# On a GPU", "",
             "Time of a call on the GPU, the cache swept before it: median (p20 to p80). Rate: the least bytes and "
             "flops of the case over the median; share: of the measured ceiling that binds.", "",
             "| op | case | | time | rate | share | against the best other | promised |",
             "|---|---|---|---|---|---|---|---|"]
    places = {}
    for op, one in found:
        where, rows = one["environment"], one["rows"]
        told, top = place(where)
        places.setdefault((told, top), []).append(op)
        lines += [line(op, row, rows, where["device"]) for row in rows
                  if row["contender"].startswith(("ours", "floor"))]
    for (told, top), ops in places.items():
        lines += ["", f"{', '.join(ops)}: {told}", top]
    text = "\n".join(lines) + "\n"
    (results / "gpu.md").write_text(text)
    return text


if __name__ == "__main__":
    print(write())
