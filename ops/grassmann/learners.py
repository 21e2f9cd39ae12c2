"""Metric learners that share an embedding's coordinates out: each group of them is a unit vector of its own.

An embedding of D coordinates is cut into K groups, the learners. Points are clustered by the whole embedding, and each
learner is trained on the pairs of one cluster, so that it learns what tells its points apart. K is not known before:
where training no longer gets better the last learner is split, by the first-order effect on the loss of dropping a
coordinate, |E[a dL/da]| with a the normalised activation: the coordinates that matter stay, as a learner, and all
others begin anew as the next one.
"""
from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common import (
    FLOATS,
    all_reduce,
    check_dense,
    check_device,
    check_floating,
    check_group,
    check_number,
    full_precision,
    told,
    unit,
    whole,
    wide_dtype,
)
from .frames import as_dims

CUTOFF = 0.5  # negatives nearer than this are left out: their gradients' directions are noise
SHARE = (0.0, 1.0, "a number from 0 to 1")
LENGTH = (0.0, 2.0, "a number from 0 to 2")  # unit vectors are no further apart


def grouped_normalize(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Each group of coordinates scaled to unit length.

    Args:
        x: (..., D).
        dims: how many coordinates each group has, ints above 0 that sum to D.

    Returns:
        Shaped like x, of its dtype: x divided by the length of its group. A group that is zero stays zero, and so does
        its gradient, where `torch.nn.functional.normalize` has one of 1e12. Groups of any finite numbers, large or
        small, come out of length 1; float16 and bfloat16 are computed in float32, also under autocast.

    Differentiable, any number of times.

    Raises:
        TypeError: x is no dense floating tensor, or dims are no ints.
        ValueError: dims are not above 0, or do not sum to D.

    Example:
        >>> ts.grassmann.grouped_normalize(torch.tensor([3.0, 4.0, 0.0, 0.0, -2.0]), (2, 2, 1))
        tensor([ 0.6000,  0.8000,  0.0000,  0.0000, -1.0000])
    """
    name = "grouped_normalize"
    check_floating(name, "x", x)
    sizes = as_dims(name, dims)
    if sizes is None:
        raise TypeError(f"{name}: dims must be a sequence of ints, got None")
    if x.dim() < 1 or any(size < 1 for size in sizes) or sum(sizes) != x.shape[-1]:
        raise ValueError(f"{name}: need x (..., D) and dims above 0 that sum to D, got {tuple(x.shape)} and {sizes}")
    if not sizes:
        return x.clone()
    with full_precision(x):
        wide = x.to(wide_dtype(x.dtype))
        if len(set(sizes)) == 1 and len(sizes) > 32:  # fewer are quicker one by one: what is between stays in the cache
            return unit(wide.unflatten(-1, (len(sizes), sizes[0]))).flatten(-2).to(x.dtype)
        return torch.cat([unit(part) for part in wide.split(sizes, -1)], -1).to(x.dtype)


class DynamicSubspaceLearners(nn.Module):
    """An embedding for retrieval in groups of coordinates, each trained on the points of a cluster.

    Args:
        in_features: length of the features.
        dim: D, coordinates of the embedding, at least ``least``.
        beta, margin: of the margin loss: pairs of a class are to be nearer than beta - margin, others further than
            beta + margin, on the unit sphere.
        threshold: a coordinate of the last learner stays in it, when it is split, if the effect of dropping it exceeds
            this share of the range from its least to its most important one.
        least: coordinates that either part must have.
        device, dtype: of the embedding, as for `torch.nn.Linear`.

    Attributes:
        embed: the `torch.nn.Linear` from features to D coordinates.
        dims: how many coordinates each learner has; (dim,) at first, and part of the `state_dict`.

    A training loop calls ``loss(features, target, learner)`` on batches of a cluster's points, `assign` every few
    epochs, and `split` where nothing has got better for some; in the end ``loss(features, target)`` of the whole
    embedding on batches of all points. The public code does these every 2 epochs, after 10, and from the 250th of 300.

    Under DistributedDataParallel, `loss` belongs inside what is wrapped, and pairs the points of a process's own batch;
    `assign` takes all points in every process; `split` takes a ``process_group``, without which replicas come apart.

    Raises:
        TypeError, ValueError: arguments of a wrong kind, or out of range.

    Source: attention-based dynamic subspace learners (Adiga, Dolz and Lombaert, 2022), without the attention; learners
    by cluster: Sanakoyeu et al. (2019); the margin loss: Wu et al. (2017, arXiv 1706.07567).

    Example:
        >>> model = ts.grassmann.DynamicSubspaceLearners(16, dim=64, threshold=0.3)
        >>> x, y = torch.randn(80, 16), torch.arange(80) % 4
        >>> model(x).shape, torch.allclose(model(x).norm(dim=1), torch.ones(80))
        (torch.Size([80, 64]), True)
        >>> model.loss(x, y, learner=0).backward()
        >>> model.split(), len(model.dims), sum(model.dims)
        (True, 2, 64)
        >>> cluster = model.assign(x)    # of each point; learner c trains on those of cluster c
        >>> model.loss(x[cluster == 1], y[cluster == 1], learner=1).backward()
    """

    _effect: Tensor  # (D,), of the losses since a split; no buffer, of which to_empty would leave any numbers

    def __init__(self, in_features: int, dim: int = 128, *, beta: float = 1.2, margin: float = 0.2,
                 threshold: float = 0.5, least: int = 5, device: torch.device | str | int | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        name = "DynamicSubspaceLearners"
        in_features, self.least = whole(name, "in_features", in_features, 1), whole(name, "least", least, 1)
        dim = whole(name, "dim", dim, 1)
        if self.least > dim:
            raise ValueError(f"{name}: least must be at most dim={dim}, got {self.least}")
        for what, value in (("beta", beta), ("margin", margin)):
            check_number(name, what, value, LENGTH)
        check_number(name, "threshold", threshold, SHARE)
        check_device(name, device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
            raise TypeError(f"{name}: dtype must be floating-point, got {told(dtype)}")
        self.beta, self.margin, self.threshold = float(beta), float(margin), float(threshold)
        self.embed = nn.Linear(in_features, dim, device=device, dtype=dtype)
        self.dims: tuple[int, ...] = (dim,)
        self._effect = torch.zeros(dim, dtype=wide_dtype(self.embed.bias.dtype), device=self.embed.bias.device)
        self.register_load_state_dict_post_hook(_place)  # weights that are assigned may be elsewhere

    def forward(self, features: Tensor) -> Tensor:
        """The embedding (..., D), of unit length: each learner's part has length 1 / sqrt(K)."""
        return self._groups("DynamicSubspaceLearners", features) / len(self.dims) ** 0.5

    def _groups(self, name: str, features: Tensor, rows: bool = False) -> Tensor:
        """Each learner's part of length 1; features that don't fit are refused in `name`'s voice."""
        check_floating(name, "features", features)
        weight, shape = self.embed.weight, tuple(features.shape)
        if (rows and features.dim() != 2) or features.dim() < 1 or shape[-1] != weight.shape[1]:
            raise ValueError(f"{name}: need features ({'n' if rows else '...'}, {weight.shape[1]}), got {shape}")
        if features.device != weight.device:
            raise ValueError(f"{name}: features must be on {weight.device}, got {features.device}")
        if features.dtype != weight.dtype and not torch.is_autocast_enabled(features.device.type):
            raise TypeError(f"{name}: features and the embedding must share a dtype, got {features.dtype} and "
                            f"{weight.dtype}")
        return grouped_normalize(self.embed(features), self.dims)

    def loss(self, features: Tensor, target: Tensor, learner: int | None = None) -> Tensor:
        """Margin loss of a batch: of one learner's coordinates, or of all.

        Args:
            features: (n, in_features).
            target: labels, (n,), int64.
            learner: 0 to K - 1; None takes the whole embedding.

        Returns:
            0-dim. Of each point all pairs with its own class, and as many of the nearest of others that are at least
            0.5 away; the mean of the terms that are not zero. All are of this batch: in several processes each has its
            own pairs, and a mean of its own.

        In training mode its backward adds up the effect of each coordinate, for `split`; torch.func.grad, and in what
        torch.compile makes ``create_graph=True``, which can't, raise RuntimeError: they are for `eval()`.
        """
        name = "DynamicSubspaceLearners.loss"
        if learner is not None and whole(name, "learner", learner) >= len(self.dims):
            raise ValueError(f"{name}: learner must be below {len(self.dims)}, got {learner}")
        z = self._groups(name, features, rows=True)
        check_dense(name, "target", target)
        if target.dtype != torch.int64:
            raise TypeError(f"{name}: target must be int64, got {target.dtype}")
        if target.shape != z.shape[:1] or target.device != z.device:
            raise ValueError(f"{name}: features and target must be as many, on one device, got {tuple(features.shape)} "
                             f"on {z.device} and {tuple(target.shape)} on {target.device}")
        if self.training and z.requires_grad:
            if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
                raise RuntimeError(f"{name}: torch.func's transforms can't add up effects for `split`, as the backward "
                                   "in training mode does: call eval() first, or differentiate by torch.autograd")
            if torch.compiler.is_compiling():
                z = _Watched.apply(z, self._effect)
            else:
                _place(self)
                z.register_hook(functools.partial(_add, self, z.detach()))
        part = z / len(self.dims) ** 0.5 if learner is None else z.split(self.dims, -1)[learner]
        return self._margin_loss(part, target)

    def _margin_loss(self, z: Tensor, target: Tensor) -> Tensor:
        with full_precision(z):
            z = z.to(wide_dtype(z.dtype))
            length = z.square().sum(1)  # near pairs lose digits here, and have no loss
            distance = ((length[:, None] + length - 2 * z @ z.mT).clamp(min=0) + 1e-8).sqrt()
            same = target[:, None] == target
            positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
            far = distance.detach().masked_fill(same | (distance < CUTOFF), torch.inf)
            rank = far.argsort(1).argsort(1)  # of each anchor's negatives, the nearest first
            negative = (rank < positive.sum(1, keepdim=True)) & far.isfinite()
            off = distance - self.beta
            terms = torch.cat([(self.margin + off)[positive], (self.margin - off)[negative]]).relu()
            return terms.sum() / (terms > 0).sum().clamp(min=1)

    @torch.no_grad()
    def assign(self, features: Tensor, previous: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """Cluster points by the whole embedding: which learner is to train on which.

        Args:
            features: (n, in_features), all points that are trained on.
            previous: what the last call said of the same points, for learners to keep theirs as far as they can.
            seed: of k-means.

        Returns:
            (n,), int64, from 0 to K - 1. Clusters are scikit-learn's k-means', matched with `previous` by scipy.
        """
        name = "DynamicSubspaceLearners.assign"
        z, count = self._groups(name, features, rows=True), len(self.dims)
        if len(features) < count or features.is_meta:
            raise ValueError(f"{name}: features must be of at least as many points as learners, {count}, got "
                             f"{tuple(features.shape)} on {features.device}")
        if previous is not None:
            check_dense(name, "previous", previous)
            if previous.dtype != torch.int64:
                raise TypeError(f"{name}: previous must be int64, got {previous.dtype}")
            fits = previous.shape == features.shape[:1] and not previous.is_meta
            if not fits or previous.min() < 0 or previous.max() >= count:
                raise ValueError(f"{name}: previous must be ({len(features)},) labels from 0 to {count - 1}, got "
                                 f"{told(previous)}")
        seed = whole(name, "seed", seed)
        if seed >= 2**32:
            raise ValueError(f"{name}: seed must be below 2**32, got {seed}")
        if count == 1:
            return torch.zeros(len(features), dtype=torch.int64, device=features.device)
        from sklearn.cluster import KMeans

        if not z.isfinite().all():
            raise ValueError(f"{name}: the embedding of a point is not finite")
        found = torch.from_numpy(KMeans(count, n_init=4, random_state=seed).fit_predict(z.float().cpu().numpy())).long()
        if previous is not None:
            from scipy.optimize import linear_sum_assignment

            both = torch.zeros(count, count, dtype=torch.int64)
            both.index_put_((found, previous.cpu()), torch.ones_like(found), accumulate=True)
            found = torch.from_numpy(linear_sum_assignment(both.numpy(), maximize=True)[1]).long()[found]
        return found.to(features.device)

    @torch.no_grad()
    def split(self, *, process_group: dist.ProcessGroup | None = None) -> bool:
        """Split the last learner, by the losses since the last call (or the start, or a state was loaded): was it?

        Coordinates whose effect exceeds the threshold become one learner, all others begin anew as the next. Nothing
        happens where a part would have fewer than ``least`` coordinates, or no loss has had a backward in training mode
        since. A backward that is not finite, as under a loss scale that is too large, counts as none. An optimiser's
        state of `embed` goes on as it is.

        Args:
            process_group: a torch.distributed group whose processes hold replicas, all of which call this, or None.
                They split alike, by the losses of all, and have the rows of the first one.

        Raises:
            TypeError: process_group is of a wrong kind.
            ValueError: its processes have other dims than one another; in all of them, and nothing has changed.
        """
        check_group("DynamicSubspaceLearners.split", process_group)
        last, start = self.dims[-1], sum(self.dims[:-1])
        weight, bias = self.embed.weight, self.embed.bias
        _place(self)
        effect = self._effect if process_group is None else self._over(self._effect, process_group)
        effect = effect[start:].abs()
        self._effect.zero_()
        low, high = effect.min(), effect.max()
        if not bool((high > low) & high.isfinite()):  # nothing seen: all are zero
            return False
        stay = ((effect - low) / (high - low) > self.threshold).nonzero()[:, 0]
        rest = last - len(stay)
        if min(len(stay), rest) < self.least:
            return False
        fresh = nn.Linear(self.embed.in_features, rest, device=weight.device, dtype=weight.dtype)
        nn.init.xavier_normal_(fresh.weight)
        for p, new in ((weight, fresh.weight), (bias, fresh.bias)):
            rows = torch.cat([p[start + stay], new])
            if process_group is not None:
                dist.broadcast(rows, dist.get_global_rank(process_group, 0), group=process_group)
            p[start:] = rows
        self.dims = (*self.dims[:-1], len(stay), rest)
        return True

    def _over(self, effect: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The sum of all processes' effects, which is the same to the bit in each; raises where dims differ."""
        ends = torch.zeros_like(effect)
        ends[torch.tensor(self.dims, device="cpu").cumsum(0) - 1] = 1
        effect, ends = all_reduce(torch.stack((effect, ends)), group)
        if ((ends != 0) & (ends != group.size())).any():
            raise ValueError("DynamicSubspaceLearners.split: dims must be the same in all processes of process_group, "
                             f"got {self.dims} in this one")
        return effect

    def _apply(self, fn, recurse=True):
        was_meta = self.embed.weight.is_meta
        applied = super()._apply(fn, recurse)
        if was_meta:
            self._effect = self._effect.to("meta")  # of weights that are gone
        _place(self)
        return applied

    def get_extra_state(self) -> Tensor:
        """The learner of each coordinate, (D,) int64: for what writes tensors alone, or into those that are there."""
        return torch.repeat_interleave(torch.tensor(self.dims, device="cpu"))

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        """That, or the {"dims": dims} of earlier versions."""
        dims = as_dims("DynamicSubspaceLearners", state["dims"] if isinstance(state, dict) else _lengths(state))
        if dims is None or sum(dims) != self.embed.out_features:
            raise ValueError(f"DynamicSubspaceLearners: dims must sum to {self.embed.out_features}, got {told(dims)}")
        self.dims = dims
        self._effect.zero_()

    def extra_repr(self) -> str:
        return f"dims={self.dims}, beta={self.beta:g}, margin={self.margin:g}"


def _lengths(state: object) -> list[int]:
    """How many coordinates each learner has, of the learner of each."""
    known = isinstance(state, Tensor) and not state.is_meta and state.dtype == torch.int64 and state.dim() == 1
    runs = [(learner, len([*run])) for learner, run in itertools.groupby(state.tolist())] if known else [(-1, 0)]
    if [learner for learner, _ in runs] != [*range(len(runs))]:
        raise ValueError("DynamicSubspaceLearners: _extra_state must be what state_dict has of it, got "
                         f"{told(state)}{' on meta' * getattr(state, 'is_meta', False)}")
    return [length for _, length in runs]


def _place(model: DynamicSubspaceLearners, _keys: object = None) -> None:
    """Its effects are where its embedding is, and as wide; nothing on meta has any."""
    old, bias = model._effect, model.embed.bias
    dtype = wide_dtype(bias.dtype)
    if old.is_meta != bias.is_meta:
        model._effect = torch.zeros(old.shape, dtype=dtype, device=bias.device)
    else:
        model._effect = old.to(bias.device, dtype)


def _effect(z: Tensor, gradient: Tensor) -> Tensor:
    """Of dropping each coordinate on a loss, to first order; 0, of all of them alike, where one is not finite."""
    effect = (z.to(wide_dtype(z.dtype)) * gradient.detach()).sum(0)
    return torch.where(effect.isfinite().all(), effect, 0)


def _add(model: DynamicSubspaceLearners, z: Tensor, gradient: Tensor) -> None:
    """The hook of z's gradient."""
    with torch.no_grad():
        model._effect.add_(_effect(z, gradient).to(model._effect))


class _Watched(torch.autograd.Function):
    """z, whose backward adds up effects, for torch.compile, which takes a hook only if it changes nothing. Elsewhere
    the hook is better, which leaves further derivatives to autograd."""

    @staticmethod
    def forward(ctx, z, total):
        ctx.save_for_backward(z)
        ctx.total = total
        return z.view_as(z)

    @staticmethod
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        ctx.total.add_(_effect(z, gradient).to(ctx.total))
        return gradient, None
