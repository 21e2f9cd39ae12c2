"""`torch_subspace.lowrank`: training in few dimensions: random subspaces, projected gradients, their optimisers."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .cosine import cosine_basis as cosine_basis
    from .cosine import cosine_columns as cosine_columns
    from .range_finder import range_finder as range_finder

_FILES = {
    "cosine_basis": "cosine",
    "cosine_columns": "cosine",
    "range_finder": "range_finder",
}
__all__ = [
    "cosine_basis",
    "cosine_columns",
    "range_finder",
]

__getattr__, __dir__ = lazy(__name__, _FILES)
