"""Groups are unit vectors, zeros stay zeros; learners split by what matters, and cluster points to train on."""

import copy
import pickle
import warnings

import helpers
import numpy as np
import pytest
import torch
from helpers import normal
from torch.distributed import checkpoint

from torch_subspace.grassmann import DynamicSubspaceLearners, grouped_normalize

DIMS = [(2, 2, 2), (1, 3, 2), (6,), (1,) * 6]


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_groups_are_unit_vectors(dims):
    x = normal(3, 4, 6, seed=1)
    expected = torch.cat([torch.nn.functional.normalize(part, dim=-1) for part in x.split(dims, -1)], -1)
    helpers.close(grouped_normalize(x, dims), expected, 1e-15, absolute=True)
    assert torch.autograd.gradcheck(lambda x: grouped_normalize(x, dims), x[0].requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: grouped_normalize(x, dims), x[0].detach().requires_grad_())
    vmapped = torch.func.vmap(lambda x: grouped_normalize(x, dims))(x.detach())
    helpers.close(vmapped, expected, 1e-15, absolute=True)
    compiled = torch.compile(lambda x: grouped_normalize(x, dims), fullgraph=True, dynamic=True, backend="aot_eager")
    helpers.close(compiled(x.detach()), expected, 1e-15, absolute=True)
    for size in (1e-300, 1e300):
        helpers.close(grouped_normalize(size * x.detach(), dims), expected, 1e-14, absolute=True)
    single = grouped_normalize((1e-30 * x.detach()).float(), dims)
    helpers.close(single, expected, 1e-6, absolute=True)
    half = grouped_normalize(x.detach().half(), dims)
    assert half.dtype == torch.float16 and (half - expected).abs().max() < 2e-3
    assert grouped_normalize(x[:0].detach(), dims).shape == (0, 4, 6)


def test_many_groups_alike_are_as_one_by_one():
    x, dims = normal(3, 80), (2,) * 40
    helpers.close(grouped_normalize(x, dims), torch.cat([grouped_normalize(part, (2,)) for part in x.split(2, -1)], -1),
                  1e-15)


@pytest.mark.parametrize("dims", DIMS[:2], ids=str)
def test_groups_of_zeros_stay_zeros(dims):
    x = normal(4, 6, seed=1)
    x[1], x[2, dims[0] : dims[0] + dims[1]] = 0, 0
    x.requires_grad_()
    y = grouped_normalize(x, dims)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    zero = x == 0
    assert not y[zero].any() and not gradient[zero].any() and second.isfinite().all()
    assert gradient[0].abs().max() > 0 or dims == (1,) * 6
    other = x.detach()[[0, 3]].requires_grad_()
    helpers.close(torch.autograd.grad(grouped_normalize(other, dims).sum(), other)[0], gradient[[0, 3]], 1e-15,
                  absolute=True)


def margin_loss(z, target, beta=1.2, margin=0.2):
    """The published sum, pair by pair."""
    terms = []
    for i in range(len(z)):
        far = sorted(((z[i] - z[j]).norm().item(), j) for j in range(len(z)) if target[j] != target[i])
        others = [j for distance, j in far if distance >= 0.5]
        mates = [j for j in range(len(z)) if j != i and target[j] == target[i]]
        terms += [torch.relu((z[i] - z[j]).norm() - beta + margin) for j in mates]
        terms += [torch.relu(beta - (z[i] - z[j]).norm() + margin) for j in others[: len(mates)]]
    active = [term for term in terms if term > 0]
    return torch.stack(active).mean() if active else z.new_zeros(())


@pytest.mark.parametrize("learner", [None, 0, 1])
def test_its_loss_is_the_margin_loss(learner):
    model = DynamicSubspaceLearners(5, 12, dtype=torch.float64)
    model.dims = (7, 5)
    x, y = normal(15, 5, seed=2), torch.arange(15) % 4
    z = model(x) if learner is None else grouped_normalize(model.embed(x), model.dims).split(model.dims, -1)[learner]
    found = model.loss(x, y, learner)
    helpers.close(found, margin_loss(z, y), 1e-7, absolute=True)
    (gradient,) = torch.autograd.grad(found, model.embed.weight)
    (expected,) = torch.autograd.grad(margin_loss(z, y), model.embed.weight)
    helpers.close(gradient, expected, 1e-6, absolute=True)
    alone = model.loss(x[:1], y[:1], learner)
    assert alone == 0 and alone.requires_grad


def trained(model, x, y, steps=60, learner=None, lr=0.01):
    optimiser = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model.loss(x, y, learner)
        loss.backward()
        optimiser.step()
    return loss.item()


def test_a_split_keeps_what_matters():
    torch.manual_seed(0)
    model = DynamicSubspaceLearners(6, 20)
    x, y = torch.randn(60, 6), torch.arange(60) % 3
    x = x + 2 * torch.eye(6)[y]
    assert not model.split()  # nothing seen so far
    first = trained(model, x, y, 1)
    assert trained(model, x, y) < first
    model._effect.zero_()
    z = grouped_normalize(model.embed(x), model.dims)
    z.retain_grad()
    model._margin_loss(z, y).backward()
    effect = (z * z.grad).mean(0).abs()
    effect = (effect - effect.min()) / (effect.max() - effect.min())
    model.zero_grad()
    model.loss(x, y).backward()
    before, stay = model.embed.weight.detach().clone(), effect > 0.5
    if stay.sum() < 5:
        model.threshold = float(effect.sort().values[-8]) - 1e-6
        stay = effect > model.threshold
    assert model.split() and model.dims == (int(stay.sum()), 20 - int(stay.sum()))
    helpers.close(model.embed.weight[: model.dims[0]], before[stay], 0, absolute=True)
    assert not any((row == before).all(1).any() for row in model.embed.weight[model.dims[0] :])
    assert not model.split()  # its losses are forgotten
    model.eval().loss(x, y).backward()
    assert not model._effect.any()
    again = DynamicSubspaceLearners(6, 20)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    assert again.dims == model.dims and torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="dims must sum to 12"):
        DynamicSubspaceLearners(6, 12).set_extra_state(model.get_extra_state())


@pytest.mark.parametrize("dims", [(20,), (7, 13), (5, 6, 4, 5)], ids=str)
def test_its_state_is_of_tensors(dims, tmp_path):
    """For safetensors, and for checkpoints that write into the tensors of a model that has not been split."""
    model = DynamicSubspaceLearners(6, 20)
    model.dims, x = dims, torch.randn(4, 6)
    state = model.state_dict()
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    safetensors = helpers.optional("safetensors.torch")
    safetensors.save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        checkpoint.save(state, checkpoint_id=tmp_path / "folder")
        filled = DynamicSubspaceLearners(6, 20).state_dict()
        checkpoint.load(filled, checkpoint_id=tmp_path / "folder")
    earlier = state | {"_extra_state": {"dims": dims}}
    for given in (safetensors.load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "model.pt"), filled,
                  earlier):
        other = DynamicSubspaceLearners(6, 20)
        other.load_state_dict(given)
        assert other.dims == dims and torch.equal(other(x), model(x))


@pytest.mark.parametrize("state", [
    3, None, torch.ones(20), torch.ones(20, dtype=torch.int64), torch.arange(20) % 2, torch.zeros(2, 10).long(),
    torch.zeros(20, dtype=torch.int64, device="meta"), torch.arange(20).flip(0),
], ids=lambda state: str(state)[:30])
def test_a_state_that_is_none(state):
    model = DynamicSubspaceLearners(6, 20)
    with pytest.raises(ValueError, match="DynamicSubspaceLearners: _extra_state must be what state_dict has of it"):
        model.set_extra_state(state)
    with pytest.raises(ValueError, match="dims must sum to 20, got"):
        model.set_extra_state(torch.arange(19))
    assert model.dims == (20,)


def emptied(module, monkeypatch):
    """In memory that was used before."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda t, device: torch.arange(
            1, t.numel() + 1, dtype=t.dtype, device=device).view(t.shape))
        return module.to_empty(device="cpu")


def seen(model, seed=0, create_graph=False):
    """The model, after a loss."""
    x, y = normal(30, 6, seed=seed).to(model.embed.weight), torch.arange(30) % 3
    torch.autograd.grad(model.loss(x, y), model.embed.weight, create_graph=create_graph)
    return model


@pytest.mark.parametrize("way", ["made on meta", "there and back", "where it is"])
def test_memory_that_is_given_is_no_effect(way, monkeypatch):
    trained = DynamicSubspaceLearners(6, 20)
    model = DynamicSubspaceLearners(6, 20, device="meta" if way == "made on meta" else None)
    if way == "there and back":
        model.to("meta")
    emptied(model, monkeypatch).load_state_dict(trained.state_dict())
    assert not model.split() and torch.equal(model.embed.weight, trained.embed.weight)


def test_effects_are_the_weights():
    """They go with a copy; other weights have none; the module's dtype and what backward keeps are not theirs."""
    torch.manual_seed(0)
    model = seen(DynamicSubspaceLearners(6, 20, threshold=0.3))
    state = copy.deepcopy(model.state_dict())
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()
    assert model.split()
    for other in copies:
        assert other.split() and other.dims == model.dims
    other = seen(DynamicSubspaceLearners(6, 20, threshold=0.3))
    assert copy.deepcopy(other).split()
    other.load_state_dict(state)
    assert not other.split()
    with torch.device("meta"):
        other = DynamicSubspaceLearners(6, 20, threshold=0.3)
    other.load_state_dict(state, assign=True)
    assert not other.split()
    assert seen(other).split() and other.dims == model.dims
    half = seen(DynamicSubspaceLearners(6, 20, dtype=torch.bfloat16), create_graph=True)
    assert half._effect.dtype == torch.float32 and not half._effect.requires_grad


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e38])
def test_a_backward_that_is_not_finite_counts_as_none(bad, compiled):
    """Of no coordinate, also where some of its effects are finite: all are of the same losses."""
    torch.manual_seed(0)
    models = [DynamicSubspaceLearners(6, 20, threshold=0.3)]
    models.append(copy.deepcopy(models[0]))
    torch._dynamo.reset()
    loss = torch.compile(models[0].loss, fullgraph=True, backend="aot_eager") if compiled else models[0].loss
    x, y = normal(30, 6, dtype=torch.float32), torch.arange(30) % 3
    before = models[0]._effect.clone()
    for scale in (bad, 1.0, bad):  # what a loss scaler does
        (1e3 * loss(x, y) * scale).backward()
        if scale == bad:
            assert torch.equal(models[0]._effect, before)
        before = models[0]._effect.clone()
    (1e3 * models[1].loss(x, y)).backward()
    assert torch.equal(models[0]._effect, models[1]._effect) and before.any()
    broken = x.clone()
    broken[3, 2] = bad
    loss(broken if bad != 1e38 else x * torch.inf, y).backward()
    assert torch.equal(models[0]._effect, before)
    for model in models:
        torch.manual_seed(1)
        assert model.split()
    assert models[0].dims == models[1].dims and torch.equal(models[0].embed.weight, models[1].embed.weight)


def test_effects_of_a_module_that_moves():
    model = seen(DynamicSubspaceLearners(6, 20))
    first = model._effect
    other = DynamicSubspaceLearners(6, 20, dtype=torch.float64)
    other.embed.load_state_dict(model.embed.state_dict())
    helpers.close(seen(model.double(), 1)._effect, first.double() + seen(other, 1)._effect, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("learner", [None, 1])
def test_compile_without_graph_breaks(learner, dynamic):
    """Values, gradients and effects to the bit; also between a split and the next, and beside uncompiled losses."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    models = [DynamicSubspaceLearners(6, 20, threshold=0.3, least=1)]
    models[0].dims = (8, 12)
    models.append(copy.deepcopy(models[0]))
    compiled = torch.compile(models[0].loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (30, 24):
        x, y, results = normal(n, 6, seed=n, dtype=torch.float32), torch.arange(n) % 3, []
        for model, loss in zip(models, (compiled, models[1].loss)):
            value = loss(x, y, learner)
            results.append([value.detach(), *torch.autograd.grad(value, (model.embed.weight, model.embed.bias))])
            model.loss(x, y, learner).backward()
        assert helpers.same(*results) and models[0]._effect.any()
        assert torch.equal(models[0]._effect, models[1]._effect)
    pending = [loss(x, y, learner) for loss in (compiled, models[1].loss)]
    for model, value in zip(models, pending):
        torch.manual_seed(1)
        assert model.split() and not model._effect.any()
        value.backward()  # of what was before
    assert models[0].dims == models[1].dims and torch.equal(models[0]._effect, models[1]._effect)
    assert torch.equal(compiled(x, y, 0), models[1].loss(x, y, 0))
    value = compiled(x, y, 0)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(value, models[0].embed.weight, create_graph=True)


def replica(seen_by=(0, 1)):
    torch.manual_seed(0)
    model = DynamicSubspaceLearners(6, 20, threshold=0.3)
    for rank in seen_by:
        seen(model, rank)
    return model


def worker(rank, folder):
    """Splits of replicas that saw other losses and would draw other rows."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group, found = torch.distributed.group.WORLD, []
    for model in (replica([rank]), replica([0] * (rank == 0)), replica([])):
        torch.manual_seed(7 + rank)
        found.append((model.split(process_group=group), model.dims, model.embed.state_dict()))
    model = replica([rank])
    model.dims = (8, 12 - rank, rank) if rank else (8, 12)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"split: dims must be the same in all .* got \(8, 1"):
        model.split(process_group=group)
    assert torch.equal(model.embed.weight, before["embed.weight"]) and model._effect.any()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_replicas_split_alike(tmp_path):
    """By the losses of all of them, also where some had none."""
    helpers.in_two_processes(worker, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for i, losses in enumerate(((0, 1), (0,), ())):
        model = replica(losses)
        torch.manual_seed(7)
        assert model.split() == bool(losses)
        for split, dims, state in (found[0][i], found[1][i]):
            assert split == bool(losses) and dims == model.dims
            assert helpers.same(state.values(), model.embed.state_dict().values())


def test_transforms_of_torch_func():
    """An effect can't be added up inside one: it is said, and in eval mode nothing is to be added."""
    model = DynamicSubspaceLearners(4, 8, dtype=torch.float64)
    x, y = normal(6, 4), torch.arange(6) % 2
    gradient = torch.func.grad(lambda x: model.loss(x, y))
    with pytest.raises(RuntimeError, match=r"DynamicSubspaceLearners.loss: torch.func.* call eval\(\) first"):
        gradient(x)
    assert not model._effect.any()
    (expected,) = torch.autograd.grad(model.loss(leaf := x.clone().requires_grad_(), y), leaf)
    model.eval()
    helpers.close(gradient(x), expected, 1e-14)


def test_clusters_keep_their_learners():
    torch.manual_seed(0)
    model = DynamicSubspaceLearners(8, 12)
    x = torch.randn(90, 8) * 0.2 + 4 * torch.eye(8)[torch.arange(90) % 3]
    assert not model.assign(x).any()
    model.dims = (4, 4, 4)
    one = model.assign(x)
    assert one.unique().tolist() == [0, 1, 2] and all(len(one[i::3].unique()) == 1 for i in range(3))
    turned = (one + 1) % 3
    for seed in range(3):
        assert torch.equal(model.assign(x, one, seed=seed), one)
        assert torch.equal(model.assign(x, turned, seed=seed), turned)


@pytest.mark.parametrize("seed, threshold", [(0, 0.3), (0, 0.5), (1, 0.5), (2, 0.5)])
def test_learners_on_clusters_retrieve(seed, threshold):
    """The whole schedule on planted classes: a nearest neighbour is of the class."""
    torch.manual_seed(seed)
    centres = torch.randn(12, 10)
    y = torch.arange(240) % 12
    x = centres[y] + 0.4 * torch.randn(240, 10)
    model = DynamicSubspaceLearners(10, 24, threshold=threshold)
    trained(model, x, y, 30)
    assert model.split()
    cluster = None
    for _ in range(3):
        cluster = model.assign(x, cluster)
        for learner in range(len(model.dims)):
            own = cluster == learner
            trained(model, x[own], y[own], 15, learner)
    trained(model, x, y, 20)
    z = model.eval()(x).detach()
    assert np.allclose(z.norm(dim=1), 1, atol=1e-6)
    near = torch.cdist(z, z).fill_diagonal_(9).argmin(1)
    assert (y[near] == y).double().mean() > 0.9


@pytest.mark.parametrize("call, message", [
    (lambda m: grouped_normalize(normal(3, 6), (2, 2)), r"dims above 0 that sum to D, got \(3, 6\) and \(2, 2\)"),
    (lambda m: grouped_normalize(normal(3, 6), (6, 0)), "dims above 0"),
    (lambda m: grouped_normalize(normal(3, 6), None), "dims must be a sequence of ints, got None"),
    (lambda m: DynamicSubspaceLearners(4, 3), "dim"),
    (lambda m: DynamicSubspaceLearners(4, 8, beta=3.0), "beta must be a number from 0 to 2, got 3.0"),
    (lambda m: m.loss(torch.randn(3, 4), torch.tensor([0, 1])), "features and target must be as many"),
    (lambda m: m.loss(torch.randn(2, 4), torch.tensor([0, 1]), 1), "learner must be below 1, got 1"),
    (lambda m: m.split(process_group=1), "DynamicSubspaceLearners.split: process_group must be .* got int 1"),
    (lambda m: m.assign(torch.randn(2, 4), torch.tensor([0, 1])), "previous must be"),
])
def test_wrong_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(DynamicSubspaceLearners(4, 8))


def test_effects_end_on_meta():
    """With the weights that they were of."""
    model = DynamicSubspaceLearners(6, 12)
    model.loss(torch.randn(20, 6), torch.arange(20) % 4).backward()
    assert model._effect.any()
    model.to("meta").to_empty(device="cpu")
    assert not model._effect.any()
