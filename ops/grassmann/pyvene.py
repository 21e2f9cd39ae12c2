"""pyvene's interface to a trained subspace, where pyvene is installed: `IntervenableModel` takes the class as one of
its own. The basis is a point on the Stiefel manifold, which `RiemannianSGD` and `RiemannianAdamW` move, in place of a
parametrised rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import full_precision, wide_dtype
from .patching import SubspacePatch

try:
    from pyvene.models.interventions import DistributedRepresentationIntervention, TrainableIntervention
except ImportError as error:
    raise ImportError(f"torch_subspace.grassmann.pyvene needs pyvene (pip install pyvene): {error}") from None


class SubspaceIntervention(TrainableIntervention, DistributedRepresentationIntervention):  # type: ignore[misc]
    """What pyvene's `LowRankRotatedSpaceIntervention` is, with its words: ``embed_dim``, ``low_rank_dimension``.

    `patch` is the `SubspacePatch`. Of ``subspaces``, a list for each example, the rows (or, with a
    ``subspace_partition``, the parts) that are named are swapped, without them all.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.patch = SubspacePatch(int(kwargs["embed_dim"]), int(kwargs["low_rank_dimension"]))

    def forward(self, base: Tensor, source: Tensor, subspaces: Any = None, **kwargs: Any) -> Tensor:
        if subspaces is None:
            return self.patch(base, source)
        basis, parts = self.patch.basis, self.subspace_partition
        swapped = torch.zeros(len(subspaces), len(basis), device=base.device)
        for example, named in enumerate(subspaces):
            swapped[example, named if parts is None else [row for part in named for row in parts[part]]] = 1
        swapped = swapped.view(len(subspaces), *(1,) * (base.dim() - 2), len(basis))
        with full_precision(base):
            wide = torch.promote_types(wide_dtype(base.dtype), basis.dtype)
            change = (source.to(wide) - base.to(wide)) @ basis.mT.to(wide) * swapped
            return (base.to(wide) + change @ basis.to(wide)).to(base.dtype)

    def __str__(self) -> str:
        return f"SubspaceIntervention(dim={len(self.patch.basis)})"
