"""Fine-tuning a text encoder in little memory: what the optimiser keeps, what a step takes, and what is learnt.

all-MiniLM-L6-v2 (22.6 million parameters) with a linear head learns to tell the section of Debian that a package is in
from its one-line description, as in finetune_text.py, from 128 texts a class. All weights are trained by AdamW, by
`LowRankAdamW` at three ranks, by `Trion` and by torch's Muon (both with AdamW for what is no matrix within the encoder),
or most are frozen: LoRA (peft), our Tucker adapter, and `SpectralConfig`, each with AdamW.

    python examples/finetune_memory.py                    # writes finetune_memory.json and .png beside it

The learning rate of each method is the best of its grid in validation, one seed; then three seeds, the same for all. What has
been measured is kept and not measured again. It takes about an hour of a processor.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from finetune_text import Encoder, Model, Sections
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import torch_subspace as ts

RANKS, SEEDS, VALIDATION = (8, 32, 128), (0, 1, 2), 100
SHOTS, EPOCHS, BATCH, HEAD_FACTOR = 128, 3, 32, 10
FULL, ADAPTED = (3e-5, 1e-4, 3e-4), (3e-3, 1e-2, 3e-2)
METHODS = {  # and their grids of rates
    "AdamW": FULL,
    **{f"LowRankAdamW, rank {rank}": FULL + (1e-3,) for rank in RANKS},
    "Trion, rank 32": (1e-3, 3e-3, 1e-2, 3e-2),
    "Muon": (3e-4, 1e-3, 3e-3, 1e-2),
    "LoRA (peft), rank 8": ADAPTED,
    "Tucker adapter, rank 8": ADAPTED,
    "spectral adapter, rank 256": (3e-3, 1e-2, 3e-2, 1e-1),
}
COLORS = {"AdamW": "#4b5563", "LowRankAdamW": "#c2410c", "Trion": "#1f6fb2", "Muon": "#7a5195", "LoRA (peft)": "#8a8f98",
          "Tucker adapter": "#2f855a", "spectral adapter": "#b7791f"}


def build(task, method, lr, seed):
    """A model and the optimisers of what is trained in it."""
    torch.manual_seed(seed)
    model = Model(Encoder(task.folder), nn.Linear(384, int(task.label.max()) + 1))
    word, _, rank = method.partition(", rank ")
    if word in ("LoRA (peft)", "Tucker adapter", "spectral adapter"):
        if word == "LoRA (peft)":
            import peft

            layers = [n for n, module in model.body.named_modules(prefix="body") if isinstance(module, nn.Linear)]
            model = peft.get_peft_model(model, peft.LoraConfig(
                r=int(rank), lora_alpha=int(rank), target_modules=layers, modules_to_save=["head"]))
        else:
            kind = ts.TuckerConfig if word == "Tucker adapter" else ts.SpectralConfig
            ts.adapt(model, kind(rank=int(rank), target_modules="all-linear", save_modules="head"))
        return model, [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.01)]
    head = {"params": list(model.head.parameters()), "lr": HEAD_FACTOR * FULL[1]}  # the head's own, whatever the body has
    if word in ("AdamW", "LowRankAdamW"):
        head["lr"] = HEAD_FACTOR * lr
        kind = torch.optim.AdamW if word == "AdamW" else ts.lowrank.LowRankAdamW
        options = {"rank": int(rank)} if rank else {}
        return model, [kind([{"params": list(model.body.parameters())}, head], lr, weight_decay=0.01, **options)]
    matrices = [p for name, p in model.body.named_parameters() if p.dim() == 2 and "embeddings" not in name]
    others = [p for p in model.body.parameters() if not any(p is q for q in matrices)]
    if word == "Muon":
        inner = torch.optim.Muon(matrices, lr, weight_decay=0.01)
    else:
        inner = ts.lowrank.Trion(matrices, lr, rank=int(rank), weight_decay=0.01)
    return model, [inner, torch.optim.AdamW([{"params": others}, head], FULL[1], weight_decay=0.01)]


def state_bytes(optimizers):
    """What the optimisers keep between steps."""
    return sum(t.nbytes for opt in optimizers for state in opt.state.values() for t in state.values()
               if isinstance(t, torch.Tensor))


def train(task, method, lr, seed, epochs, validate=False):
    """One training, as it is kept."""
    (x, y), (held_out, label) = task.data(seed, validate)
    model, optimizers = build(task, method, lr, seed)
    model.train()
    steps = len(y) // BATCH
    schedules = [torch.optim.lr_scheduler.OneCycleLR(opt, [group["lr"] for group in opt.param_groups],
                                                     total_steps=epochs * steps, cycle_momentum=False)
                 for opt in optimizers]
    shuffle, whole, own = torch.Generator().manual_seed(seed), [], []
    for _ in range(epochs):
        for part in torch.randperm(len(y), generator=shuffle).split(BATCH)[:steps]:
            begun = time.perf_counter()
            model.zero_grad()
            cross_entropy(model(x[part]), y[part]).backward()
            before = time.perf_counter()
            for opt, schedule in zip(optimizers, schedules, strict=True):
                opt.step()
                schedule.step()
            ended = time.perf_counter()
            whole.append(ended - begun)
            own.append(ended - before)
    model.eval()
    with torch.no_grad():
        right = (torch.cat([model(part) for part in held_out.split(100)]).argmax(1) == label).tolist()
    trained = [p for p in model.parameters() if p.requires_grad]
    return {"accuracy": statistics.mean(right), "right": "".join("01"[r] for r in right),
            "trained": sum(p.nbytes for p in trained), "state": state_bytes(optimizers),
            "seconds": statistics.median(whole), "optimiser": statistics.median(own)}


def fill(found, epochs, keep):
    """Measure what is missing in `found`; `keep` is called whenever there is more."""
    task = Sections()
    task.shots = found["setting"]["shots"]
    with tqdm(total=sum(map(len, METHODS.values())) + len(METHODS) * len(SEEDS), unit="run", dynamic_ncols=True) as bar:
        for method, grid in METHODS.items():
            row = found["methods"].setdefault(method, {"validation": {}, "runs": []})
            for lr in grid:
                bar.set_description(f"{method}, rate {lr:g}")
                if f"{lr:g}" not in row["validation"]:
                    row["validation"][f"{lr:g}"] = train(task, method, lr, VALIDATION, epochs, True)["accuracy"]
                    keep()
                bar.update()
            row["lr"] = float(max(row["validation"], key=row["validation"].get))
            for seed in SEEDS:
                bar.set_description(f"{method}, seed {seed}")
                if len(row["runs"]) <= seed:
                    row["runs"].append(train(task, method, row["lr"], seed, epochs))
                    keep()
                bar.update()


def draw(path, found):
    """Accuracy and seconds a step against the bytes that are kept besides the frozen weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for method, row in found["methods"].items():
        runs, color = row["runs"], COLORS[method.partition(",")[0]]
        kept = (runs[0]["trained"] + runs[0]["state"]) / 2**20
        accuracy = [100 * run["accuracy"] for run in runs]
        mean = statistics.mean(accuracy)
        axes[0].errorbar(kept, mean, [[mean - min(accuracy)], [max(accuracy) - mean]], fmt="o", capsize=2, color=color)
        axes[0].annotate(method, (kept, mean), xytext=(5, 4), textcoords="offset points", fontsize=7.5, color=color)
        axes[1].plot(kept, 1e3 * statistics.median(run["seconds"] for run in runs), "o", color=color)
        axes[1].plot(kept, 1e3 * statistics.median(run["optimiser"] for run in runs), "o", color=color, mfc="white")
    axes[0].set(ylabel="held-out accuracy (%), mean and range")
    axes[1].set(ylabel="milliseconds a step; hollow: the optimiser's", yscale="log")
    for ax in axes:
        ax.set(xscale="log", xlabel="MiB of trained numbers and what the optimiser keeps of them")
        ax.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=100)


def main():
    """Measure what has not been measured, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="of the numbers")
    parser.add_argument("--quick", action="store_true", help="a few texts of each class, an epoch: does it run?")
    args = parser.parse_args()
    if missing := Sections.missing():
        return print(f"Skipped: {missing}")
    torch.set_num_threads(1)
    path, epochs, shots = args.output.with_suffix(".json"), EPOCHS, SHOTS
    if args.quick:
        epochs, shots, Sections.measured, Sections.validated = 1, 4, 2, 2
    found = {"setting": {"shots": shots, "epochs": epochs, "batch": BATCH, "torch": torch.__version__, "threads": 1},
             "methods": {}}
    if path.exists():
        found = json.loads(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    fill(found, epochs, lambda: path.write_text(json.dumps(found, indent=1) + "\n"))
    draw(path.with_suffix(".png"), found)
    for method, row in found["methods"].items():
        accuracy = [run["accuracy"] for run in row["runs"]]
        print(f"{method:28} lr {row['lr']:<7g} {statistics.mean(accuracy):.1%} ({min(accuracy):.1%} to {max(accuracy):.1%})"
              f"  state {row['runs'][0]['state'] / 2**20:7.2f} MiB  step {row['runs'][0]['seconds']:.3f} s")
    print(f"picture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
