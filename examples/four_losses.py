"""What four of the losses bring, each beside the simplest thing that could stand in its place.

SimLAPLoss               digits in pairs, of any two classes or of one; beside the same loss with all gates open
similarity_distillation  halves of digits as pairs, of 0 to 4 first, then of 5 to 9: what is still known of the first,
                         and learnt of the second; beside InfoNCE alone at several learning rates
KoopmanInformationLoss   a pendulum and Lorenz's system, foretold by one matrix: the entropy maximised, left out,
                         minimised; beside the states themselves and their monomials
prox_group_lasso_        planted groups, to be found exactly; beside l1 (scikit-learn's) and groups drawn at random

All is learnt and chosen on training data; a third of the digits, other trajectories and planted weights are only
measured. Settings were chosen once, on other splits, and are the same within a comparison.

    python examples/four_losses.py                    # three seeds; minutes on a core
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
import torch
from four_losses_planted import ENTROPY, POINTS, SETTINGS, descend, groups, koopman, network
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import normalize

from torch_subspace import isotropy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BATCH, BLUE, ORANGE, GREEN = 128, "#1f6fb2", "#c2410c", "#3b8b5a"


def digits(seed):
    """Images with values from 0 to 1, labels, and indices of training and held-out ones."""
    image, label = map(torch.tensor, load_digits(return_X_y=True))
    parts = train_test_split(range(len(label)), test_size=1 / 3, stratify=label, random_state=seed)
    return image.float() / 16, label, *map(torch.tensor, parts)


# ---------------------------------------------------------------------------------------------------------- SimLAP


class Ungated(isotropy.SimLAPLoss):
    """The same positives, negatives and temperature, by the plain cosine."""

    def gate(self, y1, y2):
        return torch.ones(len(y1), self.features)


def pairs(rows, label, count, one_class=False):
    """Indices of pairs, (2, count)."""
    pair = rows[torch.randint(len(rows), (2, count))]
    if one_class:
        ordered, number, own = rows[label[rows].argsort()], label[rows].bincount(), label[pair[0]]
        pair[1] = ordered[(number.cumsum(0) - number)[own] + (torch.rand(count) * number[own]).long()]
    return pair


def precision(z, label):
    """Mean average precision of each point among all others, by cosines."""
    score = (normalize(z, dim=1) @ normalize(z, dim=1).mT).fill_diagonal_(-torch.inf)
    right = (label[:, None] == label[score.argsort(1, descending=True)])[:, :-1].double()
    return ((right.cumsum(1) / torch.arange(1, len(z)) * right).sum(1) / right.sum(1)).mean().item()


def simlap(seed, steps, _):
    image, label, train, held_out = digits(seed)

    def measure(kind, one_class, steps):
        torch.manual_seed(seed)
        net, loss = network(64, 64, 16), kind(10, 16, width=32)

        def of_batch():
            i, j = pairs(train, label, BATCH, one_class)
            return loss(net(image[i]), net(image[j]), label[i], label[j])

        descend((net, loss), of_batch, steps, 3e-3)
        with torch.no_grad():
            z = net(image)
            i, j = pairs(held_out, label, 400)
            y1, y2, other = label[i], label[j], pairs(held_out, label, 400)[0]
            mean = torch.stack([normalize(z[train[label[train] == c]], dim=1).mean(0) for c in range(10)])
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(z[train], label[train])
            found = {"probe": probe.score(z[held_out], label[held_out]),
                     "precision": precision(z[held_out], label[held_out])}
            gate, plain = loss.gate(y1, y2), torch.ones(400, 16)
            for what, query, under in (("own", z[i], gate), ("other", z[other], gate), ("mean", mean[y2], plain)):
                cosine = isotropy.gated_cosine(query, z[j], under).fill_diagonal_(-2)  # others than the partner,
                cosine[(y1[:, None] == y2) & (y1 != y2)[:, None]] = -2                 # and than the first class
                found[what] = (y2[cosine.argmax(1)] == y2).double().mean().item()
            return found

    return {**{f"{'one class' if one else 'any two classes'}, {name}": measure(kind, one, steps)
               for one in (False, True) for name, kind in (("SimLAPLoss", isotropy.SimLAPLoss), ("no gate", Ungated))},
            "the network as drawn": measure(Ungated, False, 0)}


# ----------------------------------------------------------------------------------------------------------- Mod-X


def similar(towers, halves):
    a, b = (normalize(tower(half), dim=1) for tower, half in zip(towers, halves))
    return a @ b.mT


def modx(seed, steps, _):
    image, label, *parts = digits(seed)
    halves = image.view(-1, 2, 32).transpose(0, 1)
    (first, second), held_out = ([halves[:, part[(label[part] < 5) == early]] for early in (True, False)]
                                 for part in parts)

    def learn(halves, old=None, lr=3e-3, alpha=0.0, rows="correct"):
        """Towers that know which halves belong together, begun at the old ones."""
        torch.manual_seed(seed)
        towers = nn.ModuleList(network(32, 64, 16) for _ in range(2))
        if old:
            towers.load_state_dict(old.state_dict())

        def of_batch():
            some = halves[:, torch.randperm(halves.shape[1])[:BATCH]]
            with torch.no_grad():
                before = similar(old or towers, some)
            return isotropy.similarity_distillation(before, similar(towers, some), tau=0.1, alpha=alpha, rows=rows)

        descend([towers], of_batch, steps, lr)
        return towers

    @torch.no_grad()
    def recall(towers):
        """Of upper halves and lower ones, among held-out ones of 0 to 4, and of 5 to 9."""
        return {what: statistics.mean((s.argmax(d) == torch.arange(len(s))).double().mean().item() for d in (0, 1))
                for what, s in (("first", similar(towers, held_out[0])), ("second", similar(towers, held_out[1])))}

    old = learn(first)
    return {"the first stage": recall(old), "all digits at once": recall(learn(torch.cat([first, second], 1))),
            **{f"InfoNCE alone, lr = {lr:g}": recall(learn(second, old, lr)) for lr in (3e-3, 1e-3, 3e-4, 1e-4)},
            **{f"Mod-X, α = {alpha:g}": recall(learn(second, old, alpha=alpha)) for alpha in (5, 20, 100)},
            **{f"Mod-X on all rows, α = {alpha:g}": recall(learn(second, old, alpha=alpha, rows="all"))
               for alpha in (0.3, 1)}}


def middle(axis, x, values, color, label=None, **style):
    """Means at places x, with their ranges; values (places, seeds)."""
    values = torch.tensor(values)
    mean = values.mean(1)
    axis.errorbar(x, mean, torch.stack([mean - values.amin(1), values.amax(1) - mean]), color=color, label=label,
                  **{"marker": "o", "markersize": 4, "elinewidth": 0.8, "linewidth": 1.2} | style)


def draw(path, found):
    """A panel for each."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
    one, two, three, four = axes.flat
    rows = found["simlap"]
    for shift, kind, label, color in ((-0.2, "precision", "mean average precision, plain cosine", BLUE),
                                      (0.2, "own", "the second class is found under the gate", ORANGE)):
        values = [row[kind] for row in rows.values()]
        one.bar(torch.arange(len(rows)) + shift, [statistics.mean(v) for v in values], 0.38, color=color, label=label)
        middle(one, torch.arange(len(rows)) + shift, values, "0.2", linestyle="", marker="")
    one.set(ylim=(0, 1.35), yticks=(0, 0.25, 0.5, 0.75, 1), title="SimLAPLoss: digits in pairs", xticks=range(5))
    names = [name.replace(" classes", "").replace(", ", "\n").replace("k as", "k\nas") for name in rows]
    one.set_xticklabels(names, fontsize=8)
    one.legend(frameon=False, loc="upper right")
    rows = found["modx"]
    for start, label, color in (("InfoNCE alone", "InfoNCE alone, four learning rates", "0.45"),
                                ("Mod-X, α", "Mod-X, three weights", BLUE),
                                ("Mod-X on all", "Mod-X on all rows, two weights", GREEN)):
        some = [row for name, row in rows.items() if name.startswith(start)]
        first, second = (torch.tensor([row[kind] for row in some]) for kind in ("first", "second"))
        for i in range(found["setting"]["seeds"]):
            two.plot(first[:, i], second[:, i], ".", color=color, markersize=3, alpha=0.6)
        two.plot(first.mean(1), second.mean(1), "o-", color=color, label=label, markersize=5)
    for name, marker in (("the first stage", "s"), ("all digits at once", "*")):
        two.plot(*(statistics.mean(rows[name][kind]) for kind in ("first", "second")), marker, color=ORANGE, label=name,
                 markersize=8)
    two.set(xlabel="Recall@1, first digits (0 to 4)", ylabel="Recall@1, second digits (5 to 9)", xlim=(0, None),
            ylim=(0, 0.33), title="similarity_distillation: what is kept, and what is learnt")
    two.legend(frameon=False, loc="upper right")
    rows = found["koopman"]
    for block, system in enumerate(("pendulum", "lorenz")):
        for name, style in (("states", "--"), ("monomials up to degree 3", ":")):
            three.plot([3 * block - 0.4, 3 * block + 2.4], [statistics.mean(rows[name][f"{system} 4"])] * 2, style,
                       color="0.4", label=None if block else name)
        for (what, *_), color, shift in zip(ENTROPY, (BLUE, "0.45", ORANGE), (-0.2, 0, 0.2)):
            values = [rows[f"{where}, entropy {what}"][f"{system} 4"] for where, *_ in SETTINGS]
            middle(three, torch.arange(3) + 3 * block + shift, values, color, None if block else f"entropy {what}",
                   linestyle="")
    three.set(yscale="log", xticks=range(6), ylabel="squared error 4 steps ahead,\nof the states' variance",
              ylim=(None, 30), title="KoopmanInformationLoss: pendulum (left), Lorenz's system (right)")
    three.set_xticklabels([where.replace(", ", ",\n") for where, *_ in SETTINGS] * 2, fontsize=8)
    three.legend(frameon=False, ncols=2, loc="upper left")
    rows = found["groups"]
    for name, color in (("group lasso", BLUE), ("l1", ORANGE)):
        for kind, style, label in (("refitted", "-", "penalty chosen"), ("any", "--", "some penalty")):
            values = [rows[f"4 of 4 rows, {n} points, {name}"][kind] for n in POINTS]
            middle(four, POINTS, values, color, f"{name}, {label}", linestyle=style)
    four.set(xticks=POINTS, xlabel="points", ylabel="share of problems", ylim=(0, 1.5),
             yticks=(0, 0.25, 0.5, 0.75, 1), title="prox_group_lasso_: exactly the planted groups are found")
    four.legend(frameon=False, loc="upper left", ncols=2)
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=100)


def main():
    """Measure, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="splits, networks, trajectories, planted weights")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--draws", type=int, default=20, help="planted problems of a seed and a size")
    parser.add_argument("--output", type=Path, help="the picture, numbers beside it (default: in build/)")
    args = parser.parse_args()
    found = {"setting": {"seeds": args.seeds, "steps": args.steps, "draws": args.draws,
                         "threads": torch.get_num_threads(), "torch": torch.__version__}}
    for part in (simlap, modx, koopman, groups):
        runs = [part(seed, args.steps, args.draws) for seed in range(args.seeds)]
        found[part.__name__] = {name: {kind: [run[name][kind] for run in runs] for kind in row}
                                for name, row in runs[0].items()}
        print(f"\n{part.__name__}")
        for name, row in found[part.__name__].items():
            print(f"{name:>45}   " + "  ".join(f"{kind} {statistics.mean(of):.4g}" for kind, of in row.items()),
                  flush=True)
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "four_losses.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, found)
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
