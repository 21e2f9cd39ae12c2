"""What cluster.py prints and draws: a table, the geometry of the features, who was taken for whom, a map."""

import json
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix

from torch_subspace.metrics import effective_rank, match_clusters, principal_angles

SCORES = ("acc", "nmi", "ari")


def median_run(results):
    """Number of the run whose accuracy is the median."""
    return sorted(range(len(results)), key=lambda i: results[i]["train"]["acc"])[(len(results) - 1) // 2]


def summary(runs):
    """Every algorithm's scores: medians over the runs, the range of the accuracy, and each run's."""
    rows = {}
    for name, results in runs.items():
        row = {"seconds": statistics.median(r["seconds"] for r in results)}
        for part in ("train", "held-out"):
            scores = [r[part] for r in results if part in r]
            if scores:
                row[part] = {s: statistics.median(x[s] for x in scores) for s in SCORES}
                row[part]["lowest"], row[part]["highest"] = (f(x["acc"] for x in scores) for f in (min, max))
                row[part]["runs"] = scores
        rows[name] = row
    return rows


def print_table(rows):
    """Print what `summary` found."""
    width = max(map(len, rows)) + 2
    names = "".join(f"{word:>7}" for word in ("ACC", "NMI", "ARI")) + f"{'lowest–highest':>17}"
    print(f"\n{'':<{width}}{'clustered images':^38}{'held-out images':^38}")
    print(f"{'algorithm':<{width}}{names}{names}{'CPU s':>9}")
    for name, row in rows.items():
        cells = ""
        for part in ("train", "held-out"):
            if part in row:
                numbers = row[part]
                cells += "".join(f"{numbers[s]:>7.3f}" for s in SCORES)
                cells += f"{numbers['lowest']:>11.3f}–{numbers['highest']:.3f}"
            else:
                cells += f"{'–':>7}" * 3 + f"{'–':>17}"
        print(f"{name:<{width}}{cells}{row['seconds']:>9.1f}")
    print("\nmedians over the seeds (Ward's algorithm has none); ACC: clusters matched to digits one to one; –: the\n"
          "algorithm has no way to assign points it has not seen; CPU s: processor time to fit, of all threads"
          )


def print_geometry(features, clusters, directions=3):
    """Print how much of a cluster lies in its main directions, and how far apart those of any two clusters are."""
    print()
    for when, z in features.items():
        energies = [np.linalg.svd(z[clusters == k], compute_uv=False) ** 2 for k in np.unique(clusters)]
        share = np.mean([e[:directions].sum() / e.sum() for e in energies])
        angles = principal_angles(z, clusters, 1)[..., 0]
        apart = angles[~np.eye(len(angles), dtype=bool)].min()
        print(f"{when + ':':<17}effective rank of all features {effective_rank(z):.1f}; a cluster's {directions} main "
              f"directions hold {share:.0%} of it;\n{'':<17}the first ones of two clusters are at least "
              f"{apart:.0f}° apart")


def write(path, rows, features, digits, clusters, setting):
    """The picture at `path` and the numbers beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1, default=str) + "\n")
    draw(path, features, digits, match_clusters(digits, clusters))
    print(f"picture: {path}")


def draw(path, features, digits, clusters):
    """Write a PNG: |cosines| of the features (n, d) before and after, the confusion matrix, a map of the points."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.3), layout="constrained")
    order = np.argsort(digits, kind="stable")
    for ax, (when, z) in zip(axes, features.items()):
        draw_cosines(ax, z[order], digits[order])
        ax.set_title(f"|cosine| of two images' features, {when}")
    draw_confusion(axes[2], digits, clusters)
    draw_map(axes[3], features["after"], digits, clusters)
    figure.savefig(path, dpi=100)


def draw_cosines(axes, z, digits):
    """|z zᵀ| of points sorted by digit, a tick in the middle of each."""
    axes.imshow(np.abs(z @ z.T), cmap="magma", vmin=0, vmax=1, interpolation="antialiased")
    middles = [np.flatnonzero(digits == k).mean() for k in range(10)]
    axes.set(xticks=middles, yticks=middles, xticklabels=range(10), yticklabels=range(10), xlabel="digit")
    axes.tick_params(length=0)


def draw_confusion(axes, digits, clusters):
    """How many images of each digit are in each cluster."""
    table = confusion_matrix(digits, clusters)
    axes.imshow(table, cmap="Blues")
    for i, j in zip(*np.nonzero(table)):
        axes.text(j, i, table[i, j], ha="center", va="center", fontsize=7.5,
                  color="white" if table[i, j] > table.max() / 2 else "black")
    axes.set(xticks=range(10), yticks=range(10), xlabel="cluster, matched", ylabel="digit")
    axes.set_title(f"{(digits == clusters).mean():.1%} of the images in their digit's cluster")
    axes.tick_params(length=0)


def draw_map(axes, z, digits, clusters):
    """t-SNE of the features by 1 - |cosine|: colours are digits, crosses are images in another digit's cluster."""
    distance = np.clip(1 - np.abs(z @ z.T), 0, None)
    np.fill_diagonal(distance, 0)
    points = TSNE(metric="precomputed", init="random", random_state=0).fit_transform(distance)
    for right, marker, size in ((True, "o", 6), (False, "x", 16)):
        at = (digits == clusters) == right
        axes.scatter(*points[at].T, c=digits[at], cmap="tab10", vmin=0, vmax=9, marker=marker, s=size, linewidths=0.8)
    for k in range(10):
        axes.text(*np.median(points[digits == k], 0), k, fontsize=13, weight="bold", ha="center", va="center")
    axes.set(xticks=[], yticks=[], title="map of the features (t-SNE), ×: misplaced")
