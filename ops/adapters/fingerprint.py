"""A few values of an adapted weight, by which its adapter's file knows it again."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .adapted import Adapted, is_packed
from .targets import is_uninitialised

COUNT = 8


def weight_at_hand(layer, parameter: str) -> Tensor | None:
    """The weight without adapters; None where it has no values to be read: packed, sharded, meta."""
    if hasattr(layer, "tucker_parts"):  # peft's
        weight = layer.before(parameter)
    else:
        merged = layer.tucker_merged if isinstance(layer, Adapted) else None
        weight = (merged or {}).get(parameter, layer._parameters[parameter])
    if weight is None or is_uninitialised(weight) or is_packed(weight) or weight.is_meta or weight.numel() == 0:
        return None
    return weight


@torch.no_grad()
def fingerprint(layer, parameter: str) -> dict[str, Any] | None:
    """The weight's dtype and values from all over it; None where it has none to be read."""
    weight = weight_at_hand(layer, parameter)
    if weight is None:
        return None
    at = torch.tensor([(2 * i + 1) * weight.numel() // (2 * COUNT) for i in range(COUNT)], device=weight.device)
    values = weight[torch.unravel_index(at, weight.shape)]
    values = [float(f"{v:.9g}") for v in values.to(torch.float64).tolist()]
    return {"dtype": str(weight.dtype).removeprefix("torch."), "values": values}


def differs(a: Mapping | None, b: Mapping | None) -> bool:
    """Are they of other weights? What the coarser of both precisions rounds away is no difference."""
    if a is None or b is None:
        return False
    pairs = [(x, y) for x, y in zip(a["values"], b["values"]) if math.isfinite(x) and math.isfinite(y)]
    eps = max(torch.finfo(getattr(torch, f["dtype"])).eps for f in (a, b))
    off, size = math.hypot(*(x - y for x, y in pairs)), math.hypot(*(x for x, _ in pairs), *(y for _, y in pairs))
    return off > max(eps, 1e-6) * size
