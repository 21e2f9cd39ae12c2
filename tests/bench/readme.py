"""Write the README's tables anew from tests/bench/results/*.json and the examples' own results."""

import json
import re
from pathlib import Path

import gpu_table

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
    "depthwise": [("B=8 C=96 56x56 kernel 7x7 float32", "ours", ("torch: convolution_backward",))],
}


def bench_table():
    """Medians of the main cases, and where they were measured."""
    lines = ["| op, size | ours | against | theirs | theirs / ours |", "|---|---|---|---|---|"]
    places = {}
    for op, cases in SHOWN.items():
        path = ROOT / f"tests/bench/results/{op}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        places[place(found["environment"])] = None
        rows = {(row["case"], row["contender"]): row for row in found["rows"]}
        for case, ours, peers in cases:
            mine = rows[case, ours]
            for peer in peers:
                row = rows[case, peer]
                if "missing" in row:
                    continue
                lines.append(f"| `{op}` {case.replace(' float32', '')} | {mine['p50_ms']:.4g} ms | {peer} | "
                             f"{row['p50_ms']:.4g} ms | {row['p50_ms'] / mine['p50_ms']:.2f} |")
                if "peak_mib" in row and mine["beyond_results_mib"] > 0:
                    less, more = mine["beyond_results_mib"], row["beyond_results_mib"]
                    lines.append(f"| … peak memory beyond the gradients | {less:.3g} MiB | {peer} | {more:.3g} MiB | "
                                 f"{more / less:.1f} |")
    lines += ["", "Medians, CPU, float32. " + " ".join(places)]
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
    lines += ["", f"CPU, threads: {setting['threads']}, torch {setting['torch']}; numbers in "
              "[swap_head.json](examples/swap_head.json). Easy images and three seeds can't tell the heads apart; what "
              "subspaces bring on ImageNet is in the paper."]
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
              f"[{name}.json](examples/{name}.json). " + " ".join(found["notes"])]
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
              "[cluster.json](examples/cluster.json)."]
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
              "[represent.json](examples/represent.json)."]
    return "\n".join(lines)


def gpu():
    """What a GPU has shown: the table without its title, or that none has run this."""
    text = gpu_table.write()
    if text == gpu_table.UNVERIFIED:
        return "\n".join([
            "**Unverified on a GPU.** The kernels compile and link for sm_80 to sm_120. On a CPU, a fiber a thread,",
            "they pass the native tests and the reference tests (`make cuda-on-cpu`, `make cuda-race`,",
            "`make pytest-cuda-on-cpu`). No GPU has run them so far: there are no figures.",
        ])
    return text.split("\n", 2)[2].strip()


def main():
    """Replace what stands between the markers."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    tables = {"demo": demo_table(), "cluster": cluster_table(), "represent": represent_table()}
    tables |= {"bench": bench_table(), "gpu": gpu()}
    tables |= {name: finetune_table(name) for name in ("finetune", "finetune_text")}
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->(.*<!-- /{name} -->)?", lambda _, block=block: block, text, flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    main()
