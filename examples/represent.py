"""Learn features of digits whose classes are orthogonal subspaces (MCR², arXiv 2006.08558), also from wrong labels.

The same small network is trained on scikit-learn's real digits by maximal coding rate reduction and by cross-entropy,
with 0 to 50 % of the training labels replaced by other ones at random. MCR²'s features are classified by the nearest of
the classes' subspaces, fitted to the training features and their (wrong) labels; cross-entropy's by its own linear head
and, for comparison, by nearest subspace too. A third of the images, with right labels, is held out and only measured;
the settings were chosen on a part of the training images (`--validate` tries them again).

    python examples/represent.py
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

import torch_subspace as ts

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

METHODS = {"MCR², nearest subspace": "#1f6fb2", "cross-entropy, linear head": "#c2410c",
           "cross-entropy, nearest subspace": "#b7791f"}
FEATURES, DIRECTIONS, BATCH = 64, 4, 300
EPOCHS = 40
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of learning rates, tried by --validate with 30 % wrong labels
LR = {"mcr2": 1e-3, "cross-entropy": 3e-4}  # the best there: 96.1 % by nearest subspace, 96.9 % by the linear head
EPS = 0.5


class Network(nn.Module):
    """(B, 64) images of 8 x 8 -> (B, FEATURES) features of length 1, and a linear head for cross-entropy."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, FEATURES),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, x):
        return self.body(x)


def wrong_labels(label, share, seed):
    """A copy of the labels, `share` of them replaced by another class."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(label), generator=draw)[: round(share * len(label))]
    label = label.clone()
    label[chosen] = (label[chosen] + torch.randint(1, 10, (len(chosen),), generator=draw)) % 10
    return label


def train(kind, x, label, lr, seed, progress, batch=BATCH):
    """A network trained by MCR² or by cross-entropy."""
    torch.manual_seed(seed)
    net, loss = Network(), ts.MCR2Loss(eps=EPS)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    steps = len(x) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=EPOCHS * steps, cycle_momentum=False)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x)).split(batch)[:steps]:
            z = net(x[part])
            value = loss(normalize(z), label[part]) if kind == "mcr2" else cross_entropy(net.head(z), label[part])
            opt.zero_grad()
            value.backward()
            opt.step()
            schedule.step()
        progress.update()
    return net.eval()


@torch.no_grad()
def nearest_subspace(z, label, queries):
    """Class whose subspace (the first DIRECTIONS principal directions of its features) a query lies nearest to."""
    return held_by_subspaces(z, label, queries).argmax(1)


@torch.no_grad()
def held_by_subspaces(z, label, queries):
    """(B, classes): how much of the squared length of each query each class's subspace holds."""
    classes = range(int(label.max()) + 1)
    frames = [torch.linalg.svd(z[label == c], full_matrices=False).Vh[:DIRECTIONS] for c in classes]
    return torch.stack([(queries @ f.mT).square().sum(1) for f in frames], 1)


@torch.no_grad()
def accuracies(kind, net, x, label, held_out, truth):
    """{method: accuracy on the held-out images}."""
    z, queries = normalize(net(x)), normalize(net(held_out))
    found = {f"{'MCR²' if kind == 'mcr2' else kind}, nearest subspace": nearest_subspace(z, label, queries)}
    if kind != "mcr2":
        found["cross-entropy, linear head"] = net.head(net(held_out)).argmax(1)
    return {method: (classes == truth).double().mean().item() for method, classes in found.items()}


@torch.no_grad()
def similarity(net, x, label):
    """|Z Z'| with the images in the order of their classes, and the mean overlap of two classes."""
    z = normalize(net(x[label.argsort(stable=True)]))
    heat, sorted_label = (z @ z.mT).abs(), label.sort().values
    return heat, heat[sorted_label[:, None] != sorted_label].mean().item()


def draw(path, rows, shares, heats):
    """Heat maps of the features' cosines, and accuracy by the share of wrong labels."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, axes = plt.subplots(1, len(heats) + 1, figsize=(4 * len(heats) + 4.4, 3.8), layout="constrained")
    for axis, (title, (heat, overlap)) in zip(axes, heats.items()):
        image = axis.imshow(heat, cmap="viridis", vmin=0, vmax=1, interpolation="antialiased")
        axis.set(title=f"{title}\nmean |cosine| between classes {overlap:.2f}", xticks=[], yticks=[],
                 xlabel="held-out images, by class")
    figure.colorbar(image, ax=axes[len(heats) - 1], label="|cosine|", shrink=0.8)
    for method, color in METHODS.items():
        runs = 100 * torch.tensor([rows[method][str(share)] for share in shares])
        x = [100 * share for share in shares]
        axes[-1].fill_between(x, runs.amin(1), runs.amax(1), color=color, alpha=0.15, linewidth=0)
        axes[-1].plot(x, runs.mean(1), color=color, marker="o", markersize=3.5, label=method)
    axes[-1].set(xlabel="wrong training labels (%)", ylabel="held-out accuracy (%)",
                 title="mean and range over the seeds")
    axes[-1].grid(alpha=0.25, linewidth=0.6)
    axes[-1].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=100)


def main():
    """Train, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validate", action="store_true", help="try other learning rates on training images instead")
    parser.add_argument("--output", type=Path, help="the picture, numbers beside it (default: in build/)")
    args = parser.parse_args()
    data = load_digits()
    image, label = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    train_part, test_part = train_test_split(range(len(label)), test_size=1 / 3, stratify=label, random_state=0)
    shares = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    if args.validate:
        known = label[train_part]
        train_part, test_part = train_test_split(train_part, test_size=1 / 3, stratify=known, random_state=0)
        shares = (0.3,)
    x, right, held_out, truth = image[train_part], label[train_part], image[test_part], label[test_part]
    rows, heats = {method: {str(share): [] for share in shares} for method in METHODS}, {}
    tried = {kind: GRID if args.validate else (lr,) for kind, lr in LR.items()}
    with tqdm(total=args.seeds * len(shares) * sum(map(len, tried.values())) * EPOCHS, unit="epoch",
              dynamic_ncols=True) as progress:
        for share in shares:
            for kind, rates in tried.items():
                for lr in rates:
                    found = []
                    for seed in range(args.seeds):
                        noisy = wrong_labels(right, share, seed)
                        net = train(kind, x, noisy, lr, seed, progress)
                        found.append(accuracies(kind, net, x, noisy, held_out, truth))
                        if seed == 0 and share == 0:
                            title = "MCR²" if kind == "mcr2" else "cross-entropy"
                            heats[title] = similarity(net, held_out, truth)
                    for method in found[0]:
                        rows[method][str(share)] = [f[method] for f in found]
                        if args.validate:
                            progress.write(f"{method}, lr {lr:g}: {statistics.mean(f[method] for f in found):.2%}")
    if args.validate:
        return
    print("\nheld-out accuracy, mean of the seeds, by the share of wrong training labels\n")
    print(f"{'':<34}" + "".join(f"{share:>9.0%}" for share in shares))
    for method, row in rows.items():
        print(f"{method:<34}" + "".join(f"{statistics.mean(row[str(share)]):>9.2%}" for share in shares))
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "represent.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, rows, shares, heats)
    setting = {"seeds": args.seeds, "epochs": EPOCHS, "batch": BATCH, "features": FEATURES, "directions": DIRECTIONS,
               "eps": EPS, "lr": LR, "torch": torch.__version__, "threads": torch.get_num_threads()}
    overlap = {title: value for title, (_, value) in heats.items()}
    found = {"setting": setting, "accuracy": rows, "mean cosine between classes": overlap}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
