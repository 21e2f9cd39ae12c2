"""The method `tucker` in peft: names that match nothing, alpha, numbers that are not finite, other bases."""

import json
import warnings

import pytest
import torch
from peft_cases import ALL, net, peft, quiet, stir
from torch import nn

from torch_subspace.peft import TuckerConfig, TuckerLayer, export_lora

pytestmark = quiet


@pytest.mark.parametrize("config, match", [
    ({"rank_pattern": {"linn": 2}}, "rank_pattern 'linn' matches none of the adapted layers; candidates: 'lin'"),
    ({"alpha_pattern": {"lin": 2.0, r"blocks\.7.*": 1.0}}, "alpha_pattern 'blocks"),
    ({"rank_pattern": {"emb": 2}}, "rank_pattern 'emb' matches none"),
    ({"exclude_modules": ["convv"]}, "exclude_modules 'convv' matches nothing; candidates: 'blocks.0.conv'"),
    ({"exclude_modules": r"bloks.*"}, "exclude_modules 'bloks"),
    ({"modules_to_save": ["haed"]}, "modules_to_save 'haed' matches nothing; candidates: 'head'"),
])
def test_names_that_match_nothing(config, match):
    model, _ = net()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"tucker: {match}"):
        peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["lin", "conv"], **config))
    assert [type(m) for m in model.modules()] == before


def test_names_that_match():
    model = peft.get_peft_model(net()[0], TuckerConfig(
        r=3, target_modules=["lin", "conv"], exclude_modules=["blocks.1.conv"], rank_pattern={"^blocks.*conv": 2},
        alpha_pattern={"lin": 2.0}, modules_to_save=["head", "classifier", "score"]))
    model.add_adapter("two", TuckerConfig(r=2, target_modules=["lin"], rank_pattern={"lin": 1}))
    with pytest.raises(ValueError, match="rank_pattern 'conv'"):
        model.add_adapter("three", TuckerConfig(r=2, target_modules=["lin"], rank_pattern={"conv": 1}))


def test_targets_of_which_some_match_nothing_warn():
    with pytest.warns(UserWarning, match="tucker: target_modules 'linn' matches nothing; candidates: 'lin'"):
        peft.get_peft_model(net()[0], TuckerConfig(r=2, target_modules=["linn", "conv"]))


def test_alpha_as_of_lora(tmp_path):
    with pytest.warns(UserWarning, match="alpha=16 is the scale itself; LoRA's alpha / rank, 2 here") as caught:
        config = TuckerConfig(r=8, alpha=16, target_modules=["lin"])
    assert caught[0].filename == __file__ and config.scaling == "constant"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*alpha")
        TuckerConfig(r=8, alpha=16, scaling="lora")
        peft.get_peft_model(net()[0], config).save_pretrained(tmp_path)
        assert TuckerConfig.from_pretrained(tmp_path).scaling == "constant"


@pytest.mark.parametrize("how", [float("nan"), float("inf")])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_broken_adapter_is_not_merged(merge, how):
    model, i = net()
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=2, target_modules=ALL, modules_to_save=["head"])))
    adapted.add_adapter("good", TuckerConfig(r=2, target_modules=ALL))
    stir(adapted, "good")
    with torch.no_grad():
        model.blocks[1].conv.tucker_parts["default"].core[0, 0] = how
    places = dict(model.named_modules())
    before = {n: t.clone() for n, t in adapted.state_dict().items()}
    for merged in ([], ["good"]):
        adapted.merge_adapter(merged) if merged else None
        want = {n: t.clone() for n, t in adapted.state_dict().items()}
        with pytest.raises(ValueError, match=r"^NaNs detected in the merged weights. The adapter default seems to be"):
            getattr(adapted, merge)(adapter_names=["default"])
        assert dict(model.named_modules()) == places
        found = [m for m in model.modules() if isinstance(m, TuckerLayer)]
        assert all(m.merged_adapters == merged for m in found)
        assert all(torch.equal(t.nan_to_num(), want[n].nan_to_num()) for n, t in adapted.state_dict().items())
    adapted.unmerge_adapter()
    assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in adapted.state_dict().items())


@pytest.mark.parametrize("how", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_exported(how, tmp_path):
    model, _ = net()
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["lin"])))
    with torch.no_grad():
        model.lin.tucker_parts["default"].factor0[0, 0] = how
    with pytest.raises(ValueError, match="export_lora: the change of 'lin' by 'default' is not finite"):
        export_lora(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_warns(tmp_path):
    config = TuckerConfig(r=2, target_modules=ALL)
    stir(peft.get_peft_model(net()[0], config)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*another base")
        peft.PeftModel.from_pretrained(net()[0], tmp_path)
        peft.PeftModel.from_pretrained(net()[0].bfloat16(), tmp_path)
        other, _ = net()
        nn.init.normal_(other.lin.weight)
        peft.get_peft_model(other, config)  # the same config on another model is a new adapter
    third, _ = net()
    nn.init.normal_(third.lin.weight)
    with pytest.warns(UserWarning, match="'default' was saved with another base model: 'lin' had other weights"):
        peft.PeftModel.from_pretrained(third, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about.pop("fingerprint").keys() >= {"lin", "blocks.0.conv"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))  # as files of before are
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*another base")
        fourth, _ = net()
        nn.init.normal_(fourth.lin.weight)
        peft.PeftModel.from_pretrained(fourth, tmp_path)
