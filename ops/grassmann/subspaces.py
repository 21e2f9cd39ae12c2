"""Subspaces of data: how much of a point each one holds, the ones that classes span, and what a noisy point was.

A mixture of low-rank Gaussians, x0 = U_c' a with a ~ N(0, 1_k), seen as x = signal x0 + noise e, has the posterior mean

    E[x0 | x] = s / (s^2 + g^2)  sum_c w_c U_c' U_c x,     s, g = signal, noise
    w = softmax_c( s^2 / (2 g^2 (s^2 + g^2)) ||U_c x||^2  -  k_c / 2 log(1 + s^2 / g^2) ).

The weighted sum of projections is the gradient of 1/2 sum_c w_c ||U_c x||^2 in x at fixed w, that is the backward of
the logits at dlogits = w_c ||U_c x||: two products, and nothing of size rows x classes x k beside the projections.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from ..common import (
    FLOATS,
    autocast,
    check_dense,
    check_generator,
    check_number,
    exporting,
    full_precision,
    told,
    transformed,
    whole,
    wide_dtype,
)
from .frames import check_frames, starts
from .initial import principal_frame
from .logits import KEEP_PROJECTIONS, owners, subspace_logits

_op = torch.ops.torch_subspace
POSITIVE = (5e-324, 1.7976931348623157e308, "a finite number above 0")
AT_LEAST_0 = (0.0, 1.7976931348623157e308, "a finite number of at least 0")


def subspace_scores(x: Tensor, frames: Tensor, *, dims: Sequence[int] | None = None) -> Tensor:
    """Squared lengths of the projections of ``x`` onto subspaces: how much of its energy each one holds.

    Args:
        x: points, (..., n), any number of leading batch dimensions.
        frames: (C, k, n), the k rows of a subspace orthonormal; or (sum(dims), n) with ``dims``.
        dims: dimension of each subspace (a sequence of C ints) for ragged frames.

    Returns:
        (..., C): ||frames[c] @ x||^2, float64 for float64 and else float32, in which half types are computed.
        What a subspace does not hold is ||x||^2 less that, so the nearest subspace has the largest score, of those of
        one dimension the likeliest too.

    Differentiable in ``x`` and ``frames`` any number of times; under autocast both are rounded to its dtype, as for a
    linear layer.

    Raises:
        TypeError: x or frames is no dense floating tensor, or their dtypes differ.
        ValueError: shapes, devices or ``dims`` do not fit.

    Source: nearest subspace classification (Watanabe's CLAFIC, 1967), the assignment of K-subspaces.

    Example:
        >>> frames = torch.eye(4).reshape(2, 2, 4)              # the first two axes, the last two
        >>> ts.grassmann.subspace_scores(torch.tensor([3.0, 4.0, 1.0, 0.0]), frames)
        tensor([25.,  1.])
    """
    x, frames = autocast(x, frames)
    dims = check_frames("subspace_scores", x, frames, dims, "frames")
    if _differentiated(x, frames):
        with full_precision(x):
            wide = wide_dtype(x.dtype)
            proj = linear(x.to(wide), frames.to(wide).flatten(0, -2))
            return _by_class(proj.square(), frames, dims)
    with full_precision(x):  # a half's rounding of lengths would decide between subspaces, and its range end soon
        wide = wide_dtype(x.dtype)
        return subspace_logits(x.to(wide), frames.to(wide), gamma=1.0, normalize=False, dims=dims).square()


def _differentiated(*tensors: Tensor) -> bool:
    """Whether derivatives may be asked for: those of lengths are 0 where a length is, those of squares are right."""
    return transformed() or exporting() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _by_class(rows: Tensor, frames: Tensor, dims: Sequence[int] | None) -> Tensor:
    """Sums over each class's rows, (..., C), of (..., all rows)."""
    if dims is None:
        return rows.unflatten(-1, frames.shape[:2]).sum(-1)
    return rows.new_zeros(*rows.shape[:-1], len(dims)).index_add(-1, owners(dims, frames), rows)


def subspace_denoise(x: Tensor, frames: Tensor, signal: float = 1.0, noise: float = 1.0, *,
                     dims: Sequence[int] | None = None) -> Tensor:
    """What noisy points were, if they come from subspaces: the posterior mean of a mixture of low-rank Gaussians.

    Each subspace is as likely as any other, and its points are ``frames[c].mT @ a`` with standard normal ``a``; what
    is seen is ``signal`` times such a point and white noise of standard deviation ``noise``.

    Args:
        x: what is seen, (..., n).
        frames: (C, k, n), the k rows of a subspace orthonormal; or (sum(dims), n) with ``dims``.
        signal: factor of the point, above 0.
        noise: standard deviation of the noise in every entry, at least 0. Without noise x is projected onto the
            subspace that holds most of it.
        dims: dimension of each subspace (a sequence of C ints) for ragged frames.

    Returns:
        The mean of the point, shaped like x, of its dtype; float16 and bfloat16 are computed in float32. By Tweedie's
        formula it is (x + noise^2 grad log p(x)) / signal, with p the density of what is seen.

    Differentiable in ``x`` and ``frames`` any number of times. Autocast does not change its precision, as weights that
    differ by powers of e are no matter for eight bits.

    Raises:
        TypeError: x or frames is no dense floating tensor, their dtypes differ, or signal or noise is no number.
        ValueError: shapes, devices, ``dims``, ``signal`` or ``noise`` do not fit.

    Source: the denoiser of mixtures of low-rank Gaussians (Wang et al., 2024, arXiv 2409.02426); the sum of
    projections as a gradient is derived in this file.

    Example:
        >>> frames = torch.eye(4).reshape(2, 2, 4)
        >>> seen = torch.tensor([3.0, 4.0, 0.1, -0.1])
        >>> ts.grassmann.subspace_denoise(seen, frames, noise=0.5).round(decimals=4).abs()
        tensor([2.4000, 3.2000, 0.0000, 0.0000])
    """
    name = "subspace_denoise"
    dims = check_frames(name, x, frames, dims, "frames")
    check_number(name, "signal", signal, POSITIVE)
    check_number(name, "noise", noise, AT_LEAST_0)
    with full_precision(x):
        wide = wide_dtype(x.dtype)
        flat, w = x.reshape(-1, x.shape[-1]).to(wide), frames.to(wide)
        size = flat.detach().abs().amax(-1, keepdim=True)
        size = torch.where(size == 0, 1, size)  # the unit of a row, so that no square overflows or vanishes
        flat = flat / size
        if _differentiated(x, frames):
            mean = _plain(flat, w, size, dims, signal, noise)
        else:
            rows = w.numel() // max(1, w.shape[-1])
            start, keep = starts(dims, w.device), flat.shape[0] * rows <= KEEP_PROJECTIONS
            length, proj = _op.logits(flat, w, start, 1.0, False, keep)
            dlogits = length * _weights(length, size, dims, signal, noise)
            mean, _ = _op.logits_backward(dlogits, flat, w, start, proj, 1.0, False, True, False)
        root = math.sqrt(signal) / math.hypot(signal, noise)  # of the factor: a float holds it where not the factor
        return (size * root * root * mean).to(x.dtype).view(x.shape)


def _weights(length: Tensor, size: Tensor, dims: Sequence[int] | None, signal: float, noise: float) -> Tensor:
    """Probabilities of the subspaces, (rows, C), from the lengths of projections over sizes (rows, 1)."""
    if length.shape[-1] == 0:
        return length
    if noise == 0:
        return one_hot(length.argmax(-1), length.shape[-1]).to(length)
    # Differences of squares, from which the largest is taken off: no more is lost than the lengths have lost already.
    most = length.amax(-1, keepdim=True)
    factor = _factor(most, size, signal, noise)
    return _softmax((length - most) * factor * ((length + most) * factor) / 2, dims, signal, noise)


def _factor(most: Tensor, size: Tensor, signal: float, noise: float) -> Tensor:
    """The root of what squares of lengths over sizes are multiplied by, given a bound of these: held where the largest
    product still is a number, as the weights beside it are 0 long before."""
    limit = torch.finfo(most.dtype).max
    root = math.sqrt(signal / math.hypot(signal, noise) / noise)
    return torch.minimum((size * root * root).clamp(max=limit / 4), math.sqrt(limit / 4) / most)


def _softmax(score: Tensor, dims: Sequence[int] | None, signal: float, noise: float) -> Tensor:
    if dims is not None:  # those of more dimensions are thinner spread
        thin = math.log(math.hypot(signal, noise)) - math.log(noise)
        score = score - thin * torch.tensor(dims, dtype=score.dtype, device=score.device)
    return score.softmax(-1)


def _plain(x: Tensor, frames: Tensor, size: Tensor, dims: Sequence[int] | None, signal: float,
           noise: float) -> Tensor:
    """The sum of projections by the plain formula, which has all derivatives, and from squares: at a projection of 0
    a length has none. x is that over sizes (rows, 1)."""
    flat = frames.flatten(0, -2)
    proj = linear(x, flat)
    if proj.shape[-1] == 0:
        return proj @ flat
    bound = proj.detach().abs().amax(-1, keepdim=True) * math.sqrt(proj.shape[-1])
    if noise == 0:
        held = _by_class((proj.detach() / bound.masked_fill(bound == 0, 1)).square(), frames, dims)
        weights = one_hot(held.argmax(-1), held.shape[-1]).to(proj)
    else:
        squares = _by_class((proj * _factor(bound, size, signal, noise)).square(), frames, dims)
        weights = _softmax(squares / 2, dims, signal, noise)
    if dims is None:
        weights = weights.repeat_interleave(frames.shape[1], -1)
    else:
        weights = weights[:, owners(dims, frames)]
    return (proj * weights) @ flat


@torch.no_grad()
def class_subspaces(x: Tensor, y: Tensor, k: int, *, num_classes: int | None = None,
                    generator: torch.Generator | None = None) -> Tensor:
    """The k principal directions of each class's points: frames for `subspace_scores` and `subspace_denoise`.

    The PCA is not centred, as subspaces go through the origin. A class with fewer than k independent points is
    completed by random directions.

    Args:
        x: points, (N, n), floating-point.
        y: labels, (N,), int64, 0 <= y < C.
        k: dimension of the subspaces, 1 <= k <= n.
        num_classes: C; without it the largest label plus one.
        generator: draws the random directions, on x's device.

    Returns:
        frames, (C, k, n), on x's device, of its dtype, rows in the order of their energy. For half types float32, since
        rows rounded to halves are not orthonormal: beside half points they are to be cast, ``frames.to(x.dtype)``.
        All in float64: torch.linalg.eigh of the smaller Gram matrix, and torch.linalg.svd of a class's points where
        one of the k directions is shorter than 1/58 of the longest. Rows are right to rounding over the gaps between
        lengths; what is no longer than rounding in x's dtype, float32 for half types, is no direction: about
        (8 + √max(m, n)) eps times the length ‖x‖_F of a class's m points.

    Raises:
        TypeError: x is no dense floating tensor, y none of int64, or k or num_classes is no int.
        ValueError: shapes or numbers do not fit, a label is out of range, or a point is not finite.

    Example:
        >>> x = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.1, 0.0], [0.0, 0.0, 2.0]])
        >>> frames = ts.grassmann.class_subspaces(x, torch.tensor([0, 0, 1]), 1)
        >>> ts.grassmann.subspace_scores(x, frames).argmax(-1)
        tensor([0, 0, 1])
    """
    name = "class_subspaces"
    check_dense(name, "x", x)
    check_dense(name, "y", y)
    check_generator(name, generator)
    k = whole(name, "k", k, 1)
    if x.dtype not in FLOATS or y.dtype != torch.int64:
        raise TypeError(f"{name}: need floating-point x and int64 y, got {x.dtype} and {y.dtype}")
    if x.is_meta or y.is_meta:
        raise ValueError(f"{name}: x and y must hold numbers, got them on {x.device} and {y.device}")
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"{name}: need x (N, n) and y (N,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if k > x.shape[1]:
        raise ValueError(f"{name}: k must be at most the features of x, {x.shape[1]}, got {k}")
    if num_classes is None and not y.numel():
        raise ValueError(f"{name}: y is empty: num_classes must be given, got {told(num_classes)}")
    found = whole(name, "num_classes", num_classes, 1) if num_classes is not None else int(y.max()) + 1
    if y.numel() and not (0 <= y.min() and y.max() < found):
        raise ValueError(f"{name}: need 0 <= y < num_classes = {found}, got labels {int(y.min())} to {int(y.max())}")
    if not x.isfinite().all():
        raise ValueError(f"{name}: a point is not finite")
    own = y.cpu().argsort(stable=True).to(x.device).split(y.cpu().bincount(minlength=found).tolist())
    with torch.autocast(x.device.type, enabled=False):
        frames = [principal_frame(x[rows].double(), k, generator, wide_dtype(x.dtype)) for rows in own]
        return torch.stack(frames).to(wide_dtype(x.dtype))
