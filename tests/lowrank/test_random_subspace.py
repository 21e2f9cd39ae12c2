"""RandomSubspace: a module at theta_0 + P theta_d is what its formula says, wherever modules are used."""

import copy
import io

import pytest
import torch
from helpers import in_two_processes, normal
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import torch_subspace as ts

KINDS = ("fastfood", "dense", "sparse")
each_kind = pytest.mark.parametrize("kind", KINDS)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)).to(dtype)


def wrapped(kind="fastfood", dim=7, seed=3, dtype=torch.float32):
    return ts.lowrank.RandomSubspace(network(dtype), dim, kind, seed=seed)


def moved(model):
    """Away from theta_0."""
    with torch.no_grad():
        model.theta.copy_(normal(len(model.theta), seed=5))
    return model


def columns(model):
    """P, of all parameters one after another."""
    def flat(theta):
        return torch.cat([p.flatten() for p in model.parameters_at(theta).values()])

    return torch.autograd.functional.jacobian(flat, torch.zeros_like(model.theta))


X = normal(5, 6, dtype=torch.float32)


@each_kind
def test_theta_is_base_plus_projection(kind):
    """Values, by the projection's own matrix; and the gradient is its adjoint of the parameters' gradient."""
    model, plain = moved(wrapped(kind, dtype=torch.float64)), network(torch.float64)
    p = columns(model)
    step = p @ model.theta.detach()
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(plain.parameters()) + step,
                                        plain.parameters())
    x = X.double()
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(model.theta.grad, p.mT @ torch.cat([q.grad.flatten() for q in plain.parameters()]))
    assert torch.autograd.gradcheck(lambda t: torch.func.functional_call(plain, model.parameters_at(t), (x,)),
                                    model.theta.detach().clone().requires_grad_())


@each_kind
def test_at_first_it_is_the_module(kind):
    assert torch.equal(wrapped(kind)(X), network()(X))


@pytest.mark.parametrize("size", [1, 2, 17, 1000])
@each_kind
def test_columns_have_length_one(kind, size):
    module = nn.Linear(size, 1, bias=False)
    p = columns(ts.lowrank.RandomSubspace(module, min(size, 40), kind, seed=1))
    lengths = p.norm(dim=0)
    if kind == "fastfood":  # in the mean
        assert abs(lengths.square().mean() - 1) < (0.2 if size > 100 else 1.0)
    else:
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
    if size > 100:  # and are almost orthogonal, as random ones are: entries of P'P - 1 are about 1 / sqrt(D)
        assert (p.mT @ p - torch.eye(p.shape[1])).abs().max() < 5 / size**0.5


def test_sparse_columns_have_one_entry_in_each_stratum():
    p = columns(ts.lowrank.RandomSubspace(nn.Linear(100, 100, bias=False), 30, "sparse"))
    assert torch.equal((p != 0).view(100, 100, 30).sum(1), torch.ones(100, 30, dtype=torch.int64))
    assert abs(p.sign().sum()) < 4 * 3000**0.5


@each_kind
def test_seed_is_the_projection(kind):
    first, again, other = columns(wrapped(kind)), columns(wrapped(kind)), columns(wrapped(kind, seed=4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_projections_stay_what_they_are():
    """In every version: states hold seeds."""
    dense, sparse = (ts.lowrank.RandomSubspace(nn.Linear(50, 2, bias=False), 2, kind, seed=7) for kind in KINDS[1:])
    torch.testing.assert_close(dense.columns[:3].flatten(), torch.tensor(DENSE), rtol=1e-5, atol=0)
    assert (sparse.rows[:5].flatten() * sparse.signs[:5].flatten()).tolist() == SPARSE


DENSE = [-0.02963971, -0.0017134811, 0.15868847, 0.11929916, -0.12923642, -0.017878173]
SPARSE = [-9, -7, 11, 10, 24, -27, -31, -39, -40, -40]


def test_long_vectors_are_cut_into_parts(monkeypatch):
    """As those beyond 2^26 are: every part has a seed and its share of a column's length."""
    from torch_subspace.lowrank import projections

    init = projections.Fastfood.__init__
    monkeypatch.setattr(projections.Fastfood, "__init__", lambda *args: init(*args, longest=300))
    model = ts.lowrank.RandomSubspace(nn.Linear(1000, 1, bias=False), 20, seed=1)
    assert model._projection.sizes == [250] * 4
    p = columns(model)
    assert abs(p.square().sum(0).mean() - 1) < 0.2
    assert (p.mT @ p - torch.eye(20)).abs().max() < 0.2


# ---------------------------------------------------------------------------------------------------- as any module


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
    elsewhere = ts.lowrank.RandomSubspace(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)),
                                          7, seed=3)
    with pytest.raises(ValueError, match="RandomSubspace: the state is of a module with other parameters theta_0"):
        elsewhere.load_state_dict(state)
    with pytest.raises(ValueError, match="RandomSubspace: the state is of kind 'dense' over 121 parameters, this is"):
        model.load_state_dict(wrapped("dense").state_dict())
    with pytest.raises(ValueError, match="of kind 'fastfood' over 8 parameters, this is kind 'fastfood' over 121"):
        model.load_state_dict(ts.lowrank.RandomSubspace(nn.Linear(7, 1), 7).state_dict())
    with pytest.raises(TypeError, match="RandomSubspace: _extra_state must be what state_dict has of it, got int 3"):
        model.load_state_dict(state | {"_extra_state": 3})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"theta": state["theta"]})
    assert elsewhere.theta.abs().max() == 0


def test_half_of_the_module_is_half_of_its_state():
    """A base in half precision is known again by what is left of it."""
    model = ts.lowrank.RandomSubspace(network().half(), 7)
    assert model.theta.dtype == torch.float32
    model.load_state_dict(ts.lowrank.RandomSubspace(network(), 7).state_dict())
    assert {p.dtype for p in model.parameters_at().values()} == {torch.float16}


@each_kind
def test_copies_and_merged_modules(kind):
    model = moved(wrapped(kind)).eval()
    expected = model(X)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.theta.zero_()
    assert torch.equal(other(X), network().eval()(X)) and torch.equal(model(X), expected)
    plain = model.merge_and_unload()
    assert type(plain) is nn.Sequential and all(p.requires_grad for p in plain.parameters())
    assert torch.equal(plain(X), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_frozen_parameters_stay_and_ties_hold():
    module = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    module["b"].weight = module["a"].weight
    module["a"].bias.requires_grad_(False)
    model = ts.lowrank.RandomSubspace(module, 5)
    assert model.size == 42 and list(model.parameters_at()) == ["a.weight", "b.bias"]
    moved(model)
    module.forward = lambda x: module["b"](module["a"](x))
    at = model.parameters_at()
    torch.testing.assert_close(model(X), (X @ at["a.weight"].mT + module["a"].bias) @ at["a.weight"].mT + at["b.bias"])
    assert not {"module.b.weight", "module.a.bias"} & set(model.state_dict())


@each_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_run_again_at_theta(kind, reentrant):
    """Also where a parent reads its part's weight (attention's projection), or keeps a list of its own (LSTM)."""

    class Network(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.again, self.first = again, nn.Linear(3, 4)
            self.mix, self.run = nn.MultiheadAttention(4, 2, batch_first=True), nn.LSTM(4, 4, batch_first=True)

        def part(self, x):
            return self.run(self.mix(*[self.first(x).tanh()] * 3)[0])[0]

        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=reentrant) if self.again else self.part(x)

    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        model = moved(ts.lowrank.RandomSubspace(Network(again), 9, kind))
        x = normal(2, 5, 3, dtype=torch.float32).requires_grad_()
        for _ in range(2):
            model(x).square().sum().backward()
        grads.append(model.theta.grad)
        assert all(p.is_leaf for p in model.parameters())
    torch.testing.assert_close(*grads)


@each_kind
def test_compiled_whole(kind):
    torch._dynamo.reset()
    model = moved(wrapped(kind)).eval()
    fast = torch.compile(model, fullgraph=True, dynamic=kind == "sparse", backend="aot_eager")
    torch.testing.assert_close(fast(X), model(X))
    fast(X).square().sum().backward()
    grad, model.theta.grad = model.theta.grad, None
    model(X).square().sum().backward()
    torch.testing.assert_close(grad, model.theta.grad)


def test_autocast_leaves_the_projection_alone():
    model = moved(wrapped())
    with torch.autocast("cpu", torch.bfloat16):
        at, y = model.parameters_at(), model(X)
    assert y.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(at.values(), model.parameters_at().values()))


def _in_data_parallel(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(moved(wrapped("sparse")))
    x, y = normal(8, 6, dtype=torch.float32), torch.arange(8) % 4
    model.eval()
    cross_entropy(model(x[4 * rank:][:4]), y[4 * rank:][:4]).backward()
    alone = moved(wrapped("sparse")).eval()
    cross_entropy(alone(x), y).backward()
    torch.testing.assert_close(model.module.theta.grad, alone.theta.grad)
    torch.distributed.destroy_process_group()


def test_data_parallel_is_one_process(tmp_path):
    in_two_processes(_in_data_parallel, tmp_path)


@each_kind
def test_a_small_task_is_learnt(kind):
    """The label is a direction: 40 of 153 numbers are enough."""
    x = normal(200, 16, seed=2, dtype=torch.float32)
    y = (x[:, :2].sum(1) > 0).long()
    torch.manual_seed(1)
    model = ts.lowrank.RandomSubspace(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2)), 40, kind)
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(150):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.95


# --------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_wrapped():
    make = ts.lowrank.RandomSubspace
    with pytest.raises(ValueError, match="RandomSubspace: dim must be at most 121, the numbers that .* got 122"):
        make(network(), 122)
    with pytest.raises(ValueError, match="RandomSubspace: no parameter of module requires a gradient"):
        make(nn.ReLU(), 1)
    with pytest.raises(TypeError, match="RandomSubspace: weight is on the meta device"):
        make(nn.Linear(3, 3, device="meta"), 1)
    with pytest.raises(TypeError, match="RandomSubspace: weight has no shape yet"):
        make(nn.LazyLinear(3), 1)
    with pytest.raises(TypeError, match="weight must be dense and float32, .* got a tensor of torch.complex64"):
        make(nn.Linear(3, 3, dtype=torch.complex64), 1)
    model = wrapped()
    with pytest.raises(ValueError, match=r"RandomSubspace.parameters_at: theta must have shape \(7,\)"):
        model.parameters_at(torch.zeros(8))
