"""What examples/compatible.py found, as the table of docs/isotropy.md."""

import json
from pathlib import Path

from lejepa_table import ranged

RESULTS = Path(__file__).resolve().parents[2] / "examples/compatible.json"
KINDS = ("recall", "precision", "mapped precision")
NAMES = {"old": "old queries, as before", "new": "new queries in a new gallery", "none": "new queries as they are"}


def write():
    """A row for each map."""
    found = json.loads(RESULTS.read_text())
    setting = found["setting"]
    lines = ["| map of new queries | Recall@1 in the old gallery | mAP in the old gallery | mAP among mapped queries |",
             "|---|---|---|---|"]
    for name, row in found["rows"].items():
        cells = [ranged(row[kind], "{:.1%}") if kind in row else "" for kind in KINDS]
        lines.append(f"| {NAMES.get(name, name)} | {' | '.join(cells)} |")
    lines += ["", f"Mean (range) of {setting['seeds']} seeds, each with networks and held-out digits of its own; "
              f"{setting['features']} features, {setting['steps']} steps, λ = {setting['lam']:g}, chosen once, not "
              f"tuned. CPU, threads: {setting['threads']}, torch {setting['torch']}; numbers in "
              "[compatible.json](../examples/compatible.json)."]
    return "\n".join(lines)
