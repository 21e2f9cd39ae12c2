"""Matrix products of the optimisers: by our library's OpenBLAS where torch's run far below a processor's rate.

That is on processors with AVX-512 that are not Intel's: MKL, which torch has, takes a path for AVX2 there. On an EPYC
of Zen 5 it makes 100 GFLOP/s a core, OpenBLAS 250. Elsewhere, in graphs and under transforms all is torch's own.
See cpu/lowrank/product.c.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..common import WIDE, transformed
from ..library import config, is_intel

_op = torch.ops.torch_subspace


WORTH = 1 << 19  # multiplications, below which a call takes longer than what it saves
PANEL = 1 << 13  # entries of a product that a further thread asks for: the op shares out no sums
AVX512 = {"SkylakeX", "Cooperlake", "SapphireRapids"}  # OpenBLAS's kernels, by its own words


@functools.cache
def outruns_torch() -> bool:
    """Whether OpenBLAS does: with its kernels for AVX-512, on a processor on which MKL has none."""
    kernels = config()["CPU"]["BLAS"].split()
    return torch.backends.mkl.is_available() and not is_intel() and not AVX512.isdisjoint(kernels)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b."""
    if not _ours(a, b):
        return a @ b
    y = a.new_empty((*a.shape[:-1], b.shape[-1]))
    _into(y, a, b, 0.0, 1.0)
    return y


def add_product_(y: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> None:
    """y <- beta y + alpha a b, all of them (m, n) or all (matrices, m, n)."""
    if _ours(a, b) and _ours(y) and y.is_contiguous() and a.dim() == b.dim() and not y.is_neg() and (
            torch.is_inference_mode_enabled() or not y.is_inference()):
        _into(y, a, b, beta, alpha)
        torch.autograd.graph.increment_version(y)  # a kernel of the stable ABI does not count versions itself
    else:
        (torch.baddbmm if y.dim() == 3 else torch.addmm)(y, a, b, beta=beta, alpha=alpha, out=y)


def _ours(a: Tensor, b: Tensor | None = None) -> bool:
    """Whether the op takes these, and there is something to be gained: it reads whole matrices, either way round, and
    a vector's product is bound by memory."""
    if torch.compiler.is_compiling() or not outruns_torch():
        return False
    for t in (a, b) if b is not None else (a,):
        if type(t) not in (Tensor, torch.nn.Parameter) or t.device.type != "cpu" or t.dtype != a.dtype or (
                t.dtype not in WIDE or t.dim() not in (2, 3) or t.layout is not torch.strided or not _whole(t)
                or (t.requires_grad and torch.is_grad_enabled())):
            return False
    if b is not None and (b.shape[-2] != a.shape[-1] or (b.dim() == 3 and b.shape[:-2] != a.shape[:-2])
                          or a.shape[-2] < 2 or b.shape[-1] < 2 or a.numel() * b.shape[-1] < WORTH
                          or a.shape[-2] * b.shape[-1] < PANEL * (torch.get_num_threads() - 1)):
        return False
    return not transformed() and not is_in_torch_dispatch_mode()


def _whole(t: Tensor) -> bool:
    return t.is_contiguous() or t.mT.is_contiguous()


def _into(y: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    turned = [not t.is_contiguous() for t in (a, b)]
    y, a, b = (t if t.dim() == 3 else t[None] for t in (y, *(t.mT if turn else t for t, turn in zip((a, b), turned))))
    _op.product_(y, a, b, *turned, alpha, beta)


@torch.library.register_fake("torch_subspace::product_")
def _(y, a, b, transa, transb, scale, add):
    pass
