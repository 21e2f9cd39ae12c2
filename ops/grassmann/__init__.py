"""Subspaces as classes: logits, the fused loss, Riemannian steps, the layer, head surgery and optimisers.

What `__all__` names is here, at `torch_subspace.grassmann`, and loaded on first use; all else is at the top.
"""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .averaging import FrameAverage as FrameAverage
    from .averaging import average_frames as average_frames
    from .k_subspaces import KSubspaces as KSubspaces
    from .learners import DynamicSubspaceLearners as DynamicSubspaceLearners
    from .learners import grouped_normalize as grouped_normalize
    from .patching import SubspacePatch as SubspacePatch
    from .patching import rowspace_split as rowspace_split
    from .patching import subspace_patch as subspace_patch
    from .probe import OrthogonalProbe as OrthogonalProbe
    from .subspaces import class_subspaces as class_subspaces
    from .subspaces import subspace_denoise as subspace_denoise
    from .subspaces import subspace_scores as subspace_scores

_FILES = {"DynamicSubspaceLearners": "learners", "FrameAverage": "averaging", "KSubspaces": "k_subspaces",
          "OrthogonalProbe": "probe", "SubspacePatch": "patching", "average_frames": "averaging",
          "class_subspaces": "subspaces", "grouped_normalize": "learners", "rowspace_split": "patching",
          "subspace_denoise": "subspaces", "subspace_patch": "patching", "subspace_scores": "subspaces"}
__all__ = ["DynamicSubspaceLearners", "FrameAverage", "KSubspaces", "OrthogonalProbe", "SubspacePatch",
           "average_frames", "class_subspaces", "grouped_normalize", "rowspace_split", "subspace_denoise",
           "subspace_patch", "subspace_scores"]

__getattr__, __dir__ = lazy(__name__, _FILES)
