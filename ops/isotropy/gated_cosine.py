"""Cosines of points under gates: of all pairs, each row with weights of its own on the coordinates.

    cos_bn  = <g_b z1_b, g_b z2_n> / (|g_b z1_b| |g_b z2_n|)             as one would write it: b × n × k products
            = ((g² z1) z2ᵀ)_bn / (|g_b z1_b| sqrt((g² (z2²)ᵀ)_bn))       two matrix products; squares are entry by entry

The gradient is four matrix products (cpu/isotropy/gated_cosine.c). A cosine does not change with the length of z1_b, of
z2_n or of g_b: all rows are first divided by their largest entry, so that squares neither overflow nor vanish whatever
the points' units are.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import check_floating, full_precision, second_derivative, transformed, wide_dtype

_op = torch.ops.torch_subspace


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
    *lead, b, k = z1.shape
    flat = [t.to(wide_dtype(z1.dtype)).reshape(math.prod(lead), t.shape[-2], k) for t in (z1, z2, gate)]
    cosine = _plain(*flat) if transformed() else _op.gated_cosine(*flat)[0]
    return cosine.reshape(*lead, b, z2.shape[-2])


# ------------------------------------------------------------------------------------------------------------ the op


@torch.library.register_fake("torch_subspace::gated_cosine")
def _(z1, z2, gate):
    shape = *z1.shape[:2], z2.shape[1]
    return z1.new_empty(shape), z1.new_empty(shape)


@torch.library.register_fake("torch_subspace::gated_cosine_backward")
def _(dcosine, z1, z2, gate, cosine, inverse, need_gates, need_points):
    gates = z1.shape if need_gates else (0, 0, 0)
    return z1.new_empty(gates), z1.new_empty(z2.shape if need_points else (0, 0, 0)), z1.new_empty(gates)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dcosine, _dinverse):
    need = ctx.needs_input_grad
    if dcosine is None:
        return None, None, None
    found = _op.gated_cosine_backward(dcosine, *ctx.saved_tensors, need[0] or need[2], need[1])
    return tuple(d if needed else None for d, needed in zip(found, need))


torch.library.register_autograd("torch_subspace::gated_cosine", _backward, setup_context=_setup)


# The same in plain torch operations: for the second derivative and for `transformed()`.
def _plain(z1: Tensor, z2: Tensor, gate: Tensor) -> Tensor:
    with full_precision(z1):
        z1, z2, gate = (_scaled(t) for t in (z1, z2, gate))
        weight = gate.square()
        first = _inverse_root((weight * z1.square()).sum(-1, keepdim=True))
        second = _inverse_root(weight @ z2.square().mT)
        return (weight * (first * z1)) @ z2.mT * second


def _scaled(x: Tensor) -> Tensor:
    """Rows' largest entries are 1. As cosines don't depend on it, the divisor is a constant to all derivatives."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    return x / largest.clamp_min(torch.finfo(x.dtype).tiny)


def _inverse_root(square: Tensor) -> Tensor:
    info = torch.finfo(square.dtype)
    nothing = square <= info.tiny / info.eps  # NaN is none of it
    return square.masked_fill(nothing, torch.inf).rsqrt()


def _setup_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _double_backward(ctx, *weights):
    dcosine, *inputs = ctx.saved_tensors
    dz1, dz2, dgate = weights
    return *second_derivative(_plain, dcosine, inputs, (dz1, dz2, dgate)), None, None, None, None


torch.library.register_autograd("torch_subspace::gated_cosine_backward", _double_backward,
                                setup_context=_setup_backward)
