"""The README's table of what the methods bring: a line for each study of docs/evidence.md and the guides."""

import statistics

from evidence_heads import STUDENT, shares
from evidence_tables import points, result

MANY, TEXTS = "many_classes", "finetune_text"


def line(what, ours, other, mine, theirs):
    """Names, and what each seed came to: means, and their paired difference."""
    off = [100 * (a - b) for a, b in zip(mine, theirs, strict=True)]
    half = STUDENT[len(off)] * statistics.stdev(off) / len(off) ** 0.5
    means = [f"{who}: {statistics.mean(values):.1%}" for who, values in ((ours, mine), (other, theirs))]
    return f"| {what} | {' | '.join(means)} | {statistics.mean(off):+.1f} ± {half:.1f} |"


def write():
    """Accuracy of ours, of what one would take otherwise, and points between them."""
    heads, texts = result(MANY)["rows"], result(TEXTS)["tasks"]
    memory, digits, sets = result("finetune_memory")["methods"], result("finetune")["rows"], result("clustering_sets")
    best = max((name for name in heads if name.startswith("Grassmann")),
               key=lambda name: max(heads[name]["validation"].values()))
    where = {"accuracy": "1000 characters, unseen faces", "nearest mean": "their features on others, nearest mean"}
    lines = ["| | ours | other | points |", "|---|---|---|---|"]
    lines += [line(what, best, "cosine head", *(shares(heads[name]["runs"], measure) for name in (best, "cosine")))
              for measure, what in where.items()]
    for task, what, other in (("sections of Debian", "package sections", "LoRA (peft), linear head"),
                              ("packages of Python", "docstrings", "all weights, linear head")):
        lines.append(line(f"MiniLM, {what}, 64 texts a class", "adapters, Grassmann head", other,
                          *(shares(texts[task]["shots"]["64"][name]["runs"], "right")
                            for name in ("ours, Grassmann head", other))))
    lines.append(line("the same, all weights, 128 texts", "LowRankAdamW, rank 8", "AdamW",
                      *(shares(memory[name]["runs"], "right") for name in ("LowRankAdamW, rank 8", "AdamW"))))
    lines.append(line("new digits, 15 images a class", "adapters", "LoRA (peft)",
                      *([curve[-1] for curve in digits[name]["curves"]] for name in ("ours", "LoRA (peft)"))))
    for name in ("subspaces", "wine"):
        entry = next(entry for entry in sets["sets"].values() if name in entry["title"])
        other, off = entry["best other"], entry["difference"]["ours"]
        cells = [f"{who}: {entry['algorithms'][key]['acc']['mean']:.1%}"
                 for who, key in (("clustering", "ours"), (other, other))]
        lines.append(f"| {entry['title']} | {' | '.join(cells)} | {points(off)} |")
    lines += ["", "Means of three or five seeds, points paired by seed with a 95 % interval; each trained method at "
              "the rate best", "in validation. Also where it does not help: [evidence](docs/evidence.md)."]
    return "\n".join(lines)
