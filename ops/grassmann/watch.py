"""One warning where a layer's frames are no frames: moved by an optimiser of another kind, averaged, or loaded so.

A look costs the Gram matrices of the classes, a small part of a forward, and on a GPU nothing waits for it. It is taken
when something else than our own step has written to the weight, and now and then in any case, since not all that writes
can be told; both at the 1st, 2nd, 4th, 8th, ... time.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref

import torch
from torch import Tensor, nn

from ..common import transformed
from .frames import is_known, know, known_as, moved_by_others

LIMIT = 1e-2  # of |W W' - I|; drift that a step repairs by itself is far below


@dataclasses.dataclass
class Watch:
    """What is known of a layer: forwards so far, those that found the weight moved, and an error that is on its way."""

    forwards: int = 0
    moves: int = 0
    warned: bool = False
    error: Tensor | None = None
    ready: torch.cuda.Event | None = None


_watches: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()  # apart: not copied, not pickled


def again(layer: nn.Module) -> None:
    """Look at the next forward, and warn once more if need be."""
    _watches.pop(layer, None)


WORDS = {
    "weight": "the rows of a class are off from orthonormal by {error:.1e} (largest entry of W W' - I): its logits are "
              "no lengths of projections. Train frames by torch_subspace.RiemannianSGD or RiemannianAdamW, average "
              "them by torch_subspace.grassmann.average_frames; orthonormalize_() repairs them",
    "basis": "the rows of its basis are off from orthonormal by {error:.1e} (largest entry of B B' - I): what is taken "
             "along them is no projection. Train it by torch_subspace.RiemannianSGD or RiemannianAdamW, average "
             "it by torch_subspace.grassmann.average_frames; a step of theirs repairs it",
}


def look(layer: nn.Module, frames: str = "weight") -> None:
    """Before a forward: warn once if the frames of the layer, its weight or its basis, are off by more than LIMIT."""
    weight = getattr(layer, frames)
    if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or weight.is_meta or not is_known(weight):
        return
    if transformed() or weight.dtype.itemsize < 4:
        return
    watch = _watches.setdefault(layer, Watch())
    if watch.warned or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    moved = moved_by_others(weight)
    watch.forwards += 1
    watch.moves += moved
    if watch.error is None and (_is_power_of_two(watch.forwards) or (moved and _is_power_of_two(watch.moves))):
        _measure(layer, weight, watch)
    if watch.error is not None and (watch.ready is None or watch.ready.query()):
        error, watch.error, watch.ready = watch.error.item(), None, None
        if not error <= LIMIT:  # a NaN is off too
            watch.warned = True
            name = "GrassmannLinear" if frames == "weight" else type(layer).__name__
            warnings.warn(f"{name}: {WORDS[frames].format(error=error)}", RuntimeWarning, stacklevel=4)


def _measure(layer: nn.Module, weight: Tensor, watch: Watch) -> None:
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        error = layer.basis_error() if weight is getattr(layer, "basis", None) else layer.frame_error(weight.dtype)
        know(weight, *known_as(weight))  # as it is now
        if weight.is_cuda:
            watch.error = torch.empty((), dtype=error.dtype, pin_memory=True).copy_(error, non_blocking=True)
            watch.ready = torch.cuda.Event()
            watch.ready.record()
        else:
            watch.error = error


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
