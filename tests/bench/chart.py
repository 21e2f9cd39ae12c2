"""The picture of an op's rows: a panel per case, a bar per contender."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, FLOOR, PEER = "#1f6fb2", "#b9bec6", "#e0a458"
LONGEST = 8  # times ours: longer bars are cut


def draw(path, op, where, rows):
    """Write a PNG of the median times as multiples of our first contender's, with the range from p20 to p80."""
    rows = [row for row in rows if "missing" not in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = 1 if len(cases) == 1 else 2
    lines = -(-len(cases) // columns)
    heights = [max(sum(row["case"] == case for row in rows) for case in cases[i * columns : (i + 1) * columns])
               for i in range(lines)]
    plt.rcParams.update({"font.size": 8.5, "axes.titlesize": 9})
    figure, panels = plt.subplots(lines, columns, figsize=(6.2 * columns, 0.62 * lines + 0.21 * sum(heights) + 0.4),
                                  layout="constrained", squeeze=False,
                                  gridspec_kw={"height_ratios": [h + 1 for h in heights]})
    for axes, case in zip(panels.flat, cases):
        panel(axes, case, [row for row in rows if row["case"] == case])
    for axes in panels.flat[len(cases) :]:
        axes.set_axis_off()
    what = where["device"] if where["device"] != "cpu" else f"{where['cpu']}, threads: {where['threads']}"
    title = f"{op}: median time as a multiple of ours, p20 to p80 · {what} · torch {where['torch']} · {where['commit']}"
    figure.suptitle(title, fontsize=9, color="#555555")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def panel(axes, case, rows):
    """One case."""
    unit = next((row["p50_ms"] for row in rows if row["contender"].startswith("ours")), rows[0]["p50_ms"])
    longest = min(LONGEST, max(row["p50_ms"] / unit for row in rows))
    for y, row in enumerate(rows):
        name, multiple = row["contender"], row["p50_ms"] / unit
        color = OURS if name.startswith("ours") else FLOOR if name.startswith("floor") else PEER
        axes.barh(y, min(multiple, longest), color=color, height=0.72, hatch="" if multiple <= longest else "//",
                  edgecolor="white", linewidth=0)
        if multiple <= longest:
            axes.plot([row["p20_ms"] / unit, row["p80_ms"] / unit], [y, y], color="black", linewidth=1, alpha=0.5)
        end = longest if multiple > longest else min(max(multiple, row["p80_ms"] / unit), 1.15 * longest)
        axes.text(end, y, f"  {multiple:.2f}× · {row['p50_ms']:.3g} ms", va="center", fontsize=8,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
    axes.axvline(1, color=OURS, linewidth=0.8, alpha=0.6, zorder=0)
    axes.set_xlim(0, 1.6 * longest)
    axes.set_yticks(range(len(rows)), [row["contender"] for row in rows])
    axes.invert_yaxis()
    axes.set_title(case, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
