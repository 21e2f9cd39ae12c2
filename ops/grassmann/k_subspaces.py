"""K-subspaces: clusters are subspaces through the origin, a point belongs to the one that holds most of it.

    min over frames U and labels  sum_i ||x_i||^2 - ||U_label(i) x_i||^2

Alternately: labels, by the scores of `subspace_scores`, of which nothing but points x clusters is kept; and frames, the
principal directions of a cluster's points. Either step lowers the sum or leaves it, so that it ends: in a local
minimum, for which several starts are made. A start draws its first subspace about a point, and each further one about
a point that the ones before hold least of (k-means++ with the residual for the distance): the point's nearest by
|cosine|.

A score is good to eps ||x||^2, so a distance by the difference of squares to sqrt(eps) ||x|| only. That is enough to
assign by, but where scores differ by less, as beside an offset that subspaces share. What tells these apart, is given
out or summed at the end are lengths of residuals x - U'U x, in float64, a few rows at a time: to a point's own
subspace, and to others that hold more than half of it. To those that hold less the difference is good to eps ||x||.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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

CHUNK = 1 << 17  # entries of the points whose residuals are formed at a time: 1 MiB
DOUBT = 32  # scores that differ by no more than so many eps of a point's energy may have changed places


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
        inertia_: the squared lengths of what the points' subspaces don't hold, summed; inf above what a float holds.
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
        with _plainly():
            scaled, _ = _scaled(x, (0, 1))  # all alike, as the longer points count for more
            energy = scaled.square().sum(1)
            for seed in draw.randint(np.iinfo(np.int32).max, size=starts):
                found = _alternate(scaled, energy, count, dim, most, self.tol, torch.Generator().manual_seed(int(seed)))
                left = float(_left(scaled, found[1], found[0]).square().sum())
                if best is None or left < best[0]:
                    best = left, *found
            _, frames, _, self.n_iter_, ended = best
            labels, self.inertia_ = _assigned(x, frames)  # as `predict` and `score` will say
        if not ended:
            warnings.warn(f"KSubspaces: labels still changed after max_iter={most} alternations", ConvergenceWarning,
                          stacklevel=2)
        self.frames_, self.labels_ = frames.numpy(), labels.numpy().astype(np.int32)
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """The subspace that holds most of each point, (n_samples,)."""
        x, frames = self._given(X)
        with _plainly():
            x, _ = _scaled(x)
            return _nearest(x, x.square().sum(1), frames)[0].numpy().astype(np.int32)

    def transform(self, X: npt.ArrayLike) -> npt.NDArray[np.floating]:
        """Distances of the points to the subspaces, (n_samples, n_clusters); inf above what X's dtype holds."""
        x, frames = self._given(X)
        with _plainly():
            return _distances(x, frames).numpy()

    def score(self, X: npt.ArrayLike, y: Any = None) -> float:
        """Less the squared distances of the points to the subspaces nearest to them, summed."""
        x, frames = self._given(X)
        with _plainly():
            return -_assigned(x, frames)[1]

    def _given(self, X) -> tuple[Tensor, Tensor]:
        check_is_fitted(self, "frames_")
        return self._checked(X, reset=False), torch.from_numpy(self.frames_)

    def _checked(self, X, reset) -> Tensor:
        if isinstance(X, Tensor):
            check_dense("KSubspaces", "X", X)
            if X.is_meta:
                raise ValueError(f"KSubspaces: X must hold numbers, got {told(X)} on the meta device")
            X = X.detach().cpu()
            X = (X.float() if X.dtype in HALF else X).numpy()
        elif X is None:  # numpy's nan
            raise TypeError("KSubspaces: X must be points (n, f), got None")
        with np.errstate(invalid="ignore"):  # it first adds up all entries: of large ones that may be inf - inf
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


@contextmanager
def _plainly() -> Iterator[None]:
    """Numbers in their own precision, without derivatives, whatever torch is set to."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _scaled(x: Tensor, dim: int | tuple[int, int] = 1) -> tuple[Tensor, Tensor]:
    """Each point, or with dim=(0, 1) all alike, over a power of two near its largest entry, and the power.

    So no square is lost, and as powers of two change no digit, no label depends on a size. Powers are held where they
    and their inverses are normal numbers, 2^-126 to 2^126 in float32: beyond, entries are small or large by a few bits.
    """
    tiny = torch.finfo(x.dtype).tiny
    size = torch.linalg.vector_norm(x, math.inf, dim, keepdim=True).clamp(tiny, 1 / tiny)
    power = size / (2 * torch.frexp(size).mantissa)  # exact, which torch's 2^exponent need not be
    return x / power, power


def _bases(frames: Tensor) -> Tensor:
    """Bases (count, n, dim) of the frames' subspaces, orthonormal in float64: a frame in float32 is so to eps only."""
    return torch.linalg.qr(frames.double().mT).Q


def _residuals(x: Tensor, rows: Tensor, basis: Tensor) -> Tensor:
    """Lengths, in float64, of what a subspace doesn't hold of some of the points."""
    found = [x.new_empty(0, dtype=torch.float64)]
    for some in rows.split(max(1, CHUNK // x.shape[1])):
        points = x[some].double()
        found.append(torch.addmm(points, points @ basis, basis.mT, alpha=-1).norm(dim=1))
    return torch.cat(found)


def _left(x: Tensor, labels: Tensor, frames: Tensor) -> Tensor:
    """The points' distances to their own subspaces, in float64."""
    left = x.new_empty(len(x), dtype=torch.float64)
    for label, basis in enumerate(_bases(frames)):
        rows = (labels == label).nonzero()[:, 0]
        left[rows] = _residuals(x, rows, basis)
    return left


def _nearest(x: Tensor, energy: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """(labels, squared distances) of scaled points: by the largest score, or the least residual of those that rounding
    may have made the largest. Of points that are at most half held distances then differ by no more than rounding."""
    scores = subspace_scores(x, frames.to(x.dtype))
    held, labels = scores.max(1)
    left = (energy - held).clamp_(min=0)
    bound = torch.maximum(held.sub(energy, alpha=DOUBT * torch.finfo(x.dtype).eps), energy / 2)
    rows = ((scores > bound[:, None]).sum(1) > 1).nonzero()[:, 0]
    alike = scores[rows] > bound[rows, None]
    if x.dtype == torch.float32 and 2 * alike.sum() > alike.numel():  # scores again, but in float64
        wide = _bases(frames).mT.contiguous()
        for some in rows.split(max(1, 32 * CHUNK // x.shape[1])):
            points = x[some].double()
            labels[some], least = _nearest(points, points.square().sum(1), wide)
            left[some] = least.to(x.dtype)
    elif len(rows):
        far = x.new_full(alike.shape, math.inf)
        for label in alike.any(0).nonzero()[:, 0].tolist():
            some = alike[:, label].nonzero()[:, 0]
            far[some, label] = _residuals(x, rows[some], _bases(frames[label])).to(x.dtype)
        least, labels[rows] = far.min(1)
        left[rows] = least.square()
    return labels, left


def _assigned(x: Tensor, frames: Tensor) -> tuple[Tensor, float]:
    """(labels, the sum of the squared distances to the points' own subspaces), of points of any size."""
    x, power = _scaled(x)
    labels, _ = _nearest(x, x.square().sum(1), frames)
    return labels, float((_left(x, labels, frames) * power[:, 0]).square().sum())


def _distances(x: Tensor, frames: Tensor) -> Tensor:
    """Of all points, of any size, to all subspaces: sqrt(||x||^2 - score) where at most half of ||x||^2 is held."""
    x, power = _scaled(x)
    scores, energy = subspace_scores(x, frames.to(x.dtype)), x.square().sum(1, keepdim=True)
    near = (scores > energy / 2).mT.contiguous()
    far = scores.sub_(energy).neg_().clamp_(min=0).sqrt_()
    for label, basis in enumerate(_bases(frames)):
        rows = near[label].nonzero()[:, 0]
        far[rows, label] = _residuals(x, rows, basis).to(far.dtype)
    return far.mul_(power)


def _start(x: Tensor, energy: Tensor, count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Frames about points drawn by what the frames before leave of them."""
    unit, left, frames = normalize(x, dim=1), energy, []
    near = min(len(x), max(2 * dim, len(x) // (4 * count)))
    for _ in range(count):
        left = left.double()
        sums = (left if left.any() else torch.ones_like(left)).cumsum(0)
        drawn = torch.rand((), dtype=sums.dtype, device=sums.device, generator=generator) * sums[-1]
        at = min(int(torch.searchsorted(sums, drawn, right=True)), len(x) - 1)
        chosen = (unit @ unit[at]).abs().topk(near).indices
        frames.append(principal_frame(x[chosen], dim, generator))
        _, left = _nearest(x, energy, torch.stack(frames))
    return torch.stack(frames)


def _frames_of(x: Tensor, labels: Tensor, left: Tensor, count: int, dim: int, generator: torch.Generator) -> Tensor:
    """The principal directions of each cluster's points; clusters without any begin anew, about the worst held."""
    sizes = labels.bincount(minlength=count)
    spare = iter(left.topk(int((sizes == 0).sum())).indices)
    own = labels.argsort(stable=True).split(sizes.tolist())
    own = (x.index_select(0, rows) if len(rows) else x[next(spare)][None] for rows in own)  # one at a time
    return torch.stack([principal_frame(points, dim, generator) for points in own])


def _alternate(x: Tensor, energy: Tensor, count: int, dim: int, most: int, tol: float, generator: torch.Generator):
    """(frames, labels, alternations, whether it ended) of one start."""
    frames, labels, before = _start(x, energy, count, dim, generator), None, float("inf")
    for turn in range(1, most + 1):
        found, left = _nearest(x, energy, frames)
        now = float(left.sum(dtype=torch.float64))
        if labels is not None and (before - now <= tol * before or torch.equal(found, labels)):
            return frames, found, turn, True
        labels, before = found, now
        frames = _frames_of(x, labels, left, count, dim, generator)
    return frames, _nearest(x, energy, frames)[0], most, False
