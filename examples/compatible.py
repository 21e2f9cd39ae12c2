"""A new model's queries in an old model's gallery: what an orthogonal map of its features is worth.

Two small networks learn scikit-learn's real digits (8 x 8) from different seeds: an old one from digits 0 to 6 alone,
a new, wider one from all ten. A gallery holds the old one's features of held-out digits and is not computed again;
queries are others, seen by the new network. Its features mean nothing there until a map takes them to the old ones,
learnt from features of the training digits by both:

    Procrustes           the nearest orthogonal one, in closed form
    OrthogonalAdapter    an orthogonal one, trained
    λ-orthogonal         any matrix, whose distance from orthogonal costs little up to λ
    linear               any matrix

An orthogonal map leaves what the new features know of one another as it is; a free one fits the old ones better, and
loses some of that: the second pair of columns.

    python examples/compatible.py                     # three seeds, under a minute
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

import torch_subspace as ts

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FEATURES, OLD, NEW, KNOWN, LAMBDA = 32, 48, 256, 7, 2.0
COLORS = {"none": "#8a8a8a", "Procrustes": "#1f6fb2", "OrthogonalAdapter": "#3b8b5a", "λ-orthogonal": "#7a4fa3",
          "linear": "#c2410c"}


def network(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, FEATURES))


def learn(image, label, width, steps, seed):
    """A network whose directions of features name the digits."""
    torch.manual_seed(seed)
    net, head = network(width), nn.Linear(FEATURES, 10, bias=False)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        some = torch.randint(len(image), (128,))
        scores = nn.functional.linear(directions(net(image[some])), nn.functional.normalize(head.weight, dim=1))
        optimizer.zero_grad()
        nn.functional.cross_entropy(10 * scores, label[some]).backward()
        optimizer.step()
    return net


def directions(z):
    return nn.functional.normalize(z, dim=1)


def retrieve(query, query_label, gallery, gallery_label):
    """Recall@1 and mean average precision by cosines; where queries are the gallery, each without itself."""
    score = directions(query) @ directions(gallery).mT
    if query is gallery:
        score.fill_diagonal_(-torch.inf)
    right = (query_label[:, None] == gallery_label[score.argsort(1, descending=True)]).double()
    if query is gallery:
        right = right[:, :-1]
    precision = right.cumsum(1) / torch.arange(1, right.shape[1] + 1)
    return right[:, 0].mean().item(), ((precision * right).sum(1) / right.sum(1)).mean().item()


def fit(adapter, new, old, steps, penalty=lambda: 0.0):
    """A module trained to take new features to old ones."""
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        ((adapter(new) - old).square().sum(1).mean() + penalty()).backward()
        optimizer.step()
        schedule.step()
    return adapter


def maps(new, old, steps):
    """{name: function of new features}, from both networks' features of the training digits."""
    turn = ts.isotropy.procrustes(new, old)
    found = {"none": lambda z: z, "Procrustes": lambda z: z @ turn,
             "OrthogonalAdapter": fit(ts.isotropy.OrthogonalAdapter(FEATURES), new, old, steps)}
    for name in ("λ-orthogonal", "linear"):
        free = nn.Linear(FEATURES, FEATURES, bias=False)
        nn.init.eye_(free.weight)
        near = name == "λ-orthogonal"
        found[name] = fit(free, new, old, steps, (
            lambda w=free.weight: ts.isotropy.lambda_orthogonality(w, LAMBDA, alpha=5.0)) if near else lambda: 0.0)
    return found


def measure(image, label, steps, seed):
    """Both networks alone, and each map; and the first seed's features of queries and gallery for the picture."""
    rest, train_part = train_test_split(range(len(label)), test_size=1 / 2, stratify=label, random_state=seed)
    gallery, query = train_test_split(rest, test_size=1 / 3, stratify=label[rest], random_state=seed)
    known = [i for i in train_part if label[i] < KNOWN]
    old = learn(image[known], label[known], OLD, steps, 2 * seed)
    new = learn(image[train_part], label[train_part], NEW, steps, 2 * seed + 1)
    with torch.no_grad():
        features = {(who, where): directions(net(image[part])) for who, net in (("old", old), ("new", new))
                    for where, part in (("train", train_part), ("gallery", gallery), ("query", query))}
    labels = label[query], label[gallery]
    alone = {who: retrieve(features[who, "query"], labels[0], features[who, "gallery"], labels[1])
             for who in ("old", "new")}
    rows, seen = {}, {}
    for name, function in maps(features["new", "train"], features["old", "train"], steps).items():
        with torch.no_grad():
            mapped = function(features["new", "query"])
            rows[name] = (*retrieve(mapped, labels[0], features["old", "gallery"], labels[1]),
                          *retrieve(mapped, labels[0], mapped, labels[0]))
            seen[name] = directions(mapped)
    return alone, rows, (seen, features["old", "gallery"], labels)


def draw(path, runs):
    """Gallery and queries in one plane, before and after, and the precision of each map."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained", width_ratios=(1, 1, 1.2))
    _, _, (seen, gallery, (query_label, gallery_label)) = runs[0]
    centre = gallery.mean(0)
    plane = torch.linalg.svd(gallery - centre, full_matrices=False).Vh[:2].mT
    for axis, name, title in ((axes[0], "none", "as they are"), (axes[1], "Procrustes", "turned by procrustes")):
        axis.scatter(*((gallery - centre) @ plane).T, c=gallery_label, cmap="tab10", s=5, alpha=0.35, linewidth=0)
        axis.scatter(*((seen[name] - centre) @ plane).T, c=query_label, cmap="tab10", s=16, marker="^", linewidth=0)
        axis.set(title=f"old gallery (dots), new queries\n(triangles) {title}", xticks=[], yticks=[])
    for i, (name, color) in enumerate(COLORS.items()):
        for shift, column, alpha in ((-0.19, 1, 1.0), (0.19, 3, 0.45)):
            found = [rows[name][column] for _, rows, _ in runs]
            axes[2].bar(i + shift, statistics.mean(found), 0.36, color=color, alpha=alpha)
            axes[2].plot([i + shift] * 2, [min(found), max(found)], color="0.2", linewidth=1)
    axes[2].axhline(statistics.mean(alone["old"][1] for alone, *_ in runs), color="0.4", linewidth=0.8, linestyle="--")
    axes[2].set(ylim=(0, 1), xticks=range(len(COLORS)), title="mean average precision in the old gallery\n"
                "(dashed: of old queries), and, pale, among mapped queries")
    axes[2].set_xticklabels(COLORS, rotation=20, ha="right")
    figure.savefig(path, dpi=100)


def main():
    """Train, map, retrieve, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="splits, each with networks of its own")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, help="the picture, numbers beside it (default: in build/)")
    args = parser.parse_args()
    data = load_digits()
    image, label = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    runs = [measure(image, label, args.steps, seed) for seed in range(args.seeds)]
    alone = {who: [run[0][who] for run in runs] for who in ("old", "new")}
    rows = {name: [run[1][name] for run in runs] for name in COLORS}
    print(f"{'':>22}{'Recall@1':>10}{'mAP':>8}{'mapped, alone':>16}{'mAP':>8}")
    for name, found in {**{f"{who} alone": rows for who, rows in alone.items()}, **rows}.items():
        mean = [statistics.mean(column) for column in zip(*found)]
        print(f"{name:>22}{mean[0]:10.1%}{mean[1]:8.1%}" + (f"{mean[2]:16.1%}{mean[3]:8.1%}" if len(mean) > 2 else ""))
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "compatible.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, runs)
    setting = {"seeds": args.seeds, "steps": args.steps, "features": FEATURES, "digits of the old": KNOWN,
               "lam": LAMBDA, "threads": torch.get_num_threads(), "torch": torch.__version__}
    kinds = ("recall", "precision", "mapped recall", "mapped precision")
    found = {"setting": setting, "rows": {name: dict(zip(kinds, map(list, zip(*values))))
                                          for name, values in {**alone, **rows}.items()}}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
