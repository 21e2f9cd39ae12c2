"""Doubly stochastic plans with their gradient, scores |cosines| / eta as MLC makes them: ours against the public form
(five half steps, truncated gradient), twenty unrolled log-domain sweeps, both compiled, an eager implicit gradient, and
POT (forward alone: its plan has a gradient by unrolling only).

Bound by memory: the least is to read the scores and the gradient and to write the plan and its own.
"""

import reference
import torch
import work
from harness import Case, Contender, Target, compiled, relative

from torch_subspace.transport.sinkhorn import sinkhorn

ETA, TOL = 0.1, 1e-6
OURS, PUBLIC, UNROLLED = "ours", "five half steps", "twenty unrolled sweeps"
SAME = "ours, five half steps"  # the public computation


def half_steps(scores, steps=5):
    """The public code's computation: alternate potentials in the log domain, the columns' without gradient, and a wait
    for the device at each step to see whether it may stop."""
    n = scores.shape[-1]
    log_mu = torch.full((n,), 1 / n, device=scores.device).log()
    u = v = torch.zeros(n, device=scores.device)
    for step in range(steps):
        if step % 2:
            v = (ETA * (log_mu - torch.logsumexp((scores + u[:, None] + v).mT / ETA, -1)) + v).detach()
            continue
        before, u = u, ETA * (log_mu - torch.logsumexp((scores + u[:, None] + v) / ETA, -1)) + u
        if not torch.compiler.is_compiling() and (u - before).abs().sum().item() < 1e-12:
            break
    return torch.exp((scores + u[:, None] + v) / ETA) * n


def unrolled(scores, sweeps=20):
    """Sweeps in the log domain, differentiated as they are."""
    s, f = scores / ETA, torch.zeros_like(scores[0])
    for _ in range(sweeps):
        g = -torch.logsumexp(s + f[:, None], 0)
        f = -torch.logsumexp(s + g, 1)
    return torch.exp(s + f[:, None] + g)


class Implicit(torch.autograd.Function):
    """The symmetric iteration and conjugate gradients, in torch operations."""

    @staticmethod
    def forward(ctx, scores):
        k = ((scores - scores.max()) / ETA).exp_()
        f = torch.ones_like(scores[0])
        for _ in range(100):
            y = k @ f
            if ((f * y - 1).abs().max() <= TOL).item():
                break
            f = (f / y).sqrt()
        plan = k.mul_(f[:, None]).mul_(f)
        ctx.save_for_backward(plan)
        return plan

    @staticmethod
    def backward(ctx, dplan):
        (plan,) = ctx.saved_tensors
        weighted = plan * (dplan + dplan.mT) / 2
        r = weighted.sum(1)
        x, p, now = torch.zeros_like(r), r.clone(), r @ r
        enough = 1e-14 * now
        for _ in range(50):
            if (now <= enough).item():
                break
            q = p + plan @ p
            alpha = now / (p @ q)
            x, r, before = x + alpha * p, r - alpha * q, now
            now = r @ r
            p = r + now / before * p
        return (weighted - plan * (x[:, None] + x)) / ETA


def pot(scores):
    """ot.sinkhorn, the plan alone."""
    import ot

    ones = torch.ones_like(scores[0])
    with torch.no_grad():
        return ot.sinkhorn(ones, ones, -scores, ETA, numItermax=1000, stopThr=TOL, warn=False)


def affinity(n, device):
    """|cosines| of 128 features in ten clusters."""
    seed = torch.Generator().manual_seed(0)
    z = torch.randn(10, 128, generator=seed)[torch.randint(10, (n,), generator=seed)]
    z = torch.nn.functional.normalize(z + torch.randn(n, 128, generator=seed), dim=-1).double()
    scores = (z @ z.mT).abs()
    return ((scores + scores.mT) / 2).float().to(device)


def case(n, device, promised):
    """All contenders at one size."""
    scores = affinity(n, device)
    dplan = torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    dplan = ((dplan + dplan.mT) / 2).to(device)

    def step(function):
        leaf = scores.clone().requires_grad_()

        def call():
            leaf.grad = None
            plan = function(leaf)
            plan.backward(dplan)
            return plan.detach(), leaf.grad

        return call

    def exact(function):
        def check():
            small = affinity(200, device)
            leaf, g = small.clone().requires_grad_(), dplan[:200, :200].contiguous()
            plan = function(leaf)
            plan.backward(g)
            truth = reference.sinkhorn_symmetric(small.double().cpu(), eta=ETA)
            expected, *_ = reference.sinkhorn_gradient(truth, g.double().cpu(), eta=ETA)
            return relative((plan.detach().cpu(), leaf.grad.cpu()), (truth, (expected + expected.mT) / 2))

        return check

    def truncated(function):
        def check():
            small = affinity(200, device)
            ours, theirs = small.clone().requires_grad_(), small.double().cpu().requires_grad_()
            g = dplan[:200, :200].contiguous()
            plan, truth = function(ours), reference.sinkhorn_half_steps(theirs, eta=ETA)
            plan.backward(g), truth.backward(g.double().cpu())
            return relative((plan.detach().cpu(), ours.grad.cpu()), (truth.detach(), theirs.grad))

        return check

    def contender(name, function, check=None, note="", **options):
        return Contender(name, lambda: step(function), check, note=note, **options)

    def symmetric(s):
        return sinkhorn(s, eta=ETA, tol=TOL, symmetric=True)

    def found_out(s):
        return sinkhorn(s, eta=ETA, tol=TOL)

    def general(s):
        return sinkhorn(s, eta=ETA, tol=TOL, symmetric=False, max_iter=1000)

    def cpp(s):
        return sinkhorn(s, eta=ETA, mode="cpp")

    known = {"peak": True}  # nothing is taken off: a call begins by freeing the gradient of the one before
    with torch.no_grad():
        columns = [(function(scores).sum(0) - 1).abs().max().item() for function in (half_steps, unrolled)]
    truncation, unconverged = (f"column sums off by {error:.0e}" for error in columns)
    contenders = [
        contender(OURS, symmetric, exact(symmetric), **known),
        contender("ours, symmetry found out", found_out, exact(found_out)),
        contender("ours, general", general, exact(general)),
        contender(SAME, cpp, truncated(cpp)),
        contender(PUBLIC, half_steps, truncated(half_steps), f"truncated gradient, {truncation}", **known),
        contender(f"{PUBLIC}, compiled", compiled(half_steps), None, f"truncated gradient, {truncation}"),
        contender(UNROLLED, unrolled, None, unconverged, **known),
        contender(f"{UNROLLED}, compiled", compiled(unrolled), None, unconverged),
        contender("eager implicit gradient", Implicit.apply, exact(Implicit.apply), **known),
    ]
    if n <= 1024:
        contenders.append(Contender("POT: ot.sinkhorn", lambda: lambda: pot(scores), None, note="the plan alone"))
    targets = []
    if promised:
        targets = [Target(SAME, (PUBLIC,), ">=", 7, 7), Target(OURS, (PUBLIC,), ">=", 7, 7),
                   Target(OURS, (UNROLLED,), ">=", 35, 60)]
    return Case(f"n={n} eta={ETA} float32", contenders, targets, **work.sinkhorn(n), seconds=16)


def cases(device):
    """MLC's batch sizes, and a large one."""
    return [case(1024, device, True), case(256, device, False), case(4096, device, False)]
