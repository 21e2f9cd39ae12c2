"""What MCR²'s features are good for beside cross-entropy's: telling unknown digits, and learning further ones.

A small network learns six of scikit-learn's ten digits, which ones is drawn with the seed, by maximal coding rate
reduction or by cross-entropy. Then, with the network as it is,

* open set: held-out images of all ten digits; how well does a score tell the six known digits from the four others? The
  area under the ROC curve, with scores from logits or from the distance to the known classes' subspaces;
* further classes: a few images of each of the other digits; how many of the held-out images of all ten, each digit
  counting alike, are recognised by the nearest subspace, the nearest mean or logistic regression on the features?

The learning rate is picked anew for each seed, method and task, within the known digits: four of them play the known
ones and two the others, on images that are trained on later. Pixels, without a network, are measured alongside.

    python examples/mcr2.py
"""

import argparse
import functools
import json
import statistics
from pathlib import Path

import matplotlib
import torch
from clustering_report import keep, paired
from represent import DIRECTIONS, EPOCHS, EPS, FEATURES, GRID, held_by_subspaces, train
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import train_test_split
from torch.nn.functional import normalize, one_hot
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

KINDS = {"mcr2": "MCR²", "cross-entropy": "cross-entropy", None: "pixels"}
COLORS = {"MCR²": "#1f6fb2", "cross-entropy": "#c2410c", "pixels": "#94a3b8"}
STYLES = {"nearest subspace": "-", "nearest mean": "--", "logistic regression": ":"}
SHOTS = (1, 5, 20, 50)
RATES = (1e-5, 3e-5, *GRID)
BATCH = 120


class Digits:
    """Images of `known` digits and of `others`, labels counting from 0 in that order, in two parts."""

    def __init__(self, image, label, known, others, seed):
        chosen = torch.tensor([*known, *others])
        rows = torch.isin(label, chosen).nonzero()[:, 0]
        place = (label[rows, None] == chosen).int().argmax(1)
        parts = train_test_split(range(len(rows)), test_size=1 / 3, stratify=place, random_state=seed)
        (self.x, self.y), (self.held_out, self.truth) = ((image[rows[p]], place[p]) for p in parts)
        self.known, self.seed = len(known), seed

    def few(self, shots):
        """Rows to learn all classes from: the known ones' all, of the others so many."""
        draw = torch.Generator().manual_seed(self.seed)
        rows = [(self.y < self.known).nonzero()[:, 0]]
        for c in range(self.known, int(self.y.max()) + 1):
            own = (self.y == c).nonzero()[:, 0]
            rows.append(own[torch.randperm(len(own), generator=draw)[:shots]])
        return torch.cat(rows)


def features(kind, data, lr, bar):
    """Functions from images to features of length 1 and to logits, learnt from the known digits.

    There are none but cross-entropy's logits; without a kind features are pixels.
    """
    if kind is None:
        return lambda x: normalize(x + 1), None
    rows = data.y < data.known
    net = train(kind, data.x[rows], data.y[rows], lr, data.seed, bar, BATCH)
    logits = (lambda x: net.head(net(x))[:, : data.known]) if kind == "cross-entropy" else None
    return lambda x: normalize(net(x)), logits


@torch.no_grad()
def open_set(data, embed, logits):
    """{score: area under the ROC curve}."""
    rows = data.y < data.known
    held = held_by_subspaces(embed(data.x[rows]), data.y[rows], embed(data.held_out))
    scores = {"nearest subspace": held.amax(1)}
    if logits is not None:
        out = logits(data.held_out)
        scores |= {"largest probability": out.softmax(1).amax(1), "energy": out.logsumexp(1)}
    return {name: float(roc_auc_score(data.truth < data.known, score)) for name, score in scores.items()}


@torch.no_grad()
def further(data, embed, logits):
    """{"read-out, shots": mean over all classes of the share that is recognised}."""
    queries, found = embed(data.held_out), {}
    for shots in SHOTS:
        rows = data.few(shots)
        z, y = embed(data.x[rows]), data.y[rows]
        means = normalize(one_hot(y).to(z).mT @ z)
        regression = LogisticRegression(C=10, class_weight="balanced", max_iter=500).fit(z.numpy(), y)
        answers = {"nearest subspace": held_by_subspaces(z, y, queries).argmax(1),
                   "nearest mean": (queries @ means.mT).argmax(1),
                   "logistic regression": torch.from_numpy(regression.predict(queries.numpy()))}
        for name, classes in answers.items():
            found[f"{name}, {shots}"] = float(balanced_accuracy_score(data.truth, classes))
    return found


TASKS = {"open set": open_set, "further classes": further}


def measure(seed, bar):
    """{task: {(features, read-out): [score, learning rate]}} of one seed."""
    data = load_digits()
    image, label = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    digits = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
    whole = Digits(image, label, digits[:6], digits[6:], seed)
    inner = Digits(whole.x, whole.y, range(4), range(4, 6), seed)
    found = {task: {} for task in TASKS}
    for kind, name in KINDS.items():
        tried = {lr: features(kind, inner, lr, bar) for lr in (RATES if kind else (None,))}
        final = functools.cache(lambda lr, kind=kind: features(kind, whole, lr, bar))
        for task, scores in TASKS.items():
            validated = {lr: scores(inner, *functions) for lr, functions in tried.items()}
            measured = functools.cache(lambda lr, scores=scores, final=final: scores(whole, *final(lr)))
            for readout in next(iter(validated.values())):
                lr = max(tried, key=lambda lr, readout=readout: validated[lr][readout])
                found[task][f"{name}, {readout}"] = measured(lr)[readout], lr
    return found


def summary(runs):
    """{task: {method: its scores, rates, and the difference to the best of cross-entropy's}}."""
    found = {}
    for task in TASKS:
        rows = {}
        for method in runs[0][task]:
            scores, rates = zip(*(run[task][method] for run in runs))
            rows[method] = {"scores": scores, "rates": rates}
        for method, row in rows.items():
            shots = method[method.rindex(", ") :] if task != "open set" else ""
            peers = [m for m in rows if m.startswith("cross-entropy") and m.endswith(shots)]
            best = max(peers, key=lambda m: statistics.mean(rows[m]["scores"]))
            if not method.startswith("cross-entropy"):
                mean, half = paired(row["scores"], rows[best]["scores"])
                row["difference"] = {"to": best, "mean": mean, "half": half}
        found[task] = rows
    return found


def draw(path, tasks):
    """Open set: every seed's area by method. Further classes: accuracy by the number of images."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.8), layout="constrained")
    for y, (method, row) in enumerate(tasks["open set"].items()):
        color = COLORS[method.partition(",")[0]]
        left.scatter(row["scores"], [y] * len(row["scores"]), s=14, color=color, alpha=0.5)
        left.scatter(statistics.mean(row["scores"]), y, s=60, marker="D", color=color)
    left.set(yticks=range(len(tasks["open set"])), yticklabels=list(tasks["open set"]),
             xlabel="area under the ROC curve", title="six known digits against four unknown: seeds, and their mean")
    left.invert_yaxis()
    for name, color in COLORS.items():
        for readout, style in STYLES.items():
            lines = [tasks["further classes"][f"{name}, {readout}, {shots}"]["scores"] for shots in SHOTS]
            right.plot(SHOTS, [100 * statistics.mean(line) for line in lines], style, color=color, marker="o",
                       markersize=3, label=f"{name}, {readout}")
    right.set(xscale="log", xticks=SHOTS, xticklabels=SHOTS, xlabel="images of each further digit",
              ylabel="held-out accuracy, all digits (%)", title="six digits learnt, four more on the same features")
    right.minorticks_off()
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(given=None):
    """Measure, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="the numbers, the picture beside them (default: beside the script)")
    args = parser.parse_args(given)
    path = (args.output or Path(__file__).resolve()).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    setting = {"epochs": EPOCHS, "batch": BATCH, "eps": EPS, "rates": RATES, "shots": SHOTS, "features": FEATURES,
               "directions": DIRECTIONS, "torch": torch.__version__, "threads": 1}
    setting = json.loads(json.dumps(setting))
    found = json.loads(path.read_text()) if path.exists() else {}
    runs = found["runs"] if found.get("setting") == setting else {}
    with tqdm(unit="epoch", dynamic_ncols=True) as bar:
        for seed in range(args.seeds):
            bar.set_description(f"seed {seed}")
            if str(seed) not in runs:
                runs[str(seed)] = measure(seed, bar)
                keep(path, found | {"setting": setting, "runs": runs})
    tasks = summary([runs[str(seed)] for seed in range(args.seeds)])
    for task, rows in tasks.items():
        print(f"\n{task}")
        for method, row in rows.items():
            off = row.get("difference")
            half = "" if not off or off["half"] is None else f" ± {off['half']:.3f}"
            beside = f"{off['mean']:+.3f}{half} to {off['to']}" if off else ""
            print(f"{method:<42}{statistics.mean(row['scores']):>7.3f}  {beside}")
    draw(path.with_suffix(".png"), tasks)
    keep(path, {"setting": setting, "tasks": tasks, "runs": runs})
    print(f"picture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
