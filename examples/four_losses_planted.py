"""Two of the comparisons of four_losses.py, whose truth is made: trajectories, and planted groups."""

import numpy as np
import torch
from scipy.integrate import odeint
from sklearn.linear_model import lasso_path
from sklearn.preprocessing import PolynomialFeatures
from torch import nn

from torch_subspace import isotropy, metrics

TIMES, AHEAD, ETA = 33, (1, 4, 16), 1e-3
SETTINGS = ("decoder", True, 1e-3), ("no decoder", False, 1e-3), ("no decoder, InfoNCE × 100", False, 0.1)
ENTROPY = ("maximised", 0.1, "maximise"), ("left out", 0.0, "maximise"), ("minimised", 0.1, "minimise")
GROUPS, SIZE, ALIVE, POINTS, PENALTIES = 20, 4, 4, (40, 60, 90), np.logspace(0, -1.5, 12)


def network(*widths, between=nn.ReLU):
    first, hidden, last = widths
    return nn.Sequential(nn.Linear(first, hidden), between(), nn.Linear(hidden, last))


def descend(modules, loss, steps, lr):
    optimizer = torch.optim.Adam([p for module in modules for p in module.parameters()], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


# --------------------------------------------------------------------------------------------------------- Koopman


def pendulum(state, _):
    angle, speed = state.reshape(2, -1)
    return np.concatenate([speed, -np.sin(angle) - 0.1 * speed])


def lorenz(state, _):
    x, y, z = state.reshape(3, -1)
    return np.concatenate([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def trajectories(system, count, draw):
    """(count, TIMES, d): pendulums released between 0.3 and 3 rad; Lorenz's attractor, a tenth of its size."""
    if system is pendulum:
        start, times, size = [draw.uniform(0.3, 3, count), np.zeros(count)], 0.2 * np.arange(TIMES), 1
    else:
        start, times, size = draw.normal([[1], [1], [25]], 1, (3, count)), 0.02 * np.arange(100 + TIMES), 10
    path = odeint(system, np.concatenate(start), times)[-TIMES:].reshape(TIMES, -1, count) / size
    return torch.tensor(path, dtype=torch.float32).permute(2, 0, 1)


def monomials(degree):
    return lambda x: torch.tensor(PolynomialFeatures(degree, include_bias=False).fit_transform(
        x.flatten(0, 1))).view(*x.shape[:2], -1)


@torch.no_grad()
def foretold(features, known, others):
    """Errors so many steps ahead, as parts of the states' variance, by one transition and one linear way back."""
    z, z_other = features(known), features(others)
    flat = z_other.flatten(0, 1)
    size, found = (z - z.mean((0, 1))).square().mean().sqrt(), {"rank": metrics.effective_rank(flat - flat.mean(0))}
    z, z_other = (torch.cat([t / size, torch.ones(*t.shape[:2], 1)], -1) for t in (z, z_other))
    transition = isotropy.ridge_transition(z[:, :-1].flatten(0, 1), z[:, 1:].flatten(0, 1), eta=ETA)
    back = isotropy.ridge_transition(z.flatten(0, 1), known.flatten(0, 1), eta=ETA)
    for step in range(1, max(AHEAD) + 1):
        z_other, true = z_other[:, :-1] @ transition, others[:, step:]
        if step in AHEAD:
            found[f"{step}"] = ((z_other @ back - true).square().mean() / true.var((0, 1)).mean()).item()
    return found


def koopman(seed, steps, _):
    def trained(x, width, decoder, alpha, beta, entropy):
        torch.manual_seed(seed)
        size = x.shape[-1]
        encode, decode = (network(a, 32, b, between=nn.Tanh) for a, b in ((size, width), (width, size)))
        options = {"decode": decode, "states": x[:, :-1], "next_states": x[:, 1:]} if decoder else {}
        loss = isotropy.KoopmanInformationLoss(alpha, beta, 1.0, eta=ETA, entropy=entropy)

        def of_all():
            z = encode(x)
            return loss(z[:, :-1], z[:, 1:], **options)

        descend((encode, decode) if decoder else [encode], of_all, steps, 1e-2)
        return encode

    rows = {}
    for system, width in ((pendulum, 8), (lorenz, 10)):
        random = np.random.RandomState(seed)
        x, others = trajectories(system, 12, random), trajectories(system, 48, random)
        ways = {"states": monomials(1), "monomials up to degree 3": monomials(3)}
        for where, *setting in SETTINGS:
            for what, *signed in ENTROPY:
                ways[f"{where}, entropy {what}"] = trained(x, width, *setting, *signed)
        for name, features in ways.items():
            found = foretold(features, x, others)
            rows.setdefault(name, {}).update({f"{system.__name__} {kind}": value for kind, value in found.items()})
    return rows


# ---------------------------------------------------------------------------------------------------------- groups


def planted(count, n, alive, draw):
    """x (count, 2 n, rows), y and weights, four groups of which have so many rows that are not 0."""
    weight = np.zeros((count, GROUPS, SIZE))
    for problem in weight:
        for group in draw.permutation(GROUPS)[:ALIVE]:
            problem[group, draw.permutation(SIZE)[:alive]] = draw.choice([-1, 1], alive) / alive**0.5
    x = draw.normal(size=(count, 2 * n, GROUPS * SIZE))
    y = np.einsum("cnr,cr->cn", x, weight.reshape(count, -1)) + draw.normal(size=(count, 2 * n))
    return map(torch.tensor, (x, y, weight))


def by_groups(x, y, order):
    """(penalties, count, rows): accelerated proximal steps, from penalty to penalty; all problems in one call."""
    (count, n, _), x = x.shape, x[..., order]
    gram, moment = x.mT @ x / n, x.mT @ y[..., None] / n
    step, weight, path = 1 / torch.linalg.matrix_norm(gram, 2).max().item(), torch.zeros_like(moment), []
    for penalty in PENALTIES:
        ahead = weight
        for i in range(50):
            before, weight = weight, ahead - step * (gram @ ahead - moment)
            isotropy.prox_group_lasso_(weight.view(-1, 1), [SIZE] * GROUPS * count, step * penalty.item())
            ahead = weight + i / (i + 3) * (weight - before)
        path.append(weight[:, order.argsort(), 0])
    return torch.stack(path)


def by_entries(x, y):
    """(penalties, count, rows): the same objective with groups of one."""
    paths = [lasso_path(*problem, alphas=PENALTIES, max_iter=100_000)[1].T for problem in zip(x.numpy(), y.numpy())]
    return torch.tensor(np.stack(paths, 1))


def judged(path, fit, valid, weight):
    """Shares of problems; a penalty is chosen by the validation points' error, as it is or after least squares."""
    def chosen(path):
        return (torch.einsum("cnr,pcr->pcn", valid[0], path) - valid[1]).square().mean(-1).argmin(0)

    entries = (path != 0).double()
    gram = entries[..., None] * (fit[0].mT @ fit[0]) * entries[..., None, :] + torch.diag_embed(1 - entries + 1e-6)
    again = torch.linalg.solve(gram, entries * torch.einsum("cnr,cn->cr", *fit))
    alive, each, plain = (path.view(-1, *weight.shape) != 0).any(-1), torch.arange(len(weight)), chosen(path)
    exact = (alive == (weight != 0).any(-1)).all(-1).double()
    off = (path[plain, each].view_as(weight) - weight).square().sum((1, 2)) / weight.square().sum((1, 2))
    return {name: value.mean().item() for name, value in (
        ("plain", exact[plain, each]), ("refitted", exact[chosen(again), each]), ("any", exact.amax(0)),
        ("kept", alive[plain, each].sum(1).double()), ("error", off))}


def groups(seed, _, draws):
    rows = {}
    for alive, n in [*((SIZE, n) for n in POINTS), (1, 60)]:
        random = np.random.RandomState(seed)
        x, y, weight = planted(draws, n, alive, random)
        fit, valid = (x[:, :n], y[:, :n]), (x[:, n:], y[:, n:])
        ways = {"group lasso": by_groups(*fit, torch.arange(GROUPS * SIZE)), "l1": by_entries(*fit)}
        if n == 60:
            ways["groups at random"] = by_groups(*fit, torch.tensor(random.permutation(GROUPS * SIZE)))
        for name, path in ways.items():
            rows[f"{alive} of {SIZE} rows, {n} points, {name}"] = judged(path, fit, valid, weight)
    return rows
