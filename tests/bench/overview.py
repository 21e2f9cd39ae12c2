"""The README's picture, a panel per family, from committed results: docs/overview.png.

    python tests/bench/overview.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS, FLOOR, PEER = "#1f6fb2", "#b9bec6", "#e0a458"
BARS = [  # title, op, case, what stands under a contender's name
    ("Heads: optimiser step of 1000 frames, 8 × 2048 (ms)", "rsgd", "C=1000 k=8 n=2048 float32",
     {"floor: torch SGD(fused=True)": "torch's SGD: no frames", "ours: geodesic": "RiemannianSGD",
      "torch.compile: Cholesky-QR": "torch.compile", "geoopt Euclidean Stiefel": "geoopt",
      "GCR formula: SVD, QR every 5th": "the paper's formula"}),
    ("Adapters: training step of a 3 × 3 convolution (ms)", "tucker_conv", "conv 3x3, 256 to 256, 56x56, B=8 float32",
     {"floor: frozen layer": "frozen layer alone", "ours": "Tucker adapter", "peft LoRA": "LoRA (peft)",
      "LyCORIS LoCon, bypass": "LoCon (LyCORIS)", "FLoRA's formula": "FLoRA's formula"}),
]
SWEEP, LINES = "MLC: d=64, K=n", {
    "official form": ("official code's form", "#c2410c"), "eager, face-splitting product": ("best eager", PEER),
    "ours": ("coding_rate", OURS)}


def facts():
    """All that is drawn: {panel: {name: values}}."""
    found = {}
    for title, op, case, names in BARS:
        rows = json.loads((ROOT / f"tests/bench/results/{op}.json").read_text())["rows"]
        times = {row["contender"]: row["p50_ms"] for row in rows if row["case"] == case and "p50_ms" in row}
        found[title] = {label: [times[contender]] for contender, label in names.items()}
    rows = [row for row in json.loads((ROOT / "tests/bench/results/scaling.json").read_text())["rows"]
            if row["sweep"] == SWEEP]
    found["Coding rates: forward and gradients by points (ms)"] = {
        label: [[row["n"], row["p50_ms"]] for row in rows if row["contender"] == name]
        for name, (label, _) in LINES.items()
    }
    rows = json.loads((ROOT / "examples/cluster.json").read_text())["rows"]
    found["Clustering: digits, without their labels (% right)"] = {
        name: [round(100 * row["train"][key], 2) for key in ("acc", "lowest", "highest")] for name, row in rows.items()
    }
    return found


def color(name):
    """Ours, a floor that is no contender, or a peer."""
    floors = ("torch's SGD: no frames", "frozen layer alone")
    ours = ("RiemannianSGD", "Tucker adapter", "ManifoldClustering")
    return OURS if name in ours else FLOOR if name in floors else PEER


def draw(path=ROOT / "docs/overview.png"):
    """Write a PNG; what it shows is in its metadata too, where a test compares it with the results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = facts()
    plt.rcParams.update({"font.size": 10.5, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(2, 2, figsize=(10.4, 5.2), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08, wspace=0.06)
    for axes, (title, values) in zip(panels.flat, shown.items()):
        axes.set_title(title, loc="left", x=-0.46, weight="bold", pad=10)
        if title.startswith("Coding"):
            for name, (label, line) in zip(values, LINES.values()):
                axes.plot(*zip(*values[name]), color=line, marker="o", markersize=4)
                axes.text(values[name][-1][0] * 1.06, values[name][-1][1], label, va="center", color=line)
            sizes = [n for n, _ in next(iter(values.values()))]
            axes.set(xscale="log", yscale="log", xlim=(sizes[0] * 0.9, sizes[-1] * 2.6))
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
            axes.grid(alpha=0.25, linewidth=0.6)
            continue
        for y, (name, (value, *limits)) in enumerate(values.items()):
            axes.barh(y, value, color=color(name), height=0.68)
            if limits:
                axes.plot(limits, [y, y], color="black", linewidth=1.2, alpha=0.55)
            weight = "bold" if color(name) == OURS else None
            axes.text(max(value, *limits, 0), y, f" {value:.3g}", va="center", weight=weight)
        axes.set_yticks(range(len(values)), values)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_visible(False)
        axes.spines[["left", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Description": json.dumps(shown)})


if __name__ == "__main__":
    draw()
