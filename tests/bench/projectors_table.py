"""What examples/projectors.py found, as the table of docs/lowrank.md."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "examples/projectors.json"
NAMES = {"svd": "`svd`", "range": "`range`", "cosine": "`cosine`", "hadamard": "`hadamard`"}


def ranged(values):
    """From the least to the most."""
    return f"{min(values):.3f} to {max(values):.3f}"


def write():
    """Losses by projector and rank, without and with feedback; then of both sides."""
    found = json.loads(RESULTS.read_text())
    rows, setting = found["rows"], found["setting"]
    ranks = sorted({int(name.split()[1]) for name in rows if name.endswith("int8")})
    lines = [f"| training loss | {' | '.join(f'rank {r}' for r in ranks)} | "
             f"{' | '.join(f'rank {r}, feedback' for r in ranks)} |", "|---" * (2 * len(ranks) + 1) + "|"]
    for word, name in NAMES.items():
        cells = [ranged(rows[f"{word} {r}{end}"]["loss"]) for end in ("", " + int8") for r in ranks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sides = [(side, [ranged(rows[f"range {r}, {side} side"]["loss"]) for r in ranks]) for side in ("shorter", "longer")]
    lines += [f"| `range`, {setting['oblong'][1]} × {setting['oblong'][2]} weights by their {side} side | "
              f"{' | '.join(cells)} |{' |' * len(ranks)}" for side, cells in sides]
    accuracy = [statistics.mean(row["accuracy"]) for name, row in rows.items()
                if "side" not in name and "oblong" not in name]
    width, *_, classes = setting["widths"]
    lines += ["", f"AdamW: {ranged(rows['AdamW']['loss'])}, and {ranged(rows['AdamW, oblong']['loss'])} with the "
              f"longer weights. Ranges of {setting['seeds']} seeds; networks of {width} inputs, {classes} classes, "
              f"{setting['steps']} steps at a rate of {setting['lr']:g}. Accuracies of other digits, "
              f"{min(accuracy):.1%} to {max(accuracy):.1%}, and all numbers: "
              f"[projectors.json](../examples/projectors.json), CPU, threads: {setting['threads']}, "
              f"torch {setting['torch']}."]
    return "\n".join(lines)
