"""Ragged frames (sum of dims, n) as a stack (C, largest of dims, n) with zeros after a class's own rows.

A stack can be cut between any classes, as DTensor cuts; a row of zeros adds nothing to a length, and has no gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _own_rows(dims: Sequence[int], width: int, device: torch.device) -> Tensor:
    return torch.arange(width, device=device) < torch.tensor(dims, dtype=torch.int64, device=device)[:, None]


def padded(frames: Tensor, dims: Sequence[int]) -> Tensor:
    """The stack of ragged frames."""
    stack = frames.new_zeros(len(dims), max(dims, default=0), frames.shape[-1])
    if frames.is_meta:
        return stack
    stack[_own_rows(dims, stack.shape[1], stack.device)] = frames
    return stack


def packed(stack: Tensor, dims: Sequence[int]) -> Tensor:
    """The ragged frames of a stack, which may be wider than any of them: a copy."""
    return stack[_own_rows(dims, stack.shape[1], stack.device)]


def unpack_(stack: Tensor, frames: Tensor, dims: Sequence[int]) -> None:
    """stack <- ragged frames that were changed in `packed(stack, dims)`."""
    stack[_own_rows(dims, stack.shape[1], stack.device)] = frames
