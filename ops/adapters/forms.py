"""In which form a linear layer with a change of high rank is computed: the change beside it, or W + dW composed."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import WIDE, transformed

HEAVY = 1.7  # measured at 384 to 3072 features


def is_composed(x: Tensor, weight: Tensor, core: Tensor, factors: Sequence[Tensor | None], dropout: float) -> bool:
    """Is it cheaper to compute with W + dW, of a change of high rank? For half types it would be rounded away.

    With t rows and a rank of r the change beside the layer takes t r (m + n) flops forward and t r (2n + m) backward,
    and the factors' gradients t r (m + n); composed it takes m n r, for the gradient of W + dW t m n, and then m n r
    for each tensor that is trained. A flop of these is taken to cost as much as HEAVY of those. Kept for the backward
    are x, and here W + dW.
    """
    m, n = weight.shape
    r = min(core.shape)
    if 4 * r < min(m, n) or min(m, n) < 64 or dropout or x.dtype not in WIDE or weight.dtype != x.dtype:
        return False
    if torch.compiler.is_compiling() or transformed() or torch.is_autocast_enabled(x.device.type):
        return False
    t, grad = x.numel() // max(1, n), torch.is_grad_enabled()
    trained = grad * sum(p.requires_grad for p in (core, *factors))
    beside = t * r * (m + n + 2 * r) + grad * t * r * (2 * n + m) + (trained > 1) * t * r * (m + n)
    return HEAVY * (m * n * r * (1 + trained) + (trained > 0) * t * m * n) < beside
