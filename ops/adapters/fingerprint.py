"""A few values of an adapted weight, by which its adapter's file knows it again."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fingerprint import values
from .adapted import Adapted, is_packed
from .targets import is_uninitialised


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
    return weight if weight is None else {"dtype": str(weight.dtype).removeprefix("torch."), "values": values(weight)}
