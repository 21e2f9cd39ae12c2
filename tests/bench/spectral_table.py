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
    before = statistics.mean(found["before"])
    lines += ["", f"A network {widths} that knows scikit-learn's digits, adapted to the same digits transposed, of "
              f"which it gets {before:.1%} before; {setting['steps']} steps, mean and deviation of {setting['seeds']} "
              f"seeds, rates picked on other digits. CPU, threads: {setting['threads']}, torch {setting['torch']}; "
              "numbers in [singular_values.json](../examples/singular_values.json)."]
    return "\n".join(lines)
