"""Losses of the family that are torch's products and eigenproblems: ours, the formula as one would write it, eager and
compiled, and what none does without.

No package that could be installed has them: the public codes are single files of the papers, which the formulas are.
"""

import reference
import torch
from harness import Case, Contender, Target, compiled, relative
from torch.nn.functional import cross_entropy, kl_div

from torch_subspace.isotropy import (
    group_lasso,
    prox_group_lasso_,
    ridge_transition,
    similarity_distillation,
    von_neumann_entropy,
)

OURS, FORMULA, FLOOR = "ours", "formula", "floor: products and factorisations alone"
ETA, TAU, ALPHA, LR = 0.1, 0.1, 20.0, 0.01


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def contender(name, function, truth, make, device):
    """A function of some tensors, and its gradient in all of them along ones."""

    def step(function, given):
        leaves = [t.detach().requires_grad_() for t in given]
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value.sum(), leaves)

    def build():
        given = [t.to(device) for t in make()]
        return lambda: step(function, given)

    def check():
        found = step(function, [t.to(device) for t in make()])
        return relative([t.cpu() for t in found], step(truth, [t.double() for t in make()]))

    return Contender(name, build, check, peak=True, kept=4 * sum(t.numel() for t in make()))


def case(name, make, device, ours, formula, truth, floor=None, must=None):
    """Ours, the formula eager and compiled, and a floor: a function of the tensors, without a gradient."""
    contenders = [contender(OURS, ours, truth, make, device), contender(FORMULA, formula, truth, make, device),
                  contender("torch.compile of it", compiled(formula), truth, make, device)]
    if floor is not None:

        def build():
            given = [t.to(device) for t in make()]
            return lambda: floor(*given)

        contenders.insert(0, Contender(FLOOR, build))
    return Case(name, contenders, [Target(OURS, (FORMULA,), ">=", *must)] if must else [])


def entropy(n, d, device):
    def formula(z):
        p = torch.linalg.eigvalsh(z.mT @ z / z.square().sum())
        return -(p * p.log()).sum()

    def floor(z):
        gram = z.mT @ z
        return torch.linalg.eigh(gram), gram @ gram, z @ gram

    return case(f"entropy n={n} d={d} float32", lambda: [normal(n, d)], device, von_neumann_entropy, formula,
                reference.von_neumann_entropy, floor)


def ridge(n, d, device):
    def formula(z, after):
        return torch.linalg.solve(z.mT @ z + ETA * torch.eye(d, device=z.device), z.mT @ after)

    def floor(z, after):
        gram, cross = z.mT @ z, z.mT @ after
        factor = torch.linalg.cholesky_ex(gram + ETA * torch.eye(d, device=z.device))[0]
        solved = torch.cholesky_solve(cross, factor)
        return torch.cholesky_solve(solved, factor), solved @ cross, z @ gram, after @ gram, z @ cross

    return case(f"ridge transition n={n} d={d} float32", lambda: [normal(n, d), normal(n, d, seed=1)], device,
                lambda z, after: ridge_transition(z, after, eta=ETA), formula,
                lambda z, after: reference.ridge_transition(z, after, eta=ETA), floor)


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

    return case(f"distillation n={n} float32", lambda: [similarities(0)], device,
                lambda new: similarity_distillation(old.to(new), new, tau=TAU, alpha=ALPHA), formula,
                lambda new: reference.similarity_distillation(old.double(), new, tau=TAU, alpha=ALPHA))


def groups(rows, columns, size, device):
    """Penalty and gradient; then the proximal step, group by group where it is the formula."""
    sizes = [size] * (rows // size)

    def formula(weight):
        return torch.stack([torch.linalg.matrix_norm(part) for part in weight.split(sizes)]).sum()

    return case(f"group lasso {rows}x{columns} groups of {size} float32", lambda: [normal(rows, columns)], device,
                lambda weight: group_lasso(weight, sizes), formula, formula)


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
                [one(OURS, ours), one(FORMULA, by_parts)], [])


def cases(device):
    """A batch of wide features and one of narrow ones; a batch of pairs; a layer's neurons in groups."""
    return [
        entropy(1024, 512, device),
        entropy(256, 128, device),
        ridge(1024, 512, device),
        ridge(256, 128, device),
        distillation(512, device),
        groups(4096, 512, 8, device),
        proximal(4096, 512, 8, device),
    ]
