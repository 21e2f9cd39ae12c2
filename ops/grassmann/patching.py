"""Subspace patching: a hidden vector with its coordinates in a subspace taken from another one, and what that shows.

    patched = base + (source - base) V' V            rows of V orthonormal

Distributed alignment search trains V so that a model with patched activations behaves as if the source had had its say
about one attribute and the base about all others; V is a point on the Stiefel manifold, which `RiemannianSGD` moves,
where the usual parametrisation makes a d x d rotation anew at each forward. A direction that changes behaviour need
not be where the model keeps the attribute: `rowspace_split` tells what later weights read from what they can't see.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..common import check_floating, full_precision, over_largest, wide_dtype
from . import watch
from .stiefel import StiefelModule


def subspace_patch(base: Tensor, source: Tensor, basis: Tensor) -> Tensor:
    """``base`` with its part in a subspace taken from ``source``.

    Args:
        base: vectors to be changed, (..., d).
        source: vectors to take from, of the same shape, or one that broadcasts with it.
        basis: (r, d), orthonormal rows, or (..., r, d), whose leading dimensions broadcast with those of base: a
            subspace each. Or a single direction v of any length, (d,): then patched is
            base + (<source, v> - <base, v>) / <v, v> v; along v = 0, which is no direction, nothing is taken.

    Returns:
        base + (source - base) V' V, of base's dtype; float16 and bfloat16 are computed in float32, also under autocast,
        and a basis may be float32 for them. By the formula, an entry of base or source that is not finite
        leaves no entry of its vector finite, not even those that V does not move: 0 times inf is NaN.

    Differentiable in all three; for a ``basis`` whose rows are orthonormal only nearly so, the formula as it stands.

    Raises:
        TypeError: a tensor is not dense and floating-point, or dtypes do not fit.
        ValueError: shapes or devices do not fit.

    Source: interchange interventions (Geiger et al., 2021), in subspaces: distributed alignment search (Geiger et al.,
    2023, arXiv 2303.02536).

    Example:
        >>> base, source = torch.zeros(4), torch.arange(1.0, 5.0)
        >>> ts.grassmann.subspace_patch(base, source, torch.eye(4)[:2])
        tensor([1., 2., 0., 0.])
        >>> ts.grassmann.subspace_patch(base, source, torch.tensor([0.0, 0.0, 2.0, 2.0]))
        tensor([0.0000, 0.0000, 3.5000, 3.5000])
    """
    name = "subspace_patch"
    for what, t in (("base", base), ("source", source), ("basis", basis)):
        check_floating(name, what, t)
        if t.device != base.device:
            raise ValueError(f"{name}: base and {what} must be on one device, got {base.device} and {t.device}")
    wide = wide_dtype(base.dtype)
    if source.dtype != base.dtype or basis.dtype not in (base.dtype, wide):
        raise TypeError(f"{name}: base, source and basis must share a dtype, got {base.dtype}, {source.dtype} and "
                        f"{basis.dtype}")
    if base.dim() < 1 or basis.dim() < 1 or base.shape[-1] != basis.shape[-1]:
        raise ValueError(f"{name}: need base (..., d) and basis (..., r, d) or (d,), got {tuple(base.shape)} and "
                         f"{tuple(basis.shape)}")
    if source.dim() < 1 or source.shape[-1] != base.shape[-1]:
        raise ValueError(f"{name}: source must be shaped like base, got {tuple(source.shape)} and {tuple(base.shape)}")
    if basis.dim() > 1 and not 0 < basis.shape[-2] <= basis.shape[-1]:
        raise ValueError(f"{name}: basis must have 0 < r <= d, got shape {tuple(basis.shape)}")
    try:
        torch.broadcast_shapes(base.shape[:-1], source.shape[:-1], basis.shape[:-2])
    except RuntimeError:
        raise ValueError(f"{name}: the leading dimensions of base, source and basis must broadcast, got "
                         f"{tuple(base.shape)}, {tuple(source.shape)} and {tuple(basis.shape)}") from None
    with full_precision(base):
        start, v = base.to(wide), basis.to(wide)
        change = source.to(wide) - start
        if v.dim() == 1:
            part = _along(change, v)
        elif v.dim() == 2:
            part = change @ v.mT @ v
        else:
            part = (v.mT @ (v @ change[..., None]))[..., 0]
        return (start + part).to(base.dtype)


def _along(change: Tensor, v: Tensor) -> Tensor:
    """<change, v> / <v, v> v, of a v of any length."""
    if not v.shape[0]:
        return torch.zeros_like(change)
    v = over_largest(v)
    square = v @ v
    return ((change @ v) / torch.where(square == 0, 1, square))[..., None] * v


class SubspacePatch(StiefelModule):
    """Takes the part in a trained subspace from another vector: distributed alignment search.

    Args:
        in_features: d, of the activations.
        dim: r, of the subspace, at most d.
        device, dtype: of the basis, float32 or float64; by default float32, or torch's default dtype if that is wider.
        generator: draws the basis, uniformly.

    Attributes:
        basis: (r, d), orthonormal rows. `RiemannianSGD` and `RiemannianAdamW` know it for a point on the Stiefel
            manifold in any group, and `param_groups` gives it one of its own. `half()` and `bfloat16()` leave it in
            float32.

    Called with (base, source), it is `subspace_patch` of them. Of several attributes each may have a patch of its own,
    or a span of rows of one, ``subspace_patch(base, source, patch.basis[2:5])``: orthonormal rows keep them apart.

    Raises:
        TypeError: a size is not an int, or dtype is neither float32 nor float64.
        ValueError: not 1 <= r <= d.

    Source: distributed alignment search (Geiger et al., 2023, arXiv 2303.02536), on the manifold itself.

    Example:
        >>> patch = ts.grassmann.SubspacePatch(8, 2)
        >>> base, source = torch.randn(5, 8), torch.randn(5, 8)
        >>> opt = ts.RiemannianSGD(patch.parameters(), lr=0.1)
        >>> before = (patch(base, source) - source).square().mean()    # what does a source have that a base lacks?
        >>> for _ in range(50):
        ...     opt.zero_grad()
        ...     loss = (patch(base, source) - source).square().mean()
        ...     loss.backward()
        ...     opt.step()
        >>> bool(loss < before), patch.basis_error().item() < 1e-5
        (True, True)
    """

    def __init__(self, in_features: int, dim: int, *, device: torch.device | str | int | None = None,
                 dtype: torch.dtype | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(in_features, dim, device=device, dtype=dtype, generator=generator)

    def forward(self, base: Tensor, source: Tensor) -> Tensor:
        watch.look(self, "basis")
        return subspace_patch(base, source, self.basis)


def rowspace_split(v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors split into what a linear map reads and what it can't see.

    Args:
        v: (..., d).
        weight: (m, d), as `torch.nn.Linear` has it: the next layer's.

    Returns:
        (row, null), shaped like v and of its dtype: v = row + null with row in the span of the rows of weight and
        ``weight @ null`` zero. Singular values below max(m, d) eps of the largest count as zero, with weight's dtype's
        eps, but float32's for half types: bfloat16's would make all of them zero from d = 128 on. Computed in float64;
        differentiable in v, not in weight.

    A patch along v that moves behaviour, where along ``null`` alone and along ``row`` alone it moves nothing, is an
    illusion: an attribute that was written where nothing reads it, carried over to where nothing was written. A genuine
    one is moved by ``row`` alone. Along ``null`` nothing ever moves, where weight is all that reads the vector.

    Raises:
        TypeError: not dense floating-point tensors, or of two dtypes.
        ValueError: shapes or devices do not fit, or weight is not finite; in a graph of torch.compile that is for
            torch.linalg.svd to say.

    Source: the interpretability illusion of subspace patching (Makelov, Lange and Nanda, 2023, arXiv 2311.17030).

    Example:
        >>> weight = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
        >>> row, null = ts.grassmann.rowspace_split(torch.tensor([1.0, 2.0, 3.0]), weight)
        >>> row.round(decimals=4).abs(), null.round(decimals=4).abs()
        (tensor([1., 2., 0.]), tensor([0., 0., 3.]))
    """
    name = "rowspace_split"
    check_floating(name, "v", v)
    check_floating(name, "weight", weight)
    if v.dtype != weight.dtype:
        raise TypeError(f"{name}: v and weight must share a dtype, got {v.dtype} and {weight.dtype}")
    if v.device != weight.device:
        raise ValueError(f"{name}: v and weight must be on one device, got {v.device} and {weight.device}")
    if weight.dim() != 2 or v.dim() < 1 or v.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{name}: need v (..., d) and weight (m, d), got {tuple(v.shape)} and {tuple(weight.shape)}")
    with full_precision(v):
        wide = torch.float32 if v.device.type == "mps" else torch.float64
        rows = _row_space(name, weight.detach().to(wide), torch.finfo(wide_dtype(weight.dtype)).eps)
        row = v.to(wide) @ rows.mT @ rows
        return row.to(v.dtype), (v.to(wide) - row).to(v.dtype)


def _row_space(name: str, weight: Tensor, eps: float) -> Tensor:
    """Orthonormal rows that span those of the weight, and zeros after them."""
    if weight.is_meta or not weight.numel():
        return weight[:0]
    if not torch.compiler.is_compiling() and not weight.isfinite().all():
        raise ValueError(f"{name}: weight is not finite")
    _, size, rows = torch.linalg.svd(weight, full_matrices=False)
    return rows * (size > size[0] * max(weight.shape) * eps)[:, None]
