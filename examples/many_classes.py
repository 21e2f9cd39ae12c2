"""Which head for many classes? A thousand Chinese characters, in faces of type that were never seen, and then others.

    apt install fonts-arphic-gbsn00lp fonts-arphic-gkai00mp fonts-arphic-ukai fonts-arphic-uming fonts-wqy-microhei \
        fonts-wqy-zenhei fonts-droid-fallback
    python examples/many_classes.py                       # writes many_classes.json and .png beside it

A small network, which ends in a normalisation as is customary below such heads, learns with a linear head, with a
cosine head without and with ArcFace's margin, and with Grassmann heads of k = 1 to 16, all by one loop. Learning rates,
and scale and margin of the cosine heads, are the best of a grid in validation: on one of the faces, left out of
training, one seed. Then, on the same seeds for all:

* accuracy: of these characters in two unseen faces;
* transfer: of a thousand other characters in the unseen faces, from the features that were learnt: by the nearest mean
  of the class (cosine) and by a linear probe, both from the five faces of training;
* variability: the mean angle between features of one character in different faces, which the paper on Grassmann heads
  finds to grow with k;
* what a step takes: milliseconds, all heads by turns, and the memory of two steps beyond the model's.

What has been measured is kept and not measured again: `--output new.json` begins anew.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
from functools import partial
from pathlib import Path

import torch
from finetune_protocol import fit, peak_memory
from finetune_report import difference
from gamma import glyphs
from torch import nn
from torch.nn.functional import cross_entropy, linear, normalize
from tqdm import tqdm

import torch_subspace as ts

CLASSES, OTHERS, FEATURES = 1000, 1000, 128
EPOCHS, BATCH = 12, 128
SEEDS, VALIDATION = (0, 1, 2), 100
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
HEADS = {  # and the grid of each but for the rates
    "linear": [{}],
    "cosine": [{"scale": s} for s in (4, 8, 16)],
    "cosine, ArcFace's margin": [{"scale": s, "margin": m} for s in (8, 16, 32) for m in (0.15, 0.3, 0.5)],
    **{f"Grassmann, k = {k}": [{"k": k}] for k in (1, 2, 4, 8, 16)},
}


class Cosine(nn.Module):
    """Logits: scale times the cosine to a class's weight; in training the true class's angle is widened by a margin."""

    def __init__(self, classes, scale, margin=0.0):
        super().__init__()
        self.weight, self.scale, self.margin = nn.Parameter(torch.randn(classes, FEATURES)), scale, margin

    def forward(self, x):
        return self.scale * linear(normalize(x), normalize(self.weight))

    def loss(self, x, y):
        cosine = linear(normalize(x), normalize(self.weight))
        true = cosine.gather(1, y[:, None])
        if self.margin:  # past π the angle can't be widened: a line of the same slope goes on, as is customary
            angle = true.clamp(-1 + 1e-6, 1 - 1e-6).acos() + self.margin
            least = torch.cos(torch.tensor(torch.pi - self.margin))
            true = torch.where(true > least, angle.cos(), true - self.margin * torch.tensor(self.margin).sin())
        return cross_entropy(self.scale * cosine.scatter(1, y[:, None], true), y)


class Model(nn.Module):
    """A small network and a head; `loss` is the head's own where it has one."""

    def __init__(self, head, classes, setting):
        super().__init__()
        widths = (1, 32, 64, 128)
        layers = [layer for i, o in itertools.pairwise(widths)
                  for layer in (nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(8, o), nn.GELU())]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, FEATURES),
                                  nn.BatchNorm1d(FEATURES, affine=False))
        if head == "linear":
            self.head = nn.Linear(FEATURES, classes)
        elif "cosine" in head:
            self.head = Cosine(classes, **setting)
        else:
            self.head = ts.GrassmannLinear(FEATURES, classes, subspace_dim=setting["k"])

    def forward(self, x):
        return self.head(self.body(x))

    def loss(self, x, y):
        x = self.body(x)
        return self.head.loss(x, y) if hasattr(self.head, "loss") else cross_entropy(self.head(x), y)


class Heads:
    """All heads as a task of finetune_protocol.py."""

    batch = BATCH

    def __init__(self, setting, classes):
        self.setting, self.classes = setting, classes

    def data(self, seed, validate):
        return examples(0, self.classes), None

    def build(self, head, seed, trained=True):
        torch.manual_seed(seed)
        model = Model(head, self.classes, self.setting)
        return model, ts.param_groups(model, weight_decay=0.01)


def examples(first, last, which=slice(None), unseen=False):
    """(images, labels) of characters in the faces of training, or in the others, face by face."""
    faces = glyphs()[unseen][which, first:last]
    return faces.flatten(0, 1)[:, None], torch.arange(last - first).repeat(len(faces))


def trained(head, setting, lr, seed, data, epochs):
    """A model that has learnt."""
    model, groups = Heads(setting, int(data[1].max()) + 1).build(head, seed)
    fit(model, groups, data, epochs=epochs, batch=BATCH, lr=lr, seed=seed)
    return model


@torch.no_grad()
def outputs(model, x):
    """model(x), some rows at a time."""
    model.eval()
    return torch.cat([model(part) for part in x.split(500)])


def right(found, label):
    return (found.argmax(1) == label).tolist()


def transfer(body, others):
    """Which of the unseen faces' glyphs of other characters are told right, by {method: [bool]}."""
    (x, y), (held_out, label) = (((outputs(body, images)), which) for images, which in others)
    means = normalize(normalize(x).view(-1, int(y.max()) + 1, FEATURES).sum(0))
    centre, spread = x.mean(0), x.std()
    probe = {}
    for lr in (1e-2, 3e-2, 1e-1):  # the best in validation: one face left out
        torch.manual_seed(0)
        classes = len(means)
        standard = (x - centre) / spread
        for part, rows in (("validation", slice(None, -classes)), ("all", slice(None))):
            model = nn.Linear(FEATURES, classes)
            fit(model, model.parameters(), (standard[rows], y[rows]), epochs=20, batch=BATCH, lr=lr)
            probe[part, lr] = model
    with torch.no_grad():
        best = max((1e-2, 3e-2, 1e-1), key=lambda lr: sum(right(probe["validation", lr](standard[-classes:]),
                                                                 y[-classes:])))
        return {"nearest mean": right(normalize(held_out) @ means.T, label),
                "linear probe": right(probe["all", best]((held_out - centre) / spread), label)}


def variability(features, classes):
    """Mean angle in degrees between two features of one class; rows come face by face."""
    x = normalize(features).view(-1, classes, FEATURES).transpose(0, 1)
    pairs = torch.triu_indices(x.shape[1], x.shape[1], 1)
    return (x @ x.mT)[:, pairs[0], pairs[1]].clamp(-1, 1).acos().rad2deg().mean().item()


def run(head, setting, lr, seed, size):
    """One training, and all that is measured of it."""
    classes, others, epochs = size
    data = examples(0, classes)
    model = trained(head, setting, lr, seed, data, epochs)
    elsewhere = [examples(classes, classes + others, unseen=unseen) for unseen in (False, True)]
    unseen, label = examples(0, classes, unseen=True)
    return {"accuracy": right(outputs(model, unseen), label), **transfer(model.body, elsewhere),
            "variability": variability(outputs(model.body, data[0]), classes),
            "parameters": sum(p.numel() for p in model.head.parameters())}


def validated(head, rows, size, keep):
    """The best of the head's grid on the face that is left out."""
    for setting, lr in itertools.product(HEADS[head], RATES):
        name = json.dumps(setting | {"lr": lr})
        if name not in rows:
            model = trained(head, setting, lr, VALIDATION, examples(0, size[0], slice(-1)), size[2])
            images, label = examples(0, size[0], slice(-1, None))
            rows[name] = statistics.mean(right(outputs(model, images), label))
            keep()
    best = json.loads(max(rows, key=rows.get))
    return best, best.pop("lr")


MEASURES = ("accuracy", "nearest mean", "linear probe")


def measure(found, size, keep):
    """What is missing in `found`; the settings, and per head what came out."""
    work = [(head, seed) for head in HEADS for seed in SEEDS]
    for head, seed in tqdm(work, "heads", unit="run", dynamic_ncols=True):
        row = found["rows"].setdefault(head, {"validation": {}, "runs": []})
        row["setting"], row["lr"] = validated(head, row["validation"], size, keep)
        if len(row["runs"]) <= seed:
            result = run(head, dict(row["setting"]), row["lr"], seed, size)
            row["parameters"] = result.pop("parameters")
            row["runs"].append({key: "".join("01"[r] for r in value) if key in MEASURES else value
                                for key, value in result.items()})
            keep()


def costs(rows, classes):
    """Milliseconds of a step, and bytes that training takes beyond the model; nothing else should be running."""
    tasks = {head: Heads(row["setting"], classes) for head, row in rows.items()}
    models = {head: task.build(head, 0) for head, task in tasks.items()}
    (x, y), _ = tasks["linear"].data(0, False)
    seconds = {head: [] for head in rows}
    batch = min(BATCH, len(y) // 6)
    for _ in tqdm(range(12), "steps by turns", unit="turn", dynamic_ncols=True):
        for head, (model, groups) in models.items():  # the first step makes the optimiser's state
            seconds[head] += fit(model, groups, (x[: 6 * batch], y[: 6 * batch]), epochs=1, batch=batch, lr=1e-3)[1:]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for head, row in rows.items():
            row["step"] = 1e3 * statistics.median(seconds[head])
            row["peak"] = pool.apply_async(peak_memory, (partial(Heads, row["setting"], classes), head, 1)).get(600)


def compared(rows, ours, theirs):
    """{measure: (mean, half of its 95 % interval)} of one head's accuracy over another's, paired by seed."""
    bits = {name: {key: [{"right": [r == "1" for r in run[key]]} for run in rows[name]["runs"]] for key in MEASURES}
            for name in (ours, theirs)}
    return {key: difference(bits[ours][key], bits[theirs][key]) for key in MEASURES}


def draw(path, rows):
    """Accuracy and transfer of each head, and variability by k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
    titles = {"accuracy": "1000 characters, unseen faces", "nearest mean": "other characters, nearest mean",
              "linear probe": "other characters, linear probe", "variability": "angle between faces of a character"}
    colors = ["#1f6fb2" if "Grassmann" in head else "#8a8f98" for head in rows]
    for ax, (key, title) in zip(axes, titles.items()):
        values = [[run[key] if key == "variability" else 100 * run[key].count("1") / len(run[key])
                   for run in row["runs"]] for row in rows.values()]
        means = [statistics.mean(v) for v in values]
        spread = [[m - min(v) for m, v in zip(means, values)], [max(v) - m for m, v in zip(means, values)]]
        ax.errorbar(means, range(len(rows)), xerr=spread, fmt="none", ecolor="#444444", capsize=2)
        ax.scatter(means, range(len(rows)), color=colors, zorder=3)
        ax.set(title=title, xlabel="degrees" if key == "variability" else "%")
        ax.set_yticks(range(len(rows)), list(rows) if ax is axes[0] else [])
        ax.invert_yaxis()
        ax.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=100)


def main():
    """Measure what has not been measured, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="of the numbers")
    parser.add_argument("--quick", action="store_true", help="a few characters, for one epoch: does it run?")
    parser.add_argument("--costs", action="store_true", help="measure the time and the memory of steps once more")
    args = parser.parse_args()
    size = (50, 50, 1) if args.quick else (CLASSES, OTHERS, EPOCHS)
    setting = dict(zip(("classes", "other classes", "epochs"), size)) | {
        "batch": BATCH, "seeds": len(SEEDS), "features": FEATURES, "torch": torch.__version__, "threads": 1}
    found = json.loads(args.output.read_text()) if args.output.exists() else {"setting": setting, "rows": {}}
    torch.set_num_threads(1)

    def keep():
        args.output.write_text(json.dumps(found, indent=1) + "\n")

    measure(found, size, keep)
    if args.costs or not all("peak" in row for row in found["rows"].values()):
        costs(found["rows"], size[0])
        keep()
    draw(args.output.with_suffix(".png"), found["rows"])
    for head, row in found["rows"].items():
        means = {key: statistics.mean(r[key].count("1") / len(r[key]) for r in row["runs"]) for key in MEASURES}
        print(f"{head}: " + ", ".join(f"{key} {mean:.1%}" for key, mean in means.items()))


if __name__ == "__main__":
    main()
