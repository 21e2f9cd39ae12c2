"""`target_parameters` of the method `tucker` in peft, beside what `torch_subspace.adapt` does with them."""

import copy
import io
import json

import pytest
import torch
from adapter_cases import gradients, parts_of
from helpers import close
from parameter_cases import Batched, Experts, mixture
from peft_cases import peft, quiet, transformers
from torch import nn

import torch_subspace as ts
from torch_subspace.adapters.peft_parameters import TuckerParameters
from torch_subspace.peft import TuckerConfig, export_lora

pytestmark = quiet
BOTH = ["experts.up", "experts.down"]


def adapted(kind=Experts, **config):
    model, x = mixture(kind, transposed=config.pop("transposed", False))
    config = {"r": 2, "alpha": 1.5, "target_modules": [], "target_parameters": BOTH} | config
    return peft.get_peft_model(model, TuckerConfig(**config)), x


@torch.no_grad()
def stir(model, name="default"):
    for n, p in model.named_parameters():
        if f"tucker_parts.{name}." in n and n.endswith("core"):
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def like_ours(model, **config):
    """The plain model with `adapt`'s adapter of the same numbers."""
    other, _ = mixture()
    config = {"rank": 2, "alpha": 1.5, "target_modules": (), "target_parameters": BOTH} | config
    ts.adapt(other, ts.TuckerConfig(**config))
    tensors = {n: p for n, p in model.named_parameters() if "tucker_parts" in n}
    with torch.no_grad():
        for key, part in parts_of(other).items():
            place, _, parameter = key.rpartition(".")
            for n, p in part.named_parameters():
                p.copy_(tensors[f"base_model.model.{place}.tucker_parts.default.{parameter}_{n}"])
    return other


@pytest.mark.parametrize("transposed", [False, True])
def test_the_same_as_adapt(transposed):
    plain, x = mixture(transposed=transposed)
    before = plain(x)
    model, x = adapted(transposed=transposed)
    assert torch.equal(model(x), before)
    stir(model)
    if not transposed:
        other = like_ours(model)
        y, found = gradients(model, [x])
        y2, expected = gradients(other, [x])
        assert torch.equal(y, y2) and len(found) == len(expected) == 6
        for a, b in zip(sorted(g.norm() for g in found.values()), sorted(g.norm() for g in expected.values())):
            close(a, b, 1e-6)
    y, experts = model(x), model.base_model.model.experts
    weight = experts.base_layer.up
    assert isinstance(experts, TuckerParameters)
    close(experts.up, weight + experts.get_delta_weight("default", "up"), 1e-6)
    model.merge_adapter()
    close(model(x), y, 1e-5)
    assert torch.equal(experts.up, experts.base_layer.up) and not torch.equal(experts.up, weight)
    model.unmerge_adapter()
    assert experts.base_layer.up is weight and torch.equal(model(x), y)
    with model.disable_adapter():
        assert torch.equal(model(x), before) and experts.up is weight
    for other in (copy.deepcopy(model), _through_a_file(model)):
        assert torch.equal(other(x), y)
    merged = copy.deepcopy(model).merge_and_unload()
    close(merged(x), y, 1e-5)
    unloaded = model.unload()
    assert torch.equal(unloaded(x), before)
    for m in (merged, unloaded):
        assert type(m.experts) is Experts and list(m.state_dict()) == list(plain.state_dict())


def _through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_what_is_saved_is_loaded_under_any_name(tmp_path):
    model, x = adapted(rank_pattern={"experts.up": 3, "experts.down": ["full", 2]}, alpha_pattern={"experts": 2.0},
                       target_modules=["fc"])
    y = stir(model)(x)
    assert {n: p.shape for n, p in model.named_parameters() if "up_" in n or "down_" in n} == {
        f"base_model.model.experts.tucker_parts.default.{n}": torch.Size(s) for n, s in {
            "up_core": (3, 3, 3), "up_factor1": (7, 3), "up_factor2": (5, 3), "down_core": (3, 5, 2),
            "down_factor2": (7, 2)}.items()}
    assert model.base_model.model.experts.scaling == {"default": 2.0}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(BOTH)
    for name, low in (("default", False), ("other", False), ("other", True)):
        loaded = peft.PeftModel.from_pretrained(mixture()[0], tmp_path, adapter_name=name, low_cpu_mem_usage=low)
        assert torch.equal(loaded(x), y)
    second, _ = adapted()
    result = second.load_adapter(tmp_path, "second")
    assert not result.missing_keys and not result.unexpected_keys
    second.set_adapter("second")
    assert torch.equal(second(x), y)


def test_several_adapters_and_other_parameters():
    model, x = adapted(target_parameters=["up"])
    one = stir(model)(x)
    model.add_adapter("two", TuckerConfig(r=3, target_modules=[], target_parameters=["experts.down"]))
    assert torch.equal(model(x), one)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 and all(".default." in n for n in trainable)
    model.set_adapter("two")
    stir(model, "two")
    two = model(x)
    assert not torch.allclose(two, one)
    assert all(".two." in n for n, p in model.named_parameters() if p.requires_grad)
    model.merge_adapter(["default", "two"])
    experts = model.base_model.model.experts
    assert experts.merged_adapters == ["default", "two"] and len(experts._original) == 2
    model.unmerge_adapter()
    assert torch.equal(model(x), two)
    model.delete_adapter("two")
    assert torch.equal(model(x), one) and list(experts.tucker_parts) == ["default"]


def test_an_adapter_that_is_not_finite_is_not_merged():
    model, x = adapted()
    stir(model)
    experts = model.base_model.model.experts
    up = experts.base_layer.up
    with torch.no_grad():
        experts.tucker_parts["default"].down_core[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert experts.base_layer.up is up and not experts.merged


def test_a_layers_weight_is_the_layer():
    model, x = adapted(target_parameters=["fc.weight"])
    assert type(model.base_model.model.fc).__name__ == "TuckerLinear"
    both, _ = adapted(target_parameters=["fc.weight", "experts.up"], target_modules=["fc"])
    assert type(both.base_model.model.fc).__name__ == "TuckerLinear" and torch.equal(both(x), mixture()[0](x))


def test_a_module_that_also_holds_layers():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 5)

        def forward(self, x):
            return self.fc(x) @ self.table

    torch.manual_seed(0)
    plain, x = nn.Sequential(Table(), nn.Linear(5, 2)), torch.randn(4, 5)
    config = TuckerConfig(r=2, target_modules=["fc"], target_parameters=["table"])
    model = stir(peft.get_peft_model(copy.deepcopy(plain), config))
    y = model(x)
    assert not torch.allclose(y, plain(x))
    with pytest.raises(ValueError, match="is or lies in '0', whose parameters are adapted"):
        model.add_adapter("other", TuckerConfig(r=2, target_modules=["fc"]))
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    merged = model.merge_and_unload()
    close(merged(x), y, 1e-5)
    assert not any("tucker" in n for n, _ in merged.named_modules()) and type(merged[0].fc) is nn.Linear


def test_what_cannot_be_adapted_is_refused_and_nothing_is_changed():
    cases = [
        ({"target_parameters": ["experts.upp"]}, "no parameter matches target_parameters 'experts.upp'; candidates: "
                                                 "'experts.up'"),
        ({"target_parameters": ["out"]}, r"Targeting an nn.Parameter on the top-level module is not supported \(param"),
        ({"target_parameters": ["fc.bias"]}, r"'fc' is a Linear, whose bias of shape \(5,\) is neither a matrix"),
        ({"target_modules": ["experts"]}, "no Tucker adapter"),
    ]
    for config, message in cases:
        model, _ = mixture()
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(model, TuckerConfig(r=2, **config))
        assert type(model.experts) is Experts and type(model.fc) is nn.Linear
    with pytest.raises(TypeError, match="target_parameters must be a list"):
        TuckerConfig(target_parameters="up")
    for make in (lambda: nn.ParameterList([torch.randn(3, 4)]), lambda: nn.MultiheadAttention(4, 2)):
        box = nn.ModuleDict({"m": make(), "fc": nn.Linear(3, 3)})
        name = next(n for n, p in box.m.named_parameters() if p.dim() == 2)
        with pytest.raises(ValueError, match="which its parent takes apart"):
            peft.get_peft_model(box, TuckerConfig(r=2, target_modules=["fc"], target_parameters=[f"m.{name}"]))
    model, _ = adapted()
    with pytest.raises(ValueError, match="'experts' has adapted parameters, which no LoRA of peft's"):
        export_lora(model, "nowhere")


def test_half_precision_autocast_and_checkpointing():
    model, x = mixture(Batched, torch.bfloat16)
    with pytest.warns(UserWarning, match="computes with its weight in its own way, in half precision"):
        model = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=[], target_parameters=BOTH))
    stir(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    y, found = gradients(model, [x])
    assert y.dtype == torch.bfloat16 and all(g.abs().sum() > 0 for g in found.values())
    assert {p.dtype for p in model.half().parameters() if p.requires_grad} == {torch.float32}
    model, x = adapted()
    _, expected = gradients(stir(model), [x])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.base_model.model.experts.up.dtype == torch.float32
        close(model(x), model.base_model.model(x), 0)
    model.zero_grad()
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)))
    for n, p in model.named_parameters():
        if n in expected:
            close(p.grad, expected[n], 1e-6)


def test_a_mixture_of_transformers(tmp_path):
    if not hasattr(transformers.PreTrainedModel, "set_experts_implementation"):
        pytest.skip("experts are no stacks in this version of transformers")
    config = transformers.MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    torch.manual_seed(0)
    model, x = transformers.MixtralForCausalLM(config).eval(), torch.randint(32, (2, 5))
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"only target_parameters adapts: model.layers.\*.mlp.experts.gate_up_proj"):
        peft.get_peft_model(copy.deepcopy(model), TuckerConfig(r=2, target_modules=["q_proj"]))
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = stir(peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["q_proj"], target_parameters=names)))
    results = []
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.base_model.model.set_experts_implementation(name)
        results.append(model(x).logits)
        close(results[-1], results[0].detach(), 1e-5)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    close(loaded(x).logits, results[0].detach(), 1e-5)
    ids = model.generate(x, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.merge_and_unload().generate(x, max_new_tokens=3, do_sample=False), ids)
