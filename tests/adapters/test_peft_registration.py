"""The method `tucker` in peft: how it is registered, and what is refused."""
import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
from peft_cases import net, peft, quiet
from torch import nn

import torch_subspace.peft as tp
from torch_subspace.adapters import peft_type
from torch_subspace.peft import TuckerConfig, TuckerLayer

pytestmark = quiet


def test_the_enum_is_whole():
    kind = peft.PeftType.TUCKER
    assert kind == kind.value == "TUCKER" and peft.PeftType("TUCKER") is kind and kind in list(peft.PeftType)
    assert pickle.loads(pickle.dumps(kind)) is kind and copy.deepcopy(kind) is kind and json.dumps(kind) == '"TUCKER"'
    assert len(set(peft.PeftType)) == len(list(peft.PeftType)) and hash(kind) == hash(peft.PeftType["TUCKER"])
    assert peft.PeftType.LORA is peft.PeftType("LORA") and repr(kind) == "<PeftType.TUCKER: 'TUCKER'>"
    config = TuckerConfig(r=3, target_modules=["a"])
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert peft.get_peft_config({"peft_type": "TUCKER", "r": 3, "target_modules": ["a"]}) == config


def test_reload_registers_once_more(monkeypatch):
    before = list(peft.PeftType)
    for name, table in (("TuckerConfig", peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING),
                        ("TuckerModel", peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)):
        monkeypatch.setattr(tp, name, getattr(tp, name))  # afterwards they are again what other files have imported
        for kind in tp.KINDS:
            monkeypatch.setitem(table, kind, table[kind])
    importlib.reload(tp)
    assert list(peft.PeftType) == before
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["TUCKER"] is tp.TuckerConfig
    adapted = peft.get_peft_model(net()[0], tp.TuckerConfig(r=2, target_modules=["lin"]))
    assert type(adapted.base_model) is tp.TuckerModel and isinstance(adapted.base_model.model.lin, TuckerLayer)


def test_a_foreign_method_of_this_name_is_refused(monkeypatch):
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "TUCKER", peft.LoraConfig)
    with pytest.raises(ImportError, match="of its own"):
        peft_type.add_peft_type("TUCKER")


def test_an_enum_that_refuses_is_left_as_it_was(monkeypatch):
    before = list(peft.PeftType)
    monkeypatch.setattr(peft_type, "PeftType", type("Closed", (), {"__members__": {}}))
    with pytest.raises(ImportError, match="can't extend PeftType"):
        peft_type.add_peft_type("NEW")
    monkeypatch.undo()
    real = type.__setattr__
    try:
        peft_type.add_peft_type("NEWER")
        peft_type.drop_peft_type("NEWER")
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
    ({"bias": "some"}, ValueError, "bias"), ({"scaling": "x"}, ValueError, "scaling"),
    ({"r": ["full", "full"]}, ValueError, "full"),
    ({"layers_pattern": "h"}, ValueError, "layers_to_transform"), ({"rank_pattern": [1]}, TypeError, "dict"),
    ({"target_modules": "all-linear", "layers_to_transform": 1}, ValueError, "`layers_to_transform` cannot"),
    ({"target_modules": "a|b", "layers_pattern": "h"}, ValueError, "`layers_pattern` cannot be used when"),
])
def test_bad_config(change, error, word):
    with pytest.raises(error, match=word):
        TuckerConfig(**({"target_modules": ["a"]} | change))


@pytest.mark.parametrize("target, word", [
    (["norm", "lin"], "LayerNorm"), (["lin", "rnn"], "GRU"), (["lin", "tied", "again"], "one module"),
    (["lin", "normed"], "weight_norm"), (["nothing"], "not found"), (["lin", "capped"], "max_norm"),
])
def test_what_cannot_be_adapted_leaves_the_model_alone(target, word):
    model, _ = net()
    model.rnn, model.tied = nn.GRU(4, 2), nn.Linear(2, 2)
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
