"""Random numbers that are a function of a seed and the place alone: on every device, and in what is compiled."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def seeded_normal(shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """Normal numbers in float32, a function of the seed and the place alone: 24 bits of a place's hash are a uniform
    number, and two of those two normal ones (Box & Muller)."""
    half = (shape[0] * shape[1] + 1) // 2
    key = torch.full((), seed, dtype=torch.int64, device=device)
    first_key = _mixed((key & _BITS) ^ _mixed(key >> 32))
    place = torch.arange(2 * half, device=device)
    uniform = (_mixed(_mixed(place ^ first_key) ^ _mixed(first_key ^ 0x9E3779B9)) >> 8).float()
    radius = (-2 * ((uniform[:half] + 0.5) * 2.0**-24).log()).sqrt()
    angle = uniform[half:] * (math.tau * 2.0**-24)
    return torch.cat((radius * angle.cos(), radius * angle.sin()))[: shape[0] * shape[1]].view(shape)


_BITS = 0xFFFFFFFF


def _mixed(h: Tensor) -> Tensor:
    """MurmurHash3's last steps (Appleby) on 32 bits. In int64, where no product overflows: what C++ makes of one that
    does is its own affair, and what is compiled is C++."""
    h = ((h ^ (h >> 16)) * -0x7A143595) & _BITS
    h = ((h ^ (h >> 13)) * -0x3D4D51CB) & _BITS
    return h ^ (h >> 16)
