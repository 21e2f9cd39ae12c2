"""A few values of a tensor, by which what is added to it knows it again."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COUNT = 8


@torch.no_grad()
def values(parts: Tensor | list[Tensor]) -> list[float]:
    """Values from all over a tensor, or all over several of them one after another."""
    parts = [parts] if isinstance(parts, Tensor) else parts
    size, found, begin = sum(p.numel() for p in parts), [], 0
    at = [(2 * i + 1) * size // (2 * COUNT) for i in range(COUNT)]
    for part in parts:
        own = torch.tensor([i - begin for i in at if begin <= i < begin + part.numel()], dtype=torch.int64,
                           device=part.device)
        if len(own):
            found += part[torch.unravel_index(own, part.shape)].to(torch.float64).tolist()
        begin += part.numel()
    return [float(f"{v:.9g}") for v in found]


def differs(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> bool:
    """Are they of other tensors? What the coarser of both precisions rounds away is no difference."""
    if a is None or b is None:
        return False
    pairs = [(x, y) for x, y in zip(a["values"], b["values"]) if math.isfinite(x) and math.isfinite(y)]
    eps = max(torch.finfo(getattr(torch, f["dtype"])).eps for f in (a, b))
    off, size = math.hypot(*(x - y for x, y in pairs)), math.hypot(*(x for x, _ in pairs), *(y for _, y in pairs))
    return off > max(eps, 1e-6) * size
