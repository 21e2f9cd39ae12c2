"""Write the tables and the picture of README.md and docs/ anew, from the results of the benchmarks and the examples."""

import json
import re
import statistics
from pathlib import Path

import compatible_table
import evidence_tables
import gpu_table
import lejepa_table
import overview

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {  # op, case, our contender, theirs, in the order of the table
    "rsgd": [("C=1000 k=8 n=2048 float32", "ours: geodesic",
              ("floor: torch SGD(fused=True)", "torch.compile: Cholesky-QR", "torch.compile: geodesic series",
               "geoopt Euclidean Stiefel", "GCR formula: SVD, QR every 5th"))],
    "logits": [("B=256 n=2048 C=1000 k=8 float32, forward", "ours",
                ("floor: matrix products alone", "eager formula", "torch.compile of the formula")),
               ("B=256 n=2048 C=1000 k=8 float32, forward and backward", "ours: projections kept",
                ("floor: matrix products alone", "eager formula", "torch.compile of the formula")),
               ("B=256 n=128 C=100 k=8 float32, forward", "ours",
                ("floor: matrix products alone", "eager formula", "torch.compile of the formula"))],
    "cross_entropy": [("B=256 n=512 C=21841 k=8 float32", "ours: fused", ("eager", "torch.compile"))],
    "tucker_linear": [("linear 4096 to 4096, T=512 float32", "ours",
                ("floor: frozen layer", "peft LoRA", "LyCORIS LoCon, bypass", "FLoRA's formula"))],
    "tucker_conv": [("conv 3x3, 256 to 256, 56x56, B=8 float32", "ours",
                ("floor: frozen layer", "peft LoRA", "LyCORIS LoCon, bypass", "FLoRA's formula")),
               ("depthwise 7x7 (ConvNeXt), C=96, 56x56, B=8 float32", "ours",
                ("floor: frozen layer", "peft LoHa", "LyCORIS LoCon", "FLoRA's formula"))],
    "tucker": [("compose 256x256x3x3 float32", "ours",
                ("floor: a copy of base", "einsum", "by hand: matmul and addmm"))],
    "coding_rate": [("n=2048 d=512 100 classes float32", "ours",
                     ("loop over classes", "eager, sorted and padded", "torch.compile of it")),
                    ("n=1024 d=128 R float32", "ours", ("eager, smaller side", "torch.compile of it"))],
    "coding_rate_soft": [("MLC n=1024 d=128 K=1024 float32", "ours",
                          ("official form", "eager, chunks of classes", "eager, face-splitting product")),
                         ("soft classes n=2048 d=512 K=10 float32", "ours",
                          ("official form", "eager, chunks of classes"))],
    "sinkhorn": [("n=1024 eta=0.1 float32", "ours",
                  ("five half steps", "five half steps, compiled", "twenty unrolled sweeps",
                   "eager implicit gradient"))],
    "sigreg": [("V=1 n=512 d=128 slices=256 float32", "ours",
                ("floor: matrix products alone", "published formula", "torch.compile of it")),
               ("V=2 n=512 d=512 slices=1024 float32", "ours",
                ("floor: matrix products alone", "published formula", "torch.compile of it"))],
    "depthwise": [("B=8 C=96 56x56 kernel 7x7 float32", "ours", ("torch: convolution_backward",))],
}
PEERS = [  # op, case, what the README calls it, our contender, the usual or official one
    ("rsgd", "C=1000 k=8 n=2048 float32", "optimiser step, 1000 frames of 8 × 2048", "ours: geodesic",
     "geoopt Euclidean Stiefel"),
    ("logits", "B=256 n=2048 C=1000 k=8 float32, forward and backward", "logits of 256 × 2048, 1000 classes",
     "ours: projections kept", "eager formula"),
    ("cross_entropy", "B=256 n=512 C=21841 k=8 float32", "loss of 256 × 512, 21841 classes", "ours: fused", "eager"),
    ("tucker_linear", "linear 4096 to 4096, T=512 float32", "adapted linear layer, 4096 to 4096", "ours",
     "FLoRA's formula"),
    ("tucker_conv", "depthwise 7x7 (ConvNeXt), C=96, 56x56, B=8 float32", "adapted depthwise convolution, 7 × 7",
     "ours", "peft LoHa"),
    ("coding_rate", "n=2048 d=512 100 classes float32", "coding rate of 100 labels, 2048 × 512", "ours",
     "loop over classes"),
    ("coding_rate_soft", "MLC n=1024 d=128 K=1024 float32", "coding rate of 1024 soft classes, 1024 × 128", "ours",
     "official form"),
    ("sinkhorn", "n=1024 eta=0.1 float32", "doubly stochastic projection, 1024 × 1024", "ours", "five half steps"),
]
NAMES = {
    "geoopt Euclidean Stiefel": "geoopt",
    "eager": "eager formula",
    "torch.compile": "compiled formula",
    "torch.compile of the formula": "compiled formula",
    "five half steps": "official five half steps, inexact",
    "five half steps, compiled": "five half steps compiled, inexact",
}


def results(op):
    """Where an op was measured, and its rows by (case, contender)."""
    found = json.loads((ROOT / f"tests/bench/results/{op}.json").read_text())
    return found["environment"], {(row["case"], row["contender"]): row for row in found["rows"]}


def peers_table():
    """The README's few rows: time, and peak memory where the best other one takes more than half as much again."""

    def number(value):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def cell(row, memory):
        peak = f", {number(row['beyond_results_mib'])} MiB" if memory else ""
        name = NAMES.get(row["contender"], row["contender"])
        return f"{number(row['p50_ms'])} ms{peak}" + ("" if name.startswith("ours") else f" ({name})")

    lines = ["| forward and backward | ours | fastest other | usual or official |", "|---|---|---|---|"]
    threads = set()
    for op, case, what, ours, usual in PEERS:
        where, rows = results(op)
        threads.add(where["threads"])
        mine, other, usual = rows[case, ours], gpu_table.best_other(list(rows.values()), case), rows[case, usual]
        peaks = [row.get("beyond_results_mib", 0) for row in (mine, other)]
        memory = peaks[0] > 0 and peaks[1] > 1.5 * peaks[0]
        lines.append(f"| {what} | {' | '.join(cell(row, memory) for row in (mine, other, usual))} |")
    lines += ["", f"Medians on a CPU, float32, threads: {', '.join(map(str, sorted(threads)))}; MiB: peak memory "
              "beyond the gradients. Machines, commits",
              "and all other rows, also where ours is slower: [performance](docs/performance.md)."]
    return "\n".join(lines)


def bench_table():
    """Medians of the main cases, and where they were measured."""
    lines = ["| op, size | | time | of ours | peak memory |", "|---|---|---|---|---|"]
    places = {}
    for op, cases in SHOWN.items():
        where, rows = results(op)
        places.setdefault(place(where), []).append(f"`{op}`")
        for case, ours, peers in cases:
            mine = rows[case, ours]
            memory = mine.get("beyond_results_mib", 0) > 0
            for contender in (ours, *peers):
                row = rows[case, contender]
                if "missing" in row:
                    continue
                size = f"`{op}` {case.replace(' float32', '')}" if contender == ours else ""
                name = f"**{contender}**" if contender == ours else contender
                peak = f"{row['beyond_results_mib']:.3g} MiB" if memory else ""
                lines.append(f"| {size} | {name} | {row['p50_ms']:.4g} ms | {row['p50_ms'] / mine['p50_ms']:.2f} × | "
                             f"{peak} |")
    lines += ["", "Medians, CPU, float32; peak memory beyond the gradients.", ""]
    lines += [f"* {', '.join(ops)}: {told}" for told, ops in places.items()]
    return "\n".join(lines)


def place(where):
    """Machine, versions and commit of a run."""
    return (f"{where['cpu']} ({where['instruction set']}), threads: {where['threads']}, torch {where['torch']}, "
            f"commit {where['commit']}, {where['date'][:10]}.")


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
    factors = (0.25, 0.5, 2, 4)
    others = " | ".join(f"{factor:g} γ" for factor in factors)
    lines = [f"| task | classes | n | k | γ by rule | accuracy | {others} | γ = 25 |", "|---" * 11 + "|"]
    for task in found["tasks"]:
        auto, rows = task["auto"], task["rows"]
        best = rows[f"{auto:g}"]["accuracy"]
        cells = []
        for gamma in (*(round(auto * f, 2) for f in factors), 25.0):
            row = rows.get(f"{gamma:g}")
            off = [100 * (a - b) for a, b in zip(row["accuracy"], best, strict=True)] if row else []
            half = 4.303 * statistics.stdev(off) / len(off) ** 0.5 if row else 0  # Student's t, two degrees of freedom
            cells.append(f"{statistics.mean(off):+.1f} ± {half:.1f}" if row else "")
        lines.append(f"| {task['name']} | {task['classes']} | {task['n']} | {task['k']} | {auto:g} | "
                     f"{statistics.mean(best):.1%} | {' | '.join(cells)} |")
    setting = found["setting"]
    lines += ["", f"Held-out accuracy, mean of {setting['seeds']} seeds; beside it points more or less at other γ "
              "(95 %, paired). Frames start at random; of each γ the learning rate is the best in validation, "
              "of 3755 characters it is one for all, and training is short. CPU, "
              f"threads: {setting['threads']}, torch {setting['torch']}; numbers in "
              "[gamma.json](../examples/gamma.json)."]
    return "\n".join(lines)


def recipes_table():
    """Settings of the examples and what came out, each with its command."""
    swap, gamma, digits, text = (json.loads((ROOT / f"examples/{name}.json").read_text())
                                 for name in ("swap_head", "gamma", "finetune", "finetune_text"))
    lines = ["| task | trained | optimiser | rate | k | epochs | accuracy | beside it | command |", "|---" * 9 + "|"]

    def add(task, what, optimiser, row, k, epochs, other, command):
        cells = (task, what, optimiser, f"{row['lr']:g}", k, epochs, f"{row['accuracy']:.1%}", other,
                 f"`python examples/{command}`")
        lines.append(f"| {' | '.join(map(str, cells))} |")

    def beside(name, row):
        return f"{name} {row['accuracy']:.1%}"

    rows, setting = swap["rows"], swap["setting"]
    gamma_there = setting.get("gamma", 25)
    add("digits", f"ResNet-18 from scratch, γ: {gamma_there}", "`RiemannianSGD`, momentum 0.9", rows["grassmann"],
        setting["subspace_dim"], setting["epochs"], beside("linear head", rows["linear"]), "swap_head.py")
    for task in gamma["tasks"]:
        if task["n"] == 384 and task["classes"] > 2:
            best, papers = ({"lr": row["lr"], "accuracy": statistics.mean(row["accuracy"])}
                            for row in (task["rows"][f"{task['auto']:g}"], task["rows"]["25"]))
            add(f"{task['classes']} {task['name']}", "head on a frozen MiniLM", "`RiemannianAdamW`", best, task["k"],
                task["epochs"], beside("γ = 25", papers), "gamma.py")
    rows, setting = text["rows"], text["setting"]
    for head, k in (("linear", "–"), ("Grassmann", 8)):
        add(f"8 sections, {setting['shots']} examples each", f"adapters and {head} head", "`RiemannianAdamW`",
            rows[f"ours, {head} head"], k, setting["epochs"], beside("LoRA", rows["LoRA (peft), linear head"]),
            "finetune.py --text")
    rows, setting = digits["rows"], digits["setting"]
    for method, what, k in (("ours", "adapters and linear head", "–"), ("full fine-tuning", "all weights", "–")):
        add(f"5 digits, {setting['shots']} examples each", what, "`RiemannianAdamW`", rows[method], k,
            setting["epochs"], beside("LoRA", rows["LoRA (peft)"]), "finetune.py")
    return "\n".join(lines)


def finetune_table(name):
    """Methods of one task of examples/finetune.py."""
    found = json.loads((ROOT / f"examples/{name}.json").read_text())
    setting = found["setting"]
    lines = ["| method | accuracy | trained parameters | ms per step | peak beyond the model |",
             "|---|---|---|---|---|"]
    for method, row in found["rows"].items():
        spread = "" if row["spread"] is None else f" ± {row['spread']:.2%}"
        lines.append(f"| {method} | {row['accuracy']:.2%}{spread} | {row['trained_parameters']:,} | "
                     f"{1e3 * row['seconds_per_step']:.1f} | {row['peak_bytes'] / 2**20:.1f} MiB |")
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
    overlap = ", ".join(f"{name} {value:.2f}" for name, value in found["mean cosine between classes"].items())
    lines += ["", f"Held-out accuracy, mean of {setting['seeds']} seeds. Mean |cosine| of two classes' features, "
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


def plan_table():
    """How many GPUs a head with very many classes takes, by `distributed.plan`."""
    import torch

    import torch_subspace as ts

    k, features, batch = 8, 512, 1024
    lines = ["| classes | | of 80 GB | of 141 GB | memory of each | sent by each | work of each |",
             "|---|---|---|---|---|---|---|"]
    for classes in (10**6, 10**7):
        for what, options in (
            ("SGD with momentum", {}),
            ("AdamW", {"optimizer": "adamw"}),
            ("SGD, autocast to bfloat16", {"dtype": torch.bfloat16}),
            ("the same, a tenth of the classes", {"dtype": torch.bfloat16, "sample_rate": 0.1}),
        ):
            found = []
            for memory in (80e9, 141e9):
                ranks = 1
                while (plan := ts.distributed.plan(classes, features, k, batch, ranks, **options)).peak > 0.8 * memory:
                    ranks += 1
                found.append((ranks, plan))
            cells = [f"{ranks}" for ranks, _ in found]
            for key, unit, size in (("peak", "GB", 1e9), ("sent", "MB", 1e6), ("flops", "TFLOP", 1e12)):
                numbers = dict.fromkeys(f"{getattr(plan, key) / size:.1f}" for _, plan in found)
                cells.append(f"{', '.join(numbers)} {unit}")
            lines.append(f"| {classes // 10**6} million | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def class_parallel_table():
    """A step on several processes, measured and planned."""
    path = ROOT / "tests/bench/results/class_parallel.json"
    if not path.exists():
        return "Not measured yet: `python tests/bench/class_parallel.py`."
    found = json.loads(path.read_text())
    one, timed = found["rows"][0], "loss_ms" in found["rows"][0]
    heads = ["processes", *(["loss and gradients", "step", "of one process"] if timed else []), "sent by each",
             "peak of each", "its resident memory", "planned"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found["rows"]:
        cells = [f"{row['processes']}"]
        if timed:
            ratio = (row["loss_ms"] + row["step_ms"]) / (one["loss_ms"] + one["step_ms"])
            cells += [f"{row['loss_ms']:.0f} ms", f"{row['step_ms']:.0f} ms", f"{ratio:.2f} ×"]
        cells += [f"{row['sent_bytes'] / 1e6:.2f} MB",
                  *(f"{row[key]:.0f} MB" for key in ("peak_mb", "resident_mb", "planned_mb"))]
        lines.append(f"| {' | '.join(cells)} |")
    where = found["environment"]
    lines += ["", f"{found['case']}; gloo, a thread a process, cores: {where['cores']}; {place(where)}"]
    return "\n".join(lines)


UNVERIFIED = """**Unverified on a GPU.** The kernels compile and link for sm_80 to sm_120. On a CPU, a fiber a thread,
they pass the native tests and the reference tests (`make cuda-on-cpu`, `make cuda-race`,
`make pytest-cuda-on-cpu`). No GPU has run them so far: there are no figures."""


def gpu():
    """What a GPU has shown: the table without its title, or that none has run this."""
    text = gpu_table.write()
    return UNVERIFIED if text == gpu_table.UNVERIFIED else text.split("\n", 2)[2].strip()


def gpu_mark():
    """The README's words on GPUs."""
    cards = {json.loads(path.read_text())["environment"]["device"]
             for path in sorted((ROOT / "tests/bench/results").glob("*_cuda.json"))}
    if not cards:
        return UNVERIFIED
    return f"Measured on {' and '.join(sorted(cards))}: [on a GPU](docs/gpu.md)."


PAGES = {  # what stands between the markers of a page: <!-- name --> ... <!-- /name -->
    "README.md": {"peers": peers_table, "gpu": gpu_mark},
    "docs/heads.md": {"gamma": gamma_table, "demo": demo_table, "denoise": denoise_table},
    "docs/recipes.md": {"recipes": recipes_table},
    "docs/distributed.md": {"plan": plan_table, "class_parallel": class_parallel_table},
    "docs/adapters.md": {"finetune": lambda: finetune_table("finetune"),
                         "finetune_text": lambda: finetune_table("finetune_text")},
    "docs/rates.md": {"cluster": cluster_table, "represent": represent_table},
    "docs/evidence.md": evidence_tables.TABLES,
    "docs/isotropy.md": {"lejepa": lejepa_table.write, "compatible": compatible_table.write},
    "docs/performance.md": {"bench": bench_table},
    "docs/gpu.md": {"gpu": gpu},
}


def page(path):
    """The text of a page with its tables as they should be."""
    text = (ROOT / path).read_text()
    for name, table in PAGES[path].items():
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text, found = re.subn(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            raise ValueError(f"{path} needs one pair of markers <!-- {name} --> and <!-- /{name} -->, has {found}")
    return text


def main():
    """Replace what stands between the markers, and the picture."""
    for path in PAGES:
        (ROOT / path).write_text(page(path))
    overview.draw()


if __name__ == "__main__":
    main()
