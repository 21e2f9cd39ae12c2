"""Which classes of a weight a step moves: all, or those that a sparse gradient names; the momentum of all others waits.

A sparse gradient, as torch.nn.Embedding(sparse=True) has it, holds the numbers of some classes and their (k, n)
gradients. These are gathered, stepped and put back: nothing else of the weight or of the optimiser's state is touched.

A dense step with a gradient of zero takes M to mu M and W along -lr mu M. Of parallel-transported momentum s such steps
stay on one geodesic, so that a class that has missed them catches up by a single one, before its next gradient:

    W <- exp_W(-lr (mu + mu^2 + ... + mu^s) M)        M <- mu^s (M, transported along)

with a further factor of mu in the length under Nesterov. The same is done for projected momentum and other retractions,
whose s steps it meets up to terms of the order of lr^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ragged import packed, unpack_
from .frames import is_stack, local, own_dims, stepped
from .groups import PIECE, scalar
from .rsgd import grassmann_step_


class Classes:
    """Those of a weight that a step moves: all that this process has, or among these `index`; `grad` is theirs."""

    def __init__(self, weight: Tensor, dims: tuple[int, ...] | None, index: Tensor | None = None,
                 grad: Tensor | None = None) -> None:
        self.weight, self.index, self.dims = weight, index, own_dims(weight, dims)
        self._stack = is_stack(weight, dims)
        if index is not None and self.dims is not None:
            self.dims = tuple(self.dims[c] for c in index.tolist())
        self.grad = packed(grad, self.dims) if grad is not None and self._stack else grad

    def take(self, t: Tensor) -> Tensor:
        """Their part of the weight, or of a state of as many classes; of all of an unragged weight it is no copy."""
        t = local(t)
        if self.index is not None:
            t = t.index_select(0, self.index)
        return packed(t, self.dims) if self._stack and t.dim() == 3 else t

    def put(self, t: Tensor, taken: Tensor) -> None:
        """What has become of `take(t)`."""
        own = local(t)
        if self._stack and own.dim() == 3:
            stack = own if self.index is None else own.new_zeros(len(self.dims), *own.shape[1:])
            unpack_(stack, taken, self.dims)
            taken = stack
        if self.index is not None:
            own.index_copy_(0, self.index, taken)
            if t is self.weight:
                stepped([t])


def with_gradient(name: str, group: dict, weight: Tensor) -> Classes:
    """The classes that the weight's gradient is of; raises in `name`'s voice."""
    grad, dims = local(weight.grad), group.get("dims")
    if not grad.is_sparse:
        return Classes(weight, dims, grad=grad)
    if dims is None and weight.dim() != 3:
        raise RuntimeError(f"{name}: a sparse gradient names classes of (C, k, n), got one of {tuple(weight.shape)}")
    if grad.sparse_dim() != 1:
        raise RuntimeError(f"{name}: frames need gradients that are dense, or sparse in the classes alone, got one of "
                           f"sparse_dim={grad.sparse_dim()}")
    if dims is not None and not is_stack(weight, dims):
        raise RuntimeError(f"{name}: frames with dims need dense gradients, unless shard_head has shared their classes "
                           "out: a sparse one names rows, not classes")
    if group["weight_decay"] != 0:
        raise RuntimeError(f"{name}: sparse gradients of frames need weight_decay=0, got {group['weight_decay']}")
    grad = grad.coalesce()
    index, classes = grad.indices()[0], grad.shape[0]
    if index.numel() and not index.is_cuda and (index.min() < 0 or index.max() >= classes):  # torch doesn't look
        raise RuntimeError(f"{name}: a sparse gradient must name classes in [0, {classes}), got {int(index.min())} to "
                           f"{int(index.max())}")
    return Classes(weight, dims, index, grad.values())


def catch_up(group: dict, frames: Tensor, momentum: Tensor, missed: Tensor, dims: tuple[int, ...] | None) -> None:
    """Each class takes the `missed` (C,) steps that it was not named in, all in one."""
    mu, missed = float(group["momentum"]), missed.double()
    left = mu**missed
    length = missed if mu == 1 else mu * (1 - left) / (1 - mu)
    length = length * mu if group["nesterov"] else length
    grassmann_step_(frames, torch.zeros_like(frames), momentum, lr=scalar(group["lr"]) * length, momentum=1.0,
                    retraction=group["retraction"], transport=group["transport"], dims=dims,
                    manifold=group["manifold"])
    left = left.to(momentum.dtype)
    if dims is not None:
        left = left.repeat_interleave(torch.tensor(dims, dtype=torch.int64, device=left.device))
    momentum.mul_(left.reshape(-1, *(1,) * (momentum.dim() - 1)))


def all_catch_up(group: dict, weight: Tensor, state: dict) -> None:
    """All classes are where a dense optimiser would have them; the state no longer counts their steps."""
    last, steps, dims = local(state.pop("step")), state.pop("steps"), group.get("dims")
    behind = (last < steps).nonzero()[:, 0]
    some = behind.split(max(1, PIECE // max(1, weight[:1].numel())))
    if dims is not None and not is_stack(weight, dims):  # ragged frames in one process: rows, which no index picks
        some = [None]
    for index in some:
        named = Classes(weight, dims, index)
        frames, momentum = named.take(weight), named.take(state["momentum_buffer"])
        catch_up(group, frames, momentum, steps - (last if index is None else last[index]), named.dims)
        named.put(weight, frames)
        named.put(state["momentum_buffer"], momentum)
