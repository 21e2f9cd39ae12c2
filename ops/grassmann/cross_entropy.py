"""Fused softmax cross-entropy over subspace logits: O(batch) extra memory.

    loss[b] = lse[b] * sum_c tau[b, c] - sum_c tau[b, c] logits[b, c],    lse = log sum_c exp(logits)

with tau the (smoothed, class-weighted) target. Neither the (B, C) logits nor the (B, C, k) projections
are ever stored: both passes recompute them in tiles, see cpu/grassmann/cross_entropy.c. The log-sum-exp is summed
online over panels of classes, as fused linear cross-entropies do; here the logits are norms.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import (
    UP_TO_1,
    autocast,
    check_dense,
    check_flag,
    check_floating,
    check_number,
    check_word,
    second_derivative,
    transformed,
    whole,
    wide_dtype,
)
from .frames import check_frames, starts
from .logits import eager_logits, fake_gradients, subspace_logits

_op = torch.ops.torch_subspace
_NAME = "subspace_cross_entropy"


def subspace_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, *, gamma: float = 25.0, normalize: bool = True,
                           dims: Sequence[int] | None = None, class_weight: Tensor | None = None,
                           ignore_index: int = -100, label_smoothing: float = 0.0,
                           reduction: str = "mean") -> Tensor:
    """``cross_entropy(subspace_logits(x, weight), target)`` without the logits.

    Args:
        x: features, (..., n).
        weight: frames, (C, k, n), or (sum(dims), n) with ``dims``.
        target: int64 labels (...,) in [0, C), or class probabilities (..., C) (mixup, cutmix, distillation).
        gamma, normalize, dims: as in `subspace_logits`.
        class_weight: (C,) non-negative weights, as torch's ``weight``.
        ignore_index: label of rows that count for nothing (labels only).
        label_smoothing: in [0, 1]; mixes the target with the uniform distribution.
        reduction: "mean" (over the class weights of the labels that count, or over rows for
            probabilities), "sum" or "none".

    Under autocast features and frames are cast to its dtype, as for a linear layer; probabilities and class weights
    keep theirs, up to the loss's.

    Returns:
        the loss, a scalar or (...,); float32 for half inputs. The mean over no rows at all is 0, where
        torch's own gives NaN.

    Raises:
        TypeError, ValueError: types, dtypes, shapes or values do not fit; labels out of range are found
        on the CPU (on CUDA, where looking would stall the stream, such a row's loss is NaN).

    Source: arXiv 2308.01547 for the logits; semantics of torch.nn.functional.cross_entropy.

    Example:
        >>> x, weight = torch.randn(4, 8, requires_grad=True), ts.GrassmannLinear(8, 3, 2).weight
        >>> target = torch.tensor([0, 2, 1, 2])
        >>> loss = ts.subspace_cross_entropy(x, weight, target)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(ts.subspace_logits(x, weight), target), atol=1e-5)
        True
        >>> loss.backward()
    """
    return cross_entropy_of(x, weight, target, gamma=gamma, normalize=normalize, dims=dims, class_weight=class_weight,
                            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)


def cross_entropy_of(x, weight, target, *, gamma, normalize, dims, class_weight, ignore_index, label_smoothing,
                     reduction, part=None):
    """The loss; where `weight` is a part of the classes, `part` has `classes`, their number in all, and `rows`, which
    takes what `_rows` does, of all classes but for the weight, and returns the loss of each row."""
    x, weight = autocast(x, weight)
    dims = check_frames(_NAME, x, weight, dims)
    check_number(_NAME, "gamma", gamma)
    check_flag(_NAME, "normalize", normalize)
    if part is not None:
        classes = part.classes
    else:
        classes = weight.shape[0] if dims is None else len(dims)
    if type(ignore_index) is not int or not -(1 << 63) <= ignore_index < 1 << 63:
        ignore_index = whole(_NAME, "ignore_index", ignore_index, -(1 << 63))
    labels, all_count = _check_target(x, target, classes, ignore_index)
    check_number(_NAME, "label_smoothing", label_smoothing, UP_TO_1)
    check_word(_NAME, "reduction", reduction, ("mean", "sum", "none"))
    if class_weight is not None:
        _check_class_weight(class_weight, classes, x.device)

    if not labels and torch.is_grad_enabled() and target.requires_grad:  # rare: a teacher that learns too
        if part is not None:
            raise ValueError(f"{_NAME}: target: probabilities that require a gradient are for heads that are whole: "
                             "detach them")
        return _with_target_gradient(x, weight, target, gamma, normalize, dims, class_weight, label_smoothing,
                                     reduction)
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    flat_target = target.reshape(-1) if labels else target.detach().to(wide_dtype(x.dtype)).reshape(-1, classes)
    scale = (torch.empty(0, dtype=torch.float64, device=x.device) if class_weight is None
             else class_weight.detach().to(torch.float64))
    rows = _rows if part is None else part.rows
    loss = rows(flat, weight, dims, flat_target, scale, float(gamma), bool(normalize), int(ignore_index),
                float(label_smoothing))
    if reduction == "none":
        return loss.view(x.shape[:-1])
    if reduction == "mean" and all_count and class_weight is None:
        return loss.mean()
    total = loss.sum()
    if reduction == "sum":
        return total
    if not labels:
        return total / max(loss.shape[0], 1)
    counted = flat_target != ignore_index
    if class_weight is None:
        return total / counted.sum().clamp(min=1)
    weights = class_weight.detach().to(loss.dtype)[flat_target.clamp(0, classes - 1)] * counted
    mass = weights.sum()
    return total / torch.where(mass > 0, mass, 1)


def _rows(x, weight, dims, target, class_weight, *options):
    """The loss of each row. class_weight is float64, empty for ones."""
    if transformed():
        return _eager(x, weight, dims, target, class_weight, *options)
    return _op.cross_entropy(x, weight, starts(dims, weight.device), target, class_weight, *options, 0)[0]


def _check_target(x: Tensor, target: Tensor, classes: int, ignore_index: int) -> tuple[bool, bool]:
    """Whether the target are labels, or else probabilities, and of labels whether none is known to be ignored."""
    check_dense(_NAME, "target", target)
    if target.device != x.device:
        raise ValueError(f"{_NAME}: x and target must be on one device, got {x.device} and {target.device}")
    if classes == 0:
        raise ValueError(f"{_NAME}: weight needs at least one class, got C=0")
    if target.is_floating_point():
        check_floating(_NAME, "target", target)
        if target.shape != (*x.shape[:-1], classes):
            raise ValueError(f"{_NAME}: target: probabilities must be {(*x.shape[:-1], classes)} for this x, "
                             f"got {tuple(target.shape)}")
        return False, False
    if target.dtype != torch.int64:
        raise TypeError(f"{_NAME}: target: labels must be int64, or probabilities floating, got {target.dtype}")
    if target.shape != x.shape[:-1]:
        raise ValueError(f"{_NAME}: target: labels must be {tuple(x.shape[:-1])} for this x, got {tuple(target.shape)}")
    if target.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed()) and target.numel():
        least, most = map(int, target.aminmax())
        if least < 0 or most >= classes:  # the rarer case: labels to be ignored, or wrong ones
            wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
            if wrong.any():
                raise ValueError(f"{_NAME}: target: labels must be in [0, {classes}), got {target[wrong][0].item()}")
        return True, not least <= ignore_index <= most
    return True, False


def _check_class_weight(class_weight: Tensor, classes: int, device: torch.device) -> None:
    check_floating(_NAME, "class_weight", class_weight)
    if class_weight.shape != (classes,) or class_weight.device != device:
        raise ValueError(f"{_NAME}: class_weight must be ({classes},) on {device}, "
                         f"got {tuple(class_weight.shape)} on {class_weight.device}")


def _with_target_gradient(x, weight, target, gamma, normalize, dims, class_weight, label_smoothing, reduction):
    wide = wide_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        logits = subspace_logits(x.to(wide), weight.to(wide), gamma=gamma, normalize=normalize, dims=dims)
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), target.to(logits.dtype).reshape(-1, logits.shape[-1]),
        weight=None if class_weight is None else class_weight.detach().to(logits.dtype),
        label_smoothing=label_smoothing, reduction=reduction)
    return loss.view(x.shape[:-1]) if reduction == "none" else loss


@torch.library.register_fake("torch_subspace::cross_entropy")
def _(x, weight, start, target, class_weight, gamma, normalize, ignore_index, label_smoothing, classes):
    return x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype)), x.new_empty(2, x.shape[0], dtype=wide_dtype(x.dtype))


@torch.library.register_fake("torch_subspace::cross_entropy_backward")
def _(dloss, x, weight, start, target, class_weight, stats, gamma, normalize, ignore_index, label_smoothing,
      classes, need_dx, need_dweight):
    return fake_gradients(x, weight, need_dx, need_dweight)


def _setup(ctx, inputs, output):
    x, weight, start, target, class_weight, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, start, target, class_weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, _dstats):
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    if dloss is None:
        return (None,) * 10
    dx, dweight = _op.cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.rest, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, *(None,) * 8


torch.library.register_autograd("torch_subspace::cross_entropy", _backward, setup_context=_setup)


# The same in plain torch operations, a loss a row: for the second derivative and for `transformed()`.
def _eager(x, weight, ragged, target, class_weight, gamma, normalize, ignore_index, label_smoothing):
    logits = eager_logits(x, weight, ragged, gamma, normalize).to(wide_dtype(x.dtype))
    labels = not target.is_floating_point()
    return torch.nn.functional.cross_entropy(
        logits, target if labels else target.to(logits.dtype), reduction="none",
        weight=class_weight.to(logits.dtype) if class_weight.numel() else None,
        ignore_index=ignore_index if labels else -100, label_smoothing=label_smoothing)


def _setup_backward(ctx, inputs, output):
    dloss, x, weight, start, target, class_weight, _, *ctx.rest, ctx.classes, _, _ = inputs
    ctx.save_for_backward(dloss, x, weight, start, target, class_weight)


def _double_backward(ctx, ddx, ddweight):
    if ctx.classes:
        raise RuntimeError(f"{_NAME}: of a part of the classes there is no second derivative")
    dloss, x, weight, *fixed = ctx.saved_tensors
    return *second_derivative(lambda x, weight: _eager(x, weight, *fixed, *ctx.rest), dloss, (x, weight),
                              (ddx, ddweight)), *(None,) * 11


torch.library.register_autograd("torch_subspace::cross_entropy_backward", _double_backward,
                                setup_context=_setup_backward)
