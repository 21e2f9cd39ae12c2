"""One Riemannian SGD step of frames on the Grassmannian or the Stiefel manifold, all parameters in one call.

    M' = momentum M + (1 - dampening) g                  g = +-grad + weight_decay W
    D  = dir - (dir W') W                                dir = M', or g + momentum M' with Nesterov
    W' = f(X) W - lr g(X) D                              X = lr^2 D D', k x k

f and g are given by the retraction; the exponential map has f = cos sqrt X, g = sinc sqrt X. On the Stiefel manifold
the direction has dir W' replaced by its symmetric part, and f and g are of what is left of it as well. No SVD and
no QR; drift from orthonormality is repaired on the way. Edelman, Arias & Smith 1998 for the geodesics,
arXiv 2308.01547 for their use in classifiers; cpu/grassmann/rsgd.c for the two passes.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..common import NOT_NEGATIVE, WIDE, check_dense, check_flag, check_number, check_word, shares_memory, told
from .frames import (
    MANIFOLDS,
    RETRACTIONS,
    TRANSPORTS,
    check_dims,
    check_stiefel,
    check_transport,
    stacked,
    starts,
    stepped,
)

_op = torch.ops.torch_subspace
_NAME = "grassmann_step_"


def grassmann_step_(weight: Tensor | Sequence[Tensor], grad: Tensor | Sequence[Tensor],
                    momentum_buffer: Tensor | Sequence[Tensor] | None = None, *, lr: float | Tensor,
                    momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False,
                    maximize: bool = False, retraction: str = "geodesic", transport: str = "project",
                    dims: Sequence[int] | None = None, manifold: str = "grassmann") -> Tensor:
    """Step every frame along its negative Riemannian gradient, in place.

    Args:
        weight: frames (C, k, n) with orthonormal rows, or (sum(dims), n) with ``dims``; float32 or
            float64; (..., k, n) on the Stiefel manifold. A sequence of such tensors is stepped in one call.
        grad: Euclidean gradients of the same shapes.
        momentum_buffer: momentum M of the same shapes, updated in place; needed unless ``momentum`` is 0.
        lr: step length; a float, a 0-dim tensor, or for a single weight a (C,) tensor: one per class.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        retraction: "geodesic" (the exponential map), "polar", "qr" (Cholesky-QR) or "cayley".
        transport: "project": M stays as it is and is projected at each step (as the public GCR code
            does; on the Stiefel manifold what is tangent at the old frame is kept); "parallel": M is
            parallel-transported along the geodesic ("geodesic" only).
        dims: subspace dimension of each class, for ragged frames.
        manifold: "grassmann", for what depends on a frame's span alone: the direction is orthogonal to it. "stiefel",
            where the rows themselves count: the direction G - sym(G W') W also turns them among themselves. Of the
            retractions "geodesic" is then the canonical metric's; there is no parallel transport.

    Returns:
        int64, 0-dim, the number of classes left alone because their gradient, momentum or frame was not
        finite (or the frame had lost rank). Their weight and momentum are untouched, all others stepped.

    Raises:
        TypeError: not tensors, or dtypes other than one of float32 and float64.
        ValueError: shapes, devices or values do not fit. Nothing is changed then.

    Example:
        >>> weight = ts.GrassmannLinear(8, 3, 2).weight.detach()
        >>> skipped = ts.grassmann_step_(weight, torch.randn(3, 2, 8), lr=0.1)
        >>> int(skipped), torch.allclose(weight @ weight.mT, torch.eye(2).expand(3, 2, 2), atol=1e-5)
        (0, True)
    """
    weights, grads, buffers = _as_lists(weight, grad, momentum_buffer)
    _check_values(lr, momentum, dampening, weight_decay, nesterov, maximize, retraction, transport, manifold)
    if not weights:
        return torch.zeros((), dtype=torch.int64)
    for w, g, *m in zip(weights, grads, *([buffers] if buffers else [])):
        dims = _check_tensors(w, g, m, weights[0], dims, manifold)
    if not torch.compiler.is_compiling() and len({id(t) for t in (*weights, *buffers)}) < len(weights) + len(buffers):
        raise ValueError(f"{_NAME}: weight and momentum_buffer must all be different tensors, as all are written to, "
                         "got one twice")
    if momentum != 0 and not buffers:
        raise ValueError(f"{_NAME}: momentum={momentum} needs a momentum_buffer")
    step = _step_length(lr, weights, dims)
    if momentum == 0:
        buffers = []
    dense, dense_grads, dense_buffers = ([stacked(t.detach().contiguous(), dims) for t in given]
                                         for given in (weights, grads, buffers))
    skipped = _op.rsgd_(dense, dense_grads, dense_buffers, starts(dims, weights[0].device), step,
                        float(momentum), float(dampening), float(weight_decay), bool(nesterov), bool(maximize),
                        RETRACTIONS.index(retraction), transport == "parallel", manifold == "stiefel")
    for target, source in zip((*weights, *buffers), (*dense, *dense_buffers)):
        if not target.is_contiguous():
            target.detach().copy_(source.view_as(target))
    if not torch.compiler.is_compiling():  # a kernel of the stable ABI does not count versions itself
        torch.autograd.graph.increment_version([*weights, *buffers])
        stepped(weights)
    return skipped


def _as_lists(weight, grad, buffer):
    if isinstance(weight, Tensor):
        weight, grad, buffer = [weight], [grad], None if buffer is None else [buffer]
    elif isinstance(grad, Tensor) or isinstance(buffer, Tensor):
        raise TypeError(f"{_NAME}: weight, grad and momentum_buffer must all be tensors or all be sequences, got "
                        f"{told(weight)}, {told(grad)} and {told(buffer)}")
    for what, given in (("weight", weight), ("grad", grad), ("momentum_buffer", buffer)):
        if given is None and what == "momentum_buffer":
            continue
        if not isinstance(given, Iterable) or isinstance(given, (str, set, Mapping)):
            raise TypeError(f"{_NAME}: {what} must be a tensor or a sequence of tensors, got {told(given)}")
    weight, grad, buffer = list(weight), list(grad), list(buffer or ())
    if len(grad) != len(weight) or len(buffer) not in (0, len(weight)):
        raise ValueError(f"{_NAME}: weight, grad and momentum_buffer must be as many, got {len(weight)} weights, "
                         f"{len(grad)} gradients, {len(buffer)} momentum buffers")
    return weight, grad, buffer


def _check_values(lr, momentum, dampening, weight_decay, nesterov, maximize, retraction, transport, manifold) -> None:
    for what, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        if isinstance(value, Tensor) and (value.numel() == 1 or what == "lr") and not value.is_complex():
            continue
        check_number(_NAME, what, value, NOT_NEGATIVE)
    check_number(_NAME, "dampening", dampening)
    check_flag(_NAME, "nesterov", nesterov)
    check_flag(_NAME, "maximize", maximize)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(f"{_NAME}: nesterov needs momentum > 0 and dampening = 0, got {momentum} and {dampening}")
    check_word(_NAME, "retraction", retraction, RETRACTIONS)
    check_word(_NAME, "transport", transport, TRANSPORTS)
    check_word(_NAME, "manifold", manifold, MANIFOLDS)
    check_transport(_NAME, transport, retraction, manifold)


def _check_tensors(w: Tensor, g: Tensor, m: list[Tensor], first: Tensor,
                   dims: Sequence[int] | None, manifold: str) -> tuple[int, ...] | None:
    for what, t in (("weight", w), ("grad", g), *(("momentum_buffer", t) for t in m)):
        check_dense(_NAME, what, t)
        if t.dtype != first.dtype or t.dtype not in WIDE:
            hint = " (keep float32 frames beside a half-precision model)" if t.dtype.itemsize == 2 else ""
            raise TypeError(f"{_NAME}: weight (frames), gradients and momentum must share float32 or float64, "
                            f"got {what} of {t.dtype}{hint}")
        if t.device != first.device:
            raise ValueError(f"{_NAME}: {what} is on {t.device}, the first weight on {first.device}")
        if t.shape != w.shape:
            raise ValueError(f"{_NAME}: {what} has shape {tuple(t.shape)}, its weight {tuple(w.shape)}")
        if what != "grad" and shares_memory(t):
            raise ValueError(f"{_NAME}: {what} of strides {t.stride()} has elements that share memory")
    if manifold == "stiefel" and dims is None:
        check_stiefel(_NAME, "weight", w)
        return None
    return check_dims(_NAME, w, dims)


def _step_length(lr: float | Tensor, weights: list[Tensor], dims: Sequence[int] | None) -> Tensor:
    if not isinstance(lr, Tensor):
        return torch.tensor(float(lr), dtype=torch.float64)
    lr = lr.detach()
    if lr.dim() == 0:
        return lr.to(torch.float64)
    classes = math.prod(weights[0].shape[:-2]) if dims is None else len(dims)
    if len(weights) != 1 or lr.shape != (classes,):
        raise ValueError(f"{_NAME}: lr must be a number, or ({classes},) for a single weight; got {tuple(lr.shape)} "
                         f"for {len(weights)} weights")
    return lr.to(device=weights[0].device, dtype=torch.float64)


@torch.library.register_fake("torch_subspace::rsgd_")
def _(weights, grads, buffers, start, lr, momentum, dampening, weight_decay, nesterov, maximize, retraction, parallel,
      stiefel):
    return weights[0].new_empty((), dtype=torch.int64)
