"""A linear layer and its Tucker change, without ever forming the change.

    y = x weight' + bias + scale * drop(x) v' core' u'

The first product is torch's own; the rest is three small ones in a pass over x and a pass over y. Only x is kept for
the backward. FLoRA, arXiv 2405.14739; with core = identity it is LoRA, arXiv 2106.09685; cpu/tucker/tucker_linear.c.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import (
    BELOW_1,
    autocast,
    check_flag,
    check_floating,
    check_number,
    exporting,
    plain_gradients,
    transformed,
    wide_dtype,
)

_op = torch.ops.torch_subspace
_NAME = "tucker_linear"


def tucker_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, core: Tensor, u: Tensor, v: Tensor, *,
                  scale: float = 1.0, dropout: float = 0.0, training: bool = True) -> Tensor:
    """``linear(x, weight, bias)`` plus ``scale * drop(x) @ v.T @ core.T @ u.T``.

    Args:
        x: (..., n).
        weight: (m, n), also a transposed view; None for the change alone (then without bias).
        bias: (m,) or None.
        core: (r_out, r_in).
        u: (m, r_out).
        v: (r_in, n), also a transposed view, which is read and given its gradient as it lies.
        scale: a number on the change.
        dropout: probability in [0, 1) of zeroing an entry of x on its way through the change; the others are divided by
            1 - dropout. The mask follows from one draw of torch's generator, and is drawn again in the backward.
        training: without it there is no dropout.

    Returns:
        (..., m) of x's dtype. With a core of zeros it is ``linear(x, weight, bias)`` to the bit.

    Half-precision x and weight go with core, u and v of float32 (others are converted): the change is computed in
    float32 and rounded once into y. Under autocast x, weight and bias are cast as for a linear layer. Differentiable in
    every tensor any number of times; in forward mode and under torch.func by the plain formula.

    Raises:
        TypeError: a tensor is not floating point, or the dtypes of x, weight and bias differ.
        ValueError: shapes, devices, ``scale`` or ``dropout`` do not fit.

    Source: arXiv 2405.14739, section 3.

    Example:
        >>> x, weight = torch.randn(4, 6), torch.randn(8, 6)
        >>> core, u, v = torch.randn(2, 3), torch.randn(8, 2), torch.randn(3, 6)
        >>> y = ts.tucker_linear(x, weight, None, core, u, v)
        >>> torch.allclose(y, x @ (weight + u @ core @ v).T, atol=1e-4)
        True
    """
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, bias, core, u, v, scale, dropout, training)
    core, u, v = (t.to(wide_dtype(x.dtype)) for t in (core, u, v))
    dropout = float(dropout) if training else 0.0
    if transformed() or exporting():
        return _eager(x, weight, bias, core, u, v, F.dropout(torch.ones_like(x), dropout), float(scale))
    flat = x.view(-1, x.shape[-1]) if x.dim() > 2 and x.is_contiguous() else x  # as torch's own linear does
    y = _TuckerLinear.apply(flat, weight, bias, core, u, v, draw_seed(dropout, x.device), float(scale), dropout)
    return y if flat is x else y.view(*x.shape[:-1], y.shape[-1])


def draw_seed(dropout: float, device: torch.device) -> Tensor:
    """Seed of a dropout mask, (1,) of int64 on the device: no copy to it, and torch's generator decides."""
    if dropout == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def dropout_mask(seed: Tensor, dropout: float, shape, dtype: torch.dtype) -> Tensor:
    """The kernels' mask in plain torch: 0 or 1 / (1 - dropout); see shim/contract/dropout.h."""

    def shifted(h, bits):  # int64 has no unsigned shift
        return (h >> bits) & ((1 << (64 - bits)) - 1)

    h = seed + (torch.arange(math.prod(shape), device=seed.device) + 1) * (0x9E3779B97F4A7C15 - (1 << 64))
    h = (h ^ shifted(h, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    h = (h ^ shifted(h, 27)) * (0x94D049BB133111EB - (1 << 64))
    uniform = shifted(h ^ shifted(h, 31), 40).to(torch.float32) * 2.0**-24
    kept = uniform >= torch.tensor(dropout, dtype=torch.float32, device=seed.device)
    return (kept.to(torch.float64) / (1 - dropout)).to(dtype).view(shape)


def check_options(name: str, scale: float, dropout: float, training: bool) -> None:
    check_number(name, "scale", scale)
    check_number(name, "dropout", dropout, BELOW_1)
    check_flag(name, "training", training)


def _check(x, weight, bias, core, u, v, scale, dropout, training) -> None:
    given = {"x": x, "weight": weight, "bias": bias, "core": core, "u": u, "v": v}
    for what, t in given.items():
        if t is None and what in ("weight", "bias"):
            continue
        check_floating(_NAME, what, t)
        if t.device != x.device:
            raise ValueError(f"{_NAME}: {what} is on {t.device}, x on {x.device}")
        if what in ("weight", "bias") and t.dtype != x.dtype:
            raise TypeError(f"{_NAME}: x and {what} must share a dtype, got {x.dtype} and {t.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{_NAME}: x must be (..., n), got a scalar")
    if core.dim() != 2 or 0 in core.shape:
        raise ValueError(f"{_NAME}: core must be (r_out, r_in), got shape {tuple(core.shape)}")
    if weight is None and bias is not None:
        raise ValueError(f"{_NAME}: a bias needs a weight")
    if u.dim() != 2 or 0 in u.shape or u.shape[1] != core.shape[0]:
        raise ValueError(f"{_NAME}: u must be (m, {core.shape[0]}) for core {tuple(core.shape)}, got {tuple(u.shape)}")
    m, n = u.shape[0], x.shape[-1]
    for what, t, shape in (("v", v, (core.shape[1], n)), ("weight", weight, (m, n)), ("bias", bias, (m,))):
        if t is not None and t.shape != shape:
            raise ValueError(f"{_NAME}: {what} must be {shape} for x of {n} features, core {tuple(core.shape)} and u "
                             f"{tuple(u.shape)}, got {tuple(t.shape)}")
    if n == 0:
        raise ValueError(f"{_NAME}: x has no features")
    check_options(_NAME, scale, dropout, training)


def _as_it_lies(v):
    """v, or v.mT where that is what is contiguous, as an adapter's factors are; and which."""
    turned = not v.is_contiguous() and v.mT.is_contiguous()
    return (v.mT if turned else v), turned


def _rows(t):
    return t.reshape(-1, t.shape[-1])


class _TuckerLinear(torch.autograd.Function):
    """x (..., n). The change is added to torch's product in place, here and in the backward. Torch gets x as it is: its
    strides decide which product torch takes, and so the last bit."""

    @staticmethod
    def forward(ctx, x, weight, bias, core, u, v, seed, scale, dropout):
        ctx.scale, ctx.dropout, ctx.bias = scale, dropout, bias is not None
        ctx.save_for_backward(x, weight, core, u, v, seed)
        y = x.new_zeros(*x.shape[:-1], u.shape[0]) if weight is None else F.linear(x, weight, bias)
        if x.dim() != 2:  # it may be a view, which a Function must not return if it is to be changed in place
            y = y.clone(memory_format=torch.contiguous_format)
        lying, turned = _as_it_lies(v)
        _op.tucker_linear_(y.view(-1, y.shape[-1]), _rows(x), core, u, lying, seed, scale, dropout, turned)
        return y

    @staticmethod
    def backward(ctx, dy):
        need_x, need_weight, need_bias, *needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable(ctx, dy), None, None, None
        x, weight, core, u, v, seed = ctx.saved_tensors
        shape, x, dy = x.shape, _rows(x), _rows(dy)
        dx = x.new_empty(0)
        if need_x:
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if weight is None else dy @ weight
        need = sum(bit for bit, needed in zip((1, 2, 4), needs) if needed)
        grads = [None, None, None]
        if need or need_x:
            lying, turned = _as_it_lies(v)
            flat = _op.tucker_linear_backward(dx, dy, x, core, u, lying, seed, ctx.scale, ctx.dropout, turned, need)
            parts = iter(flat.split([t.numel() for t, needed in zip((core, u, v), needs) if needed]))
            grads = [next(parts).view(t.shape) if needed else None for t, needed in zip((core, u, lying), needs)]
            if turned and needs[2]:
                grads[2] = grads[2].mT
        dweight = dy.mT @ x if need_weight else None
        dbias = dy.sum(0) if need_bias else None
        return dx.view(shape) if need_x else None, dweight, dbias, *grads, None, None, None


def _differentiable(ctx, dy) -> list[Tensor | None]:
    """The backward as a differentiable expression, for second derivatives."""
    x, weight, core, u, v, seed = ctx.saved_tensors
    mask = dropout_mask(seed, ctx.dropout, x.shape, x.dtype) if ctx.dropout else torch.ones_like(x)
    bias = x.new_zeros(u.shape[0], requires_grad=True) if ctx.bias else None
    return plain_gradients(lambda *inputs: _eager(*inputs, mask, ctx.scale), (x, weight, bias, core, u, v),
                           ctx.needs_input_grad[:6], dy)


def _eager(x, weight, bias, core, u, v, mask, scale) -> Tensor:
    """The formula in plain torch operations."""
    change = F.linear(F.linear(scale * F.linear((x * mask).to(core.dtype), v), core), u).to(x.dtype)
    return change if weight is None else F.linear(x, weight, bias) + change


@torch.library.register_fake("torch_subspace::tucker_linear_")
def _(y, x, core, u, v, seed, scale, dropout, turned):
    return None


@torch.library.register_fake("torch_subspace::tucker_linear_backward")
def _(dx, dy, x, core, u, v, seed, scale, dropout, turned, need):
    return core.new_empty(sum(t.numel() for bit, t in zip((1, 2, 4), (core, u, v)) if need & bit))
