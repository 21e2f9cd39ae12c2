"""The fused cross-entropy of classes that are shared out among processes.

Each process sums its own classes, online over panels as ever, to lse_r, mass_r = sum_c tau and loss_r = lse_r mass_r -
sum_c tau y of each row. With m = max_r lse_r, one small all-reduce, and three sums, another,

    lse  = m + log sum_r exp(lse_r - m)          mass = sum_r mass_r
    loss = sum_r (loss_r + (m - lse_r) mass_r) + (lse - m) mass

where no term is negative, so that none cancels. The backward of a process's own classes needs lse and mass alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from ..common import weight_for, wide_dtype

_op = torch.ops.torch_subspace
_IGNORED = -100  # in the labels that the op gets


def reduced(t: Tensor, mesh: DeviceMesh, how: str = "sum") -> Tensor:
    return DTensor.from_local(t, mesh, [Partial(how)], run_check=False).full_tensor()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, class_weight, mesh, *options):
        start = torch.empty(0, dtype=torch.int64, device=x.device)
        if weight.shape[0]:
            loss, stats = _op.cross_entropy(x, weight, start, target, class_weight, *options)
            lse, mass = stats.unbind()
            most = reduced(lse, mesh, "max")
            sums = torch.stack([(lse - most).exp(), mass, loss + (most - lse) * mass])
        else:
            most = reduced(x.new_full(x.shape[:1], -math.inf, dtype=wide_dtype(x.dtype)), mesh, "max")
            sums = most.new_zeros(3, x.shape[0])
        total, mass, loss = reduced(sums, mesh).unbind()
        above = total.log()
        ctx.save_for_backward(x, weight, start, target, class_weight, torch.stack([most + above, mass]))
        ctx.options = options
        return loss + above * mass

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        x, weight = ctx.saved_tensors[:2]
        if weight.shape[0]:
            dx, dweight = _op.cross_entropy_backward(dloss.contiguous(), *ctx.saved_tensors, *ctx.options, need_dx,
                                                     need_dweight)
        else:
            dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
        return dx if need_dx else None, dweight if need_dweight else None, *(None,) * (len(ctx.options) + 3)


class Part:
    """The classes `first` to `first + own - 1` of `classes`, for `cross_entropy_of`; of all others the rows' loss too.

    rate: of the own classes that many, chosen at random, stand for all; those of the labels are always among them.
    """

    def __init__(self, mesh: DeviceMesh, classes: int, rate: float) -> None:
        self.mesh, self.classes, self.rate = mesh, classes, rate
        self.most = -(-classes // mesh.size())  # of classes that a process has, as torch.chunk cuts
        self.first = min(classes, mesh.get_local_rank() * self.most)

    def rows(self, x: Tensor, weight: Tensor, dims: None, target: Tensor, class_weight: Tensor,
             gamma: float, normalize: bool, ignore_index: int, label_smoothing: float) -> Tensor:
        own, total = weight.shape[0], self.classes
        class_weight = class_weight.narrow(0, self.first, own) if class_weight.numel() else class_weight
        if target.is_floating_point():
            if self.rate < 1:
                raise ValueError("ClassParallel: sample_rate is for labels, got probabilities as target: with a "
                                 "sample_rate below 1 classes that they name are left out")
            target = target.narrow(1, self.first, own).contiguous()
        else:
            at, ignored = target - self.first, target == ignore_index
            place = torch.where((at >= 0) & (at < own) & ~ignored, at, own)
            if self.rate < 1:
                kept, place = self._sample(own, place)
                weight = weight.index_select(0, kept)
                class_weight = class_weight.index_select(0, kept) if class_weight.numel() else class_weight
                total = sum(self._size(n, place.shape[0]) for n in self._shares())
            wrong = (target < 0) | (target >= self.classes)  # the op says so
            target = torch.where(ignored, _IGNORED, torch.where(wrong, -1, place))
        weight = weight_for(x, weight)
        return _Loss.apply(x, weight, target, class_weight, self.mesh, gamma, normalize, _IGNORED, label_smoothing,
                           total)

    def _shares(self) -> list[int]:
        """How many classes each process has."""
        return [max(0, min(self.most, self.classes - r * self.most)) for r in range(self.mesh.size())]

    def _size(self, own: int, rows: int) -> int:
        """How many of them stay: enough for the labels of as many rows, without a look at these."""
        return min(own, max(math.ceil(self.rate * own), rows))

    def _sample(self, own: int, place: Tensor) -> tuple[Tensor, Tensor]:
        """The classes that stay, and where among them those of the labels are."""
        # All processes draw for all classes: they go on with equal random numbers, as those that share features must.
        key = torch.rand(self.classes, device=place.device).narrow(0, self.first, own)
        key = torch.cat([key, key.new_zeros(1)]).index_fill(0, place, 2.0)[:own]
        kept = key.topk(self._size(own, place.shape[0]), sorted=False).indices.sort().values
        where = torch.full((own + 1,), kept.shape[0], device=place.device)
        where[kept] = torch.arange(kept.shape[0], device=place.device)
        return kept, where[place]


class Gradient(torch.autograd.Function):
    """x; its gradient is multiplied by a factor, and has none of its own: DTensor's would silently be 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("ClassParallel: of classes on several processes there is no second derivative, as "
                               "create_graph=True asks for")
        return dx if ctx.factor == 1 else dx * ctx.factor, None
