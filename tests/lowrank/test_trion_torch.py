"""Trion as an optimiser of torch: state, groups, schedulers, gradients that are not finite, processes, bad input."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
from helpers import close, in_two_processes, normal, same, threads
from torch import nn
from trion_cases import parameter, steps

from torch_subspace.lowrank import Trion


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
