"""A parameter as one matrix or several, and `Trion`'s step of it; its formula stands there.

The state is `momentum_buffer`, of the parameter's shape, and `step`, as AdamW's has one.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import FLOATS, wide_dtype
from .cosine import basis_columns, columns_of
from .newton_schulz import newton_schulz
from .product import add_product_
from .shards import all_finite, gathered, local, placed, sharing

SCALES = ("original", "match_rms_adamw", "spectral_unclamped")  # torch.optim.Muon's words


def is_matrix(shape: Sequence[int]) -> bool:
    """Two sides above 1, the first and all others together or, of a stack, the last two."""
    return len(shape) > 1 and min(shape[0], math.prod(shape[1:])) > 1


def matrices(p: Tensor, group: dict[str, Any]) -> tuple[int, ...] | None:
    """(A, B), or (count, A, B), as which a parameter is stepped; None where that is AdamW's."""
    shape = p.shape
    if group["algorithm"] == "adamw" or not is_matrix(shape) or p.dtype not in FLOATS:
        return None
    stacked = group["stacked"]
    if len(shape) == 3 and (min(shape[1:]) > group["rank"] if stacked is None else stacked):
        return tuple(shape) if min(shape[1:]) > 1 else None
    return shape[0], math.prod(shape[1:])


def check_gradient(name: str, p: Tensor, group: dict[str, Any]) -> None:
    if p.grad.layout is not torch.strided:
        raise RuntimeError(f"{name}: gradients must be dense, got one of {p.grad.layout} for a parameter of shape "
                           f"{tuple(p.shape)}: a group with algorithm=\"adamw\", or torch.optim.SparseAdam")
    shape = matrices(p, group)
    assert shape is not None
    sharing(name, p, len(shape))


def scale_of(kind: str | None, a: int, b: int, rank: int) -> float:
    """Of the update of an A x B matrix with `rank` singular values of 1."""
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(a * b / min(rank, a, b))
    return math.sqrt(a / b) if kind == "spectral_unclamped" else math.sqrt(max(1, a / b))


def step(p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> int | Tensor:
    """The step; how many matrices were left alone."""
    shape, dtype, own = matrices(p, group), wide_dtype(p.dtype), local(p)
    assert shape is not None
    processes, rows = sharing("Trion", p, len(shape))
    here = own.shape[0], *shape[1:]
    grad = local(p.grad).to(dtype).reshape(here)
    finite = all_finite(grad.sum((-2, -1)).isfinite(), processes)
    on_host = finite.device.type == "cpu"
    if on_host and not finite.any():
        return finite.numel()
    moving = None if on_host and finite.all() else finite[..., None, None]
    if moving is not None:
        grad = torch.where(moving, grad, 0)
    held = state.get("momentum_buffer")
    held = torch.zeros(own.shape, dtype=dtype, device=own.device) if held is None else \
        local(held).to(own.device).contiguous()
    state["momentum_buffer"] = placed(held, p) if own is not p else held
    state["step"] = state.get("step", torch.tensor(0.0)) + 1  # as AdamW's have one
    for key in state.keys() - {"momentum_buffer", "step"}:  # which this may have been
        del state[key]
    momentum = held.view(here).add_(grad, alpha=-1 if group["maximize"] else 1)

    a, b = shape[-2:]
    turned, kept, rank = a < b, float(group["momentum"]), group["rank"]  # turned: the side that is projected comes last
    steps = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"]}
    if rank < min(a, b):
        side = gathered(momentum, p, processes).mT if turned else momentum
        columns, index = columns_of(side, rank, None if turned else processes)
        basis = basis_columns(min(a, b), index, dtype)
        if turned:
            part, update = ((basis[rows or ...], t.mT) for t in (columns, newton_schulz(columns, **steps)))
        else:
            orthogonal = newton_schulz(gathered(columns, p, processes), **steps)[rows or ...]
            part, update = ((t, basis.mT) for t in (columns, orthogonal))
        _add(momentum, part, 1, kept - 1, moving)
    else:
        update = (newton_schulz(gathered(momentum, p, processes), **steps)[rows or ...],)
        momentum.mul_(kept if moving is None else torch.where(moving, kept, 1.0).to(dtype))

    rate = float(group["lr"])
    decay, scale = 1 - rate * float(group["weight_decay"]), -rate * scale_of(group["adjust_lr_fn"], a, b, rank)
    if own.dtype == dtype and own.is_contiguous():
        _add(own.view(here), update, decay, scale, moving)
    else:  # computed as the momentum is, and rounded once
        wide = own.to(dtype).reshape(here)
        _add(wide, update, decay, scale, moving)
        own.copy_(wide.view(own.shape))
    skipped = (~finite).sum()
    return int(skipped) if on_host else skipped


def _add(to: Tensor, factors: tuple[Tensor, ...], beta: float, alpha: float, moving: Tensor | None) -> None:
    """to <- beta to + alpha times the product of one or two factors, in one pass where all of them move."""
    if moving is not None:
        product = factors[0] @ factors[1] if len(factors) > 1 else factors[0]
        to.copy_(torch.where(moving, beta * to + alpha * product, to))
    elif len(factors) == 1:
        to.mul_(beta).add_(factors[0], alpha=alpha)
    else:
        add_product_(to, *factors, beta, alpha)
