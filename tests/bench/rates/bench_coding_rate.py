"""Coding rate of all points and of labelled classes, forward and gradient.

Peers: the dense form of MCR2's own code (a diagonal n x n matrix a class; small sizes only), a loop over the classes
with a mask for each, as others have it, both d x d, and the best that one would write: rows sorted and padded to the
largest class, a batched Cholesky on the smaller side, eager and compiled.
"""

import reference
import torch
import work
from harness import Case, Contender, Target, compiled, relative

import torch_subspace as ts

EPS = 0.5


def inputs(n, d, classes, device):
    """Unit rows, and labels of classes as even as can be in any order."""
    seed = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(n, d, generator=seed), dim=-1)
    labels = (torch.arange(n) % max(classes, 1))[torch.randperm(n, generator=seed)]
    return z.to(device), labels.to(device)


def half_logdet(gram, scale):
    """1/2 log det(I + scale gram)."""
    eye = torch.eye(gram.shape[-1], device=gram.device)
    return torch.linalg.cholesky(eye + scale * gram).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def whole(z, labels, classes, most):
    """R on the smaller side."""
    n, d = z.shape
    return half_logdet(z @ z.mT if n <= d else z.mT @ z, d / (n * EPS))


def dense(z, labels, classes, most):
    """Rc with a diagonal matrix for every class."""
    n, d = z.shape
    members = torch.stack([torch.diag((labels == c).float()) for c in range(classes)])
    eye, rate = torch.eye(d, device=z.device), 0.0
    for member in members:
        size = member.trace() + 1e-8
        rate = rate + size / n * torch.logdet(eye + d / (size * EPS) * z.mT @ member @ z)
    return rate / 2


def loop(z, labels, classes, most):
    """Rc class by class."""
    n, d = z.shape
    rate = 0.0
    for c in range(classes):
        part = z[labels == c]
        rate = rate + part.shape[0] / n * half_logdet(part.mT @ part, d / (part.shape[0] * EPS))
    return rate


def padded(z, labels, classes, most):
    """Rc of all classes at once."""
    n, d = z.shape
    ascending, order = torch.sort(labels, stable=True)
    size = torch.zeros(classes, dtype=torch.int64, device=z.device).scatter_add(0, labels, torch.ones_like(labels))
    place = ascending * most + torch.arange(n, device=z.device) - (size.cumsum(0) - size)[ascending]
    parts = z.new_zeros(classes * most, d).index_copy(0, place, z[order]).view(classes, most, d)
    gram = parts @ parts.mT if most <= d else parts.mT @ parts
    return (size / n * half_logdet(gram, (d / (size * EPS))[:, None, None])).sum()


def ours(z, labels, classes, most):
    """The op."""
    return ts.coding_rate(z, labels if classes else None, eps=EPS)


def contender(name, function, shape, device, note=""):
    """Rate and gradient by `function`; one with a note is not held against the tolerance."""
    n, _, classes = shape
    most = -(-n // max(classes, 1))

    def step(z, labels):
        z = z.detach().requires_grad_()
        rate = function(z, labels, classes, most)
        return rate.detach(), *torch.autograd.grad(rate, z)

    def build():
        given = inputs(*shape, device)
        return lambda: step(*given)

    def check():
        z, labels = inputs(*shape, "cpu")
        found = step(*inputs(*shape, device))
        z = z.double().requires_grad_()
        rate = reference.coding_rate(z, labels if classes else None, eps=EPS)
        return relative([t.cpu() for t in found], [rate.detach(), *torch.autograd.grad(rate, z)])

    return Contender(name, build, None if note else check, note=note)


def case(n, d, classes, device, small=False, seconds=12):
    """All contenders at one size."""
    shape = (n, d, classes)
    best = padded if classes else whole
    names = {"best eager": "eager, sorted and padded", "compiled": "torch.compile of it", "loop": "loop over classes"}
    if not classes:
        names["best eager"] = "eager, smaller side"
    contenders = [contender("ours", ours, shape, device), contender(names["best eager"], best, shape, device),
                  contender(names["compiled"], compiled(best), shape, device)]
    targets = [Target("ours", (names["best eager"], names["compiled"]), ">=", 2, 4)]
    if classes:
        contenders.append(contender(names["loop"], loop, shape, device, "d x d in float32: 4e-5 off"))
        if classes == 100:
            targets.append(Target("ours", (names["loop"],), ">=", 20, 20))
    if small:
        contenders.append(contender("dense membership", dense, shape, device, "d x d in float32"))
    what = f"{classes} classes" if classes else "R"
    return Case(f"n={n} d={d} {what} float32", contenders, targets, **work.coding_rate(n, d, classes),
                seconds=seconds)


def cases(device):
    """Many small classes, some larger ones, all points; and a size for the dense form."""
    return [
        case(2048, 512, 100, device, seconds=20),
        case(2000, 128, 10, device),
        case(1024, 128, 0, device),
        case(2048, 512, 0, device),
        case(400, 128, 10, device, small=True),
    ]
