"""What examples/patching.py found, as tables of docs/subspaces.md."""

import json
import statistics
from pathlib import Path

from lejepa_table import ranged

RESULTS = Path(__file__).resolve().parents[2] / "examples/patching.json"
TRAINED = "`SubspacePatch`, trained"
LINK = "[patching.json](../examples/patching.json)"


def patching_table():
    """Answers that are right in both after a patch, by layer, subspace and rank."""
    found = json.loads(RESULTS.read_text())
    sites = [site for site in found if site.endswith("layer")]
    ranks = list(found[sites[0]]["trained"])
    lines = [f"| layer | subspace | {' | '.join(f'rank {rank}' for rank in ranks)} | digit, turn alone at rank "
             f"{ranks[0]} |", "|---" * (len(ranks) + 3) + "|"]

    def alone(row):
        return ", ".join(f"{statistics.mean(row[kind]):.1%}" for kind in ("digit", "turn"))

    for site in sites:
        for name in ("trained", "differences of means", "PCA", "random"):
            row = found[site][name]
            cells = [*(ranged(row[rank]["both"], "{:.1%}") for rank in ranks), alone(row[ranks[0]])]
            lines.append(f"| {site} | {TRAINED if name == 'trained' else name} | {' | '.join(cells)} |")
    whole = "; ".join(f"{site} {alone(*found[site]['all of the layer'].values())}" for site in sites)
    setting, gains = found["setting"], []
    for site in sites:
        ours, means = (found[site][name][ranks[0]]["both"] for name in ("trained", "differences of means"))
        gains.append(f"{site} " + ranged([100 * (a - b) for a, b in zip(ours, means, strict=True)], "{:+.1f}"))
    lines += ["", "Right digit of the base and right turn of the source, mean (range) of "
              f"{setting['seeds']} seeds, pairs of held-out images. The network names both of "
              f"{ranged(found['network']['both'], '{:.1%}')} of images. With all of a layer from the source, digit and "
              f"turn alone: {whole}. Trained less differences of means at rank {ranks[0]}, in points, paired by seed: "
              f"{'; '.join(gains)}. {setting['steps']} steps, one rate for all ranks, not tuned. CPU, threads: "
              f"{setting['threads']}, torch {setting['torch']}; numbers in {LINK}."]
    return "\n".join(lines)


def illusion_table():
    """Directions, and what is read of them."""
    found = json.loads(RESULTS.read_text())
    lines = ["| direction | the whole | `row` alone | `null` alone | share of `null` |", "|---|---|---|---|---|"]
    for name, row in found["directions"].items():
        cells = [ranged(row[part], "{:.1%}") for part in ("whole", "read", "unread", "share unread")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"As above, last hidden layer, rank 1; share: of the direction's squared length. Numbers in {LINK}."]
    return "\n".join(lines)


def probing_table():
    """Rank correlation with distances in syntax trees by the dimension of the subspace."""
    found = json.loads(RESULTS.read_text())
    rows, setting = dict(found["probing"]), found["setting"]
    (size, whole), = rows.pop("all").items()
    ranks = list(rows["trained"])
    lines = [f"| subspace | {' | '.join(f'k = {rank}' for rank in ranks)} |", "|---" * (len(ranks) + 1) + "|"]
    for name, row in rows.items():
        cells = [ranged(row[rank], "{:.2f}") for rank in ranks]
        lines.append(f"| {'`OrthogonalProbe`, trained' if name == 'trained' else name} | {' | '.join(cells)} |")
    lines += ["", f"Spearman's rank correlation, mean (range) of {setting['seeds']} seeds, each with files held out, "
              f"words' vectors and probes of its own; all {size} dimensions: {ranged(whole, '{:.2f}')}. "
              f"Standard library of Python {setting['python']}; numbers in {LINK}."]
    return "\n".join(lines)
