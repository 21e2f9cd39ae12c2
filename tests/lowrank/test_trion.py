"""Trion: its steps against the formula, Muon at full rank, shapes, groups, training."""

import copy
import math

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from helpers import close, normal, optional, same
from torch import nn
from trion_cases import parameter, steps

from torch_subspace.lowrank import Trion, newton_schulz, trion_groups
from torch_subspace.lowrank.newton_schulz import COEFFICIENTS

MUON = [COEFFICIENTS["muon"][0]] * 5


def cosines(n):
    """The DCT-II's rows, one at a time."""
    j = torch.arange(n, dtype=torch.float64)
    rows = [torch.cos(math.pi * k * (2 * j + 1) / (2 * n)) * math.sqrt((1 if k == 0 else 2) / n) for k in range(n)]
    return torch.stack(rows)


def expected(w, rank, mu=0.95, lr=0.02, wd=0.01, scale=1.0, count=3):
    """The formula, of one matrix."""
    turned = w.shape[0] < w.shape[1]
    w, m = w.detach().clone(), torch.zeros_like(w)
    for i in range(count):
        m = m + normal(*w.shape, seed=10 + i)
        pair = (w.mT, m.mT) if turned else (w, m)
        pair = one_step(*pair, rank, mu, lr, wd, scale)
        w, m = (t.mT for t in pair) if turned else pair
    return w


def one_step(w, m, rank, mu, lr, wd, scale):
    s = m @ cosines(m.shape[1]).mT
    index = s.abs().sum(0).topk(min(rank, s.shape[1])).indices
    q = cosines(m.shape[1])[index]
    out = ref.newton_schulz(s[:, index], MUON) @ q
    return w * (1 - lr * wd) - lr * scale * out, m - (1 - mu) * s[:, index] @ q


# --------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (150, 140), (9, 200), (16, 16)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 200])
def test_steps_are_the_formulas(shape, rank):
    """Wide and tall, short sides and those that are transformed by Fourier's; both of one rule."""
    w = parameter(*shape)
    scale = math.sqrt(max(1, shape[0] / shape[1]))
    truth = expected(w, rank, scale=scale)
    steps(Trion([w], rank=rank), w)
    close([w], [truth], 1e-9)


def test_every_size_has_a_basis_of_its_own():
    """One optimiser, many shapes: each is stepped as if alone."""
    shapes = [(20, 12), (12, 20), (30, 30), (40, 7)]
    together = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    alone = copy.deepcopy(together)
    steps(Trion(together, rank=3), *together)
    for j, p in enumerate(alone):
        steps(Trion([p], rank=3), p, start=10 + 100 * j)
    assert same(together, alone)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])  # torch 2.11 has no others
def test_full_rank_is_muon(shape, adjust):
    """torch's own, which rounds to bfloat16; of its momentum a multiple, which Newton-Schulz does not see."""
    ours, theirs = (parameter(*shape, dtype=torch.float32) for _ in range(2))
    before = ours.detach().clone()
    steps(Trion([ours], lr=0.01, rank=24, weight_decay=0.1, adjust_lr_fn=adjust), ours)
    steps(torch.optim.Muon([theirs], lr=0.01, momentum=0.95, weight_decay=0.1, nesterov=False, adjust_lr_fn=adjust),
          theirs)
    close([ours - before], [theirs - before], 5e-2)


def test_it_is_newton_schulz_of_the_momentum_at_full_rank():
    w = parameter(20, 12)
    w.grad = normal(20, 12, seed=5)
    Trion([w], lr=1.0, rank=12, weight_decay=0.0, adjust_lr_fn="spectral_unclamped").step()
    close([normal(20, 12) - w.detach()], [newton_schulz(w.grad) * math.sqrt(20 / 12)], 1e-12)


def test_match_rms_is_that_of_adamw_at_any_rank():
    for rank in (4, 16, 64):
        w = parameter(64, 96, dtype=torch.float32)
        before = w.detach().clone()
        steps(Trion([w], lr=0.1, rank=rank, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), w, count=1)
        assert (w.detach() - before).square().mean().sqrt() / 0.1 == pytest.approx(0.2, rel=0.25)


def test_what_was_not_stepped_along_waits():
    """Momentum outside the cosines that were chosen keeps all of its size, and gets its turn."""
    w, rows = parameter(20, 12), cosines(12)
    w.grad = 3 * normal(20, 1) @ rows[2:3] + normal(20, 1, seed=1) @ rows[7:8]
    opt = Trion([w], rank=1, momentum=0.5)
    opt.step()
    held = opt.state[w]["momentum_buffer"] @ rows.mT
    close([held[:, [2, 7]]], [torch.cat([1.5 * normal(20, 1), normal(20, 1, seed=1)], 1)], 1e-12)
    w.grad = torch.zeros_like(w)
    opt.step(), opt.step()
    held = opt.state[w]["momentum_buffer"] @ rows.mT
    assert held[:, 2].norm() < 0.8 * normal(20, 1).norm() and held[:, 7].norm() <= normal(20, 1, seed=1).norm()


def test_newton_schulz_options_reach_it():
    a, b = parameter(20, 12), parameter(20, 12)
    steps(Trion([a], rank=4, ns_steps=12, ns_coefficients="quintic", weight_decay=0.0), a, count=1)
    steps(Trion([b], rank=4, ns_steps=12, ns_coefficients=(1.875, -1.25, 0.375), weight_decay=0.0), b, count=1)
    assert torch.equal(a, b)
    change = torch.linalg.svdvals(a.detach() - normal(20, 12)) / (0.02 * math.sqrt(20 / 12))
    close([change], [torch.tensor([1.0] * 4 + [0.0] * 8)], 1e-9)


# -------------------------------------------------------------------------------------------------------------- shapes


def test_convolutions_are_unfolded():
    conv, flat = parameter(10, 4, 3, 3), parameter(10, 4, 3, 3)
    flat = nn.Parameter(flat.detach().reshape(10, 36))
    last = nn.Parameter(conv.detach().clone(memory_format=torch.channels_last))
    for p in (conv, last):
        opt = Trion([p], rank=3)
        for i in range(3):
            p.grad = normal(10, 36, seed=10 + i).reshape(10, 4, 3, 3)
            opt.step()
    steps(Trion([flat], rank=3), flat)
    assert torch.equal(conv.reshape(10, 36), flat) and last.is_contiguous(memory_format=torch.channels_last)
    close([last], [conv], 1e-12)


def test_stacks_are_matrices_each_by_itself():
    stack = parameter(3, 14, 9)
    experts = [nn.Parameter(t.clone()) for t in stack.detach()]
    a, b = Trion([stack], rank=4), Trion(experts, rank=4)
    for i in range(3):
        stack.grad = normal(3, 14, 9, seed=10 + i)
        for p, g in zip(experts, stack.grad, strict=True):
            p.grad = g.clone()
        a.step(), b.step()
    close(list(stack), experts, 1e-12)
    # a kernel of three: no side above rank; and said outright
    for shape, stacked, expect in (((8, 5, 3), None, (8, 15)), ((8, 5, 3), True, (8, 5, 3)),
                                   ((8, 9, 9), False, (8, 81))):
        p, flat = parameter(*shape), parameter(*shape)
        flat = nn.Parameter(flat.detach().reshape(expect))
        steps(Trion([p], rank=4, stacked=stacked), p, count=1)
        opt = Trion([flat], rank=4, stacked=stacked)
        flat.grad = normal(*shape, seed=10).reshape(expect)
        opt.step()
        close([p.reshape(expect)], [flat], 1e-12)


def test_all_other_parameters_take_adamws_step_to_the_bit():
    shapes = [(7,), (1,), (1, 9), (9, 1), (0, 3)]
    ours, theirs = ([parameter(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)] for _ in "ab")
    table = [parameter(30, 8, dtype=torch.float32) for _ in "ab"]
    options = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    opt = Trion([{"params": ours}, {"params": [table[0]], "algorithm": "adamw", "lr": 0.2}], lr=0.1, adamw_factor=0.5,
                rank=2, **options)
    other = torch.optim.AdamW([{"params": theirs}, {"params": [table[1]], "lr": 0.1}], lr=0.05, **options)
    steps(opt, *ours, table[0]), steps(other, *theirs, table[1])
    assert same([*ours, table[0]], [*theirs, table[1]])
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.2]
    assert all("exp_avg" in opt.state[p] for p in (*ours, table[0]))


def test_groups_of_a_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Embedding(50, 16), nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
            self.conv, self.frozen, self.head = nn.Conv1d(4, 8, 3), nn.Linear(3, 3), nn.Linear(16, 50)
            self.head.weight = self.embed.weight
            self.frozen.requires_grad_(False)

    model = Model()
    hidden, rest = trion_groups(model)
    assert [id(p) for p in hidden["params"]] == [id(model.body[0].weight), id(model.conv.weight)]
    assert len(rest["params"]) == 6 and rest["algorithm"] == "adamw"
    hidden, rest = trion_groups(model, adamw=["conv*", "body.0.weight"], lr=0.3)[:1] + [None]
    assert hidden["algorithm"] == "adamw" and hidden["lr"] == 0.3 and len(hidden["params"]) == 8
    opt = Trion(trion_groups(model, adamw="conv"), rank=4)
    assert sum(len(g["params"]) for g in opt.param_groups) == 8
    with pytest.raises(ValueError, match="trion_groups: adamw must be names of the model's .* got 'fc'"):
        trion_groups(model, adamw="fc")
    with pytest.raises(TypeError, match="trion_groups: adamw must be names, got int 3"):
        trion_groups(model, adamw=3)


# ------------------------------------------------------------------------------------------------------------ training


def test_it_trains_the_digits():
    """Three seeds, held-out digits."""
    datasets = optional("sklearn.datasets")
    x, y = (torch.from_numpy(t) for t in datasets.load_digits(return_X_y=True))
    x = (x / 16).float()
    right = []
    for seed in range(3):
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        train, held = order[:1437], order[1437:]
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256),
                              nn.ReLU(), nn.Linear(256, 10))
        opt = Trion(trion_groups(model, adamw="6"), lr=0.02, rank=16)
        for _ in range(100):
            some = train[torch.randint(len(train), (128,))]
            opt.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            opt.step()
        right.append((model(x[held]).argmax(1) == y[held]).float().mean().item())
    assert min(right) > 0.92, right
