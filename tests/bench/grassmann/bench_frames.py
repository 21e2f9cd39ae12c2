"""What frames are for beside heads, in torch's own operations: noisy points, patches, probes, groups of coordinates.

Ours, the formula as the papers' code has it, eager and compiled, and what none does without. No package that could be
installed has them; torch's parametrised rotation, which pyvene trains for its patches, is imported.
"""

import torch
import work
from bench_isotropy_losses import OURS, contender, contenders, normal
from harness import Case, Contender, compiled, relative
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear, normalize
from torch.nn.utils import parametrizations

from torch_subspace import grassmann

NOISE, BETA, MARGIN, CUTOFF = 0.5, 1.2, 0.2, 0.5


def rows(k, n, *lead, seed=0):
    """Orthonormal ones."""
    return torch.linalg.qr(normal(*lead, n, k, seed=seed)).Q.mT.contiguous()


def alike(*given):
    """A function that has these tensors on another's device, floating ones in its dtype; moved once."""
    known = {}

    def of(t):
        key = t.device, t.dtype
        if key not in known:
            known[key] = [own.to(t) if own.is_floating_point() else own.to(t.device) for own in given]
        return known[key]

    return of


class Method(nn.Module):
    """A module's method with other parameters than its own."""

    def __init__(self, module, name, *names):
        super().__init__()
        self.module, self.name, self.names = module, name, names

    def forward(self, *given):
        return getattr(self.module, self.name)(*given)

    def of(self, parameters, *given):
        return functional_call(self, {f"module.{name}": p for name, p in zip(self.names, parameters)}, given)


# ------------------------------------------------------------------------------------------------------- noisy points


def by_covariances(x, frames):
    """Bayes' rule with every subspace's own Gaussian: its covariance, inverse and determinant, in full."""
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    scores, means = [], []
    for frame in frames:
        held = frame.mT @ frame
        covariance = held + NOISE**2 * eye
        inverse = torch.linalg.inv(covariance)
        scores.append(-((x @ inverse) * x).sum(1) / 2 - torch.logdet(covariance) / 2)
        means.append(x @ (held @ inverse).mT)
    weight = torch.stack(scores, 1).softmax(1)
    return sum(weight[:, c:c + 1] * mean for c, mean in enumerate(means))


def by_projections(x, frames):
    """The same by the subspaces' orthonormal rows: points x subspaces x k in memory."""
    flat, total = frames.flatten(0, 1), 1 + NOISE**2
    seen = linear(x, flat).unflatten(1, frames.shape[:2])
    weight = (seen.square().sum(2) / (2 * NOISE**2 * total)).softmax(1)
    return (seen * weight[..., None]).flatten(1) @ flat / total


def denoise(n, features, clusters, k, device):
    """Points of planted subspaces, with noise."""

    def make():
        frames = rows(k, features, clusters)
        own = frames[torch.arange(n) % clusters]
        clean = (normal(n, 1, k, seed=1) @ own)[:, 0]
        return [clean + NOISE * normal(n, features, seed=2), frames]

    def ours(x, frames):
        return grassmann.subspace_denoise(x, frames, noise=NOISE)

    def one(name, function):
        def build():
            given = [t.to(device) for t in make()]
            return torch.no_grad()(lambda: function(*given))

        def check():
            found = function(*(t.to(device) for t in make()))
            return relative(found.cpu(), by_covariances(*(t.double() for t in make())))

        return Contender(name, build, check, peak=True, kept=4 * n * features)

    def least():
        x, flat = make()[0].to(device), make()[1].flatten(0, 1).to(device)
        return lambda: linear(x, flat) @ flat

    return Case(f"denoise n={n} features={features} K={clusters} k={k} float32",
                [Contender("floor: two products", least), one(OURS, ours), one("full covariances", by_covariances),
                 one("by projections", by_projections), one("torch.compile of it", compiled(by_projections))],
                **work.denoise(n, features, clusters, k))


# -------------------------------------------------------------------------------------------------- patches and probes


def patch(n, d, r, device):
    """Hidden vectors, and the gradients of both and of the subspace. pyvene's form takes coordinates of a parametrised
    d x d rotation, and has its gradient in these parameters."""

    def make():
        return [normal(n, d), normal(n, d, seed=1), rows(r, d)]

    def projector(base, source, basis):
        return base + (source - base) @ (basis.mT @ basis)

    def floor(base, source, basis):
        seen = base @ basis.mT
        return seen @ basis, seen @ basis, seen.mT @ base, seen.mT @ source, base @ basis.mT

    basis = make()[2]
    whole = torch.linalg.qr(torch.cat([basis, normal(d - r, d, seed=3)]).mT).Q.mT  # its first rows span the same
    rotation = parametrizations.orthogonal(nn.Linear(d, d, bias=False))
    rotation.weight = whole.contiguous()
    start = rotation.parametrizations.weight.original.detach().clone()
    rotation.to(device)

    def rotated(base, source, original):
        weight = functional_call(rotation, {"parametrizations.weight.original": original},
                                 torch.eye(d, device=base.device, dtype=base.dtype)).mT
        old, new = base @ weight.mT, source @ weight.mT
        return torch.cat([new[:, :r], old[:, r:]], 1) @ weight

    def build():
        leaves = [t.to(device).requires_grad_() for t in [*make()[:2], start]]
        return lambda: torch.autograd.grad(rotated(*leaves).sum(), leaves)

    def check():
        leaves = [t.to(device) for t in [*make()[:2], start]]
        return relative(rotated(*leaves).detach().cpu(), projector(*(t.double() for t in make())))

    every = contenders(make, device, grassmann.subspace_patch, projector, projector, floor)
    size = 4 * (2 * n * d + d * d)
    every.append(Contender("rotation by torch orthogonal(Linear)", build, check, peak=True, kept=size))
    return Case(f"patch n={n} d={d} r={r} float32", every, **work.patch(n, d, r))


def distances(b, t, d, k, device):
    """Of all pairs of tokens of sentences, and the gradient of the basis alone."""
    tokens, method = alike(normal(b, t, d)), Method(grassmann.OrthogonalProbe(d, k).to(device), "distances", "basis")

    def ours(basis):
        return method.of([basis], *tokens(basis))

    def first(basis):
        (x,) = tokens(basis)
        return linear(x[:, :, None] - x[:, None], basis).square().sum(-1)

    def published(basis):
        z = linear(*tokens(basis), basis).unsqueeze(2).expand(-1, -1, t, -1)
        return (z - z.transpose(1, 2)).pow(2).sum(-1)

    def inner(basis):
        z = linear(*tokens(basis), basis)
        length = z.square().sum(-1)
        return length[:, :, None] + length[:, None] - 2 * z @ z.mT

    ways = [(OURS, ours), ("differences first", first), ("differences of projections", published),
            ("torch.compile of it", compiled(published)), ("inner products", inner)]
    return Case(f"distances B={b} T={t} d={d} k={k} float32",
                [contender(name, function, first, lambda: [rows(k, d)], device) for name, function in ways],
                **work.distances(b, t, d, k))


def probe_loss(b, t, d, k, pairs, tokens, device):
    """The probe's loss, and its gradient; the published one with its penalty, which is 0 here."""
    probe = grassmann.OrthogonalProbe(d, k, pairs, tokens, generator=torch.Generator().manual_seed(0))
    start = [p.detach().clone() for p in (probe.basis, probe.pairs, probe.tokens)]
    method = Method(probe.to(device), "loss", "basis", "pairs", "tokens")
    data = alike(normal(b, t, d), 1 + normal(b, t - 1, seed=1).abs(), torch.arange(b * (t - 1)).view(b, -1) % pairs,
                 torch.arange(b * t).view(b, -1) % tokens)

    def ours(*vectors):
        return method.of(vectors, *data(vectors[0]))

    def formula(basis, of_pairs, of_tokens):
        x, tree, pair, token = data(basis)
        z = x @ basis.mT
        step = z[:, 1:] - z[:, :-1]
        loss = (step.square().sum(-1) - tree).abs().mean()
        loss = loss + nn.functional.cross_entropy((step @ of_pairs.mT).flatten(0, 1), pair.flatten())
        loss = loss + nn.functional.cross_entropy((z @ of_tokens.mT).flatten(0, 1), token.flatten())
        off = basis @ basis.mT - torch.eye(k, dtype=basis.dtype, device=basis.device)
        return loss + 5 * off.square().sum()

    return Case(f"probe loss B={b} T={t} d={d} k={k} float32",
                contenders(lambda: [v.clone() for v in start], device, ours, formula, formula),
                **work.probe(b, t, d, k, pairs, tokens))


# ----------------------------------------------------------------------------------------------- groups of coordinates


def groups(n, dims, what, device):
    """Each of unit length, one after the other where it is the formula."""

    def formula(x):
        return torch.cat([normalize(part, dim=-1) for part in x.split(dims, -1)], -1)

    every = contenders(lambda: [normal(n, sum(dims))], device, lambda x: grassmann.grouped_normalize(x, dims), formula,
                       formula)
    return Case(f"normalize {n}x{sum(dims)} {what} float32", every, **work.grouped_normalize(n, sum(dims)))


def learners(n, features, d, classes, device):
    """The margin loss of a batch; the published code looks for negatives anchor by anchor."""
    model = grassmann.DynamicSubspaceLearners(features, d, beta=BETA, margin=MARGIN).to(device)
    labels, method = alike(torch.arange(n) % classes), Method(model, "loss", "embed.weight", "embed.bias")

    def ours(x, weight, bias):
        return method.of([weight, bias], x, *labels(x))

    def by_anchors(x, weight, bias):
        z, (target,), terms = normalize(linear(x, weight, bias), dim=1), labels(x), []
        for i in range(n):
            distance = ((z - z[i]).square().sum(1) + 1e-8).sqrt()
            same = target == target[i]
            near = distance.detach().masked_fill(same | (distance < CUTOFF), torch.inf)
            same = same & (torch.arange(n, device=x.device) != i)
            count = min(int(same.sum()), int(near.isfinite().sum()))
            negative = near.topk(count, largest=False).indices
            terms += [distance[same] - BETA + MARGIN, BETA - distance[negative] + MARGIN]
        terms = torch.cat(terms).relu()
        return terms.sum() / (terms > 0).sum().clamp(min=1)

    def make():
        return [normal(n, features), normal(d, features, seed=1) / features**0.5, normal(d, seed=2) / 10]

    return Case(f"margin loss n={n} features={features} D={d} float32",
                [contender(name, function, by_anchors, make, device)
                 for name, function in ((OURS, ours), ("anchor by anchor", by_anchors))],
                **work.margin_loss(n, features, d))


def cases(device):
    """Points of twenty subspaces; activations of a small language model; sentences; embeddings in groups."""
    return [
        denoise(4096, 256, 20, 8, device),
        denoise(4096, 64, 10, 4, device),
        patch(1024, 768, 64, device),
        distances(8, 64, 768, 64, device),
        probe_loss(16, 128, 768, 128, 40, 60, device),
        groups(4096, (64,) * 8, "8 groups of 64", device),
        groups(4096, (256, 128, 64, 32, 16, 16), "6 groups of 16 to 256", device),
        learners(256, 512, 128, 32, device),
    ]
