"""Matrix products of a low-rank step: by our library's OpenBLAS, and by torch.

Where torch's are no slower, the optimisers take those (ops/lowrank/product.py).
"""

import torch
import work
from harness import Case, Contender, Target, relative

OURS, TORCH = "ours", "torch"
RANK = 128


def projected(y, g, q, ours):
    """y <- G Q"""
    if ours:
        torch.ops.torch_subspace.product_(y[None], g[None], q[None], False, False, 1.0, 0.0)
    else:
        torch.mm(g, q, out=y)


def back(y, g, x, ours):
    """y <- Gᵀ X"""
    if ours:
        torch.ops.torch_subspace.product_(y[None], g[None], x[None], True, False, 1.0, 0.0)
    else:
        torch.mm(g.mT, x, out=y)


def moved(w, low, q, ours):
    """W <- .999 W + L Qᵀ"""
    if ours:
        torch.ops.torch_subspace.product_(w[None], low[None], q[None], False, True, 1.0, 0.999)
    else:
        torch.addmm(w, low, q.mT, beta=0.999, out=w)


def contender(name, function, sizes, truth, device):
    """One product, in place."""

    def given():
        seed = torch.Generator().manual_seed(0)
        return [torch.randn(size, generator=seed).div_(size[-1] ** 0.5).to(device) for size in sizes]

    def build():
        tensors = given()
        return lambda: function(*tensors, name == OURS)

    def check():
        y, a, b = given()
        expected = truth(*(t.cpu().double() for t in (y, a, b)))
        function(y, a, b, name == OURS)
        return relative(y.cpu(), expected)

    return Contender(name, build, check)


def case(what, function, m, n, k, sizes, truth, device):
    """Both at one size."""
    contenders = [contender(name, function, sizes, truth, device) for name in (OURS, TORCH)]
    return Case(f"{what} float32", contenders, [Target(OURS, (TORCH,), ">=", 1, 2)], **work.product(m, n, k), seconds=4)


def cases(device):
    """The three of a step: of square weights, and of a small model's."""
    found = []
    for m, n in ((1024, 1024), (4096, 4096), (1536, 384)):
        found += [case(f"G Q, {m}x{n}, r={RANK}", projected, m, RANK, n, [(m, RANK), (m, n), (n, RANK)],
                       lambda y, g, q: g @ q, device),
                  case(f"G' X, {m}x{n}, r={RANK}", back, n, RANK, m, [(n, RANK), (m, n), (m, RANK)],
                       lambda y, g, x: g.mT @ x, device),
                  case(f"W + L Q', {m}x{n}, r={RANK}", moved, m, n, RANK, [(m, n), (m, RANK), (n, RANK)],
                       lambda w, low, q: 0.999 * w + low @ q.mT, device)]
    return found
