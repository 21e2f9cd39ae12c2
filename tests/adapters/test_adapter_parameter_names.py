"""Which parameters `target_parameters` means, which it refuses, and what the summary and the optimiser call them."""

import pytest
import torch
from adapter_cases import parts_of
from parameter_cases import ALL, Experts, Mixture, adapted, mixture
from torch import nn

import torch_subspace as ts


def test_names_that_match_nothing_have_candidates():
    model, _ = mixture()
    cases = [
        ({"target_parameters": "experts.upp"}, "matches target_parameters 'experts.upp'; candidates: 'experts.up'"),
        ({"target_parameters": ["up", "experts.down_proj"]}, "'experts.down_proj'; candidates: .*'experts.down'"),
        ({"target_parameters": "fc.bias"}, r"'fc' is a Linear, whose bias of shape \(5,\) is neither a matrix"),
        ({"target_modules": "up"}, "'up' names parameters: that is for target_parameters"),
        ({"target_modules": "experts"}, "no Tucker adapter; its parameters 'up', 'down' are for target_parameters"),
        ({"target_modules": "nothing", "target_parameters": "up"}, "matches target_modules 'nothing'"),
        ({"target_parameters": "up", "exclude_modules": "experts"}, "hold all that target_parameters 'up' matches"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            ts.adapt(model, ts.TuckerConfig(**config))
        assert type(model.experts) is Experts and ts.adapter_names(model) == []
    with pytest.raises(ValueError, match="target_modules is empty"):
        ts.TuckerConfig(target_modules=())
    with pytest.raises(ValueError, match=r"target_parameters '\*' is not a regular expression"):
        ts.TuckerConfig(target_parameters="*")
    with pytest.raises(TypeError, match="target_parameters must hold strings"):
        ts.TuckerConfig(target_parameters=[1])


def refused(parameter, make, message):
    module = nn.Module()
    module.inner = make()
    module.inner.p = None
    with pytest.raises(ValueError, match=message):
        ts.adapt(module, ts.TuckerConfig(target_parameters=parameter))


def test_parameters_that_cannot_be_adapted_are_refused():
    class Holder(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = nn.Parameter(w, requires_grad=w.is_floating_point())

    def tied():
        holder = Holder(torch.randn(3, 4))
        holder.other = Holder(holder.w)
        holder.other.w = holder.w
        return holder

    refused("w", lambda: Holder(torch.zeros(3, 4, dtype=torch.int8)), "packed")
    refused("w", lambda: Holder(torch.randn(3)), "neither a matrix nor a stack")
    refused("w", lambda: Holder(torch.randn(3, 0)), "no entries")
    refused("inner.w", tied, "tied: 'inner', 'inner.other' share it")
    refused("w", lambda: nn.utils.parametrizations.orthogonal(Holder(torch.randn(4, 4)), "w"), "parametrised")
    refused("fc.weight", lambda: nn.ModuleDict({"fc": nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))}),
            "parametrised")
    refused("weight_ih_l0", lambda: nn.GRU(3, 4), "does not read its parameters by their names")


def test_exclude_and_save():
    config = ts.TuckerConfig(rank=2, target_parameters=ALL, exclude_modules="experts.down", save_modules="fc")
    model = ts.adapt(mixture()[0], config)
    assert list(parts_of(model)) == [".out", "experts.up"]
    with pytest.raises(ValueError, match="hold all"):
        ts.adapt(mixture()[0], ts.TuckerConfig(target_modules=(), target_parameters="up", save_modules="experts"))


def test_summary_says_what_is_out_of_reach():
    model, _ = mixture()
    text = ts.adapter_summary(ts.adapt(model, ts.TuckerConfig(rank=2))).splitlines()
    assert text[-1] == ("88.46% of the weights are in parameters of no layer, which only target_parameters adapts: "
                        "experts.up, experts.down, out")
    ts.adapt(model, ts.TuckerConfig(rank=2, target_parameters=["up", "down", "out"]), "all")
    assert "only target_parameters" not in ts.adapter_summary(model)
    assert any("full x 2 x 2" in line for line in ts.adapter_summary(model).splitlines())
    layers = nn.Sequential(Mixture(), Mixture(), nn.Embedding(1000, 100))
    assert "only target_parameters" not in ts.adapter_summary(ts.adapt(layers, ts.TuckerConfig(rank=2)))
    layers = ts.adapt(nn.Sequential(Mixture(), Mixture()), ts.TuckerConfig(rank=2))
    assert "adapts: *.experts.up, *.experts.down, *.out" in ts.adapter_summary(layers)


def test_groups_of_the_optimiser():
    model, _ = adapted()
    groups = ts.adapter_parameters(model, lr=1.0, lr_multipliers={"experts.up.core": 10.0, "out": 3.0, "experts": 2.0})
    assert {g["lr"]: len(g["params"]) for g in groups} == {10.0: 1, 3.0: 3, 2.0: 5}
