"""What examples/singular_values.py found, as the table of docs/adapters.md."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "examples/singular_values.json"


def write():
    """Accuracies by method, with what each trains."""
    found = json.loads(RESULTS.read_text())
    setting, lines = found["setting"], ["| adapter | trained numbers | rate | accuracy |", "|---|---|---|---|"]
    for name, row in found["rows"].items():
        lines.append(f"| {name} | {row['trained']:,} | {row['rate']:g} | {statistics.mean(row['accuracy']):.1%} ± "
                     f"{statistics.stdev(row['accuracy']):.1%} |")
    widths = "-".join(map(str, setting["widths"]))
    lines += ["", f"A network {widths} that knows scikit-learn's digits, adapted to the same digits transposed, of "
              f"which it gets {statistics.mean(found['before']):.1%} before; {setting['steps']} steps, mean and deviation "
              f"of {setting['seeds']} seeds, rates picked on other digits. CPU, threads: {setting['threads']}, torch "
              f"{setting['torch']}; numbers in [singular_values.json](../examples/singular_values.json)."]
    return "\n".join(lines)
