"""The tables of docs/lowrank.md that are the examples' results."""

import json
import statistics
from pathlib import Path

import evidence_heads

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


def memory_table():
    """What training takes beside the model and what it brings, of examples/finetune_memory.py."""
    found = json.loads((ROOT / "examples/finetune_memory.json").read_text())
    setting, methods = found["setting"], found["methods"]
    first = methods["AdamW"]["runs"]
    lines = ["| method | rate | accuracy (range) | over AdamW | gradients | optimiser's state | new parameters | step "
             "| the optimiser's part |", "|---|---|---|---|---|---|---|---|---|"]
    for method, row in methods.items():
        accuracy = [run["accuracy"] for run in row["runs"]]
        mean, range_ = f"{statistics.mean(accuracy):.1%}", f"{min(accuracy):.1%} to {max(accuracy):.1%}"
        over = "–" if row["runs"] is first else evidence_heads.off(row["runs"], first, "right")
        sizes = [f"{row['runs'][0][part] / 2**20:.2f} MiB" for part in ("gradients", "state", "added")]
        times = [f"{1e3 * row[part]:.0f} ms" for part in ("seconds", "optimiser")]
        lines.append(f"| {method} | {row['lr']:g} | {mean} ({range_}) | {over} | {' | '.join(sizes + times)} |")
    lines += ["", f"all-MiniLM-L6-v2 with a linear head, {setting['shots']} texts a class of eight, "
              f"{setting['epochs']} epochs in batches of {setting['batch']}, {len(first)} seeds, one thread. Rates "
              "picked in validation, from the middle of a grid outward; where AdamW or LowRankAdamW train all weights "
              f"the head's is {evidence_heads.head_factor()} times as large. Over AdamW: points, paired by seed, with "
              "the half width of a 95 % interval. Numbers in [finetune_memory.json](../examples/finetune_memory.json)."]
    return "\n".join(lines)
