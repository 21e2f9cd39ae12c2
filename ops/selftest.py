"""Every op against a plain torch formula, on this machine: what `python -m torch_subspace` runs.

`ROWS` has a row per op: its inputs, the op, and the same written down in torch, which in float64 is the truth of the
self-test and in float32 the other contender of the benchmark.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    coding_rate,
    grassmann_step_,
    isotropy,
    library,
    lowrank,
    sinkhorn,
    subspace_cross_entropy,
    subspace_logits,
    tucker_compose,
    tucker_conv,
    tucker_linear,
)
from .lowrank.fastfood import plain as fastfood_formula

_op = torch.ops.torch_subspace

DTYPES = torch.float32, torch.float64
ROOM = 1e-6  # of an error in float64 to one in float32


@dataclasses.dataclass(frozen=True)
class Row:
    """One op.

    make: its tensors in float64, from the sizes `small` of the self-test or `large` of the benchmark.
    ours, plain: the op and the formula on them, a tensor each.
    trained: how many of the tensors, from the first, have a gradient.
    tolerance: of errors in float32, relative to the largest entry; `ROOM` times that in float64.
    """

    op: str
    make: Callable[..., list[Tensor]]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    trained: int
    small: tuple[int, ...]
    large: tuple[int, ...]
    tolerance: float = 1e-5


# ---------------------------------------------------------------------------------------------------------- inputs


def _draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _head(batch: int, n: int, classes: int, k: int) -> list[Tensor]:
    x, weight = _draw((batch, n), (classes, n, k))
    return [x, torch.linalg.qr(weight).Q.mT.contiguous()]


def _labelled(batch: int, n: int, classes: int, k: int) -> list[Tensor]:
    return [*_head(batch, n, classes, k), torch.arange(batch) * 7 % classes]


def _frames(classes: int, k: int, n: int) -> list[Tensor]:
    weight, grad, buffer = _draw((classes, n, k), (classes, k, n), (classes, k, n))
    return [torch.linalg.qr(weight).Q.mT.contiguous(), grad / math.sqrt(k * n), buffer / math.sqrt(k * n)]


def _composed(m: int, n: int, r: int) -> list[Tensor]:
    return _draw((m, n, 3, 3), (r, r, 3, 3), (m, r), (n, r))


def _linear(batch: int, n: int, m: int, r: int) -> list[Tensor]:
    x, weight, bias, core, u, v = _draw((batch, n), (m, n), (m,), (r, r), (m, r), (r, n))
    return [x, weight / math.sqrt(n), bias, core / r, u, v / math.sqrt(n)]


def _images(batch: int, n: int, m: int, side: int, r: int) -> list[Tensor]:
    x, weight, bias, core, u, v = _draw((batch, n, side, side), (m, n, 3, 3), (m,), (r, r, 3, 3), (m, r), (n, r))
    return [x, weight / math.sqrt(9 * n), bias, core / (3 * r), u, v / math.sqrt(n)]


def _channels(batch: int, channels: int, side: int) -> list[Tensor]:
    return _draw((batch, channels, side, side), (batch, channels, side, side))


def _points(n: int, d: int, classes: int) -> list[Tensor]:
    return [F.normalize(_draw((n, d))[0], dim=-1), torch.arange(n) * 7 % classes]


def _members(n: int, d: int, classes: int) -> list[Tensor]:
    z, w = _draw((n, d), (n, classes))
    return [F.normalize(z, dim=-1), w.softmax(-1)]


def _scores(n: int) -> list[Tensor]:
    return _draw((n, n))


def _sketch(n: int, d: int, slices: int) -> list[Tensor]:
    z, directions = _draw((n, d), (d, slices))
    return [z, F.normalize(directions, dim=0)]


# -------------------------------------------------------------------------------------------------------- formulas


def _plain_logits(x: Tensor, weight: Tensor) -> Tensor:
    return 25 * torch.linalg.vector_norm(torch.einsum("bn,ckn->bck", F.normalize(x, dim=-1), weight), dim=-1)


def _step(weight: Tensor, grad: Tensor, buffer: Tensor) -> Tensor:
    grassmann_step_(weight, grad, buffer, lr=0.3, momentum=0.9)
    return torch.stack((weight, buffer))


def _plain_step(weight: Tensor, grad: Tensor, buffer: Tensor) -> Tensor:
    """Along the geodesic: the frame turns in every singular direction of the horizontal part by its singular value."""
    buffer = 0.9 * buffer + grad
    u, s, vt = torch.linalg.svd(-0.3 * (buffer - buffer @ weight.mT @ weight), full_matrices=False)
    turned = s.cos()[..., None] * (u.mT @ weight) + s.sin()[..., None] * vt
    return torch.stack((u @ turned, buffer))


def _delta(core: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("abkl,ma,nb->mnkl", core, u, v)


def _rate(z: Tensor, weights: Tensor) -> Tensor:
    """sum_c t_c / 2n logdet(I + d / (t_c eps) Z' diag(w_c) Z), a column of weights a class, eps = 1/2."""
    (n, d), t = z.shape, weights.sum(0)
    gram = torch.einsum("ni,nc,nj->cij", z, weights * (2 * d / t), z)
    factor = torch.linalg.cholesky(torch.eye(d, dtype=z.dtype, device=z.device) + gram)
    return (t / n * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)).sum()


def _plain_labelled(z: Tensor, labels: Tensor) -> Tensor:
    return _rate(z, F.one_hot(labels).to(z.dtype))


def _plan(scores: Tensor) -> Tensor:
    return sinkhorn(scores, eta=2.0, tol=1e-6 if scores.dtype == torch.float32 else 1e-13)


def _plain_plan(scores: Tensor) -> Tensor:
    """Rows and columns normalised in turn in the log domain."""
    s = scores / 2.0
    g = torch.zeros_like(s[0])
    for _ in range(30):
        f = -torch.logsumexp(s + g, 1)
        g = -torch.logsumexp(s + f[:, None], 0)
    return torch.exp(s + f[:, None] + g)


def _plain_sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """17 knots from 0 to 3, the trapezoidal rule over both signs."""
    t = torch.linspace(0, 3, 17, dtype=z.dtype, device=z.device)
    normal = torch.exp(-t * t / 2)
    angle = (z @ directions)[..., None] * t
    error = (angle.cos().mean(0) - normal).square() + angle.sin().mean(0).square()
    return z.shape[0] * torch.trapezoid(2 * normal * error, t).mean()


def _gated(b: int, n: int, k: int) -> list[Tensor]:
    z1, z2, gate = _draw((b, k), (n, k), (b, k))
    return [z1, z2, gate.sigmoid()]


def _plain_gated_cosine(z1: Tensor, z2: Tensor, gate: Tensor) -> Tensor:
    """With all b x n x k gated points."""
    return F.cosine_similarity((gate * z1)[:, None], gate[:, None] * z2, dim=-1)


def _plain_newton_schulz(x: Tensor) -> Tensor:
    """Five of Muon's steps."""
    y = x / torch.linalg.matrix_norm(x)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.775 * gram + 2.0315 * gram @ gram) @ y
    return y


def _rows_of(v: int, n: int) -> list[Tensor]:
    return _draw((v, n))


def _plain_hadamard(x: Tensor) -> Tensor:
    """A product with the matrix of signs."""
    place = torch.arange(x.shape[1], device=x.device)
    both, odd = place & place[:, None], torch.zeros((), dtype=torch.int64, device=x.device)
    for bit in range(x.shape[1].bit_length() - 1):
        odd = odd ^ (both >> bit & 1)
    return x @ (1 - 2 * odd).to(x.dtype)


def _fastfood(theta: Tensor) -> Tensor:
    return lowrank.fastfood(theta, 4 * theta.shape[1], seed=0)


def _plain_fastfood(theta: Tensor) -> Tensor:
    """The formula with whole transforms, by what torch's integers draw."""
    return fastfood_formula(theta, 4 * theta.shape[1], 0)


def _depthwise(x: Tensor, dy: Tensor) -> Tensor:
    return _op.depthwise(x, dy, (3, 3), (1, 1), (1, 1), (1, 1), x.shape[1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """As range_finder and LowRankAdamW have it: of a transposed matrix, added to another."""
    y = a.new_ones((1, a.shape[1], b.shape[1]))
    _op.product_(y, a[None], b[None], True, False, 0.5, 2.0)
    return y[0]


def _plain_depthwise(x: Tensor, dy: Tensor) -> Tensor:
    channels = x.shape[1]
    return torch.nn.grad.conv2d_weight(x, (channels, 1, 3, 3), dy, padding=1, groups=channels)


ROWS = (
    Row("logits", _head, subspace_logits, _plain_logits, 2, (20, 64, 12, 3), (256, 512, 200, 8)),
    Row("cross_entropy", _labelled, subspace_cross_entropy,
        lambda x, w, target: F.cross_entropy(_plain_logits(x, w), target), 2, (20, 64, 12, 3), (256, 512, 500, 8),
        3e-5),
    Row("rsgd", _frames, _step, _plain_step, 0, (5, 3, 50), (100, 8, 512)),
    Row("tucker", _composed, lambda base, core, u, v: tucker_compose(core, [u, v, None, None], scale=0.5, base=base),
        lambda base, *parts: base + 0.5 * _delta(*parts), 4, (24, 16, 4), (256, 256, 8)),
    Row("tucker_linear", _linear, lambda *t: tucker_linear(*t, scale=0.5),
        lambda x, w, b, core, u, v: F.linear(x, w + 0.5 * u @ core @ v, b), 6, (24, 32, 40, 4), (256, 1024, 1024, 8)),
    Row("tucker_conv", _images,
        lambda x, w, b, core, u, v: tucker_conv(x, w, b, core, [u, v, None, None], scale=0.5, padding=1, form="chain"),
        lambda x, w, b, *parts: F.conv2d(x, w + 0.5 * _delta(*parts), b, padding=1), 6, (2, 16, 24, 9, 4),
        (8, 64, 64, 28, 8), 3e-5),
    Row("depthwise", _channels, _depthwise, _plain_depthwise, 2, (3, 6, 11), (8, 96, 28)),
    Row("coding_rate", _points, coding_rate, _plain_labelled, 1, (60, 24, 7), (1024, 128, 10)),
    Row("coding_rate_soft", _members, coding_rate, _rate, 2, (40, 12, 20), (512, 64, 64), 2e-5),
    Row("sinkhorn", _scores, _plan, _plain_plan, 1, (30,), (256,), 2e-5),
    Row("sigreg", _sketch, lambda z, directions: isotropy.sigreg(z, directions=directions), _plain_sigreg, 1,
        (60, 12, 20), (512, 128, 256), 2e-5),
    Row("gated_cosine", _gated, isotropy.gated_cosine, _plain_gated_cosine, 3, (5, 7, 20), (256, 256, 256)),
    Row("newton_schulz", lambda m, n: _draw((m, n)), lowrank.newton_schulz, _plain_newton_schulz, 1, (20, 60),
        (256, 1024), 2e-4),
    Row("hadamard", _rows_of, lowrank.hadamard, _plain_hadamard, 1, (5, 64), (256, 4096)),
    Row("fastfood", _rows_of, _fastfood, _plain_fastfood, 1, (3, 20), (1, 1 << 16)),
    Row("product", lambda m, n, k: _draw((k, m), (k, n)), _product, lambda a, b: 0.5 * (a.mT @ b) + 2, 0, (70, 9, 30),
        (1024, 128, 1024)),
)


# --------------------------------------------------------------------------------------------------------- running


def devices() -> list[str]:
    """Those of this machine for which there are kernels."""
    cuda = library.config()["CUDA"]["loaded"] and torch.cuda.is_available()
    return ["cpu", "cuda"] if cuda else ["cpu"]


def _leaves(row: Row, tensors: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    moved = [t.to(device, dtype if t.is_floating_point() else t.dtype, copy=True) for t in tensors]
    return [t.requires_grad_(i < row.trained) for i, t in enumerate(moved)]


def _results(row: Row, function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients for a fixed gradient of it."""
    y = function(*leaves)
    if not row.trained:
        return [y]
    dy = torch.arange(y.numel(), dtype=y.dtype, device=y.device).cos().view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves[: row.trained], dy)]


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """float32 means float32, whatever the switches say."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def error(row: Row, dtype: torch.dtype, device: str) -> float:
    """The largest error of value and gradients, each relative to its largest true entry; NaN where any is."""
    given = [t.to(dtype) if t.is_floating_point() else t for t in row.make(*row.small)]
    truth = _results(row, row.plain, _leaves(row, given, torch.float64, "cpu"))
    found = _results(row, row.ours, _leaves(row, given, dtype, device))
    errors = []
    for a, e in zip(found, truth, strict=True):
        if a.shape != e.shape or a.dtype != dtype:
            raise AssertionError(f"a result is {a.dtype} {tuple(a.shape)}, not {dtype} {tuple(e.shape)}")
        errors.append((a.cpu().double() - e).abs().max() / e.abs().max())
    return torch.stack(errors).max().item()


def run(device: str) -> list[str]:
    """Print a line for each op; the names of those that failed."""
    failed = []
    for row in ROWS:
        try:
            with _exact_products():
                errors = [error(row, dtype, device) for dtype in DTYPES]
            limits = row.tolerance, row.tolerance * ROOM
            good = all(e <= limit for e, limit in zip(errors, limits))
            words = "max error {:.0e} in float32, {:.0e} in float64".format(*errors)
        except Exception as problem:
            good, words = False, f"{type(problem).__name__}: {problem}"
        if not good:
            failed.append(row.op)
        print(f"{row.op:<18} {device:<5} {'ok' if good else 'FAILED':<7} {words}", flush=True)
    return failed


def _timed(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bench(device: str, seconds: float = 12.0) -> None:
    """Print what a call, forward and backward, takes beside the formula, in float32: medians of calls in turn."""
    print(f"\n{'op':<18} {device + ', float32':<38} {'ours':>9} {'formula':>9} ms {'ratio':>7}")
    for row in ROWS:
        names = inspect.signature(row.make).parameters
        sizes = " ".join(f"{name}={size}" for name, size in zip(names, row.large))
        given = row.make(*row.large)
        calls = [functools.partial(_results, row, function, _leaves(row, given, torch.float32, device))
                 for function in (row.ours, row.plain)]
        for call in calls:
            _timed(call, device)
        taken: list[list[float]] = [[], []]
        end = time.perf_counter() + seconds / len(ROWS)
        while len(taken[0]) < 3 or time.perf_counter() < end and len(taken[0]) < 200:
            for times, call in zip(taken, calls):
                times.append(_timed(call, device))
        ours, plain = (1e3 * statistics.median(times) for times in taken)
        print(f"{row.op:<18} {sizes:<38} {ours:9.3f} {plain:9.3f}    {plain / ours:7.2f}", flush=True)
