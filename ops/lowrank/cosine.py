"""A fixed basis for gradients: cosines, of which each matrix picks those that hold most of it.

    Q_jk = c_k cos((2j + 1) k pi / 2n)     c_0 = sqrt(1/n), else sqrt(2/n): the DCT-II, orthonormal columns
    S    = G Q                             column k is the rows' part along frequency k
    idx  = the r columns of S of largest sum of absolute values

S is a product for short rows and a Fourier transform for long ones (Makhoul, IEEE Trans. ASSP 28, 1980), which measured
is level at 128 columns, 4 times faster at 512 and 30 at 4096:

    v  = (x_0, x_2, x_4, ..., x_5, x_3, x_1),  V = its Fourier transform,  W_k = exp(-i pi k / 2n) V_k
    S_k = c_k Re W_k,  S_{n-k} = -c_k Im W_k   up to k = n/2

Some rows at a time, from the first pass to the last while they are in the cache: only columns that are picked are
written as columns. What is stored of a choice is idx; Q's columns are computed where they are needed.
"""
from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..common import (
    WIDE,
    check_dense,
    check_device,
    check_floating,
    full_precision,
    told,
    transformed,
    whole,
    wide_dtype,
)
from .shards import total

TRANSFORM_FROM = 128  # columns: the product below, Fourier's transform from there on
CHUNK = 1 << 18  # entries of G that stay in a core's cache with what is made of them
KEPT = 32  # bases of rows that short, and factors of longer ones: a few MiB at most


def cosine_columns(g: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Projection onto the ``rank`` cosines that hold most of a matrix, column by column of g times the DCT-II basis.

    Args:
        g: (..., m, n), m and n above 0; leading dimensions are matrices, each with a choice of its own.
        rank: how many columns, 1 to n.

    Returns:
        ``(columns, index)``: ``index``, int64 (..., rank), names the columns of S = g Q with the largest sums of
        absolute values (the largest ℓ1 norms), in ascending order; of equal ones the first. ``columns``, (..., m,
        rank), is S at these; of g's dtype, float32 for half types, which are widened first (also under autocast). With
        ``q = cosine_basis(n, index)``, ``columns @ q.mT`` is g's nearest matrix with rows in their span.

    Differentiable in ``g`` any number of times, as the linear map that it is where the choice stays; index has no
    gradient. A row that is not finite makes columns NaN in that row, and the choice is then of no meaning.

    Raises:
        TypeError: g is no dense floating tensor, or rank no int.
        ValueError: shapes or values do not fit.

    Source: DCT-AdamW and Trion, arXiv 2505.17967; Makhoul (1980) for the transform.

    Example:
        >>> g = torch.randn(6, 3) @ ts.lowrank.cosine_basis(8, torch.tensor([0, 2, 5])).mT
        >>> columns, index = ts.lowrank.cosine_columns(g, 3)
        >>> index
        tensor([0, 2, 5])
        >>> torch.allclose(columns @ ts.lowrank.cosine_basis(8, index).mT, g, atol=1e-5)
        True
    """
    name = "cosine_columns"
    rank = check_matrix(name, g, rank)
    if rank > g.shape[-1]:
        raise ValueError(f"{name}: rank must be at most g's {g.shape[-1]} columns, got {rank}")
    g = g.to(wide_dtype(g.dtype))
    if not g.numel():  # no matrices
        return g[..., :rank], torch.zeros((*g.shape[:-2], rank), dtype=torch.int64, device=g.device)
    with full_precision(g):
        if not transformed():
            return _Columns.apply(g, rank)
        spectrum, n = _spectrum(g), g.shape[-1]
        norms = spectrum.detach().abs().sum(-2)
        index = largest_columns(norms[..., _places(torch.arange(n, device=g.device), n)[0]], rank)
        return _taken(spectrum, *_places(index, n)), index


def cosine_basis(size: int, index: Tensor | None = None, *, dtype: torch.dtype | None = None,
                 device: torch.device | str | int | None = None) -> Tensor:
    """The orthonormal cosine (DCT-II) basis as columns, or those of them that an index names.

    Args:
        size: n, the length of a column, at least 1.
        index: int64 (..., rank), each 0 to n - 1, as `cosine_columns` returns it; None for all in order.
        dtype: float32 or float64; torch's default unless given.
        device: of the result; index's, or torch's default unless given.

    Returns:
        (..., n, rank): entry j of column k is sqrt(2/n) cos((2j + 1) k pi / 2n), and sqrt(1/n) for k = 0. A tensor of
        the caller's own.

    Raises:
        TypeError: size or index is not of whole numbers, or dtype is another.
        ValueError: an index out of range (on a GPU it is torch that says so), or a scalar.

    Example:
        >>> q = ts.lowrank.cosine_basis(16)
        >>> torch.allclose(q.mT @ q, torch.eye(16), atol=1e-6)
        True
    """
    name = "cosine_basis"
    size = whole(name, "size", size, 1)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in WIDE:
        raise TypeError(f"{name}: dtype must be float32 or float64, got {told(dtype)}")
    check_device(name, device)
    if index is not None:
        check_dense(name, "index", index)
        if index.dtype != torch.int64:
            raise TypeError(f"{name}: index must be int64, got {index.dtype}")
        if index.dim() == 0:
            raise ValueError(f"{name}: index must be (..., rank), got a scalar of shape ()")
        if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
            for k in (index.min().item(), index.max().item()):
                if not 0 <= k < size:
                    raise ValueError(f"{name}: index must be in 0 to {size - 1}, got {k}")
        index = index if device is None else index.to(device)
    else:
        index = torch.arange(size, device=device)
    return basis_columns(size, index, dtype)


def check_matrix(name: str, g: Tensor, rank: int) -> int:
    """Raises in `name`'s voice unless g is (..., m, n) with something in it; rank as an int."""
    check_floating(name, "g", g)
    if g.dim() < 2 or g.shape[-1] == 0 or g.shape[-2] == 0:
        raise ValueError(f"{name}: g must be (..., m, n) with m > 0 and n > 0, got {tuple(g.shape)}")
    return whole(name, "rank", rank, 1)


# ---------------------------------------------------------------------------------------------------------- the basis


def basis_columns(size: int, index: Tensor, dtype: torch.dtype) -> Tensor:
    """`cosine_basis`, its arguments as they should be."""
    odd = 2 * torch.arange(size, dtype=torch.float64, device=index.device) + 1
    angle = odd[:, None] * (index[..., None, :].double() * (math.pi / (2 * size)))
    scale = torch.full_like(odd[:1], math.sqrt(2 / size)).masked_fill(index == 0, math.sqrt(1 / size))
    return (angle.cos() * scale[..., None, :]).to(dtype)


Spectrum = Callable[[Tensor], Tensor]
Places = Callable[[Tensor, int], tuple[Tensor, "Tensor | None"]]
_cache: OrderedDict[Any, Tensor] = OrderedDict()


def _kept(make: Callable[..., Tensor], size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """make(size, dtype, device), of the last KEPT such calls kept; of what a trace or a mode makes nothing is."""
    if torch.compiler.is_compiling() or transformed() or is_in_torch_dispatch_mode():
        return make(size, dtype, device)
    key = make, size, dtype, device
    found = _cache.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = make(size, dtype, device)
        if type(found) is Tensor:  # not one that only pretends
            _cache[key] = found
            if len(_cache) > KEPT:
                _cache.popitem(last=False)
    else:
        _cache.move_to_end(key)
    return found


def _basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return basis_columns(size, torch.arange(size, device=device), dtype)


def _factors(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """c_k exp(-i pi k / 2n) for k up to n/2."""
    k = torch.arange(size // 2 + 1, dtype=torch.float64, device=device)
    scale = torch.full_like(k, math.sqrt(2 / size)).masked_fill(k == 0, math.sqrt(1 / size))
    return torch.polar(scale, k * (-math.pi / (2 * size))).to(torch.complex128 if dtype == torch.float64
                                                              else torch.complex64)


# -------------------------------------------------------------------------------------------------------- the columns


def _spectrum(g: Tensor) -> Tensor:
    """S, or its columns in W's order, (..., m, 2 (n // 2 + 1)): Re and Im of W_0, W_1, ..., each -S where it is Im."""
    n = g.shape[-1]
    if not g.shape[-2]:  # which Fourier's transform of torch 2.11 does not take
        return g.new_zeros((*g.shape[:-1], 2 * (n // 2 + 1)))
    if n < TRANSFORM_FROM:
        return g @ _kept(_basis, n, g.dtype, g.device)
    v = torch.cat((g[..., ::2], g[..., 1::2].flip(-1)), -1)
    return torch.view_as_real(torch.fft.rfft(v) * _kept(_factors, n, g.dtype, g.device)).flatten(-2)


def _places(index: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """Where the columns of S are in `_spectrum`'s, and which of them are there with the other sign, if any are."""
    if n < TRANSFORM_FROM:
        return index, None
    mirrored = index > n // 2
    return torch.where(mirrored, 2 * (n - index) + 1, 2 * index), mirrored


def largest_columns(norms: Tensor, rank: int) -> Tensor:
    """The columns of largest norm. A stable sort, as topk's ties are free."""
    return norms.sort(dim=-1, descending=True, stable=True).indices[..., :rank].sort(dim=-1).values


def _taken(spectrum: Tensor, places: Tensor, mirrored: Tensor | None) -> Tensor:
    columns = taken(spectrum, places)
    return columns if mirrored is None else columns * torch.where(mirrored, -1, 1).to(columns)[..., None, :]


def taken(t: Tensor, index: Tensor) -> Tensor:
    """Columns (..., m, r) of t by index (..., r)."""
    if index.dim() == 1:  # the quicker of the two; neither makes an index as large as t, as take_along_dim does
        return t.index_select(-1, index)
    return t.gather(-1, index[..., None, :].expand(*t.shape[:-1], index.shape[-1]))


def columns_of(g: Tensor, rank: int, group: dist.ProcessGroup | None = None, spectrum: Spectrum = _spectrum,
               places: Places = _places) -> tuple[Tensor, Tensor]:
    """`cosine_columns` of matrices of float32 or float64, without a gradient; a group's processes have rows of each.
    The same for another basis by its `spectrum` and `places`."""
    n = g.shape[-1]
    if g.device.type != "cpu" or g.numel() <= CHUNK or torch.compiler.is_compiling():
        chunks = [spectrum(g)]
    elif g.dim() > 2:
        each = [columns_of(matrix, rank, group, spectrum, places) for matrix in g.reshape(-1, *g.shape[-2:])]
        columns, index = zip(*each, strict=True)
        return torch.stack(columns).unflatten(0, g.shape[:-2]), torch.stack(index).unflatten(0, g.shape[:-2])
    else:
        chunks = [spectrum(rows) for rows in g.split(max(1, CHUNK // n))]
    norms = sum(chunk.abs().sum(-2) for chunk in chunks[1:]) + chunks[0].abs().sum(-2)
    total(norms, group)
    index = largest_columns(norms[..., places(torch.arange(n, device=g.device), n)[0]], rank)
    return torch.cat([_taken(chunk, *places(index, n)) for chunk in chunks], -2), index


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, rank):
        columns, index = columns_of(g, rank)
        ctx.size = g.shape[-1]
        ctx.save_for_backward(index)
        ctx.mark_non_differentiable(index)
        return columns, index

    @staticmethod
    def backward(ctx, dcolumns, _):
        (index,) = ctx.saved_tensors
        with full_precision(dcolumns):
            return dcolumns @ basis_columns(ctx.size, index, dcolumns.dtype).mT, None
