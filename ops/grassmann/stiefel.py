"""A module whose parameter is a frame of rows that count themselves, not their span alone: a point on the Stiefel
manifold, known to the optimisers, never rounded to half."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..common import HALF, WIDE, check_device, check_generator, told, whole, wide_dtype
from . import watch
from .frames import gathered, is_known, is_sharded, know, put
from .initial import drawn_frames


class StiefelModule(nn.Module):
    """`basis`, (k, n), orthonormal rows."""

    basis: nn.Parameter

    def __init__(self, in_features: int, dim: int, *, device=None, dtype=None, generator=None) -> None:
        super().__init__()
        name = type(self).__name__
        n, k = whole(name, "in_features", in_features, 1), whole(name, "dim", dim, 1)
        if k > n:
            raise ValueError(f"{name}: dim must be at most in_features={n}, got {k}")
        check_device(name, device)
        check_generator(name, generator)
        dtype = wide_dtype(torch.get_default_dtype()) if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or dtype not in WIDE:
            raise TypeError(f"{name}: dtype must be float32 or float64, as half precision holds no orthonormal rows, "
                            f"got {told(dtype)}")
        self.basis = nn.Parameter(torch.empty(k, n, device=device, dtype=dtype))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """basis <- random orthonormal rows, uniformly distributed; other parameters as in a new module."""
        if self.basis.is_meta:
            return
        shape, wide = (1, *self.basis.shape), torch.float32 if self.basis.device.type == "mps" else torch.float64
        drawn = drawn_frames(shape, None, generator, self.basis.device, wide, wide)[0].to(self.basis.dtype)
        if is_sharded(self.basis):
            put(self.basis, drawn)
        else:
            self.basis.copy_(drawn)
        know(self.basis, None, "stiefel")
        self._reset_others(generator)

    def _reset_others(self, generator: torch.Generator | None) -> None:
        """Of a subclass."""

    def basis_error(self) -> Tensor:
        """Largest entry of |basis @ basis.T - I|, 0-dim, in float64."""
        with torch.no_grad():
            basis = gathered(self.basis).double()
            return (basis @ basis.mT - torch.eye(len(basis), dtype=basis.dtype, device=basis.device)).abs().max()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)  # also where a basis is assigned
        self._enter()

    def __setstate__(self, state) -> None:
        super().__setstate__(state)  # copied or unpickled
        self._enter()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        watch.again(self)

    def _enter(self) -> None:
        """The optimisers shall know the basis."""
        basis = self._parameters.get("basis")
        if basis is not None and not is_known(basis):
            know(basis, None, "stiefel")

    def _apply(self, fn, recurse=True):
        def keep_wide(t):
            out = fn(t)
            return t.to(out.device, torch.float32) if t.dtype in WIDE and out.dtype in HALF else out

        was_meta = self.basis.is_meta
        applied = super()._apply(keep_wide, recurse)
        self._enter()
        if was_meta and not self.basis.is_meta:  # to_empty: never leave what the memory held
            self.reset_parameters()
        return applied
