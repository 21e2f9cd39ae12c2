"""Philox4x32-10, the counter-based generator that torch has on GPUs, and normal numbers of it, in plain torch.

No state and no order: a word is a function of the seed, the stream and its place, the same on every device, in every
version (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). To the bit what shim/contract/fastfood.h
has.
"""
from __future__ import annotations

import torch
from torch import Tensor

BITS = 0xFFFFFFFF


def philox(seed: int, place: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of the counters (place, 0, stream, 0): four words each, as int64."""
    keys, (a, b, c, d) = [seed & BITS, seed >> 32], (place, place * 0, place * 0 + stream, place * 0)
    for _ in range(10):
        (x_high, x_low), (y_high, y_low) = _product(0xD2511F53, a), _product(0xCD9E8D57, c)
        a, b, c, d = y_high ^ b ^ keys[0], y_low, x_high ^ d ^ keys[1], x_low
        keys = [(keys[0] + 0x9E3779B9) & BITS, (keys[1] + 0xBB67AE85) & BITS]
    return a, b, c, d


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Of 32 bits each, its upper and lower half: no intermediate product overflows."""
    low, high = word * (factor & 0xFFFF), word * (factor >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & BITS


def normals(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
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


def words(seed: int, stream: int, begin: int, end: int) -> Tensor:
    """Words [begin, end) of a stream, int64 from 0 to 2^32 - 1, on the CPU."""
    first = begin // 4
    found = philox(seed, torch.arange(first, -(-end // 4), device="cpu"), stream)
    return torch.stack(found, 1).flatten()[begin - 4 * first : end - 4 * first]
