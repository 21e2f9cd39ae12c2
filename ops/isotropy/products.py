"""Products and solutions that losses of this family share: in full precision under autocast, of their gradients too.

    product(a, b)    aᵀ b
    gram(x)          xᵀ x, whose gradient is one product
    solve(a, b)      a⁻¹ b of a symmetric, positive definite a, by Cholesky; its gradient by the same factor
"""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import all_reduce, check_floating, full_precision, transformed


def check_points(name: str, what: str, z: Tensor, group: object = None) -> None:
    """Raises in `name`'s voice unless it is (..., n, d) with something in it; a process of a group may have n = 0."""
    check_floating(name, what, z)
    if z.dim() < 2 or z.shape[-1] == 0 or (z.shape[-2] == 0 and group is None):
        raise ValueError(f"{name}: {what} must be (..., n, d) with {'n > 0 and ' * (group is None)}d > 0, got "
                         f"{tuple(z.shape)}")


def summed(x: Tensor, n: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Over the processes of a group: x, and n."""
    packed = all_reduce(torch.cat((x.flatten(), x.new_full((1,), n))), group)
    return packed[:-1].view(x.shape), packed[-1]


def product(a: Tensor, b: Tensor) -> Tensor:
    with full_precision(a):
        return a.mT @ b if transformed() else _Product.apply(a, b)


def gram(x: Tensor) -> Tensor:
    with full_precision(x):
        return x.mT @ x if transformed() else _Gram.apply(x)


def solve(a: Tensor, b: Tensor) -> Tensor:
    """NaN where `a` is not positive definite in its dtype, or not finite; the rest of a batch is not disturbed."""
    with full_precision(a):
        if transformed():
            return torch.cholesky_solve(b, torch.linalg.cholesky_ex(a)[0])
        factor, failed = torch.linalg.cholesky_ex(a.detach())
        return _Solve.apply(a, b, factor.masked_fill(failed[..., None, None] != 0, torch.nan))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a.mT @ b

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        with full_precision(dy):
            return b @ dy.mT, a @ dy


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.mT @ x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with full_precision(dy):
            return x @ (dy + dy.mT)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, factor):
        x = torch.cholesky_solve(b, factor)
        ctx.save_for_backward(a, factor, x)
        return x

    @staticmethod
    def backward(ctx, dx):
        a, factor, x = ctx.saved_tensors
        with full_precision(dx):
            db = _Solve.apply(a, dx, factor)
            return -db @ x.mT, db, None
