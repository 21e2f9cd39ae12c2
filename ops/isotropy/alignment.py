"""Orthogonal maps between features: the nearest one in closed form, and one that is trained."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ..common import HALF, WIDE, check_floating, full_precision, over_largest, told, whole, wide_dtype
from .products import Function, applied, check_points, product, traced


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """The orthogonal Q for which ``x @ Q`` is nearest to ``y``, ‖x Q - y‖_F, of both determinants.

    Args:
        x, y: points, (..., n, d), row by row the same things; each leading index has a Q of its own.

    Returns:
        Q, (..., d, d): U Vᵀ of the singular value decomposition xᵀ y = U S Vᵀ. Of x's dtype; float32 for half types,
        which are widened first (also under autocast). Between float32 and float64, x decides. NaN where x or y has NaN
        or infinity.

    Differentiable in both, once; the gradient has sums of two singular values in denominators, never differences, so
    repeated ones are nothing special. Where both are 0 Q is not unique: any one is returned, and the gradient has no
    part there. So in torch.func's transforms and in forward mode.

    Raises:
        TypeError: x or y is no dense floating tensor.
        ValueError: shapes or devices do not fit.

    Source: Schönemann, Psychometrika 31 (1966).

    Example:
        >>> x, turn = torch.randn(50, 4), torch.linalg.qr(torch.randn(4, 4)).Q
        >>> torch.allclose(ts.isotropy.procrustes(x, x @ turn), turn, atol=1e-5)
        True
    """
    name = "procrustes"
    check_points(name, "x", x)
    check_points(name, "y", y)
    if x.shape != y.shape or x.device != y.device:
        raise ValueError(f"{name}: x and y must be alike, got {tuple(x.shape)} on {x.device} and {tuple(y.shape)} on "
                         f"{y.device}")
    wide = wide_dtype(x.dtype)
    moments = product(over_largest(x.to(wide), (-2, -1)), over_largest(y.to(wide), (-2, -1)))
    with full_precision(moments):
        known = moments if traced() else moments.detach()
        finite = known.isfinite().all(-1).all(-1)[..., None, None]
        u, s, vt = torch.linalg.svd(torch.where(finite, known, 0))
        u = torch.where(finite, u, torch.nan)
        return u @ vt if traced() else applied(_Polar, moments, u, s, vt)


class _Polar(Function):
    """U Vᵀ of M = U S Vᵀ. Along dM it turns by U A Vᵀ, A_ij = (B_ij - B_ji) / (s_i + s_j) with B = Uᵀ dM V."""

    @staticmethod
    def forward(moments, u, s, vt):
        return u @ vt

    @staticmethod
    def backward(ctx, dq):
        return applied(_PolarGradient, dq, *ctx.saved_tensors), None, None, None

    @staticmethod
    def tangent(inputs, dmoments, *_):
        return applied(_PolarGradient, dmoments, *inputs)


class _PolarGradient(Function):
    """U A Vᵀ with B = Uᵀ dQ V: the map of a change is its own adjoint."""

    @staticmethod
    def forward(dq, moments, u, s, vt):
        with full_precision(dq):
            b = u.mT @ dq @ vt.mT
            both = s[..., :, None] + s[..., None, :]
            known = both > s.shape[-1] * torch.finfo(s.dtype).eps * s[..., :1, None]
            return u @ torch.where(known, (b - b.mT) / torch.where(known, both, 1), 0) @ vt

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("procrustes: differentiable once, second derivatives are not there")

    tangent = backward


class _Turned(parametrizations._Orthogonal):
    """torch's own, on the meta device too, where no numbers tell whether they are orthogonal; and row by row in memory,
    as safetensors wants it."""

    def right_inverse(self, Q: Tensor) -> Tensor:
        """The start is Q from here on; all that may be wrong with it is told before."""
        name = "OrthogonalAdapter"
        if not isinstance(Q, Tensor):
            raise TypeError(f"{name}: weight must be a tensor, got {told(Q)}")
        if Q.shape != self.shape:
            raise ValueError(f"{name}: weight must have shape {tuple(self.shape)}, got {tuple(Q.shape)}")
        if self.base is not None and Q.dtype != self.base.dtype:
            raise TypeError(f"{name}: weight must be {self.base.dtype}, as the adapter is, got {Q.dtype}")
        if self.base is not None and Q.device != self.base.device:
            raise ValueError(f"{name}: weight must be on {self.base.device}, as the adapter is, got {Q.device}")
        if not Q.is_meta and not Q.isfinite().all():
            place = tuple((~Q.isfinite()).nonzero()[0].tolist())
            raise ValueError(f"{name}: weight must be finite, got {Q[place].item()} at {place}")
        if Q.is_meta:
            self.base = torch.empty_like(Q)
            return Q
        raw = super().right_inverse(Q.contiguous())
        self.base = self.base.contiguous()
        return raw


class OrthogonalAdapter(nn.Module):
    """A trained orthogonal map of features, ``x @ Q``: it turns them and keeps all lengths and angles.

    The weight is parametrised as by torch.nn.utils.parametrizations.orthogonal, a start times the exponential of a skew
    matrix, so that any optimiser keeps it orthogonal, to rounding. It starts as the identity, also where it gets memory
    after the meta device; assigning an orthogonal matrix of either determinant to ``adapter.weight``, such as the
    transpose of `procrustes`' Q, starts there; another matrix is replaced by the orthogonal factor of its QR
    decomposition, as torch does. One of another shape, dtype or device, or that is not finite, is refused.

    Args:
        d: number of features, at least 1.
        device, dtype: of the weight; float32 or float64.

    Shape: x (..., d) to (..., d), of x's dtype. ``weight`` is (d, d) as a Linear's: Qᵀ. Q is computed and applied in
    the weight's dtype, also under autocast; `half()` and `bfloat16()` leave it in float32: rounded to those, Q
    is not orthogonal.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: its value, or x's shape or device, does not fit.

    Example:
        >>> adapter = ts.isotropy.OrthogonalAdapter(4)
        >>> x = torch.randn(3, 4)
        >>> torch.equal(adapter(x), x)
        True
        >>> adapter.weight = ts.isotropy.procrustes(x, x.flip(-1)).mT
        >>> torch.allclose(adapter(x).norm(dim=-1), x.norm(dim=-1))
        True
        >>> adapter.merge()
        Linear(in_features=4, out_features=4, bias=False)
    """

    weight: Tensor

    def __init__(self, d: int, *, device: torch.device | str | int | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        name = "OrthogonalAdapter"
        self.d = whole(name, "d", d, 1)
        if dtype is not None and dtype not in WIDE:
            raise TypeError(f"{name}: dtype must be float32 or float64, got {told(dtype)}")
        try:
            weight = torch.eye(self.d, device=device, dtype=dtype)
        except (RuntimeError, TypeError) as error:
            raise type(error)(f"{name}: device {told(device)}: {error}") from None
        if weight.dtype not in WIDE:  # torch's default, where it is a half
            weight = weight.float()
        self.weight = nn.Parameter(weight)
        turned = _Turned(self.weight, parametrizations._OrthMaps.matrix_exp)
        parametrize.register_parametrization(self, "weight", turned, unsafe=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Q <- the identity."""
        start = self.parametrizations.weight
        start.original.zero_()  # in place, as it may be a shard
        nn.init.eye_(start[0].base)

    def forward(self, x: Tensor) -> Tensor:
        check_floating("OrthogonalAdapter", "x", x)
        if x.dim() == 0 or x.shape[-1] != self.d:
            raise ValueError(f"OrthogonalAdapter: x must be (..., {self.d}), got {tuple(x.shape)}")
        with full_precision(x):
            weight = self.weight
            if x.device != weight.device:
                raise ValueError(f"OrthogonalAdapter: x must be on {weight.device}, got {x.device}")
            return nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)

    def _apply(self, fn, recurse=True):
        def keep_wide(t):
            out = fn(t)
            return t.to(out.device, torch.float32) if t.dtype in WIDE and out.dtype in HALF else out

        def without_values():
            return any(t.is_meta for t in (*self.parameters(), *self.buffers()))

        was_meta = without_values()
        applied = super()._apply(keep_wide, recurse)
        if was_meta and not without_values():  # to_empty: never leave what the memory held
            self.reset_parameters()
        return applied

    @torch.no_grad()
    def merge(self, linear: nn.Linear | None = None) -> nn.Linear:
        """The same map as a plain Linear, a new layer: of its own, in the weight's dtype, or, of a `linear` before it,
        of both in one, in that one's.

        Raises: TypeError, ValueError where `linear` is none, or has other than d outputs.
        """
        weight, bias = self.weight.detach(), None
        if linear is not None:
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"OrthogonalAdapter.merge: linear must be an nn.Linear, got {told(linear)}")
            if linear.out_features != self.d:
                raise ValueError(f"OrthogonalAdapter.merge: linear must have {self.d} outputs, got "
                                 f"{linear.out_features}")
            with full_precision(weight):
                bias = None if linear.bias is None else (weight @ linear.bias.to(weight)).to(linear.bias)
                weight = (weight @ linear.weight.to(weight)).to(linear.weight)
        merged = nn.Linear(weight.shape[1], self.d, bias=bias is not None, device="meta")
        merged.weight = nn.Parameter(weight.clone())
        merged.bias = None if bias is None else nn.Parameter(bias)
        return merged

    def extra_repr(self) -> str:
        return f"d={self.d}"
