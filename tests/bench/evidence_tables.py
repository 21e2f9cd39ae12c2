"""The tables of docs/evidence.md: a function for each, from the JSON beside an example's script. readme.py writes them.

A further section is a function here, its name in TABLES, and markers of that name on the page.
"""

import json
import statistics
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def result(name):
    """What a script of examples/ has found."""
    return json.loads((EXAMPLES / f"{name}.json").read_text())


def place(name, setting):
    """Where it was measured."""
    return (f"CPU, threads: {setting['threads']}, torch {setting['torch']}; numbers in "
            f"[{name}.json](../examples/{name}.json).")


def points(off):
    """A paired difference in points of percent."""
    return f"{100 * off['mean']:+.1f} ± {100 * off['half']:.1f}"


def clustering():
    """Accuracy of every algorithm by set, and how far ours is from the best other."""
    found = result("clustering_sets")
    sets = found["sets"].values()
    names = list(dict.fromkeys(name for entry in sets for name in entry["algorithms"]))
    lines = [f"| points | n × features, classes | {' | '.join(names)} | ours less the best other |",
             "|---" * (len(names) + 3) + "|"]
    for entry in sets:
        scores = entry["algorithms"]
        best = max(score["acc"]["mean"] for score in scores.values())
        cells = []
        for name in names:
            acc = scores[name]["acc"] if name in scores else None
            cell = f"{acc['mean']:.1%} ± {100 * acc['spread']:.1f}" if acc else ""
            cells.append(f"**{cell}**" if acc and acc["mean"] == best else cell)
        off = "; ".join((f"{name.partition(', ')[2]}: " if ", " in name else "") + points(difference)
                        for name, difference in entry["difference"].items())
        lines.append(f"| {entry['title']} | {entry['points']} × {entry['features']}, {entry['classes']} | "
                     f"{' | '.join(cells)} | {off} ({entry['best other']}) |")
    seeds = " to ".join(str(n) for n in sorted({min(e["seeds"] for e in sets), max(e["seeds"] for e in sets)}))
    lines += ["", "Accuracy, clusters matched to classes by the Hungarian method: mean ± standard deviation of "
              f"{seeds} seeds, each with a split of its own; the difference is paired by seed, with "
              "its 95 % interval. " + place("clustering_sets", found["setting"])]
    return "\n".join(lines)


def clustering_scores():
    """NMI, ARI, accuracy on points that were not clustered, and time."""
    found = result("clustering_sets")
    lines = ["| points | algorithm | NMI | ARI | accuracy | held-out accuracy | seconds |", "|---" * 7 + "|"]
    for entry in found["sets"].values():
        title = entry["title"]
        for name, score in entry["algorithms"].items():
            held_out = f"{score['held-out']['mean']:.1%} ± {100 * score['held-out']['spread']:.1f}" \
                if "held-out" in score else "–"
            lines.append(f"| {title} | {name} | {score['nmi']['mean']:.3f} | {score['ari']['mean']:.3f} | "
                         f"{score['acc']['mean']:.1%} | {held_out} | {score['seconds']['mean']:.2g} |")
            title = ""
    lines += ["", "Means of the seeds; –: the algorithm has no way to assign points it has not seen. Seconds of a "
              "processor to fit."]
    return "\n".join(lines)


def open_set():
    """Known digits against unknown ones."""
    found = result("mcr2")
    rows = found["tasks"]["open set"]
    lines = ["| features, score | area under the ROC curve | less cross-entropy's best |", "|---|---|---|"]
    for method, row in rows.items():
        off = points(row["difference"]) if "difference" in row else ""
        mean, spread = statistics.mean(row["scores"]), statistics.stdev(row["scores"])
        lines.append(f"| {method} | {mean:.3f} ± {spread:.3f} | {off} |")
    lines += ["", f"Mean ± standard deviation of {len(found['runs'])} seeds, each with other digits unknown; the "
              "difference in hundredths, paired by seed, with its 95 % interval. " + place("mcr2", found["setting"])]
    return "\n".join(lines)


def further_classes():
    """All ten digits on features of six, by the number of images of each further one."""
    found = result("mcr2")
    rows, shots = found["tasks"]["further classes"], found["setting"]["shots"]
    lines = ["| features, read-out | " + " | ".join(f"{s} image{'s' * (s > 1)}" for s in shots) + " |",
             "|---" * (len(shots) + 1) + "|"]
    for method in dict.fromkeys(method.rpartition(", ")[0] for method in rows):
        cells = []
        for s in shots:
            row = rows[f"{method}, {s}"]
            off = f" ({points(row['difference'])})" if "difference" in row else ""
            cells.append(f"{statistics.mean(row['scores']):.1%}{off}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", f"Held-out accuracy over all ten digits, each counting alike, mean of {len(found['runs'])} seeds; in "
              "brackets points more or less than cross-entropy's best read-out, paired, with the 95 % interval."]
    return "\n".join(lines)


TABLES = {"clustering": clustering, "clustering_scores": clustering_scores, "open_set": open_set,
          "further_classes": further_classes}
