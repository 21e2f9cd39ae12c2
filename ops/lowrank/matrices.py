"""A parameter as one matrix or several, and its step in a few dimensions: what `LowRankAdamW` does with each.

The state is `step`, `exp_avg` and `exp_avg_sq` (..., m, r) as torch names them, m the side that is not projected;
`basis` (..., n, r), or an index (..., r) into a fixed one by that one's name; with feedback `error` and its scales.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import wide_dtype
from .feedback import chunks, fed, left_out
from .product import add_product_
from .projectors import KINDS, STORED, along, carried, columns, project, without_rounding
from .shards import all_finite, local, placed, sharing
from .walsh import is_transformed, row_chunks, walsh_along, walsh_choice, walsh_move_

SIDES = ("shorter", "rows", "columns")


def matrix_shape(shape: Sequence[int], rank: int) -> tuple[int, ...] | None:
    """(m, n), or (matrices, m, n), as which a parameter is projected; None where a side is no longer than rank."""
    if len(shape) == 3 and min(shape[1:]) > rank:
        return tuple(shape) if shape[0] else None
    m, n = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
    return (m, n) if min(m, n) > rank else None


def is_turned(shape: Sequence[int], side: str) -> bool:
    """Whether it is the rows that are projected."""
    return side == "rows" or side == "shorter" and shape[-2] < shape[-1]


def on_host(t: Tensor) -> bool:
    """Where a look at a number need not wait for a device."""
    return t.device.type == "cpu"


class Matrix:
    """A parameter with a gradient, for one step. Raises in an optimiser's voice where it can't be stepped."""

    def __init__(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        if p.grad.layout is not torch.strided:
            raise RuntimeError(f"{name}: gradients must be dense, got one of {p.grad.layout} for a parameter of shape "
                               f"{tuple(p.shape)}: torch.optim.SparseAdam takes such")
        shape = matrix_shape(p.shape, group["rank"])
        self.weight, self.group, self.own = p, group, local(p)
        self.turned = is_turned(shape, group["side"])
        self.processes, self.rows = sharing(name, p, len(shape))
        if self.turned and self.processes is not None:
            self.processes = None  # of the shorter side all is known everywhere
        else:
            self.rows = None
        self.shape = (self.own.shape[0], *shape[1:])
        self.grad = local(p.grad).reshape(self.shape)

    def _turn(self, t: Tensor) -> Tensor:
        """In the orientation in which the last side is the one that is projected; all of that side."""
        if self.rows is not None:
            t = placed(t, self.weight).full_tensor()
        return t.mT if self.turned else t

    def _factors(self, low: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """a and b with a b = low Qᵀ, of the rows that are here."""
        if self.rows is not None:
            basis = basis[self.rows]
        return (basis, low.mT) if self.turned else (low, basis.mT)

    def step(self, state: dict[str, Any], starts: dict[Any, Tensor]) -> int | Tensor:
        """The step; how many matrices were left alone. `starts`: what the range finder starts from, for others too."""
        group, dtype = self.group, wide_dtype(self.own.dtype)
        count = int(state.get("step", 0))
        held = {key: local(t).to(self.own.device) for key, t in state.items() if key != "step"}
        kind, before = STORED[group["projector"]], next(((key, held[key]) for key in KINDS if key in held), None)

        own = self.grad.to(dtype)
        if group["error_feedback"] and "error" in held:
            own = fed(own, held)
        grad = self._turn(own)
        size = grad.shape[-1]
        same = before is not None and before[0] == kind and before[1].shape[-1] == group["rank"]
        stays = same and count % group["every"] > 0
        if not stays and (same or not held) and self._is_transformed(kind, group["rank"]) and (
                self.processes is None and group["error_feedback"] is None):
            return self._by_rows(state, held, grad, before)
        if stays:
            now, low = before, self._along(grad, before, dtype)
        else:
            start = self._start(starts, count, size, dtype) if group["projector"] == "range" else None
            stored, low = project(group["projector"], grad, group["rank"], start, self.processes)
            now = kind, stored
        finite = self._finite(low)
        sure = on_host(finite) and bool(finite.all())
        if not sure and on_host(finite) and finite.dim() == 0:
            return 1

        new = {now[0]: now[1]}
        if group["error_feedback"]:
            new |= left_out(own, *self._factors(low, columns(*now, size, dtype)), group["error_feedback"])
        new["exp_avg"], new["exp_avg_sq"] = mean, square = self._moments(held, low, before, now, size, stays and sure)
        count += 1
        self._adamw(low, mean, square, count)
        if not sure:
            new = {key: _where(finite, t, held.get(key), key) for key, t in new.items()}
            now = now[0], new[now[0]]
        self._move(low, now, size, None if sure else finite)
        self._keep(state, count, new)
        skipped = (~finite).sum()
        return int(skipped) if on_host(skipped) else skipped

    def _is_transformed(self, kind, rank):
        """Whether W + Y Qᵀ takes a transform of some of W's rows after the others."""
        return (kind == "hadamard" and is_transformed(self.own, rank) and len(self.shape) == 2 and self.rows is None
                and self.own.is_contiguous())

    def _by_rows(self, state, held, grad, before):
        """The step along new columns of Hadamard's basis on a CPU: after the choice all of it for some rows, while they
        are in the cache. Another transform takes less time than keeping that of the choice."""
        index, lost, finite = walsh_choice(grad, self.group["rank"])
        if not finite:
            return 1
        if "exp_avg" not in held:
            held["exp_avg"], held["exp_avg_sq"] = (grad.new_zeros(grad.shape[0], len(index)) for _ in range(2))
        count, weight = int(state.get("step", 0)) + 1, self.own.view(self.shape)
        mean, square, weight = held["exp_avg"], held["exp_avg_sq"], weight.mT if self.turned else weight
        moved, lost = before is not None and not torch.equal(before[1], index), lost if lost.any() else None
        for rows in row_chunks(grad):
            low, moments = walsh_along(grad[rows], index), (mean[rows], square[rows])
            if lost is not None:
                low.masked_fill_(lost, 0)
            if moved:
                for t, new in zip(moments, carried(moments, before, ("hadamard", index), grad.shape[1])):
                    t.copy_(new)
            self._adamw(low, *moments, count)
            walsh_move_(weight[rows], low, index, self._decay())
        self._keep(state, count, {"hadamard": index, "exp_avg": mean, "exp_avg_sq": square})
        return 0

    def _decay(self):
        return 1 - float(self.group["lr"]) * float(self.group["weight_decay"])

    def _along(self, grad, kept, dtype):
        """G Q of the Q of the last step."""
        if kept[0] == "hadamard" and kept[1].dim() == 1 and is_transformed(grad, kept[1].shape[0]):
            return without_rounding(walsh_along(grad, kept[1]), self.processes)
        return along(grad, columns(*kept, grad.shape[-1], dtype), self.processes)

    def _start(self, starts, count, size, dtype):
        """Normal numbers (n, r): a function of the seed and the step alone, the same on every device."""
        seed, rank = self.group["seed"], self.group["rank"]
        key = seed, count, size, rank, dtype, self.own.device
        if key not in starts:
            mixed = (seed * 0x9E3779B97F4A7C15 + count * 0xBF58476D1CE4E5B9) % (1 << 64)  # the generator takes 32 bits
            generator = torch.Generator().manual_seed((mixed >> 32) ^ (mixed & 0xFFFFFFFF))
            starts[key] = torch.randn((size, rank), generator=generator).to(self.own.device, dtype)
        return starts[key]

    def _finite(self, low):
        """Of each matrix: what is not finite in a gradient is not in its projection either."""
        return all_finite(low.sum((-2, -1)).isfinite(), self.processes)

    def _moments(self, held, low, before, now, size, in_place):
        if "exp_avg" not in held:
            return torch.zeros_like(low), torch.zeros_like(low)
        moments = held["exp_avg"], held["exp_avg_sq"]
        if before is None:  # AdamW's own
            moments = tuple(self._turn(t.reshape(self.shape)).to(low.dtype) for t in moments)
        if before is now:
            return moments if in_place else tuple(t.clone() for t in moments)
        return carried(moments, before, now, size)

    def _adamw(self, low, mean, square, count):
        """Both moments with G Q, and in its place AdamW's step along Q: some rows at a time, while they are in the
        cache, in the roundings of torch's own."""
        beta1, beta2 = map(float, self.group["betas"])
        rate = float(self.group["lr"]) * self.group["scale"] / (1 - beta1**count)
        zero = low.new_zeros(())
        for place in chunks(low):
            part, m, v = low[place], mean[place], square[place]
            if self.group["maximize"]:
                part.neg_()
            m.lerp_(part, 1 - beta1)
            v.mul_(beta2).addcmul_(part, part, value=1 - beta2)
            root = v.sqrt().div_(math.sqrt(1 - beta2**count)).add_(self.group["eps"])
            torch.addcdiv(zero, m, root, value=-rate, out=part)

    def _move(self, update, now, size, finite):
        """W <- decay W + update Qᵀ, in one pass where all of them are finite."""
        own, decay = self.own, self._decay()
        if finite is None and self._is_transformed(now[0], self.group["rank"]):
            own = own.view(self.shape)
            walsh_move_(own.mT if self.turned else own, update, now[1], decay)
            return
        if finite is not None:
            update = _where(finite, update, None, "")
            shaped = own.view(self.shape) if own.is_contiguous() else own
            shaped.mul_(torch.where(finite, decay, 1.0).to(own.dtype).reshape(-1, *[1] * (shaped.dim() - 1)))
            decay = 1
        a, b = (t.to(own.dtype) for t in self._factors(update, columns(*now, size, update.dtype)))
        if not own.is_contiguous():
            own.mul_(decay).add_((a @ b).view(own.shape))
        else:
            add_product_(own.view(self.shape), a, b, decay)

    def _keep(self, state, count, new):
        for key in state.keys() - new.keys() - {"step"}:
            del state[key]
        state["step"] = torch.tensor(float(count))
        for key, t in new.items():
            state[key] = placed(t, self.weight) if self._is_split(key) else t

    def _is_split(self, key):
        here = key.startswith("error") if self.rows is not None else key not in KINDS
        return hasattr(self.weight, "placements") and (len(self.shape) == 3 or here)


def _where(finite: Tensor, new: Tensor, old: Tensor | None, key: str) -> Tensor:
    """The old where a matrix is not finite; what a step would begin with where there is none."""
    if old is None or old.shape != new.shape:
        old = torch.zeros_like(new)
        if key == "basis":
            old.diagonal(dim1=-2, dim2=-1).fill_(1)
        elif key in KINDS:
            old += torch.arange(new.shape[-1], device=new.device)
    return torch.where(finite.reshape(finite.shape + (1,) * (new.dim() - finite.dim())), new, old)
