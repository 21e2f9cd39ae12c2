"""The method `tucker` in peft against the composed weight in float64, through peft's own calls."""
import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from adapter_cases import relative
from peft_cases import ALL, LAYERS, composed, holder, net, peft, quiet, reference, stir
from torch import nn

import torch_subspace as ts
from torch_subspace.peft import TuckerConfig, TuckerLayer

pytestmark = quiet


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
    assert relative(y, reference(layer, x)) < 1e-6
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.tucker_parts.parameters())
    assert layer.base_layer.weight.grad is None

    weight = layer.base_layer.weight
    adapted.merge_adapter()
    assert layer.merged and relative(adapted(x), y) < 1e-6 and relative(layer.weight, composed_of(state, layer)) < 1e-6
    adapted.unmerge_adapter()
    assert layer.base_layer.weight is weight and torch.equal(weight, state["layer.weight"])
    assert torch.equal(adapted(x), y)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), before)
    plain = adapted.merge_and_unload()
    assert type(plain.layer) is type(LAYERS[kind][0]()) and set(plain.state_dict()) == set(state)
    assert relative(plain(x), y) < 1e-6
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
    assert relative(one, base) > 1e-3 and relative(two, base) > 1e-3 and relative(one, two) > 1e-3
    adapted.base_model.set_adapter(["one", "two"])
    both = adapted(i)
    for m in model.modules():
        if isinstance(m, TuckerLayer):
            names = [n for n in ("one", "two") if n in m.tucker_parts]
            assert relative(m.weight, composed(m, names)) < 1e-6
    adapted.merge_adapter()
    assert relative(adapted(i), both) < 1e-5
    adapted.unmerge_adapter()
    adapted.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        adapted.merge_adapter(["two"])
    assert relative(adapted(i), both) < 1e-5
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
    with pytest.raises(ValueError, match="^unscale_layer: scale must not be 0"):
        layer.unscale_layer(0)
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
    with pytest.raises(ValueError, match="NaNs detected"):
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
