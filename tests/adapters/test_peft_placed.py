"""The method `tucker` in peft where the layer inside has hooks, or its parameters are elsewhere."""
import copy
import functools
import importlib
import pickle

import pytest
import torch
from adapter_cases import relative
from helpers import optional
from parameter_cases import Experts
from peft_cases import ALL, LAYERS, Holder, holder, net, peft, quiet, stir
from torch import nn

from torch_subspace.peft import TuckerConfig

pytestmark = quiet

PLAIN = [kind for kind in LAYERS if kind != "embedding"]


def wrapped(kind):
    """Trained, with the layer inside and an input."""
    model, x = holder(kind)
    model = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"])))
    return model, model.base_model.model.layer.base_layer, x


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


BESIDES = {"experts": (Experts, {"target_parameters": ["up", "down"]}, 5),
           "attention": (lambda: Attention(4, 2), {"target_modules": ["layer"]}, 4)}


def beside(kind):
    """Experts in one parameter, or an attention as a whole; trained."""
    make, targets, width = BESIDES[kind]
    torch.manual_seed(0)
    model = Holder(make())
    return stir(peft.get_peft_model(model, TuckerConfig(r=2, **targets))), torch.randn(3, width)


# -------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_of_the_layer_inside_surround_base_and_change(kind):
    model, base, x = wrapped(kind)
    want = model(x)
    seen = []
    handles = [base.register_forward_pre_hook(lambda m, args: seen.append(("before", m, args)) or (args[0],)),
               base.register_forward_hook(lambda m, args, y: seen.append(("after", m, y)) or 2 * y)]
    y = model(x)
    assert relative(y, 2 * want) < 1e-6
    assert [s[0] for s in seen] == ["before", "after"] and all(s[1] is base for s in seen)
    assert torch.equal(seen[0][2][0], x) and relative(seen[1][2], want) < 1e-6
    model.merge_adapter()  # and so merging changes nothing
    assert relative(model(x), y) < 1e-5
    model.unmerge_adapter()
    with model.disable_adapter():
        assert relative(model(x), 2 * base.forward(x)) < 1e-6
    for handle in handles:
        handle.remove()
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind", PLAIN)
def test_hooks_that_change_inputs(kind):
    model, base, x = wrapped(kind)
    want = model(3 * x)
    base.register_forward_pre_hook(lambda m, args: 3 * args[0])  # a bare tensor is one argument
    assert torch.equal(model(x), want)
    base.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] / 3,), kwargs), with_kwargs=True)
    assert relative(model(x), wrapped(kind)[0](x)) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "conv2d", "own forward"])
def test_hooks_of_the_backward_and_of_failures(kind):
    model, base, x = wrapped(kind)
    want = torch.autograd.grad(model(x.requires_grad_()).sum(), x)[0]
    seen = []
    base.register_full_backward_hook(lambda m, into, out: seen.append((m, into, out)) or tuple(2 * g for g in into))
    base.register_full_backward_pre_hook(lambda m, out: seen.append((m, out)))
    base.register_forward_hook(lambda m, args, kwargs, y: seen.append((m, y)), with_kwargs=True, always_call=True)
    y = model(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * want)
    assert len(seen) == 3 and all(s[0] is base for s in seen)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.ones(1))
    assert len(seen) == 4 and seen[3][1] is None


def test_hooks_of_a_compiled_model():
    model, base, x = wrapped("linear")
    base.register_forward_hook(lambda m, args, y: 2 * y)
    want = model(x)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), want)


def test_the_switch_of_peft_for_input_casting():
    helpers = optional("peft.helpers")
    model, base, x = wrapped("linear")
    want = model(x)
    with helpers.disable_input_dtype_casting(model):
        assert torch.equal(model(x), want) and not model.base_model.model.layer.cast_input_dtype_enabled
    assert model.base_model.model.layer.cast_input_dtype_enabled


# ---------------------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["peft", "offload"])
def test_offloaded_model(how, first, tmp_path):
    accelerate = optional("accelerate")

    def offload(model):
        if how == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))

    model, x = net()
    before = model(x)
    config = TuckerConfig(r=2, target_modules=ALL)
    want = stir(peft.get_peft_model(copy.deepcopy(model), config))(x)
    if first == "peft":
        adapted = stir(peft.get_peft_model(model, config))
        offload(model)
    else:
        offload(model)
        adapted = stir(peft.get_peft_model(model, config))
    for _ in range(2):
        assert relative(adapted(x), want) < 1e-6
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), before)
    adapted.add_adapter("more", config)
    adapted.set_adapter("more")
    assert torch.equal(adapted(x), before)
    adapted.set_adapter("default")
    adapted.merge_adapter()
    assert relative(adapted(x), want) < 1e-5
    adapted.unmerge_adapter()
    assert relative(adapted(x), want) < 1e-6
    assert relative(adapted.merge_and_unload()(x), want) < 1e-5


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["peft", "offload"])
def test_offloaded_experts(how, first, tmp_path):
    accelerate = optional("accelerate")
    model, x = Holder(Experts()), torch.randn(3, 5)
    before, config = model(x), TuckerConfig(r=2, target_parameters=["up", "down"])
    want = stir(peft.get_peft_model(copy.deepcopy(model), config))(x)
    if first == "peft":
        model = stir(peft.get_peft_model(model, config))
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    if first == "offload":
        model = stir(peft.get_peft_model(model, config))
    assert relative(want, before) > 1e-2 and relative(model(x), want) < 1e-6
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.merge_adapter()
    assert relative(model(x), want) < 1e-5
    model.unmerge_adapter()
    assert relative(model(x), want) < 1e-6


@pytest.fixture
def replicate(monkeypatch):
    """DataParallel's, with clones in place of its broadcast between GPUs."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape",
                        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices])
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional=False: device)
    return module.replicate


@pytest.mark.parametrize("kind", LAYERS)
def test_replicas(kind, replicate):
    model, base, x = wrapped(kind)
    for replica in replicate(model, [0, 1]):
        assert torch.equal(replica(x), model(x))
        assert torch.equal(replica.base_model.model.layer.weight, model.base_model.model.layer.weight)


@pytest.mark.parametrize("kind", BESIDES)
def test_replicas_of_experts_and_attention(kind, replicate):
    model, x = beside(kind)
    y = model(x)
    y.square().sum().backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for replica in replicate(model, [0, 1]):
        model.zero_grad()
        got = replica(x)
        got.square().sum().backward()
        assert torch.equal(got, y)
        assert all(relative(p.grad, want[n]) < 1e-6 for n, p in model.named_parameters() if n in want)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d", "conv2d reflect", "conv1d circular"])
def test_forwards_that_are_replaced_later(kind):
    """As diffusers' layerwise casting: the weight is narrow but while its layer runs."""
    model, base, x = wrapped(kind)
    base.to(torch.float8_e4m3fn).to(torch.float32)
    want = model(x)
    inner = base.forward

    def forward(self, *args, **kwargs):
        self.to(torch.float32)
        y = inner(*args, **kwargs)
        self.to(torch.float8_e4m3fn)
        return y

    base.forward = functools.update_wrapper(functools.partial(forward, base), inner)
    base.to(torch.float8_e4m3fn)
    for _ in range(2):
        assert relative(model(x), want) < 1e-6


def test_pickles_after_an_in_place_compile():
    model, base, x = wrapped("conv2d")
    want = model(x)
    model.base_model.model.layer.compile(backend="eager")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), want)


def test_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Embedding(5, 6, padding_idx=1))
    config = {"r": 2, "target_modules": ["0", "1"]}
    with pytest.raises(ValueError, match='init="svd" needs the weight of .*, which is on the meta device'):
        peft.get_peft_model(copy.deepcopy(model), TuckerConfig(**config, init="svd"))
    model = peft.get_peft_model(model, TuckerConfig(**config))
    with pytest.raises(ValueError, match="^tucker: the weight is on the meta device"):
        model.merge_adapter()
    model.to_empty(device="cpu")
    layer = model.base_model.model[0]
    assert not layer.tucker_parts["default"].core.any() and layer.tucker_parts["default"].factor0.any()
    assert not model.base_model.model[1].tucker_parts["default"].factor0[1].any()
