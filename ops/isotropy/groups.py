"""Groups of rows that vanish together: the group lasso, and its proximal step."""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..common import NOT_NEGATIVE, check_floating, check_number, shares_memory, told, whole, wide_dtype


def group_lasso(weight: Tensor, groups: Iterable[int]) -> Tensor:
    """The sum of the lengths of groups of rows: a penalty under which whole groups become 0.

    Args:
        weight: (rows, ...); any dimensions after the first.
        groups: sizes of the groups along dimension 0, ints of at least 1 whose sum is `rows`.

    Returns:
        sum over groups g of ‖weight_g‖₂, a scalar of weight's dtype; float32 for half types, which are widened first.

    Differentiable any number of times; a group of zeros has the gradient 0, which is one of its subgradients. A plain
    gradient step does not make groups 0: `prox_group_lasso_` does.

    Raises:
        TypeError: weight is no dense floating tensor, or groups no sequence of ints.
        ValueError: the sizes do not fit.

    Source: Yuan and Lin, Journal of the Royal Statistical Society B 68 (2006); without their factors of the sizes.

    Example:
        >>> weight = torch.tensor([[3.0, 0], [0, 4], [0, 0], [1, 0]])
        >>> ts.isotropy.group_lasso(weight, [2, 1, 1])
        tensor(6.)
    """
    _, norm = _norms("group_lasso", weight, groups)
    return norm.sum().to(wide_dtype(weight.dtype))


@torch.no_grad()
def prox_group_lasso_(weight: Tensor, groups: Iterable[int], step: float) -> Tensor:
    """The group lasso's proximal step, in place: groups become shorter by `step`, those no longer than that 0.

        weight_g <- max(0, 1 - step / ‖weight_g‖₂) weight_g

    the exact minimum of ½ ‖w - weight‖² + step · group_lasso(w). After a gradient step of size lr on the other losses,
    `step` is lr times the penalty's weight. Without a gradient, as an optimiser's step.

    Args:
        weight: as for `group_lasso`; changed in place. Half types are computed in float32.
        groups: as for `group_lasso`.
        step: how much shorter, at least 0.

    Returns:
        weight.

    Raises: TypeError, ValueError as `group_lasso`, or where elements of weight share memory; before any change.

    Example:
        >>> weight = torch.tensor([[3.0, 0], [0, 4], [0, 0], [1, 0]])
        >>> ts.isotropy.prox_group_lasso_(weight, [2, 1, 1], 2.5)
        tensor([[1.5000, 0.0000],
                [0.0000, 2.0000],
                [0.0000, 0.0000],
                [0.0000, 0.0000]])
    """
    check_number("prox_group_lasso_", "step", step, NOT_NEGATIVE)
    index, norm = _norms("prox_group_lasso_", weight, groups)
    if shares_memory(weight):
        raise ValueError(f"prox_group_lasso_: weight must have no elements that share memory, got strides "
                         f"{weight.stride()} for shape {tuple(weight.shape)}")
    factor = torch.where(norm <= step, 0, 1 - step / norm)[index].to(wide_dtype(weight.dtype))
    scaled = weight * factor.view(-1, *[1] * (weight.dim() - 1))
    return weight.copy_(torch.where(scaled == 0, 0, scaled))  # no -0


def _norms(name: str, weight: Tensor, groups: Iterable[int]) -> tuple[Tensor, Tensor]:
    """The group of each row, and the groups' lengths in float64."""
    check_floating(name, "weight", weight)
    if weight.dim() == 0:
        raise ValueError(f"{name}: weight must be (rows, ...), got a scalar of shape ()")
    sizes = group_sizes(name, groups)
    if sum(sizes) != weight.shape[0]:
        raise ValueError(f"{name}: groups have {sum(sizes)} rows, weight has {weight.shape[0]}: got sizes "
                         f"{told(groups)} for shape {tuple(weight.shape)}")
    index = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)], dtype=torch.int64,
                         device=weight.device)
    square = weight.to(torch.float64).reshape(len(index), math.prod(weight.shape[1:])).square().sum(1)  # beyond float32
    square = square.new_zeros(len(sizes)).index_add(0, index, square)
    some = square > 0  # of a group of zeros the square root has no slope; NaN is no number above 0 either
    return index, torch.where(some, torch.where(some, square, 1).sqrt(), square)


def group_sizes(name: str, groups: Iterable[int]) -> list[int]:
    """The sizes as ints; raises in `name`'s voice unless they are some of at least 1."""
    rule = f"{name}: groups must be sizes along dimension 0, ints of at least 1, got {told(groups)}"
    if isinstance(groups, (str, bytes, dict, set)):
        raise TypeError(rule)
    try:
        return [whole("", "", size, 1) for size in groups]
    except TypeError:
        raise TypeError(rule) from None
    except ValueError:
        raise ValueError(rule) from None
