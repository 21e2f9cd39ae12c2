"""The README's table of what the methods bring: a line for each study of docs/evidence.md and the guides.

A pair is (name of ours, what each seed came to, name of the other, the same). A line may have several: one for each
task, parted by " / ".
"""

import statistics
from itertools import pairwise

from evidence_heads import best_head, points_of, shares
from evidence_tables import points, result

SHOTS = "64"  # texts a class


def told(names, means):
    """`name: mean / mean`, each name once in a row, and a mean as often as it says something new."""
    entries = list(zip(names, means, strict=True))
    parts = [f"{names[0]}: {means[0]}"]
    for before, entry in pairwise(entries):
        if entry != before:
            parts.append(entry[1] if entry[0] == before[0] else f"{entry[0]}: {entry[1]}")
    return " / ".join(parts)


def line(what, *pairs):
    """Names, and what each seed came to: means, and their paired differences."""
    means = [[f"{statistics.mean(values):.1%}" for values in (mine, theirs)] for _, mine, _, theirs in pairs]
    cells = [told([pair[2 * side] for pair in pairs], [mean[side] for mean in means]) for side in (0, 1)]
    return f"| {what} | {' | '.join(cells)} | {' / '.join(points_of(mine, theirs) for _, mine, _, theirs in pairs)} |"


def characters():
    """Heads of a thousand classes: on these, and on others by nearest means."""
    heads = result("many_classes")["rows"]
    best = best_head(heads)
    return line("1000 characters in unseen faces / others, nearest mean",
                *((best, shares(heads[best]["runs"], measure), "cosine head", shares(heads["cosine"]["runs"], measure))
                  for measure in ("accuracy", "nearest mean")))


def texts():
    """Adapters below the same head, and the head above the same adapters, in both tasks."""
    tasks = [task["shots"][SHOTS] for task in result("finetune_text")["tasks"].values()]

    def pairs(ours, mine, other, theirs):
        return [(ours, shares(rows[mine]["runs"], "right"), other, shares(rows[theirs]["runs"], "right"))
                for rows in tasks]

    names = " / ".join(result("finetune_text")["tasks"]).replace("packages of Python", "docstrings by package")
    ours = "ours, Grassmann head"
    return [line(f"MiniLM: {names}, {SHOTS} texts a class",
                 *pairs("adapters, Grassmann head", ours, "LoRA (peft), same head", "LoRA (peft), Grassmann head")),
            line("the same texts and adapters", *pairs("Grassmann head", ours, "linear head", "ours, linear head"))]


def memory():
    """All weights with few moments."""
    found = result("finetune_memory")
    ours, other = "LowRankAdamW, rank 8", "AdamW"
    return line(f"MiniLM: sections of Debian, {found['setting']['shots']} texts a class, all weights, linear head",
                (ours, shares(found["methods"][ours]["runs"], "right"),
                 other, shares(found["methods"][other]["runs"], "right")))


def gamma():
    """Of the sections, on a frozen encoder: γ by rule against the paper's."""
    task = next(task for task in result("gamma")["tasks"] if task["name"] == "sections of packages")
    return line(f"{task['classes']} {task['name']}, Grassmann head on a frozen MiniLM",
                ("γ by rule", task["rows"][f"{task['auto']:g}"]["accuracy"], "γ = 25", task["rows"]["25"]["accuracy"]))


def convolutions():
    """Adapters of convolutional networks: where they bring something, and where they don't."""
    lines = []
    for name, what, others in (("finetune", "digits 5–9 after 0–4", ("LoRA (peft)", "full fine-tuning")),
                               ("finetune_glyphs", "Japanese after Chinese", ("head only",))):
        found = result(name)
        last = {method: [curve[-1] for curve in row["curves"]] for method, row in found["rows"].items()}
        lines.append(line(f"{what}, convolutions, {found['setting']['shots']} images a class",
                          *(("adapters", last["ours"], other, last[other]) for other in others)))
    return lines


def rates():
    """MCR² against cross-entropy at telling unknown digits; as hundredths of the area."""
    rows = result("mcr2")["tasks"]["open set"]
    ours = "MCR², nearest subspace"
    other = rows[ours]["difference"]["to"]
    return line("unknown digits, area under the ROC curve", (ours, rows[ours]["scores"], other, rows[other]["scores"]))


def clustering():
    """Where it is made for, and a table of compact clouds."""
    sets = {entry["title"]: entry for entry in result("clustering_sets")["sets"].values()}
    entries = [sets[title] for title in ("planted subspaces", "wine")]
    others = [entry["best other"] for entry in entries]
    cells = [told(names, [f"{entry['algorithms'][key]['acc']['mean']:.1%}"
                          for entry, key in zip(entries, keys, strict=True)])
             for names, keys in ((["clustering"] * 2, ["ours"] * 2), (others, others))]
    off = " / ".join(points(entry["difference"]["ours"]) for entry in entries)
    return f"| {' / '.join(entry['title'] for entry in entries)} | {' | '.join(cells)} | {off} |"


def seeds():
    """How many each mean is of: "3 or 5"."""
    counts = {result(name)["setting"]["seeds"] for name in ("many_classes", "finetune_text", "gamma", "finetune",
                                                            "finetune_glyphs")}
    counts |= {len(row["runs"]) for row in result("finetune_memory")["methods"].values()}
    counts |= {len(result("mcr2")["runs"]), *(row["seeds"] for row in result("clustering_sets")["sets"].values())}
    return " or ".join(map(str, sorted(counts)))


def write():
    """Accuracy of ours, of what one would take otherwise, and points between them."""
    return "\n".join(["| | ours | other | points |", "|---|---|---|---|", characters(), *texts(), memory(), gamma(),
                      *convolutions(), rates(), clustering(), "",
                      f"Means of {seeds()} seeds, points paired by seed, 95 %; rates picked in validation. Also "
                      "where it does not help: [evidence](docs/evidence.md)."])
