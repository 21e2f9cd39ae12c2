"""Cosines of points under gates: of all pairs, each row with weights of its own on the coordinates.

    cos_bn  = <g_b z1_b, g_b z2_n> / (|g_b z1_b| |g_b z2_n|)             as one would write it: b × n × k products
            = ((g² z1) z2ᵀ)_bn / (|g_b z1_b| sqrt((g² (z2²)ᵀ)_bn))       two matrix products; squares are entry by entry

No difference is taken in it, so no digits are lost. The gradient is four matrix products. With r = 1 / |g_b z1_b|, rows
y = r z1 and R_bn = 1 / |g_b z2_n|,

    V       = dcos R        P = V cos R        q = V z2        s_b = <g² y, q>_b
    dz1     = r g² (q - s y)
    dz2     = Vᵀ (g² y) - z2 (Pᵀ g²)
    dg      = g (y (2 q - s y) - P z2²)

A cosine does not change with the length of z1_b, of z2_n or of g_b: all rows are first divided by their largest entry,
so that squares neither overflow nor vanish whatever the points' units are.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..common import check_floating, full_precision, second_derivative, transformed, wide_dtype


def gated_cosine(z1: Tensor, z2: Tensor, gate: Tensor) -> Tensor:
    """Cosines of g_b ⊙ z1_b and g_b ⊙ z2_n, for all pairs: nothing of b × n × k entries is made, forward or backward.

    Args:
        z1: points, (..., b, k), k above 0.
        z2: points, (..., n, k), with the same leading dimensions.
        gate: weights of the coordinates, (..., b, k), one row for each of z1; any numbers.

    Returns:
        cosines, (..., b, n), of z1's dtype; float32 for half types, which are widened first (also under autocast).
        Between float32 and float64, z1 decides. A vector that is 0 after gating has the cosine 0 with all others, and
        no gradient comes from it. So has one of rounding size: with each row of z1, z2 and gate divided by its largest
        magnitude, a squared length up to tiny / eps of the dtype (1e-31 in float32, 1e-292 in float64) counts as 0.
        NaN or infinity in a row makes its cosines NaN.

    Differentiable in all three any number of times. Rounding may take a cosine just above 1.

    Raises:
        TypeError: an argument is no dense floating tensor.
        ValueError: shapes or devices do not fit.

    Source: SimLAP's gated similarity; the identity and its gradient are our own.

    Example:
        >>> z1, z2, gate = torch.randn(4, 8), torch.randn(6, 8), torch.rand(4, 8)
        >>> cosine = ts.isotropy.gated_cosine(z1, z2, gate)
        >>> one = torch.nn.functional.cosine_similarity(gate[2] * z1[2], gate[2] * z2[5], dim=0)
        >>> cosine.shape, torch.allclose(cosine[2, 5], one, atol=1e-6)
        (torch.Size([4, 6]), True)
    """
    name = "gated_cosine"
    for what, t in (("z1", z1), ("z2", z2), ("gate", gate)):
        check_floating(name, what, t)
        if t.dim() < 2 or t.shape[-1] == 0:
            raise ValueError(f"{name}: {what} must be (..., {'n' if what == 'z2' else 'b'}, k) with k > 0, got "
                             f"{tuple(t.shape)}")
        if t.device != z1.device:
            raise ValueError(f"{name}: z1, z2 and gate must be on one device, got z1 on {z1.device} and {what} on "
                             f"{t.device}")
    if z2.shape[:-2] != z1.shape[:-2] or z2.shape[-1] != z1.shape[-1]:
        raise ValueError(f"{name}: z1 and z2 must be (..., b, k) and (..., n, k), got {tuple(z1.shape)} and "
                         f"{tuple(z2.shape)}")
    if gate.shape != z1.shape:
        raise ValueError(f"{name}: gate must be shaped like z1, got {tuple(gate.shape)} and {tuple(z1.shape)}")
    with full_precision(z1):
        scaled = [_scaled(t.to(wide_dtype(z1.dtype))) for t in (z1, z2, gate)]
        return _parts(*scaled)[0] if transformed() else _GatedCosine.apply(*scaled)


def _scaled(x: Tensor) -> Tensor:
    """Rows' largest entries are 1. As cosines don't depend on it, the divisor is a constant to all derivatives."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    return x / largest.clamp_min(torch.finfo(x.dtype).tiny)


def _parts(z1: Tensor, z2: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, 1 / |g z1| (b, 1) and 1 / |g z2| (b, n), 0 for those of 0: the plain formula."""
    weight = gate.square()
    first = _inverse_root((weight * z1.square()).sum(-1, keepdim=True))
    second = _inverse_root(weight @ z2.square().mT)
    return (weight * (first * z1)) @ z2.mT * second, first, second


def _inverse_root(square: Tensor) -> Tensor:
    info = torch.finfo(square.dtype)
    nothing = square <= info.tiny / info.eps  # NaN is none of it
    return square.masked_fill(nothing, torch.inf).rsqrt()


class _GatedCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z1, z2, gate):
        cosine, first, second = _parts(z1, z2, gate)
        ctx.save_for_backward(z1, z2, gate, cosine, first, second)
        return cosine

    @staticmethod
    def backward(ctx, dcosine):
        return _Gradient.apply(dcosine, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """The formulas above, and their own derivatives by the plain formula."""

    @staticmethod
    def forward(ctx, dcosine, z1, z2, gate, cosine, first, second):
        ctx.save_for_backward(dcosine, z1, z2, gate)
        with full_precision(z1):
            weight, y, v = gate.square(), first * z1, dcosine * second
            along = weight * y
            p = v * cosine * second
            q = v @ z2
            sy = (along * q).sum(-1, keepdim=True) * y
            dz1 = first * weight * (q - sy)
            dz2 = v.mT @ along - z2 * (p.mT @ weight)
            dgate = gate * (y * (2 * q - sy) - p @ z2.square())
        return dz1, dz2, dgate

    @staticmethod
    def backward(ctx, *weights):
        dcosine, *inputs = ctx.saved_tensors
        with full_precision(dcosine):
            found = second_derivative(lambda *inputs: _parts(*inputs)[0], dcosine, inputs, weights)
        return *found, None, None, None
