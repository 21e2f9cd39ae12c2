"""The method `tucker` in peft against the composed weight in float64, through peft's and transformers' own calls."""
import copy
import dataclasses
import importlib
import json
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch_subspace as ts  # noqa: E402
import torch_subspace.peft as tp  # noqa: E402
from torch_subspace.adapters.state import layers  # noqa: E402
from torch_subspace.peft import TuckerConfig, TuckerLayer, export_lora, import_lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*save_embedding_layers", "ignore:.*second time", "ignore:.*renamed from", "ignore:Already found a",
    "ignore:.*multiple adapters", "ignore:.*find a config file", "ignore:.*not active")


class OwnForward(nn.Conv2d):
    """A layer that computes with its weight in its own way, as weight standardisation does."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def conv1d(n_out, n_in):
    return transformers.pytorch_utils.Conv1D(n_out, n_in)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 4, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (3, 7)),
    "Conv1D": (lambda: conv1d(5, 7), (3, 4, 7)),
    "embedding": (lambda: nn.Embedding(11, 5, padding_idx=2), None),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 7, 8)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 7, 8)),
    "conv2d same reflect": (lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"), (2, 4, 7, 8)),
    "conv2d replicate": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="replicate"), (2, 4, 7, 8)),
    "conv2d dilated strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 9, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 8)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 2, 3, 4, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 7)),
    "conv_transpose2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 6)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (1, 2, 3, 4, 3)),
    "own forward": (lambda: OwnForward(4, 6, 3, padding=1), (2, 4, 7, 8)),
}


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(1, 2)

    def forward(self, x):
        return self.layer(x)


def holder(kind, dtype=torch.float32):
    torch.manual_seed(0)
    make, size = LAYERS[kind]
    model = Holder(make()).to(dtype)
    if hasattr(model.layer, "nf"):
        nn.init.normal_(model.layer.weight)
    x = torch.randint(11, (3, 4)) if size is None else torch.randn(size, dtype=dtype)
    return model, x


def stir(model, name="default", size=0.3):
    """Give the adapter numbers as if it had been trained."""
    g = torch.Generator().manual_seed(len(name))
    for m in model.modules():
        if isinstance(m, TuckerLayer) and name in m.tucker_parts:
            for p in m.tucker_parts[name].parameters():
                p.data.copy_(size * torch.randn(p.shape, generator=g))
            if getattr(m.base_layer, "padding_idx", None) is not None:
                m.tucker_parts[name].factor0.data[m.base_layer.padding_idx] = 0
    return model


def composed(layer, names=("default",)):
    """The weight with the adapters' change, in float64 and by the definition."""
    w = layer.base_layer.weight.double()
    for name in names:
        part = layer.tucker_parts[name]
        change = part.core.double()
        for mode, factor in enumerate(part.factors):
            if factor is not None:
                change = torch.tensordot(factor.double(), change, dims=([1], [mode])).movedim(0, mode)
        w = w + layer.scaling[name] * change
    return w.detach()


def reference(layer, x, names=("default",)):
    plain = copy.deepcopy(layer.base_layer).double()
    plain.weight.data = composed(layer, names)
    with torch.no_grad():
        return plain(x if x.dtype == torch.int64 else x.double())


def distance(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kernel_rank", ["full", 1])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer(kind, kernel_rank):
    model, x = holder(kind)
    before, state = model(x), copy.deepcopy(model.state_dict())
    config = TuckerConfig(r=3, kernel_rank=kernel_rank, alpha=2.0, scaling="lora", target_modules=["layer"])
    adapted = peft.get_peft_model(model, config)
    layer = model.layer
    assert torch.equal(adapted(x), before)  # the core is zero
    stir(adapted)
    y = adapted(x)
    assert distance(y, reference(layer, x)) < 1e-6
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.tucker_parts.parameters())
    assert layer.base_layer.weight.grad is None

    weight = layer.base_layer.weight
    adapted.merge_adapter()
    assert layer.merged and distance(adapted(x), y) < 1e-6 and distance(layer.weight, composed_of(state, layer)) < 1e-6
    adapted.unmerge_adapter()
    assert layer.base_layer.weight is weight and torch.equal(weight, state["layer.weight"])
    assert torch.equal(adapted(x), y)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), before)
    plain = adapted.merge_and_unload()
    assert type(plain.layer) is type(LAYERS[kind][0]()) and set(plain.state_dict()) == set(state)
    assert distance(plain(x), y) < 1e-6
    assert not any(k.startswith("tucker") for m in plain.modules() for k in m.__dict__)


def composed_of(state, layer):
    part = layer.tucker_parts["default"]
    change = ts.tucker_compose(part.core.double(), [f if f is None else f.double() for f in part.factors])
    return state["layer.weight"].double() + layer.scaling["default"] * change.detach()


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d grouped", "conv_transpose1d", "embedding", "own forward"])
def test_gradients_against_the_composed_form(kind):
    model, x = holder(kind, torch.float64)
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=2, alpha=1.5, target_modules=["layer"])))
    layer = model.layer
    part = layer.tucker_parts["default"]
    assert part.core.dtype == torch.float64
    adapted(x).sin().sum().backward()
    ours = [p.grad.clone() for p in part.parameters()]
    change = part.core
    for mode, factor in enumerate(part.factors):
        if factor is not None:
            change = torch.tensordot(factor, change, dims=([1], [mode])).movedim(0, mode)
    weight = layer.base_layer.weight.detach() + 1.5 * change
    y = torch.func.functional_call(layer.base_layer, {"weight": weight}, (x,))
    want = torch.autograd.grad(y.sin().sum(), list(part.parameters()))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.up = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 8), conv1d(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, i):
        x = self.up(self.lin(self.emb(i)).relu()).mT
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x.mean(-1)))


def net():
    torch.manual_seed(0)
    return Net(), torch.randint(11, (4, 7))


ALL = ["all-linear", "all-conv", "emb"]


def test_targets_and_patterns():
    model, _ = net()
    adapted = peft.get_peft_model(model, TuckerConfig(
        r=3, alpha=6, scaling="rslora", target_modules=ALL, exclude_modules=["blocks.1.conv"], modules_to_save=["head"],
        rank_pattern={"lin": 2, "^blocks.0.conv": [4, 2]}, alpha_pattern={"up": 1.0}))
    found = {n: m for n, m in model.named_modules() if isinstance(m, TuckerLayer)}
    assert set(found) == {"emb", "lin", "up", "blocks.0.conv", "blocks.2.conv"}
    ranks = {n: m.tucker_parts["default"].ranks for n, m in found.items()}
    assert ranks["lin"] == [2, 2] and ranks["blocks.0.conv"] == [4, 2, None] and ranks["blocks.2.conv"] == [3, 3, None]
    assert found["lin"].scaling["default"] == 6 / 2**0.5 and found["up"].scaling["default"] == 1 / 3**0.5
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(".tucker_parts.default." in n or ".modules_to_save.default." in n for n in trainable)


def test_layers_to_transform_and_kernel_ranks():
    model, _ = net()
    peft.get_peft_model(nn.ModuleDict({"net": model}), TuckerConfig(
        r=2, kernel_rank=1, target_modules=["conv"], layers_to_transform=[0, 2], layers_pattern="blocks"))
    found = {n: m for n, m in model.named_modules() if isinstance(m, TuckerLayer)}
    assert set(found) == {"blocks.0.conv", "blocks.2.conv"}
    assert found["blocks.0.conv"].tucker_parts["default"].ranks == [2, 2, 1]
    model, _ = net()
    peft.get_peft_model(model, TuckerConfig(r=[2, "full"], target_modules="all-conv"))
    assert model.blocks[0].conv.tucker_parts["default"].ranks == [2, None, None]


@pytest.mark.parametrize("init", ["lecun", "kaiming", "svd"])
def test_starts(init):
    model, i = net()
    y = model(i)
    adapted = peft.get_peft_model(model, TuckerConfig(r=4, init=init, target_modules=ALL))
    assert torch.equal(adapted(i), y)
    part = model.lin.tucker_parts["default"]
    assert part.core.abs().sum() == 0 and all(f.abs().sum() > 0 for f in part.factors)
    if init == "svd":
        u = torch.linalg.svd(model.lin.base_layer.weight)[0][:, :4]
        torch.testing.assert_close(part.factor0 @ part.factor0.mT, u @ u.mT, rtol=0, atol=1e-4)
    assert model.emb.tucker_parts["default"].factor0[0].abs().sum() == 0  # the padding row


def test_several_adapters():
    model, i = net()
    base = model(i)
    adapted = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=ALL), "one")
    adapted.add_adapter("two", TuckerConfig(r=3, kernel_rank=2, alpha=0.5, target_modules="all-conv"))
    assert not any(p.requires_grad for n, p in adapted.named_parameters() if ".two." in n)
    assert not any(isinstance(m.base_layer, TuckerLayer) for m in model.modules() if isinstance(m, TuckerLayer))
    stir(stir(adapted, "one"), "two")
    one = adapted(i)
    adapted.set_adapter("two")
    two = adapted(i)
    assert {n.split(".")[-2] for n, p in adapted.named_parameters() if p.requires_grad} == {"two"}
    assert distance(one, base) > 1e-3 and distance(two, base) > 1e-3 and distance(one, two) > 1e-3
    adapted.base_model.set_adapter(["one", "two"])
    both = adapted(i)
    for m in model.modules():
        if isinstance(m, TuckerLayer):
            names = [n for n in ("one", "two") if n in m.tucker_parts]
            assert distance(m.weight, composed(m, names)) < 1e-6
    adapted.merge_adapter()
    assert distance(adapted(i), both) < 1e-5
    adapted.unmerge_adapter()
    adapted.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        adapted.merge_adapter(["two"])
    assert distance(adapted(i), both) < 1e-5
    with pytest.raises(ValueError, match="merged"):
        adapted.delete_adapter("two")
    adapted.unmerge_adapter()
    adapted.set_adapter("one")
    assert torch.equal(adapted(i), one)
    adapted.delete_adapter("two")
    assert list(adapted.peft_config) == ["one"] and torch.equal(adapted(i), one)
    plain = adapted.unload()
    assert torch.equal(plain(i), base) and not any(isinstance(m, TuckerLayer) for m in plain.modules())


def test_scale_of_a_layer():
    model, i = net()
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["lin"], alpha=2.0)))
    y, layer = adapted(i), model.lin
    layer.set_scale("default", 0.0)
    with adapted.disable_adapter():
        base = adapted(i)
    torch.testing.assert_close(adapted(i), base)
    layer.set_scale("default", 1.0)
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 6.0
    layer.unscale_layer()
    assert torch.equal(adapted(i), y)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, low_cpu_mem_usage):
    model, i = net()
    config = TuckerConfig(r=3, kernel_rank=[2], target_modules=ALL, modules_to_save=["head"])
    adapted = stir(peft.get_peft_model(model, config))
    model.head.modules_to_save["default"].weight.data.normal_()
    y = adapted(i)
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "TUCKER" and saved["kernel_rank"] == [2]
    state = peft.get_peft_model_state_dict(adapted)
    assert "base_model.model.lin.tucker_parts.core" in state and "base_model.model.head.weight" in state

    again = peft.PeftModel.from_pretrained(net()[0], tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again(i), y) and not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path, "more", is_trainable=True)
    again.set_adapter("more")
    assert torch.equal(again(i), y) and any(p.requires_grad for p in again.parameters())

    third = peft.get_peft_model(net()[0], dataclasses.replace(config, inference_mode=False))
    found = peft.set_peft_model_state_dict(third, state)
    assert not found.unexpected_keys and torch.equal(third(i), y)


def test_saving_while_merged_keeps_the_adapter(tmp_path):
    model, i = net()
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=ALL)))
    y = adapted(i)
    adapted.merge_adapter(safe_merge=True)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(net()[0], tmp_path)(i), y)
    moved = copy.deepcopy(adapted).double()
    moved.unmerge_adapter()
    assert torch.equal(model.lin._original[0].double(), moved.base_model.model.lin.base_layer.weight)


def test_merging_what_is_not_finite():
    model, i = net()
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["lin"])))
    model.lin.tucker_parts["default"].core.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        adapted.merge_adapter(safe_merge=True)
    assert not model.lin.merged and torch.isfinite(model.lin.base_layer.weight).all()


@pytest.mark.slow
def test_another_process_loads(tmp_path):
    model, i = net()
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["lin"])))
    adapted.save_pretrained(tmp_path)
    torch.save(nn.Linear(6, 8).state_dict(), tmp_path / "base.pt")
    code = ("import sys, peft, torch, torch_subspace.peft\n"
            "m = torch.nn.ModuleDict({'lin': torch.nn.Linear(6, 8)})\n"
            "m = peft.PeftModel.from_pretrained(m, sys.argv[1])\n"
            "core = m.base_model.model.lin.tucker_parts['default'].core\n"
            "print(type(m.peft_config['default']).__name__, core[0, 0].item())")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert run.stdout.split() == ["TuckerConfig", str(model.lin.tucker_parts["default"].core[0, 0].item())], run.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The registration
# ---------------------------------------------------------------------------------------------------------------------


def test_the_enum_is_whole():
    kind = peft.PeftType.TUCKER
    assert kind == kind.value == "TUCKER" and peft.PeftType("TUCKER") is kind and kind in list(peft.PeftType)
    assert pickle.loads(pickle.dumps(kind)) is kind and copy.deepcopy(kind) is kind and json.dumps(kind) == '"TUCKER"'
    assert len(set(peft.PeftType)) == len(list(peft.PeftType)) and hash(kind) == hash(peft.PeftType["TUCKER"])
    assert peft.PeftType.LORA is peft.PeftType("LORA") and repr(kind) == "<PeftType.TUCKER: 'TUCKER'>"
    config = TuckerConfig(r=3, target_modules=["a"])
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert peft.get_peft_config({"peft_type": "TUCKER", "r": 3, "target_modules": ["a"]}) == config


def test_reload_registers_once_more():
    before = list(peft.PeftType)
    try:
        importlib.reload(tp)
        assert list(peft.PeftType) == before
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["TUCKER"] is tp.TuckerConfig
    finally:
        globals().update({n: getattr(tp, n) for n in ("TuckerConfig", "TuckerLayer")})


def test_a_foreign_method_of_this_name_is_refused(monkeypatch):
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "TUCKER", peft.LoraConfig)
    with pytest.raises(ImportError, match="of its own"):
        tp._add_peft_type("TUCKER")


def test_an_enum_that_refuses_is_left_as_it_was(monkeypatch):
    before = list(peft.PeftType)
    monkeypatch.setattr(tp, "PeftType", type("Closed", (), {"__members__": {}}))
    with pytest.raises(ImportError, match="can't extend PeftType"):
        tp._add_peft_type("NEW")
    monkeypatch.undo()
    real = type.__setattr__
    try:
        tp._add_peft_type("NEWER")
        tp._drop_peft_type("NEWER")
    finally:
        assert type.__setattr__ is real
    assert list(peft.PeftType) == before and "NEWER" not in peft.PeftType.__members__
    with pytest.raises(ValueError):
        peft.PeftType("NEWER")


def test_untested_versions():
    with pytest.raises(ImportError, match="tested with peft 0.18 to 0.21; 0.17.9 is too old"):
        tp._check_version("0.17.9")
    with pytest.warns(UserWarning, match="tested with peft 0.18 to 0.21, this is 1.0.0.dev0"):
        tp._check_version("1.0.0.dev0")
    tp._check_version("0.20.1")


@pytest.mark.slow
def test_the_core_never_imports_peft():
    code = ("import sys, torch_subspace, torch_subspace.adapters.lora\n"
            "assert not {'peft', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, error, word", [
    ({"r": 0}, ValueError, "positive"), ({"r": 2.5}, TypeError, "int"), ({"init": "zeros"}, ValueError, "lecun"),
    ({"kernel_rank": "half"}, TypeError, "kernel_rank"), ({"rank_pattern": {"a": -1}}, ValueError, "positive"),
    ({"alpha_pattern": {"a": float("nan")}}, ValueError, "finite"), ({"dropout": 1.0}, ValueError, "dropout"),
    ({"bias": "all"}, ValueError, "bias"), ({"scaling": "x"}, ValueError, "scaling"),
    ({"r": ["full", "full"]}, ValueError, "full"),
    ({"layers_pattern": "h"}, ValueError, "layers_to_transform"), ({"rank_pattern": [1]}, TypeError, "dict"),
    ({"target_modules": "all-linear", "layers_to_transform": 1}, ValueError, "layers_to_transform"),
])
def test_bad_config(change, error, word):
    with pytest.raises(error, match=word):
        TuckerConfig(**({"target_modules": ["a"]} | change))


@pytest.mark.parametrize("target, word", [
    (["norm", "lin"], "LayerNorm"), (["lin", "attn"], "MultiheadAttention"), (["lin", "tied", "again"], "one module"),
    (["lin", "normed"], "weight_norm"), (["nothing"], "not found"), (["lin", "capped"], "max_norm"),
])
def test_what_cannot_be_adapted_leaves_the_model_alone(target, word):
    model, _ = net()
    model.attn, model.tied = nn.MultiheadAttention(4, 2), nn.Linear(2, 2)
    model.again, model.normed = model.tied, nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    model.capped = nn.Embedding(3, 2, max_norm=1.0)
    with pytest.raises(ValueError, match=word):
        peft.get_peft_model(model, TuckerConfig(r=2, target_modules=target))
    assert not any(isinstance(m, TuckerLayer) for m in model.modules())
    adapted = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["all-linear"]))  # leaves normed alone
    assert not isinstance(adapted.base_model.model.normed, TuckerLayer)


def test_other_methods_and_mixed_batches_are_refused():
    model, i = net()
    adapted = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["lin"]))
    with pytest.raises(ValueError, match="adapter_names"):
        adapted(i, adapter_names=["default"] * len(i))
    lora = peft.get_peft_model(net()[0], peft.LoraConfig(target_modules=["lin"])).base_model.model
    with pytest.raises(ValueError, match="another method"):
        peft.get_peft_model(lora, TuckerConfig(r=2, target_modules=["lin"]))
    with pytest.raises(ValueError, match='"full" is for convolutions'):
        peft.get_peft_model(net()[0], TuckerConfig(r=[2, "full"], target_modules=["lin"]))


# ---------------------------------------------------------------------------------------------------------------------
# Layers among others
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_parents_that_read_weights_see_the_adapter(training):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 8)
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["out_proj", "linear1", "linear2"])))
    with torch.set_grad_enabled(training):
        y = adapted(x)
        plain = adapted.merge_and_unload()
        assert distance(y, plain(x)) < 1e-5  # in eval mode torch's fast path reads the weights


def test_dropout():
    model, _ = holder("linear")
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, dropout=0.5, target_modules=["layer"])))
    x = torch.randn(64, 7)
    torch.manual_seed(1)
    one = adapted(x)
    torch.manual_seed(1)
    assert torch.equal(adapted(x), one) and not torch.equal(adapted(x), one)
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x)) and distance(adapted(x), reference(model.layer, x)) < 1e-6
    with pytest.warns(UserWarning, match="dropout has no effect on 'layer'"):
        peft.get_peft_model(holder("embedding")[0], TuckerConfig(r=3, dropout=0.5, target_modules=["layer"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "Conv1D"])
def test_half_precision_base(kind, dtype):
    model, x = holder(kind, dtype)
    before = model(x)
    adapted = peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"]), autocast_adapter_dtype=False)
    assert all(p.dtype == torch.float32 for p in model.layer.tucker_parts.parameters())
    assert torch.equal(adapted(x), before)
    y = stir(adapted)(x)
    assert y.dtype == dtype and distance(y, reference(model.layer, x)) < 0.02
    y.float().sum().backward()
    weight = model.layer.base_layer.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert torch.equal(model.layer.base_layer.weight, weight)
    assert model.layer.tucker_parts.to(dtype)["default"].core.dtype == torch.float32  # model.half() leaves them wide
    stir(adapted, size=0.01)
    with pytest.warns(UserWarning, match="half precision swallows"):
        adapted.merge_adapter()


@pytest.mark.parametrize("kind", ["linear", "conv2d reflect"])
def test_autocast(kind):
    model, x = holder(kind)
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"])))
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and distance(y, reference(model.layer, x)) < 0.02
    assert model.layer.tucker_parts["default"].core.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "own forward"])
def test_compile(kind):
    model, x = holder(kind)
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"])))
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert distance(y, adapted(x)) < 1e-6


def test_packed_base():
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = Holder(nn.Linear(64, 32))
    torchao.quantize_(model.layer, torchao.Int8WeightOnlyConfig())
    x = torch.randn(3, 64)
    before = model(x)
    adapted = peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"]))
    assert torch.equal(adapted(x), before)
    stir(adapted)
    y = adapted(x)
    assert distance(y, before.double() + x.double() @ model.layer.get_delta_weight("default").double().mT) < 1e-6
    y.sum().backward()
    assert model.layer.tucker_parts["default"].core.grad.abs().sum() > 0
    assert distance(F.linear(x, model.layer.weight, model.layer.bias), y) < 1e-5  # what a parent reads
    with pytest.raises(ValueError, match="quantised"):
        adapted.merge_adapter()


def test_hooked_base():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, x = holder("linear")
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"])))
    y = adapted(x)
    add_hook_to_module(model.layer.base_layer, ModelHook())
    assert distance(adapted(x), y) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------

BERT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32}


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))


def gpt2(**more):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, **more)
    return transformers.GPT2LMHeadModel(config).eval()


def test_default_targets_of_an_architecture():
    model = peft.get_peft_model(bert(), TuckerConfig(r=2, task_type="SEQ_CLS"))
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, TuckerLayer)}
    assert names == {"query", "value"}
    assert any("classifier.modules_to_save.default" in n for n, p in model.named_parameters() if p.requires_grad)


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(50, (48, 8), generator=g)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i, 0] % 3}


def train(folder, resume=None):
    config = TuckerConfig(r=4, dropout=0.1, task_type="SEQ_CLS", target_modules="all-linear")
    model = peft.get_peft_model(bert(), config)
    args = transformers.TrainingArguments(
        str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to=[], logging_steps=1, disable_tqdm=True, seed=3)
    trainer = transformers.Trainer(model, args, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_trainer_resumes_to_the_bit(tmp_path):
    whole, trainer = train(tmp_path / "a")
    state = {n: p.detach().clone() for n, p in whole.named_parameters() if p.requires_grad}
    assert any(".tucker_parts." in n for n in state) and any(".modules_to_save." in n for n in state)
    start = peft.get_peft_model_state_dict(whole)
    assert all(t.abs().sum() > 0 for k, t in start.items() if k.endswith(".core"))  # it has learnt
    again, _ = train(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3"))
    for n, p in again.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, state[n]), n
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "a" / "checkpoint-6").eval()
    ids = Texts().ids[:4]
    assert torch.equal(loaded(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)


def test_adapters_of_transformers_itself(tmp_path):
    try:
        gpt2().add_adapter(peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    except (ImportError, ValueError) as error:
        pytest.skip(f"not even LoRA: {error}")  # this transformers does not take this peft
    model, ids = gpt2(), torch.arange(12).view(2, 6)
    base = model(ids).logits
    model.add_adapter(TuckerConfig(r=3, target_modules=["c_attn", "c_fc"]), "one")
    assert torch.equal(model(ids).logits, base)
    stir(model, "one")
    y = model(ids).logits
    assert distance(y, base) > 1e-3
    model.disable_adapters()
    assert torch.equal(model(ids).logits, base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path))
    other = gpt2()
    other.load_adapter(str(tmp_path), "again")
    assert torch.equal(other(ids).logits, y)
    other.add_adapter(TuckerConfig(r=2, target_modules=["c_proj"]), "two")
    assert other.active_adapters() == ["two"]
    other.set_adapter("again")
    assert torch.equal(other(ids).logits, y)
    other.delete_adapter(["again", "two"])
    assert torch.equal(other(ids).logits, base)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings", "ignore:Input and output embeddings")
def test_tied_embeddings_are_untied_by_merging():
    model, ids = gpt2(), torch.arange(12).view(2, 6)
    assert model.lm_head.weight is model.transformer.wte.weight
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["wte"])))
    y, head = adapted(ids).logits, model.lm_head.weight.clone()
    adapted.merge_adapter()
    assert torch.equal(model.lm_head.weight, head) and distance(adapted(ids).logits, y) < 1e-5
    adapted.unmerge_adapter()
    assert model.lm_head.weight is model.transformer.wte.base_layer.weight
    plain = adapted.merge_and_unload()
    assert distance(plain(ids).logits, y) < 1e-5


def test_generate_and_gradient_checkpointing():
    model, ids = gpt2(), torch.arange(12).view(2, 6)
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, task_type="CAUSAL_LM", target_modules="all-linear")))
    out = adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    plain = copy.deepcopy(adapted).merge_and_unload()
    assert torch.equal(out, plain.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0))
    adapted(input_ids=ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    adapted.gradient_checkpointing_enable()
    adapted.train()
    model.config.attn_pdrop = model.config.resid_pdrop = model.config.embd_pdrop = 0.0
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    adapted(input_ids=ids, labels=ids).loss.backward()
    for n, p in adapted.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA in and out
# ---------------------------------------------------------------------------------------------------------------------


def lora(model, **more):
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["emb", "lin", "conv"], "modules_to_save": ["head"]} | more
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    torch.manual_seed(5)
    for n, p in adapted.named_parameters():
        if "lora_" in n or "modules_to_save" in n:
            p.data.normal_(0, 0.3)
        if "lora_embedding_A" in n:
            p.data[:, 0] = 0  # as training leaves the padding row
    return adapted


CHECKPOINTS = {
    "plain": {}, "rslora": {"use_rslora": True}, "dropout": {"lora_dropout": 0.1}, "above the size": {"r": 9},
    "patterns": {"rank_pattern": {"lin": 3, "blocks.1.conv": 2}, "alpha_pattern": {"lin": 5}},
    "Conv1D": {"target_modules": ["up"], "fan_in_fan_out": True},
    "one of several": {"target_modules": ["blocks.0.conv", "lin"]},
    "head alone": {"target_modules": ["lin", "head"], "modules_to_save": None},
}


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_import_lora(tmp_path, kind, standalone):
    model, i = net()
    original = lora(model, **CHECKPOINTS[kind]).eval()
    y = original(i)
    original.save_pretrained(tmp_path)
    ours = import_lora(net()[0], tmp_path, standalone=standalone).eval()
    assert distance(ours(i), y) < 3e-6
    assert isinstance(ours, nn.Module) and hasattr(ours, "peft_config") != standalone
    trainable = [p for p in ours.parameters() if p.requires_grad]
    assert trainable
    plain = ts.merge_and_unload(ours) if standalone else ours.merge_and_unload()
    assert distance(plain(i), y) < 3e-6


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_lora_out_again(tmp_path, kind, standalone):
    model, i = net()
    original = lora(model, **CHECKPOINTS[kind]).eval()
    y = original(i)
    original.save_pretrained(tmp_path / "in")
    ours = import_lora(net()[0], tmp_path / "in", "other", standalone=standalone)
    export_lora(ours, tmp_path / "out", "other")
    back = peft.PeftModel.from_pretrained(net()[0], tmp_path / "out").eval()
    assert isinstance(back.peft_config["default"], peft.LoraConfig) and distance(back(i), y) < 3e-6
    if kind in ("plain", "rslora", "patterns"):
        for key, t in peft.get_peft_model_state_dict(original).items():
            torch.testing.assert_close(peft.get_peft_model_state_dict(back)[key], t, rtol=0, atol=0)


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("rank", [3, [4, 2]])
def test_export_lora(tmp_path, standalone, rank):
    model, i = net()
    if standalone:
        model.up = nn.Linear(8, 8)
        plain = copy.deepcopy(model)
        config = ts.TuckerConfig(rank=rank, kernel_rank=2, alpha=0.7, target_modules=("all-linear", "all-conv", "emb"),
                                 save_modules="head")
        ts.adapt(model, config)
        for layer in layers(model).values():
            for p in layer.tucker.parameters():
                p.data.normal_(0, 0.3)
        adapted = model
    else:
        plain = net()[0]
        adapted = stir(peft.get_peft_model(model, TuckerConfig(r=rank, kernel_rank=2, alpha=0.7, target_modules=ALL)))
    y = adapted.eval()(i)
    export_lora(adapted, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (rank if rank == 3 else 2)
    back = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert distance(back(i), y) < 2e-6


def test_an_imported_lora_trains_as_one_more_adapter(tmp_path):
    lora(net()[0]).save_pretrained(tmp_path)
    model, i = net()
    adapted = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["lin"]), "first")
    assert import_lora(adapted, tmp_path, "second") is adapted
    adapted.set_adapter("second")
    assert torch.equal(adapted.base_model.model.lin(input=torch.eye(6)), model.lin(torch.eye(6)))
    adapted(i).sum().backward()
    assert model.lin.tucker_parts["second"].core.grad.abs().sum() > 0
    assert torch.equal(model.lin.tucker_parts["second"].core, torch.eye(4))
    state = peft.get_peft_model_state_dict(lora(net()[0]))
    other = import_lora(net()[0], (state, peft.LoraConfig(r=4, lora_alpha=6, modules_to_save=["head"])))
    assert torch.equal(other.base_model.model.lin.tucker_parts["default"].core, torch.eye(4))


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("change, word", [
    ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"target_modules": ["grouped"]}, "grouped"),
    ({"init_lora_weights": "pissa", "target_modules": ["lin"]}, "pissa"),
    ({"lora_bias": True, "target_modules": ["lin"]}, "lora_bias"),
])
def test_lora_that_is_refused(tmp_path, change, word, standalone):
    model, _ = net()
    model.grouped = nn.Conv1d(4, 4, 3, groups=2)
    lora(model, **change).save_pretrained(tmp_path)
    target, _ = net()
    target.grouped = nn.Conv1d(4, 4, 3, groups=2)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=word):
        import_lora(target, tmp_path, standalone=standalone)
    assert list(target.state_dict()) == list(before)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        import_lora(net()[0], tmp_path)
    peft.get_peft_model(net()[0], TuckerConfig(r=2, target_modules=["lin"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type TUCKER"):
        import_lora(net()[0], tmp_path)
    lora(net()[0]).save_pretrained(tmp_path)
    small, _ = net()
    small.lin = nn.Linear(6, 9)
    with pytest.raises(ValueError, match="'lin' is \\(9, 6\\) in the model"):
        import_lora(small, tmp_path)
    small, _ = net()
    small.head = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="saved module 'head'"):
        import_lora(small, tmp_path)
    del small.lin
    with pytest.raises(ValueError, match="no such layer"):
        import_lora(small, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="truncated"):
        import_lora(net()[0], tmp_path)


@pytest.mark.parametrize("kind", ["conv2d grouped", "conv2d reflect", "conv2d dilated strided", "conv_transpose1d"])
def test_what_lora_cannot_say(tmp_path, kind):
    model, _ = holder(kind)
    adapted = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match="'layer' is a .* peft's LoRA computes something else"):
        export_lora(adapted, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="no adapter 'other'; there are \\['default'\\]"):
        export_lora(adapted, tmp_path, "other")
