"""One small case of every op, for what holds of all of them: test_cuda_contract.py, test_cuda_capture.py, sanitize.py.

SUBSPACE_TEST_DEVICE=cpu lets the same tests run without a GPU, to test the tests; what only a GPU has is left out.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable

import torch
from torch.nn.functional import normalize

import torch_subspace as ts
from torch_subspace.isotropy import gated_cosine, sigreg
from torch_subspace.lowrank import fastfood, fastfood_adjoint, hadamard, newton_schulz
from torch_subspace.rates.coding_rate_soft import soft_rate
from torch_subspace.tucker.depthwise import depthwise_weight_gradient

DEVICE = os.environ.get("SUBSPACE_TEST_DEVICE", "cuda")
ON_GPU = DEVICE.startswith("cuda")
PRESENT = torch.cuda.is_available() or not ON_GPU
HALVES = torch.float16, torch.bfloat16


@dataclasses.dataclass
class Case:
    """
    make: returns the tensors of a problem in float64 on the CPU, representable in float16 where halves are taken.
    call: the op on them, a tensor.
    trained: how many of the tensors, from the first, have a gradient.
    halves: dtypes below float32 that the first tensors (`narrow` of them) may have.
    tf32: do its float32 products follow torch's switch? Frames and Gram matrices never do.
    scale: errors of float32 in units of 1e-5 of the largest entry.
    """

    name: str
    make: Callable
    call: Callable
    trained: int
    halves: tuple = HALVES
    narrow: int = 99
    tf32: bool = False
    scale: float = 1.0
    compiles: bool = True


def draw(*shapes, seed=0):
    """Normal numbers that float16 holds exactly."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).half().double() for s in shapes]


def head(c=12, k=3, n=64, b=20):
    """Features and frames."""
    (x,), (w,) = draw((b, n)), draw((c, n, k), seed=1)
    return [x, torch.linalg.qr(w).Q.mT.contiguous().half().double()]


def labels(b, c):
    return torch.arange(b) * 7 % c


def linear(t=24, n=32, m=40, r=4):
    """x, weight, bias, core, u, v"""
    x, w, bias, core, u, v = draw((t, n), (m, n), (m,), (r, r), (m, r), (r, n))
    return [x, w / 4, bias, core / 2, u / 2, v / 4]


def conv():
    """x, weight, bias, core, and the factors of both channel modes"""
    x, w, bias, core, u, v = draw((2, 16, 9, 8), (24, 16, 3, 3), (24,), (5, 4, 3, 3), (24, 5), (16, 4))
    return [x, w / 8, bias, core / 4, u / 2, v / 2]


def scores(m=30, n=30, symmetric=False):
    (z,) = draw((m, 8))
    if symmetric:
        z = normalize(z, dim=-1)
        return [(z @ z.mT).abs().half().double()]
    return draw((m, n), seed=2)


def points(n=60, d=24):
    return [normalize(draw((n, d))[0], dim=-1).half().double()]


def soft(n=40, d=12, k=20):
    (w,) = draw((n, k), seed=3)
    return [*points(n, d), w.softmax(-1).half().double()]


def sketch(v=2, n=70, d=24, slices=40):
    """Points, and directions to look along."""
    z, directions = draw((v, n, d), (d, slices))
    return [z, normalize(directions, dim=0).half().double()]


def gates(v=2, b=20, n=30, k=24):
    """Two sets of points, and weights on the coordinates of the first."""
    z1, z2, gate = draw((v, b, k), (v, n, k), (v, b, k))
    return [z1, z2, gate.sigmoid().half().double()]


def tight(t):
    """A tolerance that sinkhorn reaches in this dtype."""
    return 1e-13 if t.dtype == torch.float64 else 1e-6


def tucker_conv(form, **options):
    def call(x, weight, bias, core, u, v):
        return ts.tucker_conv(x, weight, bias, core, [u, v, None, None], padding=1, form=form, scale=0.5, **options)

    return call


def step(retraction, **rule):
    """A step of copies of what is given, so that it can be repeated."""

    def call(weight, grad, buffer):
        made = [t.detach().clone() for t in (weight, grad, buffer)]
        ts.grassmann_step_(*made, lr=0.3, momentum=0.9, retraction=retraction, **rule)
        return torch.stack((made[0], made[2]))

    return call


def product(y, a, b):
    """Of a copy of y, so that it can be repeated."""
    y = y.detach().clone()
    torch.ops.torch_subspace.product_(y, a, b, True, False, 0.5, 2.0)
    return y


def frames(c=5, k=3, n=50):
    """Frames, gradients and momentum."""
    (weight,), (grad, buffer) = draw((c, n, k)), draw((c, k, n), (c, k, n), seed=1)
    return [torch.linalg.qr(weight).Q.mT.contiguous(), grad / (k * n) ** 0.5, buffer / (k * n) ** 0.5]


CASES = [
    Case("logits", head, ts.subspace_logits, 2, tf32=True),
    Case("logits ragged", lambda: [t.reshape(-1, 64) if t.dim() == 3 else t for t in head()],
         lambda x, w: ts.subspace_logits(x, w, dims=[1, 2, 3, 6, 4, 1, 2, 5, 3, 3, 3, 3]), 2, tf32=True),
    Case("cross_entropy", lambda: [*head(), labels(20, 12)], ts.subspace_cross_entropy, 2, tf32=True, scale=3),
    Case("cross_entropy soft", lambda: [*head(), *draw((20, 12), (12,))],
         lambda x, w, t, c: ts.subspace_cross_entropy(x, w, t.softmax(-1), class_weight=c.abs() + 0.5, gamma=4.0,
                                                      label_smoothing=0.1, reduction="none"), 2, tf32=True, scale=3),
    *(Case(f"rsgd {name}", frames, step(name), 0, halves=()) for name in ("geodesic", "polar", "qr", "cayley")),
    *(Case(f"rsgd stiefel {name}", frames, step(name, manifold="stiefel"), 0, halves=())
      for name in ("geodesic", "polar", "qr", "cayley")),
    Case("tucker", lambda: [t.flip(0) for t in draw((24, 16, 3, 3), (5, 4, 3, 2), (24, 5), (16, 4), (3, 2))],
         lambda base, core, u, v, k: ts.tucker_compose(core, [u, v, None, k], scale=0.5, base=base), 5, narrow=1,
         tf32=True),
    Case("tucker_linear", linear, lambda *t: ts.tucker_linear(*t, scale=-0.75), 6, narrow=3, tf32=True),
    Case("tucker_linear alone", linear, lambda x, w, b, *t: ts.tucker_linear(x, None, None, *t), 6, narrow=3,
         tf32=True),
    Case("tucker_conv chain", conv, tucker_conv("chain"), 6, narrow=3, tf32=True, scale=3),
    Case("tucker_conv chain, channels last", conv,
         lambda x, *t: tucker_conv("chain")(x.contiguous(memory_format=torch.channels_last), *t), 6, narrow=3,
         tf32=True, scale=3),
    Case("tucker_conv composed", conv, tucker_conv("composed"), 6, narrow=3, tf32=True, scale=3),
    Case("depthwise", lambda: draw((3, 6, 17, 15), (3, 6, 9, 7)),
         lambda x, dy: depthwise_weight_gradient(x, dy, (3, 5), (2, 2), (1, 1), (1, 1)), 2, tf32=True),
    Case("depthwise, groups of two and three", lambda: draw((3, 6, 17, 15), (3, 9, 9, 7)),
         lambda x, dy: depthwise_weight_gradient(x, dy, (3, 5), (2, 2), (1, 1), (1, 1), 3), 2, tf32=True),
    Case("coding_rate", points, ts.coding_rate, 1),
    Case("coding_rate classes", lambda: [*points(), labels(60, 7)], ts.coding_rate, 1),
    Case("coding_rate few points", lambda: points(20, 48), ts.coding_rate, 1),
    Case("coding_rate_soft", soft, lambda z, w: soft_rate(z[None], w[None], 0.5), 2, halves=(), scale=2),
    Case("coding_rate_soft, K < n/d", lambda: soft(90, 20, 3), ts.coding_rate, 2, scale=2),
    Case("coding_rate_soft, few points", lambda: soft(9, 24, 5), ts.coding_rate, 2, halves=(), scale=3),
    Case("sinkhorn", scores, lambda s: ts.sinkhorn(s, tol=tight(s), eta=0.5, max_iter=2000), 1, scale=10),
    Case("sinkhorn symmetric", lambda: scores(symmetric=True),
         lambda s: ts.sinkhorn((s + s.mT) / 2, eta=0.3, tol=tight(s), symmetric=True), 1, scale=10),
    Case("sinkhorn cpp", scores, lambda s: ts.sinkhorn(s, eta=0.5, mode="cpp"), 1, scale=10),
    Case("sigreg", sketch, lambda z, a: sigreg(z, directions=a), 1, narrow=1, tf32=True),
    Case("sigreg many knots", lambda: sketch(1, 9, 5, 3), lambda z, a: sigreg(z, directions=a, knots=40), 1, narrow=1,
         tf32=True),
    Case("gated_cosine", gates, gated_cosine, 3),
    Case("gated_cosine of one point", lambda: gates(1, 2, 1, 5), gated_cosine, 3),
    Case("newton_schulz", lambda: draw((2, 24, 70)), newton_schulz, 1, scale=30),
    Case("newton_schulz tall", lambda: draw((40, 33)), lambda x: newton_schulz(x, steps=3, coefficients="quintic"), 1),
    Case("hadamard", lambda: draw((3, 64)), hadamard, 1),
    Case("hadamard short rows", lambda: draw((50, 4)), lambda x: hadamard(x, normalize=True), 1),
    Case("fastfood", lambda: draw((2, 5)), lambda t: fastfood(t, 300, seed=3), 1),
    Case("fastfood to fewer", lambda: draw((2, 300)), lambda t: fastfood(t, 7, seed=3), 1),
    Case("fastfood adjoint", lambda: draw((2, 90)), lambda x: fastfood_adjoint(x, 20, seed=3), 1),
    Case("product", lambda: draw((3, 40, 5), (3, 70, 40), (3, 70, 5)), product, 0, halves=()),
    Case("product, one for all", lambda: draw((3, 40, 5), (3, 70, 40), (1, 70, 5)), product, 0, halves=()),
]
BY_NAME = {case.name: case for case in CASES}
# what the adapters' dropout does can't be compared with the CPU by value: the seed is another
DROPOUT = [
    Case("tucker_linear dropout", linear, lambda *t: ts.tucker_linear(*t, dropout=0.4), 6, narrow=3),
    Case("tucker_conv chain dropout", conv, tucker_conv("chain", dropout=0.4), 6, narrow=3),
    Case("tucker_conv composed dropout", conv, tucker_conv("composed", dropout=0.4), 6, narrow=3),
]
# sizes beyond a block, a warp's columns or a multiprocessor's shared memory: for the sanitizer
LARGER = [
    Case("rsgd k=17", lambda: frames(3, 17, 300), step("geodesic"), 0),
    Case("rsgd n=8192", lambda: frames(2, 8, 8192), step("geodesic"), 0),
    Case("rsgd k=40", lambda: frames(1, 40, 700), step("qr"), 0),
    Case("rsgd stiefel k=17", lambda: frames(3, 17, 300), step("geodesic", manifold="stiefel", nesterov=True), 0),
    Case("rsgd stiefel n=8192", lambda: frames(2, 8, 8192), step("cayley", manifold="stiefel"), 0),
    Case("logits, panels", lambda: head(300, 8, 96, 300), ts.subspace_logits, 2),
    Case("cross_entropy, panels", lambda: [*head(700, 2, 40, 70), labels(70, 700)], ts.subspace_cross_entropy, 2),
    Case("coding_rate d=130", lambda: points(200, 130), ts.coding_rate, 1),
    Case("coding_rate d=300", lambda: points(310, 300), ts.coding_rate, 1),
    Case("coding_rate classes d=70", lambda: [*points(300, 70), labels(300, 3)], ts.coding_rate, 1),
    Case("coding_rate_soft d=40", lambda: soft(130, 40, 70), lambda z, w: soft_rate(z[None], w[None], 0.5), 2),
    Case("sinkhorn 300", lambda: scores(300, 300), lambda s: ts.sinkhorn(s, eta=0.5, max_iter=6), 1),
    Case("sinkhorn symmetric 300", lambda: scores(300, symmetric=True),
         lambda s: ts.sinkhorn(s, max_iter=6, symmetric=True), 1),
    Case("sigreg, slices of points", lambda: sketch(2, 700, 40, 70), lambda z, a: sigreg(z, directions=a), 1),
    Case("gated_cosine, long rows", lambda: gates(1, 9, 70, 700), gated_cosine, 3),
    Case("newton_schulz, blocks of rows", lambda: draw((1040, 1050)), lambda x: newton_schulz(x, steps=1), 1),
    Case("hadamard, three passes", lambda: draw((1, 1 << 14)), hadamard, 1),
    Case("fastfood, blocks", lambda: draw((3, 700)), lambda t: fastfood(t, 5000, seed=3), 1),
    Case("tucker_linear, rows", lambda: linear(200, 300, 130, 16), ts.tucker_linear, 6),
]


def cast(case, tensors, dtype, device):
    """The tensors of a problem as leaves: the first `narrow` in dtype, all others at least float32."""
    leaves = []
    for i, t in enumerate(tensors):
        if t.is_floating_point():
            t = t.to(dtype if i < case.narrow else torch.promote_types(dtype, torch.float32))
        leaves.append(t.to(device, copy=True).requires_grad_(i < case.trained))
    return leaves


def both(case, leaves):
    """The result and all gradients, for a fixed gradient of the result."""
    y = case.call(*leaves)
    if not case.trained:
        return [y]
    dy = torch.linspace(-1, 1, max(y.numel(), 2), dtype=torch.float64)[: y.numel()].to(y).view(y.shape)
    trained = leaves[: case.trained]
    return [y.detach(), *(g for g in torch.autograd.grad(y, trained, dy, allow_unused=True) if g is not None)]


def gradient_of(case, leaves):
    """Such a gradient, made beforehand: for code that must not copy anything to the device."""
    with torch.no_grad():
        y = case.call(*leaves)
    return torch.linspace(-1, 1, max(y.numel(), 2), dtype=torch.float64)[: y.numel()].to(y).view(y.shape)


def run(case, dtype=torch.float32, device=DEVICE):
    return both(case, cast(case, case.make(), dtype, device))


def synchronise():
    if ON_GPU:
        torch.cuda.synchronize()


@contextlib.contextmanager
def without_waiting():
    """Any call that waits for the device raises."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def exact_products(allowed=False):
    """torch's own TF32 switches, of products and of cuDNN's convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
