"""What tasks use of a matrix's inputs: the directions of a gradient, of a task's sketch, and the memory of them.

    Q = range finder of G' (m, n) at c = max(r1, r2),    (G'Q)'(G'Q) = W diag(sigma^2) W',    V = Q W

V's leading columns are what singular vectors of G' would be, sigma V' stands for G' in the sketch: three products of
m n c, n c^2 for V, and an eigenproblem of size c in double. M is a matrix of orthonormal columns, which those of later
tasks are orthogonal to.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import FLOATS
from .product import product
from .range_finder import scaled
from .shards import gathered, total


def matrix_of(group: dict[str, Any], p: Tensor) -> tuple[int, ...] | None:
    """(m, n), or (matrices, m, n), as which a parameter is protected; None for what is no matrix."""
    if not group["protect"] or p.dim() < 2 or not p.numel() or p.dtype not in FLOATS:
        return None
    if p.dim() == 3 and min(p.shape[1:]) > group["rank"]:
        return tuple(p.shape)
    return p.shape[0], math.prod(p.shape[1:])


def off(x: Tensor, memory: Tensor | None) -> Tensor:
    """The columns of x (..., n, c) without their part in the memory."""
    return x if memory is None else x - product(memory, product(memory.mT, x))


def directions(grad: Tensor, memory: Tensor | None, group: dict[str, Any], count: int,
               weight: Tensor | None = None, processes: dist.ProcessGroup | None = None,
               ) -> tuple[Tensor, Tensor, Tensor]:
    """P (..., n, r1) of a gradient without its part in M, G P, and what is fed to the sketch, sigma_i v_i' as rows.
    `processes` have rows of the weight's matrix each.

    Columns of P are orthonormal, and zero where the gradient has fewer directions: Adam would make large steps of their
    rounding.
    """
    m, n = grad.shape[-2] if processes is None else weight.shape[0], grad.shape[-1]
    width = min(max(group["rank"], group["sketch_rank"]), m, n)
    if width < min(m, n):
        q = _range(grad, memory, _start(grad, width, group["seed"], count), processes)
        small = product(grad, q)
    else:  # all of them
        q = None
        small = grad if memory is None else off(grad.mT, memory).mT
    wide = small.double()  # or rounding would be as large as the square of what is small
    if q is not None or n <= m:
        gram = total(wide.mT @ wide, processes)
    else:  # few rows
        wide = gathered(wide, weight, processes)
        gram = wide @ wide.mT
    energy, vectors = torch.linalg.eigh(gram)
    energy, vectors = energy.flip(-1).clamp(min=0), vectors.flip(-1)
    real = energy > (10 * width * torch.finfo(grad.dtype).eps) ** 2 * energy[..., :1]
    if q is not None:
        v = q @ vectors.to(q.dtype)
    elif n <= m:
        v = vectors.to(grad.dtype)
    else:
        v = (wide.mT @ (vectors * torch.where(real, energy, math.inf)[..., None, :].rsqrt())).to(grad.dtype)
    v = v * real[..., None, :]
    block = (v * energy[..., None, :].sqrt().to(grad.dtype)).mT
    r = min(group["rank"], width, n - (0 if memory is None else memory.shape[-1]))
    p, real = v[..., :r], real[..., None, :r]
    if memory is None and q is not None:
        return p, small @ (vectors[..., :r] * real).to(grad.dtype), block
    if memory is not None and r:
        p = torch.linalg.qr(off(p, memory))[0] * real  # columns of small energy have a trace of M
    return p, product(grad, p), block


def _start(grad: Tensor, width: int, seed: int, count: int) -> Tensor:
    """Normal numbers (n, width), a function of the seed and the step alone."""
    mixed = (seed * 0x9E3779B97F4A7C15 + count * 0xBF58476D1CE4E5B9) % (1 << 64)  # the generator takes 32 bits
    generator = torch.Generator().manual_seed((mixed >> 32) ^ (mixed & 0xFFFFFFFF))
    return torch.randn((grad.shape[-1], width), generator=generator, device="cpu").to(grad)


def _range(grad: Tensor, memory: Tensor | None, start: Tensor, processes: dist.ProcessGroup | None) -> Tensor:
    """`range_finder`'s basis of G (1 - M M'), which is not made: what is projected are a few columns."""
    start = off(start, memory)
    y = off(total(product(grad.mT, scaled(product(grad, start), processes)), processes), memory)
    return off(torch.linalg.qr(scaled(y) + torch.finfo(y.dtype).eps * scaled(start))[0], memory)


def resized(sketch: Tensor | None, block: Tensor, rows: int) -> Tensor:
    """A sketch of so many rows: the longest of those that are there, or zeros."""
    new = block.new_zeros((*block.shape[:-2], rows, block.shape[-1]))
    if sketch is not None:
        kept = min(rows, sketch.shape[-2])
        new[..., :kept, :] = sketch[..., :kept, :]
    return new


def remembered(sketch: Tensor, memory: Tensor | None, threshold: float) -> Tensor:
    """M with the sketch's leading directions, (..., n, k): the fewest that hold `threshold` of its energy."""
    energy = sketch.double().square().sum(-1)
    total = energy.sum(-1, keepdim=True)
    wanted = (energy.cumsum(-1) < threshold * total).sum(-1) + 1
    wanted = torch.where(total[..., 0] > 0, wanted, 0).clamp(max=sketch.shape[-2])
    count = int(wanted.max()) if wanted.numel() else 0
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
