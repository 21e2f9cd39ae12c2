"""The matrices P (D, d) of random subspaces: columns of length 1, made of a seed alone.

A kind is a class with `apply(theta)`, P theta (D,), linear and differentiable, and `made()`, what of P is kept.
Dense and sparse ones are made on the CPU, so that a seed means the same numbers on every device.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .fastfood import fastfood
from .philox import normals, words

LONGEST = 1 << 26  # of a Hadamard transform
CHUNK = 1 << 22  # numbers made at once


class Fastfood:
    """P = H G Pi H B, cut to D rows: nothing is kept, all is made anew at every product, in D log D.

    D above 2^26 is cut into parts with a seed each, whose columns have their share of the length.
    """

    def __init__(self, size: int, dim: int, seed: int, longest: int = LONGEST) -> None:
        count = max(1, -(-size // longest))
        self.seeds = [seed, *(_other(seed, i) for i in range(1, count))]
        self.sizes = [size * (i + 1) // count - size * i // count for i in range(count)]

    def made(self) -> dict[str, Tensor]:
        return {}

    def apply(self, theta: Tensor, kept: dict[str, Tensor]) -> Tensor:
        if len(self.sizes) == 1:
            return fastfood(theta, self.sizes[0], seed=self.seeds[0])
        total = sum(self.sizes)
        return torch.cat([fastfood(theta, size, seed=seed) * math.sqrt(size / total)
                          for size, seed in zip(self.sizes, self.seeds)])


def _other(seed: int, i: int) -> int:
    """Part i's seed: 63 bits of the counter i."""
    low, high = words(seed, 3, 4 * i, 4 * i + 2).tolist()
    return low | (high & 0x7FFFFFFF) << 32


class Dense:
    """Columns uniform on the sphere: standard normal numbers, scaled; D d numbers are kept."""

    def __init__(self, size: int, dim: int, seed: int) -> None:
        self.size, self.dim, self.seed = size, dim, seed

    def made(self) -> dict[str, Tensor]:
        p = torch.empty(self.size * self.dim, dtype=torch.float32, device="cpu")
        for part, begin in zip(p.split(CHUNK), range(0, len(p), CHUNK)):
            word = words(self.seed, 0, begin, begin + len(part) + len(part) % 2).view(-1, 2)
            part.copy_(torch.stack(normals(word[:, 0], word[:, 1]), 1).flatten()[: len(part)])
        p = p.view(self.size, self.dim)
        return {"columns": p.div_(torch.linalg.vector_norm(p, dim=0, dtype=torch.float64).to(p.dtype))}

    def apply(self, theta: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return kept["columns"].to(theta.dtype) @ theta


class Sparse:
    """About sqrt(D) entries +-1/sqrt(count) a column: one at a random row of each of `count` strata of rows, which is
    the density 1/sqrt(D) of very sparse projections (Li, Hastie and Church, 2006); d sqrt(D) rows and signs are kept.
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        self.size, self.dim, self.seed = size, dim, seed
        self.count = round(math.sqrt(size))

    def made(self) -> dict[str, Tensor]:
        edges = torch.arange(self.count + 1, device="cpu") * self.size // self.count
        begin, extent = edges[:-1, None], edges.diff()[:, None]
        word = words(self.seed, 0, 0, 2 * self.count * self.dim).view(2, self.count, self.dim)
        sign = (word[1] >> 31) * 2 - 1
        return {"rows": begin + (word[0] * extent >> 32), "signs": sign.to(torch.int8)}

    def apply(self, theta: Tensor, kept: dict[str, Tensor]) -> Tensor:
        entries = kept["signs"] * (theta / math.sqrt(self.count))
        return theta.new_zeros(self.size).index_add(0, kept["rows"].flatten(), entries.flatten())


KINDS = {"fastfood": Fastfood, "dense": Dense, "sparse": Sparse}
