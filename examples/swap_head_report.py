"""What swap_head.py prints and draws: a table, learning curves, and how far apart the classes' subspaces lie."""

import json
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib import ticker
from torch import nn

import torch_subspace as ts

COLORS = {"linear": "#8a8f98", "grassmann": "#1f6fb2"}


def head_of(model):
    """The model's classifier: its Grassmann head, or its last linear layer."""
    return [m for m in model.modules() if isinstance(m, (ts.GrassmannLinear, nn.Linear))][-1]


def principal_angles(frames):
    """Angles (C, C, k) in degrees between the subspaces of any two classes, ascending; `frames` is (C, k, n)."""
    cosines = torch.linalg.svdvals(frames[:, None].double() @ frames.double().mT)
    return cosines.clamp(max=1).acos().rad2deg()


def summary(runs, rates):
    """Accuracy, frame error and time of each head; `runs` maps it to its (model, curve, seconds), `rates` to its lr."""
    rows = {}
    for head, results in runs.items():
        last = [curve[-1] for _, curve, _ in results]
        errors = [head_of(model).frame_error().item() for model, _, _ in results if head == "grassmann"]
        rows[head] = {
            "lr": rates[head],
            "accuracy": statistics.mean(last),
            "spread": statistics.stdev(last) if len(last) > 1 else 0.0,
            "lowest": min(last),
            "highest": max(last),
            "frame_error": max(errors, default=None),
            "seconds_per_step": statistics.median(s for _, _, seconds in results for s in seconds),
            "curves": [curve for _, curve, _ in results],
        }
    return rows


def print_table(rows):
    """Print what `summary` found."""
    names = f"{'accuracy':>10}{'spread':>9}{'lowest':>9}{'highest':>9}{'frame error':>13}{'s/step':>8}"
    print(f"\n{'head':<12}{'lr':>6}{names}")
    for head, row in rows.items():
        numbers = f"{row['accuracy']:>10.2%}{row['spread']:>9.2%}{row['lowest']:>9.2%}{row['highest']:>9.2%}"
        error = "–" if row["frame_error"] is None else f"{row['frame_error']:.1e}"
        print(f"{head:<12}{row['lr']:>6g}{numbers}{error:>13}{row['seconds_per_step']:>8.3f}")
    print("\naccuracy: on the held-out images after the last epoch, mean over the seeds; spread: standard deviation;\n"
          "frame error: largest entry of W Wᵀ - I; s/step: median of all training steps")


def write(path, rows, head, setting):
    """The picture at `path` and the numbers beside it; `head` is a trained Grassmann head, `setting` the options."""
    random = ts.GrassmannLinear(head.in_features, head.num_classes, head.subspace_dim)
    angles, random_angles = (principal_angles(h.weight.detach()) for h in (head, random))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, {name: torch.tensor(row["curves"]) for name, row in rows.items()}, angles, random_angles)
    setting = {key: value for key, value in setting.items() if key != "output"}
    setting |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    path.with_suffix(".json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(f"picture: {path}")


def draw(path, curves, angles, random_angles):
    """Write a PNG.

    curves: head to held-out accuracies (seeds, epochs).
    angles: principal angles (C, C, k) between the classes, ascending, in degrees; `random_angles` those of subspaces
        drawn at random, for comparison.
    """
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11.5, 3.7), layout="constrained", gridspec_kw={"width_ratios": [1.15, 1, 1]}
    )
    draw_curves(left, curves)
    draw_matrix(middle, angles[..., 0])
    draw_spectra(right, angles, random_angles)
    figure.savefig(path, dpi=100)


def draw_curves(axes, curves):
    """Mean error over the seeds by epoch, in a band from the lowest to the highest."""
    for head, curve in curves.items():
        epoch = range(1, curve.shape[1] + 1)
        error = 100 * (1 - curve)
        axes.fill_between(epoch, error.amin(0), error.amax(0), color=COLORS[head], alpha=0.18, linewidth=0)
        axes.plot(epoch, error.mean(0), color=COLORS[head], marker="o", markersize=3.5, label=f"{head} head")
    axes.set(xlabel="epoch", ylabel="error (%)", title="held-out error: mean and range over the seeds")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False)


def draw_matrix(axes, angles):
    """The smallest angle of every two classes, written in; the diagonal, a class and itself, stays empty."""
    classes = angles.shape[0]
    apart = ~torch.eye(classes, dtype=torch.bool)
    low, high = angles[apart].min().item(), angles[apart].max().item()
    axes.imshow(angles.masked_fill(~apart, float("nan")), cmap="YlGnBu_r", vmin=low, vmax=high)
    for i, j in apart.nonzero().tolist():
        color = "white" if angles[i, j] < low + 0.55 * (high - low) else "black"
        axes.text(j, i, f"{angles[i, j]:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    axes.set(xticks=range(classes), yticks=range(classes), xlabel="class", ylabel="class")
    axes.set_title("smallest angle between two classes' subspaces (°)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_spectra(axes, angles, random_angles):
    """All principal angles of every two classes: a line per pair, the closest and the farthest marked."""
    classes, _, k = angles.shape
    pairs = torch.triu_indices(classes, classes, 1).T.tolist()
    rank = range(1, k + 1)
    for i, j in pairs:
        axes.plot(rank, angles[i, j], color="#9db8d2", linewidth=0.6, alpha=0.7)
    by_smallest = sorted(pairs, key=lambda pair: angles[pair[0], pair[1], 0].item())
    for (i, j), color, word in ((by_smallest[0], "#c2410c", "closest"), (by_smallest[-1], "#1f6fb2", "farthest")):
        axes.plot(rank, angles[i, j], color=color, marker="o", markersize=3.5, label=f"{i} and {j} ({word})")
    random = torch.stack([random_angles[i, j] for i, j in pairs]).mean(0)
    axes.plot(rank, random, color="#555555", linestyle=":", label="random subspaces (mean)")
    axes.set(xlabel="principal angle", ylabel="degrees", title=f"all {k} angles, a line per pair of classes")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.25, linewidth=0.6)
