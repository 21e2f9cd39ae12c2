"""λ-orthogonality: weights whose rows are orthonormal up to a distance that costs little.

    f     = ‖W Wᵀ - 1‖_F                              0 for orthonormal rows
    loss  = sigmoid(alpha (f - lam)) f                about f beyond lam, little below
    dW    = (sigmoid + alpha f sigmoid') 2 (W Wᵀ - 1) W / f

For k > n rows of length n the k x k matrix has k - n eigenvalues of -1 whatever W is: f² = ‖Wᵀ W - 1‖² + k - n, and
(W Wᵀ - 1) W = W (Wᵀ W - 1). So the smaller Gram matrix serves. Two products a weight: one forward, on a CPU of little
more than its lower half, one backward.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..common import (
    POSITIVE,
    check_floating,
    check_number,
    full_precision,
    second_derivative,
    told,
    transformed,
    wide_dtype,
)

LARGE = 256  # rows, from which on a CPU products are worth being divided


def lambda_orthogonality(weight: Tensor | Sequence[Tensor] | nn.ParameterList, lam: float, *,
                         alpha: float = 1.0) -> Tensor:
    """How far rows are from orthonormal, ‖W Wᵀ - 1‖, with little weight below `lam`.

        sigmoid(alpha (f - lam)) f,    f = ‖W Wᵀ - 1‖_F

    Args:
        weight: (..., k, n), leading dimensions with a loss each; or a sequence or ParameterList of weights (k_i, n_i)
            of any sizes, of one dtype on one device, all in one call. Their rows are asked about: of k > n rows, which
            can't be orthonormal, f is at least sqrt(k - n), reached by orthonormal columns.
        lam: the distance that is allowed; 12 for 1024 features in the paper, 0 for the usual soft orthogonality.
        alpha: steepness of the sigmoid, above 0.

    Returns:
        losses (...,), or (number of weights,) for a sequence, of weight's dtype; float32 for half types, which are
        widened first (also under autocast). To be minimised.

    Differentiable any number of times. Towards orthonormal rows the gradient is bounded, and there, where f has a kink,
    it is 0.

    Raises:
        TypeError: weight is no dense floating tensor, nor a sequence of such.
        ValueError: shapes, dtypes, devices or values do not fit.

    Source: λ-orthogonality regularisation for compatible representations, arXiv 2509.16664.

    Example:
        >>> layers = [torch.nn.Linear(6, 4), torch.nn.Linear(4, 4)]
        >>> loss = ts.isotropy.lambda_orthogonality([layer.weight for layer in layers], 0.5)
        >>> loss.shape
        torch.Size([2])
        >>> loss.sum().backward()
        >>> ts.isotropy.lambda_orthogonality(torch.eye(3), 0.5)
        tensor(0.)
    """
    name = "lambda_orthogonality"
    check(name, lam, alpha)
    several = isinstance(weight, (Sequence, nn.ParameterList)) and not isinstance(weight, (str, bytes))
    if several:
        weights = list(weight)
        if not weights:
            raise ValueError(f"{name}: weight must be weights, got an empty {told(weight)}")
        for i, w in enumerate(weights):
            _check(name, f"weight[{i}]", w)
            if w.dim() != 2:
                raise ValueError(f"{name}: weight[{i}] must be (k, n), got {tuple(w.shape)}")
            if w.dtype != weights[0].dtype or w.device != weights[0].device:
                raise ValueError(f"{name}: weights must be of one dtype on one device, got weight[{i}] of {w.dtype} on "
                                 f"{w.device} after {weights[0].dtype} on {weights[0].device}")
    else:
        _check(name, "weight", weight)
        weights = [weight]
    wide = [w.to(wide_dtype(w.dtype)) for w in weights]
    with full_precision(wide[0]):
        # a node of the graph for each weight: its matrix is given back as soon as its gradient is there
        losses = torch.stack([_plain(w, lam, alpha) if transformed() else _Loss.apply(w, lam, alpha) for w in wide])
    return losses if several else losses[0]


def check(name: str, lam: float, alpha: float) -> None:
    """Raises in `name`'s voice unless both can be used."""
    check_number(name, "lam", lam)
    check_number(name, "alpha", alpha, POSITIVE)


def _check(name: str, what: str, weight: Tensor) -> None:
    check_floating(name, what, weight)
    if weight.dim() < 2 or 0 in weight.shape[-2:]:
        raise ValueError(f"{name}: {what} must be (..., k, n) with k > 0 and n > 0, got {tuple(weight.shape)}")


def _excess(weight: Tensor) -> Tensor:
    """W Wᵀ - 1, or Wᵀ W - 1 where that is smaller."""
    rows = weight if weight.shape[-2] <= weight.shape[-1] else weight.mT
    product = rows @ rows.mT
    return product - torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)


def _excess_in_strips(weight: Tensor) -> Tensor:
    """The same, of a large matrix: what is left of the diagonal, in four strips, then its mirror: 5/8 of the work."""
    rows = weight if weight.shape[-2] <= weight.shape[-1] else weight.mT
    k = rows.shape[-2]
    if k < LARGE or weight.is_cuda:
        return _excess(weight)
    ends, found = [k * i // 4 for i in range(5)], weight.new_empty((*weight.shape[:-2], k, k))
    for i, j in itertools.pairwise(ends):
        found[..., i:j, :j] = rows[..., i:j, :] @ rows[..., :j, :].mT
        found[..., :i, i:j] = found[..., i:j, :i].mT
    found.diagonal(dim1=-2, dim2=-1).sub_(1)
    return found


def _squares(excess: Tensor) -> torch.dtype:
    """What squares are summed in: float32 ends long before f does."""
    return torch.float32 if excess.device.type == "mps" else torch.float64


def _distance(excess: Tensor, square: Tensor, rows: int) -> Tensor:
    """f, of the excess and the sum of its squares; at 0 without a slope."""
    square = square + (rows - excess.shape[-1])
    off = square != 0
    return torch.where(off, torch.where(off, square, 1).sqrt(), 0).to(excess.dtype)


def _plain(weight: Tensor, lam: float, alpha: float) -> Tensor:
    excess = _excess(weight)
    f = _distance(excess, excess.to(_squares(excess)).square().sum((-2, -1)), weight.shape[-2])
    return torch.sigmoid(alpha * (f - lam)) * f


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, lam, alpha):
        ctx.lam, ctx.alpha = lam, alpha
        excess = _excess_in_strips(weight)
        norm = torch.linalg.vector_norm(excess, dim=(-2, -1), dtype=_squares(excess))  # one pass, nothing held
        f = _distance(excess, norm.square(), weight.shape[-2])
        ctx.save_for_backward(weight, excess, f)
        return torch.sigmoid(alpha * (f - lam)) * f

    @staticmethod
    def backward(ctx, dloss):
        weight, excess, f = ctx.saved_tensors
        return _Gradient.apply(dloss, weight, excess.detach(), f.detach(), ctx.lam, ctx.alpha), None, None


class _Gradient(torch.autograd.Function):
    """Of one weight: a product, with what the forward has kept."""

    @staticmethod
    def forward(ctx, dloss, weight, excess, f, lam, alpha):
        ctx.save_for_backward(dloss, weight)
        ctx.lam, ctx.alpha = lam, alpha
        gate = torch.sigmoid(alpha * (f - lam))
        scale = dloss * gate * (1 + alpha * f * (1 - gate)) * 2 / torch.where(f == 0, 1, f)
        with full_precision(weight):
            product = excess @ weight if weight.shape[-2] <= weight.shape[-1] else weight @ excess
        return product.mul_(scale[..., None, None])

    @staticmethod
    def backward(ctx, weight_of_gradient):
        dloss, weight = ctx.saved_tensors
        with full_precision(weight):
            found = second_derivative(lambda w: _plain(w, ctx.lam, ctx.alpha), dloss, (weight,), (weight_of_gradient,))
        return *found, None, None, None, None
