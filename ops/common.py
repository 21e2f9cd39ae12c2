"""What every op's wrapper asks for: dtypes, autocast, transforms. Importing it registers torch.ops.torch_subspace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import library  # noqa: F401  (registers torch.ops.torch_subspace)

WIDE = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*WIDE, *HALF)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in: float64 for itself, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast the tensors as a linear layer or a convolution would get them; the first one's device decides.

    float64 is left alone, as everywhere in torch; None stays None, and what is no tensor is for the caller's checks.
    """
    x = tensors[0]
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
                 for t in tensors)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast on x's device, for products whose digits matter."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else contextlib.nullcontext()


def transformed() -> bool:
    """Where an op registered from outside torch cannot take part, and the plain formula serves: inside torch.func's
    transforms and forward-mode AD (its tangent would silently be zero), and in a trace, which others are to run."""
    if torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return torch.autograd.forward_ad._current_level >= 0


def finite(number: float) -> bool:
    """math.isfinite, also of the symbolic numbers of torch.compile(dynamic=True)."""
    return -math.inf < number < math.inf


def check_floating(name: str, what: str, t: object) -> None:
    """Raises in `name`'s voice unless `what` is a tensor of a dtype that the kernels read."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: {what} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: {what} must be float32, float64, float16 or bfloat16, got {t.dtype}")


def second_derivative(function, dy: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]):
    """Gradients in dy and the inputs of <weights, the gradient of <dy, function(inputs)> in the inputs>.

    `function` is the op's plain formula. A weight of None, or of another shape (what an op returns for a gradient that
    was not asked for is empty), counts as zero.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (dy, *inputs)]
        first = torch.autograd.grad(function(*leaves[1:]), leaves[1:], leaves[0], create_graph=True)
        inner = sum((w * g).sum() for w, g in zip(weights, first) if w is not None and w.shape == g.shape)
    return torch.autograd.grad(inner, leaves, allow_unused=True)
