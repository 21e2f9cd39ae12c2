"""The gradient of a depthwise convolution's weight, directly, and of others with small groups.

    dweight[c m + q, p, k] = sum_{b, o} dy[b, c m + q, o] x[b, c n + p, o stride + k dilation - padding]

with n channels and m outputs in group c; n = 1 is depthwise. The adapter of such a convolution composes its weight, and
so needs the weight's gradient at every step; torch's own takes several times as long as the rest of the convolution on
a CPU. See cpu/tucker/depthwise.c.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import check_floating, transformed, wide_dtype

_op = torch.ops.torch_subspace

_CONV = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
_CONV_INPUT = (torch.nn.grad.conv1d_input, torch.nn.grad.conv2d_input, torch.nn.grad.conv3d_input)
_CONV_WEIGHT = (torch.nn.grad.conv1d_weight, torch.nn.grad.conv2d_weight, torch.nn.grad.conv3d_weight)


def depthwise_weight_gradient(x: Tensor, dy: Tensor, kernel: Sequence[int], stride: Sequence[int],
                              padding: Sequence[int], dilation: Sequence[int], groups: int | None = None) -> Tensor:
    """d<dy, conv(x, weight, groups=groups)> / dweight for a grouped convolution in one to three dimensions.

    Args:
        x: the convolution's input, (b, c n, *in).
        dy: gradient of its output, (b, c m, *out), m >= 1 outputs per group.
        kernel, stride, padding, dilation: one int per spatial dimension.
        groups: c, or None for that of a depthwise convolution: a group for each channel of x.

    Returns:
        (c m, n, *kernel) of x's dtype; halves are summed in float32. Differentiable in x and dy, any number of times.

    Raises:
        TypeError: x or dy is not floating point, or their dtypes differ.
        ValueError: shapes or devices do not fit each other or the convolution.
    """
    _check(x, dy, kernel, stride, padding, dilation, groups)
    groups = x.shape[1] if groups is None else groups
    if transformed():
        shape = (dy.shape[1], _inside(x, groups), *kernel)
        return _CONV_WEIGHT[x.dim() - 3](x, shape, dy, stride, padding, dilation, groups)
    return _op.depthwise(x, dy, kernel, stride, padding, dilation, groups).to(x.dtype)


def _inside(x: Tensor, groups: int) -> int:
    """Channels of a group."""
    return x.shape[1] // groups if groups else 1


def _check(x: Tensor, dy: Tensor, kernel, stride, padding, dilation, groups) -> None:
    name = "depthwise_weight_gradient"
    for what, t in (("x", x), ("dy", dy)):
        check_floating(name, what, t)
    if x.dtype != dy.dtype:
        raise TypeError(f"{name}: x and dy must share a dtype, got {x.dtype} and {dy.dtype}")
    if x.device != dy.device:
        raise ValueError(f"{name}: x and dy must be on one device, got {x.device} and {dy.device}")
    if not 3 <= x.dim() <= 5 or dy.dim() != x.dim():
        raise ValueError(f"{name}: x must be (b, c, *in) and dy (b, c m, *out) with one to three spatial dimensions, "
                         f"got {tuple(x.shape)} and {tuple(dy.shape)}")
    for what, value, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0),
                               ("dilation", dilation, 1)):
        if not isinstance(value, Sequence) or len(value) != x.dim() - 2 or not all(
                isinstance(v, int) and v >= least for v in value):
            raise ValueError(f"{name}: {what} must be {x.dim() - 2} ints of at least {least}, got {value}")
    if groups is not None and (not isinstance(groups, int) or groups < 1 or x.shape[1] % groups or not x.shape[1]):
        raise ValueError(f"{name}: groups must be a positive int that divides the {x.shape[1]} channels, got {groups}")
    b, c, outputs = x.shape[0], x.shape[1] if groups is None else groups, dy.shape[1]
    if dy.shape[0] != b or (outputs % c != 0 or outputs == 0 if c else outputs != 0):
        raise ValueError(f"{name}: dy must be ({b}, a multiple of {c}, ...), got {tuple(dy.shape)}")
    expected = tuple(max(0, (n + 2 * p - d * (k - 1) - 1) // s + 1)
                     for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation))
    if tuple(dy.shape[2:]) != expected:
        raise ValueError(f"{name}: the convolution's output is (..., {', '.join(map(str, expected))}), "
                         f"got dy of {tuple(dy.shape)}")


@torch.library.register_fake("torch_subspace::depthwise")
def _(x, dy, kernel, stride, padding, dilation, groups):
    return x.new_empty((dy.shape[1], _inside(x, groups), *kernel), dtype=wide_dtype(x.dtype))


def _setup(ctx, inputs, output):
    x, dy, *ctx.geometry = inputs
    ctx.save_for_backward(x, dy)


# The op D is bilinear, <D(x, dy), g> = <dy, conv(x, g)>: torch's own convolutions are its derivatives.
def _backward(ctx, g):
    x, dy = ctx.saved_tensors
    _, stride, padding, dilation, groups = ctx.geometry
    which, g = x.dim() - 3, g.to(x.dtype)
    dx = ddy = None
    if ctx.needs_input_grad[0]:
        dx = _CONV_INPUT[which](x.shape, g, dy, stride, padding, dilation, groups)
    if ctx.needs_input_grad[1]:
        ddy = _CONV[which](x, g, None, stride, padding, dilation, groups)
    return dx, ddy, None, None, None, None, None


torch.library.register_autograd("torch_subspace::depthwise", _backward, setup_context=_setup)
