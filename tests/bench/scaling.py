"""How time and peak memory of the coding rates grow with points, features and classes: a picture and its numbers.

    python tests/bench/scaling.py          # writes tests/bench/results/scaling.png and scaling.json

Each point is the median of a few calls (forward and gradients) by turns, contenders of bench_coding_rate.py,
bench_coding_rate_soft.py and bench_sinkhorn.py at other sizes. Memory is the highest resident size during a call less
that before it, results included; below 0.1 MiB it can't be told.
"""

import json
import statistics
import time
from pathlib import Path

import matplotlib
import torch

HERE = Path(__file__).resolve().parent
matplotlib.use("Agg")
from harness import as_chosen_at_load, environment, peak_memory  # noqa: E402, I001  (first: it finds the benches)
import bench_coding_rate as hard  # noqa: E402
import bench_coding_rate_soft as soft  # noqa: E402
import bench_sinkhorn as plans  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = HERE / "results"
OURS, ROUNDS = "ours", 5
COLORS = {OURS: "#1f6fb2", "eager, sorted and padded": "#b7791f", "loop over classes": "#c2410c",
          soft.OFFICIAL: "#c2410c", soft.SPLIT: "#b7791f", plans.PUBLIC: "#c2410c",
          "eager implicit gradient": "#b7791f"}


def labelled(n, d, k):
    """Rc of labels and its gradient, by three ways."""
    z, labels = hard.inputs(n, d, k, "cpu")
    most = -(-n // k)

    def step(function):
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(function(leaf, labels, k, most), leaf)

    ways = {OURS: hard.ours, "eager, sorted and padded": hard.padded, "loop over classes": hard.loop}
    return {name: lambda f=f: step(f) for name, f in ways.items()}


def mlc(n, d, k):
    """Rc of n soft classes and its gradients."""
    z, weights = soft.problem(n, d, n, "cpu")
    return {name: lambda f=soft.FORMS[name]: f(z, weights) for name in (OURS, soft.OFFICIAL, soft.SPLIT)}


def projection(n, d, k):
    """A symmetric plan and its gradient."""
    scores, g = plans.affinity(n, "cpu"), torch.randn(n, n)

    def step(function):
        leaf = scores.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, g + g.mT)

    ways = {OURS: lambda s: plans.sinkhorn(s, eta=plans.ETA, symmetric=True), plans.PUBLIC: plans.half_steps,
            "eager implicit gradient": plans.Implicit.apply}
    return {name: lambda f=f: step(f) for name, f in ways.items()}


SWEEPS = [  # title, maker, what grows, its values, the rest
    ("labels: d=128, K=10", labelled, "n", (512, 1024, 2048, 4096, 8192), {"d": 128, "k": 10}),
    ("labels: n=2048, K=10", labelled, "d", (32, 64, 128, 256, 512, 1024), {"n": 2048, "k": 10}),
    ("labels: n=2048, d=128", labelled, "k", (1, 4, 16, 64, 256, 1024), {"n": 2048, "d": 128}),
    ("MLC: d=64, K=n", mlc, "n", (128, 256, 512, 1024), {"d": 64, "k": 0}),
    ("MLC: n=K=512", mlc, "d", (16, 32, 64, 128, 256), {"n": 512, "k": 0}),
    ("sinkhorn, n by n", projection, "n", (128, 256, 512, 1024, 2048), {"d": 0, "k": 0}),
]


def measure(make, sizes):
    """{contender: (median ms, MiB)} at one size."""
    ways = make(**sizes)
    found = {name: [] for name in ways}
    for function in ways.values():
        function()
    for _ in range(ROUNDS):
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            found[name].append(time.perf_counter() - start)
    return {name: (1e3 * statistics.median(taken), max(peak_memory(ways[name], "cpu") / 2**20, 0.1))
            for name, taken in found.items()}


def main():
    """Measure, write, draw."""
    rows = []
    for title, make, what, values, rest in SWEEPS:
        for value in values:
            for name, (ms, mib) in measure(make, {**rest, what: value}).items():
                rows.append({"sweep": title, what: value, "contender": name, "p50_ms": ms, "peak_mib": mib})
            print(f"{title}, {what}={value}", flush=True)
    found = {"environment": environment("cpu", torch.get_num_threads()), "rows": rows}
    (RESULTS / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(3.1 * len(SWEEPS), 5.6), layout="constrained", sharex="col")
    for (upper, lower), (title, _, what, values, _) in zip(axes.T, SWEEPS):
        mine = [row for row in rows if row["sweep"] == title]
        for name in dict.fromkeys(row["contender"] for row in mine):
            line = [row for row in mine if row["contender"] == name]
            for axis, key in ((upper, "p50_ms"), (lower, "peak_mib")):
                axis.plot([row[what] for row in line], [row[key] for row in line], color=COLORS[name], marker="o",
                          markersize=3.5, label=name)
        upper.set(title=title, xscale="log", yscale="log")
        lower.set(xscale="log", yscale="log", xlabel=what.upper() if what == "k" else what)
        lower.set_xticks(values, values)
        lower.minorticks_off()
        upper.legend(frameon=False, fontsize=7.5)
    axes[0, 0].set_ylabel("forward and gradients (ms)")
    axes[1, 0].set_ylabel("peak beyond the inputs (MiB)")
    figure.savefig(RESULTS / "scaling.png", dpi=90)


if __name__ == "__main__":
    as_chosen_at_load()
    main()
