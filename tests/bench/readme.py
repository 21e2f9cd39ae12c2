"""Write the tables and the picture of README.md and docs/ anew, from the results of the benchmarks and the examples."""

import json
import re
from pathlib import Path

import compatible_table
import cost_tables
import evidence_brief
import evidence_heads
import evidence_tables
import four_losses_table
import gpu_table
import lejepa_table
import lowrank_tables
import overview
import processors
import projectors_table
import spectral_table
import subspace_tables
from example_tables import (
    cluster_table,
    demo_table,
    denoise_table,
    finetune_table,
    gamma_table,
    phase_table,
    recipes_table,
    represent_table,
    retrieve_table,
)

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {  # op, case, our contender, theirs, in the order of the table
    "rsgd": [("C=1000 k=8 n=2048 float32", "ours: geodesic",
              ("floor: torch SGD(fused=True)", "torch.compile: Cholesky-QR", "torch.compile: geodesic series",
               "geoopt Euclidean Stiefel", "GCR formula: SVD, QR every 5th")),
             *((f"C={classes} k={k} n={n} float32", "ours: geodesic", ("floor: torch SGD(fused=True)",))
               for classes, k, n in ((1000, 1, 2048), (1000, 4, 2048), (1000, 16, 2048), (1000, 32, 768),
                                     (300, 64, 768), (30000, 8, 64), (100, 8, 512), (250, 8, 8192)))],
    "logits": [("B=256 n=2048 C=1000 k=8 float32, forward", "ours",
                ("floor: matrix products alone", "eager formula", "torch.compile of the formula")),
               ("B=256 n=2048 C=1000 k=8 float32, forward and backward", "ours: projections kept",
                ("floor: matrix products alone", "eager formula", "torch.compile of the formula")),
               ("B=256 n=128 C=100 k=8 float32, forward", "ours",
                ("floor: matrix products alone", "eager formula", "torch.compile of the formula")),
               ("B=256 n=128 C=100 k=8 float32, forward and backward", "ours: projections kept",
                ("floor: matrix products alone", "eager formula", "torch.compile of the formula")),
               ("B=256 n=2048 C=1000 k=8 bfloat16, forward", "ours", ("ours: float32", "eager formula")),
               ("B=256 n=2048 C=1000 k=8 bfloat16, forward and backward", "ours: projections kept",
                ("ours: float32", "eager formula"))],
    "cross_entropy": [("B=256 n=512 C=21841 k=8 float32", "ours: fused", ("eager", "torch.compile")),
                      *((f"B=256 n=512 C={classes} k=1 float32", "ours: fused",
                         ("eager", "torch linear_cross_entropy", "torch linear_cross_entropy, chunked"))
                        for classes in (21841, 128256)),
                      ("B=256 n=512 C=1000 k=8 bfloat16", "ours: fused", ("ours: float32", "eager"))],
    "tucker_linear": [("linear 4096 to 4096, T=512 float32", "ours",
                ("floor: frozen layer", "peft LoRA", "LyCORIS LoCon, bypass", "FLoRA's formula")),
               ("linear 768 to 3072, T=512 float32", "ours",
                ("floor: frozen layer", "ours: adapt(model)", "ours: adapt(model), SpectralConfig", "peft LoRA")),
               ("linear 768 to 3072, T=2048 bfloat16", "ours", ("floor: frozen layer", "ours: float32", "peft LoRA"))],
    "tucker_conv": [("conv 3x3, 256 to 256, 56x56, B=8 float32", "ours",
                ("floor: frozen layer", "peft LoRA", "LyCORIS LoCon, bypass", "FLoRA's formula")),
               ("depthwise 7x7 (ConvNeXt), C=96, 56x56, B=8 float32", "ours",
                ("floor: frozen layer", "peft LoHa", "LyCORIS LoCon", "FLoRA's formula")),
               *((f"{what} float32", "ours", ("floor: frozen layer", "peft LoRA", "FLoRA's formula"))
                 for what in ("grouped 3x3 (ResNeXt), 32 groups of 4, 28x28, B=8",
                              "patches 16x16 (ViT), 3 to 768, 224x224, B=8"))],
    "tucker": [(f"compose {n}x{n}x3x3 float32", "ours",
                ("floor: a copy of base", "einsum", "by hand: matmul and addmm")) for n in (256, 2048)],
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
    "coso": [("768x768 r1=50 r2=120 float32", "ours", ("floor: matrix products alone", "the form with two SVDs"))],
    "sigreg": [("V=1 n=512 d=128 slices=256 float32", "ours",
                ("floor: matrix products alone", "published formula", "torch.compile of it")),
               ("V=2 n=512 d=512 slices=1024 float32", "ours",
                ("floor: matrix products alone", "published formula", "torch.compile of it"))],
    "newton_schulz": [(f"{size} float32", "ours",
                       ("torch.optim.Muon's, float32", "torch.compile of it", "torch.optim.Muon's, bfloat16"))
                      for size in ("384x384", "384x1536", "1024x1024", "4096x1024")],
    "product": [(f"{what}, {size}, r=128 float32", "ours", ("torch",))
                for size in ("1024x1024", "4096x4096", "1536x384") for what in ("G Q", "G' X", "W + L Q'")],
    "low_rank_adamw": [(f"{what} rank=128 float32, directions {which}", "ours",
                        ("floor: matrix products alone", "ours: Hadamard's basis", "apollo-torch", "galore-torch",
                         "pytorch_optimizer GaLore", "torch AdamW(fused=True), all dimensions"))
                       for what in ("4096x4096", "1024x1024", "MiniLM") for which in ("found", "kept")],
    "trion": [(f"{size} rank 128 float32", "ours",
               ("floor: transform, products, Newton-Schulz", "torch.optim.Muon, bfloat16",
                "ours: LowRankAdamW, cosines", "torch.optim.AdamW"))
              for size in ("1024x1024", "4096x1024", "4096x4096", "a MiniLM's layers")],
    "hadamard": [("1 rows of 1048576 float32", "ours",
                  ("floor: a copy", "chunks and concatenations", "torch.compile of it")),
                 *((f"{v} rows of {n} float32", "ours", ("floor: a copy",)) for v, n in ((16384, 1024), (2048, 8192)))],
    "fastfood": [("1000 to 1048576 float32", "ours", ("floor: two transforms", "stored, chunks and concatenations")),
                 ("200 to 17610 float32", "ours",
                  ("floor: two transforms", "stored, chunks and concatenations", "dense matrix"))],
    "gated_cosine": [(f"b={b} n={n} k={k} float32", "ours",
                      ("floor: matrix products alone", "identity, autograd's gradient", "b x n x k form",
                       "torch.compile of it")) for b, n, k in ((256, 256, 256), (64, 2048, 128))],
    "lambda_orthogonality": [("24 layers 768x768 float32", "ours",
                              ("floor: matrix products alone", "formula", "torch.compile of it"))],
    "isotropy_losses": [("Koopman loss B=8 T=64 d=32 k=3 float32", "ours", ("formula", "torch.compile of it")),
                        ("procrustes n=2048 d=256 float32", "ours",
                         ("floor: products and factorisations alone", "formula", "torch.compile of it")),
                        ("procrustes n=2048 d=256 float32, forward", "ours",
                         ("formula", "scipy orthogonal_procrustes")),
                        ("orthogonal adapter n=2048 d=256 float32", "ours",
                         ("floor: a linear layer", "torch orthogonal(Linear), Cayley", "peft OFT, one block"))],
    "frames": [("denoise n=4096 features=256 K=20 k=8 float32", "ours",
                ("floor: two products", "full covariances", "by projections", "torch.compile of it")),
               ("patch n=1024 d=768 r=64 float32", "ours",
                ("floor: products and factorisations alone", "formula", "rotation by torch orthogonal(Linear)")),
               ("distances B=8 T=64 d=768 k=64 float32", "ours",
                ("differences first", "differences of projections", "torch.compile of it", "inner products")),
               ("probe loss B=16 T=128 d=768 k=128 float32", "ours", ("formula", "torch.compile of it")),
               *((f"normalize 4096x512 {what} float32", "ours", ("formula", "torch.compile of it"))
                 for what in ("8 groups of 64", "6 groups of 16 to 256")),
               ("margin loss n=256 features=512 D=128 float32", "ours", ("anchor by anchor",))],
    "depthwise": [("B=8 C=96 56x56 kernel 7x7 float32", "ours", ("torch: convolution_backward",))],
    "subspaces": [("labels n=100000 features=256 K=100 k=8 float32", "ours",
                   ("floor: matrix product alone", "eager formula")),
                  *((f"iteration n=20000 features={features} K={clusters} k={k} float32", "ours",
                     ("floor: product, Gram matrices, eigenproblems", "batched formula", "loop over subspaces"))
                    for features, clusters, k in ((256, 100, 8), (64, 20, 4))),
                  ("Stiefel step C=1000 k=8 n=2048 float32", "ours: geodesic",
                   ("floor: torch SGD(fused=True)", "ours, Grassmannian: geodesic", "geoopt Euclidean Stiefel"))],
}
PEERS = [  # op, case, what the README calls it, our contender, the usual or official one
    ("rsgd", "C=1000 k=8 n=2048 float32", "optimiser step, 1000 frames of 8 × 2048", "ours: geodesic",
     "geoopt Euclidean Stiefel"),
    ("logits", "B=256 n=2048 C=1000 k=8 float32, forward and backward", "logits of 256 × 2048, 1000 classes",
     "ours: projections kept", "eager formula"),
    ("cross_entropy", "B=256 n=512 C=21841 k=8 float32", "loss of 256 × 512, 21841 classes", "ours: fused", "eager"),
    ("tucker_linear", "linear 4096 to 4096, T=512 float32", "adapted linear layer, 4096 to 4096", "ours",
     "FLoRA's formula"),
    ("coding_rate", "n=2048 d=512 100 classes float32", "coding rate of 100 labels, 2048 × 512", "ours",
     "loop over classes"),
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
            mine = rows.get((case, ours))
            if not mine:
                lines.append(f"| `{op}` {case.replace(' float32', '')} | not measured yet | | | |")
                continue
            memory = mine.get("beyond_results_mib", 0) > 0
            for contender in (ours, *peers):
                row = rows.get((case, contender))  # not in an older run
                if not row or "missing" in row:
                    continue
                size = f"`{op}` {case.replace(' float32', '')}" if contender == ours else ""
                name = f"**{contender}**" if contender == ours else contender
                peak = f"{row['beyond_results_mib']:.3g} MiB" if memory and "beyond_results_mib" in row else ""
                lines.append(f"| {size} | {name} | {row['p50_ms']:.4g} ms | {row['p50_ms'] / mine['p50_ms']:.2f} × | "
                             f"{peak} |")
    lines += ["", "Medians, CPU, float32; peak memory beyond the gradients.", ""]
    lines += [f"* {', '.join(ops)}: {told}" for told, ops in places.items()]
    return "\n".join(lines)


def place(where):
    """Machine, versions and commit of a run."""
    return (f"{where['cpu']} ({where['instruction set']}), threads: {where['threads']}, torch {where['torch']}, "
            f"commit {where['commit']}, {where['date'][:10]}.")


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
    "README.md": {"evidence": evidence_brief.write, "peers": peers_table, "gpu": gpu_mark},
    "docs/heads.md": {"gamma": gamma_table, "demo": demo_table},
    "docs/subspaces.md": {"phase": phase_table, "denoise": denoise_table, "retrieve": retrieve_table,
                          "patching": subspace_tables.patching_table, "illusion": subspace_tables.illusion_table,
                          "probing": subspace_tables.probing_table},
    "docs/recipes.md": {"recipes": recipes_table},
    "docs/distributed.md": {"plan": plan_table, "class_parallel": class_parallel_table},
    "docs/adapters.md": {"finetune": lambda: finetune_table("finetune"), "spectral": spectral_table.write},
    "docs/rates.md": {"cluster": cluster_table, "represent": represent_table},
    "docs/evidence.md": {**evidence_heads.TABLES, "finetune_glyphs": lambda: finetune_table("finetune_glyphs"),
                         **evidence_tables.TABLES},
    "docs/isotropy.md": {"lejepa": lejepa_table.write, "compatible": compatible_table.write,
                         **four_losses_table.TABLES},
    "docs/lowrank.md": {"intrinsic": lowrank_tables.intrinsic_table, "projectors": projectors_table.write,
                        "memory": lowrank_tables.memory_table},
    "docs/performance.md": {"bench": bench_table, "processors": lambda: processors.table(SHOWN, place),
                            "step_grid": lambda: cost_tables.step_grid(place),
                            "threads": lambda: cost_tables.threads(place), "growth": lambda: cost_tables.growth(place),
                            "overhead": lambda: cost_tables.overhead(place)},
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
