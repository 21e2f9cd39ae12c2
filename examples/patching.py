"""What directions of a hidden layer do, and whether trees are in tokens' vectors: SubspacePatch and OrthogonalProbe.

Patching. A network sees scikit-learn's real digits (8 x 8), upright or turned by 90 degrees, and names both the digit
and the turn. A subspace of a hidden layer is sought such that a base with its part there taken from a source (another
digit, turned the other way) gets the source's turn and keeps its digit: trained by `RiemannianSGD` on two thirds of
the images, and measured on pairs of the others. Then `rowspace_split` takes single directions apart, those trained and
an illusory one that was planted: the turn written to a unit that nothing reads, and a unit that is read and never
written.

Probing. Statements of Python's own standard library: a token's vector is a random one of its word, beside those of its
neighbours, and the truth is the distance of neighbouring tokens in the tree that `ast` makes. Files are held out. The
probe's rows are orthonormal; against it any matrix, trained alike, directions of PCA, and random ones.

    python examples/patching.py                     # three seeds, some minutes at most
"""

import argparse
import json
import platform
import random
import statistics
from pathlib import Path

import torch
from patching_report import draw, gathered
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from syntax_data import batch, statements
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import torch_subspace as ts

WIDTHS, SITES = (64, 128, 64, 32, 11), {"middle layer": 4, "last hidden layer": 6}  # layers before the activations
RANKS, PROBES = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)
MODULES = """argparse ast calendar cmd codecs configparser copy csv dataclasses difflib fractions gettext heapq inspect
ipaddress optparse pickle pprint random shutil smtplib statistics tarfile textwrap threading traceback uuid zipfile"""

# ------------------------------------------------------------------------------------------------------------ patching


def both_ways(image, digit):
    """Every image upright and turned, its digit, and the bit."""
    return (torch.cat([image, image.rot90(1, (1, 2))]).flatten(1), digit.repeat(2),
            torch.arange(2).repeat_interleave(len(digit)))


def loss_of(out, digit, turn):
    return cross_entropy(out[:, :10], digit) + binary_cross_entropy_with_logits(out[:, 10], turn.float())


def right(out, digit, turn):
    """Shares of right digits, right bits, and both."""
    found = out[:, :10].argmax(1) == digit, (out[:, 10] > 0) == (turn == 1)
    return [part.double().mean().item() for part in (*found, found[0] & found[1])]


def minimise(loss, optimiser, steps):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()


def learn(x, digit, turn, steps=800):
    layers = [layer for n, m in zip(WIDTHS, WIDTHS[1:]) for layer in (nn.Linear(n, m), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])

    def loss():
        some = torch.randint(len(x), (128,))
        return loss_of(net(x[some]), digit[some], turn[some])

    minimise(loss, torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01), steps)
    return net.requires_grad_(False)


def pairs(digit, turn, count):
    """Base and source, of other digits and turned the other way."""
    base, source = torch.randint(len(digit), (2, 4 * count))
    fit = ((digit[base] != digit[source]) & (turn[base] != turn[source])).nonzero()[:count, 0]
    return base[fit], source[fit]


def align(read, h, digit, turn, rank, steps):
    """Distributed alignment search: frames along which the answer takes the source's bit and the base's digit."""
    patch = ts.grassmann.SubspacePatch(h.shape[1], rank)

    def loss():
        base, source = pairs(digit, turn, 256)
        return loss_of(read(patch(h[base], h[source])), digit[base], turn[source])

    minimise(loss, ts.RiemannianSGD(patch.parameters(), lr=0.05, momentum=0.9), steps)
    return patch.basis.detach()


def patching(image, digit, steps, seed):
    """What patches at two layers come to, by method and rank; and of single directions' parts."""
    torch.manual_seed(seed)
    known, held = train_test_split(range(len(digit)), test_size=1 / 3, stratify=digit, random_state=seed)
    x, digits, turns = both_ways(image[known], digit[known])
    other, *truth = both_ways(image[held], digit[held])
    net = learn(x, digits, turns)
    base, source = pairs(*truth, 2000)
    wanted = truth[0][base], truth[1][source]
    found = {"network": right(net(other), *truth)}
    for site, at in SITES.items():
        h, asked, read = net[:at](x), net[:at](other), net[at:]

        def patched(basis, asked=asked, read=read):
            return right(read(ts.grassmann.subspace_patch(asked[base], asked[source], basis)), *wanted)

        means = torch.stack([torch.stack([h[(digits == c) & (turns == bit)].mean(0) for c in range(10)])
                             for bit in (0, 1)])
        spans = {"differences of means": torch.linalg.svd(means[1] - means[0]).Vh,
                 "PCA": torch.linalg.svd(h - h.mean(0), full_matrices=False).Vh,
                 "random": torch.linalg.qr(torch.randn(h.shape[1], h.shape[1])).Q}
        found[site] = {name: {r: patched(span[:r]) for r in RANKS} for name, span in spans.items()}
        trained = {r: align(read, h, digits, turns, r, steps) for r in RANKS}
        found[site]["trained"] = {r: patched(basis) for r, basis in trained.items()}
        found[site]["all of the layer"] = {h.shape[1]: right(read(asked[source]), *wanted)}

    def apart(v, read, h, weight):
        """Along a direction, what is read of it and what isn't: answers right in both, and the share not read."""
        row, null = ts.grassmann.rowspace_split(v, weight)
        moved = [right(read(ts.grassmann.subspace_patch(h[base], h[source], part)), *wanted) for part in (v, row, null)]
        return [*(both for _, _, both in moved), (null.square().sum() / v.square().sum()).item()]

    bit = read[0](h)[:, 10:]  # read is the last layer
    planted, weight = plant(read[0], 4 * bit.abs().mean())
    wide, wide_asked = (torch.cat([part, read[0](part)[:, 10:].tanh(), 0 * part[:, :1]], 1) for part in (h, asked))
    there = align(planted, wide, digits, turns, 1, steps)[0]
    illusory = torch.eye(wide.shape[1])[-2:].sum(0)
    found["directions"] = {"trained": apart(trained[1][0], read, asked, read[0].weight),
                           "trained, where an illusory one is planted": apart(there, planted, wide_asked, weight),
                           "illusory, planted": apart(illusory, planted, wide_asked, weight)}
    return found


def plant(read, size):
    """The last layer with two more units before it, and its weight: nothing reads the first, into which the turn is
    written; the second adds to the turn's answer, and is always 0."""
    n, m = read.in_features, read.out_features
    weight = torch.zeros(m + 1, n + 2)
    weight[:m, :n], weight[m, n + 1] = read.weight, size

    def answer(h):
        out = h @ weight.mT
        return torch.cat([out[:, :10], out[:, 10:].sum(1, keepdim=True)], 1) + read.bias

    return answer, weight


# ------------------------------------------------------------------------------------------------------------- probing


def probing(steps, seed):
    """{method: {rank: rank correlation with the trees' distances, in files held out}}."""
    torch.manual_seed(seed)
    modules, draw = MODULES.split(), random.Random(seed)
    draw.shuffle(modules)
    cut = 2 * len(modules) // 3
    some, others = ([s for module in part for s in statements(module)] for part in (modules[:cut], modules[cut:]))
    (x, tree), (asked, truth) = (batch(draw.sample(s, min(len(s), n)), seed) for s, n in ((some, 2000), (others, 600)))
    tokens, known = x[x.any(-1)], ~truth.isnan()
    principal = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False).Vh

    def agrees(basis):
        near = (asked @ basis.mT).diff(dim=1).square().sum(-1)
        return float(spearmanr(near[known], truth[known]).statistic)

    def off(basis):
        """How far distances are off, on average: the probe's loss."""
        rows = torch.randint(len(x), (128,))
        near = (x[rows] @ basis.mT).diff(dim=1).square().sum(-1)
        return (near - tree[rows])[~tree[rows].isnan()].abs().mean()

    found = {"trained": {}, "any matrix": {}, "PCA": {}, "random": {}}
    for rank in PROBES:
        probe = ts.grassmann.OrthogonalProbe(x.shape[-1], rank)
        found["random"][rank], found["PCA"][rank] = agrees(probe.basis.detach()), agrees(principal[:rank])
        with torch.no_grad():  # the embedding has no unit: a factor, trained along, from where mean distances agree
            scale = nn.Parameter((tree.nanmean() / probe(x)[~tree.isnan()].mean()).sqrt())
            free = nn.Parameter(scale * probe.basis)

        def loss(probe=probe, scale=scale):
            rows = torch.randint(len(x), (128,))
            return probe.loss(scale * x[rows], tree[rows])

        minimise(loss, ts.RiemannianAdamW([*probe.parameters(), scale], lr=0.02, weight_decay=0.0), steps)
        minimise(lambda free=free: off(free), torch.optim.Adam([free], lr=0.02), steps)
        found["trained"][rank], found["any matrix"][rank] = agrees(probe.basis.detach()), agrees(free.detach())
    found["all"] = {x.shape[-1]: agrees(torch.eye(x.shape[-1]))}
    return found


# -------------------------------------------------------------------------------------------------------------- results


def main():
    """Train, patch, probe, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="splits of images and of files, with weights of their own")
    parser.add_argument("--steps", type=int, default=300, help="of each patch and probe")
    parser.add_argument("--output", type=Path, help="the picture, numbers beside it (default: in build/)")
    args = parser.parse_args()
    data = load_digits()
    image, digit = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    found = gathered([patching(image, digit, args.steps, seed) | {"probing": probing(args.steps, seed)}
                      for seed in range(args.seeds)])
    for site in SITES:
        for name, rows in found[site].items():
            print(f"{site}, {name}: " + ", ".join(f"{statistics.mean(r['both']):.1%} ({k})" for k, r in rows.items()))
    for name, row in found["directions"].items():
        print(f"{name}: " + ", ".join(f"{part} {statistics.mean(values):.1%}" for part, values in row.items()))
    for name, rows in found["probing"].items():
        print(f"probe, {name}: " + ", ".join(f"{statistics.mean(r):.2f} ({k})" for k, r in rows.items()))
    path = args.output or Path(__file__).resolve().parents[1] / "build" / "patching.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, found)
    setting = {"seeds": args.seeds, "steps": args.steps, "threads": torch.get_num_threads(),
               "torch": torch.__version__, "python": platform.python_version()}
    path.with_suffix(".json").write_text(json.dumps({"setting": setting, **found}, indent=1, ensure_ascii=False) + "\n")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
