"""Take noise off digits by the ten digits' subspaces, and name the digit by the nearest one; nothing is trained.

White noise is added to scikit-learn's real digits (8 x 8, grey values from 0 to 1). The denoiser is the posterior mean
of a mixture of low-rank Gaussians, one for each digit, whose subspaces are the principal directions of clean training
images. Against it: one PCA of all training images. Either one's dimension is the best for a part of the training
images, with noise of its own; a third of the images is held out and only measured. Beside them, subspaces of a few
dimensions whatever the noise: where there is little of it, they take off more of the images than of the noise. Without
labels and noise known, as here, neither is a method for photographs: what is shown is what subspaces know.

    python examples/denoise.py
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import torch_subspace as ts

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NOISE = (0.1, 0.2, 0.3, 0.6, 1.0)
DIMENSIONS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 40)
FEW = 8
METHODS = {"one PCA": "#c2410c", "classes' subspaces": "#1f6fb2", "classes' subspaces, a few dimensions": "#7fb2d9"}
SHOWN = 0.3  # noise of the images in the picture


def parts(label, seed):
    """Indices of training, validation and held-out images."""
    known, held_out = train_test_split(range(len(label)), test_size=1 / 3, stratify=label, random_state=seed)
    train, valid = train_test_split(known, test_size=1 / 4, stratify=label[known], random_state=seed)
    return [torch.tensor(part) for part in (train, valid, held_out)]


def by_pca(image, label, seen, noise, rank):
    """Projected onto the directions of largest energy of all images."""
    one = ts.grassmann.class_subspaces(image, torch.zeros_like(label), rank)[0]
    return seen @ one.mT @ one


def by_classes(image, label, seen, noise, k):
    """The posterior mean; the size of a coordinate is that of the training images'."""
    frames = ts.grassmann.class_subspaces(image, label, k)
    size = (ts.grassmann.subspace_scores(image, frames).amax(1).mean() / k).sqrt().item()
    return size * ts.grassmann.subspace_denoise(seen, frames, size, noise)


def measure(image, label, noise, seed):
    """({method: mean squared error of a pixel}, {method: dimension}, images for the picture)."""
    train, valid, held_out = parts(label, seed)
    draw = torch.Generator().manual_seed(seed)
    errors, chosen, shown = {}, {}, [image[held_out]]
    tried = image[valid] + noise * torch.randn(image[valid].shape, generator=draw)
    seen = image[held_out] + noise * torch.randn(image[held_out].shape, generator=draw)
    shown.append(seen)
    errors["nothing"] = (seen - image[held_out]).square().mean().item()
    for method, denoise, choice in zip(METHODS, (by_pca, by_classes, by_classes), (range(1, 65), DIMENSIONS, (FEW,))):
        def error(k, x, clean, denoise=denoise):
            return (denoise(image[train], label[train], x, noise, k) - clean).square().mean().item()

        chosen[method] = min(choice, key=lambda k: error(k, tried, image[valid]))
        errors[method] = error(chosen[method], seen, image[held_out])
        shown.append(denoise(image[train], label[train], seen, noise, chosen[method]))
    return errors, chosen, shown


def nearest(image, label, k, seed):
    """Held-out accuracy of the nearest class subspace."""
    train, valid, held_out = parts(label, seed)
    known = torch.cat([train, valid])
    frames = ts.grassmann.class_subspaces(image[known], label[known], k)
    named = ts.grassmann.subspace_scores(image[held_out], frames).argmax(1)
    return (named == label[held_out]).double().mean().item()


def draw(path, rows, shown):
    """Some images as they are, with noise and without, and the errors by the noise."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=(1.5, 1))
    grid = torch.stack([images[:12].view(-1, 8, 8) for images in shown[:4]])  # (4, 12, 8, 8)
    grid = torch.nn.functional.pad(grid, (1, 1, 1, 1)).permute(0, 2, 1, 3).reshape(4 * 10, 12 * 10)
    left.imshow(grid, cmap="gray_r", vmin=0, vmax=1)
    left.set(xticks=[], yticks=[4.5 + 10 * i for i in range(4)], title=f"held-out images, noise {SHOWN:g}",
             yticklabels=["clean", "seen", *METHODS][:4])
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    for method, color in METHODS.items():
        errors = [rows[str(noise)]["error"] for noise in NOISE]
        ratio = torch.tensor([row[method] for row in errors]) / torch.tensor([row["nothing"] for row in errors])
        right.fill_between(NOISE, ratio.amin(1), ratio.amax(1), color=color, alpha=0.2, linewidth=0)
        right.plot(NOISE, ratio.mean(1), color=color, marker="o", markersize=4,
                   label=method.replace("a few", str(FEW)))
    right.axhline(1, color="0.6", linewidth=0.8)
    right.set(xscale="log", xticks=NOISE, xticklabels=[f"{n:g}" for n in NOISE], xlabel="noise (standard deviation)",
              ylabel="squared error, of the noise's own", title="mean and range over the seeds", ylim=(0, None))
    right.minorticks_off()
    right.grid(alpha=0.25, linewidth=0.6)
    right.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main():
    """Measure, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="splits, each with noise of its own")
    parser.add_argument("--output", type=Path, help="the picture, numbers beside it (default: in build/)")
    args = parser.parse_args()
    data = load_digits()
    image, label = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    rows, shown = {}, None
    print(f"mean squared error of a pixel, held-out images, {args.seeds} seeds\n\n{'noise':>5}{'left alone':>13}"
          + "".join(f"{method:>40}" for method in METHODS))
    for noise in NOISE:
        runs = [measure(image, label, noise, seed) for seed in range(args.seeds)]
        if noise == SHOWN:
            shown = runs[0][2]
        rows[str(noise)] = {"error": {method: [run[0][method] for run in runs] for method in runs[0][0]},
                            "dimension": {method: [run[1][method] for run in runs] for method in METHODS}}
        error = {method: statistics.mean(found) for method, found in rows[str(noise)]["error"].items()}
        print(f"{noise:5g}{error['nothing']:13.4f}" + "".join(f"{error[method]:40.4f}" for method in METHODS))
    accuracy = {str(k): [nearest(image, label, k, seed) for seed in range(args.seeds)] for k in (1, 4, 8, 16)}
    print("\nnearest class subspace: " + ", ".join(
        f"{statistics.mean(found):.1%} with k = {k}" for k, found in accuracy.items()))
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "denoise.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, rows, shown)
    found = {"setting": {"seeds": args.seeds, "torch": torch.__version__}, "noise": rows, "nearest subspace": accuracy}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
