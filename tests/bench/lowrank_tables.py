"""The tables of docs/lowrank.md that are the examples' results."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def intrinsic_table():
    """Accuracies in random subspaces, of examples/intrinsic_dimension.py."""
    found = json.loads((ROOT / "examples/intrinsic_dimension.json").read_text())
    setting, kinds = found["setting"], found["kinds"]
    dims = sorted(set.intersection(*({int(d) for d in row["accuracy"]} for row in kinds.values())))
    lines = ["| projection | d90 | " + " | ".join(f"d = {d}" for d in dims) + " |", "|---|---|" + "---|" * len(dims)]
    for kind, row in kinds.items():
        cells = [row["accuracy"][str(d)] for d in dims]
        lines.append(f"| {kind} | {row['d90']} | "
                     + " | ".join(f"{sum(a) / len(a):.1%} ({min(a):.1%} to {max(a):.1%})" for a in cells) + " |")
    first = next(iter(kinds.values()))
    lines += ["", f"Accuracy on {setting['test']} held-out digits (range over {setting['seeds']} seeds), network "
              f"64-100-100-10. All {first['size']} numbers trained: {first['baseline']:.1%}, and d90 reaches 90 % of "
              "that. Numbers in [intrinsic_dimension.json](../examples/intrinsic_dimension.json)."]
    return "\n".join(lines)
