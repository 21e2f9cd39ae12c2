"""How frames begin: the frame nearest to a matrix, directions completed at random, principal directions."""

from __future__ import annotations

import torch
from torch import Tensor


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


def principal_directions(x: Tensor, k: int) -> Tensor:
    """At most k orthonormal directions (j, n) of largest energy ‖x v‖ of the rows of x (m, n), by its smaller Gram."""
    if not x.any():
        return x[:0]
    m, n = x.shape
    x = x / x.abs().amax()
    energy, u = torch.linalg.eigh(x @ x.mT if m < n else x.mT @ x)  # ascending
    rank = int((energy > energy[-1] * max(m, n) * torch.finfo(x.dtype).eps).sum())
    u = u[:, -min(k, rank) :].flip(1).mT
    return nearest_frame(u @ x) if m < n else u
