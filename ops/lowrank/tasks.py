"""What tasks use of a matrix's inputs: the directions of a gradient, of a task's sketch, and the memory of them.

    Q = range finder of G' (m, n) at c = max(r1, r2),    (G'Q)'(G'Q) = W diag(sigma^2) W',    V = Q W

V's leading columns are what singular vectors of G' would be, sigma V' stands for G' in the sketch: three products of
m n c, n c^2 for V, and an eigenproblem of size c in double. At 768 x 768 and c = 120 that and the sketch's merge take a
tenth of the SVDs' time. M is a matrix of orthonormal columns, which those of later tasks are orthogonal to.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common import FLOATS
from .range_finder import range_basis


def matrix_of(group: dict[str, Any], p: Tensor) -> tuple[int, ...] | None:
    """(m, n), or (matrices, m, n), as which a parameter is protected; None for what is no matrix."""
    if not group["protect"] or p.dim() < 2 or not p.numel() or p.dtype not in FLOATS:
        return None
    if p.dim() == 3 and min(p.shape[1:]) > group["rank"]:
        return tuple(p.shape)
    return p.shape[0], p[0].numel()


def directions(free: Tensor, memory: Tensor | None, group: dict[str, Any], count: int) -> tuple[Tensor, Tensor]:
    """P (..., n, r1) and what is fed to the sketch, sigma_i v_i' as rows, of a gradient without its part in M.

    Columns of P are orthonormal, and zero where the gradient has fewer directions: Adam would make large steps of their
    rounding.
    """
    m, n = free.shape[-2:]
    taken = 0 if memory is None else memory.shape[-1]
    most = min(m, n)
    width = min(max(group["rank"], group["sketch_rank"]), most)
    if width < most:
        seed = (group["seed"] * 0x9E3779B97F4A7C15 + count * 0xBF58476D1CE4E5B9) % (1 << 64)
        generator = torch.Generator().manual_seed((seed >> 32) ^ (seed & 0xFFFFFFFF))
        start = torch.randn((n, width), generator=generator).to(free)
        q = range_basis(free, start, 1)
        small = free @ q
    else:  # all of them
        q, small = None, free
    gram = (small.mT @ small if q is not None or n <= m else small @ small.mT).double()
    energy, vectors = torch.linalg.eigh(gram)
    energy, vectors = energy.flip(-1).clamp(min=0), vectors.flip(-1)
    noise = (10 * width * torch.finfo(free.dtype).eps) ** 2 * energy[..., :1]
    real = energy > noise
    if q is not None:
        v = q @ vectors.to(q.dtype)
    elif n <= m:
        v = vectors.to(free.dtype)
    else:
        v = (free.double().mT @ (vectors * torch.where(real, energy, math.inf)[..., None, :].rsqrt())).to(free.dtype)
    v = v * real[..., None, :]
    block = (v * energy[..., None, :].sqrt().to(free.dtype)).mT
    r = min(group["rank"], width, n - taken)
    p, real = v[..., :r], real[..., None, :r]
    if memory is not None and r:
        for _ in range(2):  # once leaves a trace of M where little else remains
            p = p - memory @ (memory.mT @ p)
            p = torch.linalg.qr(p)[0] * real
    return p, block


def resized(sketch: Tensor | None, block: Tensor, rows: int) -> Tensor:
    """A sketch of so many rows: the longest of those that are there, or zeros."""
    new = block.new_zeros((*block.shape[:-2], rows, block.shape[-1]))
    if sketch is not None:
        kept = min(rows, sketch.shape[-2])
        new[..., :kept, :] = sketch[..., :kept, :]
    return new


def remembered(sketch: Tensor, threshold: float, memory: Tensor | None) -> Tensor:
    """M with the sketch's leading directions, (..., n, k): the fewest that hold `threshold` of its energy."""
    energy = sketch.double().square().sum(-1)
    total = energy.sum(-1, keepdim=True)
    wanted = (energy.cumsum(-1) < threshold * total).sum(-1) + 1
    wanted = torch.where(total[..., 0] > 0, wanted, 0).clamp(max=sketch.shape[-2])
    count = int(wanted.max())
    least = (sketch.shape[-2] * torch.finfo(sketch.dtype).eps) ** 2 * energy[..., :1]  # below is rounding
    real = (torch.arange(count, device=sketch.device) < wanted[..., None]) & (energy[..., :count] > least)
    rows = sketch[..., :count, :].double() * torch.where(real, energy[..., :count], math.inf).rsqrt()[..., None]
    v = rows.mT
    m = v[..., :0] if memory is None else memory.double()
    for _ in range(2):
        v = v - m @ (m.mT @ v)
    lengths = v.norm(dim=-2, keepdim=True)
    v = torch.where(lengths > 0.5, v / lengths.clamp(min=1e-300), 0)  # what is in M already
    some = (v != 0).movedim(-1, 0).flatten(1).any(1)
    return torch.cat([m, v[..., some]], -1).to(sketch.dtype)
