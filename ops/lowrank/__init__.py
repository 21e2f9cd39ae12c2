"""`torch_subspace.lowrank`: training in few dimensions: random subspaces, projected gradients, their optimisers."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .cosine import cosine_basis as cosine_basis
    from .cosine import cosine_columns as cosine_columns
    from .coso import CoSO as CoSO
    from .fastfood import fastfood as fastfood
    from .fastfood import fastfood_adjoint as fastfood_adjoint
    from .frequent_directions import frequent_directions_ as frequent_directions_
    from .hadamard import hadamard as hadamard
    from .intrinsic import IntrinsicDimension as IntrinsicDimension
    from .intrinsic import intrinsic_dimension as intrinsic_dimension
    from .low_rank_adamw import LowRankAdamW as LowRankAdamW
    from .newton_schulz import newton_schulz as newton_schulz
    from .random_subspace import RandomSubspace as RandomSubspace
    from .range_finder import range_finder as range_finder
    from .streaming_pca import StreamingPCA as StreamingPCA
    from .trion import Trion as Trion
    from .trion_groups import trion_groups as trion_groups

_FILES = {
    "CoSO": "coso",
    "IntrinsicDimension": "intrinsic",
    "LowRankAdamW": "low_rank_adamw",
    "RandomSubspace": "random_subspace",
    "StreamingPCA": "streaming_pca",
    "Trion": "trion",
    "cosine_basis": "cosine",
    "cosine_columns": "cosine",
    "fastfood": "fastfood",
    "fastfood_adjoint": "fastfood",
    "frequent_directions_": "frequent_directions",
    "hadamard": "hadamard",
    "intrinsic_dimension": "intrinsic",
    "newton_schulz": "newton_schulz",
    "range_finder": "range_finder",
    "trion_groups": "trion_groups",
}
__all__ = [
    "CoSO",
    "IntrinsicDimension",
    "LowRankAdamW",
    "RandomSubspace",
    "StreamingPCA",
    "Trion",
    "cosine_basis",
    "cosine_columns",
    "fastfood",
    "fastfood_adjoint",
    "frequent_directions_",
    "hadamard",
    "intrinsic_dimension",
    "newton_schulz",
    "range_finder",
    "trion_groups",
]

__getattr__, __dir__ = lazy(__name__, _FILES)
