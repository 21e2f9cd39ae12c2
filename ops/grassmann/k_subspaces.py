"""K-subspaces: clusters are subspaces through the origin, a point belongs to the one that holds most of it.

    min over frames U and labels  sum_i ||x_i||^2 - ||U_label(i) x_i||^2

Alternately: labels, by the scores of `subspace_scores`, of which nothing but points x clusters is kept; and frames, the
principal directions of a cluster's points. Either step lowers the sum or leaves it, so that it ends: in a local
minimum, for which several starts are made. A start draws its first subspace about a point, and each further one about
a point that the ones before hold least of (k-means++ with the residual for the distance): the point's nearest by
|cosine|.
"""
from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..common import HALF, check_dense, check_number, told, whole
from .initial import principal_frame
from .subspaces import AT_LEAST_0, subspace_scores

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(f"KSubspaces needs scikit-learn >= 1.6 (pip install scikit-learn): {error}") from None


class KSubspaces(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Clusters points that lie near some low-dimensional subspaces through the origin.

    On points as they come, subspaces must be what tells clusters apart: raw images are better clustered by others
    (`torch_subspace.ManifoldClustering` learns features for which it holds). Centre the points, or leave their offset
    in as one direction more, as fits them.

    Args:
        n_clusters: subspaces to find.
        dim: of each one, at most the number of features.
        n_init: starts; the best result is kept.
        max_iter: of a start, alternations at most; a ConvergenceWarning where the best one needed more.
        tol: a start ends where the residual fell by less than this share of it, or no label changed.
        random_state: seed, or a numpy RandomState, of the starts.

    Attributes:
        frames_: (n_clusters, dim, n_features), orthonormal rows in the order of their energy.
        labels_: (n_samples,), a cluster of each point.
        inertia_: the squared lengths of what the points' subspaces don't hold, summed.
        n_iter_: alternations of the best start.
        n_features_in_: features seen in `fit`.

    Raises, in `fit`, TypeError or ValueError on parameters or points that don't fit: fewer points than clusters, more
    dimensions than features, numbers that are not finite.

    Source: Bradley and Mangasarian, k-plane clustering (2000); Tseng, nearest q-flat to m points (2000).

    Example:
        >>> import numpy as np
        >>> draw = np.random.RandomState(0)
        >>> X = np.concatenate([draw.randn(40, 2) @ draw.randn(2, 9) for _ in range(3)])
        >>> model = ts.grassmann.KSubspaces(3, dim=2, random_state=0).fit(X)
        >>> sorted(np.bincount(model.labels_).tolist()), bool(model.inertia_ < 1e-9)
        ([40, 40, 40], True)
    """

    def __init__(self, n_clusters: int = 8, dim: int = 2, *, n_init: int = 10, max_iter: int = 100, tol: float = 1e-6,
                 random_state: int | np.random.RandomState | None = None) -> None:
        self.n_clusters = n_clusters
        self.dim = dim
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: Any = None) -> KSubspaces:
        """Find subspaces of the points X (n_samples, n_features), float32 or float64; y is not looked at."""
        x = self._checked(X, reset=True)
        count, dim, starts, most = (whole("KSubspaces", name, getattr(self, name), 1)
                                    for name in ("n_clusters", "dim", "n_init", "max_iter"))
        check_number("KSubspaces", "tol", self.tol, AT_LEAST_0)
        if count > len(x):
            raise ValueError(f"KSubspaces: n_clusters must be at most n_samples, got {count} with n_samples={len(x)}")
        if dim > x.shape[1]:
            raise ValueError(f"KSubspaces: dim must be at most n_features={x.shape[1]}, got {dim}")
        draw = self._generator()
        best = None
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            longest = x.abs().amax()
            scaled = x / longest if longest > 0 else x  # so that no square is lost
            energy = scaled.square().sum(1)
            for seed in draw.randint(np.iinfo(np.int32).max, size=starts):
                found = _alternate(scaled, energy, count, dim, most, self.tol, torch.Generator().manual_seed(int(seed)))
                if best is None or found[2] < best[2]:
                    best = found
        frames, labels, inertia, self.n_iter_, ended = best
        if not ended:
            warnings.warn(f"KSubspaces: labels still changed after max_iter={most} alternations", ConvergenceWarning,
                          stacklevel=2)
        self.frames_, self.labels_ = frames.numpy(), labels.numpy().astype(np.int32)
        self.inertia_ = inertia * float(longest) ** 2
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """The subspace that holds most of each point, (n_samples,)."""
        return self._scores(X)[1].argmax(1).numpy().astype(np.int32)

    def transform(self, X: npt.ArrayLike) -> npt.NDArray[np.floating]:
        """Distances of the points to the subspaces, (n_samples, n_clusters)."""
        x, scores = self._scores(X)
        return (x.square().sum(1, keepdim=True) - scores).clamp_(min=0).sqrt_().numpy()

    def score(self, X: npt.ArrayLike, y: Any = None) -> float:
        """Less the squared distances of the points to the subspaces nearest to them, summed."""
        x, scores = self._scores(X)
        return -float((x.square().sum(1) - scores.amax(1)).clamp(min=0).sum(dtype=torch.float64))

    def _scores(self, X) -> tuple[Tensor, Tensor]:
        check_is_fitted(self, "frames_")
        x = self._checked(X, reset=False)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return x, subspace_scores(x, torch.from_numpy(self.frames_).to(x.dtype))

    def _checked(self, X, reset) -> Tensor:
        if isinstance(X, Tensor):
            check_dense("KSubspaces", "X", X)
            if X.is_meta:
                raise ValueError(f"KSubspaces: X must hold numbers, got {told(X)} on the meta device")
            X = X.detach().cpu()
            X = (X.float() if X.dtype in HALF else X).numpy()
        elif X is None:  # numpy's nan
            raise TypeError("KSubspaces: X must be points (n, f), got None")
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=reset)
        return torch.from_numpy(np.require(X, None, ["C", "W"]))

    def _generator(self) -> np.random.RandomState:
        seed = self.random_state
        try:
            kinds = (int, np.integer, np.random.RandomState, type(None))
            if isinstance(seed, kinds) and not isinstance(seed, bool):
                return check_random_state(seed)
        except ValueError:
            pass
        raise ValueError("KSubspaces: random_state must be a whole number from 0 to 2**32 - 1, a numpy RandomState or "
                         f"None, got {told(seed)}")

    @property
    def _n_features_out(self) -> int:
        return self.frames_.shape[0]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _start(x: Tensor, energy: Tensor, count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Frames about points drawn by what the frames before leave of them."""
    unit, left, frames = normalize(x, dim=1), energy, []
    near = min(len(x), max(2 * dim, len(x) // (4 * count)))
    for _ in range(count):
        left = left.clamp(min=0).double()
        sums = (left if left.any() else torch.ones_like(left)).cumsum(0)
        drawn = torch.rand((), dtype=sums.dtype, device=sums.device, generator=generator) * sums[-1]
        at = min(int(torch.searchsorted(sums, drawn, right=True)), len(x) - 1)
        chosen = (unit @ unit[at]).abs().topk(near).indices
        frames.append(principal_frame(x[chosen], dim, generator))
        left = energy - subspace_scores(x, torch.stack(frames)).amax(1)
    return torch.stack(frames)


def _frames_of(x: Tensor, labels: Tensor, left: Tensor, count: int, dim: int, generator: torch.Generator) -> Tensor:
    """The principal directions of each cluster's points; clusters without any begin anew, about the worst held."""
    sizes = labels.bincount(minlength=count)
    spare = iter(left.topk(int((sizes == 0).sum())).indices)
    own = labels.argsort(stable=True).split(sizes.tolist())
    own = [x[rows] if len(rows) else x[next(spare)][None] for rows in own]
    return torch.stack([principal_frame(points, dim, generator) for points in own])


def _alternate(x: Tensor, energy: Tensor, count: int, dim: int, most: int, tol: float, generator: torch.Generator):
    """(frames, labels, what is left, alternations, whether it ended) of one start."""
    frames, labels, before = _start(x, energy, count, dim, generator), None, float("inf")
    for turn in range(1, most + 1):
        held, found = subspace_scores(x, frames).max(1)
        left = (energy - held).clamp_(min=0)
        now = float(left.sum(dtype=torch.float64))
        if labels is not None and (before - now <= tol * before or torch.equal(found, labels)):
            return frames, found, now, turn, True
        labels, before = found, now
        frames = _frames_of(x, labels, left, count, dim, generator)
    held, labels = subspace_scores(x, frames).max(1)
    return frames, labels, float((energy - held).clamp_(min=0).sum(dtype=torch.float64)), most, False
