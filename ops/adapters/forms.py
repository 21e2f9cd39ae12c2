"""In which form a linear layer with a change of high rank is computed: the change beside it, or W + dW composed."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import WIDE, plain_gradients, transformed
from ..tucker.tucker import tucker_compose

HEAVY = 1.7  # measured at 384 to 3072 features


def is_composed(x: Tensor, weight: Tensor, core: Tensor, factors: Sequence[Tensor | None], dropout: float) -> bool:
    """Is it cheaper to compute with W + dW, of a change of high rank? For half types it would be rounded away.

    With t rows and a rank of r the change beside the layer takes t r (m + n) flops forward and t r (2n + m) backward,
    and the factors' gradients t r (m + n); composed it takes m n r, as much again for the input's gradient, and for
    that of W + dW t m n, and then m n r for each tensor that is trained. A flop of these is taken to cost as much as
    HEAVY of those.
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
    composed = m * n * r * (1 + trained + (grad and x.requires_grad)) + (trained > 0) * t * m * n
    return HEAVY * composed < beside


def composed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors: Sequence[Tensor | None],
                    scale: float) -> Tensor:
    """linear(x, W + dW, bias). The sum is not kept for the backward, but made again."""
    made = tucker_compose(core, factors, scale=scale, base=weight)
    return _Composed.apply(x, bias, made, weight, core, float(scale), *factors)


class _Composed(torch.autograd.Function):
    """`made` is W + dW, made outside, so that tucker_compose's own backward takes its gradient to what it is made of;
    that comes along only to make it again."""

    @staticmethod
    def forward(ctx, x, bias, made, weight, core, scale, *factors):
        ctx.scale, ctx.bias = scale, bias is not None
        ctx.save_for_backward(x, weight, core, *factors)
        return F.linear(x, made, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, core, *factors = ctx.saved_tensors
        need_x, need_bias, need_made = ctx.needs_input_grad[:3]
        dx = dbias = dmade = None
        again = torch.is_grad_enabled()  # is this to be differentiated itself?
        made = tucker_compose(core, factors, scale=ctx.scale, base=weight) if need_x or again else None
        if again:
            bias = dy.new_zeros(dy.shape[-1], requires_grad=True) if ctx.bias else None
            dx, dmade, dbias = plain_gradients(F.linear, (x, made, bias), (need_x, need_made, need_bias), dy)
        else:
            dx = dy @ made if need_x else None
            dmade = dy.flatten(0, -2).mT @ x.flatten(0, -2) if need_made else None
            dbias = dy.flatten(0, -2).sum(0) if need_bias else None
        return dx, dbias, dmade, *(None,) * (3 + len(factors))
