"""Newton-Schulz: the orthogonal factor U Vᵀ of x = U S Vᵀ, approximately, by matrix products alone.

    X_0     = x / max(‖x‖_F, eps)
    X_(k+1) = a_k X_k + b_k (X_k X_kᵀ) X_k + c_k (X_k X_kᵀ)² X_k

On the singular values that is s <- a s + b s³ + c s⁵, which takes all of them towards one; Muon orthogonalises its
momentum by it. The Gram matrix X_k X_kᵀ is symmetric and its polynomials commute: half of each product is enough, and
several steps are made on it alone before the long side is touched again; see cpu/lowrank/newton_schulz.c.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import (
    check_floating,
    check_number,
    check_word,
    full_precision,
    second_derivative,
    told,
    transformed,
    whole,
    wide_dtype,
)

_op = torch.ops.torch_subspace
Triple = tuple[float, float, float]
MOST_STEPS = 100  # the contract's SUBSPACE_STEPS
LENGTH = (1e-300, 1e300, "positive and from 1e-300 to 1e300")

# a, b, c of each step; the last ones go on for ever
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "muon": ((3.4445, -4.7750, 2.0315),),  # the steepest at 0 that comes back to (0.68, 1.21) (Jordan)
    "cubic": ((1.5, -0.5, 0.0),),  # Newton & Schulz; both converge to 1, and from there as fast as 1 - s squared ...
    "quintic": ((1.875, -1.25, 0.375),),  # ... and cubed: Taylor's polynomials of s / |s|
    # Each is the best of degree 5 for the interval that those before it leave of [1e-3, 1]: Polar Express, arXiv
    # 2505.16932, without the safety factor of 1.01 that bfloat16 needs there. tests/lowrank derive them.
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
}


def newton_schulz(x: Tensor, *, steps: int = 5, coefficients: str | Sequence[Any] = "muon",
                  eps: float = 1e-7) -> Tensor:
    """The orthogonal polar factor of each matrix, U Vᵀ of x = U S Vᵀ, by Newton-Schulz steps.

    Args:
        x: matrices, (..., m, n), wide or tall, of any float type; each of a batch by itself.
        steps: how many, 1 to 100.
        coefficients: what a step does to a singular value s: a s + b s³ + c s⁵. "muon": (3.4445, -4.775, 2.0315), which
            takes those from 0.002 of ‖x‖ up into (0.68, 1.21) within five steps, and never to 1. "polar_express": the
            best for each step, from 0.001 of ‖x‖ up. "quintic" and "cubic": the classical ones, which converge. Or
            three numbers, or several such triples, one for each step, the last of them for all further steps.
        eps: the length below which x is not scaled up any further; positive.

    Returns:
        (..., m, n), of x's dtype. Matrices of zeros give zeros. One with NaN or infinity in it, or whose length
        overflows, gives NaN throughout, and no other matrix hears of it.

    float32 and float64 are computed as such, whatever torch's switches for TF32 and autocast say; half types in
    float32, rounded once at the end: steps in bfloat16 are off by up to a fifth of a singular value, and faster only
    where a processor multiplies bfloat16 itself.

    Differentiable any number of times, by the derivative of the steps themselves (not by that of the U Vᵀ they go
    towards). The backward keeps x alone; while it runs it takes memory for as many matrices like x as there are steps
    if x is nearly square, else for a few. Second derivatives, forward mode and torch.func go by the plain formula.

    Raises:
        TypeError: x is no dense floating tensor, or another argument is of a wrong kind.
        ValueError: shapes or values do not fit.

    Source: Björck & Bowie, 1971, and Schulz, 1933; Muon's coefficients: K. Jordan's post of 2024 and torch.optim.Muon.

    Example:
        >>> x = torch.randn(64, 256)
        >>> y = ts.lowrank.newton_schulz(x, steps=12, coefficients="quintic")
        >>> bool((y @ y.T - torch.eye(64)).abs().max() < 1e-5)
        True
    """
    check_floating("newton_schulz", "x", x)
    if x.dim() < 2:
        raise ValueError(f"newton_schulz: x must be (..., m, n), got {tuple(x.shape)}")
    each = check_steps("newton_schulz", steps, coefficients)
    check_number("newton_schulz", "eps", eps, LENGTH)
    flat = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    y = _plain(flat, each, float(eps)) if transformed() else _op.newton_schulz(flat, each, float(eps))
    return y.reshape(x.shape)


def check_steps(name: str, steps: object, coefficients: object, prefix: str = "") -> list[float]:
    """a, b and c of each step, one after the other. `prefix`: of both arguments' names, to whom they are passed."""
    what = prefix + "coefficients"
    number = whole(name, prefix + "steps", steps, 1)
    if number > MOST_STEPS:
        raise ValueError(f"{name}: {prefix}steps must be <= {MOST_STEPS}, got {number}")
    triples: Sequence[Any]
    if isinstance(coefficients, str):
        check_word(name, what, coefficients, COEFFICIENTS)
        triples = COEFFICIENTS[coefficients]
    else:
        if not isinstance(coefficients, Sequence):
            raise TypeError(f"{name}: {what} must be a name, three numbers or several triples, got "
                            f"{told(coefficients)}")
        triples = [coefficients] if coefficients and not isinstance(coefficients[0], Sequence) else coefficients
        if not triples or any(not isinstance(t, Sequence) or isinstance(t, str) or len(t) != 3 for t in triples):
            raise ValueError(f"{name}: {what} must be three numbers or several triples, got {told(coefficients)}")
        for value in (value for triple in triples for value in triple):
            check_number(name, what, value, (-1e300, 1e300, "finite numbers"))
    return [float(value) for k in range(number) for value in triples[min(k, len(triples) - 1)]]


# ------------------------------------------------------------------------------------------------------------ the op


@torch.library.register_fake("torch_subspace::newton_schulz")
def _(x, coefficients, eps):
    return x.new_empty(x.shape)


@torch.library.register_fake("torch_subspace::newton_schulz_backward")
def _(dy, x, coefficients, eps):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    x, ctx.coefficients, ctx.eps = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    return _op.newton_schulz_backward(dy, *ctx.saved_tensors, ctx.coefficients, ctx.eps), None, None


torch.library.register_autograd("torch_subspace::newton_schulz", _backward, setup_context=_setup)


# The same in plain torch operations: for the second derivative and for `transformed()`.
def _plain(x: Tensor, coefficients: Sequence[float], eps: float) -> Tensor:
    with full_precision(x):
        wide = x.to(wide_dtype(x.dtype))
        y = wide.mT if x.shape[-2] > x.shape[-1] else wide
        squares = wide.double().square().sum((-2, -1), keepdim=True)
        long = ~(squares <= eps * eps)  # a 1 for the root where not: at a matrix of zeros it has no derivative
        y = y / torch.where(long, squares.where(long, 1).sqrt(), eps).to(y.dtype)
        for a, b, c in zip(coefficients[::3], coefficients[1::3], coefficients[2::3]):
            gram = y @ y.mT
            y = a * y + (b * gram + c * (gram @ gram)) @ y
        return (y.mT if x.shape[-2] > x.shape[-1] else y).to(x.dtype)


def _setup_backward(ctx, inputs, output):
    dy, x, ctx.coefficients, ctx.eps = inputs
    ctx.save_for_backward(dy, x)


def _double_backward(ctx, ddx):
    dy, x = ctx.saved_tensors
    return *second_derivative(lambda x: _plain(x, ctx.coefficients, ctx.eps), dy, (x,), (ddx,)), None, None


torch.library.register_autograd("torch_subspace::newton_schulz_backward", _double_backward,
                                setup_context=_setup_backward)
