"""How many dimensions the handwritten digits need: a network trained in random subspaces of its weights.

The network 64-100-100-10 has 17 610 numbers. theta = theta_0 + P theta_d is trained in d of them, for projections P of
every kind, and d90 is the least d that reaches 90 % of the whole network's accuracy on held-out digits (Li et al.,
2018). Three seeds each: of the network, the projection and the order of batches.

    python examples/intrinsic_dimension.py
"""

import argparse
import json
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import torch_subspace as ts

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

KINDS = ("dense", "fastfood", "sparse")
DIMENSIONS = (50, 100, 150, 200, 300, 500)
TEST = 597


def digits():
    """Training and test sets, drawn once."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
    return x[TEST:], y[TEST:], x[:TEST], y[:TEST]


def make():
    """The network."""
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def fit(model, data, epochs):
    """Adam on what requires a gradient, and the accuracy on the test set."""
    x, y, x_test, y_test = data
    rate = 0.03 if isinstance(model, ts.lowrank.RandomSubspace) else 1e-3
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)
    for _ in range(epochs):
        for at in torch.randperm(len(x)).split(64):
            opt.zero_grad()
            cross_entropy(model(x[at]), y[at]).backward()
            opt.step()
        plan.step()
    with torch.no_grad():
        return (model(x_test).argmax(1) == y_test).double().mean().item()


def draw(path, results, curves):
    """Accuracies over d for every kind, and what was found."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    colors = dict(zip(KINDS, ("#1d4ed8", "#c2410c", "#15803d"), strict=True))
    for kind, found in results.items():
        dims = sorted(curves[kind])
        mean = [sum(curves[kind][d]) / len(curves[kind][d]) for d in dims]
        axes.fill_between(dims, [min(curves[kind][d]) for d in dims], [max(curves[kind][d]) for d in dims],
                          color=colors[kind], alpha=0.15, linewidth=0)
        axes.plot(dims, mean, marker="o", markersize=3.5, color=colors[kind], label=f"{kind}: d90 = {found.dim}")
        axes.axvline(found.dim, color=colors[kind], linestyle=":", linewidth=1)
    axes.axhline(found.baseline, color="0.4", linewidth=1)
    axes.axhline(found.target, color="0.4", linewidth=1, linestyle="--")
    axes.annotate(f"all {found.size} numbers", (DIMENSIONS[-1], found.baseline), xytext=(0, 3),
                  textcoords="offset points", ha="right")
    axes.annotate("90 % of it", (DIMENSIONS[-1], found.target), xytext=(0, 3), textcoords="offset points", ha="right")
    axes.set(xlabel="d, numbers trained", ylabel="accuracy on held-out digits", ylim=(None, 1.02))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
    figure.savefig(path, dpi=100)


def main():
    """Measure, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--output", type=Path, help="the picture, numbers beside it (default: in build/)")
    args = parser.parse_args()
    data, seeds, results, curves = digits(), range(args.seeds), {}, {}
    for kind in KINDS:
        results[kind] = ts.lowrank.intrinsic_dimension(
            make, lambda model: fit(model, data, args.epochs), kind=kind, seeds=seeds, start=100, tolerance=0.15,
            verbose=True)
        curves[kind] = dict(results[kind].scores)
        for d in tqdm([d for d in DIMENSIONS if d not in curves[kind]], kind, unit="dimension", dynamic_ncols=True):
            curves[kind][d] = []
            for seed in seeds:
                torch.manual_seed(seed)
                model = ts.lowrank.RandomSubspace(make(), d, kind, seed=seed)
                curves[kind][d].append(fit(model, data, args.epochs))
        print(results[kind], flush=True)
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "intrinsic_dimension.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, results, curves)
    found = {kind: {"d90": result.dim, "baseline": result.baseline, "size": result.size,
                    "accuracy": {str(d): curves[kind][d] for d in sorted(curves[kind])}}
             for kind, result in results.items()}
    setting = {"seeds": args.seeds, "epochs": args.epochs, "test": TEST}
    path.with_suffix(".json").write_text(json.dumps({"setting": setting, "kinds": found}, indent=1) + "\n")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
