"""A structural probe: is a tree over tokens there in their vectors, in the metric of a subspace?

    d[t] = || V (x[t+1] - x[t]) ||^2           rows of V orthonormal, found among all such

is held against the trees' own distances between neighbouring tokens. V is a point on the Stiefel manifold, which the
optimisers keep there: the published probe asks for it by a penalty, 5 ||V V' - I||^2, and has a weight to choose.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ..common import check_dense, check_floating, full_precision, told, transformed, whole, wide_dtype
from . import watch
from .frames import is_sharded, local, put
from .stiefel import StiefelModule

IGNORED = -100  # a label that counts for nothing, as in torch


class OrthogonalProbe(StiefelModule):
    """Distances between the projections of neighbouring tokens onto a trained subspace, and labels of these.

    Args:
        in_features: d, of the tokens' vectors.
        dim: k, of the subspace, at most d.
        pair_labels: kinds of pairs of neighbours to tell apart, as the node that joins them; 0 for none.
        token_labels: kinds of tokens to tell apart; 0 for none.
        device, dtype: of the parameters, float32 or float64; by default float32, or torch's default dtype if wider.
        generator: draws the basis, uniformly, and the labels' vectors.

    Attributes:
        basis: (k, d), orthonormal rows, known to `RiemannianSGD` and `RiemannianAdamW` in any group.
        pairs, tokens: (pair_labels, k) and (token_labels, k): a vector of each label in the subspace, or None.

    Called with tokens (..., T, d) it gives the squared distances of neighbours, (..., T - 1). Half types are computed
    in float32, also under autocast.

    Raises:
        TypeError, ValueError: arguments of a wrong kind, or out of range.

    Source: AST-Probe (Hernández López et al., 2022, arXiv 2206.11719), with the constraint kept exactly.

    Example:
        >>> probe = ts.grassmann.OrthogonalProbe(32, 8, token_labels=3)
        >>> x, tree = torch.randn(4, 10, 32), torch.randint(2, 9, (4, 9)).float()
        >>> kind = torch.randint(3, (4, 10))
        >>> opt = ts.RiemannianAdamW(ts.param_groups(probe), lr=1e-2)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     probe.loss(x, tree, token=kind).backward()
        ...     opt.step()
        >>> probe(x).shape, probe.basis_error().item() < 1e-5
        (torch.Size([4, 9]), True)
    """

    pairs: nn.Parameter | None
    tokens: nn.Parameter | None

    def __init__(self, in_features: int, dim: int, pair_labels: int = 0, token_labels: int = 0, *,
                 device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
                 generator: torch.Generator | None = None) -> None:
        super().__init__(in_features, dim, device=device, dtype=dtype, generator=generator)
        for what, labels in (("pairs", pair_labels), ("tokens", token_labels)):
            count = whole("OrthogonalProbe", what.removesuffix("s") + "_labels", labels)
            vectors = self.basis.new_empty(count, self.basis.shape[0]) if count else None
            if vectors is not None and not vectors.is_meta:
                vectors.normal_(std=0.1, generator=generator)
            self.register_parameter(what, None if vectors is None else nn.Parameter(vectors))

    def _reset_others(self, generator: torch.Generator | None) -> None:
        for what in ("pairs", "tokens"):
            vectors = self._parameters.get(what)  # none while the module is made
            if vectors is not None and is_sharded(vectors):  # of one draw, or all shards might be alike
                own = local(vectors)
                put(vectors, own.new_empty(vectors.shape).normal_(std=0.1, generator=generator))
            elif vectors is not None and not vectors.is_meta:
                vectors.normal_(std=0.1, generator=generator)

    def _check(self, name: str, x: Tensor) -> None:
        check_floating(name, "x", x)
        if x.dim() < 2 or x.shape[-1] != self.basis.shape[1] or x.shape[-2] < 1:
            raise ValueError(f"{name}: need x (..., T, {self.basis.shape[1]}), got {tuple(x.shape)}")
        if x.device != self.basis.device:
            raise ValueError(f"{name}: x must be with the basis, on {self.basis.device}, got {x.device}")
        if x.dtype == torch.float64 and self.basis.dtype != torch.float64:
            raise TypeError(f"{name}: x and the basis must share a dtype, got {x.dtype} and {self.basis.dtype}")

    def _projected(self, name: str, x: Tensor) -> Tensor:
        self._check(name, x)
        watch.look(self, "basis")
        with full_precision(x):
            return x.to(torch.promote_types(wide_dtype(x.dtype), self.basis.dtype)) @ self.basis.mT

    def forward(self, x: Tensor) -> Tensor:
        return self._projected("OrthogonalProbe", x).diff(dim=-2).square().sum(-1)

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances of all tokens' projections, (..., T, T), of tokens (..., T, d)."""
        z = self._projected("OrthogonalProbe.distances", x)
        if z.dtype == torch.float64 or z.device.type == "mps":  # which has no float64
            return (z[..., :, None, :] - z[..., None, :, :]).square().sum(-1)
        # by inner products in double, of which float32 keeps all that the differences of its numbers would have
        with full_precision(z):
            wide = z.double()
            product = wide @ wide.mT
        square = product.diagonal(dim1=-2, dim2=-1)
        return (square[..., :, None] + square[..., None, :] - 2 * product).clamp(min=0).to(z.dtype)

    def loss(self, x: Tensor, distance: Tensor, pair: Tensor | None = None, token: Tensor | None = None) -> Tensor:
        """How far the probe is from the trees, to be minimised.

        Args:
            x: tokens, (..., T, d), T at least 2.
            distance: of neighbours in the tree, (..., T - 1). A NaN counts for nothing: padding. Tokens without a known
                distance or a label take no part, whatever stands in their place, NaN too.
            pair: labels of pairs of neighbours, (..., T - 1), int64; -100 counts for nothing.
            token: labels of tokens, (..., T), int64, likewise.

        Returns:
            0-dim: how far distances are off, on average, and the mean cross-entropy of either kind of labels, added up.
            The scores of a pair are products of its projected difference with `pairs`, of a token those of its
            projection with `tokens`.
        """
        name = "OrthogonalProbe.loss"
        check_floating(name, "distance", distance)
        self._check(name, x)
        if distance.shape != (*x.shape[:-2], x.shape[-2] - 1) or x.shape[-2] < 2:
            raise ValueError(f"{name}: need x (..., T, d), T >= 2, and distance (..., T - 1), got {tuple(x.shape)} and "
                             f"{tuple(distance.shape)}")
        if distance.device != x.device:
            raise ValueError(f"{name}: x and distance must be on one device, got {x.device} and {distance.device}")
        known = ~distance.isnan()
        used = _ends(known)
        if pair is not None:
            used = used | _ends(self._known(name, "pair", pair, self.pairs, distance))
        if token is not None:
            used = used | self._known(name, "token", token, self.tokens, x[..., 0])
        if not _seen(used) or not bool(used.all()):
            x = torch.where(used[..., None], x, 0)  # before products: 0 times NaN is NaN
        z = self._projected(name, x)
        step = z.diff(dim=-2)
        off = (step.square().sum(-1) - distance.to(z.dtype).masked_fill(~known, 0)).abs()
        loss = off.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)
        for label, vectors, at in ((pair, self.pairs, step), (token, self.tokens, z)):
            if label is not None and vectors is not None:
                loss = loss + _entropy(label, vectors, at)
        return loss

    @staticmethod
    def _known(name: str, what: str, label: Tensor, vectors: Tensor | None, like: Tensor) -> Tensor:
        """Which labels count, all checked."""
        check_dense(name, what, label)
        if label.dtype != torch.int64:
            raise TypeError(f"{name}: {what} must be int64, got {label.dtype}")
        if vectors is None:
            raise ValueError(f"{name}: {what} labels need a probe of {what}_labels > 0, got {told(label)}")
        if label.shape != like.shape or label.device != like.device:
            raise ValueError(f"{name}: {what} must be {tuple(like.shape)} on {like.device}, got {tuple(label.shape)} "
                             f"on {label.device}")
        known = label != IGNORED
        if _seen(label) and label.numel() > 0 and not bool(((label >= 0) & (label < len(vectors)) | ~known).all()):
            raise ValueError(f"{name}: need 0 <= {what} < {len(vectors)}, got labels {int(label.min())} to "
                             f"{int(label.max())}")
        return known


def _seen(t: Tensor) -> bool:
    """Whether a look at its entries waits for nothing."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def _ends(pairs: Tensor) -> Tensor:
    """Tokens, (..., T), that are in one of these pairs of neighbours, (..., T - 1)."""
    return pad(pairs, (1, 0)) | pad(pairs, (0, 1))


def _entropy(label: Tensor, vectors: Tensor, at: Tensor) -> Tensor:
    with full_precision(at):
        score = (at @ vectors.mT).flatten(0, -2)
        total = cross_entropy(score, label.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (label != IGNORED).sum().clamp(min=1)
