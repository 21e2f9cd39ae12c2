"""The tables of docs/evidence.md about heads and adapters, as those of evidence_tables.py."""

import re
import statistics

from evidence_tables import EXAMPLES, place, result

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
# two-sided 95 %, by the number of seeds

MEASURES = ("accuracy", "nearest mean", "linear probe")


def shares(runs, measure):
    """Of each run the share that is right."""
    return [run[measure].count("1") / len(run[measure]) for run in runs]


def points_of(ours, theirs):
    """Points of one method over another with the 95 % interval, from what each seed came to, paired."""
    pairs = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    half = STUDENT[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{round(statistics.mean(pairs), 1) + 0.0:+.1f} ± {half:.1f}"  # no -0.0


def off(ours, theirs, measure):
    """The same of runs."""
    return points_of(shares(ours, measure), shares(theirs, measure))


def cell(values):
    return f"{statistics.mean(values):.1%} ± {100 * statistics.stdev(values):.1f}"


def best_head(rows):
    """The Grassmann head that is best in validation."""
    return max((name for name in rows if name.startswith("Grassmann")),
               key=lambda name: max(rows[name]["validation"].values()))


def many_classes():
    """Heads of a thousand classes, and what their features are good for elsewhere."""
    found = result("many_classes")
    setting, rows = found["setting"], found["rows"]
    lines = ["| head | accuracy | others, nearest mean | others, linear probe | angle within a class | parameters "
             "| ms per step | peak beyond the model |", "|---" * 8 + "|"]
    for name, row in rows.items():
        chosen = ", ".join(f"{key} {value:g}" for key, value in (row["setting"] | {"rate": row["lr"]}).items()
                           if key != "k")
        cells = [cell(shares(row["runs"], measure)) for measure in MEASURES]
        angle = statistics.mean(run["variability"] for run in row["runs"])
        costs = " | ".join((f"{row['parameters']:,}", f"{row['step']:.1f}", f"{row['peak'] / 2**20:.0f} MiB"))
        lines.append(f"| {name} ({chosen}) | {' | '.join(cells)} | {angle:.0f}° | {costs} |")
    lines += ["", f"{setting['classes']} characters in two unseen faces, and {setting['other classes']} others in the "
              f"same faces; {setting['epochs']} epochs, mean ± standard deviation of {setting['seeds']} seeds; "
              "settings are the best in validation. Steps of network and head, median, taken by turns. "
              + place("many_classes", setting)]
    lines += ["", f"| paired difference, 95 % | {' | '.join(('accuracy', *('others, ' + m for m in MEASURES[1:])))} |",
              "|---" * 4 + "|"]
    for name in rows:
        if name.startswith("Grassmann"):
            for other in ("linear", "cosine"):
                cells = [off(rows[name]["runs"], rows[other]["runs"], measure) for measure in MEASURES]
                lines.append(f"| {name}, less {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def complete(found):
    """(task, texts a class, methods) of examples/finetune_text.py, where all has been measured."""
    for name, task in found["tasks"].items():
        for shots, rows in task["shots"].items():
            measured = [method for method, row in rows.items() if len(row["runs"]) == found["setting"]["seeds"]]
            if measured == list(task["validation"].get(shots, ())):
                yield name, shots, rows


def head_factor():
    """A head's rate as a multiple of that of all weights below it, as examples/finetune_text.py has it."""
    return int(re.search(r"^HEAD_FACTOR = (\d+)", (EXAMPLES / "finetune_text.py").read_text(), re.M)[1])


def further(methods):
    """(one, another) to be compared besides ours below a Grassmann head: heads, and adapters below linear ones."""
    words = dict.fromkeys(method.partition(",")[0] for method in methods)
    pairs = [(f"{word}, Grassmann head", f"{word}, linear head") for word in words if word != "ours"]
    pairs.append(("ours, linear head", "LoRA (peft), linear head"))
    pairs += [("spectral adapter, Grassmann head", f"{other}, Grassmann head")
              for other in ("LoRA of rank 1 (peft)", "our cores alone", "frozen")]
    return [pair for pair in pairs if set(pair) <= set(methods)]


def texts():
    """Methods of examples/finetune_text.py by task and number of texts."""
    found = result("finetune_text")
    cases = {f"{name}, {shots} a class": rows for name, shots, rows in complete(found)}
    methods = {method: row for rows in cases.values() for method, row in rows.items()}
    lines = [f"| method | {' | '.join(cases)} | trained parameters | optimiser's state "
             "| peak beyond the model |", "|---" * (len(cases) + 4) + "|"]
    for method, row in methods.items():
        cells = [f"{cell(shares(rows[method]['runs'], 'right'))} ({rows[method]['lr']:g})" if method in rows else "–"
                 for rows in cases.values()]
        peak, state = found["peaks"].get(method), found.get("states", {}).get(method)
        lines.append(f"| {method} | {' | '.join(cells)} | {row['runs'][0]['parameters']:,} | "
                     f"{'–' if state is None else f'{state / 2**20:.2f} MiB'} | "
                     f"{'–' if peak is None else f'{peak / 2**20:.0f} MiB'} |")
    setting = found["setting"]
    lines += ["", f"Held-out accuracy, mean ± standard deviation of {setting['seeds']} seeds, and the rate, picked in "
              f"validation from the middle of a grid outward; {setting['epochs']} epochs. With all weights the rate is "
              f"the encoder's, the head's is {head_factor()} times as large. Heads on a frozen encoder take its "
              "features as they are, reckoned once. " + place("finetune_text", setting)]
    ours = "ours, Grassmann head"
    lines += ["", f"| {ours}, less | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]

    def less(one, other):
        return [off(rows[one]["runs"], rows[other]["runs"], "right") if {one, other} <= rows.keys() else "–"
                for rows in cases.values()]

    for method in methods:
        if method != ours:
            cells = less(ours, method)
            lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", f"| further paired differences | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    for method, other in further(methods):
        cells = less(method, other)
        lines.append(f"| {method}, less {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"many_classes": many_classes, "texts": texts}
