"""Find images of the same digit: one embedding, and the same split among dynamic subspace learners.

scikit-learn's real digits: some of them train a small network and an embedding of 64 coordinates by the margin loss, a
third is held out and only looked up. Recall@1 is how often a held-out image's nearest neighbour among them is the same
digit. The same is asked of digits that were never trained on: five train, the five others are looked up. Both methods
have the same images, rates and loss; the learners begin as one, are split where three epochs in a row were no better,
cluster the images anew every second epoch, and are trained as a whole in the last third.

    python examples/retrieve.py
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import torch_subspace as ts

HIDDEN, DIM, BATCH, RATE = 128, 64, 100, 1e-3
METHODS = ("one embedding", "dynamic learners")
TASKS = ("held-out images", "digits never trained on")


def digits(task, seed):
    """Images and labels to train on, and to look up."""
    data, draw = load_digits(), torch.Generator().manual_seed(seed)
    image, label = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    if task == "held-out images":
        seen = torch.rand(len(label), generator=draw) < 2 / 3
    else:
        seen = torch.isin(label, torch.randperm(10, generator=draw)[:5])
    return image[seen], label[seen], image[~seen], label[~seen]


def recall(embed, image, label):
    """How often the nearest neighbour is of the same class."""
    z = embed(image)
    near = torch.cdist(z, z).fill_diagonal_(torch.inf).argmin(1)
    return (label[near] == label).double().mean().item()


def train(task, method, seed, epochs):
    """Recall@1 of what is looked up, before and after training, and the learners' sizes."""
    torch.manual_seed(seed)
    image, label, other, other_label = digits(task, seed)
    body = torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, HIDDEN),
                               torch.nn.ReLU())
    model = ts.grassmann.DynamicSubspaceLearners(HIDDEN, DIM)
    optimiser = torch.optim.Adam([*body.parameters(), *model.parameters()], RATE)

    @torch.no_grad()
    def embed(x):
        return model(body(x))

    before = recall(embed, other, other_label)
    whole, cluster, best, waited = 2 * epochs // 3, torch.zeros_like(label), 0.0, 0
    for epoch in range(epochs):
        if epoch >= whole:
            cluster, learners = torch.zeros_like(label), [None]
        else:
            if epoch % 2 == 0:
                cluster = model.assign(body(image).detach(), cluster, seed=seed)
            learners = list(range(len(model.dims)))
        for learner in learners:
            own = (cluster == (learner or 0)).nonzero()[:, 0]
            for rows in own[torch.randperm(len(own))].split(BATCH):
                optimiser.zero_grad()
                model.loss(body(image[rows]), label[rows], learner).backward()
                optimiser.step()
        score = recall(embed, image, label)  # of the images that are trained on: the others are not looked at
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if method == "dynamic learners" and waited >= 3 and epoch < whole and model.split():
            best, waited = 0.0, 0
            cluster = model.assign(body(image).detach(), cluster, seed=seed)
    return before, recall(embed, other, other_label), list(model.dims)


def main():
    """Train both, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="choices of images, each with weights of its own")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--output", type=Path, help="the numbers (default: in build/)")
    args = parser.parse_args()
    rows = {}
    for task in TASKS:
        rows[task] = {}
        for method in METHODS:
            runs = [train(task, method, seed, args.epochs) for seed in range(args.seeds)]
            before, after, dims = zip(*runs, strict=True)
            rows[task][method] = {"before": before, "recall": after, "dims": dims}
            print(f"{task}, {method}: Recall@1 {statistics.mean(after):.1%} ({min(after):.1%} to {max(after):.1%}), "
                  f"untrained {statistics.mean(before):.1%}; learners of {', '.join(map(str, dims))}")
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "retrieve.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    setting = {"seeds": args.seeds, "epochs": args.epochs, "dim": DIM, "torch": torch.__version__}
    path.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
