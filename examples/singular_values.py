"""Adapters of about two hundred numbers: a network that knows scikit-learn's digits learns them transposed.

A network 64-128-128-10 is trained on upright digits, and then adapted to the same digits with rows and columns
exchanged: by the singular values of its weights (SpectralConfig), by Tucker cores between factors that stay, by LoRA of
rank 1, each with about as many trained numbers, and for comparison with more. The rate of each is picked on digits held
out from training, the accuracy is that of others.

    python examples/singular_values.py                # three seeds; two minutes on one core
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import torch_subspace as ts

WIDTHS, TRAINED, HELD_OUT, STEPS, BATCH = (64, 128, 128, 10), 1000, 200, 200, 64
RATES = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)


def digits(seed):
    """Images (n, 64), the same transposed, and labels, in a random order."""
    x, y = (torch.tensor(t) for t in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x = (x[order] / 16).float()
    return x, x.view(-1, 8, 8).mT.reshape(-1, 64), y[order]


def train(model, groups, x, y, rate, steps, seed):
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(TRAINED, (BATCH,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model, x, y, rows):
    return (model(x[rows]).argmax(1) == y[rows]).float().mean().item()


def base(seed):
    """The network, trained on upright digits."""
    x, _, y = digits(seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(m, n) for m, n in zip(WIDTHS, WIDTHS[1:])]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))[:-1]
    train(model, model.parameters(), x, y, 3e-3, 300, seed)
    return model


def by(config):
    """An adapter of ours."""

    def make(model):
        ts.adapt(model, config)
        return model, [p for group in ts.adapter_parameters(model) for p in group["params"]]

    return make


def lora(targets):
    """peft's LoRA of rank 1."""

    def make(model):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=1, target_modules=targets))
        return model, [p for p in model.parameters() if p.requires_grad]

    return make


METHODS = {
    "LoRA, rank 1, first layer (peft)": lora(["0"]),
    "`TuckerConfig(8, train=\"core\")`": by(ts.TuckerConfig(8, train="core")),
    "`SpectralConfig(128)`": by(ts.SpectralConfig(128)),
    "`TuckerConfig(14, train=\"core\", init=\"svd\")`, first layer": by(
        ts.TuckerConfig(14, train="core", init="svd", target_modules="0")),
    "LoRA, rank 1, all layers (peft)": lora(["0", "2", "4"]),
    "all weights": lambda model: (model, list(model.parameters())),
}


def file_size(model):
    """Bytes of an adapter's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        ts.save_adapter(model, path)
        return path.stat().st_size


def main():
    """Adapt, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="the numbers (default: build/singular_values.json)")
    args = parser.parse_args()
    bases, rows, test = [base(seed) for seed in range(args.seeds)], {}, slice(TRAINED + HELD_OUT, None)
    before = [accuracy(model, *digits(seed)[1:], test) for seed, model in enumerate(bases)]
    for name, make in METHODS.items():
        found = {}
        for rate in RATES:
            found[rate] = []
            for seed, model in enumerate(bases):
                _, x, y = digits(seed)
                torch.manual_seed(seed)
                start = time.perf_counter()
                model, parameters = make(copy.deepcopy(model))
                train(model, parameters, x, y, rate, STEPS, seed)
                held_out = accuracy(model, x, y, slice(TRAINED, TRAINED + HELD_OUT))
                found[rate].append((held_out, accuracy(model, x, y, test), time.perf_counter() - start))
        rate = max(RATES, key=lambda r: sum(run[0] for run in found[r]))
        size = file_size(model) if any(hasattr(m, "tucker") for m in model.modules()) else None
        rows[name] = {"trained": sum(p.numel() for p in parameters), "rate": rate, "file_bytes": size,
                      "accuracy": [run[1] for run in found[rate]], "seconds": [run[2] for run in found[rate]]}
        print(f"{name:62} {rows[name]['trained']:6} at {rate:<6g} " + " ".join(f"{run[1]:.3f}" for run in found[rate]),
              flush=True)
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "singular_values.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    setting = {"seeds": args.seeds, "steps": STEPS, "batch": BATCH, "widths": WIDTHS, "trained_on": TRAINED,
               "threads": torch.get_num_threads(), "torch": torch.__version__}
    path.write_text(json.dumps({"setting": setting, "before": before, "rows": rows}, indent=1) + "\n")
    print(f"numbers: {path}")


if __name__ == "__main__":
    main()
