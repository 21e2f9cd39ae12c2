"""How the cost of each op grows with each of its sizes: slopes of log time over log size, beside those of its formulas.

    python tests/bench/growth.py           # writes tests/bench/results/growth.json and .png; about four minutes
    python tests/bench/growth.py --quick   # a look: three sizes, few samples, nothing is written

One size is doubled, the others stay. The formula's cost is the machine's limit for what the op must move and multiply
(work.py): the longer of bytes over bandwidth and flops over the rate of a matrix product, both measured here, so its
slope is 1 in what is a factor of both and something between in k or d, where one takes over from the other. A slope is
that of the least-squares line. Where the op's differs by more than a twentieth, its efficiency changes with the size.
"""

import argparse
import json
import math
import warnings

import harness
import torch
from cost_tables import RESULTS, slope, within

# harness finds these
# isort: split
import bench_coding_rate
import bench_coding_rate_soft
import bench_cross_entropy
import bench_gated_cosine
import bench_hadamard
import bench_logits
import bench_newton_schulz
import bench_rsgd
import bench_sigreg
import bench_sinkhorn
from adapted_layers import case as adapted


def doubled(first, count=6):
    """`count` sizes."""
    return [first << i for i in range(count)]


def logits(b, n, c, k):
    """Forward and backward."""
    return list(bench_logits.pair(b, n, c, k, "cpu", bench_logits.other, compile=False))[1]


SWEEPS = [  # op, a case of given sizes, the sizes, and of those that grow their values
    ("logits", logits, {"b": 128, "n": 512, "c": 500, "k": 8},
     {"c": doubled(250), "k": doubled(2), "n": doubled(256), "b": doubled(64)}),
    ("cross_entropy", lambda b, n, c, k: bench_cross_entropy.case(b, n, c, k, "cpu", compile=False),
     {"b": 128, "n": 256, "c": 4000, "k": 4},
     {"c": doubled(1000), "k": doubled(1), "n": doubled(128), "b": doubled(64)}),
    ("rsgd", lambda c, k, n: bench_rsgd.case(c, k, n, "cpu", peers=False), {"c": 400, "k": 8, "n": 1024},
     {"c": doubled(200), "k": doubled(2), "n": doubled(256)}),
    ("coding_rate", lambda n, d, k: bench_coding_rate.case(n, d, k, "cpu"), {"n": 4096, "d": 128, "k": 8},
     {"n": doubled(4096), "d": doubled(32)}),
    ("coding_rate_soft", lambda n, d, k: bench_coding_rate_soft.case("soft", n, d, k, "cpu"),
     {"n": 1024, "d": 64, "k": 64}, {"n": doubled(512), "d": doubled(16), "k": doubled(64)}),
    ("sinkhorn", lambda n: bench_sinkhorn.case(n, "cpu", False), {"n": 512}, {"n": doubled(256, 5)}),
    ("sigreg", lambda n, d, slices: bench_sigreg.case(1, n, d, slices, "cpu", False),
     {"n": 512, "d": 256, "slices": 256}, {"n": doubled(256), "d": doubled(128), "slices": doubled(128)}),
    ("gated_cosine", lambda b, n, k: bench_gated_cosine.case(b, n, k, "cpu", False), {"b": 256, "n": 512, "k": 128},
     {"b": doubled(128), "n": doubled(256), "k": doubled(64)}),
    ("newton_schulz", lambda n: bench_newton_schulz.case(n, n, "cpu", 1, 1), {"n": 256}, {"n": doubled(64)}),
    ("hadamard", lambda v, n: bench_hadamard.case(v, n, "cpu"), {"v": 1024, "n": 1024},
     {"v": doubled(512), "n": doubled(256)}),
    ("tucker_linear", lambda b, n: adapted(f"T={b} n={n}", (torch.nn.Linear, n, n), (b, n), "cpu"),
     {"b": 256, "n": 512}, {"b": doubled(128), "n": doubled(512, 4)}),
]


def limits():
    """Bytes and flops in a second."""
    found = harness.bounds(harness.Case("", [], bytes=3 << 26, flops=2 * harness.SIDE**3))
    times = {name: min(harness.timed(f, 1) for _ in range(5)) for name, (f, _) in found.items()}
    product = min(seconds for name, seconds in times.items() if name.startswith("product"))
    return (3 << 26) / times["bandwidth"], 2 * harness.SIDE**3 / product


def sweep(op, make, sizes, what, values, rounds, rates):
    """A row: the times of all sizes, by turns, and what the formulas make of them."""
    made = [make(**{**sizes, what: value}) for value in values]
    least = [max(case.bytes / rates[0], case.flops / rates[1]) for case in made]
    ours = [next(c for c in case.contenders if c.name.startswith("ours")).build() for case in made]
    repeats = [max(1, math.ceil(3e-3 / max(harness.timed(f, 1), harness.timed(f, 1)))) for f in ours]
    taken = [math.inf] * len(ours)
    for _ in range(rounds):
        for i, function in enumerate(ours):
            taken[i] = min(taken[i], harness.timed(function, repeats[i]))
    rest = " ".join(f"{name}={value}" for name, value in sizes.items() if name != what)
    return {"op": op, "what": what, "rest": rest, "sizes": values, "ms": [float(f"{1e3 * t:.4g}") for t in taken],
            "least_ms": [float(f"{1e3 * t:.4g}") for t in least], "slope": round(slope(values, taken), 3),
            "formula": round(slope(values, least), 3)}


def draw(rows, path):
    """A panel a sweep: times, and the machine's limit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 6
    lines = -(-len(rows) // columns)
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 8.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(lines, columns, figsize=(2.5 * columns, 2.1 * lines), layout="constrained")
    for axis, row in zip(axes.flat, rows):
        axis.plot(row["sizes"], row["ms"], color="#1f6fb2", marker="o", markersize=3, label=f"ours: {row['slope']:.2f}")
        axis.plot(row["sizes"], row["least_ms"], color="#9aa1ab", label=f"limit: {row['formula']:.2f}")
        axis.set(title=f"{row['op']}: {row['what']}", xscale="log", yscale="log")
        axis.set_xticks(row["sizes"], row["sizes"])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=7)
    for axis in axes.flat[len(rows):]:
        axis.set_axis_off()
    figure.supylabel("ms", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main():
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=[op for op, *_ in SWEEPS], action="append", help="this op only")
    parser.add_argument("--quick", action="store_true", help="three sizes, few samples, nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(args.threads)
    where, rates, rows = harness.environment("cpu", args.threads), limits(), []
    print(f"bandwidth {rates[0] / 1e9:.1f} GB/s, products {rates[1] / 1e9:.1f} GFLOP/s")
    for op, make, sizes, grown in SWEEPS:
        for what, values in grown.items() if not args.op or op in args.op else ():
            values = values[:3] if args.quick else values
            rows.append(row := sweep(op, make, sizes, what, values, 3 if args.quick else 12, rates))
            print(f"{op:<17} {what:<7} {row['slope']:6.3f}, formulas {row['formula']:6.3f} "
                  f"{'' if within(row) else ' differs'}  {row['ms']} of {row['least_ms']} ms", flush=True)
    if not args.quick and not args.op:
        found = {"environment": where, "bandwidth_gb_s": round(rates[0] / 1e9, 2),
                 "product_gflop_s": round(rates[1] / 1e9, 2), "rows": rows}
        (RESULTS / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(rows, RESULTS / "growth.png")


if __name__ == "__main__":
    harness.as_chosen_at_load(**harness.KEEPS_PAGES)
    main()
