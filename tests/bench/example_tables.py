"""The tables of docs/ that are the examples' results: from their JSON files."""

import json
import statistics
from pathlib import Path

import evidence_heads

ROOT = Path(__file__).resolve().parents[2]


def demo_table():
    """Both heads."""
    found = json.loads((ROOT / "examples/swap_head.json").read_text())
    setting = found["setting"]
    lines = [f"scikit-learn's digits at {setting['size']} × {setting['size']}, {setting['model']} from scratch, "
             f"{setting['epochs']} epochs, {setting['seeds']} seeds, a third held out, the learning rate of each head "
             "picked in validation:", "",
             "| head | lr | accuracy (mean ± s.d.) | lowest to highest | frame error | seconds per step |",
             "|---|---|---|---|---|---|"]
    for head, row in found["rows"].items():
        error = "–" if row["frame_error"] is None else f"{row['frame_error']:.1e}"
        lines.append(f"| {head} | {row['lr']:g} | {row['accuracy']:.2%} ± {row['spread']:.2%} | {row['lowest']:.2%} to "
                     f"{row['highest']:.2%} | {error} | {row['seconds_per_step']:.3f} |")
    lines += ["", f"γ: {setting.get('gamma', 25)}. CPU, threads: {setting['threads']}, torch {setting['torch']}; "
              "numbers in [swap_head.json](../examples/swap_head.json). Easy images and three seeds can't tell the "
              "heads apart; what subspaces bring on ImageNet is in the paper."]
    return "\n".join(lines)


def gamma_table():
    """Accuracy of heads by γ: by rule, and how far off others are, paired by seed."""
    found = json.loads((ROOT / "examples/gamma.json").read_text())
    tasks = [task for task in found["tasks"] if "auto" in task]  # others are being measured
    factors = (0.25, 0.5, 2, 4)
    others = " | ".join(f"{factor:g} γ" for factor in factors)
    lines = [f"| task | classes | n | k | γ by rule | accuracy (rate) | {others} | γ = 25 |", "|---" * 11 + "|"]
    for task in tasks:
        auto, rows = task["auto"], task["rows"]
        best = rows[f"{auto:g}"]
        cells = []
        for gamma in (*(round(auto * f, 2) for f in factors), 25.0):
            row = rows.get(f"{gamma:g}")
            cells.append(evidence_heads.points_of(row["accuracy"], best["accuracy"]) if row else "")
        lines.append(f"| {task['name']} | {task['classes']} | {task['n']} | {task['k']} | {auto:g} | "
                     f"{statistics.mean(best['accuracy']):.1%} ({best['lr']:g}) | {' | '.join(cells)} |")
    setting = found["setting"]
    single = [task for task in tasks if not any(row["validation"] for row in task["rows"].values())]
    given = "".join(f"of {task['classes']} classes it is one for all, and training is short ({task['epochs']} epochs). "
                    for task in single)
    lines += ["", f"Held-out accuracy, mean of {setting['seeds']} seeds, and the learning rate; beside it points more "
              "or less at other γ (95 %, paired). Frames start at random; of each γ the learning rate is the best in "
              f"validation{', ' if single else '. '}{given}CPU, "
              f"threads: {setting['threads']}, torch {setting['torch']}; numbers in "
              "[gamma.json](../examples/gamma.json)."]
    return "\n".join(lines)


def recipes_table():
    """Settings of the examples and what came out, each with its command."""
    swap, gamma, digits, text, many = (
        json.loads((ROOT / f"examples/{name}.json").read_text())
        for name in ("swap_head", "gamma", "finetune", "finetune_text", "many_classes"))
    lines = ["| task | trained | optimiser | rate | k | epochs | accuracy | beside it | command |", "|---" * 9 + "|"]

    def add(task, what, optimiser, row, k, epochs, other, command):
        rate = f"{row['lr']:g}" + (f", head {row['head']:g}" if "head" in row else "")
        cells = (task, what, optimiser, rate, k, epochs, f"{row['accuracy']:.1%}", other,
                 f"`python examples/{command}`")
        lines.append(f"| {' | '.join(map(str, cells))} |")

    def beside(name, row):
        return f"{name} {row['accuracy']:.1%}"

    def told(row, measure):
        return {"lr": row["lr"], "accuracy": statistics.mean(evidence_heads.shares(row["runs"], measure))}

    rows, setting = swap["rows"], swap["setting"]
    gamma_there = setting.get("gamma", 25)
    add("digits", f"ResNet-18 from scratch, γ: {gamma_there}", "`RiemannianSGD`, momentum 0.9", rows["grassmann"],
        setting["subspace_dim"], setting["epochs"], beside("linear head", rows["linear"]), "swap_head.py")
    rows, setting = many["rows"], many["setting"]
    best = evidence_heads.best_head(rows)
    add(f"{setting['classes']} Chinese characters", "small network from scratch, normalised, and Grassmann head",
        "`RiemannianAdamW`", told(rows[best], "accuracy"), rows[best]["setting"]["k"], setting["epochs"],
        beside("cosine head", told(rows["cosine"], "accuracy")), "many_classes.py")
    for task in gamma["tasks"]:
        if task.get("n") == 384 and task["classes"] > 2:
            best, papers = ({"lr": row["lr"], "accuracy": statistics.mean(row["accuracy"])}
                            for row in (task["rows"][f"{task['auto']:g}"], task["rows"]["25"]))
            add(f"{task['classes']} {task['name']}", "head on a frozen MiniLM", "`RiemannianAdamW`", best, task["k"],
                task["epochs"], beside("γ = 25", papers), "gamma.py")
    for task, shots, rows in evidence_heads.complete(text):
        for name, what in (("ours", "adapters"), ("our cores alone", "adapters' cores"),
                           ("all weights", "all weights")):
            for head, k in (("linear", "–"), ("Grassmann", text["setting"]["k"])):
                if (method := f"{name}, {head} head") in rows:
                    row = told(rows[method], "right")
                    if name == "all weights":
                        row["head"] = evidence_heads.head_factor() * row["lr"]
                    add(f"8 {task}, {shots} examples each", f"MiniLM: {what} and {head} head", "`RiemannianAdamW`", row,
                        k, text["setting"]["epochs"], beside("LoRA", told(rows[f"LoRA (peft), {head} head"], "right")),
                        "finetune_text.py")
    rows, setting = digits["rows"], digits["setting"]
    for method, what in (("ours", "convolutions: adapters and linear head"),
                         ("full fine-tuning", "convolutions: all weights and linear head")):
        add(f"5 digits, {setting['shots']} examples each", what, "`RiemannianAdamW`", rows[method], "–",
            setting["epochs"], beside("LoRA", rows["LoRA (peft)"]), "finetune.py")
    return "\n".join(lines)


def finetune_table(name):
    """Methods of one task of examples/finetune.py."""
    found = json.loads((ROOT / f"examples/{name}.json").read_text())
    setting = found["setting"]
    kept = all("state_bytes" in row for row in found["rows"].values())  # older results don't tell
    heads = ["method", "accuracy", "trained parameters", *["optimiser's state"] * kept, "ms per step",
             "peak beyond the model"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, row in found["rows"].items():
        spread = "" if row["spread"] is None else f" ± {row['spread']:.2%}"
        cells = [method, f"{row['accuracy']:.2%}{spread}", f"{row['trained_parameters']:,}",
                 *([f"{row['state_bytes'] / 2**10:.0f} KiB"] if kept else []),
                 "–" if row["seconds_per_step"] is None else f"{1e3 * row['seconds_per_step']:.1f}",
                 f"{row['peak_bytes'] / 2**20:.1f} MiB"]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = f"{setting['seeds']} seeds" if setting["seeds"] > 1 else "one seed"
    lines += ["", f"{seeds[0].upper()}{seeds[1:]}, {setting['shots']} examples a class, {setting['epochs']} epochs, "
              f"CPU, threads: {setting['threads']}, torch {setting['torch']}; numbers in "
              f"[{name}.json](../examples/{name}.json). " + " ".join(found["notes"])]
    return "\n".join(lines)


def cluster_table():
    """Algorithms of examples/cluster.py."""
    found = json.loads((ROOT / "examples/cluster.json").read_text())
    setting = found["setting"]
    lines = ["| algorithm | accuracy | NMI | ARI | held-out accuracy | seconds |", "|---|---|---|---|---|---|"]
    for name, row in found["rows"].items():
        train, other = row["train"], row.get("held-out")
        held_out = f"{other['acc']:.1%} ({other['lowest']:.1%} to {other['highest']:.1%})" if other else "–"
        lines.append(f"| {name} | {train['acc']:.1%} ({train['lowest']:.1%} to {train['highest']:.1%}) | "
                     f"{train['nmi']:.3f} | {train['ari']:.3f} | {held_out} | {row['seconds']:.2g} |")
    lines += ["", f"{setting['images']} images, {setting['held_out']} held out; medians and ranges over "
              f"{setting['seeds']} seeds; clusters are matched to digits by the Hungarian method. The others get raw "
              "pixels, ManifoldClustering augments them. CPU, threads: "
              f"{setting['threads']}, torch {setting['torch']}; numbers in "
              "[cluster.json](../examples/cluster.json)."]
    return "\n".join(lines)


def represent_table():
    """Methods of examples/represent.py by the share of wrong labels."""
    found = json.loads((ROOT / "examples/represent.json").read_text())
    setting, rows = found["setting"], found["accuracy"]
    shares = list(next(iter(rows.values())))
    lines = ["| wrong labels | " + " | ".join(f"{float(s):.0%}" for s in shares) + " |", "|---|" + "---|" * len(shares)]
    for method, row in rows.items():
        lines.append(f"| {method} | " + " | ".join(f"{sum(row[s]) / len(row[s]):.1%}" for s in shares) + " |")
    ours, *others = rows
    for other in others:
        cells = [evidence_heads.points_of(rows[ours][share], rows[other][share]) for share in shares]
        lines.append(f"| {ours}, less {other} | {' | '.join(cells)} |")
    overlap = ", ".join(f"{name} {value:.2f}" for name, value in found["mean cosine between classes"].items())
    lines += ["", f"Held-out accuracy, mean of {setting['seeds']} seeds; differences in points, paired by seed, with "
              "their 95 % intervals. Mean |cosine| of two classes' features, "
              f"labels right: {overlap}. CPU, threads: {setting['threads']}, torch {setting['torch']}; numbers in "
              "[represent.json](../examples/represent.json)."]
    return "\n".join(lines)


def denoise_table():
    """What examples/denoise.py leaves of the noise."""
    found = json.loads((ROOT / "examples/denoise.json").read_text())
    methods = list(next(iter(found["noise"].values()))["dimension"])
    lines = ["| noise | left alone | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    for noise, row in found["noise"].items():
        errors = [row["error"][name] for name in ("nothing", *methods)]
        cells = [f"{sum(e) / len(e):.4f}" for e in errors]
        for i, name in enumerate(methods, 1):
            chosen = " to ".join(str(d) for d in sorted({min(row["dimension"][name]), max(row["dimension"][name])}))
            cells[i] += f" ({min(errors[i]):.4f} to {max(errors[i]):.4f}), of dimension {chosen}"
        lines.append(f"| {noise} | " + " | ".join(cells) + " |")
    accuracy = ", ".join(f"{sum(a) / len(a):.1%} with {k} dimension{'s' * (k != '1')}"
                         for k, a in found["nearest subspace"].items())
    lines += ["", f"Mean squared error of a pixel (range), held-out images, {found['setting']['seeds']} splits. "
              f"Nearest class subspace, without training: {accuracy}. Numbers in "
              "[denoise.json](../examples/denoise.json)."]
    return "\n".join(lines)


def phase_table():
    """Points that unions take which examples/phase_transition.py finds: of all unions, and of each set of them."""
    found = json.loads((ROOT / "examples/phase_transition.json").read_text())
    setting, rows = found["setting"], found["rows"]
    lines = ["| k | at k points | half are found from | nine of ten from | all from |", "|---|---|---|---|---|"]

    def first(shares, least):
        """The number of points from which on no share is less."""
        short = [points for points, share in shares.items() if share < least]
        return next((points for points in sorted(shares) if not short or points > max(short)), None)

    for k in dict.fromkeys(row["k"] for row in rows):
        own = {row["points"]: row["found"] for row in rows if row["k"] == k}
        cells = [f"{statistics.mean(own[k]):.0%}"]
        for least in (0.5, 0.9, 1.0):
            sets = [first({points: share[i] for points, share in own.items()}, least) for i in range(setting["sets"])]
            whole = first({points: statistics.mean(share) for points, share in own.items()}, least)
            among = " to ".join(map(str, sorted({min(sets), max(sets)}))) if all(sets) else "–"
            cells.append(f"{whole} points (sets: {among}), {whole / k:.2g} per dimension" if whole else "–")
        lines.append(f"| {k} | {' | '.join(cells)} |")
    lines += ["", f"{setting['clusters']} subspaces of R^{setting['features']}, {setting['sets']} sets of "
              f"{setting['unions']} random unions of each size, at most {setting['starts']} starts. Numbers in "
              "[phase_transition.json](../examples/phase_transition.json)."]
    return "\n".join(lines)


def retrieve_table():
    """Recall@1 of examples/retrieve.py."""
    found = json.loads((ROOT / "examples/retrieve.json").read_text())
    setting = found["setting"]
    lines = ["| looked up | embedding | Recall@1 (range) | untrained | learners |", "|---|---|---|---|---|"]
    for task, methods in found["rows"].items():
        for method, row in methods.items():
            recall, sizes = row["recall"], [len(dims) for dims in row["dims"]]
            learners = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
            lines.append(f"| {task} | {method} | {statistics.mean(recall):.1%} ({min(recall):.1%} to "
                         f"{max(recall):.1%}) | {statistics.mean(row['before']):.1%} | {learners} |")
    lines += ["", f"Mean of {setting['seeds']} seeds, {setting['epochs']} epochs, {setting['dim']} coordinates. On "
              "these digits learners are no better than one embedding, and with either, training makes digits that "
              "were left out harder to tell: what is claimed elsewhere is of large sets of photographs. Numbers in "
              "[retrieve.json](../examples/retrieve.json)."]
    return "\n".join(lines)
