"""What projections have left out so far, kept for the next gradient: in full, or in 8 bits.

    E <- G + E - (G + E) Q Qᵀ     error feedback
    8 bits: q = round(E / s), s = max |E| / 127 of each block of some 256 entries of a row

One product, and some rows at a time otherwise, while they are in the cache.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .product import add_product_

FEEDBACKS = ("int8", "dense")
BLOCK = 256
CHUNK = 1 << 18  # entries


def fed(grad: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The gradient (..., m, n), a new tensor, with what has been left out."""
    error, scale = state["error"], state.get("error_scale")
    if scale is None:
        return grad + error
    whole = torch.empty_like(grad, memory_format=torch.contiguous_format)
    count = scale.shape[-1]
    for place in chunks(grad):
        cut = error[place].to(grad.dtype).unflatten(-1, (count, -1)).mul_(scale[place][..., None])
        torch.add(cut.flatten(-2), grad[place], out=whole[place])
    return whole


def left_out(grad: Tensor, a: Tensor, b: Tensor, kind: str) -> dict[str, Tensor]:
    """The state of grad - a b, (..., m, n) of (..., m, r) and (..., r, n)."""
    if kind == "dense":
        return {"error": _less(grad, a, b)}
    count = blocks(grad.shape[-1])
    error = torch.empty(grad.shape, dtype=torch.int8, device=grad.device)
    scale = grad.new_empty((*grad.shape[:-1], count))
    for place in chunks(grad):
        cut = _less(grad[place], a[place], b[place[:-1]]).unflatten(-1, (count, -1))
        largest = cut.abs().amax(-1, keepdim=True)
        scale[place] = largest[..., 0] / 127
        cut.mul_(127 / torch.where(largest == 0, 1, largest))
        error[place] = cut.round_().flatten(-2)
    return {"error": error, "error_scale": scale}


def blocks(size: int) -> int:
    """How many of equal length a row of that size has: as few of at most BLOCK as divide it, but of 32 at least."""
    fitting = (count for count in range(-(-size // BLOCK), size // 32 + 1) if size % count == 0)
    return next(fitting, 1)


def chunks(t: Tensor) -> list[tuple[int | slice, ...]]:
    """Places of some rows each that are all of t, (m, n) or (matrices, m, n)."""
    if t.device.type != "cpu":
        return [(slice(None),) * (t.dim() - 1)]
    rows = max(1, CHUNK // t.shape[-1])
    own = [(slice(i, i + rows),) for i in range(0, t.shape[-2], rows)]
    if t.dim() == 2:
        return own
    if t.shape[-2] <= rows:
        several = max(1, rows // max(1, t.shape[-2]))
        return [(slice(i, i + several), slice(None)) for i in range(0, t.shape[0], several)]
    return [(slice(i, i + 1), *place) for i in range(t.shape[0]) for place in own]


def _less(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    less = t.clone(memory_format=torch.contiguous_format)
    add_product_(less, a, b, 1.0, -1.0)
    return less
