"""Products and solutions that losses of this family share: in full precision under autocast, of their gradients too.

    product(a, b)    aᵀ b
    gram(x)          xᵀ x, whose gradient is one product
    solve(a, b)      a⁻¹ b of a symmetric, positive definite a, by Cholesky; its gradient by the same factor
    applied(f, ...)  a Function with a derivative of its own, under torch.func and in forward mode, too
"""
from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

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
        factor, failed = torch.linalg.cholesky_ex(a if transformed() else a.detach())
        factor = factor.masked_fill(failed[..., None, None] != 0, torch.nan)
        return torch.cholesky_solve(b, factor) if transformed() else _Solve.apply(a, b, factor)


def traced() -> bool:
    """Of `transformed()`, a trace or an ONNX graph: nothing but torch's own operations, with their own derivatives."""
    return transformed() and (torch.compiler.is_compiling() or torch.jit.is_tracing())


class Function(torch.autograd.Function):
    """Keeps its inputs, tensors with the same leading dimensions. A subclass has forward, backward and
    `tangent(inputs, *tangents)`, for forward mode."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


def applied(function: type[Function], *args: Tensor) -> Any:
    """`function.apply`, in torch.func and forward mode with rules for these, which torch.compile does not take."""
    return (_with_rules(function) if transformed() else function).apply(*args)


@functools.cache
def _with_rules(function: type[Function]) -> type[Function]:
    class WithRules(function):
        @staticmethod
        def setup_context(ctx, inputs, output):
            function.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx, *tangents):
            # What is kept has tangents of this level. They are left out: within the level a graph that has them would
            # give its derivatives tangents, too, one order more than was asked for. And torch has switched forward mode
            # off, at all levels: to a jvp around this one, which asks for a derivative of this derivative, the result
            # would be a constant.
            with forward_ad._set_fwd_grad_enabled(True):
                return function.tangent([forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors], *tangents)

        @staticmethod
        def vmap(info, in_dims, *args):
            return applied(function, *(t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                                       for t, dim in zip(args, in_dims))), 0

    return WithRules


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
