"""CoSO: later tasks leave alone what earlier ones used, and everything else of an optimiser in torch's manner."""

import copy
import functools
import pickle

import pytest
import torch
from helpers import close, normal
from torch import nn

from torch_subspace.lowrank import CoSO
from torch_subspace.lowrank.tasks import directions, remembered


def task(seed, n=24, rank=5, rows=60, dtype=torch.float64):
    """Inputs that span a few directions, and targets."""
    return (normal(rows, rank, seed=seed) @ normal(rank, n, seed=seed + 100)).to(dtype), normal(
        rows, 8, seed=seed + 200).to(dtype)


def net(dtype=torch.float64, n=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)


def learn(model, opt, data, steps=20):
    x, y = data
    for _ in range(steps):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
    return (model(x) - y).square().mean().item()


def made(params, **options):
    return CoSO(params, **{"lr": 1e-2, "rank": 4, "sketch_rank": 6} | options)


class TestFacts:
    @pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
    @pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"every": 3}, {"rank": 30}, {"maximize": True},
                                         {"sketch_rank": 40}, {"rank": 9, "sketch_rank": 2}])
    def test_no_step_moves_along_the_memory(self, dtype, most, options):
        model = net(dtype)
        opt = made(model.parameters(), **options)
        for t in range(3):
            weights = [m.weight.detach().clone() for m in model[::2]]
            memories = [opt.memory(m.weight) for m in model[::2]]
            biases = [m.bias.detach().clone() for m in model[::2]]
            learn(model, opt, task(t, dtype=dtype))
            for m, before, memory, bias in zip(model[::2], weights, memories, biases, strict=True):
                moved = m.weight.detach() - before
                assert moved.norm() > 1e-3
                assert (moved @ memory).norm() <= most * before.norm()
                assert torch.equal(m.bias, bias) == (t > 0)
            opt.consolidate()
            for m, before in zip(model[::2], memories, strict=True):
                memory = opt.memory(m.weight)
                assert before.shape[1] < memory.shape[1] <= before.shape[1] + options.get("sketch_rank", 6)
                close(memory.mT @ memory, torch.eye(memory.shape[1]), 1e-5 if dtype == torch.float32 else 1e-12)
                close(memory[:, : before.shape[1]], before, 1e-12)

    def test_what_was_learned_stays_and_the_next_task_is_learned(self):
        torch.manual_seed(0)
        layer = nn.Linear(40, 8).double()
        tasks = [task(t, n=40) for t in range(4)]
        opt = made(layer.parameters(), lr=3e-2, threshold=1.0, sketch_rank=12)
        answers = []
        for t, (x, y) in enumerate(tasks):
            best = torch.linalg.lstsq(x, y).solution
            error = learn(layer, opt, (x, y), 300)
            assert error < 1.3 * (x @ best - y).square().mean() + 0.02 or t == 0
            opt.consolidate()
            answers.append(layer(x).detach())
            for (old, _), answer in zip(tasks, answers):
                close(layer(old), answer, 1e-9)

    def test_the_sketch_is_of_the_gradients(self):
        w = nn.Parameter(torch.zeros(7, 12, dtype=torch.float64))
        opt = made([w], rank=2, sketch_rank=12)
        total = 0
        for i in range(4):
            w.grad = normal(7, 12, seed=i)
            total = total + w.grad.mT @ w.grad
            opt.step()
        sketch = opt.state[w]["sketch"]
        close(sketch.mT @ sketch, total, 1e-10)
        w.grad = torch.zeros_like(w)
        for group in opt.param_groups:
            group["decay"] = 0.5
        opt.step()
        close(opt.state[w]["sketch"].mT @ opt.state[w]["sketch"], total / 4, 1e-10)

    def test_the_fewest_directions_that_hold_the_threshold(self):
        sketch = torch.diag(torch.tensor([3.0, 2, 1, 0])) @ torch.linalg.qr(normal(4, 9, dtype=torch.float32).mT).Q.mT
        energy = torch.tensor([9.0, 4, 1]).cumsum(0) / 14
        for threshold, count in ((0.0, 1), (0.6, 1), (float(energy[0]) + 1e-4, 2), (0.95, 3), (1.0, 3)):
            found = remembered(sketch, None, threshold)
            found = found[:, found.any(0)]
            assert found.shape == (9, count)
            close(found.mT @ found, torch.eye(count), 1e-6)
        memory = torch.linalg.qr(sketch[:1].mT).Q
        assert remembered(sketch, memory, 1.0).shape == (9, 3)  # what is there is not there twice
        assert remembered(torch.zeros(3, 9), None, 0.9).shape == (9, 0)

    @pytest.mark.parametrize("m, n", [(30, 50), (50, 30), (6, 50), (50, 6)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_directions_are_those_of_the_svd(self, m, n, dtype):
        u, v = torch.linalg.qr(normal(m, m)).Q, torch.linalg.qr(normal(n, n, seed=1)).Q
        k = min(m, n)
        sigma = 0.5 ** torch.arange(k).double()
        g = (u[:, :k] * sigma @ v[:, :k].mT).to(dtype)
        group = {"rank": 4, "sketch_rank": 12, "seed": 0}
        p, low, block = directions(g, None, group, 0)
        close(low, (g.double() @ p.double()), 1e-5)
        close(p @ p.mT, v[:, :4] @ v[:, :4].mT, 1e-4)
        close(block.mT @ block, g.mT @ g, 1e-5)
        memory = v[:, 1:3].to(dtype)
        p, low, block = directions(g, memory, group, 0)
        close(low, (g.double() @ p.double()), 1e-5)
        close(block @ memory, torch.zeros(len(block), 2), 1e-5, floor=1.0)
        want = v[:, [0, 3, 4, 5][: min(4, n - 2)]]
        close(p @ p.mT, want @ want.mT, 1e-4)
        assert (memory.mT @ p).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)

    def test_directions_that_the_gradient_lacks_are_not_stepped(self):
        w = nn.Parameter(torch.zeros(20, 30))
        opt = made([w], rank=8, sketch_rank=10, lr=1.0)
        for i in range(5):
            w.grad = normal(20, 2, seed=i, dtype=torch.float32) @ normal(2, 30, seed=9, dtype=torch.float32)
            opt.step()
        assert torch.linalg.matrix_rank(w.detach(), rtol=1e-5) == 2 and w.isfinite().all()

    def test_is_adamw_where_the_rank_is_the_size(self):
        models = [net(), net()]
        ours, theirs = CoSO(models[0].parameters(), lr=1e-2, rank=24), torch.optim.AdamW(
            models[1].parameters(), lr=1e-2, weight_decay=0.0)
        learn(models[0], ours, task(0)), learn(models[1], theirs, task(0))
        assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
        ours.consolidate()
        assert ours.memory(models[0][0].weight).shape[1] == 5

    def test_convolutions_and_experts(self):
        torch.manual_seed(0)
        conv, experts = nn.Conv2d(3, 6, 3).double(), nn.Parameter(normal(3, 9, 12))
        opt = made([*conv.parameters(), experts])
        x = [normal(4, 3, 6, 6, seed=i) for i in range(2)]
        z = [normal(3, 20, 3, seed=i) @ normal(3, 3, 12, seed=i + 5) for i in range(2)]
        for i in range(2):
            before = [conv.weight.detach().clone(), experts.detach().clone()]
            for _ in range(5):
                opt.zero_grad()
                (conv(x[i]).sin().sum() + (z[i] @ experts.mT).sin().sum()).backward()
                opt.step()
            for p, old in zip((conv.weight, experts), before, strict=True):
                moved = (p - old).detach().flatten(1) if p.dim() == 4 else (p - old).detach()
                assert (moved @ opt.memory(p)).norm() < 1e-12 < moved.norm()
            opt.consolidate()
        assert opt.memory(conv.weight).shape[0] == 27 and opt.memory(experts).shape[:2] == (3, 12)

    def test_a_full_memory_stops_the_matrix(self):
        w = nn.Parameter(normal(6, 5))
        opt = made([w], threshold=1.0, sketch_rank=5)
        for i in range(3):
            w.grad, before = normal(6, 5, seed=i), w.detach().clone()
            opt.step()
            opt.consolidate()
            assert (w - before).norm() > 0.01 if i == 0 else (w - before).norm() < 1e-12


class TestManners:
    def test_groups_that_are_not_protected_and_parameters_that_join(self):
        trunk, heads = nn.Linear(24, 8).double(), [nn.Linear(8, 2).double() for _ in range(2)]
        free, late = nn.Linear(8, 2).double(), nn.Parameter(torch.zeros(2, dtype=torch.float64))
        opt = made([{"params": trunk.parameters()}, {"params": free.parameters(), "protect": False}])
        twin = copy.deepcopy(free)
        alone = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
        for t in range(2):
            opt.add_param_group({"params": heads[t].parameters()})
            bias = heads[t].bias.detach().clone()
            for _ in range(3):
                opt.zero_grad()
                h = trunk(task(t)[0])
                (free(h).sum() + heads[t](h).square().sum()).backward()
                for p, q in zip(free.parameters(), twin.parameters(), strict=True):
                    q.grad = p.grad.clone()
                opt.step(), alone.step()
            opt.consolidate()
            assert not torch.equal(heads[t].bias, bias)
            assert all(torch.equal(p, q) for p, q in zip(free.parameters(), twin.parameters(), strict=True))
        opt.add_param_group({"params": [late]})
        late.grad = torch.ones_like(late)
        opt.step()
        assert late.abs().min() > 0
        with pytest.raises(ValueError, match="memory|protected matrix"):
            opt.memory(free.weight)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_state_goes_on_to_the_bit(self, dtype, tmp_path):
        model = net(dtype)
        opt = made(model.parameters(), every=2, weight_decay=0.01)
        learn(model, opt, task(0, dtype=dtype), 5)
        opt.consolidate()
        learn(model, opt, task(1, dtype=dtype), 3)
        twin, again = copy.deepcopy(model), None
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        again = made(twin.parameters())
        again.load_state_dict(torch.load(tmp_path / "opt.pt"))
        for key, value in pickle.loads(pickle.dumps(opt)).state_dict()["param_groups"][0].items():
            assert value == again.state_dict()["param_groups"][0][key]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {t.dtype for s in again.state.values() for k, t in s.items() if k in ("memory", "basis")} == {wide}
        for _ in range(2):
            learn(model, opt, task(1, dtype=dtype), 4), learn(twin, again, task(1, dtype=dtype), 4)
            opt.consolidate(), again.consolidate()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        for a, b in zip(opt.state.values(), again.state.values(), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(t, b[k]) if isinstance(t, torch.Tensor) else t == b[k] for k, t in a.items())

    def test_torchs_generator_is_left_alone_and_the_seed_counts(self):
        def run(seed):
            w = nn.Parameter(torch.zeros(20, 30))
            opt = made([w], rank=2, sketch_rank=3, seed=seed)
            for i in range(3):
                w.grad = normal(20, 30, seed=i, dtype=torch.float32)
                opt.step()
            return w.detach()

        before = torch.get_rng_state()
        one, two, other = run(0), run(0), run(1)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one, two) and not torch.equal(one, other)

    def test_schedulers_tensor_rates_and_closures(self):
        model = net()
        opt = made(model.parameters(), lr=torch.tensor(0.1))
        schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
        x, y = task(0)

        def closure():
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(5):
            losses.append(float(opt.step(closure).detach()))
            schedule.step()
        assert losses[-1] < losses[0] and float(opt.param_groups[0]["lr"]) == pytest.approx(0.1 / 32)
        with pytest.raises(TypeError, match="CoSO: closure must be a function or None, got int 3"):
            opt.step(3)

    def test_a_gradient_that_is_not_finite(self):
        model = net()
        opt = made(model.parameters())
        learn(model, opt, task(0), 2)
        before, state = model[0].weight.detach().clone(), copy.deepcopy(opt.state[model[0].weight])
        model[0].weight.grad[1, 1] = torch.nan
        moved = model[2].weight.detach().clone()
        with pytest.warns(RuntimeWarning, match="CoSO: a matrix of shape .16, 24. had a non-finite gradient"):
            opt.step()
        assert torch.equal(model[0].weight, before) and not torch.equal(model[2].weight, moved) and opt.skipped == 1
        assert all(torch.equal(t, opt.state[model[0].weight][k]) for k, t in state.items())

    def test_what_it_refuses(self):
        w = nn.Parameter(torch.zeros(6, 5))
        opt = made([w])
        w.grad = torch.zeros(6, 5).to_sparse()
        with pytest.raises(RuntimeError, match="CoSO: gradients must be dense, got"):
            opt.step()
        for options, match in (({"rank": 0}, "rank must be >= 1"), ({"threshold": 1.5}, "threshold must be"),
                               ({"decay": -1}, "decay must be"), ({"protect": "no"}, "protect must be a bool"),
                               ({"sketch_rank": 2.5}, "sketch_rank must be an int"), ({"lr": -1}, "lr must be")):
            with pytest.raises((TypeError, ValueError), match=f"CoSO: {match}"):
                made([w], **options)
            with pytest.raises((TypeError, ValueError), match=f"CoSO: {match}"):
                made([nn.Parameter(torch.zeros(2))]).add_param_group({"params": [w]} | options)


@functools.cache
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    return torch.tensor(data[0], dtype=torch.float32) / 16, torch.tensor(data[1])


def five_tasks(make, seed, steps=45):
    """(accuracy after all, forgetting): is the digit odd, for two digits after two others."""
    x, y = digits()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draw)
    train, test = order[:1200], order[1200:]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    opt, at_once, found = make(model.parameters()), [], []

    def accuracy(t):
        rows = test[y[test] // 2 == t]
        return (model(x[rows]).argmax(1) == y[rows] % 2).float().mean().item()

    for t in range(5):
        rows = train[y[train] // 2 == t]
        for _ in range(steps):
            some = rows[torch.randint(len(rows), (32,), generator=draw)]
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[some]), y[some] % 2).backward()
            opt.step()
        if isinstance(opt, CoSO):
            opt.consolidate()
        at_once.append(accuracy(t))
    found = [accuracy(t) for t in range(5)]
    return sum(found) / 5, sum(a - b for a, b in zip(at_once[:4], found)) / 4


def test_digits_in_five_tasks_are_forgotten_less():
    gained = 0
    for seed in range(3):
        ours, theirs = (five_tasks(make, seed) for make in (
            lambda p: CoSO(p, lr=3e-3, rank=10, sketch_rank=30),
            lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0)))
        assert ours[1] < 0.6 * theirs[1], (seed, ours, theirs)
        gained += (ours[0] - theirs[0]) / 3
    assert gained > 0.02
