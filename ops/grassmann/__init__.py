"""Subspaces as classes: logits, the fused loss, Riemannian steps, the layer, head surgery and optimisers.

`average_frames` and `FrameAverage` are here, at `torch_subspace.grassmann`; all else is at the top.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .averaging import FrameAverage as FrameAverage
    from .averaging import average_frames as average_frames

__all__ = ["FrameAverage", "average_frames"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # on first use
        from . import averaging

        return getattr(averaging, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
