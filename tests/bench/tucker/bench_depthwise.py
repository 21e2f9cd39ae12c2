"""The weight gradient of depthwise convolutions (ConvNeXt's sizes): ours against torch's own and what one would write.

Bound by the multiply-adds of the definition; small planes by reading x and dy.
"""

import reference
import torch
import work
from harness import Case, Contender, relative
from torch.nn.functional import unfold

from torch_subspace.tucker.depthwise import depthwise_weight_gradient


def aten(x, dy, k, pad):
    """torch's backward, asked for the weight's gradient alone."""
    weight = x.new_empty(x.shape[1], 1, k, k)
    geometry = (1, 1), (pad, pad), (1, 1), False, (0, 0), x.shape[1]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, (False, True, False))[1]


def unfolded(x, dy, k, pad):
    """One batched product on the unfolded input."""
    b, c = x.shape[:2]
    columns = unfold(x, k, padding=pad).view(b, c, k * k, -1)
    return torch.einsum("bckp,bcp->ck", columns, dy.flatten(2)).view(c, 1, k, k)


def ours(x, dy, k, pad):
    """The op."""
    return depthwise_weight_gradient(x, dy, (k, k), (1, 1), (pad, pad), (1, 1))


def case(b, c, side, k, device):
    """All contenders at one size."""
    seed = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(b, c, side, side, generator=seed).to(device) for _ in range(2))
    pad = k // 2

    def contender(name, function):
        def check():
            given = [t[:1].cpu().double() for t in (x, dy)]
            truth = reference.depthwise_weight_gradient(*given, (k, k), (1, 1), (pad, pad), (1, 1))
            return relative(function(x[:1], dy[:1], k, pad).cpu(), truth)

        return Contender(name, lambda: lambda: function(x, dy, k, pad), check)

    contenders = [contender("ours", ours), contender("torch: convolution_backward", aten),
                  contender("unfold and einsum", unfolded)]
    return Case(f"B={b} C={c} {side}x{side} kernel {k}x{k} float32", contenders,
                **work.depthwise(b, c, side, k), seconds=8)


def cases(device):
    """ConvNeXt's four stages, and a 3x3."""
    return [
        case(8, 96, 56, 7, device),
        case(8, 192, 28, 7, device),
        case(8, 384, 14, 7, device),
        case(8, 768, 7, 7, device),
        case(8, 96, 56, 3, device),
    ]
