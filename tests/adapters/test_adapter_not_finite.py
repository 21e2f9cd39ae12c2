"""Adapters with NaN or infinite numbers: never merged nor exported without a word, and nothing is half-changed."""

import pytest
import torch
from adapter_cases import assert_same_state, disturb, net, parts_of, state_of
from torch import nn

import torch_subspace as ts


def broken(how):
    model, x = net()
    disturb(ts.adapt(model, ts.TuckerConfig(2, save_modules="head")))
    parts = parts_of(model)
    with torch.no_grad():
        if how == "overflow":  # finite numbers, whose product isn't
            parts["body.fc.weight"].core.fill_(1e30)
            parts["body.fc.weight"].factor0.fill_(1e30)
        else:
            parts["body.fc.weight"].factor1[0, 0] = float(how)
    return model, x


@pytest.mark.parametrize("merge", [ts.merge, ts.merge_and_unload])
@pytest.mark.parametrize("how", ["nan", "inf", "overflow"])
def test_merging(how, merge):
    model, _ = broken(how)
    before = state_of(model)
    with pytest.raises(ValueError, match="merge: the change of 'body.fc' by 'default' is not finite"):
        merge(model)
    assert_same_state(*({n: t.nan_to_num() for n, t in state.items()} for state in (model.state_dict(), before)))
    assert ts.active_adapters(model) == {"default": 1.0}
    with ts.disabled(model):
        pass


def test_a_half_weight_that_overflows():
    model = ts.adapt(nn.Sequential(nn.Linear(4, 4)).half(), ts.TuckerConfig(2))
    nn.init.constant_(parts_of(model)["0.weight"].core, 1e6)
    with pytest.raises(ValueError, match="'0' by 'default' is not finite"):
        ts.merge(model)


def test_a_base_that_is_not_finite_itself():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.constant_(model[0].weight[0], float("-inf"))
    before = model[0].weight.clone()
    ts.merge(ts.adapt(model, ts.TuckerConfig(2)))
    assert torch.equal(model[0].weight, before)


def test_an_idle_adapter_does_not_matter():
    model, x = broken("nan")
    ts.adapt(model, ts.TuckerConfig(2), "good")
    disturb(model, "good")
    y = model(x)
    torch.testing.assert_close(ts.merge(model)(x), y)
