"""The gradient of a depthwise convolution's weight, directly.

    dweight[c m + q, 0, k] = sum_{b, o} dy[b, c m + q, o] x[b, c, o stride + k dilation - padding]

The adapter of a depthwise convolution composes its weight, and so needs the weight's gradient at every step; torch's
own takes several times as long as the rest of the convolution on a CPU. See cpu/tucker/depthwise.c.
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
                              padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """d<dy, conv(x, weight, groups=c)> / dweight for a depthwise convolution in one to three dimensions.

    Args:
        x: the convolution's input, (b, c, *in).
        dy: gradient of its output, (b, c m, *out), m >= 1 outputs per channel.
        kernel, stride, padding, dilation: one int per spatial dimension.

    Returns:
        (c m, 1, *kernel) of x's dtype; halves are summed in float32. Differentiable in x and dy, any number of times.

    Raises:
        TypeError: x or dy is not floating point, or their dtypes differ.
        ValueError: shapes or devices do not fit each other or the convolution.
    """
    _check(x, dy, kernel, stride, padding, dilation)
    if transformed():
        return _CONV_WEIGHT[x.dim() - 3](x, (dy.shape[1], 1, *kernel), dy, stride, padding, dilation, x.shape[1])
    return _op.depthwise(x, dy, kernel, stride, padding, dilation).to(x.dtype)


def _check(x: Tensor, dy: Tensor, kernel, stride, padding, dilation) -> None:
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
    b, c, outputs = x.shape[0], x.shape[1], dy.shape[1]
    if dy.shape[0] != b or (outputs % c != 0 or outputs == 0 if c else outputs != 0):
        raise ValueError(f"{name}: dy must be ({b}, a multiple of {c}, ...), got {tuple(dy.shape)}")
    expected = tuple(max(0, (n + 2 * p - d * (k - 1) - 1) // s + 1)
                     for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation))
    if tuple(dy.shape[2:]) != expected:
        raise ValueError(f"{name}: the convolution's output is (..., {', '.join(map(str, expected))}), "
                         f"got dy of {tuple(dy.shape)}")


@torch.library.register_fake("torch_subspace::depthwise")
def _(x, dy, kernel, stride, padding, dilation):
    return x.new_empty((dy.shape[1], 1, *kernel), dtype=wide_dtype(x.dtype))


def _setup(ctx, inputs, output):
    x, dy, *ctx.geometry = inputs
    ctx.save_for_backward(x, dy)


# The op D is bilinear, <D(x, dy), g> = <dy, conv(x, g)>: torch's own convolutions are its derivatives.
def _backward(ctx, g):
    x, dy = ctx.saved_tensors
    _, stride, padding, dilation = ctx.geometry
    which, channels, g = x.dim() - 3, x.shape[1], g.to(x.dtype)
    dx = ddy = None
    if ctx.needs_input_grad[0]:
        dx = _CONV_INPUT[which](x.shape, g, dy, stride, padding, dilation, channels)
    if ctx.needs_input_grad[1]:
        ddy = _CONV[which](x, g, None, stride, padding, dilation, channels)
    return dx, ddy, None, None, None, None


torch.library.register_autograd("torch_subspace::depthwise", _backward, setup_context=_setup)
