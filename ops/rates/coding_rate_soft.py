"""The coding rate of soft memberships, among them a doubly stochastic matrix's n columns.

    rate = sum_k t_k/(2n) logdet(I + d/(t_k eps) Z' diag(w_k) Z),    t_k = sum_i w_ik

One product for all Gram matrices and two for the gradients where there are many classes, and never a buffer of
K x d x n; see cpu/rates/coding_rate_soft.c. What users call, and its checks, are in coding_rate.py.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..common import WIDE, full_precision, transformed
from .coding_rate import log_pivots

_op = torch.ops.torch_subspace

# Inverses (V K d (d + 1) / 2 numbers) up to this many are kept for the backward: 1 GiB in float32. Above, they are made
# again, a chunk of classes at a time.
KEEP_INVERSES = 1 << 28


def soft_rate(z: Tensor, weights: Tensor, eps: float) -> Tensor:
    """The coding rate of every view.

    Args:
        z: features, (V, n, d), n and d at least 1.
        weights: memberships, (V, n, K), >= 0, of z's dtype. A column of zeros adds nothing and has no gradient.
        eps: the papers' eps^2, > 0.

    Returns:
        (V,) of z's dtype. Differentiable once in z and weights; any number of times, in forward mode and under
        torch.func by the plain formula.

    Raises:
        TypeError: z and weights are not both float32 or both float64.
        RuntimeError: on the CPU, a weight is negative, or z or a weight is not finite. On CUDA, where looking would
            stall the stream, the rate of such a view is NaN.

    Source: arXiv 2006.08558 (soft memberships), arXiv 2301.01805 (doubly stochastic ones).
    """
    if z.dtype != weights.dtype or z.dtype not in WIDE:
        raise TypeError(f"coding_rate: soft memberships need z and weights both float32 or both float64, got {z.dtype} "
                        f"and {weights.dtype}")
    if transformed():
        return _eager(z, weights, eps)
    n, d = z.shape[1:]
    if n < d and not _capturing(z):
        z, eps = _shorter(z), eps * n / d
    grad = torch.is_grad_enabled() and (z.requires_grad or weights.requires_grad)
    side = z.shape[2]
    keep = grad and z.shape[0] * weights.shape[2] * side * (side + 1) // 2 <= KEEP_INVERSES
    return _op.coding_rate_soft(z, weights, float(eps), keep)[0]


def _capturing(z: Tensor) -> bool:
    """Whether a CUDA graph is being captured, into which a QR decomposition may not go; the op takes n < d as well."""
    return z.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def _shorter(z: Tensor) -> Tensor:
    """The n x n factor L of Z = L Q, as Z Q' with Q a constant.

    The rate depends on Z Z' = L L' alone, so it is that of L when d/eps keeps its value; with a fixed Q the gradient
    dL Q is that in Z exactly, because it lies in the rows' span anyway. (The second derivative would not be, and the op
    has none.) So n points in more than n dimensions cost what n dimensions cost.
    """
    with full_precision(z):
        wide = z.double()  # what L has beyond the rank of Z must be nothing, not the rounding of large rows
        q = torch.linalg.qr(wide.detach().mT).Q
        return (wide @ q).to(z.dtype)


# The same formula in plain torch operations, in float64, for `transformed()`.
def _eager(z: Tensor, weights: Tensor, eps: float) -> Tensor:
    dtype, z, weights, (n, d) = z.dtype, z.double(), weights.double(), z.shape[1:]
    mass = weights.sum(1)
    used = mass > 0
    scale = torch.where(used, d / (eps * torch.where(used, mass, 1)), 0)
    grams = torch.einsum("vnk,vnd,vne->vkde", weights, z, z)
    half_logdet = log_pivots(scale[..., None, None] * grams).sum(-1)
    return ((mass * half_logdet).sum(-1) / n).to(dtype)


@torch.library.register_fake("torch_subspace::coding_rate_soft")
def _(z, weights, eps, keep):
    v, _, d = z.shape
    k = weights.shape[2]
    return (z.new_empty(v), z.new_empty((v, k, d * (d + 1) // 2) if keep else (0, 0, 0)),
            z.new_empty((v, 2, k) if keep else (0, 0, 0)))


@torch.library.register_fake("torch_subspace::coding_rate_soft_backward")
def _(drate, z, weights, inverse, stats, eps, need_dz, need_dweights):
    return (z.new_empty(z.shape if need_dz else (0, 0, 0)),
            weights.new_empty(weights.shape if need_dweights else (0, 0, 0)))


def _setup(ctx, inputs, output):
    z, weights, ctx.eps, _ = inputs
    ctx.save_for_backward(z, weights, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, drate, _dinverse, _dstats):
    if drate is None:
        return None, None, None, None
    need_dz, need_dweights = ctx.needs_input_grad[:2]
    dz, dweights = _op.coding_rate_soft_backward(drate, *ctx.saved_tensors, ctx.eps, need_dz, need_dweights)
    return dz if need_dz else None, dweights if need_dweights else None, None, None


torch.library.register_autograd("torch_subspace::coding_rate_soft", _backward, setup_context=_setup)


def _setup_backward(ctx, inputs, output):
    pass


def _double_backward(ctx, *_):
    raise NotImplementedError("coding_rate: soft memberships have no second derivative; torch.func takes the plain "
                              "formula, which has")


torch.library.register_autograd("torch_subspace::coding_rate_soft_backward", _double_backward,
                                setup_context=_setup_backward)
