"""A module whose weight is frames: drawn where it has no values, known to the optimisers, never rounded to half."""

from typing import Any

import torch
from torch import Tensor, nn

from ..common import HALF, WIDE, reshard
from ..ragged import packed, padded
from .frames import (
    distributed,
    enter_layer,
    forget,
    gathered,
    is_known,
    is_sharded,
    is_stack,
    know,
    local,
    own_classes,
    own_frames,
    put,
    put_own,
)
from .initial import drawn_frames

CHUNK = 2**24  # entries of the frames that are reckoned with at a time, 128 MiB in float64
BLOCK = 2**19  # that are drawn at a time on a CPU: they stay in its cache


class FramesModule(nn.Module):
    """`weight`, (num_classes, subspace_dim, in_features), or with `dims` (their sum, in_features)."""

    in_features: int
    num_classes: int
    subspace_dim: int | tuple[int, ...]
    dims: tuple[int, ...] | None
    weight: nn.Parameter
    class_parallel: Any = None

    @property
    def _wide(self) -> torch.dtype:
        return torch.float32 if self.weight.device.type == "mps" else torch.float64

    # Where classes are shared out, each process reckons with its own; of other weights that are sharded, with all.
    def _classes(self) -> range:
        return range(self.num_classes) if self.class_parallel is None else own_classes(self.weight)

    def _frames(self) -> Tensor:
        return gathered(self.weight) if self.class_parallel is None else own_frames(self.weight, self.dims)

    def _generator(self, generator: torch.Generator | None) -> torch.Generator | None:
        """Processes with equal random numbers draw different frames, and go on with equal ones."""
        if self.class_parallel is None or self.weight.is_meta:
            return generator
        device = self.weight.device if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device).item()
        return torch.Generator(self.weight.device).manual_seed(seed + self._classes().start)

    def _chunks(self, entries: int | None = None):
        """Classes of equal k with the index that gathers their frames (c, k, n), a bounded number at a time."""
        own = self._classes()
        dims = (self.subspace_dim,) * len(own) if self.dims is None else self.dims[own.start : own.stop]
        dims = torch.tensor(dims, dtype=torch.int64, device="cpu")
        starts = dims.cumsum(0) - dims
        for k in dims.unique().tolist():
            most = max(1, (entries or CHUNK) // (k * self.in_features))
            for classes in (dims == k).nonzero()[:, 0].split(most):
                rows = starts[classes, None] + torch.arange(k, device="cpu")
                i = slice(int(classes[0]), int(classes[-1]) + 1) if self.dims is None else rows
                yield classes + own.start, i

    @torch.no_grad()
    def _draw(self, first=None, generator: torch.Generator | None = None) -> None:
        """weight <- random frames, those of classes of dimension k beginning with the rows of `first(classes, k)`."""
        if self.weight.is_meta:
            return
        reshard(self)
        weight, on_cpu = self._frames(), self.weight.device.type == "cpu"
        dtype = torch.promote_types(weight.dtype, torch.float32) if on_cpu else self._wide
        for classes, i in self._chunks(BLOCK if on_cpu else CHUNK):
            own = weight[i]
            rows = None if first is None else first(classes, own.shape[1]).to(dtype)
            in_place = own if isinstance(i, slice) and own.dtype == dtype else None
            frames = drawn_frames(own.shape, rows, generator, weight.device, dtype, self._wide, in_place)
            if in_place is None:
                weight[i] = frames.to(weight.dtype)
        self._drawn(weight)

    @torch.no_grad()
    def _set_frames(self, frames) -> None:
        """weight[classes] <- frames(classes, weight[classes]), reckoned in float64."""
        if self.weight.is_meta:
            return
        reshard(self)
        weight = self._frames()
        for classes, i in self._chunks():
            weight[i] = frames(classes, weight[i].to(self._wide)).to(weight.dtype)
        self._drawn(weight)

    def _drawn(self, frames: Tensor) -> None:
        if self.class_parallel is None:
            put(self.weight, frames)
        elif is_stack(self.weight, self.dims):
            local(self.weight).zero_()
            put_own(self.weight, frames, self.dims)
        know(self.weight, self.dims)
        self._undrawn = False

    def _as_held(self, weight: Tensor) -> Tensor:
        """A weight that is loaded, in the form that the layer has it: ragged or as a stack, whole or shared out."""
        shared, stack = self.class_parallel is not None, (self.num_classes, max(self.dims or (0,)), self.in_features)
        if self.dims is not None and not shared and weight.shape == stack and not is_sharded(weight):
            return packed(weight, self.dims)
        if not shared or is_sharded(weight):
            return weight
        if self.dims is not None and weight.shape == (sum(self.dims), self.in_features):
            weight = padded(weight, self.dims)
        return distributed(weight, self.weight) if weight.shape == self.weight.shape else weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        was_meta = self._is_meta()
        super().register_parameter(name, param)  # also where a weight is assigned, or loaded with assign=True
        self._enter()
        if name == "weight":
            self._undrawn = was_meta and not self._is_meta()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # copied or unpickled
        enter_layer(self)
        self._enter()

    # Weights on the meta device have no values. Where real memory takes their place, transformers' from_pretrained
    # assigns parameters, and marks a module once it has been through the model's `_init_weights`, which knows torch's
    # layers alone: a weight that was not in the checkpoint has no mark then, and is drawn. Elsewhere see `_apply`.
    _undrawn = False

    @property
    def _is_hf_initialized(self) -> bool:
        return self.__dict__.get("_is_hf_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_is_hf_initialized"] = value
        if value and self._undrawn and not getattr(self.weight, "_is_hf_initialized", False):
            self.reset_parameters()

    def _is_meta(self) -> bool:
        weight = self._parameters.get("weight")
        return weight is not None and weight.is_meta

    def _enter(self) -> None:
        """The optimisers shall know the weight."""
        weight = self._parameters.get("weight")
        if weight is not None and not is_known(weight):
            know(weight, self.dims)

    def _apply(self, fn, recurse=True):
        def keep_wide(t):
            out = fn(t)
            if not out.is_floating_point() or out.dtype in WIDE or (out.dtype in HALF and t.dtype in HALF):
                return out
            return t.to(out.device, t.dtype if t.dtype in HALF else torch.float32)

        was_meta = self._is_meta()
        if self.class_parallel is not None:
            forget(self.weight)
        applied = super()._apply(keep_wide, recurse)
        self._enter()
        if was_meta and not self._is_meta():  # to_empty: never leave what the memory held
            self.reset_parameters()
        return applied
