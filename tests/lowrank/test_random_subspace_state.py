"""RandomSubspace: what its state holds, and which it takes."""

import io

import pytest
import torch
from subspace_cases import X, each_kind, moved, network, wrapped
from torch import nn

import torch_subspace as ts


@each_kind
def test_state_is_theta_seed_and_buffers(kind):
    model = moved(wrapped(kind))
    model(X)
    state = model.state_dict()
    assert sorted(state) == ["_extra_state", *(f"module.1.{n}" for n in (
        "num_batches_tracked", "running_mean", "running_var")), "theta"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = wrapped(kind, seed=8)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.seed == 3
    assert torch.equal(other.eval()(X), model.eval()(X))
    assert not [name for name in state if "weight" in name]
    outer = nn.ModuleDict({"a": wrapped(kind, seed=9)})
    outer.load_state_dict({f"a.{k}": v for k, v in state.items()})
    assert torch.equal(outer.eval()["a"](X), model(X))


def test_safetensors_holds_the_state(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = moved(wrapped()), wrapped(seed=1)
    safetensors.save_file(model.state_dict(), tmp_path / "theta.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "theta.safetensors"))
    assert torch.equal(other(X), model(X))


def test_wrong_states_are_refused_before_anything_changes():
    model, state = wrapped(), moved(wrapped()).state_dict()
    for kind, dim, size, message in (("dense", 7, 9, "of kind 'dense', 7 of 121 dimensions, this is kind 'fastfood'"),
                                     ("fastfood", 6, 9, "of kind 'fastfood', 6 of 121 dimensions, this is kind"),
                                     ("fastfood", 7, 8, "7 of 108 dimensions, this is kind 'fastfood', 7 of 121")):
        other = nn.Sequential(nn.Linear(6, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Linear(size, 4))
        with pytest.raises(ValueError, match=f"RandomSubspace: the state is .*{message}"):
            model.load_state_dict(ts.lowrank.RandomSubspace(other, dim, kind, seed=9).state_dict())
    own = state["_extra_state"]
    with pytest.raises(TypeError, match="RandomSubspace: _extra_state must be what state_dict has of it, got int 3"):
        model.load_state_dict(state | {"_extra_state": 3})
    with pytest.raises(ValueError, match="RandomSubspace: the state is of kind"):
        model.load_state_dict(state | {"_extra_state": torch.cat((own[:1], -own[1:]))})
    assert model.theta.abs().max() == 0 and model.seed == 3 and torch.equal(model(X), network()(X))
    with pytest.raises(RuntimeError, match="Missing key"):  # torch's own, which loads what it can
        model.load_state_dict({"theta": state["theta"]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"module.0.weight": torch.zeros(9, 6)})


@pytest.mark.parametrize("which", range(6))
def test_a_base_with_one_other_tensor_is_another(which):
    """Each is known, frozen ones too."""
    for frozen in (False, True):
        here, there = network(), network()
        for base in (here, there):
            base[0].requires_grad_(not frozen)
        with torch.no_grad():
            list(there.parameters())[which].view(-1)[-1] += 0.01
        model = ts.lowrank.RandomSubspace(here, 7)
        with pytest.raises(ValueError, match="the state is of a module with other parameters theta_0"):
            model.load_state_dict(ts.lowrank.RandomSubspace(there, 7).state_dict())


def test_what_is_trained_besides_is_part_of_the_state():
    def make():
        module = network()
        module[3].requires_grad_(False)
        return ts.lowrank.RandomSubspace(module, 7, seed=1)

    model, other = moved(make()), make()
    assert not [name for name in model.state_dict() if name.startswith("module.3")]
    model.module[3].requires_grad_()
    torch.optim.SGD(model.module[3].parameters(), 0.1)
    with torch.no_grad():
        model.module[3].weight += 1
    model.module[3].requires_grad_(False)
    state = model.state_dict()
    assert [name for name in state if name.startswith("module.3")] == ["module.3.weight"]
    other.load_state_dict(state)
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_adapters_within_and_above():
    """A random subspace of an adapter's numbers; an adapter of moved weights is refused."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    ts.adapt(net, ts.TuckerConfig(rank=2, target_modules="all-linear"))
    before = net(X)
    model = ts.lowrank.RandomSubspace(net, 5)
    assert torch.equal(model(X), before)
    assert model.size == 2 * (6 + 2 + 6) + 2 * (4 + 2 + 6)
    moved(model)(X).square().sum().backward()
    assert model.theta.grad.abs().min() > 0 and not torch.equal(model(X), before)
    with pytest.raises(ValueError, match="adapt: .*the weight of .* is parametrised"):
        ts.adapt(wrapped(), ts.TuckerConfig(rank=2, target_modules="all-linear"))


def test_half_of_the_module_is_half_of_its_state():
    """A base in half precision is known again by what is left of it."""
    model = ts.lowrank.RandomSubspace(network().half(), 7)
    assert model.theta.dtype == torch.float32
    model.load_state_dict(ts.lowrank.RandomSubspace(network(), 7).state_dict())
    assert {p.dtype for p in model.parameters_at().values()} == {torch.float16}
