"""The von Neumann entropy of points: how evenly their variance is spread over directions.

    rho    = Zᵀ Z / tr Zᵀ Z                      with eigenvalues p >= 0 of sum 1
    S      = -sum p log p                        from 0 (one direction has all) to log d (all the same)
    dS     = -<log rho + S, dG> / tr G           of the Gram matrix G = Zᵀ Z: no differences of eigenvectors in it
    dS/dZ  = -2 Z (log rho + S) / tr G

Repeated eigenvalues are therefore nothing special. At an eigenvalue of 0 log rho is infinite, but Z is 0 there, and
along it S changes like -s² log s² with the singular value s, whose slope is 0: the gradient in Z exists, is finite, and
has no part there. In numbers the logarithm of an eigenvalue that can't be told from 0 is that of the dtype's precision.
Eigenvalues other than 0 are those of Z Zᵀ, too, which is taken where it is smaller.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import check_group, check_word, full_precision, unit, wide_dtype
from .products import Function, applied, check_points, gram, summed, traced

OF = ("points", "covariance", "directions")


def von_neumann_entropy(z: Tensor, *, of: str = "points", process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Von Neumann entropy of points' second moments, in nats: 0 for points on a line, log d for isotropic ones.

    Args:
        z: points, (..., n, d), n and d above 0; leading dimensions are views, each with an entropy of its own.
        of: what has trace 1. "points": Zᵀ Z, as they are. "covariance": their mean is taken off first. "directions":
            rows are divided by their lengths; rows of 0 stay.
        process_group: a torch.distributed group whose processes each hold a part of the points, some perhaps none, or
            None.

    Returns:
        entropies, (...,), of z's dtype; float32 for half types, which are widened first (also under autocast). 0 where
        nothing is left: points that are all 0, or all the same for "covariance". NaN or infinity in z gives NaN.

    Differentiable in ``z``, with finite gradients at repeated eigenvalues and at those of 0, of which Z's part is 0
    itself. Second derivatives are exact, too, but at an eigenvalue of 0 they don't exist; third ones are refused. All
    that holds in torch.func's transforms and in forward mode. To be maximised against collapse: a loss has -S. In a
    process group the gradient is that of the sum of all processes' (equal) entropies: after DistributedDataParallel's
    mean it is that of the whole batch.

    Raises:
        TypeError: z is no dense floating tensor, or process_group of a wrong kind.
        ValueError: z's shape, or an unknown word.

    Source: arXiv 2304.01434 has "directions"; information-theoretic Koopman models have "covariance".

    Example:
        >>> z = torch.randn(512, 4)
        >>> entropy = ts.isotropy.von_neumann_entropy(z)
        >>> bool(1.3 < entropy < 1.387)                  # log 4 = 1.386...
        True
        >>> bool(ts.isotropy.von_neumann_entropy(torch.ones(5, 3)) < 1e-5)
        True
    """
    name = "von_neumann_entropy"
    check_points(name, "z", z, process_group)
    check_word(name, "of", of, OF)
    check_group(name, process_group)
    wide, n = z.to(wide_dtype(z.dtype)), z.shape[-2]
    wide = wide / _largest(wide, -1 if of == "directions" else (-2, -1), process_group)
    if of == "directions":
        wide = unit(wide)
    elif of == "covariance" and process_group is None:
        wide = wide - wide.mean(-2, keepdim=True)
    elif of == "covariance":
        total, count = summed(wide.sum(-2, keepdim=True), n, process_group)
        wide = wide - total / count
    if process_group is None:
        return _entropy(gram(wide.mT if n < z.shape[-1] else wide))
    moments, count = summed(gram(wide), n, process_group)
    if not z.is_cuda and not count:
        raise ValueError(f"{name}: z must have points in one process at least, got {tuple(z.shape)} in each")
    return _entropy(moments)


def _largest(z: Tensor, dim: int | tuple[int, int], group: dist.ProcessGroup | None) -> Tensor:
    """The largest entry of each row or view, by which it is divided: squares neither overflow nor vanish whatever the
    units. As the entropy doesn't depend on it, it is a constant to all derivatives. 1 where all are 0."""
    z = z.detach()
    if dim == -1 or z.shape[-2]:
        largest = z.abs().amax(dim, keepdim=True)
    else:  # a process without points
        largest = z.new_zeros((*z.shape[:-2], 1, 1))
    if dim != -1 and group is not None:  # all parts of a view by the same
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    return torch.where(largest == 0, 1, largest)


def _entropy(moments: Tensor) -> Tensor:
    with full_precision(moments):
        known = moments if traced() else moments.detach()
        finite = known.isfinite().all(-1).all(-1)[..., None]
        value, vector = torch.linalg.eigh(torch.where(finite[..., None], known, 0))
        value = value.clamp_min(0)
        total = value.sum(-1, keepdim=True)
        total = torch.where(finite, torch.where(total > 0, total, 1), torch.nan)
        p = value / total
        p = p.masked_fill(p <= torch.finfo(p.dtype).eps, 0)  # can't be told from 0; NaN stays
        return _sum(p) if traced() else applied(_Entropy, moments, p, vector, total)


def _sum(p: Tensor) -> Tensor:
    """-sum p log p."""
    return torch.special.entr(p.masked_fill(p == 0, 1)).sum(-1)


class _Entropy(Function):
    """S of a Gram matrix G."""

    @staticmethod
    def forward(moments, p, vector, total):
        return _sum(p)

    @staticmethod
    def backward(ctx, dentropy):
        return applied(_Slope, dentropy, *ctx.saved_tensors), None, None, None

    @staticmethod
    def tangent(inputs, dmoments, *_):
        return (applied(_Slope, torch.ones_like(inputs[1][..., 0]), *inputs) * dmoments).sum((-2, -1))


class _Slope(Function):
    """-dS (log rho + S) / tr G, and its derivatives in dS and G.

    That of log rho along H is, in rho's eigenvectors, H_ij times (log p_i - log p_j) / (p_i - p_j), which is 1 / p_i
    where the two are equal: the divided difference, of which repeated eigenvalues don't make infinities.
    """

    @staticmethod
    def forward(dentropy, moments, p, vector, total):
        slope = -dentropy[..., None] * _level(p) / total
        with full_precision(p):
            return vector * slope[..., None, :] @ vector.mT

    @staticmethod
    def backward(ctx, weight):
        return *_second(weight, *ctx.saved_tensors), None, None, None

    @staticmethod
    def tangent(inputs, ddentropy, dmoments, *_):
        along = _second(dmoments, *inputs)[1]  # as second derivatives are symmetric
        return applied(_Slope, ddentropy, *inputs[1:]) + along


def _second(weight: Tensor, dentropy: Tensor, moments: Tensor, *known: Tensor) -> tuple[Tensor, Tensor]:
    return applied(_Second, weight, dentropy, applied(_Constant, moments), *known)


class _Second(Function):
    """The derivatives of <weight, slope> in dS and G. Linear in weight, as in dS, and differentiable in both:
    torch.autograd.functional.hvp asks for it. In G they are `_Constant`."""

    @staticmethod
    def forward(weight, dentropy, moments, p, vector, total):
        with full_precision(p):
            h = vector.mT @ (weight + weight.mT) @ vector / 2
            held, level = h.diagonal(dim1=-2, dim2=-1), _level(p)
            ratio = _divided(p.clamp_min(torch.finfo(p.dtype).eps))
            inner = (held * level).sum(-1, keepdim=True)
            straight = (held * ratio.diagonal(dim1=-2, dim2=-1) * p).sum(-1, keepdim=True)
            on_diagonal = straight + held.sum(-1, keepdim=True) * level + inner
            dmoments = ratio * h - torch.diag_embed(on_diagonal)
            dmoments = vector @ dmoments @ vector.mT
        scale = -(dentropy[..., None] / total.square())[..., None]
        return -(inner / total).squeeze(-1), scale * dmoments

    @staticmethod
    def backward(ctx, a, b):
        weight, dentropy, *at = ctx.saved_tensors
        along = _second(b, torch.ones_like(dentropy), *at)[1]  # as second derivatives are symmetric
        dweight = applied(_Slope, a, *at) + dentropy[..., None, None] * along
        return dweight, (along * weight).sum((-2, -1)), None, None, None, None

    @staticmethod
    def tangent(inputs, dweight, ddentropy, *_):
        weight, dentropy, *at = inputs
        inner, along = _second(dweight, dentropy, *at)
        return inner, along + _second(weight, ddentropy, *at)[1]


class _Constant(Function):
    """G of second derivatives, which have none in it. A node of its own: asked for those in weight, torch passes it by.
    """

    @staticmethod
    def forward(moments):
        return moments.clone()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("von_neumann_entropy: differentiable twice, third derivatives are not there")

    tangent = backward


def _level(p: Tensor) -> Tensor:
    """Eigenvalues of log rho + S."""
    return p.clamp_min(torch.finfo(p.dtype).eps).log() + torch.special.entr(p).sum(-1, keepdim=True)


def _divided(p: Tensor) -> Tensor:
    """(log p_i - log p_j) / (p_i - p_j): 2 atanh(r) / r / (p_i + p_j) of r = (p_i - p_j) / (p_i + p_j)."""
    apart, both = p[..., :, None] - p[..., None, :], p[..., :, None] + p[..., None, :]
    square = (apart / both).square()
    far = square > 1e-4
    log = p.log()
    exact = (log[..., :, None] - log[..., None, :]) / torch.where(far, apart, 1)
    return torch.where(far, exact, 2 * (1 + square * (1 / 3 + square * (1 / 5 + square / 7))) / both)
