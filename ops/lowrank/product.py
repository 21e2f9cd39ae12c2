"""Matrix products of the optimisers: by our library's OpenBLAS where torch's run far below a processor's rate.

That is on processors with AVX-512 that are not Intel's: MKL, which torch has, takes a path for AVX2 there. On an EPYC
of Zen 5 it makes 100 GFLOP/s a core, OpenBLAS 250. Elsewhere, in graphs and under transforms all is torch's own.
See cpu/lowrank/product.c.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common import WIDE, transformed
from ..library import config, is_intel

_op = torch.ops.torch_subspace


WORTH = 1 << 19  # multiplications, below which a call takes longer than what it saves


@functools.cache
def outruns_torch() -> bool:
    """Whether OpenBLAS does on this processor."""
    return torch.backends.mkl.is_available() and not is_intel() and "avx512" in config()["CPU"]["available"].split()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of a (..., m, k) and b (k, n) or (..., k, n)."""
    if not _ours(a, b) or b.dim() not in (2, a.dim()):
        return a @ b
    y = a.new_empty((*a.shape[:-1], b.shape[-1]))
    _into(y, a, b, 0.0, 1.0)
    return y


def add_product_(y: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> None:
    """y <- beta y + alpha a b, all of them (m, n) or all (matrices, m, n)."""
    if _ours(a, b, y) and y.is_contiguous():
        _into(y, a, b, beta, alpha)
    else:
        (torch.baddbmm if y.dim() == 3 else torch.addmm)(y, a, b, beta=beta, alpha=alpha, out=y)


def _ours(a: Tensor, b: Tensor, *others: Tensor) -> bool:
    """Whether the op takes these, and there is something to be gained."""
    if torch.compiler.is_compiling() or not outruns_torch() or a.numel() * b.shape[-1] < WORTH or transformed():
        return False
    graph = torch.is_grad_enabled()
    return all(t.device.type == "cpu" and t.dtype == a.dtype in WIDE and t.dim() in (2, 3)
               and type(t) in (Tensor, torch.nn.Parameter) and not (graph and t.requires_grad) for t in (a, b, *others))


def _into(y: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    turned = [t.mT.is_contiguous() and not t.is_contiguous() for t in (a, b)]  # others are copied
    y, a, b = (t if t.dim() == 3 else t[None] for t in (y, *(t.mT if turn else t for t, turn in zip((a, b), turned))))
    _op.product_(y, a, b, *turned, alpha, beta)


@torch.library.register_fake("torch_subspace::product_")
def _(y, a, b, transa, transb, scale, add):
    pass
