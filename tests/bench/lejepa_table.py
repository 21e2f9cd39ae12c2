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
    lines = ["| weight of SIGReg | linear probe, clean images | SIGReg, views | SIGReg, clean images | "
             "standard deviation | variance in ten directions | effective rank |", "|---|---|---|---|---|---|---|"]
    for weight, row in found["rows"].items():
        lines.append(f"| {weight} | {ranged(row['accuracy'], '{:.1%}')} | {ranged(row['sigreg'], '{:.1f}')} | "
                     f"{ranged(row['sigreg_clean'], '{:.1f}')} | {ranged(row['deviation'], '{:.2f}')} | "
                     f"{statistics.mean(row['variance_in_ten']):.0%} | {statistics.mean(row['rank']):.1f} |")
    for name, accuracy in found["beside"].items():
        lines.append(f"| {name} | {ranged(accuracy, '{:.1%}')} | | | | | |")
    lines += ["", f"Mean (range) of {setting['seeds']} seeds, each with a third of its own held out; "
              f"{setting['features']} features, {setting['views']} views, batches of {setting['batch']}, "
              f"{setting['epochs']} epochs. Clean images are the held-out ones as they are; other columns are of their "
              f"views, drawn as in training, SIGReg of the {setting['held_out']} points of one at a time. CPU, "
              f"threads: {setting['threads']}, torch {setting['torch']}; numbers in "
              "[lejepa.json](../examples/lejepa.json)."]
    return "\n".join(lines)
