"""Composing a weight: base + scale core x_0 F_0 x_1 ... in one pass, against einsum and products by hand."""

import reference
import torch
import work
from adapted_layers import OURS, RANK, SCALE
from harness import Case, Contender, Target, relative

import torch_subspace as ts


def compose(out, into, kernel, device):
    """A convolution's weight plus its change, in torch operations and by the op."""
    seed = torch.Generator().manual_seed(0)
    ranks = [min(RANK, n) for n in (out, into, kernel, kernel)]
    base = torch.randn(out, into, kernel, kernel, generator=seed).to(device)
    core = torch.randn(ranks, generator=seed).to(device)
    factors = [torch.randn(n, r, generator=seed).to(device) for n, r in zip(base.shape, ranks)]
    result = torch.empty_like(base)

    def einsum():
        return base + SCALE * torch.einsum("abcd,oa,ib,yc,xd->oiyx", core, *factors)

    def hand():
        g = factors[2] @ core @ factors[3].mT
        g = (factors[1] @ g.flatten(2)).flatten(1)
        return torch.addmm(base.flatten(1), factors[0], g, alpha=SCALE).view(base.shape)

    def op():
        return ts.tucker_compose(core, factors, scale=SCALE, base=base, out=result)

    def made(name, function):
        def check():
            wide = [t.cpu().double() for t in (core, base, *factors)]
            truth = reference.tucker(wide[0], wide[2:], scale=SCALE, base=wide[1])
            return relative(no_grad(function)().cpu(), truth)

        return Contender(name, lambda: no_grad(function), check)

    no_grad = torch.no_grad()
    floor = Contender("floor: a copy of base", lambda: lambda: result.copy_(base))
    contenders = [floor, made(OURS, op), made("einsum", einsum), made("by hand: matmul and addmm", hand)]
    most = 1.2 if out < 1024 else 1.5
    targets = [Target(OURS, ("einsum",), ">=", 5, 5), Target(OURS, ("by hand: matmul and addmm",), ">=", 1.2, 1.2),
               Target(OURS, (floor.name,), "<=", most, 1.2)]
    return Case(f"compose {out}x{into}x{kernel}x{kernel} float32", contenders, targets,
                **work.tucker(base.shape, ranks), seconds=4)


def cases(device):
    """A convolution's weight, and one that no cache holds."""
    return [compose(256, 256, 3, device), compose(2048, 2048, 3, device)]
