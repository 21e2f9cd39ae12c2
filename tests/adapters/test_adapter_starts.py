"""Where adapters start, LoRA's place among others, and what of them is trained: all, or the cores alone."""

import pytest
import torch
from adapter_cases import Box, adapted, boxed, gradients, net, parts_of, relative, state_of
from helpers import normal
from parameter_cases import adapted as adapted_parameters
from torch import nn

import torch_subspace as ts
from torch_subspace.adapters.parameters import modes_of

KINDS = ["linear", "linear_own_forward", "conv1d_of_transformers", "embedding_padding", "conv2d_grouped",
         "conv2d_depthwise", "conv3d", "transposed2d", "attention_kdim"]


def layers_of(model):
    return [m for m in model.modules() if hasattr(m, "tucker")]


class TestAsLora:
    @pytest.mark.parametrize("kind", KINDS)
    def test_changes_nothing_and_learns_first_where_lora_does(self, kind, tmp_path):
        before, inputs, more = boxed(kind)
        want = before(*inputs, **more)
        model, _, _ = adapted(kind, init="lora")
        assert torch.equal(model(*inputs, **more), want)
        gradients(model, inputs, more)
        for layer in layers_of(model):
            for parameter, part in layer.tucker["default"].items():
                given, out = modes_of(layer, parameter)
                assert not part.factors[out].any() and part.factors[1 - out].any()
                assert part.factors[out].grad.any() and not part.core.grad.any()
        with torch.no_grad():
            for layer in layers_of(model):
                for parameter, part in layer.tucker["default"].items():
                    part.factors[modes_of(layer, parameter)[1]][: 9 if kind != "embedding_padding" else 2].normal_()
        changed = model(*inputs, **more)
        assert not torch.equal(changed, want)
        ts.save_adapter(model, tmp_path / "a.safetensors")
        assert torch.equal(ts.load_adapter(before, tmp_path / "a.safetensors")(*inputs, **more), changed)
        assert relative(ts.merge(model)(*inputs, **more), changed) < 1e-5
        assert torch.equal(ts.unmerge(model)(*inputs, **more), changed)
        with ts.disabled(model):  # attention takes torch's fast path then
            assert relative(model(*inputs, **more), want) < 1e-6

    @pytest.mark.parametrize("make", [
        lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0)])
    def test_the_first_step_is_loras(self, make):
        torch.manual_seed(0)
        model, x, y = Box(nn.Linear(12, 9)).double(), normal(20, 12, seed=1), normal(20, 9, seed=2)
        weight, bias = model.layer.weight.detach().clone(), model.layer.bias.detach()
        ts.adapt(model, ts.TuckerConfig(rank=4, alpha=8, scaling="lora", init="lora"))
        part = parts_of(model)["layer.weight"]
        bound = 1 / 12**0.5  # kaiming_uniform with a = sqrt(5), peft's
        assert 0.8 * bound < part.factor1.abs().max() <= bound
        assert torch.equal(part.core, torch.eye(4, dtype=torch.float64))

        a = part.factor1.detach().mT.clone().requires_grad_()
        b = torch.zeros(9, 4, dtype=torch.float64, requires_grad=True)
        theirs, ours = make([a, b]), make(list(ts.adapter_parameters(model)))
        (nn.functional.linear(x, weight + 2 * b @ a, bias) - y).square().mean().backward()
        (model(x) - y).square().mean().backward()
        theirs.step()
        ours.step()
        assert relative(model.layer.weight - weight, 2 * b @ a) < 1e-12

    def test_the_core_of_a_kernel_begins_in_the_middle(self):
        part = parts_of(adapted("conv2d", rank=(3, 2), init="lora")[0])["layer.weight"]
        assert torch.equal(part.core[:, :, 1, 1], torch.eye(3, 2)) and part.core.count_nonzero() == 2

    @pytest.mark.parametrize("transposed", [False, True])
    def test_experts_begin_alike(self, transposed):
        model, x = adapted_parameters(config={"init": "lora"}, transposed=transposed)
        with ts.disabled(model):
            bare = model(x)
        assert torch.equal(model(x), bare)
        part = parts_of(model)["experts.up"]
        given, out = (1, 2) if transposed else (2, 1)
        assert not part.factors[out].any() and part.factors[given].any()
        assert torch.equal(part.core, torch.eye(2).expand(3, 2, 2))

    def test_starts_again_off_the_meta_device(self):
        with torch.device("meta"):
            model = ts.adapt(Box(nn.Linear(6, 5)), ts.TuckerConfig(rank=2, init="lora"))
        part = parts_of(model.to_empty(device="cpu"))["layer.weight"]
        assert not part.factor0.any() and part.factor1.any() and torch.equal(part.core, torch.eye(2))


class TestCoreAlone:
    def trained(self, model):
        return {n for n, p in model.named_parameters() if p.requires_grad}

    def test_only_cores_are_trained_whatever_is_switched(self):
        model, x = net()
        ts.adapt(model, ts.TuckerConfig(rank=2, train="core", save_modules="head"), "small")
        cores = {n for n, _ in model.named_parameters() if n.endswith("core")}
        assert self.trained(model) == cores | {"head.weight", "head.bias"} and len(cores) == 3
        ts.adapt(model, ts.TuckerConfig(rank=2), "whole")
        assert sum("small" in n for n in self.trained(model)) == 0
        assert sum(".factor" in n for n in self.trained(model)) == 6
        ts.set_adapter(model, {"small": 1.0, "whole": 1.0})
        assert {n for n in self.trained(model) if "small" in n} == cores
        with ts.disabled(model):
            pass
        ts.delete_adapter(model, "whole")
        assert {n for n in self.trained(model) if "small" in n} == cores

    @pytest.mark.parametrize("init", ["lecun", "kaiming", "svd"])
    def test_learns_and_leaves_the_factors(self, init, tmp_path):
        model, x = net()
        ts.adapt(model, ts.TuckerConfig(rank=2, init=init, train="core"))
        groups = ts.adapter_parameters(model, lr=0.1)
        assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.core.numel()
                                                                         for p in parts_of(model).values())
        before, start = model(x), state_of(model)
        opt = torch.optim.SGD(groups)
        model(x).square().sum().backward()
        opt.step()
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, start[n])}
        assert moved and all(n.endswith("core") for n in moved) and not torch.equal(model(x), before)
        assert f"trainable {sum(p.core.numel() for p in parts_of(model).values())} of" in ts.adapter_summary(model)

        path = tmp_path / "core.safetensors"
        ts.save_adapter(model, path)
        for other in (net()[0], ts.adapt(net()[0], ts.TuckerConfig(rank=2))):  # a plain one; all of it trained so far
            ts.load_adapter(other, path)
            assert torch.equal(other(x), model(x)) and self.trained(other) == self.trained(model)
        merged = ts.merge_and_unload(other)
        assert relative(merged(x), model(x)) < 1e-5

    def test_of_experts(self):
        model, _ = adapted_parameters(config={"train": "core"})
        assert self.trained(model) == {n for n, _ in model.named_parameters() if n.endswith(".core")}


@pytest.mark.parametrize("config, match", [
    ({"train": "factors"}, "train must be one of all, core, got 'factors'"), ({"train": None}, "train must be one of"),
    ({"init": "loRA"}, "init must be one of"),
    ({"train": "core", "init": "lora"}, 'train="core" needs an init whose factors are not zero, got init="lora"')])
def test_what_a_config_refuses(config, match):
    peft_config = pytest.importorskip("torch_subspace.peft", exc_type=ImportError).TuckerConfig
    for make in (ts.TuckerConfig, peft_config):
        with pytest.raises(ValueError, match=f"TuckerConfig: {match}"):
            make(**config)


class TestWithPeft:
    def adapted(self, **config):
        peft = pytest.importorskip("peft")
        from torch_subspace.peft import TuckerConfig

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        return peft, model, TuckerConfig, {"r": 2, "target_modules": ["0"]} | config

    @pytest.mark.parametrize("where", [{}, {"target_modules": None, "target_parameters": ["0.weight", "2.weight"]},
                                       {"target_modules": ["2"], "target_parameters": ["0.bias_of"]}])
    def test_starts_as_lora_does(self, where):
        peft, model, config, options = self.adapted(init="lora", **where)
        if "target_parameters" in where and where["target_modules"]:
            model[0].bias_of = nn.Parameter(torch.randn(4, 6, 8))
        x = torch.randn(5, 6)
        before = model(x)
        made = peft.get_peft_model(model, config(**options))
        assert torch.equal(made(x), before)
        zero = [n for n, p in made.named_parameters() if "tucker_" in n and not p.any()]
        assert zero and not any("core" in n for n in zero)

    @pytest.mark.parametrize("where", [{}, {"target_modules": None, "target_parameters": ["stack"]}])
    def test_only_cores_are_trained(self, where, tmp_path):
        peft, model, config, options = self.adapted(train="core", **where)
        model[0].stack = nn.Parameter(torch.randn(4, 6, 8))
        made = peft.get_peft_model(model, config(**options))

        def trained(name):
            return {n.rpartition(name)[2] for n, p in made.named_parameters() if p.requires_grad}

        assert all(n.endswith("core") for n in trained("default")) and len(trained("default")) == 1
        made.add_adapter("other", config(**options))
        made.set_adapter("other")
        assert all(n.endswith("core") for n in trained("other"))
        if hasattr(made.base_model, "set_requires_grad"):
            made.base_model.set_requires_grad(["default", "other"])
            assert all(n.endswith("core") for n in trained("default"))
        with torch.no_grad():
            for n, p in made.named_parameters():
                if n.endswith("core"):
                    p.normal_()
        x = torch.randn(5, 6)
        made.save_pretrained(tmp_path, selected_adapters=["default"])
        made.set_adapter("default")
        torch.manual_seed(1)
        plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        plain[0].stack = nn.Parameter(model[0].stack.detach().clone())
        for own, there in zip((plain[0], plain[2]), (made.base_model.model[0], model[2]), strict=True):
            base = getattr(there, "base_layer", there)
            own.load_state_dict({k: t for k, t in base.state_dict().items() if k in own.state_dict()})
        again = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
        assert torch.equal(again(x), made(x))
        assert all(n.endswith("core") for n, p in again.named_parameters() if p.requires_grad)
