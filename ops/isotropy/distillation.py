"""Distillation of a matrix of similarities (Mod-X): what a former model knew of pairs that don't belong together."""
from __future__ import annotations

import torch
from torch import Tensor

from ..common import NOT_NEGATIVE, POSITIVE, check_flag, check_floating, check_number, check_word, wide_dtype

ROWS = ("correct", "all")


def similarity_distillation(old: Tensor, new: Tensor, *, tau: float, alpha: float, rows: str = "correct",
                            diagonal: bool = True, symmetric: bool = True,
                            divergence_tau: float | None = None) -> Tensor:
    """InfoNCE of the new similarities, and alpha times their rows' divergence from the old ones.

        InfoNCE(new / tau) + alpha mean_i KL(softmax(old_i / tau) ‖ softmax(new_i / tau))

    Args:
        old: similarities (..., n, n) of n pairs by the former model, the pairs' own on the diagonal; a constant,
            without a gradient.
        new: those by the model in training.
        tau: temperature, above 0.
        alpha: weight of the divergence, at least 0.
        rows: "correct": rows whose diagonal entry is their largest in `old`; the former model was wrong about the
            others, which count as 0. "all": all of them.
        diagonal: whether the divergence is of whole rows (default), or of their entries off the diagonal, n above 1.
        symmetric: rows and columns alike, their mean, as for images and texts; False for rows alone.
        divergence_tau: another temperature for the divergence; None: tau.

    Returns:
        losses, (...,), of new's dtype; float32 for half types, which are widened first (also under autocast). Means
        are over all n rows. Entries of -inf in `old` are masked: the divergence has no part there, whatever `new` has.
        A row of nothing else (off the diagonal, with diagonal=False) has no divergence and isn't counted in its mean.

    Differentiable in ``new`` any number of times.

    Raises:
        TypeError: old or new is no dense floating tensor, or another argument is of a wrong kind.
        ValueError: shapes, devices or values do not fit.

    Source: Mod-X, Continual Vision-Language Representation Learning with Off-Diagonal Information (ICML 2023). Its
    public code has ``divergence_tau=1`` and the sum over rows: n times the alpha.

    Example:
        >>> old = torch.eye(4)
        >>> new = torch.eye(4).requires_grad_()
        >>> loss = ts.isotropy.similarity_distillation(old, new, tau=0.1, alpha=10.0)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(new / 0.1, torch.arange(4)))  # nothing has changed
        True
        >>> loss.backward()
    """
    name = "similarity_distillation"
    for what, t in (("old", old), ("new", new)):
        check_floating(name, what, t)
        if t.dim() < 2 or t.shape[-1] != t.shape[-2] or t.shape[-1] == 0:
            raise ValueError(f"{name}: {what} must be (..., n, n) with n > 0, got {tuple(t.shape)}")
    if old.shape != new.shape or old.device != new.device:
        raise ValueError(f"{name}: old and new must be alike, got {tuple(old.shape)} on {old.device} and "
                         f"{tuple(new.shape)} on {new.device}")
    check(name, tau, alpha, rows, diagonal, symmetric, divergence_tau)
    if not diagonal and new.shape[-1] == 1:
        raise ValueError(f"{name}: diagonal=False needs n > 1, got new of shape {tuple(new.shape)}")
    old, new = old.detach().to(wide_dtype(new.dtype)), new.to(wide_dtype(new.dtype))
    options = tau, alpha, rows, diagonal, tau if divergence_tau is None else divergence_tau
    loss = _by_rows(old, new, *options)
    return (loss + _by_rows(old.mT, new.mT, *options)) / 2 if symmetric else loss


def check(name: str, tau: float, alpha: float, rows: str, diagonal: bool, symmetric: bool,
          divergence_tau: float | None) -> None:
    """Raises in `name`'s voice unless all can be used."""
    check_number(name, "tau", tau, POSITIVE)
    check_number(name, "alpha", alpha, NOT_NEGATIVE)
    if divergence_tau is not None:
        check_number(name, "divergence_tau", divergence_tau, POSITIVE)
    check_word(name, "rows", rows, ROWS)
    check_flag(name, "diagonal", diagonal)
    check_flag(name, "symmetric", symmetric)


def _by_rows(old: Tensor, new: Tensor, tau: float, alpha: float, rows: str, diagonal: bool,
             divergence_tau: float) -> Tensor:
    nce = -(new / tau).log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    own = torch.eye(new.shape[-1], dtype=torch.bool, device=new.device)
    wrong = old.diagonal(dim1=-2, dim2=-1) < old.amax(-1)  # NaN is not
    if not diagonal:
        old, new = old.masked_fill(own, -torch.inf), new.masked_fill(own, -torch.inf)
    none = old.amax(-1) == -torch.inf  # all masked: no softmax, and none of new's, whose gradient would be 0 times NaN
    old, new = (t.masked_fill(none[..., None], 0) for t in (old, new))
    before, after = ((t / divergence_tau).log_softmax(-1) for t in (old, new))
    apart = (before - after).masked_fill(before == -torch.inf, 0)  # 0 log 0
    divergence = (before.exp() * apart).sum(-1).masked_fill(none | wrong if rows == "correct" else none, 0)
    return nce.mean(-1) + alpha * divergence.sum(-1) / (~none).sum(-1).clamp_min(1)
