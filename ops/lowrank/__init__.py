"""`torch_subspace.lowrank`: training in few dimensions: random subspaces, projected gradients, their optimisers."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .intrinsic import IntrinsicDimension as IntrinsicDimension
    from .intrinsic import intrinsic_dimension as intrinsic_dimension
    from .random_subspace import RandomSubspace as RandomSubspace

_FILES = {
    "IntrinsicDimension": "intrinsic",
    "RandomSubspace": "random_subspace",
    "intrinsic_dimension": "intrinsic",
}
__all__ = [
    "IntrinsicDimension",
    "RandomSubspace",
    "intrinsic_dimension",
]

__getattr__, __dir__ = lazy(__name__, _FILES)
