"""Losses that spread features like a standard normal distribution, to be minimised.

    SIGRegLoss    SIGReg(z)                                                        arXiv 2511.08544
    LeJEPALoss    weight SIGReg(z) + (1 - weight) mean_v ||mean_v z_v - z_v||²     views of the same things agree

With a `process_group` every process passes its own part of the batch and gets the loss of the whole. Beside them, as
modules, `lambda_orthogonality` and `group_lasso` of weights and `similarity_distillation` of similarities: they have
options and nothing that is trained.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common import UP_TO_1, all_reduce, check_floating, check_number, check_word, wide_dtype
from . import distillation, orthogonality
from .distillation import similarity_distillation
from .groups import group_lasso, group_sizes
from .orthogonality import lambda_orthogonality
from .sigreg import check, sigreg

REDUCTIONS = ("mean", "sum", "none")
DISTANCES = ("squared", "mean")


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


class SIGRegLoss(nn.Module):
    """`sigreg` as a module, averaged over views.

    Args:
        num_slices, knots, t_max, views, process_group: as for `sigreg`.
        reduction: over views: "mean" (default), "sum" or "none".

    Shape: z (n, d) or views (V, n, d); a scalar, or (V,) with reduction "none". float32 for half inputs.

    Directions are drawn anew in every call. ``loss(z, seed=step)`` fixes them without a message between processes.

    Raises: TypeError, ValueError as `sigreg`.

    Example:
        >>> z = torch.randn(2, 64, 8, requires_grad=True)
        >>> loss = ts.isotropy.SIGRegLoss(num_slices=64)(z, seed=0)
        >>> torch.equal(loss, ts.isotropy.sigreg(z, num_slices=64, seed=0).mean())
        True
        >>> loss.backward()
    """

    def __init__(self, num_slices: int = 256, knots: int = 17, t_max: float = 3.0, *, views: str = "each",
                 reduction: str = "mean", process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.num_slices, self.knots = check("SIGRegLoss", num_slices, knots, t_max, views, process_group)
        check_word("SIGRegLoss", "reduction", reduction, REDUCTIONS)
        self.t_max, self.views = t_max, views
        self.reduction, self.process_group = reduction, process_group

    def forward(self, z: Tensor, *, seed: int | None = None) -> Tensor:
        loss = sigreg(z, num_slices=self.num_slices, knots=self.knots, t_max=self.t_max, seed=seed, views=self.views,
                      process_group=self.process_group)
        return _reduced(loss, self.reduction)

    def extra_repr(self) -> str:
        return (f"num_slices={self.num_slices}, knots={self.knots}, t_max={self.t_max}, views={self.views!r}, "
                f"reduction={self.reduction!r}")


class LeJEPALoss(nn.Module):
    """SIGReg and the distance of views from their mean: joint embedding that can't collapse, without a teacher.

    Args:
        weight: of SIGReg, in [0, 1]; the distance has the rest. 0.02, the authors' minimal code; 0.05 elsewhere.
        num_slices, knots, t_max, views, process_group: as for `sigreg`.
        distance: "squared": the squared length of the difference, the paper's. "mean": the mean over its d entries,
            as the authors' code and lightly's have it.

    Shape: z (V, n, d), the same n things in V views. A scalar; float32 for half inputs.

    ``loss(z, centre)`` takes the mean of other views, (W, n, d), to be near to: lightly's global ones.
    ``seed=`` fixes the directions of a call.

    Raises: TypeError, ValueError as `sigreg`, or where the views do not fit.

    Source: arXiv 2511.08544.

    Example:
        >>> z = torch.randn(4, 64, 8, requires_grad=True)
        >>> loss = ts.isotropy.LeJEPALoss()(z, seed=0)
        >>> distance = (z - z.mean(0)).square().sum(-1).mean()
        >>> torch.allclose(loss, 0.02 * ts.isotropy.sigreg(z, seed=0).mean() + 0.98 * distance)
        True
        >>> loss.backward()
    """

    def __init__(self, weight: float = 0.02, *, num_slices: int = 256, knots: int = 17, t_max: float = 3.0,
                 views: str = "each", distance: str = "squared",
                 process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        check_number("LeJEPALoss", "weight", weight, UP_TO_1)
        self.num_slices, self.knots = check("LeJEPALoss", num_slices, knots, t_max, views, process_group)
        check_word("LeJEPALoss", "distance", distance, DISTANCES)
        self.weight, self.distance, self.process_group = weight, distance, process_group
        self.t_max, self.views = t_max, views

    def forward(self, z: Tensor, centre: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        for what, t in (("z", z), ("centre", z if centre is None else centre)):
            check_floating("LeJEPALoss", what, t)
            if t.dim() != 3 or t.shape[0] == 0:
                raise ValueError(f"LeJEPALoss: {what} must be (V, n, d) with V > 0, got {tuple(t.shape)}")
            if t.shape[1:] != z.shape[1:] or t.device != z.device:
                raise ValueError(f"LeJEPALoss: z and centre must be of the same points, on one device, got "
                                 f"{tuple(z.shape)} on {z.device} and {tuple(t.shape)} on {t.device}")
        spread = sigreg(z, num_slices=self.num_slices, knots=self.knots, t_max=self.t_max, seed=seed, views=self.views,
                        process_group=self.process_group).mean()
        wide = z.to(wide_dtype(z.dtype))
        middle = (wide if centre is None else centre.to(wide.dtype)).mean(0)
        apart = (wide - middle).square()
        apart = apart.sum(-1) if self.distance == "squared" else apart.mean(-1)
        if self.process_group is None:
            distance = apart.mean()
        else:
            total = apart.sum(dtype=torch.float64)
            total, count = all_reduce(torch.stack((total, torch.full_like(total, apart.numel()))), self.process_group)
            distance = (total / count).to(apart.dtype)
        return self.weight * spread + (1 - self.weight) * distance

    def extra_repr(self) -> str:
        return (f"weight={self.weight}, num_slices={self.num_slices}, knots={self.knots}, t_max={self.t_max}, "
                f"views={self.views!r}, distance={self.distance!r}")


class LambdaOrthogonalityLoss(nn.Module):
    """`lambda_orthogonality` as a module, averaged over weights.

    Args:
        lam: the distance that is allowed.
        alpha: steepness of the sigmoid, above 0; default 1.
        reduction: over weights: "mean" (default), "sum" or "none".

    Shape: a weight (..., k, n), or a sequence or ParameterList of weights (k_i, n_i); a scalar, or with reduction
    "none" (...,) or (number of weights,). float32 for half types.

    Raises: TypeError, ValueError as `lambda_orthogonality`; of the options, when it is made.

    Source: arXiv 2509.16664.

    Example:
        >>> layers = [torch.nn.Linear(6, 4), torch.nn.Linear(4, 4)]
        >>> near = ts.isotropy.LambdaOrthogonalityLoss(0.5, reduction="sum")
        >>> loss = near([layer.weight for layer in layers])
        >>> torch.allclose(loss, sum(ts.isotropy.lambda_orthogonality(layer.weight, 0.5) for layer in layers))
        True
        >>> loss.backward()
    """

    def __init__(self, lam: float, *, alpha: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        orthogonality.check("LambdaOrthogonalityLoss", lam, alpha)
        check_word("LambdaOrthogonalityLoss", "reduction", reduction, REDUCTIONS)
        self.lam, self.alpha, self.reduction = lam, alpha, reduction

    def forward(self, weight: Tensor | Sequence[Tensor] | nn.ParameterList) -> Tensor:
        return _reduced(lambda_orthogonality(weight, self.lam, alpha=self.alpha), self.reduction)

    def extra_repr(self) -> str:
        return f"lam={self.lam}, alpha={self.alpha}, reduction={self.reduction!r}"


class SimilarityDistillationLoss(nn.Module):
    """`similarity_distillation` (Mod-X) as a module, averaged over batches of pairs.

    Args:
        tau, alpha, rows, diagonal, symmetric, divergence_tau: as for `similarity_distillation`.
        reduction: over leading dimensions: "mean" (default), "sum" or "none".

    Shape: old, new (..., n, n), the former model's similarities first; a scalar, or (...,) with reduction "none".
    new's dtype; float32 for half types.

    Raises: TypeError, ValueError as `similarity_distillation`; of the options, when it is made.

    Source: Mod-X, Continual Vision-Language Representation Learning with Off-Diagonal Information (ICML 2023).

    Example:
        >>> old, new = torch.eye(4), torch.randn(4, 4).requires_grad_()
        >>> loss = ts.isotropy.SimilarityDistillationLoss(tau=0.1, alpha=10.0)(old, new)
        >>> torch.equal(loss, ts.isotropy.similarity_distillation(old, new, tau=0.1, alpha=10.0))
        True
        >>> loss.backward()
    """

    def __init__(self, *, tau: float, alpha: float, rows: str = "correct", diagonal: bool = True,
                 symmetric: bool = True, divergence_tau: float | None = None, reduction: str = "mean") -> None:
        super().__init__()
        name = "SimilarityDistillationLoss"
        distillation.check(name, tau, alpha, rows, diagonal, symmetric, divergence_tau)
        check_word(name, "reduction", reduction, REDUCTIONS)
        self.tau, self.alpha, self.rows, self.divergence_tau = tau, alpha, rows, divergence_tau
        self.diagonal, self.symmetric, self.reduction = bool(diagonal), bool(symmetric), reduction

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        loss = similarity_distillation(old, new, tau=self.tau, alpha=self.alpha, rows=self.rows,
                                       diagonal=self.diagonal, symmetric=self.symmetric,
                                       divergence_tau=self.divergence_tau)
        return _reduced(loss, self.reduction)

    def extra_repr(self) -> str:
        return (f"tau={self.tau}, alpha={self.alpha}, rows={self.rows!r}, diagonal={self.diagonal}, "
                f"symmetric={self.symmetric}, divergence_tau={self.divergence_tau}, reduction={self.reduction!r}")


class GroupLassoLoss(nn.Module):
    """`group_lasso` as a module: the sum of the lengths of groups of rows.

    Args:
        groups: sizes of the groups along dimension 0, ints of at least 1.

    Shape: weight (rows, ...), as many rows as the groups have; a scalar of its dtype, float32 for half types.

    ``loss.groups``, a tuple, is for `prox_group_lasso_`, whose step makes groups 0 where a gradient's does not.

    Raises: TypeError, ValueError as `group_lasso`; of the sizes by themselves, when it is made.

    Source: Yuan and Lin, Journal of the Royal Statistical Society B 68 (2006); without their factors of the sizes.

    Example:
        >>> weight = torch.tensor([[3.0, 0], [0, 4], [0, 0], [1, 0]])
        >>> penalty = ts.isotropy.GroupLassoLoss([2, 1, 1])
        >>> penalty(weight), penalty(ts.isotropy.prox_group_lasso_(weight, penalty.groups, 2.5))
        (tensor(6.), tensor(2.5000))
    """

    def __init__(self, groups: Iterable[int]) -> None:
        super().__init__()
        self.groups = tuple(group_sizes("GroupLassoLoss", groups))

    def forward(self, weight: Tensor) -> Tensor:
        return group_lasso(weight, self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
