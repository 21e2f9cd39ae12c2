"""Coding-rate losses, to be minimised: total coding rate, coding rate reduction, manifold linearising clustering.

    CodingRateLoss    -R(Z)                                     EMP-SSL, SimDINO: spread the features
    MCR2Loss          -(R(Z) - Rc(Z, membership))               arXiv 2006.08558: spread all, compress each class
    MLCLoss           -R(Z) + Rc(Z, Γ) + reg/2 ‖Γ‖²             arXiv 2301.01805: the same without labels,
                      Γ = sinkhorn(|Ĉ Ĉ'|, eta)                 Ĉ: unit rows of the cluster head's output

`eps` is the papers' ε² everywhere. With a `process_group` every process passes its own part of the batch and gets the
loss of the whole. Rates need sums over points only, so Grams are summed over the processes, d x d numbers each in
float64; MLC's Γ couples all pairs of points, so there the features are gathered.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common import (
    NOT_NEGATIVE,
    POSITIVE,
    all_reduce,
    check_floating,
    check_group,
    check_number,
    check_word,
    full_precision,
    gather_rows,
    transformed,
    unit,
)
from ..transport.sinkhorn import sinkhorn
from .coding_rate import check, coding_rate, log_pivots, rate_reduction

REDUCTIONS = ("mean", "sum", "none")


def _check(name, eps, reduction, process_group, **positive):
    for what, value in {"eps": eps, **positive}.items():
        check_number(name, what, value, POSITIVE)
    check_word(name, "reduction", reduction, REDUCTIONS)
    check_group(name, process_group)


def _reduced(loss, reduction):
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


class CodingRateLoss(nn.Module):
    """Minus the total coding rate, -R(z).

    Args:
        eps: allowed squared distortion, the papers' ε²; default 0.5.
        reduction: over views: "mean" (default), "sum" or "none".
        process_group: a torch.distributed group whose processes each hold a part of the points, some perhaps none,
            or None.

    Shape: z (n, d) or views (V, n, d); a scalar, or (V,) with reduction "none". float32 for half inputs.

    Raises: TypeError, ValueError as `coding_rate`, or when an argument is wrong.

    In a process group the gradient is that of the sum of all processes' (equal) losses, as torch.distributed.nn's
    collectives define it: after DistributedDataParallel's mean it is the gradient of the loss of the whole batch.

    Example:
        >>> z = torch.nn.functional.normalize(torch.eye(4), dim=1).requires_grad_()
        >>> loss = ts.CodingRateLoss(eps=0.5)(z)
        >>> torch.equal(loss, -ts.coding_rate(z, eps=0.5))
        True
        >>> loss.backward()
    """

    def __init__(self, eps: float = 0.5, *, reduction: str = "mean",
                 process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        _check(type(self).__name__, eps, reduction, process_group)
        self.eps, self.reduction, self.process_group = eps, reduction, process_group

    def forward(self, z: Tensor) -> Tensor:
        if self.process_group is None:
            return _reduced(-coding_rate(z, eps=self.eps), self.reduction)
        return _reduced(-_summed_rate(z, None, self.eps, self.process_group), self.reduction)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, reduction={self.reduction!r}"


class MCR2Loss(CodingRateLoss):
    """Minus the coding rate reduction, -(R(z) - Rc(z, membership)).

    Args:
        eps, reduction, process_group: as for `CodingRateLoss`.

    Shape: z (n, d) or views (V, n, d); membership int64 labels (n,) or (V, n), or weights >= 0, (n, K) or (V, n, K).

    In a process group labels cost d x d numbers a class to sum, up to the largest label of all processes.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(20, 8), dim=1).requires_grad_()
        >>> labels = torch.arange(20) % 4
        >>> loss = ts.MCR2Loss(eps=0.5)(z, labels)
        >>> torch.allclose(loss, -ts.rate_reduction(z, labels, eps=0.5))
        True
        >>> loss.backward()
    """

    def forward(self, z: Tensor, membership: Tensor) -> Tensor:
        if self.process_group is None:
            return _reduced(-rate_reduction(z, membership, eps=self.eps), self.reduction)
        group = self.process_group
        if membership is None:
            raise TypeError("MCR2Loss: membership must be a tensor, got None")
        return _reduced(_summed_rate(z, membership, self.eps, group) - _summed_rate(z, None, self.eps, group),
                        self.reduction)


class _Products(torch.autograd.Function):
    """c c', with a gradient that is in full precision too where the backward runs under autocast."""

    @staticmethod
    def forward(ctx, c):
        ctx.save_for_backward(c)
        return c @ c.mT

    @staticmethod
    def backward(ctx, dproduct):
        c, = ctx.saved_tensors
        with full_precision(c):
            return (dproduct + dproduct.mT) @ c


class MLCLoss(nn.Module):
    """-R(z) + Rc(z, Γ) + reg/2 ‖Γ‖², with ``Γ = sinkhorn(|ĉ ĉ'|, eta)`` a doubly stochastic membership.

    Args:
        eps: allowed squared distortion, the papers' ε²; default 0.5.
        eta: entropy of the projection, 0.1 to 0.175 in the paper; smaller is sharper; default 0.1.
        reg: weight of the penalty that keeps Γ from concentrating; default 0.05. May be 0.
        reduction, process_group: as for `CodingRateLoss`; in a group all features are gathered.
        mode: the projection's gradient, see `sinkhorn`: "implicit" (exact) or "cpp" (the public code's).

    Shape: z (n, d) features, usually with unit rows, and c (n, h), the cluster head's output, whose rows are normalised
    here; or views (V, n, d) and (V, n, h).

    `membership(c)` is Γ, for the read-out.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(20, 8), dim=1).requires_grad_()
        >>> c = torch.randn(20, 6, requires_grad=True)
        >>> loss = ts.MLCLoss(eps=0.5, eta=0.1)
        >>> loss(z, c).backward()
        >>> torch.allclose(loss.membership(c).sum(1), torch.ones(20), atol=1e-4)
        True
    """

    def __init__(self, eps: float = 0.5, eta: float = 0.1, reg: float = 0.05, *, reduction: str = "mean",
                 mode: str = "implicit", process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        _check("MLCLoss", eps, reduction, process_group, eta=eta)
        check_number("MLCLoss", "reg", reg, NOT_NEGATIVE)
        check_word("MLCLoss", "mode", mode, ("implicit", "cpp"))
        self.eps, self.eta, self.reg, self.mode = eps, eta, reg, mode
        self.reduction, self.process_group = reduction, process_group

    def membership(self, c: Tensor) -> Tensor:
        """Γ (..., n, n) of cluster features (..., n, h)."""
        check_floating("MLCLoss", "c", c)
        if c.dim() < 2 or 0 in c.shape[-2:]:
            raise ValueError(f"MLCLoss: c must be (..., n, h) with n > 0 and h > 0, got {tuple(c.shape)}")
        with full_precision(c):
            c = unit(c if c.dtype == torch.float64 else c.float())
            cosines = c @ c.mT if transformed() else _Products.apply(c)
            return sinkhorn(cosines.abs(), eta=self.eta, symmetric=True, mode=self.mode)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        check("MLCLoss", z, None, self.eps, part=self.process_group is not None)
        check_floating("MLCLoss", "c", c)
        if z.shape[:-1] != c.shape[:-1]:
            raise ValueError(f"MLCLoss: z and c must be of the same points, got {tuple(z.shape)} and {tuple(c.shape)}")
        if self.process_group is not None:
            z, c = gather_rows(z, self.process_group), gather_rows(c, self.process_group)
            check("MLCLoss", z, None, self.eps)
        gamma = self.membership(c)
        penalty = 0.5 * self.reg * gamma.square().sum((-2, -1))
        return _reduced(penalty - rate_reduction(z, gamma.to(z.dtype) if z.dtype == torch.float64 else gamma,
                                                 eps=self.eps), self.reduction)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, eta={self.eta}, reg={self.reg}, reduction={self.reduction!r}, mode={self.mode!r}"


# ------------------------------------------------------------------------------------------------- process groups


def _summed_rate(z, membership, eps, group):
    """R or Rc of all processes' points; every process gets the same number, bit for bit."""
    check("coding_rate", z, membership, eps, part=True)
    if membership is not None and membership.is_floating_point() and not (membership >= 0).all():
        raise ValueError(f"coding_rate: weights must be 0 or more, got {membership.min().item():g}")
    wide = z.double()
    *views, n, d = z.shape
    if membership is None:
        weights = wide.new_ones(n, 1)
    elif membership.is_floating_point():
        weights = membership.double()
    else:
        top = membership.max() if membership.numel() else membership.new_zeros(())
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        weights = nn.functional.one_hot(membership, int(top) + 1).double()
    weights = weights.expand(*views, n, weights.shape[-1])
    gram = torch.stack([(w[..., None] * wide).mT @ wide for w in weights.unbind(-1)], -3)
    packed = torch.cat([gram.flatten(-3), weights.sum(-2), wide.new_full((*views, 1), n)], -1)
    packed = all_reduce(packed, group)
    k = weights.shape[-1]
    if not z.is_cuda and not packed[..., -1].all():
        raise ValueError(f"coding_rate: z must have points in one process at least, got {tuple(z.shape)} in each")
    gram, mass, total = packed.split([k * d * d, k, 1], -1)
    gram = gram.unflatten(-1, (k, d, d))
    share = torch.where(mass > 0, mass, 1)
    half_logdet = log_pivots(d / eps * gram / share[..., None, None]).sum(-1)
    rate = (mass * half_logdet).sum(-1) / total.squeeze(-1)
    if not z.is_cuda and not rate.isfinite().all():
        raise RuntimeError("coding_rate: z holds values that are not finite, or points so long, of low rank, that "
                           "their Gram matrix in float64 rounds their rate away: scale z")
    return rate if z.dtype == torch.float64 else rate.float()
