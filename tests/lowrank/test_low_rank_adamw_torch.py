"""LowRankAdamW among torch's habits: states, groups, schedulers, closures, scalers, and gradients that are no use."""

import copy
import warnings

import pytest
import torch
from helpers import close, normal, same
from low_rank_cases import FEEDBACKS, PROJECTORS, matrix, net, stepped, train
from torch import nn

from torch_subspace.lowrank import LowRankAdamW, matrices


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_is_gone_on_from_bit_for_bit(projector, feedback, dtype):
    model = net(dtype)
    optimizer = LowRankAdamW(model.parameters(), rank=5, projector=projector, error_feedback=feedback, every=2, seed=3)
    train(model, optimizer, 3)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    expected = train(model, optimizer, 3, first=3)
    other = net(dtype)
    again = LowRankAdamW(other.parameters())
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    loaded = again.state_dict()
    assert loaded["param_groups"] == saved[1]["param_groups"]
    for place, state in saved[1]["state"].items():
        assert state.keys() == loaded["state"][place].keys()
        assert all(torch.equal(t, loaded["state"][place][key]) and t.dtype == loaded["state"][place][key].dtype
                   for key, t in state.items())
    assert same(train(other, again, 3, first=3), expected)
    assert same(train(*copy.deepcopy((model, optimizer)), 1), train(model, optimizer, 1))


def test_a_state_of_adamw_is_projected():
    model, other = net(), net()
    full = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, full, 3)
    optimizer = LowRankAdamW(other.parameters(), rank=4)
    other.load_state_dict(model.state_dict())
    optimizer.load_state_dict(full.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-2 and optimizer.param_groups[0]["rank"] == 4
    train(other, optimizer, 2, first=3)
    state = optimizer.state[other[3].weight]
    assert state["step"] == 5 and state["exp_avg"].shape == (108, 4) and (state["exp_avg_sq"] > 0).all()


def test_groups_and_schedulers():
    model = net()
    optimizer = LowRankAdamW([{"params": model[0].parameters(), "rank": 3, "projector": "cosine"},
                              {"params": model[3].parameters(), "lr": 0.0, "weight_decay": 0.5}], lr=0.01, rank=6)
    optimizer.add_param_group({"params": model[5].parameters(), "every": 2, "error_feedback": "int8"})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.0, 0.1], total_steps=8)
    before = model[3].weight.detach().clone()
    for i in range(3):
        train(model, optimizer, 1, first=i)
        schedule.step()
    assert torch.equal(model[3].weight, before)
    states = [optimizer.state[model[i].weight] for i in (0, 3, 5)]
    assert [s.keys() & {"cosine", "basis", "error"} for s in states] == [{"cosine"}, {"basis"}, {"basis", "error"}]
    assert [s["exp_avg"].shape[1] for s in states] == [3, 6, 6]
    named = LowRankAdamW(model.named_parameters(), rank=3)
    assert named.param_groups[0]["param_names"][0] == "0.weight"
    train(model, named, 1)


def test_an_lr_as_a_tensor_and_maximize():
    results = []
    for lr, sign in ((0.05, 1), (torch.tensor(0.05, dtype=torch.float64), 1), (0.05, -1)):
        p = matrix(20, 12)
        optimizer = LowRankAdamW([p], lr=lr, rank=3, maximize=sign < 0, error_feedback="int8")
        for i in range(4):
            p.grad = sign * normal(20, 12, seed=i, dtype=torch.float32)
            optimizer.step()
        results.append(p.detach())
    assert same(results[:1], results[1:2])
    close(results[2], results[0], 1e-6)


def test_closures_hooks_and_gradients():
    p, calls = matrix(20, 12), []
    optimizer = LowRankAdamW([p, matrix(3, seed=1)], rank=3)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    grad = p.grad.clone()
    assert optimizer.step(closure) < first and calls == ["before"] * 2
    optimizer.step()
    assert not torch.equal(p.grad, grad) and torch.equal(p.grad, 2 * p.grad / 2)
    before, kept = p.grad.clone(), p.detach().clone()
    optimizer.step()
    assert torch.equal(p.grad, before) and not torch.equal(p, kept)  # a gradient is never changed
    p.grad = None
    optimizer.step()


def test_it_draws_from_its_own_seed():
    torch.manual_seed(1)
    state, runs = torch.get_rng_state(), []
    for seed in (0, 0, 5):
        p = matrix(20, 12)
        runs.append(stepped(p, LowRankAdamW([p], rank=3, seed=seed)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_rank_and_projector_may_change():
    p = matrix(40, 24)
    optimizer = LowRankAdamW([p], rank=3, every=100)
    for rank, projector in ((3, "range"), (5, "range"), (5, "cosine"), (2, "hadamard"), (4, "svd")):
        optimizer.param_groups[0].update(rank=rank, projector=projector)
        stepped(p, optimizer, 2)
        state = optimizer.state[p]
        assert state["exp_avg"].shape == (40, rank) and state["exp_avg_sq"].min() >= 0 and p.isfinite().all()
        assert len(state.keys() & {"basis", "cosine", "hadamard"}) == 1
    assert state["step"] == 10
    optimizer.param_groups[0]["rank"] = 24
    with pytest.raises(ValueError, match=r"rank must stay below a side of what has been projected, got 24 .*24\)"):
        optimizer.step()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("projector", [*PROJECTORS, "hadamard, by rows"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_disturbs_nobody(projector, value, every):
    projector, _, by_rows = projector.partition(", ")
    m, n, rank, feedback = (70, 80, 64, None) if by_rows else (20, 12, 3, "int8")
    wrong, fine, alone = matrix(m, n), matrix(m, n), matrix(m, n)
    options = {"rank": rank, "projector": projector, "error_feedback": feedback, "every": every}
    optimizer, other = LowRankAdamW([wrong, fine], **options), LowRankAdamW([alone], **options)
    for i in range(6):
        for p in (wrong, fine, alone):
            p.grad = normal(m, n, seed=i, dtype=torch.float32)
        other.step()
        if i not in (0, 2, 3):
            optimizer.step()
            continue
        wrong.grad[3, 4] = value
        before = wrong.detach().clone(), copy.deepcopy(dict(optimizer.state[wrong]))
        if i:
            optimizer.step()
        else:
            with pytest.warns(RuntimeWarning, match=r"1 matrix\(es\) of parameter group 0 had a non-finite gradient"):
                optimizer.step()
        assert torch.equal(wrong, before[0]) and optimizer.skipped == (1, 0, 2, 3)[i]
        assert same(before[1].values(), optimizer.state[wrong].values())
    assert torch.equal(fine, alone) and wrong.isfinite().all() and not torch.equal(wrong, fine)
    assert optimizer.state[wrong]["step"] == 3


@pytest.mark.parametrize("shape", [(20, 12), (12, 5, 2, 3)])
def test_where_nobody_waits_for_the_device(monkeypatch, shape):
    """As on a GPU: what to do with a gradient is decided there, and comes to the same."""
    results = []
    for on_host in (True, False):
        monkeypatch.setattr(matrices, "on_host", lambda t, here=on_host: here)
        p = nn.Parameter(matrix(*shape).detach().to(memory_format=torch.channels_last if len(shape) == 4 else
                                                    torch.contiguous_format))
        optimizer = LowRankAdamW([p], rank=3, weight_decay=0.1, error_feedback="int8", every=2)
        for i in range(5):
            p.grad = normal(*shape, seed=i, dtype=torch.float32)
            if i == 4:
                p.grad[0, 1] = float("nan")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        results.append([p.detach(), *(optimizer.state[p][key] for key in ("basis", "exp_avg", "exp_avg_sq", "error"))])
        assert int(optimizer.skipped) == 1
    close(*([t.float() for t in found] for found in results), 1e-6)
    first = nn.Parameter(torch.ones(20, 12))
    first.grad = torch.full((20, 12), float("nan"))
    optimizer = LowRankAdamW([first], rank=3)
    for _ in range(2):
        optimizer.step()
        assert torch.equal(first, torch.ones(20, 12))
        first.grad = torch.zeros(20, 12)
        optimizer.param_groups[0]["weight_decay"] = 0.0
    first.grad = torch.ones(20, 12)
    optimizer.step()
    assert first.isfinite().all() and (first < 1).all() and optimizer.skipped == 1


def test_of_experts_the_others_go_on():
    p, alone = matrix(3, 20, 12), matrix(3, 20, 12)
    optimizers = [LowRankAdamW([q], rank=3, weight_decay=0.1, every=2, error_feedback="int8") for q in (p, alone)]
    for i in range(5):
        p.grad = normal(3, 20, 12, seed=i, dtype=torch.float32)
        alone.grad = p.grad.clone()
        before = p.detach().clone()
        if i in (0, 2, 3):
            p.grad[1, 2, 3] = float("nan")
        if i == 0:
            with pytest.warns(RuntimeWarning):
                optimizers[0].step()
        else:
            optimizers[0].step()
        optimizers[1].step()
        assert torch.equal(p[1], before[1]) == (i in (0, 2, 3)) and p.isfinite().all()
    close(p.detach()[::2], alone.detach()[::2], 1e-6)
    assert optimizers[0].skipped == 3


def test_gradscaler_and_detached_matrices():
    p = matrix(20, 12)
    optimizer, scaler = LowRankAdamW([p], rank=3), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state[p]["step"] == 1
    empty = nn.Parameter(torch.zeros(0, 5))
    empty.grad = torch.zeros(0, 5)
    LowRankAdamW([empty], rank=3).step()


def test_sparse_gradients_are_refused():
    words, rest = nn.Embedding(40, 12, sparse=True), matrix(3)
    (words(torch.tensor([1, 2])).sum() + rest.sum()).backward()
    before = rest.detach().clone()
    with pytest.raises(RuntimeError, match=r"LowRankAdamW: gradients must be dense, got one of torch.sparse_coo"):
        LowRankAdamW([rest, words.weight], rank=3).step()
    assert torch.equal(rest, before)


@pytest.mark.parametrize("options, error, words", [
    ({"rank": 0}, ValueError, "LowRankAdamW: rank must be >= 1, got 0"),
    ({"rank": 2.0}, TypeError, "rank must be an int, got float 2.0"),
    ({"projector": "dct"}, ValueError, "projector must be one of range, cosine, hadamard, svd, got 'dct'"),
    ({"every": 0}, ValueError, "every must be >= 1"),
    ({"error_feedback": "int4"}, ValueError, "error_feedback must be one of int8, dense, got 'int4'"),
    ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
    ({"side": "left"}, ValueError, "side must be one of shorter, rows, columns"),
    ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
    ({"lr": -1.0}, ValueError, "LowRankAdamW: lr must be finite and >= 0, got -1.0"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
])
def test_bad_options_are_named(options, error, words):
    p = matrix(4, 4)
    with pytest.raises(error, match=words):
        LowRankAdamW([p], **options)
    optimizer = LowRankAdamW([p])
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": [matrix(4, 4)], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)  # as a scheduler might
    p.grad = torch.ones(4, 4)
    before = p.detach().clone()
    with pytest.raises(error, match=words):
        optimizer.step()
    assert torch.equal(p, before)
