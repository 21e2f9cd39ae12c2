"""Adapted layers whose parameters are elsewhere: offloaded by accelerate, in DataParallel's replicas, on the meta
device, in float8; and what copies and pickles of them hold."""
import copy
import functools
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import KINDS, Box, adapted, boxed, disturb, net, parts_of, relative, written
from helpers import close, optional
from torch import nn

import torch_subspace as ts

CPU = torch.device("cpu")
PARENTS = "attention", "encoder", "swin", "timm_attention"  # read the weights of layers that are elsewhere themselves


# ------------------------------------------------------------------------------------------------------------ offload


def offload(how, model, folder):
    accelerate = optional("accelerate")
    names = {n: "disk" if i % 2 else "cpu" for i, (n, _) in enumerate(model.named_children())}
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=CPU)
    if how == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device=CPU)
    return accelerate.dispatch_model(model, names, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith(PARENTS)])
def test_offloaded_kinds(kind, tmp_path):
    model, inputs, more = boxed(kind)
    plain = copy.deepcopy(model)
    torch.manual_seed(3)  # factors alike, whichever comes first
    ts.adapt(plain, ts.TuckerConfig(rank=3, target_modules=r"layer.*"))
    want = disturb(plain)(*inputs, **more)
    for first in ("adapt", "offload"):
        model = boxed(kind)[0]
        for step in ("adapt", "offload") if first == "adapt" else ("offload", "adapt"):
            if step == "offload":
                offload("cpu", model, tmp_path)
                continue
            torch.manual_seed(3)
            disturb(ts.adapt(model, ts.TuckerConfig(rank=3, target_modules=r"layer.*")))
        for _ in range(2):
            assert torch.equal(model(*inputs, **more), want), first


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
@pytest.mark.parametrize("first", ["adapt", "offload"])
def test_offloaded_model(how, first, tmp_path):
    accelerate = optional("accelerate")
    file = tmp_path / "adapter"
    trained, x = net()
    ts.save_adapter(disturb(ts.adapt(trained, ts.TuckerConfig(rank=2))), file)
    want, before = trained(x).detach(), net()[0](x).detach()
    model = net()[0]
    if first == "adapt":
        ts.load_adapter(model, file)
        offload(how, model, tmp_path / "away")
    else:
        offload(how, model, tmp_path / "away")
        ts.load_adapter(model, file)
    assert torch.equal(model(x), want)
    with ts.disabled(model):
        assert torch.equal(model(x), before)
    assert all("tucker" in n for n, p in model.named_parameters() if p.requires_grad)
    ts.save_adapter(model, tmp_path / "again")
    assert torch.equal(ts.load_adapter(net()[0], tmp_path / "again")(x), want)
    with pytest.raises(ValueError, match="^merge: .* on the meta device, without values or offloaded"):
        ts.merge(model)
    assert torch.equal(model(x), want) and torch.equal(copy.deepcopy(model)(x), want)
    if first == "offload":  # factors that are here are trained
        model(x).sum().backward()
        assert all(p.grad is not None for p in ts.adapter_parameters(model)[0]["params"])
    else:
        with pytest.raises(ValueError, match="^adapter_parameters: the factors of .* are offloaded, and no step"):
            ts.adapter_parameters(model)
    ts.delete_adapter(model, "default")
    assert torch.equal(model(x), before)
    ts.load_adapter(model, file)
    assert torch.equal(model(x), want)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), want)
    if how != "dispatch":
        assert relative(ts.merge_and_unload(model)(x), want) < 1e-6


def test_offloaded_saved_modules_are_refused(tmp_path):
    trained, x = written(tmp_path / "a")
    offload("cpu", trained, tmp_path)
    for call in (lambda: ts.set_adapter(trained, None), lambda: ts.disabled(trained).__enter__()):
        with pytest.raises(ValueError, match="^(set_adapter|disabled): 'head.weight' is on the meta device"):
            call()
        assert ts.active_adapters(trained) == {"default": 1.0}
    model = net()[0]
    offload("cpu", model, tmp_path)
    with pytest.raises(ValueError, match="^load_adapter: .*'head', which is saved whole, is offloaded"):
        ts.load_adapter(model, tmp_path / "a")
    ts.save_adapter(trained, tmp_path / "b")
    assert torch.equal(ts.load_adapter(net()[0], tmp_path / "b")(x), trained(x))


def test_blocks_that_are_offloaded_as_one(tmp_path):
    accelerate = optional("accelerate")
    ts.save_adapter(ts.adapt(boxed("linear")[0], ts.TuckerConfig(rank=2)), tmp_path / "a")
    model, inputs, _ = boxed("linear")
    want = model(*inputs)
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=["Box"])
    for call in (lambda: ts.adapt(model, ts.TuckerConfig(rank=2)), lambda: ts.load_adapter(model, tmp_path / "a")):
        with pytest.raises(ValueError, match="'the model' is offloaded as a block"):
            call()
        assert torch.equal(model(*inputs), want)


def test_svd_of_an_offloaded_weight(tmp_path):
    model, x = net()
    want = ts.adapt(copy.deepcopy(model), ts.TuckerConfig(rank=2, target_modules="fc", init="svd"))
    offload("cpu", model, tmp_path)
    torch.manual_seed(0)
    ts.adapt(model, ts.TuckerConfig(rank=2, target_modules="fc", init="svd"))
    for (_, a), (_, b) in zip(sorted(parts_of(model).items()), sorted(parts_of(want).items())):
        assert relative(a.factor0 @ a.factor0.mT, b.factor0 @ b.factor0.mT) < 1e-4


def test_moving_an_adapted_model_leaves_the_change_out_of_its_weights():
    hooks, modeling = optional("accelerate.hooks"), optional("accelerate.utils.modeling")
    model, x = net()
    disturb(ts.adapt(model, ts.TuckerConfig(rank=2)))
    weight = model.stem._parameters["weight"].detach().clone()
    hooks.add_hook_to_module(model.stem, hooks.AlignDevicesHook(execution_device=CPU))
    modeling.set_module_tensor_to_device(model.stem, "weight", "cpu", value=weight)
    assert torch.equal(model.stem._parameters["weight"], weight) and not model.stem._parameters["weight"].requires_grad
    hooks.remove_hook_from_module(model.stem)
    want = model(x)
    assert torch.equal(ts.unmerge(ts.merge(model))(x), want)
    ts.delete_adapter(model, "default")  # accelerate has left the method of an adapted layer behind
    assert torch.equal(model(x), net()[0](x))
    pickle.dumps(model.body)


# ----------------------------------------------------------------------------------------------------------- replicas


@pytest.fixture
def replicate(monkeypatch):
    """DataParallel's replicas, but for the broadcast to GPUs."""

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape",
                        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices])
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional=False: device)
    return module.replicate


@pytest.mark.parametrize("kind", KINDS)
def test_replicas(kind, replicate):
    model, inputs, more = adapted(kind)
    disturb(model)
    if kind.startswith("encoder"):
        model.train()  # torch's fast path asks a replica's plain tensors for parameters, without adapters too
    want = model(*inputs, **more)
    factors = [p for part in parts_of(model).values() for p in part.parameters()]
    expected = torch.autograd.grad(want.square().sum(), factors)
    for replica in replicate(model, [0, 1]):
        y = replica(*inputs, **more)
        assert torch.equal(y, want)
        for g, e in zip(torch.autograd.grad(y.square().sum(), factors), expected):
            torch.testing.assert_close(g, e)
    with ts.disabled(model):
        want = boxed(kind)[0].train(model.training)(*inputs, **more)
        assert relative(replicate(model, [0])[0](*inputs, **more), want) < 1e-6


# ------------------------------------------------------------------------------------------------------------- float8


class Cast(nn.Linear):
    """As ComfyUI's layers: the weight is kept narrow, and cast for every product."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def cast_layerwise(module, storage, compute):
    """diffusers' enable_layerwise_casting."""
    inner = module.forward

    def forward(self, *args, **kwargs):
        self.to(compute)
        y = inner(*args, **kwargs)
        self.to(storage)
        return y

    module.forward = functools.update_wrapper(functools.partial(forward, module), inner)
    module.to(storage)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_factors_stay_wide(dtype):
    model = disturb(ts.adapt(net()[0], ts.TuckerConfig(rank=2)))
    before = [p.clone() for part in parts_of(model).values() for p in part.parameters()]
    model.stem.to(dtype), model.body.to(dtype)
    model.to(torch.float32)
    after = [p for part in parts_of(model).values() for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("first", ["adapt", "cast"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting(first, compute):
    model, x = net()
    narrow = copy.deepcopy(model)
    for m in (narrow.stem, narrow.body["fc"]):
        m.to(torch.float8_e4m3fn).to(torch.float32)
    config = ts.TuckerConfig(rank=2, target_modules="fc" if first == "cast" else ("stem", "fc"))
    torch.manual_seed(0)
    want = disturb(ts.adapt(narrow, config))(x)
    model.to(compute)
    if first == "adapt":
        torch.manual_seed(0)
        disturb(ts.adapt(model, config))
    for m in (model.stem, model.body["fc"]):
        cast_layerwise(m, torch.float8_e4m3fn, compute)
    if first == "cast":
        torch.manual_seed(0)
        disturb(ts.adapt(model, config))
    for _ in range(2):
        assert relative(model(x.to(compute)), want) < (1e-6 if compute == torch.float32 else 2e-2)
    with pytest.raises(ValueError, match="^merge: the weight of .*quantised"):
        ts.merge(model)


def test_float8_bases():
    torch.manual_seed(0)
    wide = Box(Cast(6, 5))
    model = copy.deepcopy(wide).to(torch.float8_e4m3fn)
    torch.manual_seed(0)
    disturb(ts.adapt(model, ts.TuckerConfig(rank=2)))
    assert {p.dtype for p in parts_of(model)["layer.weight"].parameters()} == {torch.float32}
    torch.manual_seed(0)
    want = disturb(ts.adapt(wide.to(torch.float8_e4m3fn).to(torch.float32), ts.TuckerConfig(rank=2)))
    x = torch.randn(3, 6)
    assert relative(model(x), want(x)) < 1e-6
    assert relative(model.layer.weight, want.layer.weight) < 1e-6  # as a parent would read it
    with pytest.raises(ValueError, match="packed.*only works for Linear"):
        ts.adapt(Box(nn.Conv1d(4, 4, 3).to(torch.float8_e5m2)), ts.TuckerConfig(rank=2, target_modules="layer"))


# --------------------------------------------------------------------------------------------------------------- meta


def test_an_adapter_on_meta_starts_when_it_gets_memory():
    with torch.device("meta"):
        model = Box(nn.Sequential(nn.Linear(6, 8), nn.Embedding(5, 6, padding_idx=1)))
    with pytest.raises(ValueError, match='init="svd" needs the weight of .*, which is on the meta device'):
        ts.adapt(model, ts.TuckerConfig(rank=2, init="svd", target_modules="all-linear"))
    ts.adapt(model, ts.TuckerConfig(rank=2, target_modules=["0", "1"]))
    for call in (lambda: ts.save_adapter(model, "x"), lambda: ts.merge(model)):
        with pytest.raises(ValueError, match="on the meta device"):
            call()
    model.to_empty(device="cpu")
    for part in parts_of(model).values():
        assert not part.core.any() and all(f.isfinite().all() and f.any() for f in part.factors)
    assert not parts_of(model)["layer.1.weight"].factor0[1].any()
    plain = nn.Sequential(nn.Linear(6, 8), nn.Embedding(5, 6, padding_idx=1))
    model.layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(3, 6)
    assert torch.equal(model.layer[0](x), plain[0](x))
    disturb(model)
    layer, before = model.layer[0], model.layer[0]._parameters["weight"].detach().clone()
    change = (layer.weight - before).detach()
    layer.reset_parameters()  # writes into the weight, not into what it makes with the change
    assert relative(layer._parameters["weight"], before) > 0.1
    close(layer.weight, layer._parameters["weight"] + change, 1e-6)


def test_load_on_meta(tmp_path):
    trained, x = written(tmp_path / "a")
    for adapted_before in (False, True):
        with torch.device("meta"):
            model = net()[0]
        if adapted_before:
            ts.adapt(model, ts.TuckerConfig(rank=2, alpha=3.0, save_modules="head"))
        ts.load_adapter(model, tmp_path / "a")
        base = {k: t for k, t in net()[0].state_dict().items() if not k.startswith("head")}
        model.load_state_dict(base, strict=False, assign=True)
        assert torch.equal(model.eval()(x), trained(x))
        ts.save_adapter(model, tmp_path / "b")
        assert torch.equal(ts.load_adapter(net()[0], tmp_path / "b")(x), trained(x))
        with pytest.raises(ValueError, match="^set_adapter: 'head.weight' is on the meta device"):
            ts.set_adapter(model, None)  # the head of before has no values
        ts.merge(model)
        assert relative(model(x), trained(x)) < 1e-6


# ------------------------------------------------------------------------------------------------------------- copies


def test_pickles_after_an_in_place_compile():
    model, x = net()
    disturb(ts.adapt(model, ts.TuckerConfig(rank=2)))
    want = model(x)
    model.stem.compile(backend="eager")
    model.compile(backend="eager")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), want) and again.stem._compiled_call_impl is None
        ts.delete_adapter(again, "default")
        assert torch.equal(again(x), net()[0](x))
