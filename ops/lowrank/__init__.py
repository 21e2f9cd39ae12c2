"""`torch_subspace.lowrank`: training in few dimensions: random subspaces, projected gradients, their optimisers."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .cosine import cosine_basis as cosine_basis
    from .cosine import cosine_columns as cosine_columns
    from .fastfood import fastfood as fastfood
    from .fastfood import fastfood_adjoint as fastfood_adjoint
    from .hadamard import hadamard as hadamard
    from .low_rank_adamw import LowRankAdamW as LowRankAdamW
    from .range_finder import range_finder as range_finder

_FILES = {
    "LowRankAdamW": "low_rank_adamw",
    "cosine_basis": "cosine",
    "cosine_columns": "cosine",
    "fastfood": "fastfood",
    "fastfood_adjoint": "fastfood",
    "hadamard": "hadamard",
    "range_finder": "range_finder",
}
__all__ = [
    "LowRankAdamW",
    "cosine_basis",
    "cosine_columns",
    "fastfood",
    "fastfood_adjoint",
    "hadamard",
    "range_finder",
]

__getattr__, __dir__ = lazy(__name__, _FILES)
