"""What clustering_sets.py keeps, prints and draws: means over the seeds, and paired differences to the best other."""

import json
import statistics

import matplotlib
from scipy.stats import t as student

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS = ("ours", "ours, images")
COLORS = {"k-means": "#94a3b8", "Gaussian mixture": "#b7791f", "spectral": "#15803d", "Ward": "#7c3aed",
          "HDBSCAN": "#c4b5a5", "ours": "#1f6fb2", "ours, images": "#c2410c"}


def keep(path, found):
    """Write the numbers; the file is whole at any time."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def paired(ours, theirs):
    """Mean difference and half of its 95 % interval (Student's t); None for one pair."""
    off = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(off) < 2:
        return statistics.mean(off), None
    return statistics.mean(off), float(student.ppf(0.975, len(off) - 1)) * statistics.stdev(off) / len(off) ** 0.5


def summary(rows, titles):
    """{set: its sizes, {algorithm: means and spreads}, {ours: difference to the other with the best mean accuracy}}."""
    found = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        runs = {}
        for row in rows:
            if row["set"] == name:
                runs.setdefault(row["algorithm"], []).append(row)
        first = next(iter(runs.values()))
        scores = {}
        for algorithm, own in runs.items():
            scores[algorithm] = {
                score: {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}
                for score in ("acc", "nmi", "ari", "held-out", "seconds")
                if (values := [row[score] for row in own if score in row])
            }
        best = max((a for a in runs if a not in OURS), key=lambda a: scores[a]["acc"]["mean"])
        difference = {}
        for algorithm in set(OURS) & set(runs):
            mean, half = paired(*([row["acc"] for row in runs[a]] for a in (algorithm, best)))
            difference[algorithm] = {"mean": mean, "half": half}
        sizes = {size: first[0][size] for size in ("points", "held out", "features", "classes")}
        found[name] = {"title": titles[name], "seeds": len(first), **sizes, "best other": best,
                       "difference": dict(sorted(difference.items())), "algorithms": scores}
    return found


def print_table(sets):
    """A block for each set."""
    for entry in sets.values():
        print(f"\n{entry['title']}: {entry['points']} points of {entry['features']} features, {entry['classes']} "
              f"classes, {entry['held out']} held out, seeds: {entry['seeds']}")
        print(f"{'':<18}{'ACC':>15}{'NMI':>8}{'ARI':>8}{'held-out':>10}{'CPU s':>8}")
        for algorithm, score in entry["algorithms"].items():
            held_out = f"{score['held-out']['mean']:.3f}" if "held-out" in score else "–"
            print(f"{algorithm:<18}{score['acc']['mean']:>8.3f} ± {score['acc']['spread']:.3f}"
                  f"{score['nmi']['mean']:>8.3f}{score['ari']['mean']:>8.3f}{held_out:>10}"
                  f"{score['seconds']['mean']:>8.1f}")
        for algorithm, off in entry["difference"].items():
            half = "" if off["half"] is None else f" ± {off['half']:.3f} (95 %)"
            print(f"{algorithm} less {entry['best other']}: {off['mean']:+.3f}{half}")


def draw(path, sets):
    """Accuracies of all algorithms by set, and how far ours are from the best other."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.8 + 0.55 * len(sets)), layout="constrained", sharey=True,
                                         width_ratios=(1.6, 1))
    for y, entry in enumerate(sets.values()):
        means = {a: score["acc"]["mean"] for a, score in entry["algorithms"].items()}
        left.plot([min(means.values()), max(means.values())], [y, y], color="0.85", linewidth=1, zorder=0)
        for algorithm, mean in means.items():
            ours = algorithm in OURS
            left.scatter(mean, y, s=70 if ours else 34, marker="D" if ours else "o", color=COLORS[algorithm],
                         zorder=3 if ours else 2)
        for algorithm, off in entry["difference"].items():
            place = y + (0.12 if algorithm == OURS[1] else -0.12 if OURS[1] in entry["difference"] else 0)
            right.errorbar(off["mean"], place, xerr=off["half"], fmt="D", markersize=6, capsize=3, linewidth=1.2,
                           color=COLORS[algorithm])
    for algorithm, color in COLORS.items():
        ours = algorithm in OURS
        left.scatter([], [], s=60 if ours else 34, marker="D" if ours else "o", color=color, label=algorithm)
    labels = [f"{entry['title']}\n{entry['points']} × {entry['features']}, {entry['classes']} classes"
              for entry in sets.values()]
    left.set(yticks=range(len(sets)), yticklabels=labels, xlim=(0, 1.02), title="mean of the seeds",
             xlabel="accuracy, clusters matched to classes")
    left.invert_yaxis()
    right.axvline(0, color="0.5", linewidth=0.8)
    right.set(xlabel="accuracy, ours less the best other", title="paired by seed, 95 % interval")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS), frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
