"""Riemannian SGD on the Grassmannian: one step of all frames (C, k, n), with momentum.

The floor is torch's fused SGD on as many numbers. Peers: the step written in torch operations (as a geodesic by its
series, as Cholesky-QR), eager and compiled; the published formula of the Grassmann class representation, an SVD per
class and a QR every fifth step; geoopt's Stiefel manifolds, which is the nearest that torch users have.
"""

import functools

import reference
import torch
import work
from harness import Case, Contender, Target, compiled, relative

import torch_subspace as ts

LR, MOMENTUM = 0.1, 0.9
GRID = 1 << 23  # numbers of the frames of many k and n; cost_tables.py looks for them
CHECKED = 4  # classes that are held against the reference


def frames(classes, k, n, device):
    """Frames, gradients and momentum that turn a class by some hundredths of a radian in a step."""
    return [t.to(device, copy=True) for t in drawn(classes, k, n)]


@functools.lru_cache(maxsize=1)
def drawn(classes, k, n):
    """Those on the CPU, made once for all contenders."""
    seed = torch.Generator().manual_seed(0)
    weight = torch.linalg.qr(torch.randn(classes, n, k, generator=seed)).Q.mT.contiguous()
    grad = 0.1 * torch.randn(classes, k, n, generator=seed) / (k * n) ** 0.5
    buffer = torch.randn(classes, k, n, generator=seed) / (k * n) ** 0.5
    return weight, grad, buffer


def cosines(x):
    """cos √X and sinc √X of symmetric matrices of norm below 1: six terms of their series."""
    eye = torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
    f = g = eye
    for i in range(6, 0, -1):
        f = eye - x @ f / (2 * i * (2 * i - 1))
        g = eye - x @ g / (2 * i * (2 * i + 1))
    return f, g


def geodesic(weight, grad, buffer):
    """The exponential map in batched products, no decomposition."""
    buffer = MOMENTUM * buffer + grad
    tangent = LR * (buffer @ weight.mT @ weight - buffer)
    f, g = cosines(tangent @ tangent.mT)
    return f @ weight + g @ tangent, buffer


def cholesky_qr(weight, grad, buffer):
    """L⁻¹(W + tangent) with L Lᵀ = 1 + tangent tangentᵀ."""
    buffer = MOMENTUM * buffer + grad
    tangent = LR * (buffer @ weight.mT @ weight - buffer)
    eye = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
    factor = torch.linalg.cholesky_ex(eye + tangent @ tangent.mT).L
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return inverse @ (weight + tangent), buffer


def svd(weight, grad, buffer):
    """The published formula: the exponential map through an SVD of the tangent."""
    buffer = MOMENTUM * buffer + grad
    tangent = LR * (buffer @ weight.mT @ weight - buffer)
    u, s, vt = torch.linalg.svd(tangent, full_matrices=False)
    return u @ (s.cos()[..., None] * (u.mT @ weight) + s.sin()[..., None] * vt), buffer


def composed(name, step, shape, retraction, device, qr_every=0, **options):
    """A contender made of torch operations; `step` is a function of (weight, grad, buffer)."""

    def build():
        weight, grad, buffer = frames(*shape, device)

        @torch.no_grad()
        def steps():
            for i in range(max(1, qr_every)):
                moved, kept = step(weight, grad, buffer)
                if qr_every and i == qr_every - 1:
                    moved = torch.linalg.qr(moved.mT).Q.mT
                weight.copy_(moved)
                buffer.copy_(kept)

        return steps

    def check():
        with torch.no_grad():
            moved = step(*frames(*shape, device))
        return error(moved, shape, retraction)

    return Contender(name, build, check, steps=max(1, qr_every), **options)


def error(moved, shape, retraction):
    """Of the first classes' frames and momentum, against the reference."""
    given = [t[:CHECKED] for t in frames(*shape, "cpu")]
    truth = reference.rsgd_step(*given, lr=LR, momentum=MOMENTUM, retraction=retraction)
    return relative([t[:CHECKED].cpu() for t in moved], truth)


def optimizer(make, shape, device):
    """Parameter and optimiser, its momentum buffer filled."""
    weight, grad, buffer = frames(*shape, device)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = grad
    opt = make(parameter)
    opt.state[parameter]["momentum_buffer"] = buffer
    return opt, parameter


def floor(shape, device):
    """Plain SGD in one fused kernel."""
    return Contender(
        "floor: torch SGD(fused=True)",
        lambda: optimizer(lambda p: torch.optim.SGD([p], lr=LR, momentum=MOMENTUM, fused=True), shape, device)[0].step,
        note="no manifold",
    )


def ours(shape, retraction, device):
    """RiemannianSGD."""

    def make(p):
        group = {"params": [p], "manifold": "grassmann"}
        return ts.RiemannianSGD([group], lr=LR, momentum=MOMENTUM, retraction=retraction)

    def check():
        opt, p = optimizer(make, shape, device)
        opt.step()
        return error((p.detach(), opt.state[p]["momentum_buffer"]), shape, retraction)

    return Contender(f"ours: {retraction}", lambda: optimizer(make, shape, device)[0].step, check)


def geoopt_sgd(shape, canonical, device):
    """geoopt's RiemannianSGD; it keeps frames as columns, and has Stiefel manifolds only."""
    classes, k, n = shape
    name = f"geoopt {'canonical' if canonical else 'Euclidean'} Stiefel"
    try:
        import geoopt
    except ImportError:
        return Contender(name, lambda: None, missing="geoopt is not installed")
    if canonical and 4 * classes * n * n > 2**30:
        need = 4 * classes * n * n / 2**30
        return Contender(name, lambda: None, missing=f"its n x n matrix per class needs {need:.0f} GiB, several times")
    if canonical and n >= 256 and torch.get_num_threads() > 1 and device == "cpu":
        return Contender(name, lambda: None, missing="torch's batched LU hangs at n >= 256 with several threads")

    def build():
        weight, grad, _ = frames(*shape, device)
        manifold = geoopt.CanonicalStiefel() if canonical else geoopt.EuclideanStiefel()
        point = geoopt.ManifoldParameter(weight.mT.contiguous(), manifold=manifold)
        opt = geoopt.optim.RiemannianSGD([point], lr=LR, momentum=MOMENTUM)
        grad = grad.mT.contiguous()
        point.grad = torch.empty_like(grad)

        def step():  # it works in place in p.grad, so that has to be written anew, as a backward pass does
            point.grad.copy_(grad)
            opt.step()

        return step

    return Contender(name, build, note="another manifold: unchecked")


def case(classes, k, n, device, peers=True, retractions=("geodesic", "polar", "qr", "cayley")):
    """All contenders at one size."""
    shape = (classes, k, n)
    contenders = [floor(shape, device)]
    contenders += [ours(shape, retraction, device) for retraction in retractions]
    if peers:
        contenders += [
            composed("torch.compile: geodesic series", compiled(geodesic), shape, "geodesic", device),
            composed("torch.compile: Cholesky-QR", compiled(cholesky_qr), shape, "qr", device),
            composed("eager: geodesic series", geodesic, shape, "geodesic", device),
            composed("eager: Cholesky-QR", cholesky_qr, shape, "qr", device),
            composed("GCR formula: SVD, QR every 5th", svd, shape, "geodesic", device, qr_every=5),
            geoopt_sgd(shape, False, device),
            geoopt_sgd(shape, True, device),
        ]
    first, targets = "ours: geodesic", []
    if shape == (1000, 8, 2048):  # what was promised
        targets = [
            Target(first, (contenders[0].name,), "<=", 1.8, 1.3),
            Target(first, tuple(c.name for c in contenders if c.name.startswith("torch.compile")), ">=", 6, 6),
            Target(first, ("GCR formula: SVD, QR every 5th",), ">=", 20, 20),
        ]
    return Case(f"C={classes} k={k} n={n} float32", contenders, targets, **work.rsgd(classes, k, n),
                seconds=30 if peers else 1.5 * (1 + len(retractions)), pictured=classes * k * n != GRID)


def cases(device):
    """ImageNet's head of a ResNet-50; the small one geoopt can take; one direction a class; large subspaces; what lies
    between, at about the same number of entries; and on a CPU a grid of k and n."""
    return [
        case(1000, 8, 2048, device),
        case(100, 8, 128, device),
        case(100, 8, 512, device, peers=False),
        case(1000, 1, 2048, device, peers=False),
        case(1000, 32, 768, device, peers=False),
        *(case(classes, k, n, device, peers=False, retractions=("geodesic",))
          for classes, k, n in ((1000, 4, 2048), (1000, 16, 2048), (300, 64, 768), (30000, 8, 64), (250, 8, 8192))),
        *(case(GRID // (k * n), k, n, device, peers=False, retractions=("geodesic",))
          for k in (1, 4, 8, 16, 32, 64) for n in (64, 256, 1024, 4096) if k < n and device == "cpu"),
    ]
