"""`torch_subspace.lowrank`: training in few dimensions: random subspaces, projected gradients, their optimisers."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    pass

_FILES: dict[str, str] = {}
__all__: list[str] = []

__getattr__, __dir__ = lazy(__name__, _FILES)
