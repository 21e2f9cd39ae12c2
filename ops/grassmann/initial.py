"""How frames begin: nearest to a matrix, random, completed at random, along principal directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def nearest_frame(a: Tensor) -> Tensor:
    """Polar factor of each (..., k, n) matrix, k <= n: the frame nearest to it, also where its rows are dependent."""
    q, r = torch.linalg.qr(a.mT)  # a = rᵀqᵀ, so only the k×k factor needs an SVD
    u, _, vh = torch.linalg.svd(r.mT)
    return u @ vh @ q.mT


def completed_frame(a: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """(..., j, n) rows -> frames (..., k, n): the frame nearest to `a`, then k-j random directions orthogonal to it."""
    n = a.shape[-1]
    if a.shape[-2]:
        a = nearest_frame(a)
    rest = torch.randn(*a.shape[:-2], k - a.shape[-2], n, generator=generator, dtype=a.dtype, device=a.device)
    if not rest.shape[-2]:
        return a
    for _ in range(2):  # twice, as one pass leaves a trace of `a` when little else remains (k near n)
        rest = nearest_frame(rest - rest @ a.mT @ a)
    return torch.cat([a, rest], -2)


def drawn_frames(
    shape: Sequence[int], first: Tensor | None, generator: torch.Generator | None, device, dtype, wide,
    out: Tensor | None = None,
) -> Tensor:
    """Frames (c, k, n): orthonormal rows `first` (c, j, n), if any, then random directions, uniformly distributed.

    out: where they go, of that shape and dtype.

    Cholesky-QR, which keeps the first rows: two products in `dtype`, on numbers that are still in the cache. Random
    rows are nearly orthogonal where n is some times k, and come out as orthonormal as rounding lets them; else it is
    done twice, and where rows are too near to dependent, or products less precise than their dtype, by QR in `wide`.
    """
    a = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    if first is not None:
        a[:, : first.shape[1]] = first * shape[2] ** 0.5  # as long as the others
    with torch.autocast(device.type, enabled=False):
        gram = (a @ a.mT).to(wide)
        lower = torch.linalg.cholesky_ex(gram).L
        w = torch.matmul(_inverse(lower).to(dtype), a, out=out)
        sizes = lower.diagonal(dim1=1, dim2=2)
        alike = bool((sizes.amax(1) < 2 * sizes.amin(1)).all()) if shape[1] else True
        some = w[:8] if alike else w  # where one fell short of its precision, all did
        gram = (some @ some.mT).to(wide)
        if not alike:
            w.copy_(_inverse(torch.linalg.cholesky_ex(gram).L).to(dtype) @ w)
    bad = ~((gram - torch.eye(shape[1], dtype=wide, device=device)).abs().amax((1, 2)) < 1e-4)  # of the first time
    if bad.any():
        bad = bad if bad.shape == w.shape[:1] else slice(None)
        a = a[bad].to(wide)
        a = nearest_frame(a) if first is None else completed_frame(a[:, : first.shape[1]], shape[1], generator)
        w[bad] = a.to(dtype)
    return w


def _inverse(lower: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(lower, torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device),
                                         upper=False)


SHORT = 3e-4  # share of the largest energy down to which a Gram matrix in the points' dtype will do


def principal_directions(x: Tensor, k: int, dtype: torch.dtype | None = None) -> Tensor:
    """At most k orthonormal directions (j, n) of largest energy ‖x v‖² of the rows of x (m, n), the largest first.

    Row i is right to about eps s_1 / gap, with lengths s_1 >= s_2 >= ... and the gap of s_i to its neighbours. By a
    Gram matrix it is to eps s_1² / (s_i² - s_j²), and after a step of the power method to that times (s_j / s_i)²,
    j > i: enough down to SHORT. Shorter ones are found by the Gram matrix in float64 of what is float32, and by
    singular vectors of what is float64.

    dtype: what the points were rounded to, where they have been widened since; theirs by default. Directions no longer
    than that rounding are none.
    """
    largest = x.abs().amax() if x.numel() else 0
    if largest == 0:
        return x[:0]
    eps = max(torch.finfo(of).eps for of in (x.dtype, dtype or x.dtype))
    (m, n), dtype = x.shape, x.dtype
    x, k = x / largest, min(k, m, n)
    energy, u = _by_gram(x)
    if energy[-k] < energy[-1] * SHORT:
        rounding = (8 + max(m, n) ** 0.5) * eps * float(x.norm())  # of entries, of sums they may be, of what follows
        if dtype != torch.float32:
            _, length, v = torch.linalg.svd(torch.linalg.qr(x, mode="r").R if m > n else x, full_matrices=False)
            return v[: min(k, int((length > rounding).sum()))]
        x = x.double()
        energy, u = _by_gram(x)
        k = min(k, int((energy > rounding**2).sum()))
    u = u[:, -k:].flip(1).mT
    if m < n:
        u = _in_order(u @ x)
    elif energy[-k] < energy[-1] / 100:
        u = _in_order(_in_order(u @ x.mT) @ x)
    return u.to(dtype)


def _by_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of the smaller Gram matrix."""
    return torch.linalg.eigh(x @ x.mT if x.shape[0] < x.shape[1] else x.mT @ x)


def _in_order(a: Tensor) -> Tensor:
    """Rows made orthonormal, each to those before it: errors of the short ones tilt no long one."""
    return torch.linalg.qr(normalize(a, dim=1).mT).Q.mT


def principal_frame(x: Tensor, k: int, generator: torch.Generator | None = None,
                    dtype: torch.dtype | None = None) -> Tensor:
    """The frame (k, n) of the principal directions of points (m, n), completed at random where there are fewer. dtype:
    what the points were rounded to."""
    found = principal_directions(x, k, dtype)
    return found if len(found) == k else completed_frame(found, k, generator)


MEMORY = 4  # features to a dimension: with no more a class begins by knowing its examples


def by_heart(counts: Tensor, dims: int | Sequence[int], n: int) -> str | None:
    """What to tell of classes that start from few features, (C,) of them of length n, where half or more do."""
    dims = torch.as_tensor(dims).expand_as(counts)
    some = counts > 0
    few = some & (counts <= MEMORY * dims) & (counts < n)
    if not some.any() or 2 * few.sum() < some.sum():
        return None
    count, k = int(counts[few].median()), int(dims[few].median())
    return (f"{int(few.sum())} of {int(some.sum())} classes start from {MEMORY} features a dimension or fewer (the "
            f"median has {count} for k = {k}), and know these by heart: trained on the same examples they have little "
            "to learn. Give features of more examples, a smaller subspace_dim, or start at random")
