"""The fast Walsh-Hadamard transform: n log2(n) sums and differences for a product with a matrix of ±1.

    y_i = Σ_j (-1)^(number of ones in i & j) x_j               H x, in natural (Hadamard's) order

H is symmetric and H H = n 1: the gradient of H x is H dy, so that nothing is saved for it. See cpu/lowrank/hadamard.h.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import check_flag, check_floating, transformed, wide_dtype

_op = torch.ops.torch_subspace
LONGEST = 1 << 26  # the contract's SUBSPACE_HADAMARD


def hadamard(x: Tensor, *, normalize: bool = False) -> Tensor:
    """Walsh-Hadamard transform along the last dimension, in natural order.

    Args:
        x: (..., n), n a power of two up to 2^26, of any floating dtype.
        normalize: divide by the root of n, which makes the transform orthogonal and its own inverse. Without it, two
            transforms multiply by n.

    Returns:
        H x, (..., n), of x's dtype: half types are computed in float32 and rounded once, also under autocast. The same
        bits on every device and for any number of threads.

    Differentiable any number of times, and nothing is saved for it; forward mode and torch.func go by the plain
    formula.

    Raises:
        TypeError: x is no dense floating tensor, or normalize no bool.
        ValueError: n is no power of two, or larger than 2^26.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> ts.lowrank.hadamard(x)
        tensor([10., -2., -4.,  0.])
        >>> ts.lowrank.hadamard(ts.lowrank.hadamard(x, normalize=True), normalize=True)
        tensor([1., 2., 3., 4.])
    """
    check_floating("hadamard", "x", x)
    check_flag("hadamard", "normalize", normalize)
    n = x.shape[-1] if x.dim() > 0 else 0
    if n < 1 or n > LONGEST or n & (n - 1):
        raise ValueError(f"hadamard: x must be (..., n) with n a power of two up to 2^26, got {tuple(x.shape)}")
    scale = 1 / math.sqrt(n) if normalize else 1.0
    if transformed():
        return plain(x, scale)
    return _op.hadamard(x.reshape(math.prod(x.shape[:-1]), n), scale).view(x.shape)


def plain(x: Tensor, scale: float) -> Tensor:
    """The same in plain torch operations, for `transformed()`."""
    y, half = x.to(wide_dtype(x.dtype)), x.shape[-1] // 2
    while half:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y, half = torch.stack((a + b, a - b), -2).flatten(-3), half // 2
    return (y * scale).to(x.dtype)


@torch.library.register_fake("torch_subspace::hadamard")
def _(x, scale):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    ctx.scale = inputs[1]


def _backward(ctx, dy):
    return _op.hadamard(dy, ctx.scale), None


torch.library.register_autograd("torch_subspace::hadamard", _backward, setup_context=_setup)
