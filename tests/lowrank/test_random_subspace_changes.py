"""RandomSubspace where theta, theta_0 or what reads them changes in ways that torch does not count."""

import copy
import threading

import pytest
import torch
from helpers import in_two_processes
from subspace_cases import X, each_kind, moved, network, wrapped
from torch import nn
from torch.nn.utils import parametrize

import torch_subspace as ts
from torch_subspace.lowrank.parts import running


def is_at_theta(model):
    """Each weight as it is read is theta_0's and its part of P theta, computed anew."""
    at = model.parameters_at(model.theta.detach().clone())
    return all(torch.allclose(part(base), at[name], atol=1e-6) for name, (part, base) in model._bases().items())


CHANGES = {
    "data": lambda m: m.theta.data.add_(0.3),
    "numpy": lambda m: m.theta.detach().numpy().__iadd__(1),
    "set": lambda m: torch.nn.utils.vector_to_parameters(torch.full((7,), 2.0), [m.theta]),
    "fused Adam": lambda m: torch.optim.Adam([m.theta], 0.1, fused=True).step(),
    "fused AdamW": lambda m: torch.optim.AdamW([m.theta], 0.1, fused=True).step(),
    "fused SGD": lambda m: torch.optim.SGD([m.theta], 0.1, fused=True).step(),
    "fused Adagrad": lambda m: torch.optim.Adagrad([m.theta], 0.1, fused=True).step(),
    "foreach": lambda m: torch.optim.Adam([m.theta], 0.1, foreach=True).step(),
    "shared memory": lambda m: m.share_memory().theta.data.fill_(5),
}


@pytest.mark.parametrize("through", ["the wrapper", "a part"])
@pytest.mark.parametrize("change", CHANGES)
def test_theta_is_looked_at_not_its_version(change, through):
    model = moved(wrapped()).eval()
    model(X).square().sum().backward()
    before = model.module[0].weight.detach().clone()
    CHANGES[change](model)
    if through == "the wrapper":
        model(X)
    assert not torch.equal(model.module[0].weight, before) and is_at_theta(model)


def test_many_steps_of_a_fused_optimiser():
    """As many as one that isn't: the first one would be seen, as the second forward is new."""
    trained = []
    for fused in (False, True):
        model = moved(wrapped()).eval()
        opt = torch.optim.Adam([model.theta], 0.05, fused=fused)
        for _ in range(6):
            opt.zero_grad()
            model(X).square().sum().backward()
            opt.step()
        trained.append(model.theta.detach())
    torch.testing.assert_close(*trained)


def test_theta_that_is_frozen_and_thawed():
    model = moved(wrapped()).eval()
    model.theta.requires_grad_(False)
    assert not model(X).requires_grad
    model.theta.requires_grad_(True)
    model(X).sum().backward()
    assert model.theta.grad.abs().sum() > 0
    model.theta.requires_grad_(False)
    assert not model(X).requires_grad


def test_transforms_in_several_threads():
    """Not of one another: a step that is batched or part of a gradient is its own thread's."""
    model, wrong = moved(ts.lowrank.RandomSubspace(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)), 9)), []
    y = model(X).detach()
    (expected,) = torch.autograd.grad(model(x := X.clone().requires_grad_()).sum(), x)

    def call():
        for _ in range(20):
            wrong.append(not torch.allclose(torch.func.vmap(model)(X), y, atol=1e-5))
            wrong.append(not torch.allclose(torch.func.grad(lambda x: model(x).sum())(X), expected, atol=1e-5))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 160 and not any(wrong)


@each_kind
def test_inference_mode_leaves_nothing_behind(kind):
    with torch.inference_mode():
        made = wrapped(kind)
        made(X)
        assert not made.theta.is_inference()
    model = wrapped(kind, seed=8).eval()
    with torch.inference_mode():
        model.load_state_dict(moved(wrapped(kind)).state_dict())
        model(X)
    model(X).sum().backward()
    assert model.theta.grad.abs().sum() > 0 and is_at_theta(model)


def test_copies_of_what_has_read_its_weights():
    """An LSTM's list of them, weight_norm's weight, a random subspace within."""
    for make in (lambda: nn.LSTM(6, 6, batch_first=True), lambda: ts.lowrank.RandomSubspace(network(), 30),
                 lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))):
        model = moved(ts.lowrank.RandomSubspace(make(), 7)).eval()
        value = lambda m: m(X)[0] if isinstance(m(X), tuple) else m(X)  # noqa: E731
        y = value(model)
        other = copy.deepcopy(model)
        assert torch.equal(value(other), y)
        with torch.no_grad():
            other.theta.add_(1)
        assert not torch.allclose(value(other), y) and torch.equal(value(model), y)
        value(other).sum().backward()
        assert other.theta.grad is not None and model.theta.grad is None
        assert sorted(other.state_dict()) == sorted(model.state_dict())


def test_merged_modules_are_as_before():
    """Parameters in their order, for what counts them; and nothing is dropped that came above."""
    module = network()
    module[0].bias.requires_grad_(False)
    names = [name for name, _ in module.named_parameters()]
    plain = ts.lowrank.RandomSubspace(module, 5).merge_and_unload()
    assert [name for name, _ in plain.named_parameters()] == names

    model = moved(wrapped()).eval()
    parametrize.register_parametrization(model.module[0], "weight", nn.Tanh(), unsafe=True)
    y = model(X)
    with pytest.raises(RuntimeError, match="RandomSubspace.merge_and_unload: weight has been parametrized once more"):
        model.merge_and_unload()
    assert torch.equal(model(X), y)


def test_two_parameters_in_one_memory_are_refused():
    """Moved apart, they could not be merged."""
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    module[1].weight = nn.Parameter(module[0].weight.data)
    with pytest.raises(ValueError, match="RandomSubspace: 0.weight and 1.weight are two parameters in the same memory"):
        ts.lowrank.RandomSubspace(module, 5)
    with pytest.raises(ValueError, match="intrinsic_dimension: 0.weight and 1.weight are two parameters in the same"):
        ts.lowrank.intrinsic_dimension(lambda: module, lambda model: 1.0)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused(kind):
    for make in (lambda module: ts.lowrank.RandomSubspace(module, 5),
                 lambda module: ts.lowrank.intrinsic_dimension(lambda: module, lambda model: 1.0)):
        with pytest.raises(TypeError, match="(RandomSubspace|intrinsic_dimension): 0 makes sparse gradients: set its"):
            make(nn.Sequential(kind(10, 6, sparse=True)))
    module = nn.Sequential(kind(10, 6, sparse=True).requires_grad_(False), nn.Linear(6, 2))
    assert ts.lowrank.RandomSubspace(module, 5).size == 14


def test_nothing_is_left_of_a_forward():
    model = moved(wrapped()).eval()
    model.module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X)
    assert not running.steps


# ----------------------------------------------------------------------------------------------------- states


def test_a_loaded_state_is_saved_as_it_was():
    """Also of a copy, and after a move to another precision: what was frozen and left out stays so."""
    def make(seed):
        module = network()
        module[3].requires_grad_(False)
        return ts.lowrank.RandomSubspace(module, 7, seed=seed)

    model, other = moved(make(1)), make(2)
    names = sorted(model.state_dict())
    other.load_state_dict(model.state_dict())
    for again in (other, copy.deepcopy(other), other.half(), other.double()):
        assert sorted(again.state_dict()) == names
    fresh = make(3)
    fresh.load_state_dict(copy.deepcopy(other).state_dict())
    torch.testing.assert_close(fresh.theta, other.theta.float())
    assert sorted(fresh.state_dict()) == names


@pytest.mark.parametrize("how", ["data", "optimiser", "assign"])
def test_a_base_that_was_trained_besides_is_in_the_state(how):
    model, other = moved(wrapped()), wrapped(seed=9)
    base = model.module[3].parametrizations.weight.original
    if how == "data":
        base.data.add_(1)
    elif how == "optimiser":
        model.requires_grad_(True)
        opt = torch.optim.SGD(model.parameters(), 0.1)
        model(X).square().sum().backward()
        opt.step()
    else:
        model.load_state_dict(model.state_dict() | {
            "module.3.parametrizations.weight.original": nn.Parameter(base + 1)}, assign=True)
    state = model.state_dict()
    assert "module.3.parametrizations.weight.original" in state
    other.load_state_dict(state)
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_seed_is_not_for_setting():
    model = wrapped()
    with pytest.raises(AttributeError):
        model.seed = 5
    assert model.seed == 3 and int(model.state_dict()["_extra_state"][1]) == 3


def test_bases_in_half_types_are_told_apart():
    """By their numbers: only what was rounded since may be off by rounding."""
    def make(dtype, by=0.0, of=0, frozen=None):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
        with torch.no_grad():
            module[0].weight[of, 0] += by
        module.to(dtype)
        if frozen is not None:
            module[1].to(frozen).requires_grad_(False)
        return ts.lowrank.RandomSubspace(module, 5)

    for options in ({"dtype": torch.bfloat16}, {"dtype": torch.float16},
                    {"dtype": torch.float32, "frozen": torch.bfloat16}):
        with pytest.raises(ValueError, match="the state is of a module with other parameters theta_0"):
            make(**options).load_state_dict(make(**options, by=0.05).state_dict())
        make(**options).load_state_dict(make(**options).state_dict())
    make(torch.float32).load_state_dict(make(torch.bfloat16).state_dict())

    def whole(value):
        module = nn.Linear(6, 6)
        torch.nn.init.ones_(module.weight), torch.nn.init.zeros_(module.bias)
        module.codes = nn.Parameter(torch.full((5,), value, dtype=torch.int8), requires_grad=False)
        return ts.lowrank.RandomSubspace(module, 5)

    with pytest.raises(ValueError, match="the state is of a module with other parameters theta_0"):
        whole(1).load_state_dict(whole(2).state_dict())


def test_a_layer_that_was_replaced_is_part_of_the_state():
    def make(seed):
        model = wrapped(seed=seed)
        torch.manual_seed(seed)
        model.module[3] = nn.Linear(9, 2)
        return model

    model, other = moved(make(1)).eval(), make(2).eval()
    model(X).square().sum().backward()
    assert model.theta.grad.abs().sum() > 0
    assert list(model.parameters_at()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    state = model.state_dict()
    assert [name for name in state if name.startswith("module.3")] == ["module.3.weight", "module.3.bias"]
    other.load_state_dict(state)
    y = model(X)
    assert torch.equal(other(X), y) and torch.equal(model.merge_and_unload()(X), y)


def _sharded(rank, folder):
    """A module of fully_shard trains as in one process, its state loads anywhere; what it can't do says so."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))

    def make():
        torch.manual_seed(0)
        return ts.lowrank.RandomSubspace(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), 8)

    model, alone = make(), make()
    fully_shard(model.module[0])
    fully_shard(model)
    for m, part in ((model, x[4 * rank :][:4]), (alone, x)):
        opt = torch.optim.Adam([m.theta], 0.05)
        for _ in range(3):
            opt.zero_grad()
            m(part).square().mean().backward()
            opt.step()
    torch.testing.assert_close(model.theta.full_tensor(), alone.theta)
    torch.testing.assert_close(model(x), alone(x))
    state = model.state_dict()
    assert sorted(state) == ["_extra_state", "theta"]
    other = make()
    other.load_state_dict(state | {"theta": state["theta"].full_tensor()})
    torch.testing.assert_close(other(x), alone(x))
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="RandomSubspace.parameters_at: theta is sharded"):
        model.merge_and_unload()
    torch.distributed.destroy_process_group()


def test_a_sharded_module_is_one_process(tmp_path):
    in_two_processes(_sharded, tmp_path)
