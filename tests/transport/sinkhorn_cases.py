"""Scores and marginals for Sinkhorn."""

import pytest
import torch

import torch_subspace  # noqa: F401  (registers the ops)

OP, BACKWARD = torch.ops.torch_subspace.sinkhorn, torch.ops.torch_subspace.sinkhorn_backward
TIGHT = {torch.float64: 1e-13, torch.float32: 1e-6}
each_dtype = pytest.mark.parametrize("dtype", TIGHT, ids=str)


def affinity(n, d=8, dtype=torch.float64, seed=0):
    """|cosines| of clustered features, exactly symmetric: what MLC makes of a cluster head."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(3, d, generator=g, dtype=torch.float64)[torch.randint(3, (n,), generator=g)]
    c = torch.nn.functional.normalize(c + torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1)
    s = (c @ c.mT).abs()
    return ((s + s.mT) / 2).to(dtype)


def problem(m, n, dtype=torch.float64, batch=(), seed=0):
    """Scores, and marginals of equal sums."""
    g = torch.Generator().manual_seed(seed + 31 * m + n)
    scores = torch.rand(*batch, m, n, generator=g, dtype=torch.float64)
    row, col = (torch.rand(*batch, k, generator=g, dtype=torch.float64) + 0.2 for k in (m, n))
    col = col * (row.sum(-1) / col.sum(-1))[..., None]
    return scores.to(dtype), row.to(dtype), col.to(dtype)


def marginal_error(plan, row=None, col=None):
    row, col = (1.0 if t is None else t.double() for t in (row, col))
    plan = plan.double()
    return max((plan.sum(-1) / row - 1).abs().max().item(), (plan.sum(-2) / col - 1).abs().max().item())
