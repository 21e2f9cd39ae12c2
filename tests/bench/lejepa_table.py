"""What examples/lejepa.py found, as the table of docs/isotropy.md."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "examples/lejepa.json"


def ranged(values, form):
    """Mean and range."""
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def write():
    """A row for each weight, and what the same probe finds elsewhere."""
    found = json.loads(RESULTS.read_text())
    setting = found["setting"]
    lines = ["| weight of SIGReg | accuracy of a linear probe | standard deviation | effective rank |",
             "|---|---|---|---|"]
    for weight, row in found["rows"].items():
        lines.append(f"| {weight} | {ranged(row['accuracy'], '{:.1%}')} | {ranged(row['deviation'], '{:.2f}')} | "
                     f"{statistics.mean(row['rank']):.1f} |")
    for name, accuracy in found["beside"].items():
        lines.append(f"| {name} | {ranged(accuracy, '{:.1%}')} | | |")
    lines += ["", f"Mean (range) of {setting['seeds']} seeds, each with a third of its own held out; "
              f"{setting['features']} features, {setting['views']} views, batches of {setting['batch']}, "
              f"{setting['epochs']} epochs. Standard deviation and rank are of held-out features. CPU, threads: "
              f"{setting['threads']}, torch {setting['torch']}; numbers in [lejepa.json](../examples/lejepa.json)."]
    return "\n".join(lines)
