"""The picture of an op's rows: a panel per case, a bar per contender."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, FLOOR, PEER = "#1f6fb2", "#b9bec6", "#e0a458"


def draw(path, op, where, rows):
    """Write a PNG of the median times, with the range from p20 to p80 and each time as a multiple of our first."""
    rows = [row for row in rows if "missing" not in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    heights = [sum(row["case"] == case for row in rows) for case in cases]
    plt.rcParams.update({"font.size": 8.5, "axes.titlesize": 9.5})
    figure, panels = plt.subplots(len(cases), 1, figsize=(7.6, 0.6 * len(cases) + 0.24 * sum(heights) + 0.5),
                                  layout="constrained", squeeze=False,
                                  gridspec_kw={"height_ratios": [h + 1 for h in heights]})  # fmt: skip
    for axes, case in zip(panels[:, 0], cases):
        panel(axes, case, [row for row in rows if row["case"] == case])
    panels[-1, 0].set_xlabel("milliseconds, median and p20 to p80, logarithmic; × relative to the first blue bar")
    what = where["device"] if where["device"] != "cpu" else f"{where['cpu']}, {where['threads']} threads"
    figure.suptitle(f"{op} · {what} · torch {where['torch']} · {where['commit']}", fontsize=9, color="#555555")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(axes, case, rows):
    """One case."""
    ours = next((row["p50_ms"] for row in rows if row["contender"].startswith("ours")), None)
    for y, row in enumerate(rows):
        name, mid = row["contender"], row["p50_ms"]
        color = OURS if name.startswith("ours") else FLOOR if name.startswith("floor") else PEER
        axes.barh(y, mid, color=color, height=0.72)
        axes.plot([row["p20_ms"], row["p80_ms"]], [y, y], color="black", linewidth=1, alpha=0.55)
        times = f"  {mid:.3g} ms" + (f"  ({mid / ours:.2f}×)" if ours else "")
        axes.text(max(mid, row["p80_ms"]), y, times, va="center", fontsize=8)
    mids = [row["p50_ms"] for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(0.5 * min(mids), 5 * max(max(mids), *(row["p80_ms"] for row in rows)))
    axes.set_yticks(range(len(rows)), [row["contender"] for row in rows])
    axes.invert_yaxis()
    axes.set_title(case, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
