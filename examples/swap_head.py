"""Swap the classifier of a standard model for a Grassmann head, and train both side by side.

scikit-learn's handwritten digits (1797 real images, bundled with it) are enlarged to 32 x 32 for a torchvision or timm
model. The linear head and the Grassmann head get the same model, seeds, batches, epochs and schedule; the learning rate
of each was picked from the same grid on a validation part of the training set (`--validate --lr ...`). A third of the
images is held out and only measured.

    python examples/swap_head.py
    python examples/swap_head.py --pretrained            # timm's ImageNet weights, 96 x 96 images; needs a network
"""

import argparse
import sys
import time
from pathlib import Path

import swap_head_report as report
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

import torch_subspace as ts

CLASSES = 10
# For each head the best of 0.003, 0.01, 0.03 and 0.1 in validation, three seeds: 97.7 % and 98.0 %, which 0.1 has too
# with frames. Differences of a percent are within the spread there.
LEARNING_RATES = {"linear": 0.03, "grassmann": 0.03}


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="name in torchvision, or else in timm (default: resnet18)")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights (downloaded)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3, help="runs per head (default: 3)")
    parser.add_argument("--subspace-dim", type=int, default=8, help="dimension of a class's subspace (default: 8)")
    parser.add_argument("--gamma", type=lambda text: text if text == "auto" else float(text), default="auto",
                        help="scale of the Grassmann head's logits (default: auto, by its sizes)")
    parser.add_argument("--size", type=int, help="side of the images (default: 32, pretrained 96)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, help="peak learning rate of both heads (default: the one picked for each)")
    parser.add_argument("--validate", action="store_true", help="measure on a quarter of the training set instead")
    build = Path(__file__).resolve().parents[1] / "build"
    parser.add_argument("--output", type=Path, default=build / "swap_head.png", help="the picture; numbers beside it")
    args = parser.parse_args()
    args.size = args.size or (96 if args.pretrained else 32)
    return args


def digits(size, validate):
    """(images, labels) to train on and (images, labels) to measure on."""
    data = load_digits()
    image = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    image = interpolate(image, size=(size, size), mode="bilinear").repeat(1, 3, 1, 1)
    label = torch.tensor(data.target)
    train, held_out = train_test_split(range(len(label)), test_size=1 / 3, stratify=label, random_state=0)
    if validate:
        train, held_out = train_test_split(train, test_size=1 / 4, stratify=label[train], random_state=0)
    return (image[train], label[train]), (image[held_out], label[held_out])


def make_model(args):
    """The model as its library builds it, with a linear head for ten classes."""
    import timm
    import torchvision

    if args.pretrained:
        try:
            return timm.create_model(args.model, pretrained=True, num_classes=CLASSES)
        except Exception as error:  # what a missing network raises is up to several libraries
            why = f"{type(error).__name__}: {error}".partition(". ")[0]
            sys.exit(f"timm's weights of {args.model!r} can't be had ({why}). Do without --pretrained.")
    if args.model in torchvision.models.list_models():
        return torchvision.models.get_model(args.model, num_classes=CLASSES)
    return timm.create_model(args.model, num_classes=CLASSES)


def accuracy(model, image, label):
    """Fraction of the images that are classified right."""
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in zip(image.split(200), label.split(200)))
    return right / len(label)


def train(head, seed, args, data, progress):
    """One run. Returns the trained model, its accuracy after each epoch and the seconds of each step."""
    (image, label), held_out = data
    torch.manual_seed(seed)
    model = make_model(args)
    if head == "grassmann":
        ts.swap_head(model, subspace_dim=args.subspace_dim, gamma=args.gamma)
    model.to(memory_format=torch.channels_last)

    lr = args.lr or LEARNING_RATES[head]
    opt = ts.RiemannianSGD(ts.param_groups(model, weight_decay=5e-4), lr=lr, momentum=0.9)  # on no frames: plain SGD
    steps = len(label) // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, [group["lr"] for group in opt.param_groups], total_steps=args.epochs * steps, cycle_momentum=False
    )
    curve, seconds = [], []
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(args.epochs):
        model.train()
        for batch in torch.randperm(len(label), generator=shuffle).split(args.batch)[:steps]:
            start = time.perf_counter()
            loss = cross_entropy(model(image[batch]), label[batch])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            seconds.append(time.perf_counter() - start)
            progress.update()
        curve.append(accuracy(model, *held_out))
        progress.set_description(f"{head} head, seed {seed}: {curve[-1]:.1%}")
    return model, curve, seconds


def main():
    """Train both heads, then tabulate and draw."""
    args = arguments()
    torch.use_deterministic_algorithms(True)
    data = digits(args.size, args.validate)
    steps = len(data[0][1]) // args.batch
    runs = {head: [] for head in LEARNING_RATES}
    with tqdm(total=len(runs) * args.seeds * args.epochs * steps, unit="step", dynamic_ncols=True) as progress:
        for seed in range(args.seeds):
            for head, results in runs.items():
                results.append(train(head, seed, args, data, progress))
    rates = {head: args.lr or lr for head, lr in LEARNING_RATES.items()}
    rows = report.summary(runs, rates)
    report.print_table(rows)
    report.write(args.output, rows, report.head_of(runs["grassmann"][0][0]), vars(args))


if __name__ == "__main__":
    main()
