"""Losses and maps of the family that are torch's products and eigenproblems: ours, the formula as one would write it,
eager and compiled, and what none does without.

Beside orthogonal maps are scipy's, and torch's and peft's own ways to train one. Of the losses no package that could be
installed has any: the public codes are single files of the papers, which the formulas are.
"""

import reference
import torch
import work
from harness import Case, Contender, compiled, relative
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div, linear
from torch.nn.utils import parametrizations

from torch_subspace.isotropy import (
    KoopmanInformationLoss,
    OrthogonalAdapter,
    group_lasso,
    procrustes,
    prox_group_lasso_,
    ridge_transition,
    similarity_distillation,
    von_neumann_entropy,
)

OURS, FORMULA, FLOOR = "ours", "formula", "floor: products and factorisations alone"
ETA, TAU, ALPHA, LR = 0.1, 0.1, 20.0, 0.01


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def contender(name, function, truth, make, device, share=1.0):
    """A function of some tensors, and the gradient in all of them of its sum, or this share of it."""

    def step(function, given):
        leaves = [t.detach().requires_grad_() for t in given]
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(share * value.sum(), leaves)

    def build():
        given = [t.to(device) for t in make()]
        return lambda: step(function, given)

    def check():
        found = step(function, [t.to(device) for t in make()])
        return relative([t.cpu() for t in found], step(truth, [t.double() for t in make()]))

    return Contender(name, build, check, peak=True, kept=4 * sum(t.numel() for t in make()))


def contenders(make, device, ours, formula, truth, floor=None):
    """Ours, the formula eager and compiled, and a floor: a function of the tensors, without a gradient."""
    found = [contender(OURS, ours, truth, make, device), contender(FORMULA, formula, truth, make, device),
             contender("torch.compile of it", compiled(formula), truth, make, device)]
    if floor is not None:

        def build():
            given = [t.to(device) for t in make()]
            return lambda: floor(*given)

        found.insert(0, Contender(FLOOR, build))
    return found


def entropy(n, d, device):
    def formula(z):
        p = torch.linalg.eigvalsh(z.mT @ z / z.square().sum())
        return -(p * p.log()).sum()

    def floor(z):
        gram = z.mT @ z
        return torch.linalg.eigh(gram), gram @ gram, z @ gram

    every = contenders(lambda: [normal(n, d)], device, von_neumann_entropy, formula, reference.von_neumann_entropy,
                       floor)
    return Case(f"entropy n={n} d={d} float32", every, **work.entropy(n, d))


def ridge(n, d, device):
    def formula(z, after):
        return torch.linalg.solve(z.mT @ z + ETA * torch.eye(d, device=z.device), z.mT @ after)

    def floor(z, after):
        gram, cross = z.mT @ z, z.mT @ after
        factor = torch.linalg.cholesky_ex(gram + ETA * torch.eye(d, device=z.device))[0]
        solved = torch.cholesky_solve(cross, factor)
        return torch.cholesky_solve(solved, factor), solved @ cross, z @ gram, after @ gram, z @ cross

    every = contenders(lambda: [normal(n, d), normal(n, d, seed=1)], device,
                       lambda z, after: ridge_transition(z, after, eta=ETA), formula,
                       lambda z, after: reference.ridge_transition(z, after, eta=ETA), floor)
    return Case(f"ridge transition n={n} d={d} float32", every, **work.ridge(n, d))


def distillation(n, device):
    """The public code's form, with the mean over rows."""

    def similarities(seed):
        return normal(n, n, seed=seed) / 4 + torch.eye(n)

    old = similarities(1)

    def formula(new):
        label, total, former = torch.arange(n, device=new.device), 0, old.to(new.device)
        for before, after in ((former, new), (former.mT, new.mT)):
            right = before.argmax(1) == label
            apart = kl_div((after / TAU).log_softmax(1), (before / TAU).softmax(1), reduction="none").sum(1)
            total = total + cross_entropy(after / TAU, label) + ALPHA * (apart * right).mean()
        return total / 2

    every = contenders(lambda: [similarities(0)], device,
                       lambda new: similarity_distillation(old.to(new), new, tau=TAU, alpha=ALPHA), formula,
                       lambda new: reference.similarity_distillation(old.double(), new, tau=TAU, alpha=ALPHA))
    return Case(f"distillation n={n} float32", every, **work.distillation(n))


def groups(rows, columns, size, device):
    """Penalty and gradient; then the proximal step, group by group where it is the formula."""
    sizes = [size] * (rows // size)

    def formula(weight):
        return torch.stack([torch.linalg.matrix_norm(part) for part in weight.split(sizes)]).sum()

    every = [contender(name, function, formula, lambda: [normal(rows, columns)], device)  # compiled: minutes to compile
             for name, function in ((OURS, lambda weight: group_lasso(weight, sizes)), (FORMULA, formula))]
    return Case(f"group lasso {rows}x{columns} groups of {size} float32", every, **work.group_lasso(rows, columns))


def proximal(rows, columns, size, device):
    sizes = [size] * (rows // size)

    def by_parts(weight, step):
        for part in weight.split(sizes):
            part.mul_((1 - step / torch.linalg.matrix_norm(part)).clamp_min(0))
        return weight

    def one(name, function):
        def build():
            weight = normal(rows, columns).to(device)
            return lambda: function(weight, 0.0)  # the same numbers, whenever it is called

        def check():
            found = function(normal(rows, columns).to(device), LR)
            return relative([found.cpu()], [by_parts(normal(rows, columns).double(), LR)])

        return Contender(name, build, check)

    def ours(weight, step):
        return prox_group_lasso_(weight, sizes, step)

    return Case(f"proximal step {rows}x{columns} groups of {size} float32",
                [one(OURS, ours), one(FORMULA, by_parts)], **work.proximal(rows, columns))


def koopman(b, t, d, k, device):
    """A batch of trajectories; the formula takes one after the other."""
    loss = KoopmanInformationLoss(k=k, eta=ETA)

    def formula(z, after):
        eye, ahead, nce = ETA * torch.eye(d, device=z.device, dtype=z.dtype), [], []
        at = torch.arange(t, device=z.device)
        away = (at[:, None] - at).abs()
        for own, following in zip(z, after):
            ahead.append(torch.linalg.inv(own.mT @ own + eye) @ own.mT @ following)
            unit = own / own.norm(dim=-1, keepdim=True)
            share = (unit @ unit.mT / loss.tau).exp()
            near, every = (share * (away > 0) * (away <= k)).sum(1), (share * (away > 0)).sum(1)
            nce.append(-(near / every).log()[k:t - k])
        flat = z.flatten(0, 1)
        flat = flat - flat.mean(0)
        p = torch.linalg.eigvalsh(flat.mT @ flat / flat.square().sum())
        error = (z @ torch.stack(ahead).mean(0) - after).square().mean()
        return error + loss.alpha * torch.stack(nce).mean() + loss.beta * (p * p.log()).sum()

    def truth(z, after):
        ahead = z @ reference.ridge_transition(z, after, eta=ETA).mean(0)
        nce = torch.stack([reference.neighbour_nce(own, k, loss.tau) for own in z]).mean()
        flat = z.flatten(0, 1)
        spread = reference.von_neumann_entropy(flat - flat.mean(0))
        return (ahead - after).square().mean() + loss.alpha * nce - loss.beta * spread

    every = contenders(lambda: [normal(b, t, d), normal(b, t, d, seed=1)], device, loss, formula, truth)
    return Case(f"Koopman loss B={b} T={t} d={d} k={k} float32", every, **work.koopman(b, t, d, k))


def turned(n, d):
    """Points, and the same in another basis, with noise."""
    x = normal(n, d)
    return [x, x @ torch.linalg.qr(normal(d, d, seed=1)).Q + 0.5 * normal(n, d, seed=2)]


def polar(x, y):
    u, _, vt = torch.linalg.svd(x.mT @ y)
    return u @ vt


def nearest(n, d, device):
    """The orthogonal map and its gradient."""

    def floor(x, y):
        u, _, vt = torch.linalg.svd(x.mT @ y)
        q = u @ vt
        turn = u @ (u.mT @ q @ vt.mT) @ vt
        return y @ turn.mT, x @ turn

    every = contenders(lambda: turned(n, d), device, procrustes, polar, polar, floor)
    return Case(f"procrustes n={n} d={d} float32", every, **work.procrustes(n, d, True))


def nearest_alone(n, d, device):
    """Without a gradient, as scipy has it."""

    def by_scipy(x, y):
        from scipy.linalg import orthogonal_procrustes

        return torch.from_numpy(orthogonal_procrustes(x.numpy(), y.numpy(), check_finite=False)[0])

    def one(name, function):
        def build():
            x, y = (t.to(device) for t in turned(n, d))
            return lambda: function(x, y)

        def check():
            return relative(function(*(t.to(device) for t in turned(n, d))).cpu(),
                            polar(*(t.double() for t in turned(n, d))))

        return Contender(name, build, check, missing="has no GPU" if device != "cpu" and function is by_scipy else "")

    return Case(f"procrustes n={n} d={d} float32, forward",
                [one(OURS, procrustes), one(FORMULA, polar), one("scipy orthogonal_procrustes", by_scipy)],
                **work.procrustes(n, d, False))


def adapter(n, d, device):
    """A trained map, some way from where it began, and the gradients of its mean: of a sum so long those that
    torch.linalg.matrix_exp has in float32 are off by some 1e-4."""

    def make():
        return [normal(n, d), 0.5 * normal(d, d, seed=1) / d**0.5]

    def skew(a):
        return a.tril(-1) - a.tril(-1).mT

    def exponential(x, a):
        return x @ torch.linalg.matrix_exp(skew(a)).mT

    def cayley(x, a):
        eye = torch.eye(d, dtype=a.dtype, device=a.device)
        return x @ torch.linalg.solve(eye - skew(a) / 2, eye + skew(a) / 2).mT

    def called(module, name):
        return lambda x, a: functional_call(module, {name: a}, x)

    mapped = nn.Linear(d, d, bias=False)
    nn.init.eye_(mapped.weight)
    mapped = parametrizations.orthogonal(mapped, orthogonal_map="cayley").to(device)
    original = "parametrizations.weight.original"
    ours = called(OrthogonalAdapter(d, device=device), original)
    ways = [("floor: a linear layer", linear, linear), (OURS, ours, exponential), (FORMULA, exponential, exponential),
            ("torch orthogonal(Linear), Cayley", called(mapped, original), cayley)]
    return Case(f"orthogonal adapter n={n} d={d} float32",
                [*(contender(*way, make, device, 1 / (n * d)) for way in ways), oft(make, device)],
                **work.orthogonal_adapter(n, d))


def oft(make, device):
    """peft's, of one block, before a frozen layer: it can't go without."""

    def build():
        import peft

        x = make()[0].to(device).requires_grad_()
        config = peft.OFTConfig(r=1, oft_block_size=0, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(x.shape[1], x.shape[1], bias=False)), config).to(device)
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(model(x).mean(), leaves)

    return Contender("peft OFT, one block", build, peak=True, note="a series for Cayley's inverse: unchecked")


def cases(device):
    """A batch of wide features and one of narrow ones; a batch of pairs; a layer's neurons in groups; trajectories;
    features of two models."""
    return [
        entropy(1024, 512, device),
        entropy(256, 128, device),
        ridge(1024, 512, device),
        ridge(256, 128, device),
        distillation(512, device),
        groups(4096, 512, 8, device),
        proximal(4096, 512, 8, device),
        koopman(8, 64, 32, 3, device),
        nearest(2048, 256, device),
        nearest_alone(2048, 256, device),
        adapter(2048, 256, device),
    ]
