"""Coding rate: how many bits the points of a representation take, as a whole and class by class.

    R(Z)      = 1/2 logdet(I + d/(n eps) Z'Z)
    Rc(Z, g)  = sum_k n_k/(2n) logdet(I + d/(n_k eps) Z_k'Z_k)         Z_k the n_k rows of class k
    delta R   = R - Rc                                                 what MCR² maximises

Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate Reduction, arXiv
2006.08558; `eps` is the papers' epsilon². Every class is factored on its smaller side, and float32 turns to float64
where it would lose digits; see cpu/rates/coding_rate.c.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common import FLOATS, check_dense, check_floating, check_number, second_derivative, transformed

_op = torch.ops.torch_subspace
_EPS = (math.ulp(0.0), 1e300, "a number above 0")
LOST = 1e12  # about the condition of I + X from which on a Cholesky factor in float64 is good for no four digits


def coding_rate(z: Tensor, membership: Tensor | None = None, *, eps: float = 0.5) -> Tensor:
    """Coding rate R of all points, or with a membership the rate Rc of the classes, each coded on its own.

    Args:
        z: points, (..., n, d), n and d above 0; leading dimensions are views, each with a rate of its own. The rows
            are usually of length one.
        membership: None for R. int64 labels (n,), shared by the views, or (..., n): any values from 0 up, with gaps
            as you like; only which points share a label counts. Floating (n, K) or (..., n, K), >= 0: soft classes,
            a column each, rows usually summing to 1; differentiable.
        eps: the papers' epsilon², above 0: the squared error at which points are coded.

    Returns:
        rates in nats, (...,), of z's dtype; float32 for half types, which are widened first (also under autocast, as
        the Gram matrix of halves need not be positive definite).

    Differentiable in ``z``, and in a floating ``membership``; there once, else any number of times. Second derivatives,
    forward mode and torch.func go by the plain formula.

    Raises:
        TypeError: z or membership is no tensor or of another dtype.
        ValueError: shapes, devices or values do not fit; negative labels are looked for on the CPU only.
        RuntimeError: z holds values that are not finite, or points so long, of low rank, that float64 can't tell the
            rank: some 1e11 sqrt(eps). (On CUDA the rate is NaN instead: finding out would stall the stream. Second
            derivatives and torch.func, by the plain formula, are NaN from 1e6 sqrt(eps) on.)

    Source: arXiv 2006.08558, eq. 7 and 8; soft memberships as in arXiv 2301.01805.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
        >>> labels = torch.arange(20) % 4
        >>> bool(ts.coding_rate(z) > ts.coding_rate(z, labels))    # apart, the classes take less
        True
        >>> weights = torch.nn.functional.one_hot(labels).float()
        >>> torch.allclose(ts.coding_rate(z, weights), ts.coding_rate(z, labels))
        True
    """
    check("coding_rate", z, membership, eps)
    z = _widened(z)
    views, (n, d) = z.shape[:-2], z.shape[-2:]
    flat = z.reshape(math.prod(views), n, d)
    if membership is None or not membership.is_floating_point():
        rate = _grouped(flat, None if membership is None else membership.reshape(-1, n), float(eps))
    else:
        from .coding_rate_soft import soft_rate

        weights = membership.to(z.dtype).expand(*views, n, membership.shape[-1])
        rate = soft_rate(flat, weights.reshape(flat.shape[0], n, membership.shape[-1]), float(eps))
    return rate.reshape(views)


def rate_reduction(z: Tensor, membership: Tensor, *, eps: float = 0.5) -> Tensor:
    """R(Z) - Rc(Z, membership): large where classes are spread within themselves no more than they must be.

    The objective of MCR², to be maximised. Arguments, results and errors are those of `coding_rate`; without its
    normalisation of the rows a larger Z always wins, so pass points of length one.

    Returns:
        (...,), of z's dtype, float32 for half types.

    Source: arXiv 2006.08558, eq. 9.

    Example:
        >>> z = torch.eye(8).repeat_interleave(5, 0)             # eight classes, each a direction of its own
        >>> labels = torch.arange(8).repeat_interleave(5)
        >>> bool(ts.rate_reduction(z, labels) > ts.rate_reduction(z, labels.flip(0) // 2))
        True
    """
    if membership is None:
        raise TypeError("rate_reduction: membership must be a tensor, got None")
    check("rate_reduction", z, membership, eps)
    return coding_rate(z, eps=eps) - coding_rate(z, membership, eps=eps)


def check(name: str, z: Tensor, membership: Tensor | None, eps: float, *, part: bool = False) -> None:
    """part: are these a process's part of the points, of which it may have none?"""
    check_floating(name, "z", z)
    if z.dim() < 2 or (z.shape[-2] == 0 and not part) or z.shape[-1] == 0:
        raise ValueError(f"{name}: z must be (..., n, d) with {'' if part else 'n > 0 and '}d > 0, got "
                         f"{tuple(z.shape)}")
    check_number(name, "eps", eps, _EPS)
    if membership is None:
        return
    check_dense(name, "membership", membership)
    if membership.device != z.device:
        raise ValueError(f"{name}: z and membership must be on one device, got {z.device} and {membership.device}")
    views, n = tuple(z.shape[:-2]), z.shape[-2]
    if membership.is_floating_point():
        if membership.dtype not in FLOATS:
            raise TypeError(f"{name}: membership must be float32, float64, float16 or bfloat16, got {membership.dtype}")
        if membership.dim() < 2 or tuple(membership.shape[:-1]) not in ((n,), (*views, n)):
            raise ValueError(f"{name}: soft membership must be ({n}, K) or {(*views, n)} and K, "
                             f"got {tuple(membership.shape)}")
        return
    if membership.dtype != torch.int64:
        raise TypeError(f"{name}: membership must be int64 labels or floating, got {membership.dtype}")
    if tuple(membership.shape) not in ((n,), (*views, n)):
        raise ValueError(f"{name}: membership: labels must be {(n,)}{f' or {(*views, n)}' if views else ''}, "
                         f"got {tuple(membership.shape)}")
    looks = membership.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed())
    if looks and membership.numel() and (least := int(membership.min())) < 0:
        raise ValueError(f"{name}: membership: labels must be 0 or more, got {least}")


def _widened(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _grouped(z: Tensor, labels: Tensor | None, eps: float) -> Tensor:
    """Rates (V,) of z (V, n, d), in groups of equal labels (V, n) or (1, n), or as a whole."""
    if transformed():
        return _plain(z, labels, eps)
    order, start = _groups(z, labels)
    keep = torch.is_grad_enabled() and z.requires_grad
    return _op.coding_rate(z, order, start, eps, keep)[0]


def _groups(z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows in the order of their labels (V, n), and where each group starts in it (V, n + 1); n past the last group.
    Nothing here waits for the device."""
    if labels is None:
        return (torch.empty(0, dtype=torch.int64, device=z.device),) * 2
    ascending, order = torch.sort(labels, dim=-1, stable=True)
    group = pad((ascending[:, 1:] != ascending[:, :-1]).cumsum(-1), (1, 0))
    number = torch.arange(labels.shape[1] + 1, device=z.device).expand(labels.shape[0], -1)
    start = torch.searchsorted(group, number.contiguous())
    return order.expand(z.shape[0], -1), start.expand(z.shape[0], -1)


@torch.library.register_fake("torch_subspace::coding_rate")
def _(z, order, start, eps, keep):
    views, n, d = z.shape
    side = torch.sym_min(n, d)
    kept = (n * side if order.dim() == 2 else side * side) if keep else 0  # as check.c says
    return z.new_empty(views), z.new_empty(views, kept)


@torch.library.register_fake("torch_subspace::coding_rate_backward")
def _(drate, z, order, start, factor, eps):
    return z.new_empty(z.shape)


def _setup(ctx, inputs, output):
    z, order, start, ctx.eps, _ = inputs
    ctx.save_for_backward(z, order, start, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, drate, _dfactor):
    if drate is None:
        return (None,) * 5
    return _op.coding_rate_backward(drate, *ctx.saved_tensors, ctx.eps), None, None, None, None


torch.library.register_autograd("torch_subspace::coding_rate", _backward, setup_context=_setup)


# The same formula in plain torch operations, in float64: for the second derivative and for `transformed()`. Class by
# class would need the labels' values; but the Gram matrix of all points with what joins two classes put to 0 is, but
# for the order of its rows, made of the classes' own, and so is its Cholesky factor.
def _plain(z: Tensor, labels: Tensor | None, eps: float) -> Tensor:
    dtype, z, (n, d) = z.dtype, z.double(), z.shape[-2:]
    if labels is None:
        weight, gram = 1.0, (z.mT @ z if d < n else z @ z.mT) * (d / (n * eps))
    else:
        same = labels[..., :, None] == labels[..., None, :]
        count = same.sum(-1).to(z.dtype)
        weight, gram = count / n, torch.where(same, z @ z.mT * (d / eps / count)[..., None], 0)
    return (weight * log_pivots(gram)).sum(-1).to(dtype)


def log_pivots(gram: Tensor) -> Tensor:
    """Logarithms of the Cholesky factor's diagonal of I + X, X (..., s, s) in float64; their sum is 1/2 log det.

    NaN where the points are so long, and of so low a rank, that X has rounded I away.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky(eye + gram).diagonal(dim1=-2, dim2=-1)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    kept = trace <= LOST * root.amin(-1, keepdim=True).square()
    return root.log() * torch.where(kept, 1.0, torch.nan)  # a gradient is NaN as well


def _setup_backward(ctx, inputs, output):
    drate, z, order, start, _, ctx.eps = inputs
    ctx.save_for_backward(drate, z, order, start)


def _double_backward(ctx, ddz):
    drate, z, order, start = ctx.saved_tensors
    labels = None
    if order.dim() == 2:
        place = torch.arange(z.shape[1], device=z.device).repeat(z.shape[0], 1)
        group = torch.searchsorted(start.contiguous(), place, right=True)
        labels = torch.empty_like(order).scatter(1, order, group)
    return *second_derivative(lambda z: _plain(z, labels, ctx.eps), drate, (z,), (ddz,)), *(None,) * 4


torch.library.register_autograd("torch_subspace::coding_rate_backward", _double_backward,
                                setup_context=_setup_backward)
