"""`torch_subspace.lowrank`: training in few dimensions: random subspaces, projected gradients, their optimisers."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .cosine import cosine_basis as cosine_basis
    from .cosine import cosine_columns as cosine_columns
    from .coso import CoSO as CoSO
    from .frequent_directions import frequent_directions_ as frequent_directions_
    from .low_rank_adamw import LowRankAdamW as LowRankAdamW
    from .range_finder import range_finder as range_finder
    from .streaming_pca import StreamingPCA as StreamingPCA

_FILES = {
    "CoSO": "coso",
    "LowRankAdamW": "low_rank_adamw",
    "StreamingPCA": "streaming_pca",
    "cosine_basis": "cosine",
    "cosine_columns": "cosine",
    "frequent_directions_": "frequent_directions",
    "range_finder": "range_finder",
}
__all__ = [
    "CoSO",
    "LowRankAdamW",
    "StreamingPCA",
    "cosine_basis",
    "cosine_columns",
    "frequent_directions_",
    "range_finder",
]

__getattr__, __dir__ = lazy(__name__, _FILES)
