"""`torch_subspace.lowrank`: training in few dimensions: random subspaces, projected gradients, their optimisers."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .fastfood import fastfood as fastfood
    from .fastfood import fastfood_adjoint as fastfood_adjoint
    from .hadamard import hadamard as hadamard

_FILES = {
    "fastfood": "fastfood",
    "fastfood_adjoint": "fastfood",
    "hadamard": "hadamard",
}
__all__ = [
    "fastfood",
    "fastfood_adjoint",
    "hadamard",
]

__getattr__, __dir__ = lazy(__name__, _FILES)
