"""Grassmann class representation: a classification layer whose classes are subspaces (arXiv 2308.01547).

Each class is a frame, k orthonormal rows of length n, and its logit is γ times the length of the feature's projection
onto their span. The frames are parameters on the Grassmannian: train them with `RiemannianSGD` or `RiemannianAdamW`,
whose `param_groups` finds the layer by its type.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common import (
    FLOATS,
    HALF,
    check_dense,
    check_device,
    check_flag,
    check_floating,
    check_generator,
    told,
    weight_for,
    whole,
    wide_dtype,
)
from . import watch
from .cross_entropy import cross_entropy_of
from .frames import class_dims, enter_layer, of_all
from .gamma import auto_gamma, check_gamma, keep_gamma, loaded_gamma
from .initial import by_heart, nearest_frame, principal_frame
from .logits import subspace_logits
from .module import FramesModule

__all__ = ["GrassmannLinear"]


def logits_of_layer(x: Tensor, weight: Tensor, gamma: float, normalize: bool, dims: tuple[int, ...] | None) -> Tensor:
    """What a layer computes, one call in the graphs of torch.fx."""
    return subspace_logits(x, weight_for(x, weight), gamma=gamma, normalize=normalize, dims=dims)


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        raise TypeError(f"{name}: dtype must be floating-point: {', '.join(map(str, FLOATS))}; got {told(dtype)}")


torch.fx.wrap("logits_of_layer")


class GrassmannLinear(FramesModule):
    """Classification layer with one subspace per class: logit ``y_c = γ ‖W_c x̂‖``.

    Takes features (..., `in_features`) to logits (..., `num_classes`), in [0, `gamma`] when `normalize`; there
    is no bias. Source: arXiv 2308.01547.

    Args:
        in_features: feature length n.
        num_classes: number of classes C, also readable as `out_features`.
        subspace_dim: dimension k of every class's subspace, 1 <= k <= n, or a sequence of C such ints ("ragged").
        gamma: scale of the logits, positive: a number, or "auto", a rule of C, k and n. With l₀ = √(k/n), the length of
            a random feature's projection, it is the larger of 0.4 √(2n), so that a new head's logits have a spread of
            about 0.4, and log(3 (C - 1)) / max(1 - l₀, 1/2), so that a class can reach a probability of 3/4; 1 without
            `normalize`.
        normalize: whether features are scaled to unit length first, so that the logit is γ·cos of the angle to the
            subspace; without it the logit grows with the feature.
        device, dtype: where and in what precision the frames are kept, as for `torch.nn.Linear`.

    Attributes:
        weight: (C, k, n), orthonormal rows within a class; (Σk, n) when ragged, the classes one after the other.
        dims: the classes' dimensions, a tuple of C ints when ragged, else None.
        class_parallel: None, or the `distributed.ClassParallel` that has shared the classes out among processes;
            `weight` is then a DTensor (C, k, n), when ragged with k the largest and zeros after a class's own rows.

    Frames in half precision are off by up to 4e-3 and can't be trained, so `half()`, `bfloat16()` and `to(dtype)`, also
    of 8 bits, leave them (and their gradients) in float32, as does a half default dtype; only `dtype=` makes half ones.
    A half-precision batch meets float32 frames as under autocast: they are rounded for the product, and the logits have
    the batch's dtype.

    Weights need not be orthonormal when they are loaded. `load_state_dict` also takes the layout of the paper's code: a
    matrix (C·k, n), under `weight` or `fc.weight`. With it a layer whose gamma is "auto" has the paper's 25, and with
    what `torch.save` has kept of another layer's `state_dict` the other's; plain tensors don't say theirs.

    Raises:
        TypeError: a size is not an int, or `dtype` is not a floating-point one.
        ValueError: a size, `subspace_dim` or `gamma` is out of range.

    Example:
        >>> head = ts.GrassmannLinear(16, num_classes=5, subspace_dim=3)
        >>> features, labels = torch.randn(8, 16), torch.randint(5, (8,))
        >>> head(features).shape
        torch.Size([8, 5])
        >>> head.loss(features, labels).backward()    # cross-entropy without the logits
        >>> head.weight.shape, head.frame_error().item() < 1e-5
        (torch.Size([5, 3, 16]), True)
    """

    def __init__(
        self, in_features: int, num_classes: int, subspace_dim=8, *, gamma="auto", normalize=True, device=None,
        dtype=None
    ):
        super().__init__()
        self.in_features = whole("GrassmannLinear", "in_features", in_features)
        self.num_classes = whole("GrassmannLinear", "num_classes", num_classes)
        self.out_features = self.num_classes
        self.dims = class_dims(subspace_dim, self.num_classes, self.in_features)
        self.subspace_dim = int(subspace_dim) if self.dims is None else self.dims
        check_gamma("GrassmannLinear", gamma)
        check_flag("GrassmannLinear", "normalize", normalize)
        check_dtype("GrassmannLinear", dtype)
        check_device("GrassmannLinear", device)
        self.normalize = bool(normalize)
        self._gamma_by_rule = isinstance(gamma, str)
        self.gamma = auto_gamma(self) if self._gamma_by_rule else float(gamma)
        if dtype is None and torch.get_default_dtype() in HALF:  # as from_pretrained(dtype=...) sets it
            dtype = torch.float32
        shape = (self.num_classes, self.subspace_dim) if self.dims is None else (sum(self.dims),)
        self.weight = nn.Parameter(torch.empty(*shape, self.in_features, device=device, dtype=dtype))
        self.register_parameter("bias", None)  # those who look for a linear layer's find that there is none
        enter_layer(self)
        self.reset_parameters()

    _gamma_by_rule = False  # of a layer that was pickled before there was a rule

    def reset_parameters(self) -> None:
        """Draw uniformly distributed subspaces: N(0, 1) entries, orthonormalised."""
        self._draw(generator=self._generator(None))

    @torch.no_grad()
    def orthonormalize_(self) -> "GrassmannLinear":
        """Replace each class's rows by the nearest frame (polar factor), in place; returns the layer.

        Raises ValueError, before anything is changed, when a class has a non-finite entry.
        """
        bad, weight = [], self._frames()
        for classes, i in self._chunks():
            bad += classes[~weight[i].isfinite().flatten(1).all(1).cpu()].tolist()
        count = len(bad)
        if self.class_parallel is not None:
            count = int(of_all(self.weight, torch.tensor(count, device=weight.device)).sum())
        if count:
            raise ValueError(f"orthonormalize_: non-finite weight in {count} classes: {sorted(bad)[:8]}")
        self._set_frames(lambda classes, a: nearest_frame(a))
        return self

    @torch.no_grad()
    def frame_error(self, dtype: torch.dtype | None = None) -> Tensor:
        """Largest absolute entry of W_c W_cᵀ - I over the classes, a scalar tensor; NaN when a weight is.

        `dtype` is what it is reckoned in, by default float64.
        """
        check_dtype("frame_error", dtype)
        dtype, weight = dtype or self._wide, self._frames()
        error = weight.new_zeros((), dtype=dtype)
        for _, i in self._chunks():
            a = weight[i].to(dtype)
            eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
            error = torch.maximum(error, (a @ a.mT - eye).abs().amax())
        return error if self.class_parallel is None else of_all(self.weight, error).amax()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., C) of features (..., n), in the features' dtype; see `subspace_logits`."""
        if self.class_parallel is not None:
            return self.class_parallel.logits(self, x)
        watch.look(self)
        return logits_of_layer(x, self.weight, self.gamma, self.normalize, self.dims)

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy of this layer's logits of x (..., n), without ever holding the logits.

        `target` is int64 (...) or soft (..., C); the other arguments are those of `subspace_cross_entropy`.
        """
        watch.look(self)
        weight, dims, part = self.weight, self.dims, None
        if self.class_parallel is not None:
            x, weight, target, part = self.class_parallel.enter(self, x, target)
            dims = None
        else:
            weight = weight_for(x, weight)
        return cross_entropy_of(
            x, weight, target, gamma=self.gamma, normalize=self.normalize, dims=dims, part=part,
            class_weight=class_weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, subspace_dim=8, *, gamma="auto", normalize=True,
        generator: torch.Generator | None = None,
    ) -> "GrassmannLinear":
        """The layer whose classes contain the class vectors of a linear one (`weight` (C, n)); its bias is dropped.

        The first direction of a class is its vector scaled to unit length (a random one where the vector is zero), the
        rest are random, drawn from `generator` on the weight's device. The device and the training mode are kept, and
        so is the dtype, except that half precision becomes float32. With `subspace_dim=1` the logits are ``γ·|cos|``.

        Raises TypeError when `linear` has no (C, n) weight, ValueError when `subspace_dim` exceeds n or the weight is
        not finite.
        """
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise TypeError("from_linear: linear must be a layer with a floating-point (C, n) weight, got "
                            f"{told(linear)}")
        check_generator("from_linear", generator)
        dtype = torch.float32 if weight.dtype in HALF else weight.dtype
        num_classes, n = weight.shape
        layer = cls._empty(weight.device, n, num_classes, subspace_dim, gamma=gamma, normalize=normalize, dtype=dtype)
        return layer.init_from_vectors(weight, generator=generator).train(linear.training)

    @classmethod
    def _empty(cls, device, *sizes, **options) -> "GrassmannLinear":
        """A layer on the device whose frames are still to be drawn."""
        layer = cls(*sizes, **options, device="meta")
        layer.weight = nn.Parameter(torch.empty_like(layer.weight, device=device))
        return layer

    @torch.no_grad()
    def init_from_vectors(self, vectors: Tensor, *, generator: torch.Generator | None = None) -> "GrassmannLinear":
        """Start each class from given directions, random orthonormal ones after them; returns the layer.

        `vectors` is (C, n), one vector a class, or (C, j, n), of which the first k are taken. A zero vector counts as
        not given. Raises ValueError, before anything is changed, on another shape or a non-finite entry.
        """
        check_floating("init_from_vectors", "vectors", vectors)
        check_generator("init_from_vectors", generator)
        if vectors.is_meta and not self.weight.is_meta:
            raise ValueError("init_from_vectors: vectors must hold numbers, got a tensor on the meta device")
        vectors = vectors.detach()
        if vectors.ndim == 2:
            vectors = vectors[:, None]
        if vectors.ndim != 3 or (vectors.shape[0], vectors.shape[2]) != (self.num_classes, self.in_features):
            rule = f"({self.num_classes}, {self.in_features}) or ({self.num_classes}, j, {self.in_features})"
            raise ValueError(f"init_from_vectors: vectors must be {rule}, got {tuple(vectors.shape)}")
        if not vectors.is_meta and vectors.numel() and not torch.stack(vectors.aminmax()).isfinite().all():
            raise ValueError("init_from_vectors: vectors must be finite, got a non-finite entry")

        generator = self._generator(generator)
        vectors = vectors[:, : max(self.dims or (self.subspace_dim,), default=0)]

        def first(classes, k):
            v = vectors[classes.to(vectors.device), :k].to(self.weight.device, self._wide)
            largest = v.abs().amax(-1, keepdim=True)
            if (zero := largest == 0).any():
                random = torch.randn(v.shape, generator=generator, dtype=v.dtype, device=v.device)
                v, largest = torch.where(zero, random, v), torch.where(zero, 1, largest)
            v = nn.functional.normalize(v / largest, dim=-1)
            return v if v.shape[1] <= 1 else nearest_frame(v)

        self._draw(first, generator)
        return self

    @torch.no_grad()
    def init_from_features(
        self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> "GrassmannLinear":
        """Start each class from the principal directions of its features; returns the layer.

        The PCA is not centred, as subspaces go through the origin, and features are scaled to unit length first when
        the layer does so. A class with fewer than k independent features is completed by random directions.

        Of what its N < n features do not share, a class's k directions hold about k/N of each: with few of them it
        knows its examples by heart, and training on these begins near a loss of zero, with little to learn. Where that
        is a quarter or more, N <= 4k for half of the classes, a warning says so: take more features, a smaller k, or
        random frames.

        Args:
            x: features (N, n), floating-point, on any device.
            y: labels (N,), int64, 0 <= y < C.
            generator: draws the random directions, on the weight's device.

        Raises TypeError on a wrong dtype, ValueError on a wrong shape, label or non-finite feature, before anything is
        changed.
        """
        name = "init_from_features"
        check_dense(name, "x", x)
        check_dense(name, "y", y)
        check_generator(name, generator)
        x, y = x.detach(), y.detach()
        if x.dtype not in FLOATS or y.dtype != torch.int64:
            raise TypeError(f"init_from_features: need floating-point x and int64 y, got {x.dtype} and {y.dtype}")
        if x.is_meta or y.is_meta:
            raise ValueError(f"init_from_features: x and y must hold numbers, got them on {x.device} and {y.device}")
        if x.ndim != 2 or x.shape[1] != self.in_features or y.shape != x.shape[:1]:
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"init_from_features: need x (N, {self.in_features}) and y (N,), got {shapes}")
        if y.numel() and not (0 <= y.min() and y.max() < self.num_classes):
            lo, hi = int(y.min()), int(y.max())
            raise ValueError(f"init_from_features: need 0 <= y < {self.num_classes}, got labels {lo} to {hi}")
        if not x.isfinite().all():
            raise ValueError("init_from_features: a feature is not finite")
        y = y.cpu()
        generator = self._generator(generator)
        samples = y.argsort().to(x.device).split(y.bincount(minlength=self.num_classes).tolist())

        def frames(classes, a):
            def frame(c):
                xc = x[samples[c]].to(a)
                xc = nn.functional.normalize(xc, dim=-1) if self.normalize else xc
                return principal_frame(xc, a.shape[1], generator, wide_dtype(x.dtype))

            return torch.stack([frame(c) for c in classes.tolist()])

        self._set_frames(frames)
        if why := by_heart(y.bincount(minlength=self.num_classes), self.dims or self.subspace_dim, self.in_features):
            warnings.warn(f"init_from_features: {why}", stacklevel=3)
        return self

    def load_gcr(self, checkpoint: Mapping[str, Any]) -> "GrassmannLinear":
        """Load the head of a checkpoint of the paper's code (innerlee/GCR, on mmpretrain); returns the layer.

        `checkpoint` is the whole file as `torch.load` gives it, or its "state_dict": the (C·k, n) matrix under a key
        that ends in `head.fc.weight`, or else in `fc.weight`, is taken. The backbone's keys are the model's affair; for
        a torchvision ResNet they load after `removeprefix("backbone.")`, with `strict=False`.

        Raises ValueError when no or several keys match, RuntimeError (as torch does) when the sizes differ.
        """
        state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else None
        if not isinstance(state, Mapping):
            raise TypeError(f"load_gcr: checkpoint must be a dict of tensors, or have one as 'state_dict', got "
                            f"{told(checkpoint)}")
        found = [k for k in state if f".{k}".endswith(".head.fc.weight")]
        found = found or [k for k in state if f".{k}".endswith(".fc.weight")]
        if len(found) != 1:
            raise ValueError("load_gcr: checkpoint must have one key ending in 'head.fc.weight' or 'fc.weight', got "
                             f"{found}")
        check_floating("load_gcr", f"{found[0]!r} of checkpoint", state[found[0]])
        self.load_state_dict({"fc.weight": state[found[0]]})
        return self

    def extra_repr(self) -> str:
        k = self.subspace_dim if self.dims is None else f"{min(self.dims, default=0)}..{max(self.dims, default=0)}"
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}, subspace_dim={k}"
        parallel = "" if self.class_parallel is None else f", class_parallel={self.class_parallel}"
        return f"{sizes}, gamma={self.gamma:g}, normalize={self.normalize}{parallel}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        keep_gamma(self, destination, prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        error_msgs = args[-1]
        before = len(error_msgs)
        key, gcr_key = prefix + "weight", prefix + "fc.weight"
        papers = key not in state_dict and gcr_key in state_dict
        if papers:
            state_dict[key] = state_dict.pop(gcr_key)
        weight = state_dict.get(key)
        if isinstance(weight, Tensor) and weight.dtype not in FLOATS:
            error_msgs.append(f"{key}: frames must be floating-point, got {weight.dtype}")
        if self.dims is None and isinstance(weight, Tensor) and weight.ndim == 2:
            if weight.shape == (self.num_classes * self.subspace_dim, self.in_features):
                papers = True
                frames = state_dict[key] = weight.reshape(self.weight.shape)
                lengths = frames.detach().float().norm(dim=-1)
                if lengths.numel() and not frames.is_meta and (lengths - 1).abs().max() > watch.LIMIT:
                    error_msgs.append(
                        f"{key}: a matrix {tuple(weight.shape)} whose rows have lengths from {lengths.min():.3g} to "
                        f"{lengths.max():.3g} is no stack of frames but a linear layer's weight: start from it by "
                        "GrassmannLinear.from_linear or init_from_vectors"
                    )
        if isinstance(weight := state_dict.get(key), Tensor):
            state_dict[key] = self._as_held(weight)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._undrawn = self._undrawn and key not in state_dict
        if self._gamma_by_rule and key in state_dict and len(error_msgs) == before:
            self.gamma = loaded_gamma(self, local_metadata, papers)
        watch.again(self)
