"""peft's method `spectral`: singular values trained, with what peft asks of a method."""
import copy

import pytest
import torch
from adapter_cases import relative
from peft_cases import LAYERS, peft, quiet
from torch import nn

import torch_subspace as ts
from torch_subspace.peft import SpectralConfig, TuckerLayer, export_lora, import_lora

pytestmark = quiet


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def stir(model, name="default", seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f".{name}." in key and key.endswith("core"):
                p.normal_(std=0.3)
    return model


X = torch.linspace(-1, 1, 24).view(4, 6)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind, tmp_path):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    x = torch.randn(shape) if shape else torch.tensor([[1, 2, 3], [2, 5, 1]])
    plain = copy.deepcopy(layer).eval()
    want = plain(x)
    model = peft.get_peft_model(nn.Sequential(layer).eval(), SpectralConfig(r=3, target_modules=["0"]))
    assert torch.equal(model(x), want)
    stir(model)
    y = model(x)
    assert relative(y, want) > 1e-3
    y.sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad} and len(trained) == 1
    model.merge_adapter()
    assert relative(model(x), y) < 1e-6
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    with model.disable_adapter():
        assert torch.equal(model(x), want)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(nn.Sequential(plain).eval(), tmp_path)
    assert torch.equal(again(x), y) and again.peft_type.value == "SPECTRAL"
    assert relative(again.merge_and_unload()(x), y) < 1e-6


def test_is_the_adapter_of_adapt():
    ours = ts.adapt(net(), ts.SpectralConfig(0.9, target_modules="all-linear", rank_pattern={"2": 2}))
    theirs = peft.get_peft_model(net(), SpectralConfig(r=0.9, target_modules="all-linear", rank_pattern={"2": 2}))
    ranks = [part.rank for m in ours if hasattr(m, "tucker") for part in m.tucker["default"].values()]
    assert ranks == [m.tucker_parts["default"].rank for m in theirs.modules() if isinstance(m, TuckerLayer)]
    assert ranks[1] == 2
    a, b = ([p for n, p in stir(m).named_parameters() if n.endswith("core")] for m in (ours, theirs))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) and torch.equal(ours(X), theirs(X))


def test_sums_are_exact():
    model = peft.get_peft_model(net(), SpectralConfig(r=2, target_modules=["0", "2"]), "one")
    model.add_adapter("two", SpectralConfig(r=4, target_modules=["2", "4"]))
    stir(model, "one", 1), stir(model, "two", 2)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, TuckerLayer)}
    want = {n: sum(w * m.get_delta_weight(k) for k, w in (("one", 0.5), ("two", -2.0)) if k in m.tucker_parts)
            for n, m in layers.items()}
    for kind in ("linear", "cat", "svd"):
        model.add_weighted_adapter(["one", "two"], [0.5, -2.0], kind, kind)
        for n, m in layers.items():
            torch.testing.assert_close(m.get_delta_weight(kind), want[n])
        assert [m.tucker_parts[kind].rank for m in layers.values()] == [2, 4, 3]
    with pytest.raises(ValueError, match="combination_type must be one of linear, cat, svd, got 'ties'"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "other", "ties")
    with torch.no_grad():
        layers["2"].tucker_parts["one"].factor0.copy_(layers["2"].tucker_parts["one"].factor0.roll(1, 0))
    with pytest.raises(ValueError, match="adapters of '2' have other singular vectors"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "other")
    assert "other" not in model.peft_config


def test_attention_and_parameters(tmp_path):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
            self.stack = nn.Parameter(torch.randn(3, 8, 5))

        def forward(self, x):
            return (self.mha(x, x, x)[0][:, None] @ self.stack).sum(1)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Attends()

        def forward(self, x):
            return self.inner(x)

    torch.manual_seed(0)
    plain, x = Outer().eval(), torch.randn(2, 4, 8)
    for config in ({"target_modules": ["mha"]}, {"target_modules": [], "target_parameters": ["stack"]}):
        model = peft.get_peft_model(copy.deepcopy(plain), SpectralConfig(r=2, **config))
        assert relative(model(x), plain(x)) < 1e-6
        stir(model)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith("_core"):
                    p.normal_(std=0.3)
        y = model(x)
        assert relative(y, plain(x)) > 1e-3
        y.sum().backward()
        model.save_pretrained(tmp_path / str(len(config)))
        again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / str(len(config)))
        assert relative(again(x), y) < 1e-6
        assert relative(model.merge_and_unload()(x), y) < 1e-5


def test_as_a_lora(tmp_path):
    for model in (stir(ts.adapt(net(), ts.SpectralConfig(3))),
                  stir(peft.get_peft_model(net(), SpectralConfig(r=3, target_modules=["0", "2", "4"])))):
        export_lora(model, tmp_path)
        lora = peft.PeftModel.from_pretrained(net(), tmp_path)
        torch.testing.assert_close(lora(X), model(X))
        torch.testing.assert_close(import_lora(net(), tmp_path, standalone=True)(X), model(X))


@pytest.mark.parametrize("config, match", [
    ({"r": 0}, "r must be >= 1, got 0"), ({"r": 1.5}, r"r must be a positive int, or a share in \(0, 1\)"),
    ({"rank_pattern": {"0": "2"}}, "rank_pattern"), ({"bias": "tucker_only"}, "one of none, all, spectral_only"),
    ({"target_parameters": "a"}, "must be a list of strings")])
def test_what_a_config_refuses(config, match):
    with pytest.raises((TypeError, ValueError), match=f"SpectralConfig: .*{match}"):
        SpectralConfig(**config)


def test_names_that_match_nothing():
    with pytest.raises(ValueError, match="rank_pattern 'gone' matches none"):
        peft.get_peft_model(net(), SpectralConfig(target_modules=["0"], rank_pattern={"gone": 2}))
