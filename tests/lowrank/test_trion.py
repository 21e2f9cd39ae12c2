"""Trion: its steps against the formula, Muon at full rank, shapes, state, what torch's optimisers promise, training."""

import copy
import io
import math
import warnings

import pytest
import reference as ref
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import close, in_two_processes, normal, optional, same, threads
from torch import nn

from torch_subspace.lowrank import Trion, newton_schulz, trion_groups
from torch_subspace.lowrank.newton_schulz import COEFFICIENTS

MUON = [COEFFICIENTS["muon"][0]] * 5


def parameter(*shape, seed=0, dtype=torch.float64):
    return nn.Parameter(normal(*shape, seed=seed).to(dtype))


def steps(opt, *params, count=3, start=10):
    """Some steps, of gradients that the number of the step decides."""
    for i in range(count):
        for j, p in enumerate(params):
            p.grad = normal(*p.shape, seed=start + 100 * j + i).to(p.dtype)
        opt.step()


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
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw", "spectral_unclamped"])
def test_full_rank_is_muon(shape, adjust):
    """torch's own, which rounds to bfloat16; of its momentum a multiple, which Newton-Schulz does not see."""
    ours, theirs = (parameter(*shape, dtype=torch.float32) for _ in range(2))
    before = ours.detach().clone()
    steps(Trion([ours], lr=0.01, rank=24, weight_decay=0.1, adjust_lr_fn=adjust), ours)
    steps(torch.optim.Muon([theirs], lr=0.01, momentum=0.95, weight_decay=0.1, nesterov=False, adjust_lr_fn=adjust),
          theirs)
    close([ours - before], [theirs - before], 5e-2)


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


# --------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_state_is_one_buffer_and_goes_around_to_the_bit(dtype):
    params = [parameter(20, 12, dtype=dtype), parameter(3, 14, 9, dtype=dtype), parameter(5, dtype=dtype)]
    opt = Trion(params, rank=4)
    steps(opt, *params)
    size = 8 if dtype == torch.float64 else 4
    of_vector = 2 * 5 * dtype.itemsize + 4  # AdamW's, and its step
    assert opt.state_bytes() == size * (240 + 378) + 2 * 4 + of_vector
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = Trion(twins, lr=9.0, rank=1)
    twin.load_state_dict(torch.load(file))
    assert all(same([opt.state[p][k] for k in opt.state[p]], [twin.state[t][k] for k in opt.state[p]])
               for p, t in zip(params, twins, strict=True))
    assert twin.state[twins[0]]["momentum_buffer"].dtype == (torch.float64 if size == 8 else torch.float32)
    steps(opt, *params, start=50), steps(twin, *twins, start=50)
    assert same(params, twins)


def test_half_types_are_rounded_once_a_step():
    w = parameter(20, 12, dtype=torch.bfloat16)
    wide = nn.Parameter(w.detach().float())
    opt, other = Trion([w], rank=4), Trion([wide], rank=4)
    for i in range(3):
        w.grad = normal(20, 12, seed=i).bfloat16()
        wide.grad = w.grad.float()
        wide.data.copy_(w.detach())
        opt.step(), other.step()
        assert torch.equal(w, wide.bfloat16())


def test_groups_schedulers_closures_and_maximize():
    w, v = parameter(20, 12), parameter(20, 12)
    opt = Trion([{"params": [w], "rank": 2, "momentum": 0.5}], lr=torch.tensor(0.1), rank=7)
    opt.add_param_group({"params": [v], "maximize": True, "rank": 2, "momentum": 0.5})
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
    v.data.neg_()
    for i in range(3):
        w.grad = v.grad = normal(20, 12, seed=i)
        assert opt.step(lambda i=i: 3.0 + i) == 3.0 + i
        scheduler.step()
    close([v], [-w], 1e-12)
    alone = parameter(20, 12)
    other = Trion([alone], rank=2, momentum=0.5)
    for i in range(3):
        other.param_groups[0]["lr"] = 0.1**(i + 1)
        alone.grad = normal(20, 12, seed=i)
        other.step()
    close([w], [alone], 1e-6)
    assert copy.deepcopy(opt).param_groups[1]["rank"] == 2
    state = torch.get_rng_state()
    opt.step()
    assert torch.equal(state, torch.get_rng_state())


def test_no_gradient_and_a_gradient_of_zero():
    w, v = parameter(20, 12), parameter(20, 12)
    opt = Trion([w, v], rank=2, weight_decay=0.0)
    w.grad = torch.zeros_like(w)
    opt.step()
    assert torch.equal(w, v) and w.isfinite().all() and v not in opt.state


def test_a_gradient_that_is_not_finite_disturbs_no_other():
    shapes = [(20, 12), (20, 12), (3, 14, 9)]
    params = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    twins = copy.deepcopy(params)
    opt, other = Trion(params, rank=4), Trion(twins, rank=4)
    steps(opt, *params, count=1), steps(other, *twins, count=1)
    before = [p.detach().clone() for p in params], [opt.state[p]["momentum_buffer"].clone() for p in params]
    for p, t in zip(params, twins, strict=True):
        p.grad = normal(*p.shape, seed=3)
        t.grad = p.grad.clone()
    params[0].grad[3, 4], params[2].grad[1, 2, 3] = math.nan, math.inf
    with pytest.warns(RuntimeWarning, match=r"Trion: 1 matrix\(es\) of parameter group 0 had a non-finite gradient"):
        opt.step()
    other.step()
    assert opt.skipped == 2
    for now, was, twin in zip((params, [opt.state[p]["momentum_buffer"] for p in params]), before,
                              (twins, [other.state[t]["momentum_buffer"] for t in twins]), strict=True):
        assert torch.equal(now[0], was[0]) and torch.equal(now[1], twin[1]) and torch.equal(now[2][1], was[2][1])
        close([now[2][::2]], [twin[2][::2]], 1e-13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert opt.skipped == 4


def test_same_bits_for_any_number_of_threads():
    def run():
        params = [parameter(300, 260, dtype=torch.float32), parameter(5, 40, 30, dtype=torch.float32)]
        steps(Trion(params, rank=16), *params, count=2)
        return params

    results = [run() for _ in threads(1, 2, 3)]
    assert all(same(results[0], r) for r in results[1:])


def _ddp(rank, init, results):
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    opt = Trion(model.parameters(), lr=0.1, rank=2)
    for i in range(3):
        opt.zero_grad()
        model(normal(5, 6, seed=10 * i + rank).float()).square().mean().backward()
        opt.step()
    torch.save([p.detach() for p in model.parameters()], f"{results}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_with_equal_gradients_stay_equal(tmp_path):
    in_two_processes(_ddp, f"file://{tmp_path}/init", str(tmp_path))
    assert same(torch.load(tmp_path / "0"), torch.load(tmp_path / "1"))


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


# ----------------------------------------------------------------------------------------------------------- bad input

W = parameter(4, 6)


@pytest.mark.parametrize("options, error, words", [
    ({"lr": -1}, ValueError, "lr must be finite and >= 0, got -1"),
    ({"rank": 0}, ValueError, "rank must be >= 1, got 0"),
    ({"rank": 2.0}, TypeError, "rank must be an int, got float 2.0"),
    ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
    ({"weight_decay": math.nan}, ValueError, "weight_decay must be finite and >= 0, got nan"),
    ({"ns_steps": 101}, ValueError, "ns_steps must be <= 100, got 101"),
    ({"ns_coefficients": "newton"}, ValueError, "ns_coefficients must be one of muon, .* got 'newton'"),
    ({"adjust_lr_fn": "rms"}, ValueError, "adjust_lr_fn must be one of original, .* got 'rms'"),
    ({"algorithm": "muon"}, ValueError, "algorithm must be one of trion, adamw, got 'muon'"),
    ({"stacked": "yes"}, TypeError, "stacked must be a bool, got str 'yes'"),
    ({"adamw_factor": 0}, ValueError, "adamw_factor must be positive and finite, got 0"),
    ({"betas": (0.9,)}, TypeError, "betas must be two numbers"),
])
def test_bad_options_are_named(options, error, words):
    for make in (lambda: Trion([W], **options), lambda: Trion([{"params": [W], **options}])):
        with pytest.raises(error, match=words) as caught:
            make()
        assert str(caught.value).startswith("Trion: ")
    opt = Trion([W])
    opt.param_groups[0].update(options)
    W.grad = torch.ones_like(W)
    with pytest.raises(error, match=words):
        opt.step()
    W.grad = None


def test_gradients_that_it_cannot_take_are_refused_before_anything_moves():
    table, w = nn.Embedding(9, 4, sparse=True), parameter(20, 12)
    before = w.detach().clone()
    opt = Trion([w, *table.parameters()], rank=2)
    table(torch.tensor([1, 2])).sum().backward()
    w.grad = torch.ones_like(w)
    with pytest.raises(RuntimeError, match=r"Trion: gradients must be dense, .* shape \(9, 4\): a group with"):
        opt.step()
    assert torch.equal(w, before) and not opt.state
    with pytest.raises(TypeError, match="Trion: closure must be a function or None, got float"):
        opt.step(3.0)
    with pytest.raises(TypeError, match="Trion: param_group must be a dict, got list"):
        opt.add_param_group([w])


def test_it_is_newton_schulz_of_the_momentum_at_full_rank():
    w = parameter(20, 12)
    w.grad = normal(20, 12, seed=5)
    Trion([w], lr=1.0, rank=12, weight_decay=0.0, adjust_lr_fn="spectral_unclamped").step()
    close([normal(20, 12) - w.detach()], [newton_schulz(w.grad) * math.sqrt(20 / 12)], 1e-12)
