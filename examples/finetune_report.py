"""What finetune.py prints and draws: a table, who can be told apart, learning curves, accuracy against cost."""

import json
import math
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib import ticker
from scipy.stats import t as student

OURS, COLORS = "#1f6fb2", ("#8a8f98", "#c2410c", "#7a5195", "#2f855a", "#b7791f", "#0e7490")


def summary(runs, rates, peaks):
    """A row per method; `runs` maps it to the results of its runs, `rates` to its learning rate, `peaks` to bytes."""
    rows = {}
    for method, results in runs.items():
        last = [r["curve"][-1][1] for r in results]
        rows[method] = {
            "lr": rates[method],
            "accuracy": statistics.mean(last),
            "spread": statistics.stdev(last) if len(last) > 1 else None,
            "trained_parameters": results[0]["parameters"],
            "state_bytes": results[0]["state"],
            "seconds_per_step": statistics.median(s for r in results for s in r["seconds"]),
            "steps_per_epoch": round(len(results[0]["seconds"]) / results[0]["curve"][-1][0]),
            "peak_bytes": peaks.get(method),
            "epochs": [epoch for epoch, _ in results[0]["curve"]],
            "curves": [[accuracy for _, accuracy in r["curve"]] for r in results],
        }
    return rows


def print_table(rows):
    """Print what `summary` found."""
    width = max(map(len, rows)) + 2
    print(f"\n{'method':<{width}}{'lr':>7}{'accuracy':>19}{'trained':>12}{'state KiB':>11}{'ms/step':>9}"
          f"{'peak MiB':>10}")
    for method, row in rows.items():
        accuracy = f"{row['accuracy']:.2%}" + ("" if row["spread"] is None else f" ± {row['spread']:.2%}")
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        print(f"{method:<{width}}{row['lr']:>7g}{accuracy:>19}{row['trained_parameters']:>12,}"
              f"{row['state_bytes'] / 1024:>11.1f}{1e3 * row['seconds_per_step']:>9.1f}{peak:>10}")
    print("\naccuracy: on the held-out part after the last epoch, mean ± standard deviation over the seeds\n"
          "trained: parameters that are, the new head included; ms/step: median of all training steps\n"
          "state: what the optimiser keeps between steps\n"
          "peak: resident memory that training takes beyond the model (activations, gradients, optimiser), each method "
          "in a\nprocess of its own; a frozen body's features are reckoned once: its steps are those of the head alone"
          )


def print_validation(table, grid):
    """Print accuracies by method and rate; the best of each method is marked."""
    width = max(map(len, table)) + 2
    print("\n" + f"{'lr':<{width}}" + "".join(f"{lr:>10g}" for lr in grid))
    for method, accuracies in table.items():
        cells = (f"{a:.2%}" + ("*" if a == max(accuracies) else " ") for a in accuracies)
        print(f"{method:<{width}}" + "".join(f"{cell:>10}" for cell in cells))


def difference(ours, theirs):
    """(mean, half of its 95 % interval) of the difference in accuracy, by pairs.

    Runs of one seed share data and starting point, so with several seeds the pairs are runs. With a single seed they
    are the held-out examples: what the interval then tells of is the choice of these, not that of the seed.
    """
    pairs = [[b - a for a, b in zip(t["right"], o["right"], strict=True)] for o, t in zip(ours, theirs, strict=True)]
    pairs = [statistics.mean(p) for p in pairs] if len(pairs) > 1 else pairs[0]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return statistics.mean(pairs), student.ppf(0.975, len(pairs) - 1) * error


def verdicts(runs, ours):
    """A sentence per other method: is `ours` better, worse, or can't it be told?"""
    sentences, seeds = [], len(runs[ours])
    over = f"{seeds} seeds, paired" if seeds > 1 else "one seed, over the held-out examples"
    for method, results in runs.items():
        if method == ours:
            continue
        mean, half = difference(runs[ours], results)
        word = "can't be told apart" if abs(mean) <= half else "better" if mean > 0 else "worse"
        sentences.append(f"{ours} - {method}: {100 * mean:+.2f} ± {100 * half:.2f} points (95 %, {over}): {word}.")
    return sentences


def write(path, rows, notes, task):
    """The picture at `path` and the numbers beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, rows, task)
    setting = {"task": task.title, "seeds": task.seeds, "epochs": task.epochs, "batch": task.batch, "shots": task.shots,
               "torch": torch.__version__, "threads": torch.get_num_threads()}
    found = {"setting": setting, "rows": rows, "notes": notes}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"picture: {path}")


def draw(path, rows, task):
    """Write a PNG: learning curves by epoch and by time, accuracy by trained parameters, and what a step takes."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    others = iter(COLORS)
    colors = {method: OURS if method == task.ours else next(others) for method in rows}
    figure, (left, wall, middle, time, memory) = plt.subplots(
        1, 5, figsize=(15.5, 3.9), layout="constrained", gridspec_kw={"width_ratios": [1.3, 1.2, 1.2, 1, 0.8]}
    )
    for method, row in rows.items():
        draw_curve(left, row, colors[method], method, front=method == task.ours)
        if row["seconds_per_step"] is not None:
            epoch = row["seconds_per_step"] * row["steps_per_epoch"]
            draw_curve(wall, row | {"epochs": [epoch * e for e in row["epochs"]]}, colors[method], method,
                       front=method == task.ours)
        accuracy, error = 100 * row["accuracy"], 100 * (row["spread"] or 0)
        middle.errorbar(row["trained_parameters"], accuracy, error or None, color=colors[method], fmt="o", capsize=3)
    over = "mean and range over the seeds" if task.seeds > 1 else "one seed"
    left.set(xlabel="epoch", ylabel="held-out accuracy (%)", title=f"{task.title}: {over}")
    left.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    left.legend(frameon=False, loc="lower right")
    wall.set(xscale="log", xlabel="seconds of training steps", title="the same by time")
    middle.set(xscale="log", xlabel="trained parameters", title="last epoch" + (" (± s.d.)" if task.seeds > 1 else ""))
    middle.xaxis.set_minor_formatter(ticker.NullFormatter())  # below a decade they would run into each other
    timed = {m: row for m, row in rows.items() if row["seconds_per_step"] is not None}
    draw_bars(time, {m: 1e3 * row["seconds_per_step"] for m, row in timed.items()}, colors)
    time.set(xlabel="ms", title="training step")
    draw_bars(memory, {m: (row["peak_bytes"] or 0) / 2**20 for m, row in rows.items()}, colors)
    memory.set(xlabel="MiB", title="peak beyond the model")
    if len(timed) == len(rows):
        memory.set(yticklabels=[])
    for axes in (left, wall, middle):
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=100)


def draw_curve(axes, row, color, label, front):
    """Mean accuracy by epoch, in a band from the lowest to the highest of the seeds."""
    curve = 100 * torch.tensor(row["curves"])
    axes.fill_between(row["epochs"], curve.amin(0), curve.amax(0), color=color, alpha=0.12, linewidth=0)
    axes.plot(row["epochs"], curve.mean(0), color=color, marker="o", markersize=3.5, label=label, zorder=2 + front)


def draw_bars(axes, values, colors):
    """A bar per method, its value written at the end, the first method on top."""
    axes.barh(list(values), values.values(), color=[colors[method] for method in values], height=0.6)
    for i, value in enumerate(values.values()):
        axes.text(value, i, f" {value:.1f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.tick_params(axis="y", length=0)
