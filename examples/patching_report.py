"""What examples/patching.py found: its runs put together, and the picture."""

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {"trained": "#1f6fb2", "differences of means": "#3b8b5a", "PCA": "#c2410c", "random": "#8a8a8a",
          "any matrix": "#7a4fa3"}
PARTS = {"whole": "#1f6fb2", "read": "#7fb2d9", "unread": "#c2410c"}


def gathered(runs):
    """Results of several seeds with a list in the place of each number; lists of several numbers by their names."""
    first = runs[0]
    if isinstance(first, dict):
        return {str(key): gathered([run[key] for run in runs]) for key in first}
    if isinstance(first, list):
        names = ("digit", "turn", "both") if len(first) == 3 else ("whole", "read", "unread", "share unread")
        return {name: list(values) for name, values in zip(names, zip(*runs), strict=True)}
    return runs


def draw(path, found):
    """Patches by rank, directions taken apart, and probes by rank."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", width_ratios=(1, 1.1, 1))

    def curve(axis, rows, color, **options):
        x, y = [int(rank) for rank in rows], [row["both"] if isinstance(row, dict) else row for row in rows.values()]
        axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=color, alpha=0.15, linewidth=0)
        axis.plot(x, [statistics.mean(v) for v in y], color=color, marker="o", markersize=3.5, **options)

    ranks, probes = ([int(rank) for rank in rows["trained"]] for rows in (found["middle layer"], found["probing"]))
    for name, color in COLORS.items():
        if name in found["middle layer"]:
            curve(axes[0], found["middle layer"][name], color, label=name)
            curve(axes[0], found["last hidden layer"][name], color, linestyle="--")
        if name in found["probing"]:
            curve(axes[2], found["probing"][name], color, label=name)
    axes[0].set(xscale="log", xticks=ranks, xticklabels=ranks, xlabel="rank of the patch", ylim=(-0.03, 1.32),
                title="turn of the source and digit of the base\n(solid: middle layer, dashed: last)")
    axes[2].set(xscale="log", xticks=probes, xticklabels=probes, xlabel="rank of the probe",
                title="rank correlation with distances in\nsyntax trees, neighbouring tokens, other files")
    for i, row in enumerate(found["directions"].values()):
        for shift, (part, color) in zip((-0.26, 0, 0.26), PARTS.items(), strict=True):
            axes[1].bar(i + shift, statistics.mean(row[part]), 0.24, color=color, label=part if i == 0 else None)
            axes[1].plot([i + shift] * 2, [min(row[part]), max(row[part])], color="0.2", linewidth=1)
    for axis in axes[:2]:
        axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes[1].set(xticks=range(3), ylim=(0, 1.3), title="the same, by a direction, by what the next layer\nreads of it, "
                "and by the rest (last hidden layer)")
    axes[1].set_xticklabels([name.replace(", ", ",\n").replace("where an ", "where an\n")
                             for name in found["directions"]])
    axes[2].set(ylim=(None, 0.95))
    for axis in axes:
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.legend(frameon=False, ncols=3 if axis is axes[1] else 2, fontsize=8)
    figure.savefig(path, dpi=100)
