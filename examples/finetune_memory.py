"""Fine-tuning a text encoder in little memory: what training keeps beside the weights, and what is learnt.

all-MiniLM-L6-v2 (22.6 million parameters) with a linear head learns to tell in which section of Debian a package is
from its one-line description, as in finetune_text.py, from 128 texts a class. All weights are trained by AdamW, by
`LowRankAdamW` at three ranks, by `Trion` and by torch's Muon (both with AdamW for embeddings, vectors and the head), or
few new ones: LoRA (peft), our Tucker adapter and `SpectralConfig`, by AdamW.

    python examples/finetune_memory.py                    # writes finetune_memory.json and .png beside it

The learning rate of each method is picked in validation, one seed: from the middle of a grid outward for as long as it
gets better. Then three seeds, the same for all. What has been measured is kept and not measured again. It takes about
an hour of a processor. The times of steps are measured at the end, by turns.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from finetune_protocol import climb
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
    **{f"LowRankAdamW, rank {rank}": FULL + (1e-3,) + (3e-3,) * (rank == 32) for rank in RANKS},
    "Trion, rank 32": (1e-3, 3e-3, 1e-2, 3e-2),
    "Muon": (1e-3, 3e-3, 1e-2, 3e-2),
    "LoRA (peft), rank 8": (1e-3, *ADAPTED),
    "Tucker adapter, rank 8": ADAPTED,
    "spectral adapter, rank 256": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
COLORS = {"AdamW": "#4b5563", "LowRankAdamW": "#c2410c", "Trion": "#1f6fb2", "Muon": "#7a5195",
          "LoRA (peft)": "#8a8f98", "Tucker adapter": "#2f855a", "spectral adapter": "#b7791f"}
ROUNDS, STEPS = 5, 4  # of the times: so many steps of each method, and so often


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
    if word in ("AdamW", "LowRankAdamW"):
        groups = [{"params": list(model.body.parameters())},
                  {"params": list(model.head.parameters()), "lr": HEAD_FACTOR * lr}]
        if word == "AdamW":
            return model, [torch.optim.AdamW(groups, lr, weight_decay=0.01)]
        return model, [ts.lowrank.LowRankAdamW(groups, lr, rank=int(rank), weight_decay=0.01)]
    hidden, rest = ts.lowrank.trion_groups(model, adamw="head")
    rest = [{"params": [p for p in rest["params"] if all(p is not q for q in model.head.parameters())]},
            {"params": list(model.head.parameters()), "lr": HEAD_FACTOR * FULL[1]}]
    if word == "Muon":
        inner = torch.optim.Muon(hidden["params"], lr, weight_decay=0.01)
    else:
        inner = ts.lowrank.Trion(hidden["params"], lr, rank=int(rank), weight_decay=0.01)
    return model, [inner, torch.optim.AdamW(rest, FULL[1], weight_decay=0.01)]


def kept(model, optimizers, base):
    """Bytes: the gradients', the optimisers' state, and of parameters that the plain model has not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [t for opt in optimizers for own in opt.state.values() for t in own.values() if isinstance(t, torch.Tensor)]
    return {"gradients": sum(p.nbytes for p in trained), "state": sum(t.nbytes for t in state),
            "added": max(0, sum(p.nbytes for p in model.parameters()) - base)}


def steps(model, optimizers, batches, seconds=None):
    """Train on the batches. `seconds` is given those of each step, and the optimiser's part of them."""
    model.train()
    for x, y in batches:
        begun = time.perf_counter()
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        before = time.perf_counter()
        for opt in optimizers:
            opt.step()
        ended = time.perf_counter()
        if seconds is not None:
            seconds.append((ended - begun, ended - before))
        yield


def train(task, method, lr, seed, epochs, validate=False):
    """One training, as it is kept."""
    (x, y), (held_out, label) = task.data(seed, validate)
    model, optimizers = build(task, method, lr, seed)
    count = len(y) // BATCH
    schedules = [torch.optim.lr_scheduler.OneCycleLR(opt, [group["lr"] for group in opt.param_groups],
                                                     total_steps=epochs * count, cycle_momentum=False)
                 for opt in optimizers]
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        parts = torch.randperm(len(y), generator=shuffle).split(BATCH)[:count]
        for _ in steps(model, optimizers, ((x[part], y[part]) for part in parts)):
            for schedule in schedules:
                schedule.step()
    model.eval()
    with torch.no_grad():
        right = (torch.cat([model(part) for part in held_out.split(100)]).argmax(1) == label).tolist()
    plain = Model(Encoder(task.folder), nn.Linear(384, int(task.label.max()) + 1))
    return {"accuracy": statistics.mean(right), "right": "".join("01"[r] for r in right),
            **kept(model, optimizers, sum(p.nbytes for p in plain.parameters()))}


def times(task, rows):
    """Seconds of a step and of its optimiser, medians; the methods by turns."""
    (x, y), _ = task.data(0, False)
    batches = list(zip(x[: STEPS * BATCH].split(BATCH), y[: STEPS * BATCH].split(BATCH), strict=True))
    models = {method: build(task, method, row["lr"], 0) for method, row in rows.items()}
    seconds = {method: [] for method in rows}
    for model, optimizers in models.values():
        list(steps(model, optimizers, batches[:1]))
    for _ in tqdm(range(ROUNDS), "times", unit="round", dynamic_ncols=True):
        for method, (model, optimizers) in models.items():
            list(steps(model, optimizers, batches, seconds[method]))
    for method, row in rows.items():
        row["seconds"], row["optimiser"] = (statistics.median(part) for part in zip(*seconds[method], strict=True))


def fill(task, found, epochs, keep):
    """Measure what is missing in `found`; `keep` is called whenever there is more."""
    with tqdm(total=len(METHODS), unit="method", dynamic_ncols=True) as bar:
        for method, grid in METHODS.items():
            row = found["methods"].setdefault(method, {"validation": {}, "runs": []})

            def score(lr, method=method, rates=row["validation"]):
                bar.set_description(f"{method}, rate {lr:g}")
                if f"{lr:g}" not in rates:
                    rates[f"{lr:g}"] = train(task, method, lr, VALIDATION, epochs, True)["accuracy"]
                    keep()
                return rates[f"{lr:g}"]

            best = climb(grid, score)
            if row.get("lr") != best:
                row.update(lr=best, runs=[])
            for seed in SEEDS[len(row["runs"]) :]:
                bar.set_description(f"{method}, seed {seed}")
                row["runs"].append(train(task, method, row["lr"], seed, epochs))
                keep()
            bar.update()


def draw(path, found):
    """Accuracy and seconds a step against the bytes that are kept besides the frozen weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 3.8), layout="constrained")
    shapes = dict(zip((f"LowRankAdamW, rank {rank}" for rank in RANKS), "sDo"))
    for method, row in found["methods"].items():
        runs, color, shape = row["runs"], COLORS[method.partition(",")[0]], shapes.get(method, "o")
        mib = sum(runs[0][part] for part in ("gradients", "state", "added")) / 2**20
        accuracy = [100 * run["accuracy"] for run in runs]
        mean = statistics.mean(accuracy)
        axes[0].errorbar(mib, mean, [[mean - min(accuracy)], [max(accuracy) - mean]], fmt=shape, capsize=2, color=color)
        axes[1].plot(mib, 1e3 * row["seconds"], shape, color=color, label=method)
        axes[1].plot(mib, 1e3 * row["optimiser"], shape, color=color, mfc="white")
    axes[0].set(ylabel="held-out accuracy (%), mean and range")
    axes[1].set(ylabel="milliseconds a step; hollow: the optimiser's", yscale="log")
    for ax in axes:
        ax.set(xscale="log", xlabel="MiB beside the model: gradients, optimiser's state, new parameters")
        ax.grid(alpha=0.25, linewidth=0.6)
    figure.legend(*axes[1].get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(path, dpi=100)


def main():
    """Measure what has not been measured, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="of the numbers")
    parser.add_argument("--times", action="store_true", help="measure the times of steps again")
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

    def keep():
        path.write_text(json.dumps(found, indent=1) + "\n")

    task = Sections()
    task.shots = shots
    fill(task, found, epochs, keep)
    if args.times or any("seconds" not in row for row in found["methods"].values()):
        times(task, found["methods"])
        keep()
    draw(path.with_suffix(".png"), found)
    for method, row in found["methods"].items():
        accuracy = [run["accuracy"] for run in row["runs"]]
        print(f"{method:28} lr {row['lr']:<7g} {statistics.mean(accuracy):.1%} ({min(accuracy):.1%} to "
              f"{max(accuracy):.1%})  state {row['runs'][0]['state'] / 2**20:7.2f} MiB  step {row['seconds']:.3f} s")
    print(f"picture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
