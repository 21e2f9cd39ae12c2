"""Newton-Schulz with Muon's coefficients: ours, and torch.optim.Muon's function as it is and in float32.

A case's operations are the least that five steps are, of each symmetric product one half.
"""

import reference
import torch
import work
from harness import Case, Contender, Target, compiled, relative
from torch.optim._muon import _zeropower_via_newtonschulz

from torch_subspace.lowrank import newton_schulz

OURS, COMPILED = "ours", "torch.compile of it"
SINGLE, HALF = "torch.optim.Muon's, float32", "torch.optim.Muon's, bfloat16"
MUON = (3.4445, -4.7750, 2.0315)


def inputs(m, n, device):
    """A gradient's momentum."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(device)


def single(x):
    """`_zeropower_via_newtonschulz` without its rounding to bfloat16. And without its norm(), which of 4096 x 1024
    numbers is off by 1e-4 in float32."""
    a, b, c = MUON
    y = x / x.square().sum().sqrt().clamp(min=1e-7)
    y = y.mT if x.shape[0] > x.shape[1] else y
    for _ in range(5):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if x.shape[0] > x.shape[1] else y


def half(x):
    """torch's own."""
    return _zeropower_via_newtonschulz(x, MUON, 5, 1e-7)


def contender(name, function, m, n, device, note=""):
    """Five steps."""

    def build():
        x = inputs(m, n, device)
        return lambda: function(x)

    def check():
        found = function(inputs(m, n, device)).cpu().double()
        return relative(found, reference.newton_schulz(inputs(m, n, "cpu").double(), [MUON] * 5))

    return Contender(name, build, None if note else check, note=note, peak=True, kept=4 * m * n)


def case(m, n, device, must, stretch):
    """All contenders at one size."""
    contenders = [contender(OURS, newton_schulz, m, n, device), contender(SINGLE, single, m, n, device),
                  contender(COMPILED, compiled(single), m, n, device),
                  contender(HALF, half, m, n, device, note="five steps of bfloat16")]
    return Case(f"{m}x{n} float32", contenders, [Target(OURS, (SINGLE, COMPILED), ">=", must, stretch)],
                **work.newton_schulz(m, n), seconds=4)


def cases(device):
    """Square and four to one, of small models and of larger ones, and what Trion orthogonalises at rank 128."""
    return [case(384, 384, device, 1.2, 1.5), case(384, 1536, device, 2, 3), case(1024, 1024, device, 1.3, 1.5),
            case(4096, 1024, device, 2.5, 4), case(4096, 128, device, 2.5, 4)]
