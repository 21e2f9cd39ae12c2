"""`torch_subspace.lowrank`: training in few dimensions: random subspaces, projected gradients, their optimisers."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .newton_schulz import newton_schulz as newton_schulz

_FILES: dict[str, str] = {"newton_schulz": "newton_schulz"}
__all__: list[str] = ["newton_schulz"]

__getattr__, __dir__ = lazy(__name__, _FILES)
