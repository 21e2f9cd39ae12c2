"""Teach a network that knows the digits 0-4 the digits 5-9, from a few images of each, in seven ways.

A small convolutional network learns scikit-learn's real digits 0-4. It then gets a new linear head and is adapted to
the digits 5-9: the head alone, LoRA (peft), FLoRA's formula, this package's Tucker and spectral adapters, and all of
its weights. The ranks of the adapters are such that they train about as many parameters; the spectral adapter, which
trains singular values alone, has far fewer, and the least LoRA stands beside it. A third of the images is held out and
only measured; the learning rate of each method was picked from one grid on other images (`--validate` does it again).

    python examples/finetune.py
    python examples/finetune.py --glyphs    # from a thousand Chinese characters to the Japanese syllables
"""

import argparse
import copy
import multiprocessing
import tempfile
from pathlib import Path

import finetune_report as report
import torch
from finetune_protocol import fit, peak_memory, run, validate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import conv2d, interpolate
from tqdm import tqdm

import torch_subspace as ts


class Network(nn.Module):
    """Four convolutions and a linear head, for (B, 1, 16, 16) images of five digits."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential()
        for i, (channels, out) in enumerate(((1, 32), (32, 64), (64, 96), (96, 128))):
            self.body.add_module(f"conv{i}", nn.Conv2d(channels, out, 3, padding=1))
            self.body.extend([nn.GroupNorm(8, out), nn.ReLU(), nn.MaxPool2d(2) if i in (1, 2) else nn.Identity()])
        self.body.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
        self.head = nn.Linear(128, 5)

    def forward(self, x):
        return self.head(self.body(x))


class FLoRAConv(nn.Module):
    """conv(x, W) + conv(x, ΔW), ΔW = G x_0 U_0 x_1 U_1 x_2 U_2 x_3 U_3: FLoRA (arXiv 2405.14739) as its formula reads.

    A factor for every mode of the weight, initial values as in the authors' code, and a second convolution by a ΔW that
    every forward pass composes anew.
    """

    def __init__(self, conv, rank):
        super().__init__()
        self.conv, sizes = conv, [rank, rank, *conv.kernel_size]
        self.core = nn.Parameter(torch.zeros(sizes))
        self.factors = nn.ParameterList(torch.empty(d, r) for d, r in zip(conv.weight.shape, sizes))
        for factor in self.factors:
            nn.init.kaiming_normal_(factor, a=3**0.5)

    def forward(self, x):
        delta = torch.einsum("abcd,oa,ib,hc,wd->oihw", self.core, *self.factors)
        return self.conv(x) + conv2d(x, delta, None, self.conv.stride, self.conv.padding, self.conv.dilation)


class Digits:
    """The task: what is learnt, by which methods, with which settings."""

    title, output, ours = "digits 5-9", "finetune.png", "ours"
    shots, batch, epochs, seeds, evaluations = 15, 25, 30, 3, 6
    grid = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    # method: the best of the grid in validation, three seeds: 85.2, 92.8, 95.8, 95.3, 96.0, 89.2 and 90.7 %
    rates = {"head only": 3e-1, "LoRA (peft)": 1e-2, "FLoRA's formula": 3e-2, "ours": 1e-2, "full fine-tuning": 3e-3,
             "LoRA (peft), rank 1": 3e-2, "spectral adapter": 3e-1}
    layers = ["conv1", "conv2", "conv3"]  # that get adapters; conv0 sees a single channel
    lora_rank = 4
    ranks = {"conv1": 9, "conv2": 10, "conv3": 12}  # of Tucker's channel modes: as many parameters as LoRA's

    def __init__(self):
        data = load_digits()
        self.image = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        self.image = interpolate(self.image, size=(16, 16), mode="bilinear")
        self.label, self.known = torch.tensor(data.target) % 5, torch.tensor(data.target) < 5
        new = (~self.known).nonzero()[:, 0].tolist()
        self.pool, self.held_out = train_test_split(new, test_size=1 / 3, stratify=self.label[new], random_state=0)
        self.bases = {}

    def data(self, seed, validate):
        """(images, labels) to train on, a few of each digit, and (images, labels) to measure on."""
        few, rest = train_test_split(
            self.pool, train_size=5 * self.shots, stratify=self.label[self.pool], random_state=seed
        )
        measured = rest if validate else self.held_out
        return (self.image[few], self.label[few]), (self.image[measured], self.label[measured])

    def base(self, seed):
        """A network that was trained on the digits 0-4."""
        if seed not in self.bases:
            torch.manual_seed(seed)
            self.bases[seed] = model = Network()
            known = self.image[self.known], self.label[self.known]
            fit(model, model.parameters(), known, epochs=6, batch=50, lr=3e-3)
        return copy.deepcopy(self.bases[seed])

    def build(self, method, seed, trained=True):
        """A model and those of its parameters that are to be trained; not `trained`: on a base that knows nothing."""
        model = self.base(seed) if trained else Network()
        torch.manual_seed(seed)
        model.head = nn.Linear(128, 5)
        if method == "ours":
            ts.adapt(model, ts.TuckerConfig(rank_pattern=self.ranks, target_modules=self.layers, save_modules="head"))
            return model, ts.adapter_parameters(model)
        if method == "spectral adapter":  # all singular values: it has no more to train
            ts.adapt(model, ts.SpectralConfig(128, target_modules=self.layers, save_modules="head"))
            return model, ts.adapter_parameters(model)
        if method.startswith("LoRA"):
            import peft  # takes seconds

            r = 1 if method.endswith("rank 1") else self.lora_rank
            config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=self.layers, modules_to_save=["head"])
            model = peft.get_peft_model(model, config)
        elif method != "full fine-tuning":
            model.body.requires_grad_(False)
        if method == "FLoRA's formula":
            for name, rank in self.ranks.items():
                model.body.set_submodule(name, FLoRAConv(model.body.get_submodule(name), rank))
        return model, [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def notes(self, models):
        """What can be done with the adapter that was trained: a sentence or two."""
        model, fresh = models["ours"], self.base(0)
        image, label = self.image[self.held_out], self.label[self.held_out]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            ts.save_adapter(model, path)
            size = path.stat().st_size
            ts.load_adapter(fresh, path)  # configuration, factors and head are in the file
        logits = {"trained": model(image), "loaded": fresh(image)}
        logits["merged"] = ts.merge(fresh)(image)
        logits["unmerged"] = ts.unmerge(fresh)(image)
        accuracy = [f"{name} {(y.argmax(1) == label).double().mean():.2%}" for name, y in logits.items()]
        trained = logits.pop("trained")
        error = {name: ((y - trained).abs().max() / trained.abs().max()).item() for name, y in logits.items()}
        return [f"The adapter of seed 0, saved in {size / 1024:.0f} KiB, then on a fresh base model: accuracy "
                f"{', '.join(accuracy)}. Largest difference of the logits from the trained model's, relative to the "
                f"largest logit: {', '.join(f'{name} {e:.0e}' if e else f'{name} 0' for name, e in error.items())}."]


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glyphs", action="store_true", help="Japanese syllables from Debian's fonts instead")
    parser.add_argument("--seeds", type=int, help="runs per method (default: 3)")
    parser.add_argument("--epochs", type=int, help="default: 30, with --glyphs 20")
    parser.add_argument("--validate", action="store_true", help="try every rate of the grid on other examples instead")
    parser.add_argument("--output", type=Path, help="the picture, numbers beside it (default: in build/)")
    return parser.parse_args()


def main():
    """Train by every method, then tabulate and draw."""
    args, kind = arguments(), Digits
    if args.glyphs:
        from finetune_glyphs import Syllables as kind
    task, threads = kind(), torch.get_num_threads()
    task.epochs, task.seeds = args.epochs or task.epochs, args.seeds or task.seeds
    if args.validate:
        return report.print_validation(validate(task, task.seeds), task.grid)

    peaks = {}
    if Path("/proc/self/clear_refs").exists():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch_subspace", "sklearn.model_selection", "matplotlib.pyplot", "peft"])
        with context.Pool(1, maxtasksperchild=1) as pool:
            found = [pool.apply_async(peak_memory, (kind, method, threads)) for method in task.rates]
            for method, peak in zip(task.rates, tqdm(found, "memory", unit="method", dynamic_ncols=True)):
                peaks[method] = peak.get(timeout=600)
    runs, models = {method: [] for method in task.rates}, {}
    with tqdm(total=len(runs) * task.seeds * task.epochs, unit="epoch", dynamic_ncols=True) as progress:
        for seed in range(task.seeds):
            for method, lr in task.rates.items():
                model, result = run(task, method, seed, lr, progress)
                models.setdefault(method, model)
                runs[method].append(result)
    rows = report.summary(runs, task.rates, peaks)
    report.print_table(rows)
    notes = report.verdicts(runs, task.ours) + task.notes(models)
    print("\n" + "\n".join(notes))
    build = Path(__file__).resolve().parents[1] / "build"
    report.write(args.output or build / task.output, rows, notes, task)


if __name__ == "__main__":
    main()
