"""Philox4x32-10, the counter-based generator that torch has on GPUs: word i of a seed is a function of i alone.

No state, no order: the same words on every device, for any share of them, in every version. Ten rounds of two products
of 32 x 32 bits on a counter of four words and a key of two (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011). Counter c of a stream makes words 4c to 4c + 3 of it.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def words(seed: int, stream: int, begin: int, end: int) -> Tensor:
    """Words [begin, end) of a stream, as int64 from 0 to 2^32 - 1, on the CPU."""
    first = begin // 4
    counter = torch.arange(first, -(-end // 4), device="cpu")
    a, b = counter & _WORD, counter >> 32
    c, d = torch.full_like(a, stream & _WORD), torch.full_like(a, stream >> 32)
    low, high = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        (a_high, a_low), (c_high, c_low) = _product(a, 0xD2511F53), _product(c, 0xCD9E8D57)
        a, b, c, d = c_high ^ b ^ low, c_low, a_high ^ d ^ high, a_low
        low, high = low + 0x9E3779B9 & _WORD, high + 0xBB67AE85 & _WORD
    return torch.stack((a, b, c, d), 1).flatten()[begin - 4 * first : end - 4 * first]


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of two words, which int64 does not hold."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def normals(seed: int, stream: int, begin: int, end: int) -> Tensor:
    """Numbers [begin, end) of a stream of standard normal ones, float64, by Box and Muller from two words each."""
    u = words(seed, stream, 2 * begin, 2 * end).view(-1, 2)
    radius = u[:, 0].add(1).double().mul_(2.0**-32).log_().mul_(-2).sqrt_()  # of a number in (0, 1]
    return radius.mul_(u[:, 1].double().mul_(math.tau * 2.0**-32).cos_())
