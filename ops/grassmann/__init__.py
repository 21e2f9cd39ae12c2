"""Subspaces as classes: logits, the fused loss, Riemannian steps, the layer, head surgery and optimisers.

`average_frames`, `FrameAverage`, `subspace_scores`, `subspace_denoise`, `class_subspaces` and `KSubspaces` are here, at
`torch_subspace.grassmann`; all else is at the top.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .averaging import FrameAverage as FrameAverage
    from .averaging import average_frames as average_frames
    from .k_subspaces import KSubspaces as KSubspaces
    from .subspaces import class_subspaces as class_subspaces
    from .subspaces import subspace_denoise as subspace_denoise
    from .subspaces import subspace_scores as subspace_scores

_FILES = {"FrameAverage": "averaging", "KSubspaces": "k_subspaces", "average_frames": "averaging",
          "class_subspaces": "subspaces", "subspace_denoise": "subspaces", "subspace_scores": "subspaces"}
__all__ = ["FrameAverage", "KSubspaces", "average_frames", "class_subspaces", "subspace_denoise", "subspace_scores"]


def __getattr__(name: str) -> Any:
    if name in _FILES:  # on first use
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
