"""Subspace logits: a class is a subspace, its score the length of a feature's projection onto it.

    logits[b, c] = gamma * || weight[c] @ x[b] ||        x[b] divided by its length when normalize=True

Grassmann Class Representation, arXiv 2308.01547, eq. 3. One GEMM and one pass over tiles that never
leave the cache; see cpu/logits.c.
"""
from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import library  # noqa: F401  (registers torch.ops.torch_subspace)

_op = torch.ops.torch_subspace

# Projections (rows x batch) up to this many elements are kept for the backward: 128 MiB in float32.
# Above, one more GEMM recomputes them tile by tile.
KEEP_PROJECTIONS = 1 << 25

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_frames(name: str, x: Tensor, weight: Tensor, dims: Sequence[int] | None) -> None:
    """Shapes, dtypes and devices that every op on (x, frames) asks for; raises in `name`'s voice."""
    for what, t in (("x", x), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {what} must be a tensor, got {type(t).__name__}")
        if t.dtype not in _FLOATS:
            raise TypeError(f"{name}: {what} must be float32, float64, float16 or bfloat16, got {t.dtype}")
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: x and weight must share a dtype, got {x.dtype} and {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"{name}: x and weight must be on one device, got {x.device} and {weight.device}")
    if x.dim() < 1:
        raise ValueError(f"{name}: x must be (..., n), got a scalar")
    check_dims(name, weight, dims)
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{name}: x has {x.shape[-1]} features but weight has {weight.shape[-1]}")


def check_dims(name: str, weight: Tensor, dims: Sequence[int] | None) -> None:
    """A weight of frames is (C, k, n) with 0 < k <= n, or (sum of dims, n) with such dims."""
    if weight.dim() != (3 if dims is None else 2):
        want = "(C, k, n)" if dims is None else "(sum of dims, n) with dims"
        raise ValueError(f"{name}: weight must be {want}, got shape {tuple(weight.shape)}")
    n = weight.shape[-1]
    if dims is None:
        if weight.shape[0] > 0 and not 0 < weight.shape[1] <= n:
            raise ValueError(f"{name}: need 0 < k <= n, got k={weight.shape[1]}, n={n}")
        return
    for c, k in enumerate(dims):
        if not 0 < k <= n:
            raise ValueError(f"{name}: need 0 < k <= n, got dims[{c}]={k}, n={n}")
    if sum(dims) != weight.shape[0]:
        raise ValueError(f"{name}: dims sum to {sum(dims)} but weight has {weight.shape[0]} rows")


def starts(dims: Sequence[int] | None, device: torch.device) -> Tensor:
    """First row of each class and one past the last, as the kernels want it; empty for uniform frames."""
    if dims is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(_first_rows(dims), dtype=torch.int64, device=device)
    with torch.inference_mode(False):  # it may be saved for a backward later
        return _starts(tuple(dims), device)


def _first_rows(dims: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(int(k) for k in dims)]


@functools.lru_cache(maxsize=64)  # a copy to the GPU would stall the stream at every call
def _starts(dims: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(_first_rows(dims), dtype=torch.int64, device=device)


def subspace_logits(x: Tensor, weight: Tensor, *, gamma: float = 25.0, normalize: bool = True,
                    dims: Sequence[int] | None = None) -> Tensor:
    """Lengths of the projections of ``x`` onto the classes' subspaces, times ``gamma``.

    Args:
        x: features, (..., n), any number of leading batch dimensions.
        weight: frames, (C, k, n), the k rows of a class orthonormal; or (sum(dims), n) with ``dims``.
        gamma: scale of the logits (25 in the paper).
        normalize: divide each feature by its length first, so that 0 <= logits <= gamma.
        dims: subspace dimension of each class (a sequence of C ints) for ragged frames.

    Returns:
        logits, (..., C), of x's dtype. float16 and bfloat16 are stored as such and computed in float32.

    Differentiable in ``x`` and ``weight``, twice; in forward mode and under torch.func by the plain
    formula. Where a projection is 0 its gradient is 0. Under autocast both are cast to the autocast
    dtype, as for a linear layer.

    Raises:
        TypeError: x or weight is not floating point, or their dtypes differ.
        ValueError: shapes, devices, ``dims`` or ``gamma`` do not fit.

    Source: arXiv 2308.01547, section 3.
    """
    x, weight = _autocast(x, weight)
    check_frames("subspace_logits", x, weight, dims)
    check_gamma("subspace_logits", gamma)
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if transformed():
        logits = _eager(flat, weight, starts(dims, weight.device), gamma, normalize)
        return logits.view(*x.shape[:-1], logits.shape[1])
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    rows = weight.shape[0] if dims is not None else weight.shape[0] * weight.shape[1]
    keep = grad and flat.shape[0] * rows <= KEEP_PROJECTIONS
    logits, _ = _op.logits(flat, weight, starts(dims, weight.device), float(gamma), bool(normalize), keep)
    return logits if x.dim() == 2 else logits.view(*x.shape[:-1], logits.shape[1])


def transformed() -> bool:
    """Inside torch.func's transforms or forward-mode AD, which an op registered from outside torch cannot take
    part in: its tangent would silently be zero. The plain formula serves there."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def check_gamma(name: str, gamma: float) -> None:
    if isinstance(gamma, Tensor) or not math.isfinite(gamma):
        raise ValueError(f"{name}: gamma must be a finite number, got {gamma!r}")


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast does for a linear layer; float64 is left alone, as everywhere in torch."""
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
                 for t in (x, weight))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("torch_subspace::logits")
def _(x, weight, start, gamma, normalize, keep):
    classes = weight.shape[0] if weight.dim() == 3 else start.shape[0] - 1
    rows = weight.shape[0] * weight.shape[1] if weight.dim() == 3 else weight.shape[0]
    return (x.new_empty(x.shape[0], classes),
            x.new_empty((rows, x.shape[0]) if keep else (0, 0), dtype=_wide(x.dtype)))


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


# The same formula in plain torch operations: for the second derivative (gradient penalties) and for `transformed()`.
def _eager(x: Tensor, weight: Tensor, start: Tensor, gamma: float, normalize: bool) -> Tensor:
    if normalize:
        x = torch.nn.functional.normalize(x, dim=-1)
    squares = torch.nn.functional.linear(x, weight.reshape(-1, weight.shape[-1])).square()
    if weight.dim() == 3:
        squares = squares.view(x.shape[0], weight.shape[0], -1).sum(-1)
    else:
        owner = torch.repeat_interleave(start.diff())
        squares = squares.new_zeros(x.shape[0], start.numel() - 1).index_add(1, owner, squares)
    return gamma * torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)


def _setup_backward(ctx, inputs, output):
    dlogits, x, weight, start, _, ctx.gamma, ctx.normalize, _, _ = inputs
    ctx.save_for_backward(dlogits, x, weight, start)


def _double_backward(ctx, ddx, ddweight):
    dlogits, x, weight, start = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (dlogits, x, weight)]
        logits = _eager(inputs[1], inputs[2], start, ctx.gamma, ctx.normalize)
        first = torch.autograd.grad(logits, inputs[1:], inputs[0], create_graph=True)
        inner = sum((d * g).sum() for d, g in zip((ddx, ddweight), first) if d is not None and d.shape == g.shape)
    second = torch.autograd.grad(inner, inputs, allow_unused=True)
    return *second, *(None,) * 6


torch.library.register_autograd("torch_subspace::logits_backward", _double_backward, setup_context=_setup_backward)
