"""Principal components of a stream of rows, in memory for a few of them.

    x      <- rows less the mean of all rows so far, and one row more for what that mean has moved (Chan et al., 1979)
    oja:         V <- orth(V + (x'x V) diag(1 / b)),     b_j^2 += |x'x v_j|^2
    block_power: V <- orth(V C + x'x V),                 C = V' (scatter of all rows so far, as far as V has held it) V
    both:        C <- R C R' + (x V)'(x V),              R = V' V_before

Components are V turned by the eigenvectors of C, and C's eigenvalues what they explain. Oja with a rate per component
that sums up its own gradients (AdaOja: Henriksen and Ward, 2019) asks for no learning rate. The block power method
keeps its past (history PCA: Yang, Hsieh and Wang, 2018), so that its blocks needn't grow. Each costs three products of
a batch with V, and QR of V; V has some columns more than there are components, as the range finder's oversampling.

A few rows that are much longer than all others leave Oja's rates small for good. Those with more than their share of
all energy so far are kept aside, and join when components are asked for: an eigenproblem of their number more.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..common import HALF, check_dense, check_word, told, whole
from .product import product

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils import check_random_state, gen_batches
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(f"StreamingPCA needs scikit-learn >= 1.6 (pip install scikit-learn): {error}") from None

METHODS = ("block_power", "oja")


class StreamingPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Principal component analysis of rows that come in batches, with memory for the components alone.

    Rows are centred, on the mean of all that were seen. `partial_fit` takes any number of rows at a time; `fit` takes
    those of X in a random order and in batches, and in the end looks at all of them once more, which makes the
    variances those of X along the components.

    Args:
        n_components: to find, at most the number of features.
        method: "block_power", a power step for each batch on the scatter of all rows so far, as far as it is held; or
            "oja", Oja's rule with rates that adapt, the cheaper state and the slower approach.
        batch_size: rows that `fit` takes at a time; None for five times the features, or 100 if that is more.
        n_oversamples: directions that are held beside the components. With more, components are found sooner that
            hardly differ in their variance.
        n_aside: rows that "oja" holds aside at most, each with more than 1 / n_aside of all energy so far; 0 for none.
        random_state: seed, or a numpy RandomState, of the start and of the order in `fit`.

    Attributes:
        components_: (n_components, n_features), orthonormal rows by falling variance; the largest entry of each is
            positive.
        explained_variance_: (n_components,), the variance along each.
        explained_variance_ratio_: the same as shares of all variance.
        mean_: (n_features,) of all rows.
        n_samples_seen_: rows so far.
        n_features_in_: features seen in `fit`.

    Raises, in `fit` and `partial_fit`, TypeError or ValueError on parameters or rows that don't fit: more components
    than features, numbers that are not finite, another number of features than before.

    Source: Henriksen and Ward, AdaOja (2019); Yang, Hsieh and Wang, History PCA (2018); Mitliagkas, Caramanis and Jain,
    Memory Limited, Streaming PCA (2013).

    Example:
        >>> import numpy as np
        >>> draw = np.random.RandomState(0)
        >>> rows = draw.randn(3000, 3) @ draw.randn(3, 20) + 5
        >>> model = ts.lowrank.StreamingPCA(n_components=3, random_state=0)
        >>> for batch in np.split(rows, 30):
        ...     model = model.partial_fit(batch)
        >>> np.allclose(model.inverse_transform(model.transform(rows)), rows, atol=1e-3)
        True
    """

    def __init__(self, n_components: int = 2, *, method: str = "block_power", batch_size: int | None = None,
                 n_oversamples: int = 8, n_aside: int = 8,
                 random_state: int | np.random.RandomState | None = None) -> None:
        self.n_components = n_components
        self.method = method
        self.batch_size = batch_size
        self.n_oversamples = n_oversamples
        self.n_aside = n_aside
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: Any = None) -> StreamingPCA:
        """Find the components of the rows of X (n_samples, n_features), float32 or float64; y is not looked at."""
        x = self._checked(X, reset=True)
        self._check_parameters(x)
        size = max(5 * x.shape[1], 100) if self.batch_size is None else whole("StreamingPCA", "batch_size",
                                                                              self.batch_size, 1)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            order = torch.from_numpy(self._begin(x).permutation(len(x)))
            for part in gen_batches(len(x), size):
                self._take(x[order[part]])
            self._publish()
            components, mean = torch.from_numpy(self.components_), torch.from_numpy(self.mean_)
            scores = ((x - mean) @ components.mT).double()
            values, turn = torch.linalg.eigh(scores.mT @ scores)
            self._set(turn.mT.flip(0).to(x.dtype) @ components, values.flip(0), x.dtype)
        return self

    def partial_fit(self, X: npt.ArrayLike, y: Any = None) -> StreamingPCA:
        """Take in the rows of X (n_samples, n_features), after all those before; y is not looked at."""
        first = not hasattr(self, "components_")
        x = self._checked(X, reset=first)
        self._check_parameters(x)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            if first:
                self._begin(x)
            elif self.n_components > (held := self._v.shape[1]):
                raise ValueError(f"StreamingPCA: n_components must be at most the {held} directions held since the "
                                 f"first rows, got {self.n_components}: fit anew")
            self._take(x.to(self._v.dtype))
            self._publish()
        return self

    def transform(self, X: npt.ArrayLike) -> npt.NDArray[np.floating]:
        """Coordinates of centred rows along the components, (n_samples, n_components)."""
        check_is_fitted(self, "components_")
        x = self._checked(X, reset=False).numpy()
        return (x - self.mean_.astype(x.dtype)) @ self.components_.astype(x.dtype).T

    def inverse_transform(self, X: npt.ArrayLike) -> npt.NDArray[np.floating]:
        """Rows of these coordinates, (n_samples, n_features)."""
        check_is_fitted(self, "components_")
        x = np.asarray(X)
        if x.ndim != 2 or x.shape[1] != len(self.components_):
            raise ValueError(f"StreamingPCA: X must be (n, {len(self.components_)}), got shape {x.shape}")
        return x @ self.components_ + self.mean_

    # ------------------------------------------------------------------------------------------------------ the stream

    def _check_parameters(self, x: Tensor) -> None:
        count = whole("StreamingPCA", "n_components", self.n_components, 1)
        if count > x.shape[1]:
            raise ValueError(f"StreamingPCA: n_components must be at most n_features={x.shape[1]}, got {count}")
        check_word("StreamingPCA", "method", self.method, METHODS)
        whole("StreamingPCA", "n_oversamples", self.n_oversamples)
        whole("StreamingPCA", "n_aside", self.n_aside)

    def _begin(self, x: Tensor) -> np.random.RandomState:
        draw = self._generator()
        n = x.shape[1]
        width = min(self.n_components + self.n_oversamples, n)
        self._v = torch.from_numpy(draw.standard_normal((n, width))).to(x.dtype)
        self._c = x.new_zeros(width, width, dtype=torch.float64)
        self._b = x.new_zeros(width, dtype=torch.float64)
        self._aside, self._sum = x.new_zeros(0, n), x.new_zeros(n, dtype=torch.float64)
        self._energy, self.n_samples_seen_ = 0.0, 0
        return draw

    def _take(self, x: Tensor) -> None:
        """Rows as they come."""
        n, seen = len(x), self.n_samples_seen_
        total = x.sum(0, dtype=torch.float64)
        mean = (total / n).to(x.dtype)
        rows = x - mean
        if seen:
            moved = (self._sum / seen - total / n) * (seen * n / (seen + n)) ** 0.5
            rows = torch.cat([rows, moved.to(x.dtype)[None]])
        self._sum, self.n_samples_seen_ = self._sum + total, seen + n
        self._energy += float(rows.double().square().sum())
        if self.n_aside and self.method == "oja":
            rows = torch.cat([self._aside, rows])
            long = rows.double().square().sum(1) * self.n_aside > self._energy
            self._aside, rows = rows[long], rows[~long]
        if len(rows) and rows.any():
            self._step(rows)

    def _step(self, x: Tensor) -> None:
        v, first, size = self._v, not self._c.any(), float(x.abs().amax())
        x = x / size  # so that no square is lost
        g = product(x.mT, product(x, v))
        if first:
            g = product(x.mT, product(x, torch.linalg.qr(g)[0]))
        new = g.double() * size**2
        if not first and self.method == "block_power":
            new += v.double() @ self._c
        elif not first:
            self._b += new.square().sum(0)
            new = v.double() + new * self._b.clamp(min=1e-300).rsqrt()
        new = torch.linalg.qr((new / new.abs().amax()).to(v.dtype))[0]
        if not first:
            turn = (new.mT @ v).double()
            self._c = turn @ self._c @ turn.mT
        scores = product(x, new).double() * size
        self._c += scores.mT @ scores
        values, turn = torch.linalg.eigh(self._c)
        self._c, self._v = values.flip(0).clamp(min=0).diag(), new @ turn.flip(1).to(v.dtype)
        if self.method == "oja":  # the rates are those of the directions, which have turned
            self._b = turn.flip(1).square().mT @ self._b

    def _publish(self) -> None:
        """Components of what V holds and of the rows aside."""
        v, c = self._v, self._c
        if not c.any():
            v = torch.linalg.qr(v)[0]
        if len(self._aside):
            v = torch.linalg.qr(torch.cat([v, self._aside.mT], 1))[0]
            turn = (v.mT @ self._v).double()
            scores = (self._aside @ v).double()
            c = turn @ c @ turn.mT + scores.mT @ scores
        values, turn = torch.linalg.eigh(c)
        k = self.n_components
        self._set((v @ turn.flip(1)[:, :k].to(v.dtype)).mT, values.flip(0)[:k], v.dtype)

    def _set(self, components: Tensor, scatter: Tensor, dtype: torch.dtype) -> None:
        at = components.abs().argmax(1, keepdim=True)
        components = components * (1 - 2 * (components.gather(1, at) < 0).to(dtype))
        scatter = scatter.clamp(min=0)
        self.components_ = components.contiguous().numpy()
        self.explained_variance_ = (scatter / max(self.n_samples_seen_ - 1, 1)).to(dtype).numpy()
        shares = scatter / self._energy if self._energy > 0 else torch.zeros_like(scatter)
        self.explained_variance_ratio_ = shares.to(dtype).numpy()
        self.mean_ = (self._sum / self.n_samples_seen_).to(dtype).numpy()

    # -------------------------------------------------------------------------------------------------- what is given

    def _checked(self, X, reset) -> Tensor:
        if isinstance(X, Tensor):
            check_dense("StreamingPCA", "X", X)
            if X.is_meta:
                raise ValueError(f"StreamingPCA: X must hold numbers, got {told(X)} on the meta device")
            X = X.detach().cpu()
            X = (X.float() if X.dtype in HALF else X).numpy()
        elif X is None:  # numpy's nan
            raise TypeError("StreamingPCA: X must be rows (n, f), got None")
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
        raise ValueError("StreamingPCA: random_state must be a whole number from 0 to 2**32 - 1, a numpy RandomState "
                         f"or None, got {told(seed)}")

    @property
    def _n_features_out(self) -> int:
        return self.components_.shape[0]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
