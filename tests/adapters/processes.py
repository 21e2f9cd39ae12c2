"""What two processes check of adapters; test_adapter_processes.py spawns them once for all of CHECKS.

A check runs in both processes, and is wrong if it raises in one of them. What it leaves wrapped is its own.
"""
import contextlib
import json
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parameter_cases import Experts
from process_cases import X, adapted, fill, gradients, near, net, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torch_subspace as ts

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function(init_device_mesh("cpu", (2,)), Path(folder))
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc()
            break  # the other process may wait for this one
    (Path(folder) / f"found{rank}").write_text(json.dumps(found))
    os._exit(0)  # a group that waits for a process that has gone is not torn down


# ------------------------------------------------------------------------------------------------------- fully_shard


@check
def save_gathers_and_the_first_process_writes(mesh, folder):
    for forward in (False, True):
        model = shard(adapted(save="2"), mesh)
        if forward:  # the outermost module keeps what it has gathered, until someone asks for its state
            model(X)
        ts.save_adapter(model, folder / f"saved{dist.get_rank()}{forward}")
        dist.barrier()
        assert (folder / f"saved0{forward}").exists() and not (folder / f"saved1{forward}").exists()
        assert torch.equal(ts.load_adapter(net(), folder / f"saved0{forward}")(X), adapted(save="2")(X))


@check
def merge_outlives_the_next_reshard(mesh, folder):
    model, plain = shard(adapted("a", "b"), mesh), adapted("a", "b")
    for which in ("a", {"a": 0.5, "b": -2.0}):
        for m in (model, plain):
            ts.set_adapter(m, which)
        want = plain(X)
        assert torch.equal(model(X), want)  # merged right after a forward, as after an evaluation
        ts.merge(model)
        near(model(X), want)
        model.reshard()
        near(model(X), want)
        state = {k: t.full_tensor() for k, t in model.state_dict().items() if "tucker" not in k}
        merged = net()
        merged.load_state_dict(state)
        near(merged(X), want)
        ts.unmerge(model)
        assert torch.equal(model(X), want)


@check
def disabled_is_the_model_of_before(mesh, folder):
    model, plain = shard(adapted(save="2"), mesh), adapted(save="2")
    optimisers = [torch.optim.SGD(ts.adapter_parameters(m), lr=0.1) for m in (model, plain)]
    for _ in range(2):
        got, want = gradients(model), gradients(plain)
        near(got, want)
        for optimiser in optimisers:
            optimiser.step()
        with ts.disabled(model):
            near(model(X), net()(X))
    near(model(X), plain(X))


@check
def parameters_asked_for_after_a_forward_are_those_of_the_shards(mesh, folder):
    model = shard(adapted(), mesh)
    model(X)
    assert all(type(p.data).__name__ == "DTensor" for p in ts.adapter_parameters(model)[0]["params"])


@check
def chosen_adapters_get_their_gradients(mesh, folder):
    model, plain = shard(adapted("a", "b"), mesh), adapted("a", "b")
    for which in ("b", "a", {"a": 0.5, "b": 2.0}, "a"):
        for m in (model, plain):
            ts.set_adapter(m, which)
        near(gradients(model), gradients(plain))


@check
def files_fill_a_sharded_adapter(mesh, folder):
    if dist.get_rank() == 0:
        ts.save_adapter(adapted(save="2"), folder / "file")
    dist.barrier()
    model = shard(adapted(save="2"), mesh)
    fill(model, 5)
    model(X)
    near(ts.load_adapter(model, folder / "file")(X), adapted(save="2")(X))
    for name, other in (("other", model), ("default", shard(net(), mesh))):
        with pytest.raises(ValueError, match="^load_adapter: .*sharded.*before fully_shard"):
            ts.load_adapter(other, folder / "file", name=name)


@check
def spectral_adapters_are_sharded_and_averaged(mesh, folder):
    def made():
        model = ts.adapt(net(), ts.SpectralConfig(2, target_modules=["0", "1.0"]))
        return fill(model)

    plain, path = made(), folder / "spectral.safetensors"
    want, sharded = plain(X), shard(made(), mesh)
    near(sharded(X), want)
    _, grads = gradients(plain)
    rank = dist.get_rank()
    sharded(X).square().sum().backward()
    for n, p in sharded.named_parameters():
        assert (p.grad is not None) == n.endswith("core"), n
    ts.save_adapter(sharded, path)  # with the vectors: no weight is at hand
    dist.barrier()
    near(ts.load_adapter(net(), path)(X), want)
    if rank == 0:
        ts.save_adapter(plain, path)  # without
    dist.barrier()
    with torch.no_grad():
        for n, p in sharded.named_parameters():
            if n.endswith("core"):
                p.zero_()
    near(ts.load_adapter(sharded, path)(X), want)
    ddp = nn.parallel.DistributedDataParallel(made())
    ddp(X[2 * rank : 2 * rank + 2]).square().mean().backward()
    for n, p in ddp.module.named_parameters():
        if n.endswith("core"):
            near(p.grad, grads[n])


@check
def what_would_be_forgotten_is_refused(mesh, folder):
    model = shard(adapted("a", "b"), mesh)
    for call, args in ((ts.merge_and_unload, ()), (ts.delete_adapter, ("a",)), (ts.adapt, (ts.TuckerConfig(2), "c"))):
        model(X)
        with pytest.raises(ValueError, match=f"^{call.__name__}: 'the model' is sharded: "):
            call(model, *args)
    plain = shard(net(), mesh)
    plain(X)  # its parameters look like any others now
    with pytest.raises(ValueError, match="^adapt: .*sharded.*before fully_shard"):
        ts.adapt(plain, ts.TuckerConfig(2))


@check
def flattened_parameters_are_trained_and_nothing_else(mesh, folder):
    inner, plain = adapted(), adapted()
    model = FullyShardedDataParallel(inner, use_orig_params=True, device_id=torch.device("cpu"))
    for _ in range(2):
        near(model(X), plain(X))
    gradients(plain)
    (model(X)**2).mean().backward()
    for given in (model, inner):
        for call, args in ((ts.save_adapter, (folder / "x",)), (ts.merge, ()), (ts.set_adapter, ("default",)),
                           (ts.load_adapter, (folder / "x",)), (ts.adapt, (ts.TuckerConfig(2), "b"))):
            with pytest.raises(ValueError, match=f"^{call.__name__}: FullyShardedDataParallel has flattened"):
                call(given, *args)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        for (_, p), (_, q) in zip(inner.named_parameters(), plain.named_parameters()):
            if q.grad is not None:
                near(p.grad, q.grad)


@check
def narrow_factors_are_computed_with_in_float32(mesh, folder):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x)[0]

    images = torch.linspace(-1, 1, 150).view(1, 6, 25)
    for layer, x in ((nn.Linear(6, 6), X), (nn.Conv1d(6, 6, 3), images), (nn.Conv2d(6, 6, 3), images.view(1, 6, 5, 5)),
                     (nn.Conv1d(6, 6, 3, groups=6), images), (nn.ConvTranspose1d(6, 6, 3), images),
                     (nn.Embedding(6, 6), torch.tensor([1, 2])), (Attention(), X.view(1, 4, 6))):
        model = ts.adapt(nn.Sequential(layer), ts.TuckerConfig(rank=2, target_modules=r"0(\.inner.*)?"))
        fill(model)
        want = model(x)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        y = model(x)
        assert y.dtype == torch.bfloat16
        assert float((y.float() - want).norm() / want.norm()) < 0.02, layer
        y.sum().backward()
        assert {p.grad.dtype for p in ts.adapter_parameters(model)[0]["params"]} == {torch.float32}


@check
def meta_then_fully_shard_then_memory(mesh, folder):
    with torch.device("meta"):
        model = net()
    shard(ts.adapt(model, ts.TuckerConfig(rank=2, target_modules=["0", "1.0"])), mesh).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    y = model(X)
    assert y.isfinite().all()
    with ts.disabled(model):
        assert torch.equal(model(X), y)
    assert all(t.full_tensor().norm() > 0 for key, t in model.state_dict().items() if "factor" in key)


# ------------------------------------------------------------------------------------------- DistributedDataParallel


@check
def what_parallelises_tensors_is_refused(mesh, folder):
    model = adapted()
    y, names = model(X), [n for n, _ in model.named_parameters()]
    refused = pytest.raises(RuntimeError, match="^adapted layer: weight = a DTensor: parallelize_module and")
    for style in (ColwiseParallel(), RowwiseParallel()):
        for context in (contextlib.nullcontext(model), ts.disabled(model)):
            with context, refused:
                parallelize_module(model, mesh, {"0": style})
    with refused:
        distribute_module(model, mesh)
    near(model(X), y)
    assert [n for n, _ in model.named_parameters()] == names
    parallelize_module(ts.merge_and_unload(model), mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
    near(model(X), y)


@check
def ddp_averages_what_is_trained_or_says_no(mesh, folder):
    x = X * (1 + dist.get_rank())
    model = adapted("a", "b")
    ts.set_adapter(model, "a")
    wrapped = nn.parallel.DistributedDataParallel(model)

    def assert_averaged():
        wrapped.zero_grad()
        (wrapped(x)**2).mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert grads
        for g in grads.values():
            both = g.clone()
            dist.all_reduce(both)
            near(g, both / 2)

    assert_averaged()
    for given in (wrapped, model):
        ts.set_adapter(given, "b")
        with pytest.raises(ValueError, match="^set_adapter: b: chosen after DistributedDataParallel took"):
            wrapped(x)
        with torch.no_grad():
            wrapped(x)
        ts.set_adapter(given, "a")
        assert_averaged()
    ts.adapt(model, ts.TuckerConfig(rank=2), name="late")
    with pytest.raises(ValueError, match="^set_adapter: late: chosen after"):
        wrapped(x)
    ts.set_adapter(model, {"a": 1.0, "b": 1.0})
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for which in ("b", "a"):
        ts.set_adapter(model, which)
        assert_averaged()


# ---------------------------------------------------------------------------------------------------------------- peft


@check
def peft_under_fully_shard(mesh, folder):
    import peft

    import torch_subspace.peft as tp

    def made():
        model = peft.get_peft_model(net(), tp.TuckerConfig(r=2, target_modules=["0", "1.0"]))
        torch.manual_seed(0)
        for n, p in model.named_parameters():
            if "tucker" in n:
                nn.init.normal_(p)
        return model

    model, plain = made(), made()
    fully_shard(model.base_model.model[1][0].base_layer, mesh=mesh)  # its hooks gather it
    shard(model.base_model.model, mesh)
    near(gradients(model), gradients(plain))
    with model.disable_adapter(), plain.disable_adapter():
        near(model(X), plain(X))
    model(X)
    with pytest.raises(ValueError, match="^tucker: a weight under fully_shard can't be merged"):
        model.merge_adapter()
    near(model(X), plain(X))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.attention, self.experts = nn.Linear(6, 4), nn.MultiheadAttention(4, 2), Experts(width=4)

    def forward(self, x):
        x = self.fc(x)
        return self.experts(self.attention(x, x, x)[0])


@check
def peft_of_experts_and_attention(mesh, folder):
    import peft

    import torch_subspace.peft as tp

    def made():
        torch.manual_seed(0)
        model = peft.get_peft_model(Mixed(), tp.TuckerConfig(
            r=2, target_modules=["attention", "fc"], target_parameters=["experts.up", "experts.down"]))
        for n, p in model.named_parameters():
            if "core" in n:
                nn.init.normal_(p)
        return model

    plain, x = made(), X * (1 + dist.get_rank())
    y, want = gradients(plain, x)
    for g in want.values():
        dist.all_reduce(g)
    sharded = made()
    for inner in sharded.base_model.model.children():
        fully_shard(inner, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (nn.parallel.DistributedDataParallel(made()), sharded):
        got, found = gradients(model, x)
        near(got, y)
        near({n.removeprefix("module."): 2 * g for n, g in found.items()}, want)
    with sharded.disable_adapter(), plain.disable_adapter():
        near(sharded(x), plain(x))


@check
def peft_under_ddp(mesh, folder):
    import peft

    import torch_subspace.peft as tp

    model = peft.get_peft_model(net(), tp.TuckerConfig(r=2, target_modules=["0"]))
    model.add_adapter("b", tp.TuckerConfig(r=2, target_modules=["0"]))
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(X).sum().backward()
    model.set_adapter("b")
    with pytest.raises(ValueError, match="^tucker: b: chosen after DistributedDataParallel took"):
        wrapped(X)
    model.set_adapter("default")
    wrapped(X).sum().backward()
