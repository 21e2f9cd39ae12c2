"""The directions that rows of a matrix lie along most: a randomised range finder.

    Q = orth((GᵀG + δ)^p Ω)     Ω (n, r) normal numbers, δ the rounding of GᵀG, p = 1 by default

Halko, Martinsson and Tropp, SIAM Review 53(2), 2011, for the row space: two products with G for each power and n r²
for Q, where singular vectors cost min(m, n) m n. δ moves no singular vector: of directions that G does not have, r of
a matrix of zeros, it leaves those of Ω, so that Q has r columns whatever the rank is.

orth is Q of a QR factorisation with R's diagonal positive, which is unique. On a CPU by reflections: measured, in
float32, that takes a quarter of the products' time at 1024² and r = 128 and a twentieth at 4096², half of Cholesky-QR's
in float64. On a GPU by Cholesky-QR in float64, products and small factors alone, where reflections would go column by
column; shifted once and repeated twice (Fukaya et al., SIAM J. Sci. Comput. 42(1), 2020), so that no host ever looks.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import full_precision, told, whole, wide_dtype
from ..draws import seeded_normal
from .cosine import check_matrix
from .product import product
from .shards import total

CHUNK = 1 << 17  # entries that stay in a core's cache


def range_finder(g: Tensor, rank: int, *, power: int = 1, seed: int | torch.Generator | None = None) -> Tensor:
    """An orthonormal basis of a matrix's dominant row space, nearly as good as its leading right singular vectors.

    Args:
        g: (..., m, n), m and n above 0; leading dimensions are matrices, each with a basis of its own. For the columns
            of a matrix pass ``g.mT``.
        rank: columns of the basis, 1 to n. None more are looked at in between (no oversampling).
        power: how often GᵀG is applied to the random start, at least 1: two products with g each. The more, the nearer
            to singular vectors where singular values fall slowly.
        seed: an int of at least 0 fixes the start, the same on every device and in what is compiled; a torch.Generator
            draws it, on the generator's device; None draws from torch's generator of g's device. All matrices of g
            have the same start.

    Returns:
        Q, (..., n, rank), with orthonormal columns; of g's dtype, float32 for half types, which are widened first (also
        under autocast). ``g @ Q`` is g in rank dimensions, ``g @ Q @ Q.mT`` its nearest matrix with rows in their span.
        Where g has fewer than rank directions, even none, random ones complete it. NaN for a matrix with NaN or
        infinity, which does not disturb the others.

    Differentiable in ``g``, any number of times. Q itself turns with the start, its span ``Q @ Q.mT`` hardly does.

    Raises:
        TypeError: g is no dense floating tensor, or another argument is of a wrong kind.
        ValueError: shapes or values do not fit.

    Source: Halko, Martinsson and Tropp, SIAM Review 53(2), 2011.

    Example:
        >>> g = torch.randn(30, 4) @ torch.randn(4, 20)
        >>> q = ts.lowrank.range_finder(g, 4, seed=0)
        >>> q.shape, torch.allclose(g @ q @ q.mT, g, atol=1e-4)
        (torch.Size([20, 4]), True)
    """
    name = "range_finder"
    rank, power = check_matrix(name, g, rank), whole(name, "power", power, 1)
    if rank > g.shape[-1]:
        raise ValueError(f"{name}: rank must be at most g's {g.shape[-1]} columns, got {rank}")
    if seed is not None and not isinstance(seed, torch.Generator):
        try:
            seed = whole(name, "seed", seed)
        except TypeError:
            raise TypeError(f"{name}: seed must be an int, a torch.Generator or None, got {told(seed)}") from None
    g = g.to(wide_dtype(g.dtype))
    return range_basis(g, start(g, rank, seed), power)


@torch.no_grad()
def start(g: Tensor, rank: int, seed: int | torch.Generator | None) -> Tensor:
    """Ω, (n, rank), of g's dtype and device."""
    shape = g.shape[-1], rank
    if isinstance(seed, torch.Generator):
        return torch.randn(shape, generator=seed, device=seed.device, dtype=torch.float32).to(g)
    if seed is None:
        return torch.randn(shape, device=g.device, dtype=g.dtype)
    return seeded_normal(shape, seed, g.device).to(g.dtype)


def range_basis(g: Tensor, basis: Tensor, power: int) -> Tensor:
    """orth((GᵀG + δ)^power Ω) of wide matrices, from the start on."""
    with full_precision(g):
        for _ in range(power):
            y = product(g.mT, scaled(product(g, basis)))
            basis = orthonormal(scaled(y) + torch.finfo(g.dtype).eps * scaled(basis))
    return basis


def scaled(y: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """A matrix with entries up to 1: gradients may be so small that their squares are none. Q knows no scale."""
    return y / largest(y, group)


@torch.no_grad()
def largest(y: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The largest entry of a matrix, whose rows the processes of a group have; 1 where all are 0."""
    parts = [part.abs().amax((-2, -1), keepdim=True) for part in y.split(rows_in_cache(y), -2)] if y.shape[-2] else []
    size = torch.stack(parts).amax(0) if parts else y.new_zeros((*y.shape[:-2], 1, 1))
    total(size, group, "MAX")
    return torch.where(size == 0, 1, size)


def rows_in_cache(y: Tensor) -> int:
    """How many rows of a matrix stay in a core's cache with what is made of them; of a stack, or elsewhere, all."""
    if y.device.type != "cpu" or y.dim() > 2 or torch.compiler.is_compiling():
        return max(1, y.shape[-2])
    return max(1, CHUNK // y.shape[-1])


def orthonormal(y: Tensor) -> Tensor:
    """Q of y = Q R, (..., n, r) of full rank, R with a positive diagonal."""
    if y.device.type != "cpu" and y.dtype == torch.float32:
        return cholesky_qr(y)
    q, r = torch.linalg.qr(y)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(q)[..., None, :]


def cholesky_qr(y: Tensor) -> Tensor:
    """The same, in float64 whatever y is, for condition numbers up to 1e12."""
    q = y.double()
    n, r = q.shape[-2:]
    for rounding in (11 * (n + r + 1) * r * torch.finfo(q.dtype).eps, 0, 0):
        gram = q.mT @ q
        if rounding:
            largest = gram.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            gram = gram + rounding * largest * torch.eye(r, dtype=q.dtype, device=q.device)
        lower = torch.linalg.cholesky_ex(gram).L
        q = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
    return q.to(y.dtype)
