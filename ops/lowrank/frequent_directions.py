"""Frequent directions: a sketch of few rows that stands for all rows of a stream.

    Z = [decay S; B] = sum_i sigma_i w_i v_i'        S <- rows sqrt(max(sigma_i^2 - sigma_{r+1}^2, 0)) v_i',  i <= r

What a merge takes from each direction, sigma_{r+1}^2, it takes from r + 1 of them, so that it can't be more than the
energy beyond the best k directions divided by r + 1 - k, in a whole stream. Liberty, KDD 2013; Ghashami, Liberty,
Phillips and Woodruff, SIAM J. Comput. 45(5), 2016.

A merge costs the eigenproblem of the smaller Gram matrix of Z (r + m, n), in double, and two products.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..common import UP_TO_1, WIDE, check_dense, check_floating, check_number, shares_memory

NAME = "frequent_directions_"


@torch.no_grad()
def frequent_directions_(sketch: Tensor, block: Tensor, *, decay: float = 1.0) -> Tensor:
    """Take the rows of ``block`` into the sketch of a stream of rows, in place.

    Args:
        sketch: (..., r, n), float32 or float64; zeros before the first block. Its rows are orthogonal afterwards, the
            longest first: their directions are the stream's principal ones, their squared lengths the least energy that
            these have. Leading dimensions are streams of their own.
        block: (..., m, n), any number of rows of sketch's dtype. A merge costs about the same for any m up to r, so
            that single rows are best gathered into blocks of r, as a buffer of 2r rows does.
        decay: what the sketch is multiplied by first: below 1, older rows count less.

    Returns:
        sketch

    With decay 1, for all rows A so far and every k < r

        0 <= AᵀA - SᵀS <= ‖A - A_k‖²_F / (r - k)

    as symmetric matrices, A_k being the best approximation of rank k.

    Raises:
        TypeError: a tensor is none, of another dtype, or not dense.
        ValueError: shapes, devices or ``decay`` do not fit, the sketch requires a gradient or has elements that share
            memory, or block or sketch hold NaN or infinity. The sketch is then as it was.

    Source: Ghashami, Liberty, Phillips and Woodruff, SIAM J. Comput. 45(5), 2016.

    Example:
        >>> rows, sketch = torch.randn(1000, 3) @ torch.randn(3, 40), torch.zeros(8, 40)
        >>> for block in rows.split(100):
        ...     sketch = ts.lowrank.frequent_directions_(sketch, block)
        >>> torch.allclose(sketch.T @ sketch, rows.T @ rows, atol=0.1)      # three directions lose nothing
        True
    """
    _check(sketch, block, decay)
    with torch.autocast(sketch.device.type, enabled=False):
        rows = merged(sketch, block, decay)
    if not rows.isfinite().all():
        raise ValueError(f"{NAME}: sketch and block must be finite, got NaN or infinity")
    return sketch.copy_(rows)


def merged(sketch: Tensor, block: Tensor, decay: float) -> Tensor:
    """The rows of the new sketch, in double; NaN where a number is not finite."""
    r = sketch.shape[-2]
    z = torch.cat([decay * sketch, block], -2).double()
    size = z.abs().amax((-2, -1), keepdim=True) if z.numel() else z.new_ones(())
    z = z / torch.where(size > 0, size, 1)
    wide = z.shape[-2] <= z.shape[-1]
    gram = z @ z.mT if wide else z.mT @ z
    if not gram.isfinite().all():
        return torch.full_like(sketch, torch.nan, dtype=torch.float64)
    energy, vectors = torch.linalg.eigh(gram)
    energy, vectors = energy.flip(-1).clamp(min=0), vectors.flip(-1)
    least = energy[..., r : r + 1] if energy.shape[-1] > r else torch.zeros_like(energy[..., :1])
    left = (energy - least).clamp(min=0)[..., :r, None]
    found = vectors[..., :r].mT
    if wide:  # v_i = Z' w_i / sigma_i
        found = found @ z * torch.where(left > 0, energy[..., :r, None].clamp(min=1e-300), 1).rsqrt()
    rows = left.sqrt() * found * size
    return torch.nn.functional.pad(rows, (0, 0, 0, r - rows.shape[-2]))


def _check(sketch, block, decay) -> None:
    for what, t in (("sketch", sketch), ("block", block)):
        check_dense(NAME, what, t)
        check_floating(NAME, what, t)
    if sketch.dtype not in WIDE:
        raise TypeError(f"{NAME}: sketch must be float32 or float64, got {sketch.dtype}")
    if block.dtype != sketch.dtype or block.device != sketch.device:
        raise TypeError(f"{NAME}: block must be as sketch, {sketch.dtype} on {sketch.device}, got {block.dtype} on "
                        f"{block.device}")
    if sketch.dim() < 2 or 0 in sketch.shape:
        raise ValueError(f"{NAME}: sketch must be (..., r, n), got shape {tuple(sketch.shape)}")
    if block.dim() != sketch.dim() or block.shape[-1] != sketch.shape[-1] or block.shape[:-2] != sketch.shape[:-2]:
        raise ValueError(f"{NAME}: block must be {(*sketch.shape[:-2], 'm', sketch.shape[-1])} for sketch "
                         f"{tuple(sketch.shape)}, got shape {tuple(block.shape)}")
    if shares_memory(sketch):
        raise ValueError(f"{NAME}: sketch must have no elements that share memory, got strides {sketch.stride()} for "
                         f"shape {tuple(sketch.shape)}")
    if sketch.requires_grad:
        raise ValueError(f"{NAME}: sketch must not require a gradient, got one that does")
    check_number(NAME, "decay", decay, UP_TO_1)
