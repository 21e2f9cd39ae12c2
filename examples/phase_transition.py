"""How many points K-subspaces needs: planted unions of subspaces are found exactly above a number per dimension.

Points of some subspaces of dimension k, as many of each, are drawn without noise, and `KSubspaces` is to find every
label and every subspace. With k points of a subspace or fewer that is luck: whatever k points are put together, a
subspace holds them. The theorem on mixtures of low-rank Gaussians (Wang et al., 2024, arXiv 2409.02426) says that the
number needed grows linearly with k, not with the length of the points: drawn over points per dimension, the shares of
unions that are found should rise at one place for all k. Unions are drawn in three sets: how far the shares of the sets
are apart says how well the shares are known.

    python examples/phase_transition.py
"""

import argparse
import json
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.exceptions import ConvergenceWarning

import torch_subspace as ts
from torch_subspace.metrics import clustering_accuracy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FEATURES, CLUSTERS = 64, 3
DIMENSIONS = (2, 3, 4, 6, 8)
RATIOS = (0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)  # points of a subspace, per dimension


def planted(k, each, draw):
    """Points, labels and projectors of a random union."""
    frames = [np.linalg.qr(draw.randn(FEATURES, k))[0] for _ in range(CLUSTERS)]
    x = np.concatenate([draw.randn(each, k) @ frame.T for frame in frames])
    return x, np.repeat(np.arange(CLUSTERS), each), np.stack([frame @ frame.T for frame in frames])


def found(k, each, seed, starts):
    """Has every label and every subspace been found? Starts are made until one leaves nothing of the points."""
    x, label, truth = planted(k, each, np.random.RandomState(seed))
    seeds, model = np.random.RandomState(seed), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for _ in range(starts):
            other = ts.grassmann.KSubspaces(CLUSTERS, k, n_init=1, random_state=seeds).fit(x)
            if model is None or other.inertia_ < model.inertia_:
                model = other
            if model.inertia_ < 1e-20 * np.square(x).sum():
                break
    if clustering_accuracy(label, model.labels_) < 1:
        return False
    projectors = model.frames_.transpose(0, 2, 1) @ model.frames_
    order = [model.labels_[label == c][0] for c in range(CLUSTERS)]
    return bool(np.abs(projectors[order] - truth).max() < 1e-6)


def draw(path, rows):
    """The share that is found, over points and dimensions, and over points per dimension."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", width_ratios=(1, 1.2))
    colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(DIMENSIONS)))
    for k, color in zip(DIMENSIONS, colors, strict=True):
        points = [row["points"] for row in rows if row["k"] == k]
        sets = np.array([row["found"] for row in rows if row["k"] == k])
        share = sets.mean(1)
        left.scatter(points, [k] * len(points), s=70, c=share, cmap="Blues", vmin=0, vmax=1, edgecolors="0.5",
                     linewidths=0.6)
        right.fill_between(np.array(points) / k, sets.min(1), sets.max(1), color=color, alpha=0.15, linewidth=0)
        right.plot(np.array(points) / k, share, color=color, marker="o", markersize=3.5, label=f"k = {k}")
    most = np.array([0, max(DIMENSIONS) + 0.5])
    left.plot(most, most, color="#c2410c", linewidth=1)
    left.annotate("k points: from here down it is luck", (most[1] * 0.86, most[1] * 0.86), xytext=(12, -3),
                  textcoords="offset points", color="#c2410c")
    left.set(xlabel="points of each subspace", ylabel="dimension k", xlim=(0, None), ylim=(1, most[1]),
             title="share of unions found: white none, blue all")
    right.axvline(1, color="#c2410c", linewidth=1)
    right.set(xlabel="points per dimension", ylabel="share of unions found", ylim=(-0.03, 1.03),
              title="the same, over points per dimension (mean and range of three sets)")
    right.grid(alpha=0.25, linewidth=0.6)
    right.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main():
    """Measure, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=3, help="of random unions")
    parser.add_argument("--unions", type=int, default=20, help="of each size, in a set")
    parser.add_argument("--starts", type=int, default=20, help="of K-subspaces, at most")
    parser.add_argument("--output", type=Path, help="the picture, numbers beside it (default: in build/)")
    args = parser.parse_args()
    rows = []
    print(f"{'points per dimension':>22}" + "".join(f"{ratio:8g}" for ratio in RATIOS))
    for k in DIMENSIONS:
        for ratio in RATIOS:
            each = max(1, round(ratio * k))
            if any(row["k"] == k and row["points"] == each for row in rows):
                continue
            seen = [found(k, each, seed, args.starts) for seed in range(args.sets * args.unions)]
            rows.append({"k": k, "points": each, "found": np.reshape(seen, (args.sets, -1)).mean(1).tolist()})
        own = {row["points"]: np.mean(row["found"]) for row in rows if row["k"] == k}
        print(f"{f'k = {k}':>22}" + "".join(f"{own[max(1, round(ratio * k))]:8.0%}" for ratio in RATIOS), flush=True)
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "phase_transition.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, rows)
    setting = {"features": FEATURES, "clusters": CLUSTERS, "sets": args.sets, "unions": args.unions,
               "starts": args.starts}
    path.with_suffix(".json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
