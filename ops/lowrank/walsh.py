"""Hadamard's basis as a projector's: some columns of it, and products with these by transforms.

The basis is H / sqrt n for n a power of two, and else block-diagonal: of equal blocks, as long as the power of two in
n, where that is long, and of the powers of two that make n up where it is not. It is symmetric and its own inverse, so
that G Q is a transform of G's rows of which r columns are taken, and Y Qᵀ a transform of rows that are Y's numbers at
these columns and else 0.

On a CPU all is done for some rows at a time, while they are in the cache.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..common import WIDE
from .cosine import largest_columns
from .hadamard import hadamard

CHUNK = 1 << 19  # entries that stay in the cache; fewer, and the calls take longer than what they do
TRANSFORM_FROM = 64  # columns: the product below, transforms from there on
ROUNDING = 16  # eps, of all columns' length, up to which a column is nothing else
BLOCK = 64  # entries that a block has at least, if all are to be equal


def is_transformed(weight: Tensor, rank: int) -> bool:
    """Whether products with Q take less time as transforms, both ways."""
    return rank >= TRANSFORM_FROM and weight.device.type == "cpu" and weight.dtype in WIDE


def row_chunks(g: Tensor) -> list[slice]:
    """Some rows of (m, n) each, all of them; one that is empty where there are none."""
    rows = max(1, CHUNK // g.shape[-1])
    return [slice(i, i + rows) for i in range(0, max(1, g.shape[0]), rows)]


def walsh_choice(g: Tensor, rank: int) -> tuple[Tensor, Tensor, bool]:
    """The columns of largest sums of absolute values of g's transform, g (m, n), which of them are nothing but
    rounding, and whether all of g is finite."""
    norms = torch.stack([walsh_spectrum(g[rows]).abs_().sum(0) for rows in row_chunks(g)]).sum(0)
    index = largest_columns(norms, rank)
    share = norms[index] / norms.amax()
    return index, share <= ROUNDING * torch.finfo(g.dtype).eps * share.norm(), bool(norms.isfinite().all())


def walsh_along(g: Tensor, index: Tensor) -> Tensor:
    """G Q, (m, r); NaN in all of a row that is not finite, whichever blocks the columns are from."""
    lengths, parts = blocks(g.shape[-1]), []
    first = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])  # a column of each, which a NaN there is in
    for rows in row_chunks(g):
        spectrum = walsh_spectrum(g[rows])
        part = spectrum.index_select(-1, index)
        if len(lengths) > 1:
            part += (0 * spectrum.index_select(-1, first)).sum(-1, keepdim=True)
        parts.append(part)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def walsh_move_(weight: Tensor, low: Tensor, index: Tensor, decay: float) -> None:
    """W <- decay W + Y Qᵀ of Y (m, r)."""
    for rows in row_chunks(weight):
        own, part = weight[rows], low[rows]
        wide = part.new_zeros(own.shape).index_copy_(-1, index, part)
        torch.add(walsh_spectrum(wide), own, alpha=decay, out=own)


def walsh_spectrum(g: Tensor) -> Tensor:
    """The transform of the last dimension."""
    lengths = blocks(g.shape[-1])
    if lengths[0] == lengths[-1]:
        return hadamard(g.unflatten(-1, (-1, lengths[0])), normalize=True).flatten(-2)
    return torch.cat([hadamard(part, normalize=True) for part in g.split(lengths, -1)], -1)


def blocks(size: int) -> list[int]:
    """The lengths of the basis's blocks."""
    length = size & -size
    if length >= BLOCK:
        return [length] * (size // length)
    return [1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]


def walsh_columns(size: int, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Q. Entry j of column k: (-1) to the number of bits that j and k share, in the block that both are in."""
    entries, begin = torch.zeros((*index.shape[:-1], size, index.shape[-1]), dtype=dtype, device=index.device), 0
    for length in blocks(size):
        k = (index - begin)[..., None, :]
        shared = torch.arange(length, device=index.device)[:, None] & k
        for shift in (16, 8, 4, 2, 1):
            shared = shared ^ (shared >> shift)
        value = (1 - 2 * (shared & 1)).to(dtype) * length**-0.5
        entries[..., begin : begin + length, :] = torch.where((k >= 0) & (k < length), value, 0)
        begin += length
    return entries


def in_order(index: Tensor, size: int) -> tuple[Tensor, None]:
    """Where columns are in `walsh_spectrum`'s, for `cosine.columns_of`."""
    return index, None
