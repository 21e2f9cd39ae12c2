"""Which directions a low-rank optimiser keeps: LowRankAdamW's projectors on scikit-learn's real digits (8 x 8).

A network 64-256-256-256-10 is trained with AdamW, and with LowRankAdamW on its two 256 x 256 weights, of which every
projector keeps 4, 16 or 64 directions of each gradient, found anew in every step, with and without feedback of what it
left out, in 8 bits. All else takes AdamW's step. Loss is that of all training digits at the end, accuracy of others.
Then the same on 800 x 200 weights, projected along the shorter and along the longer side.

    python examples/projectors.py                     # three seeds; writes projectors.json; ten minutes on one core
"""

import argparse
import json
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from torch_subspace.lowrank import LowRankAdamW

PROJECTORS, RANKS, FEEDBACKS = ("svd", "range", "cosine", "hadamard"), (4, 16, 64), (None, "int8")
SQUARE, OBLONG = (64, 256, 256, 256, 10), (64, 800, 200, 800, 200, 10)
STEPS, BATCH, TRAINED, LR = 300, 128, 1200, 1e-3


def digits():
    """Images (n, 64) and labels, in one random order."""
    x, y = (torch.tensor(t) for t in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return (x[order] / 16).float(), y[order]


def train(make, seed, widths=SQUARE, steps=STEPS):
    """{loss, accuracy, seconds}. `make` gets two groups: inner weights, and the rest with a rank no side is above."""
    (x, y), start = digits(), time.perf_counter()
    torch.manual_seed(seed)
    layers = [nn.Linear(m, n) for m, n in zip(widths, widths[1:])]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))[:-1]
    inner = [layer.weight for layer in layers[1:-1]]
    rest = [p for p in model.parameters() if all(p is not q for q in inner)]
    optimizer = make([{"params": inner}, {"params": rest, "rank": max(widths)}])
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(TRAINED, (BATCH,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x[:TRAINED]), y[:TRAINED]).item()
        right = model(x[TRAINED:]).argmax(1) == y[TRAINED:]
    return {"loss": loss, "accuracy": right.float().mean().item(), "seconds": seconds}


def low_rank(**options):
    return lambda groups: LowRankAdamW(groups, lr=LR, weight_decay=0.0, **options)


def adamw(groups):
    return torch.optim.AdamW([p for group in groups for p in group["params"]], lr=LR, weight_decay=0.0)


def main():
    """Train, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="of the numbers")
    args = parser.parse_args()

    def runs(name, make, widths=SQUARE):
        found = [train(make, seed, widths, args.steps) for seed in range(args.seeds)]
        rows[name] = {key: [run[key] for run in found] for key in found[0]}
        print(f"{name:34} loss {' '.join(f'{run:.3f}' for run in rows[name]['loss'])}   accuracy "
              f"{' '.join(f'{run:.3f}' for run in rows[name]['accuracy'])}", flush=True)

    rows: dict[str, dict[str, list[float]]] = {}
    runs("AdamW", adamw)
    for rank in RANKS:
        for projector in PROJECTORS:
            for feedback in FEEDBACKS:
                runs(f"{projector} {rank}{' + int8' * bool(feedback)}",
                     low_rank(rank=rank, projector=projector, error_feedback=feedback))
    runs("AdamW, oblong", adamw, OBLONG)
    for rank in RANKS:
        runs(f"range {rank}, shorter side", low_rank(rank=rank), OBLONG)
        runs(f"range {rank}, longer side", longer(rank), OBLONG)
    setting = {"seeds": args.seeds, "steps": args.steps, "batch": BATCH, "lr": LR, "widths": SQUARE, "oblong": OBLONG,
               "threads": torch.get_num_threads(), "torch": torch.__version__}
    args.output.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


def longer(rank):
    """Each weight along its longer side, by a group of its own."""

    def make(groups):
        inner, rest = groups
        own = [{"params": [p], "side": "rows" if p.shape[0] > p.shape[1] else "columns"} for p in inner["params"]]
        return low_rank(rank=rank)([*own, rest])

    return make


if __name__ == "__main__":
    main()
