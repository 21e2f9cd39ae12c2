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

from ..common import wide_dtype

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

    After `sample` those in `kept` stand for all.
    """

    def __init__(self, mesh: DeviceMesh, classes: int) -> None:
        self.mesh, self.classes = mesh, classes
        most = -(-classes // mesh.size())  # of classes that a process has, as torch.chunk cuts
        self.shares = [max(0, min(most, classes - r * most)) for r in range(mesh.size())]
        rank = mesh.get_local_rank()
        self.first, self.own = min(classes, rank * most), self.shares[rank]
        self.kept: Tensor | None = None
        self.total = classes

    def sample(self, rate: float, target: Tensor) -> Tensor:
        """The own classes that stay: so many, chosen at random, those of the labels always among them; in `kept`."""
        # All processes draw for all classes: they go on with equal random numbers, as those that share features must.
        place, rows = self._place(target.reshape(-1)), target.numel()
        key = torch.rand(self.classes, device=target.device).narrow(0, self.first, self.own)
        key = torch.cat([key, key.new_zeros(1)]).index_fill(0, place, 2.0)[: self.own]
        sizes = [min(own, max(math.ceil(rate * own), rows)) for own in self.shares]  # without a look at the labels
        self.kept = key.topk(sizes[self.mesh.get_local_rank()], sorted=False).indices.sort().values
        self.total = sum(sizes)
        return self.kept

    def _place(self, target: Tensor) -> Tensor:
        """Where labels are among the own classes; `own` for those elsewhere."""
        at = target - self.first
        return torch.where((at >= 0) & (at < self.own), at, self.own)

    def rows(self, x: Tensor, weight: Tensor, dims: None, target: Tensor, class_weight: Tensor,
             gamma: float, normalize: bool, ignore_index: int, label_smoothing: float) -> Tensor:
        class_weight = class_weight.narrow(0, self.first, self.own) if class_weight.numel() else class_weight
        if target.is_floating_point():
            target = target.narrow(1, self.first, self.own).contiguous()
        else:
            place, ignored = self._place(target), target == ignore_index
            if self.kept is not None:
                class_weight = class_weight.index_select(0, self.kept) if class_weight.numel() else class_weight
                where = torch.full((self.own + 1,), weight.shape[0], device=place.device)
                where[self.kept] = torch.arange(weight.shape[0], device=place.device)
                place = where[place]
            wrong = (target < 0) | (target >= self.classes)  # the op says so
            target = torch.where(ignored, _IGNORED, torch.where(wrong, -1, place))
        return _Loss.apply(x, weight, target, class_weight, self.mesh, gamma, normalize, _IGNORED, label_smoothing,
                           self.total)


class Chosen(torch.autograd.Function):
    """Frames of some of a process's classes; their gradient names these alone."""

    @staticmethod
    def forward(ctx: Any, weight: DTensor, kept: Tensor) -> Tensor:
        own = weight.to_local()
        ctx.save_for_backward(kept)
        ctx.sizes, ctx.whole = own.shape, (weight.shape, weight.stride())
        ctx.where = weight.device_mesh, weight.placements
        return own.index_select(0, kept)

    @staticmethod
    def backward(ctx: Any, dframes: Tensor) -> tuple[Tensor, None]:
        no_second_derivative()
        (kept,), (shape, stride) = ctx.saved_tensors, ctx.whole
        own = torch.sparse_coo_tensor(kept[None], dframes, ctx.sizes, is_coalesced=True, check_invariants=False)
        # On its way into .grad autograd asks a sparse tensor for its indices, which DTensor has no rule for: it is to
        # see a dense one, which takes no memory.
        grad = DTensor.from_local(dframes.new_empty(()).expand(ctx.sizes), *ctx.where, run_check=False, shape=shape,
                                  stride=stride)
        grad._local_tensor = own
        return grad, None


def no_second_derivative() -> None:
    """DTensor's would silently be 0."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("ClassParallel: of classes on several processes there is no second derivative, as "
                           "create_graph=True asks for")


class Gradient(torch.autograd.Function):
    """x; its gradient is multiplied by a factor, and has none of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        no_second_derivative()
        return dx if ctx.factor == 1 else dx * ctx.factor, None
