"""Subspace logits: a class is a subspace, its score the length of a feature's projection onto it.

    logits[b, c] = gamma * || weight[c] @ x[b] ||        x[b] divided by its length when normalize=True

Grassmann Class Representation, arXiv 2308.01547, eq. 3. One GEMM and one pass over tiles that never
leave the cache; see cpu/grassmann/logits.c.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import autocast, check_flag, check_number, exporting, second_derivative, transformed, wide_dtype
from .frames import check_frames, starts

_op = torch.ops.torch_subspace

# Projections (rows x batch) up to this many elements are kept for the backward: 128 MiB in float32.
# Above, one more GEMM recomputes them tile by tile.
KEEP_PROJECTIONS = 1 << 25


def subspace_logits(x: Tensor, weight: Tensor, *, gamma: float = 25.0, normalize: bool = True,
                    dims: Sequence[int] | None = None) -> Tensor:
    """Lengths of the projections of ``x`` onto the classes' subspaces, times ``gamma``.

    Args:
        x: features, (..., n), any number of leading batch dimensions.
        weight: frames, (C, k, n), the k rows of a class orthonormal; or (sum(dims), n) with ``dims``.
        gamma: scale of the logits (25 in the paper).
        normalize: divide each feature by its length first, or by 1e-12 where that is more, so that
            0 <= logits <= gamma.
        dims: subspace dimension of each class (a sequence of C ints) for ragged frames.

    Returns:
        logits, (..., C), of x's dtype. float16 and bfloat16 are stored as such and computed in float32.

    Differentiable in ``x`` and ``weight`` any number of times; in forward mode and under torch.func by the plain
    formula. Where a projection is 0 its gradient is 0. Under autocast both are cast to the autocast
    dtype, as for a linear layer.

    Raises:
        TypeError: x or weight is no dense floating tensor, their dtypes differ, or another argument is of a wrong kind.
        ValueError: shapes, devices, ``dims`` or ``gamma`` do not fit.

    Source: arXiv 2308.01547, section 3.

    Example:
        >>> weight = torch.eye(4).reshape(2, 2, 4)              # the first two axes, the last two
        >>> ts.subspace_logits(torch.tensor([3.0, 4.0, 0.0, 0.0]), weight, gamma=1.0)
        tensor([1., 0.])
    """
    x, weight = autocast(x, weight)
    dims = check_frames("subspace_logits", x, weight, dims)
    check_number("subspace_logits", "gamma", gamma)
    check_flag("subspace_logits", "normalize", normalize)
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if transformed() or exporting():
        logits = eager_logits(flat, weight, dims, gamma, normalize)
        return logits.view(*x.shape[:-1], logits.shape[1])
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    rows = weight.shape[0] if dims is not None else weight.shape[0] * weight.shape[1]
    keep = grad and flat.shape[0] * rows <= KEEP_PROJECTIONS
    logits, _ = _op.logits(flat, weight, starts(dims, weight.device), float(gamma), bool(normalize), keep)
    return logits if x.dim() == 2 else logits.view(*x.shape[:-1], logits.shape[1])


@torch.library.register_fake("torch_subspace::logits")
def _(x, weight, start, gamma, normalize, keep):
    classes = weight.shape[0] if weight.dim() == 3 else start.shape[0] - 1
    rows = weight.shape[0] * weight.shape[1] if weight.dim() == 3 else weight.shape[0]
    return (x.new_empty(x.shape[0], classes),
            x.new_empty((rows, x.shape[0]) if keep else (0, 0), dtype=wide_dtype(x.dtype)))


@torch.library.register_fake("torch_subspace::logits_backward")
def _(dlogits, x, weight, start, proj, gamma, normalize, need_dx, need_dweight):
    return fake_gradients(x, weight, need_dx, need_dweight)


def fake_gradients(x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool) -> tuple[Tensor, Tensor]:
    return (x.new_empty(x.shape if need_dx else (0,) * x.dim()),
            weight.new_empty(weight.shape if need_dweight else (0,) * weight.dim()))


def _setup(ctx, inputs, output):
    x, weight, start, ctx.gamma, ctx.normalize, _ = inputs
    ctx.save_for_backward(x, weight, start, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogits, _dproj):
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    if dlogits is None:
        return (None,) * 6
    x, weight, start, proj = ctx.saved_tensors
    dx, dweight = _op.logits_backward(dlogits, x, weight, start, proj, ctx.gamma, ctx.normalize, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None, None, None, None


torch.library.register_autograd("torch_subspace::logits", _backward, setup_context=_setup)


def owners(ragged: Sequence[int] | Tensor, weight: Tensor) -> Tensor:
    """The class of each row."""
    if isinstance(ragged, Tensor):
        return torch.repeat_interleave(ragged.diff(), output_size=weight.shape[0])
    return torch.tensor([c for c, k in enumerate(ragged) for _ in range(k)], dtype=torch.int64, device=weight.device)


# The same formula in plain torch operations: for the second derivative (gradient penalties) and for `transformed()`.
# Of ragged frames it asks dims, or the first rows that the op was given.
def eager_logits(x: Tensor, weight: Tensor, ragged: Sequence[int] | Tensor | None, gamma: float,
                 normalize: bool) -> Tensor:
    if normalize:  # as the op: no square overflows, and float16 has neither a floor of 1e-12 nor lengths above 65504
        wide = x.to(wide_dtype(x.dtype))
        wide = wide / wide.detach().abs().amax(-1, keepdim=True).clamp(min=1)
        x = torch.nn.functional.normalize(wide, dim=-1).to(x.dtype)
    squares = torch.nn.functional.linear(x, weight.reshape(-1, weight.shape[-1])).square()
    if weight.dim() == 3:
        squares = squares.view(x.shape[0], weight.shape[0], -1).sum(-1)
    else:
        owner = owners(ragged, weight)
        classes = len(ragged) - isinstance(ragged, Tensor)
        squares = squares.new_zeros(x.shape[0], classes).scatter_add(1, owner.expand_as(squares), squares)
    return gamma * torch.where(squares != 0, squares, 1).sqrt() * (squares != 0)  # NaN stays NaN


def _setup_backward(ctx, inputs, output):
    dlogits, x, weight, start, _, ctx.gamma, ctx.normalize, _, _ = inputs
    ctx.save_for_backward(dlogits, x, weight, start)


def _double_backward(ctx, ddx, ddweight):
    dlogits, x, weight, start = ctx.saved_tensors
    return *second_derivative(lambda x, weight: eager_logits(x, weight, start, ctx.gamma, ctx.normalize), dlogits,
                              (x, weight), (ddx, ddweight)), *(None,) * 6


torch.library.register_autograd("torch_subspace::logits_backward", _double_backward, setup_context=_setup_backward)
