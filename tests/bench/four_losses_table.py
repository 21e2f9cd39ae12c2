"""What examples/four_losses.py found, as four tables of docs/isotropy.md."""

import json
import statistics
from pathlib import Path

from lejepa_table import ranged

RESULTS = Path(__file__).resolve().parents[2] / "examples/four_losses.json"
COLUMNS = {  # part: what its rows are; (title, kind, form) of the others
    "simlap": ("pairs of, loss", (
        ("linear probe", "probe", "{:.1%}"), ("mAP, plain cosine", "precision", "{:.1%}"),
        ("second class, under the gate", "own", "{:.1%}"), ("by another query", "other", "{:.1%}"),
        ("by the class's mean", "mean", "{:.1%}"))),
    "modx": ("trained on 5 to 9 from the first stage", (
        ("Recall@1 of 0 to 4", "first", "{:.1%}"), ("Recall@1 of 5 to 9", "second", "{:.1%}"))),
    "koopman": ("features", (
        ("pendulum, 4 steps", "pendulum 4", "{:.4f}"), ("16 steps", "pendulum 16", "{:.3f}"),
        ("effective rank", "pendulum rank", None), ("Lorenz, 4 steps", "lorenz 4", "{:.4f}"),
        ("effective rank", "lorenz rank", None))),
    "groups": ("not 0 in each group, points, penalty", (
        ("exact, refitted", "refitted", "{:.0%}"), ("exact at some weight", "any", "{:.0%}"),
        ("exact, plain", "plain", "{:.0%}"), ("groups kept, plain", "kept", None),
        ("error, plain", "error", "{:.2f}"))),
}
TOLD = {
    "simlap": "a third of the digits held out; 16 features, {steps} steps of 128 pairs",
    "modx": "a third of the digits held out; 16 features, {steps} steps of 128 pairs a stage, lr = 0.003 where none "
            "is named",
    "koopman": "12 trajectories known, 48 others foretold; squared errors, of the states' variance; weights "
               "0.001 of InfoNCE, 0.1 of the entropy, 1 of the reconstruction; {steps} steps",
    "groups": "{draws} problems each, and as many points for validation; shares of problems in which exactly the four "
              "groups are kept, of 20 groups of 4 rows",
}


def table(part):
    """A row for each way, and where it was measured."""
    found = json.loads(RESULTS.read_text())
    setting, (title, columns) = found["setting"], COLUMNS[part]
    lines = [f"| {title} | {' | '.join(column for column, *_ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found[part].items():
        cells = [ranged(row[kind], form) if form else f"{statistics.mean(row[kind]):.1f}" for _, kind, form in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Mean (range) of {setting['seeds']} seeds, {TOLD[part].format(**setting)}. CPU, threads: "
              f"{setting['threads']}, torch {setting['torch']}; numbers in "
              "[four_losses.json](../examples/four_losses.json)."]
    return "\n".join(lines)


TABLES = {part: lambda part=part: table(part) for part in COLUMNS}
