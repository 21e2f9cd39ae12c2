"""The coding rate of soft memberships, forward and backward: MLC's n x n matrix of them, and soft classes.

The official code (MCR2, and MLC after it) scales the features by every class at once, K x d x n, and lets autograd go
through a batched logdet; its logdet is taken by Cholesky here, which is faster and, unlike torch's batched LU on two
threads, returns. The eager forms beside it have the gradient written out: class by class in chunks, and the
face-splitting product, where all Gram matrices are one product with the n x d(d+1)/2 pairs of features.

Bound by the products: n K d^2 for the symmetric Gram matrices, twice that for both gradients.
"""

import reference
import torch
import work
from harness import Case, Contender, Target, relative

from torch_subspace.rates.coding_rate_soft import soft_rate

EPS, CHUNK = 0.5, 64
OURS, OFFICIAL, CHUNKS, SPLIT = "ours", "official form", "eager, chunks of classes", "eager, face-splitting product"


def with_autograd(rate):
    """Gradients of a rate by autograd."""

    def both(z, weights):
        z, weights = z.detach().requires_grad_(), weights.detach().requires_grad_()
        return torch.autograd.grad(rate(z, weights), (z, weights))

    return both


@with_autograd
def ours(z, weights):
    """The op."""
    return soft_rate(z[None], weights[None], EPS)[0]


@with_autograd
def official(z, weights):
    """MaximalCodingRateReduction.compute_compress_loss with W = z', Pi = weights', but for the logdet."""
    w, pi = z.mT, weights.mT[:, None]
    p, m = w.shape
    k = pi.shape[0]
    eye = torch.eye(p, dtype=z.dtype, device=z.device).expand((k, p, p))
    mass = pi.sum(2) + 1e-8
    scale = (p / (mass * EPS)).view(k, 1, 1)
    w = w.view(1, p, m)
    factor = torch.linalg.cholesky(eye + scale * w.mul(pi).matmul(w.transpose(1, 2)))
    logdet = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return (mass.squeeze() * logdet / (2 * m)).sum()


def factors(grams, mass):
    """Half the logdet of I + scale G, its inverse, and what dweights has for all points of a class."""
    d = grams.shape[-1]
    grams *= (d / (mass * EPS))[:, None, None]
    grams.diagonal(dim1=1, dim2=2).add_(1)
    factor = torch.linalg.cholesky(grams)
    half = factor.diagonal(dim1=1, dim2=2).log().sum(1)
    inverse = torch.cholesky_inverse(factor)
    return inverse, half - (d - inverse.diagonal(dim1=1, dim2=2).sum(1)) / 2


@torch.no_grad()
def chunks(z, weights):
    """Class by class in chunks, the gradient written out."""
    n, d = z.shape
    mass, dz, dweights = weights.sum(0), torch.zeros_like(z), torch.empty_like(weights)
    for at in range(0, weights.shape[1], CHUNK):
        w = weights[:, at:at + CHUNK].mT
        inverse, shift = factors((w[:, :, None] * z).mT @ z, mass[at:at + CHUNK])
        y = z @ inverse
        dweights[:, at:at + CHUNK] = ((y * z).sum(-1) * (d / (2 * EPS)) + shift[:, None]).mT / n
        dz += torch.einsum("kn,knd->nd", w, y)
    return dz * (d / (n * EPS)), dweights


@torch.no_grad()
def split(z, weights):
    """All Gram matrices as one product."""
    n, d = z.shape
    a, b = torch.triu_indices(d, d, device=z.device)
    pairs, mass = z[:, a] * z[:, b], weights.sum(0)
    packed = weights.mT @ pairs
    shift = torch.empty_like(mass)
    square = torch.empty(CHUNK, d, d, dtype=z.dtype, device=z.device)
    for at in range(0, weights.shape[1], CHUNK):
        part = packed[at:at + CHUNK]
        grams = square[:len(part)]
        grams[:, a, b] = part
        grams[:, b, a] = part
        inverse, shift[at:at + CHUNK] = factors(grams, mass[at:at + CHUNK])
        packed[at:at + CHUNK] = inverse[:, a, b]
    twice = torch.where(a == b, 1, 2).to(z.dtype)
    dweights = torch.addmm(shift / n, pairs.mul_(twice), packed.mT, alpha=d / (2 * n * EPS))
    m = torch.mm(weights, packed, out=pairs)
    dz = torch.empty_like(z)
    for at in range(0, n, CHUNK):
        part = m[at:at + CHUNK]
        full = square[:len(part)]
        full[:, a, b] = part
        full[:, b, a] = part
        dz[at:at + CHUNK] = (full @ z[at:at + CHUNK, :, None])[..., 0]
    return dz * (d / (n * EPS)), dweights


FORMS = {OURS: ours, OFFICIAL: official, CHUNKS: chunks, SPLIT: split}


def problem(n, d, k, device):
    """Unit features around ten directions, and soft labels or, with k = n, MLC's doubly stochastic matrix (eta 0.1)."""
    seed = torch.Generator().manual_seed(0)
    centre = torch.randn(10, d, generator=seed)[torch.randint(10, (n,), generator=seed)]
    z, head = (torch.nn.functional.normalize(much * centre + torch.randn(n, d, generator=seed), dim=-1)
               for much in (1, 2))
    if k == n:
        weights = ((head @ head.mT).abs() / 0.1).exp()
        for _ in range(40):
            scale = weights.sum(1).rsqrt()
            weights = scale[:, None] * weights * scale
    else:
        weights = torch.randn(n, k, generator=seed).mul(2).softmax(-1)
    return z.to(device), weights.to(device)


def case(name, n, d, k, device, names=tuple(FORMS), targets=(), seconds=20.0):
    """All forms at one size; checked on the first points and classes."""
    z, weights = problem(n, d, k, device)
    few, some = min(n, 2 * d), min(k, 96)

    def contender(name):
        def check():
            part = z[:few], weights[:few, :some].contiguous()
            leaves = [t.cpu().double().requires_grad_() for t in part]
            truth = torch.autograd.grad(reference.coding_rate_soft(leaves[0][None], leaves[1][None], EPS)[0], leaves)
            return relative([t.cpu() for t in FORMS[name](*part)], truth)

        return Contender(name, lambda: lambda: FORMS[name](z, weights), check, peak=True,
                         kept=4 * (z.numel() + weights.numel()))

    return Case(f"{name} n={n} d={d} K={k} float32", [contender(name) for name in names], list(targets),
                **work.coding_rate_soft(n, d, k), seconds=seconds)


def cases(device):
    """MLC at two sizes, soft classes of MCR2's size."""
    eager = CHUNKS, SPLIT
    return [
        case("MLC", 1024, 128, 1024, device, targets=[
            Target(OURS, (OFFICIAL,), ">=", 9, 12),
            Target(OURS, eager, ">=", 2.3, 5),
            Target(OURS, (OFFICIAL,), "<=", 0.1, 0.06, of="peak"),
        ], seconds=60),
        case("MLC", 599, 32, 599, device),
        case("soft classes", 2048, 512, 10, device, names=(OURS, OFFICIAL, CHUNKS)),
    ]
