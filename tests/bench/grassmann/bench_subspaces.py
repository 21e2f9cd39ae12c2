"""Subspaces of data: which of them holds most of a point, an iteration of K-subspaces, a step on the Stiefel manifold.

The floors are what no method goes without: the product of points and frames; beside it the Gram matrices of the
clusters and their eigenproblems; torch's fused SGD. K-subspaces has no well-kept code to import: the loop is the usual
one, batched over points, subspace after subspace, by singular vectors or Gram matrices; the batched formula is the best
eager one.
"""

import dataclasses

import bench_rsgd as steps
import reference
import torch
import work
from harness import Case, Contender, Target, relative
from torch.nn.functional import linear

import torch_subspace as ts
from torch_subspace.grassmann.k_subspaces import _frames_of, _nearest

SCORES = ts.grassmann.subspace_scores


def points(n, features, clusters, k):
    """Points near planted subspaces, and frames a little off these."""
    seed = torch.Generator().manual_seed(0)
    frames = torch.linalg.qr(torch.randn(clusters, features, k, generator=seed)).Q
    label = torch.randint(clusters, (n,), generator=seed)
    x = 0.1 * torch.randn(n, features, generator=seed)
    for c in range(clusters):
        own = label == c
        x[own] += torch.randn(int(own.sum()), k, generator=seed) @ frames[c].mT
    near = frames.mT + 0.02 * torch.randn(clusters, k, features, generator=seed)
    return x, torch.linalg.qr(near.mT).Q.mT.contiguous()


def held(x, frames):
    """Squared lengths of all projections, as one would write them: points x subspaces x k in memory."""
    return linear(x, frames.flatten(0, 1)).unflatten(1, frames.shape[:2]).square().sum(2)


def looped(x, frames):
    """The smallest residual, subspace after subspace."""
    best = label = None
    for c, frame in enumerate(frames):
        left = (x - x @ frame.mT @ frame).square().sum(1)
        if best is None:
            best, label = left, torch.zeros(len(x), dtype=torch.int64)
        else:
            label = torch.where(left < best, c, label)
            best = torch.minimum(left, best)
    return label


def directions(own, k):
    """The k principal directions of points."""
    return torch.linalg.eigh(own.mT @ own).eigenvectors[:, -k:].mT


def share_held(label, x, frames):
    """What the labels' subspaces hold: labels themselves may differ where two hold as much."""
    return held(x, frames).gather(1, label[:, None]).sum()


def assignment(n, features, clusters, k):
    """The labels alone."""
    x, frames = points(n, features, clusters, k)
    flat, few = frames.flatten(0, 1), x[:1000].double()
    truth = held(few, frames.double()).amax(1).sum()

    def contender(name, label, **options):
        def check():
            return relative(share_held(label(few.float(), frames), few, frames.double()), truth)

        return Contender(name, lambda: lambda: label(x, frames), check, peak=True, **options)

    floor = Contender("floor: matrix product alone", lambda: lambda: linear(x, flat), peak=True)
    ours = contender("ours", lambda x, w: SCORES(x, w).max(1).indices)
    eager = contender("eager formula", lambda x, w: held(x, w).max(1).indices)
    return Case(f"labels n={n} features={features} K={clusters} k={k} float32",
                [floor, ours, eager],
                [Target("ours", (floor.name,), "<=", 1.3, 1.1)], **work.assignment(n, features, clusters, k),
                seconds=30)


def iteration(n, features, clusters, k):
    """Labels, then frames of them."""
    x, frames = points(n, features, clusters, k)
    energy, generator = x.square().sum(1), torch.Generator().manual_seed(0)

    def ours():
        return _frames_of(x, *_nearest(x, energy, frames), clusters, k, generator)

    def batched():
        label = held(x, frames).max(1).indices
        return torch.stack([directions(x[label == c], k) for c in range(clusters)])

    def loop():
        label = looped(x, frames)
        return torch.stack([torch.linalg.svd(x[label == c], full_matrices=False)[2][:k] for c in range(clusters)])

    def loop_of_grams():
        label = looped(x, frames)
        return torch.stack([directions(x[label == c], k) for c in range(clusters)])

    def least():
        linear(x, frames.flatten(0, 1))
        for own in x.chunk(clusters):
            torch.linalg.eigh(own.mT @ own)

    exact, wide = x.double(), held(x.double(), frames.double()).max(1).indices
    truth = torch.stack([directions(exact[wide == c], k) for c in range(clusters)])

    def contender(name, function):
        def check():
            found = function().double()
            return relative(found.mT @ found, truth.mT @ truth)

        return Contender(name, lambda: function, check, peak=True, kept=4 * clusters * k * features)

    return Case(f"iteration n={n} features={features} K={clusters} k={k} float32",
                [Contender("floor: product, Gram matrices, eigenproblems", lambda: least), contender("ours", ours),
                 contender("batched formula", batched), contender("loop over subspaces", loop),
                 contender("loop over subspaces, Gram matrices", loop_of_grams)],
                [Target("ours", ("loop over subspaces",), ">=", 3, 3.6)], **work.k_subspaces(n, features, clusters, k),
                seconds=30)


def stiefel(classes, k, n):
    """One step on the Stiefel manifold, beside that on the Grassmannian."""
    shape = (classes, k, n)

    def ours(retraction, manifold="stiefel"):
        def make(p):
            return ts.RiemannianSGD([{"params": [p], "manifold": manifold}], lr=steps.LR, momentum=steps.MOMENTUM,
                                    retraction=retraction)

        def check():
            opt, p = steps.optimizer(make, shape, "cpu")
            opt.step()
            given = [t[: steps.CHECKED] for t in steps.frames(*shape, "cpu")]
            truth = reference.rsgd_step(*given, lr=steps.LR, momentum=steps.MOMENTUM, retraction=retraction,
                                        manifold=manifold)
            return relative([p.detach()[: steps.CHECKED], opt.state[p]["momentum_buffer"][: steps.CHECKED]], truth)

        name = "ours" if manifold == "stiefel" else "ours, Grassmannian"
        return Contender(f"{name}: {retraction}", lambda: steps.optimizer(make, shape, "cpu")[0].step, check)

    geoopt = steps.geoopt_sgd(shape, False, "cpu")
    return Case(f"Stiefel step C={classes} k={k} n={n} float32",
                [steps.floor(shape, "cpu"), *(ours(word) for word in ("geodesic", "polar", "qr", "cayley")),
                 ours("geodesic", "grassmann"), dataclasses.replace(geoopt, note="its own retraction: unchecked")],
                **work.rsgd(classes, k, n), seconds=20)


def cases(device):
    """Labels of many points; iterations with many features and with few; a head's frames."""
    if device != "cpu":
        return []
    return [
        assignment(100_000, 256, 100, 8),
        iteration(20_000, 256, 100, 8),
        iteration(20_000, 64, 20, 4),
        stiefel(1000, 8, 2048),
    ]
