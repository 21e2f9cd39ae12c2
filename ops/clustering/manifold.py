"""Clustering on unions of subspaces and other curved shapes, with scikit-learn's manners.

`ManifoldClustering` learns features whose classes lie on subspaces as far apart as the coding rate can tell, without
labels: Ding et al., Unsupervised Manifold Linearizing and Clustering (MLC), arXiv 2301.01805. Needs scikit-learn.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from ..common import HALF, check_dense, check_module
from ..files import check_path
from ..metrics import effective_rank
from ..progress import progress
from ..rates.losses import MLCLoss
from .files import read_clustering, write_clustering
from .network import ROWS, Network, build
from .parameters import check_parameters
from .randomness import Randomness
from .readout import MOST, Walk
from .training import cluster_loss, ordinary, rate_loss, train
from .views import viewer

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(f"ManifoldClustering needs scikit-learn >= 1.6 (pip install scikit-learn): {error}") from None


class ManifoldClustering(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Clusters points by learning features in which each cluster is a subspace of its own.

    Training has two phases. First the features' coding rate R is maximised, which spreads the points over the sphere,
    while views of one point are kept together. Then a second head, a copy of the first, says by a doubly stochastic
    matrix Γ who belongs together, and -R(Z) + Rc(Z, Γ) + ½ reg ‖Γ‖² is minimised over both. The clusters are read from
    Γ by spectral clustering, the labels of the true classes are used nowhere.

    Args:
        n_clusters: clusters to find. None: as many as the features are coded with in the fewest nats, 32 at most; for
            clusters that are subspaces, or compact. A curved one counts as several.
        encoder: module from batches to features (n, ...), flattened; a copy in float32 is trained, except where its
            parameters don't require gradients. None: a perceptron with layers `hidden`.
        hidden: widths of that perceptron's layers.
        dim: of the learned features; a cluster can be up to about dim / n_clusters dimensional.
        eps: the coding rate's ε², the finer the smaller.
        eta: temperature of Γ; .1 to .175 in the paper.
        reg: weight of Γ's norm, which keeps it from the identity.
        invariance: weights, in the first and the second phase, of 1 - cos between a point's views and their mean.
        augment: "noise"; "images", for points that are images of `image_shape`; a callable from a batch to another view
            of it, both float32 on `device`, called once per view; None: no views.
        image_shape: (height, width) or (channels, height, width) of a point. X may then have it too, and the encoder
            is given ``(n, *image_shape)``.
        views: of each point in a batch.
        neighbors: half of the views are of one of so many points that are nearest to the point, or to views of it; 0
            for views of the point alone. The search takes n² distances, for a few views.
        init_epochs, epochs: passes over the data in the first and the second phase.
        batch_size: points in a batch at most (three, where it is 2 and one would be alone). Γ is batch_size x
            batch_size; it needs several points of each cluster.
        lr, weight_decay: of AdamW; the rate falls to zero by a cosine in each phase.
        readout_size: points at most in the Γ that the clusters are read from, drawn at random. The others join the
            cluster they belong to most by Γ, as new points do.
        device: where to compute.
        random_state: seed, numpy RandomState or None; an int makes fit repeatable. Global generators stay as they are;
            an encoder and an `augment` that draw from torch's do so one fit at a time, where several run in threads.
        verbose: show a progress bar (tqdm).
        callbacks: callables (estimator, record), called with each epoch's entry of `history_`; True ends the phase.

    Attributes:
        labels_: int64 array (n,), clusters of the points that were fitted, from 0 on.
        n_clusters_: how many clusters were found.
        history_: list of dicts: phase ("rate" or "clusters"), epoch, loss, effective_rank of the last batch's features.
        network_: the trained `Network`.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Raises:
        ValueError: from fit, a parameter of a wrong type (then it is a TypeError, too) or out of range, X with NaN or
            too few points, an encoder that doesn't fit X.
        RuntimeError: from fit, a loss that is not finite.

    Fewer distinct points than clusters give as many clusters, and a ConvergenceWarning. Autocast, default dtypes and
    devices, no_grad and inference_mode around a call change nothing.

    Source: arXiv 2301.01805; the invariance term after arXiv 2304.03977.

    Example:
        >>> X = torch.randn(60, 6) + torch.arange(60)[:, None] % 2 * torch.tensor([9.0, 0, 0, 0, 0, 0])
        >>> found = ts.ManifoldClustering(2, init_epochs=1, epochs=1, neighbors=5, random_state=0).fit(X.numpy())
        >>> found.labels_.shape, found.transform(X.numpy()[:3]).shape
        ((60,), (3, 32))
    """

    def __init__(
        self,
        n_clusters: int | None = 8,
        *,
        encoder: nn.Module | None = None,
        hidden: Sequence[int] = (256,),
        dim: int = 32,
        eps: float = 0.2,
        eta: float = 0.1,
        reg: float = 0.05,
        invariance: Sequence[float] = (100.0, 10.0),
        augment: str | Callable[[Tensor], Tensor] | None = "noise",
        image_shape: Sequence[int] | None = None,
        views: int = 4,
        neighbors: int = 15,
        init_epochs: int = 150,
        epochs: int = 60,
        batch_size: int = 600,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        readout_size: int = 2000,
        device: str | torch.device = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
        callbacks: Sequence[Callable[..., object]] | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.encoder = encoder
        self.hidden = hidden
        self.dim = dim
        self.eps = eps
        self.eta = eta
        self.reg = reg
        self.invariance = invariance
        self.augment = augment
        self.image_shape = image_shape
        self.views = views
        self.neighbors = neighbors
        self.init_epochs = init_epochs
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.readout_size = readout_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.callbacks = callbacks

    # ------------------------------------------------------------------ fit
    def fit(self, X: npt.ArrayLike, y: object = None) -> ManifoldClustering:
        """Learn features and clusters of X (n, f), or ``(n, *image_shape)``; y is not used."""
        self._check_parameters()
        X = self._checked(X, reset=True)
        if len(X) < max(2, self.n_clusters or 0):
            raise ValueError(f"ManifoldClustering: n_samples={len(X)} should be >= n_clusters={self.n_clusters}, and "
                             "two at least")
        draws = check_random_state(self.random_state)
        vars(self).pop("labels_", None)  # from here on the old parts are replaced: an error leaves nothing fitted
        epochs = self.init_epochs + self.epochs
        with ordinary(torch.device(self.device), True), progress(epochs, self.verbose, "epoch") as bar:
            random = Randomness(draws.randint(2**31 - 1), self.device)
            self._mean, self._scale = _spread(X, self.image_shape)
            points = self._scaled(X)
            self.network_ = self._build(points, random.host)
            self.history_ = []
            bar.set_description("neighbors")
            view = viewer(points, self.augment, self.image_shape, self.neighbors, random)
            loss = rate_loss(float(self.eps), self.invariance[0])
            self._train("rate", points, view, loss, self.init_epochs, random, bar)
            self.network_.copy_head()
            loss = cluster_loss(self._mlc(), self.invariance[1])
            self._train("clusters", points, view, loss, self.epochs, random, bar)
            self.network_.eval()
            bar.set_description("clusters")
            z, c = self._embed(points)
            chosen = torch.as_tensor(draws.permutation(len(c))[: self.readout_size])
            self._read_out(z[chosen], c[chosen], self._distinct(points), draws)
            labels = self._assigned(c)
            labels[chosen] = self._anchor_labels
            self.labels_ = labels.numpy()
        return self

    def _train(self, phase, points, view, loss_of, epochs, random, bar) -> None:
        network = self.network_.train()
        losses = train(network if self.encoder is None else random.lend_to(network), points, view, loss_of, random,
                       parameters=network.parameters(), views=self.views, epochs=epochs, batch_size=self.batch_size,
                       lr=self.lr, weight_decay=self.weight_decay)
        bar.set_description(phase)
        for epoch, (total, z) in enumerate(losses):
            if not np.isfinite(total):
                raise RuntimeError(f"ManifoldClustering: the loss is {total} in epoch {epoch} of phase {phase!r}; "
                                   "a smaller lr or a larger eps may help")
            rank = effective_rank(normalize(z.mean(0), dim=-1))
            record = {"phase": phase, "epoch": epoch, "loss": total, "effective_rank": rank}
            self.history_.append(record)
            bar.update()
            bar.set_description(f"{phase}: loss {total:.3f}")
            answers = [callback(self, record) for callback in self.callbacks or ()]
            if any(answer is True for answer in answers):
                break

    def _mlc(self) -> MLCLoss:
        return MLCLoss(float(self.eps), float(self.eta), float(self.reg))

    # ------------------------------------------------------------- read-out
    def _distinct(self, points) -> int:
        """How many clusters there can be: `n_clusters`, or the distinct points where there are fewer."""
        seen: set[bytes] = set()
        most = min(MOST, self.readout_size) if self.n_clusters is None else self.n_clusters
        for row in points.flatten(1).cpu().numpy():
            seen.add(row.tobytes())
            if len(seen) >= most:
                return most
        if self.n_clusters is None:
            return len(seen)
        warnings.warn(f"ManifoldClustering: the distinct points, {len(seen)}, and so the clusters, are fewer than "
                      f"n_clusters={self.n_clusters}", ConvergenceWarning, stacklevel=3)
        return len(seen)

    @torch.no_grad()
    def _read_out(self, z, c, clusters, random) -> None:
        """Cluster the anchors (m, dim) by their plan, and keep what it takes to extend the plan to other points."""
        plan = self._mlc().membership(c)
        walk = Walk(plan)
        if self.n_clusters is None:
            self._anchor_labels = walk.divide_briefly(z, float(self.eps), clusters, random)
        else:
            self._anchor_labels = walk.divide(clusters, random)
        self.n_clusters_ = int(self._anchor_labels.max()) + 1
        # Γ_jj = g_j² exp(1/η) tells the potentials g of the plan Γ_ij = g_i exp(|c_i'c_j|/η) g_j
        self._anchors, self._potentials = c, plan.diagonal().log() / 2

    def _belonging(self, c) -> Tensor:
        """(n, clusters): the rows of the plan that points c would have, summed by cluster."""
        member = one_hot(self._anchor_labels).to(c)
        rows = ((c @ self._anchors.to(c).mT).abs() / self.eta + self._potentials.to(c)).softmax(1)
        return rows @ member

    def _assigned(self, c) -> Tensor:
        return torch.cat([self._belonging(part).argmax(1) for part in c.split(ROWS)]).cpu()

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Clusters of points X (n, f): those to which they belong most by Γ, extended to them. int64 (n,)."""
        with self._computing():
            return self._assigned(self._embed(self._known(X))[1]).numpy()

    def transform(self, X: npt.ArrayLike) -> npt.NDArray[np.floating[Any]]:
        """Features of points X (n, f): unit rows, float32 (n, dim)."""
        with self._computing():
            return self._embed(self._known(X))[0].cpu().numpy()

    def _computing(self):
        return ordinary(torch.device(self.device), False)

    @torch.no_grad()
    def _embed(self, points) -> tuple[Tensor, Tensor]:
        parts = [self.network_(part) for part in points.split(ROWS)]
        return torch.cat([z for z, _ in parts]), torch.cat([c for _, c in parts])

    # ---------------------------------------------------------------- input
    def _known(self, X) -> Tensor:
        check_is_fitted(self, "labels_")
        return self._scaled(self._checked(X, reset=False))

    def _checked(self, X, reset) -> np.ndarray:
        """X as finite float32 or float64 (n, f)."""
        if X is None:  # numpy's nan
            raise TypeError("ManifoldClustering: X must be points (n, f), got None")
        if isinstance(X, Tensor):
            check_dense("ManifoldClustering", "X", X)
            if X.is_meta:
                raise ValueError("ManifoldClustering: X must hold numbers, got a tensor on the meta device")
            X = X.detach().cpu()
            X = (X.float() if X.dtype in HALF else X).numpy()
        if self.image_shape is not None and hasattr(X, "shape") and len(X.shape) > 2:
            if tuple(X.shape[1:]) != tuple(self.image_shape):
                raise ValueError(f"ManifoldClustering: X holds images of {tuple(X.shape[1:])}, image_shape is "
                                 f"{tuple(self.image_shape)}")
            X = X.reshape(len(X), -1)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=reset)
        if self.image_shape is not None and X.shape[1] != np.prod(self.image_shape):
            raise ValueError(f"ManifoldClustering: X has {X.shape[1]} features, image_shape="
                             f"{tuple(self.image_shape)} has others")
        return X

    def _scaled(self, X) -> Tensor:
        """X without its offset, which float32 might have no digits for."""
        x = torch.tensor((X - self._mean) / self._scale, dtype=torch.float32, device=self.device)
        return x if self.image_shape is None else x.reshape(len(x), *self.image_shape)

    def _build(self, points, generator) -> Network:
        return build(points, self.encoder, self.hidden, self.dim, generator)

    def _check_parameters(self) -> None:
        check_parameters(self)

    @property
    def _n_features_out(self) -> int:
        return self.dim

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    # ---------------------------------------------------------------- files
    def save(self, path: str | os.PathLike) -> None:
        """Write the fitted estimator to a safetensors file, parameters inside; the file appears whole or not at all.

        Parameters that are objects stay out: `encoder` (its weights are in), callables, a RandomState.
        """
        check_is_fitted(self, "labels_")
        check_path("save", path)
        write_clustering(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, *, encoder: nn.Module | None = None) -> ManifoldClustering:
        """Read what `save` wrote. `encoder` is needed when one was given then: a module like it, which is copied.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or not one of ours, or the encoder doesn't fit.
        """
        check_path("load", path)
        if encoder is not None:
            check_module("load", encoder, "encoder")
        return read_clustering(cls, path, encoder)


def _spread(X, image_shape):
    """Mean of every feature, or of every channel of images, and one scale for all: distances keep their proportions."""
    if image_shape is None:
        mean = X.mean(0, dtype=np.float64)
    else:
        channels = image_shape[0] if len(image_shape) == 3 else 1
        mean = X.reshape(len(X), channels, -1).mean((0, 2), dtype=np.float64).repeat(X.shape[1] // channels)
    centred = X - mean
    largest = float(np.abs(centred).max())
    scale = largest * float((centred / largest).std()) if largest > 0 else 1.0
    if not 0 < scale < np.inf:
        raise ValueError("ManifoldClustering: X must have a spread that float64 holds, got values up to "
                         f"{np.abs(X).max():g}")
    return mean, scale
