"""Fastfood: a product with a random matrix of normal numbers' kind, in n log2(n) steps, of which nothing is stored.

    P     = (first m rows of) H_L G Π H_L B (first d columns) / sqrt(m Σ G²)        L the least 2^k >= max(m, d)

H is the Walsh-Hadamard transform, B signs, Π a permutation and G normal numbers: functions of the seed and a place
alone, drawn again wherever they are needed. Le, Sarlós & Smola 2013; with this scale, Li et al. 2018 (intrinsic
dimension): a column of H G Π H B has the squared length L Σ G², of which m of L entries are a part m / L on average.

P is linear, and its transpose is as cheap: each is the other's backward. See cpu/lowrank/fastfood.c.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import check_floating, transformed, whole, wide_dtype
from .hadamard import plain as _hadamard

_op = torch.ops.torch_subspace
LONGEST = 1 << 26  # the contract's SUBSPACE_HADAMARD


def fastfood(theta: Tensor, size: int, *, seed: int) -> Tensor:
    """P theta, for a random P (size, d) that is a function of the seed: a few numbers become many, or many a few.

    The entries of P are nearly normal with variance 1 / size: lengths are kept, on average. Its columns have length 1
    where size is a power of two that is at least d; otherwise their squared length is 1 on average.

    Args:
        theta: (..., d), d from 1 to 2^26, of any floating dtype; every row is multiplied by the same P.
        size: entries of a result, 1 to 2^26; less than d is a sketch (Johnson & Lindenstrauss).
        seed: an int of at least 0. The same P on every device, for every dtype and in every version.

    Returns:
        P theta, (..., size), of theta's dtype: half types are computed in float32 and rounded once, also under
        autocast. The same bits on every device and for any number of threads.

    Differentiable any number of times by the exact adjoint, and nothing is saved for it; forward mode and torch.func go
    by the plain formula. Memory beside the result: twice L entries.

    Raises:
        TypeError: theta is no dense floating tensor, or size or seed no int.
        ValueError: a size or the seed is out of its range.

    Source: Le, Sarlós & Smola, "Fastfood", ICML 2013; the scale of arXiv 1804.08838.

    Example:
        >>> theta = torch.randn(50)
        >>> weights = ts.lowrank.fastfood(theta, 4096, seed=0)
        >>> weights.shape, torch.allclose(weights, ts.lowrank.fastfood(theta.double(), 4096, seed=0).float(), atol=1e-6)
        (torch.Size([4096]), True)
    """
    size, seed = _check("fastfood", "theta", theta, size, seed)
    if transformed():
        return plain(theta, size, seed)
    return _op.fastfood(_rows(theta), size, seed).view(*theta.shape[:-1], size)


def fastfood_adjoint(x: Tensor, size: int, *, seed: int) -> Tensor:
    """P' x, for the P (n, size) of ``fastfood(theta, n, seed=seed)``: what a gradient in n dimensions is in few.

    Args:
        x: (..., n), n from 1 to 2^26, of any floating dtype.
        size: entries of theta, 1 to 2^26.
        seed: as for `fastfood`.

    Returns:
        P' x, (..., size), of x's dtype; half types as in `fastfood`.

    Differentiable any number of times, as `fastfood` is.

    Raises:
        TypeError: x is no dense floating tensor, or size or seed no int.
        ValueError: a size or the seed is out of its range.

    Example:
        >>> theta, x = torch.randn(5), torch.randn(100)
        >>> there = ts.lowrank.fastfood(theta, 100, seed=3) @ x
        >>> torch.allclose(there, theta @ ts.lowrank.fastfood_adjoint(x, 5, seed=3), atol=1e-5)
        True
    """
    size, seed = _check("fastfood_adjoint", "x", x, size, seed)
    if transformed():
        return plain_adjoint(x, size, seed)
    return _op.fastfood_adjoint(_rows(x), size, seed).view(*x.shape[:-1], size)


def _check(name: str, what: str, x: Tensor, size: int, seed: int) -> tuple[int, int]:
    check_floating(name, what, x)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= LONGEST:
        raise ValueError(f"{name}: {what} must be (..., n) with n from 1 to 2^26, got {tuple(x.shape)}")
    size, seed = whole(name, "size", size, 1), whole(name, "seed", seed)
    if size > LONGEST:
        raise ValueError(f"{name}: size must be <= 2^26, got {size}")
    return size, seed


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# ------------------------------------------------------------------------------------------------------------ the op


@torch.library.register_fake("torch_subspace::fastfood")
def _(theta, size, seed):
    return theta.new_empty((theta.shape[0], size))


@torch.library.register_fake("torch_subspace::fastfood_adjoint")
def _(x, size, seed):
    return x.new_empty((x.shape[0], size))


def _setup(ctx, inputs, output):
    x, _, ctx.seed = inputs
    ctx.given = x.shape[1]


def _backward(ctx, dout):
    return _op.fastfood_adjoint(dout, ctx.given, ctx.seed), None, None


def _backward_of_adjoint(ctx, dtheta):
    return _op.fastfood(dtheta, ctx.given, ctx.seed), None, None


torch.library.register_autograd("torch_subspace::fastfood", _backward, setup_context=_setup)
torch.library.register_autograd("torch_subspace::fastfood_adjoint", _backward_of_adjoint, setup_context=_setup)


# ----------------------------------------------------------------------- the same in plain torch operations, as drawn


def plain(theta: Tensor, size: int, seed: int) -> Tensor:
    """The formula, for `transformed()`."""
    d = theta.shape[-1]
    length = _power(max(size, d))
    signs, order, normal = draws(d, length, seed, theta.device)
    t = torch.nn.functional.pad(theta.to(wide_dtype(theta.dtype)) * signs, (0, length - d))
    u = _hadamard(_hadamard(t, 1.0)[..., order] * normal.to(t.dtype), _scale(normal, size))
    return u[..., :size].to(theta.dtype)


def plain_adjoint(x: Tensor, size: int, seed: int) -> Tensor:
    n = x.shape[-1]
    length = _power(max(size, n))
    signs, order, normal = draws(size, length, seed, x.device)
    u = torch.nn.functional.pad(x.to(wide_dtype(x.dtype)), (0, length - n))
    t = (_hadamard(u, 1.0) * normal.to(u.dtype))[..., order.argsort()]
    return (_hadamard(t, _scale(normal, n))[..., :size] * signs).to(x.dtype)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _scale(normal: Tensor, size: int) -> float:
    multiples = (normal * 2.0**18).long()  # whole numbers: their sum is exact in any order
    return 1 / math.sqrt(size * (int(multiples.square().sum()) * 2.0**-36))


def draws(d: int, length: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """B (d,) in float32, Π as the places that entries are taken from (length,), G (length,) in float32: to the bit what
    shim/contract/fastfood.h draws."""
    place = torch.arange(128 * -(-d // 128), device=device)
    words = torch.stack(_philox(seed, torch.arange(place.shape[0] // 128, device=device), 0), -1).flatten()
    signs = 1.0 - 2.0 * (words[place // 32] >> (place % 32) & 1)[:d].float()

    a, b, c, e = _philox(seed, torch.arange(-(-length // 4), device=device), 1)
    normal = torch.stack((*_normals(a, b), *_normals(c, e)), -1).flatten()[:length]

    bits = length.bit_length() - 1
    rounds = 32 if bits < 8 else 8
    times, plus, _, _ = _philox(seed, torch.arange(rounds, device=device), 2)
    order = torch.arange(length, device=device)
    for factor, term in zip(times.tolist(), plus.tolist()):
        order = (order * (factor % length | 1) + term) % length
        order = order ^ (order >> (bits + 1) // 2)
    return signs, order, normal


_BITS = 0xFFFFFFFF


def _philox(seed: int, place: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of the counters (place, 0, stream, 0), in int64."""
    keys, (a, b, c, d) = [seed & _BITS, seed >> 32], (place, place * 0, place * 0 + stream, place * 0)
    for _ in range(10):
        (x_high, x_low), (y_high, y_low) = _product(0xD2511F53, a), _product(0xCD9E8D57, c)
        a, b, c, d = y_high ^ b ^ keys[0], y_low, x_high ^ d ^ keys[1], x_low
        keys = [(keys[0] + 0x9E3779B9) & _BITS, (keys[1] + 0xBB67AE85) & _BITS]
    return a, b, c, d


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Of 32 bits each, its upper and lower half: no intermediate product overflows."""
    low, high = word * (factor & 0xFFFF), word * (factor >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _BITS


def _normals(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers, multiples of 2^-18, of two words: the header's steps, one rounding each."""
    u = ((a >> 1) | 1).to(torch.float32) * 2.0**-31
    bits = u.clamp_max(1 - 2.0**-24).view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    x = (bits - (e << 23)).view(torch.float32) - 1
    power = e.to(torch.float32)
    log = _polynomial(x, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
                      -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
    log = log * x * (x * x) + power * -2.12194440e-4
    log = log + (x * x) * -0.5 + x + power * 0.693359375
    radius = (log * -2).double().sqrt().float() * 2.0**18  # torch's root of a float32 is not always the nearest one
    t = (((b & 0x7FFFFF) << 1) | 1).to(torch.float32) * 2.0**-24
    sine = t * _polynomial(t * t, 3.13361689037812e-7, -3.65762041821772e-5, 2.49039457019272e-3,
                           -8.07455121882808e-2, 7.85398163397448e-1)
    cosine = _polynomial(t * t, 3.59086044859151e-6, -3.25991886927390e-4, 1.58543442438155e-2, -3.08425137534042e-1,
                         1.0)
    along, across = ((radius * side).to(torch.int32) | 1 for side in (cosine, sine))
    swap, minus0, minus1 = (b >> 29 & 1).bool(), (b >> 31 & 1).bool(), (b >> 30 & 1).bool()
    first, second = torch.where(swap, across, along), torch.where(swap, along, across)
    return tuple(torch.where(minus, -n, n).to(torch.float32) * 2.0**-18
                 for minus, n in ((minus0, first), (minus1, second)))


def _polynomial(x: Tensor, *coefficients: float) -> Tensor:
    """Horner's rule in float32, from the highest power down."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
