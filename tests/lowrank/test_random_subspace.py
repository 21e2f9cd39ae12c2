"""RandomSubspace: a module at theta_0 + P theta_d is what its formula says, wherever modules are used."""

import copy
import threading
import warnings

import pytest
import torch
from helpers import in_two_processes, normal
from subspace_cases import KINDS, X, columns, each_kind, moved, network, wrapped
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import torch_subspace as ts


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
    assert model._projection.sizes == [250] * 4 and len(set(model._projection.seeds)) == 4
    p = columns(model)
    assert abs(p.square().sum(0).mean() - 1) < 0.2
    assert (p.mT @ p - torch.eye(20)).abs().max() < 0.2


# ---------------------------------------------------------------------------------------------------- as any module


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
    assert type(plain[0]) is nn.Linear and sorted(plain.state_dict()) == sorted(network().state_dict())
    for call in (lambda: model(X), model.merge_and_unload, model.parameters_at):
        with pytest.raises(RuntimeError, match="RandomSubspace.*: the module has been merged"):
            call()


COPIES = {
    "of all": copy.deepcopy,
    "of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "of an average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("first", ["copy", "original"])
@pytest.mark.parametrize("how", COPIES)
def test_merging_leaves_copies_whole(how, first):
    """torch's property that reads a weight is on a class that copies share."""
    model = moved(wrapped()).eval()
    expected, other = model(X), COPIES[how](model).eval()
    one, two = (other, model) if first == "copy" else (model, other)
    plain = one.merge_and_unload()
    assert torch.equal(two(X), expected) and torch.equal(plain(X), expected)
    two(X).square().sum().backward()
    assert two.theta.grad.abs().sum() > 0
    again = copy.deepcopy(two)
    assert torch.equal(two.merge_and_unload()(X), expected) and torch.equal(again.merge_and_unload()(X), expected)
    assert type(plain[0]) is nn.Linear and two.module is again.module is None


def test_a_subspace_of_a_copy_leaves_what_was_copied():
    """Where it was parametrized by others before, too."""
    norm = nn.utils.parametrizations.weight_norm
    source = nn.Sequential(norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 2))
    expected, other = source(X), copy.deepcopy(source)
    model = ts.lowrank.RandomSubspace(other, 5)
    assert torch.equal(source(X), expected) and isinstance(source[0].bias, nn.Parameter)
    torch.testing.assert_close(model(X), expected)
    plain = model.merge_and_unload()
    assert torch.equal(source(X), expected)
    torch.testing.assert_close(plain(X), expected)
    nn.utils.parametrize.remove_parametrizations(plain[0], "weight")
    assert torch.equal(source(X), expected) and type(plain[0]) is nn.Linear


@pytest.mark.parametrize("way", ["where it is", "there and back", "assigned"])
@each_kind
def test_memory_that_is_given_is_no_projection(kind, way, monkeypatch):
    """That one is the seed's, whatever to_empty leaves."""
    model, other = moved(wrapped(kind)).eval(), wrapped(kind).eval()
    state = copy.deepcopy(dict(model.named_parameters()) | model.state_dict())  # theta_0 too
    if way != "where it is":
        other.to("meta")
    if way != "assigned":
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda t, device: torch.arange(
                1, t.numel() + 1, dtype=t.dtype, device=device).view(t.shape))
            other.to_empty(device="cpu")
        assert way == "where it is" or not other.theta.any()
    other.load_state_dict(state, assign=way == "assigned")
    assert torch.equal(other(X), model(X)) and sorted(other.state_dict()) == sorted(model.state_dict())


def test_projections_are_not_rounded():
    model = wrapped("dense")
    p = model.columns
    for dtype in (torch.float16, torch.float64):
        assert torch.equal(model.to(dtype).columns, p) and model.columns.dtype == torch.float32
    shared = wrapped("dense").share_memory()
    assert shared.columns.is_shared() and torch.equal(shared.columns, p)


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
    assert not [name for name in model.state_dict() if name.startswith("module")]


class Checkpointed(nn.Module):
    """A part between two layers, run again in the backward, or not."""

    def __init__(self, kind, how):
        super().__init__()
        self.kind, self.how = kind, how
        self.first, self.part, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        if kind == "attention and lstm":
            self.mix, self.run = nn.MultiheadAttention(6, 2), nn.LSTM(6, 6)
        if kind == "weight norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(self.part)
        if kind == "weight norm parametrized":
            nn.utils.parametrizations.weight_norm(self.part)
        if kind == "subspace within":
            self.part = ts.lowrank.RandomSubspace(self.part, 40, seed=7)
            with torch.no_grad():
                self.part.theta.normal_()

    def middle(self, x):
        if self.kind == "weights alone":
            return nn.functional.linear(x, self.part.weight, self.part.bias)
        if self.kind == "attention and lstm":
            return self.run(self.mix(*[self.part(x)] * 3)[0])[0]
        return self.part(x)

    def forward(self, x):
        x = self.first(x).tanh()
        x = self.middle(x) if self.how is None else checkpoint(self.middle, x, use_reentrant=self.how)
        return self.last(x.tanh())


@pytest.mark.parametrize("part", ["layer", "weights alone", "attention and lstm", "weight norm",
                                  "weight norm parametrized", "subspace within"])
@each_kind
def test_checkpoints_inside_run_again_at_theta(kind, part):
    """Whatever reads a weight: parents, functions, hooks of others, lists of an LSTM's own."""
    grads = []
    for how in (None, False, True):
        torch.manual_seed(0)
        model = moved(ts.lowrank.RandomSubspace(Checkpointed(part, how), 9, kind))
        for _ in range(2):
            model(X.clone().requires_grad_()).square().sum().backward()
        grads.append(model.theta.grad)
    torch.testing.assert_close(grads[1:], grads[:1] * 2)


def test_the_module_and_its_parts_are_at_theta_by_themselves():
    model = moved(wrapped()).eval()
    assert torch.equal(model.module(X), model(X))
    assert torch.equal(model.module[0].weight, model.parameters_at()["0.weight"])
    model.module(X).square().sum().backward()
    assert model.theta.grad.abs().min() > 0


def test_threads_and_interrupts_leave_the_base_alone():
    model = moved(ts.lowrank.RandomSubspace(nn.Sequential(*[nn.Linear(6, 6), nn.Tanh()] * 5), 9)).eval()
    expected, wrong = model(X).detach(), []

    def call():
        with torch.no_grad():
            wrong.extend(not torch.equal(model(X), expected) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.module[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    assert torch.equal(model(X), expected)


def test_second_derivatives():
    model, x = moved(wrapped("sparse", dtype=torch.float64)).eval(), X.double()

    def value(theta):
        return torch.func.functional_call(network(torch.float64).eval(), model.parameters_at(theta), (x,)).exp().sum()

    hessian = torch.autograd.functional.hessian(value, model.theta.detach())
    (first,) = torch.autograd.grad(model(x).exp().sum(), model.theta, create_graph=True)
    rows = [torch.autograd.grad(g, model.theta, retain_graph=True)[0] for g in first]
    torch.testing.assert_close(torch.stack(rows), hessian)


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
    with pytest.raises(TypeError, match="RandomSubspace: module must not be scripted, got"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(torch.jit.script(nn.Linear(3, 3)), 1)
    with pytest.raises(TypeError, match="weight must be dense and float32, .* got a tensor of torch.complex64"):
        make(nn.Linear(3, 3, dtype=torch.complex64), 1)
    model = wrapped()
    with pytest.raises(ValueError, match=r"RandomSubspace.parameters_at: theta must have shape \(7,\)"):
        model.parameters_at(torch.zeros(8))
