"""`torch_subspace.lowrank`: training in few dimensions: random subspaces, projected gradients, their optimisers."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .cosine import cosine_basis as cosine_basis
    from .cosine import cosine_columns as cosine_columns
    from .low_rank_adamw import LowRankAdamW as LowRankAdamW
    from .newton_schulz import newton_schulz as newton_schulz
    from .range_finder import range_finder as range_finder
    from .trion import Trion as Trion
    from .trion_groups import trion_groups as trion_groups

_FILES = {
    "LowRankAdamW": "low_rank_adamw",
    "Trion": "trion",
    "cosine_basis": "cosine",
    "cosine_columns": "cosine",
    "newton_schulz": "newton_schulz",
    "range_finder": "range_finder",
    "trion_groups": "trion_groups",
}
__all__ = [
    "LowRankAdamW",
    "Trion",
    "cosine_basis",
    "cosine_columns",
    "newton_schulz",
    "range_finder",
    "trion_groups",
]

__getattr__, __dir__ = lazy(__name__, _FILES)
