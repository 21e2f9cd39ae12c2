"""Joint embedding without labels or a teacher: views of a digit agree, and SIGReg keeps the features from collapsing.

A small network sees four views of each of scikit-learn's real digits (8 x 8): shifted, turned, scaled, with noise.
LeJEPALoss pulls the features of a digit's views together, and SIGReg spreads those of all digits like a standard normal
distribution; its weight is the only difference between the rows: with 0 nothing forbids that all features are the same,
with 1 nothing asks that views agree. How features spread is measured on views of a held-out third, since SIGReg was
shown views only; its statistic of the images as they are, which is another one, stands beside it. A linear probe then
names those digits from frozen features of the images as they are. Beside it: the same probe on the network as it was
drawn, and on the pixels, which is a strong rival for such images.

    python examples/lejepa.py                         # three seeds; minutes on two cores
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import torch_subspace as ts
from torch_subspace import metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

WEIGHTS = (0.0, 0.02, 0.2, 1.0)
VIEWS, BATCH, WIDTH, FEATURES = 4, 256, 256, 32
COLORS = {0.0: "#c2410c", 0.02: "#1f6fb2", 0.2: "#3b8b5a", 1.0: "#7a4fa3"}


def network():
    """Images (n, 1, 8, 8) to features (n, FEATURES)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(),
                         nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, FEATURES))


def augment(image, draw):
    """Another view of images (n, 1, 8, 8): turned up to 20 degrees, moved up to a pixel, scaled up to 15 %, noise."""
    n = len(image)

    def uniform(most):
        return most * (2 * torch.rand(n, generator=draw) - 1)

    angle, scale = uniform(0.35), 1 + uniform(0.15)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    moved = torch.stack([cosine, -sine, uniform(0.25), sine, cosine, uniform(0.25)], 1).view(n, 2, 3)
    grid = nn.functional.affine_grid(moved, list(image.shape), align_corners=False)
    seen = nn.functional.grid_sample(image, grid, align_corners=False)
    return seen + 0.1 * torch.randn(seen.shape, generator=draw)


def views(image, draw):
    """VIEWS of each image, one after another: (VIEWS n, 1, 8, 8)."""
    return torch.cat([augment(image, draw) for _ in range(VIEWS)])


def train(image, weight, epochs, seed):
    """The trained network, and seconds per step."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    net, loss = network(), ts.isotropy.LeJEPALoss(weight, distance="mean")
    steps = epochs * (len(image) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2))
    start = time.perf_counter()
    for step in range(steps):
        if step % (len(image) // BATCH) == 0:
            order = torch.randperm(len(image), generator=draw)
        some = order[step % (len(image) // BATCH) * BATCH :][:BATCH]
        seen = views(image[some], draw)
        optimizer.zero_grad()
        loss(net(seen).view(VIEWS, BATCH, FEATURES), seed=step).backward()
        optimizer.step()
        schedule.step()
    return net.eval(), (time.perf_counter() - start) / max(steps, 1)


def features(net, image):
    with torch.no_grad():
        return net(image)


def features_of_views(net, image):
    """(VIEWS, n, FEATURES) of views as in training, the same ones for every network."""
    return features(net, views(image, torch.Generator().manual_seed(0))).view(VIEWS, len(image), FEATURES)


def probe(known, known_label, held_out, held_out_label):
    """Held-out accuracy of a linear classifier of standardised features."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(known, known_label)
    return classifier.score(held_out, held_out_label)


def spread(z):
    """Standard deviations along the principal directions, the largest first."""
    return torch.linalg.svdvals(z - z.mean(0)) / (len(z) - 1) ** 0.5


def measure(image, label, epochs, seed):
    """({weight: what is known of its features}, {beside: accuracy}, {weight: held-out views' features}, digits)."""
    train_part, test_part = train_test_split(range(len(label)), test_size=1 / 3, stratify=label, random_state=seed)
    digits = label[train_part], label[test_part]

    def accuracy(of):
        return probe(of[train_part].numpy(), digits[0], of[test_part].numpy(), digits[1])

    torch.manual_seed(seed)
    beside = {"the network as drawn": accuracy(features(network().eval(), image)), "pixels": accuracy(image.flatten(1))}
    rows, seen = {}, {}
    for weight in WEIGHTS:
        net, seconds = train(image[train_part], weight, epochs, seed)
        clean, z = features(net, image), features_of_views(net, image[test_part])
        deviation = spread(z.flatten(0, 1))
        variance = deviation.square()
        rows[weight] = {"accuracy": accuracy(clean), "deviation": variance.mean().sqrt().item(),
                        "rank": metrics.effective_rank(z.flatten(0, 1)), "deviations": deviation.tolist(),
                        "variance_in_ten": (variance[:10].sum() / variance.sum()).item(),
                        "sigreg": ts.isotropy.sigreg(z, num_slices=1024, seed=0).mean().item(),   # as the loss: of each
                        "sigreg_clean": ts.isotropy.sigreg(clean[test_part], num_slices=1024, seed=0).item(),
                        "seconds_per_step": seconds}
        seen[weight] = z[0]                                 # a view of each: as many points as digits
    return rows, beside, seen, digits[1]


def draw(path, runs):
    """How far features spread, and two of them."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(1.25, 1, 1))
    for weight in WEIGHTS:
        found = torch.tensor([rows[weight]["deviations"] for rows, *_ in runs])
        place = range(1, found.shape[1] + 1)
        axes[0].fill_between(place, found.amin(0), found.amax(0), color=COLORS[weight], alpha=0.2, linewidth=0)
        axes[0].plot(place, found.mean(0), color=COLORS[weight], label=f"weight {weight:g}")
    axes[0].axhline(1, color="0.6", linewidth=0.8)
    axes[0].set(yscale="log", xlabel="principal direction", ylabel="standard deviation",
                title="held-out views, mean and range over the seeds", ylim=(1e-3, None))
    axes[0].legend(frameon=False)
    axes[0].grid(alpha=0.25, linewidth=0.6)
    _, _, seen, digits = runs[0]
    flats = []
    for weight in WEIGHTS[:2]:
        z = seen[weight] - seen[weight].mean(0)
        flats.append(z @ torch.linalg.svd(z, full_matrices=False).Vh[:2].mT)
    most = 1.05 * max(flat.abs().max().item() for flat in flats)
    for axis, weight, flat in zip(axes[1:], WEIGHTS, flats):
        axis.scatter(*flat.T, c=digits, cmap="tab10", s=6, linewidth=0)
        axis.set(title=f"weight {weight:g}: two principal directions", aspect="equal",
                 xlim=(-most, most), ylim=(-most, most))
        axis.locator_params(nbins=8)                        # the same ticks on both axes
    figure.savefig(path, dpi=100)


def main():
    """Train, probe, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="splits, each with networks and views of its own")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--output", type=Path, help="the picture, numbers beside it (default: in build/)")
    args = parser.parse_args()
    data = load_digits()
    image, label = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, data.target
    runs = []
    for seed in range(args.seeds):
        runs.append(measure(image, label, args.epochs, seed))
        print(f"seed {seed}: " + ", ".join(f"{row['accuracy']:.1%} with weight {weight:g}"
                                           for weight, row in runs[-1][0].items()), flush=True)
    kinds = ("accuracy", "sigreg", "sigreg_clean", "deviation", "rank", "variance_in_ten", "seconds_per_step")
    rows = {f"{weight:g}": {kind: [rows[weight][kind] for rows, *_ in runs] for kind in kinds} for weight in WEIGHTS}
    spectra = {f"{weight:g}": [round(statistics.mean(values), 5)
                               for values in zip(*(rows[weight]["deviations"] for rows, *_ in runs))]
               for weight in WEIGHTS}
    beside = {name: [run[1][name] for run in runs] for name in runs[0][1]}
    print(f"\n{'weight':>22}{'accuracy':>10}{'SIGReg':>9}{'clean':>9}{'deviation':>11}{'rank':>7}{'in ten':>8}")
    for weight, row in rows.items():
        mean = {kind: statistics.mean(values) for kind, values in row.items()}
        print(f"{weight:>22}{mean['accuracy']:10.1%}{mean['sigreg']:9.1f}{mean['sigreg_clean']:9.1f}"
              f"{mean['deviation']:11.3f}{mean['rank']:7.1f}{mean['variance_in_ten']:8.0%}")
    for name, found in beside.items():
        print(f"{name:>22}{statistics.mean(found):10.1%}")
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "lejepa.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, runs)
    setting = {"seeds": args.seeds, "epochs": args.epochs, "views": VIEWS, "batch": BATCH, "features": FEATURES,
               "held_out": len(runs[0][3]), "threads": torch.get_num_threads(), "torch": torch.__version__}
    found = {"setting": setting, "rows": rows, "mean_deviations": spectra, "beside": beside}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
