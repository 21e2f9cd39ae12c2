"""add_weighted_adapter of peft's method `tucker`: against the weighted sum of the changes, and what is refused."""
import pytest
import torch
from adapter_cases import relative
from peft_cases import ALL, net, peft, quiet, stir

from torch_subspace.peft import TuckerConfig, TuckerLayer

pytestmark = quiet
W = (0.5, -2.0)


def pair(r=(3, 4), **kwargs):
    """A model with adapters "one", of all layers, and "two", of the convolutions."""
    model, i = net()
    adapted = peft.get_peft_model(model, TuckerConfig(r=r[0], alpha=2.0, target_modules=ALL, **kwargs), "one")
    adapted.add_adapter("two", TuckerConfig(r=r[1], target_modules="all-conv", **kwargs))
    return stir(stir(adapted, "one"), "two"), i


def layers(adapted):
    return {n: m for n, m in adapted.base_model.model.named_modules() if isinstance(m, TuckerLayer)}


def wanted(layer, names=("one", "two"), weights=W):
    return sum(w * layer.get_delta_weight(n) for n, w in zip(names, weights) if n in layer.tucker_parts)


@pytest.mark.parametrize("kernel_rank", ["full", 2])
@pytest.mark.parametrize("r", [(2, 3), (7, 6)])  # the sum of the second is more than there are channels
def test_cat_is_the_sum(r, kernel_rank, tmp_path):
    adapted, i = pair(r, kernel_rank=kernel_rank)
    adapted.add_weighted_adapter(["one", "two"], W, "sum", "cat")
    for layer in layers(adapted).values():
        assert relative(layer.get_delta_weight("sum"), wanted(layer)) < 1e-6
    assert not any(p.requires_grad for n, p in adapted.named_parameters() if ".sum." in n)
    assert layers(adapted)["emb"].tucker_parts["sum"].factor0[0].abs().sum() == 0  # the padding row
    adapted.set_adapter("sum")
    y = adapted(i)
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(peft.PeftModel.from_pretrained(net()[0], tmp_path / "sum")(i), y)


def test_svd_is_the_nearest_of_its_rank():
    adapted, _ = pair()
    adapted.add_adapter("three", TuckerConfig(r=2, target_modules=["lin", "emb"]))
    stir(adapted, "three")
    adapted.add_weighted_adapter(["one", "three"], W, "near")
    for name in ("lin", "emb"):
        layer = layers(adapted)[name]
        u, s, vh = torch.linalg.svd(wanted(layer, ("one", "three")).double())
        best = u[:, :3] * s[:3] @ vh[:3]
        if name == "lin":
            assert relative(layer.get_delta_weight("near"), best) < 1e-5
        assert layer.tucker_parts["near"].ranks == [3, 3]
    adapted.add_weighted_adapter(["one", "three"], W, "exact", svd_rank=5)
    lin = layers(adapted)["lin"]
    assert relative(lin.get_delta_weight("exact"), wanted(lin, ("one", "three"))) < 1e-5
    conv = layers(adapted)["blocks.0.conv"]
    assert relative(conv.get_delta_weight("exact"), W[0] * conv.get_delta_weight("one")) < 1e-5
    assert set(layers(adapted)) == {n for n, m in layers(adapted).items() if "exact" in m.tucker_parts}


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd",
                                  "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_the_other_kinds_are_near_the_sum(kind):
    """With a density of 1 nothing is pruned: what remains is the cut, and where signs are elected, one of each two."""
    adapted, i = pair((4, 4))
    adapted.add_weighted_adapter(["one", "two"], W, "new", kind, density=1.0)
    for name, layer in layers(adapted).items():
        got, want = layer.get_delta_weight("new"), wanted(layer)
        assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > (0.5 if "ties" in kind else 0.8)
        if "ties" not in kind and "two" not in layer.tucker_parts:
            assert relative(got, want) < 1e-5, name
    adapted.set_adapter("new")
    assert torch.isfinite(adapted(i)).all()


def test_one_adapter_is_scaled():
    adapted, _ = pair()
    adapted.add_weighted_adapter(["two"], [-3.0], "minus")
    for layer in layers(adapted).values():
        assert ("minus" in layer.tucker_parts) == ("two" in layer.tucker_parts)
        if "two" in layer.tucker_parts:
            assert relative(layer.get_delta_weight("minus"), -3 * layer.get_delta_weight("two")) < 1e-6
    config = adapted.peft_config["minus"]
    assert (config.r, config.alpha, config.rank_pattern) == (4, None, {})
    before = layers(adapted)["blocks.0.conv"].tucker_parts["minus"].core.clone()
    adapted.add_weighted_adapter(["two"], [5.0], "minus")  # is there already
    assert torch.equal(layers(adapted)["blocks.0.conv"].tucker_parts["minus"].core, before)


def test_layers_of_the_two_differ():
    """Names of target_modules that would take more layers together than apart."""
    model, _ = net()
    adapted = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["conv"], layers_to_transform=[0],
                                                      layers_pattern="blocks"), "one")
    adapted.add_adapter("two", TuckerConfig(r=2, target_modules=r"blocks\.1\.conv|lin"))
    stir(stir(adapted, "one"), "two").add_weighted_adapter(["one", "two"], W, "sum", "cat")
    found = {n for n, m in layers(adapted).items() if "sum" in m.tucker_parts}
    assert found == {"blocks.0.conv", "blocks.1.conv", "lin"}
    for layer in layers(adapted).values():
        assert relative(layer.get_delta_weight("sum"), wanted(layer)) < 1e-6


@pytest.mark.parametrize("change,message", [
    ({"adapters": ["one", "three"]}, "Adapter three does not exist"),
    ({"weights": [1.0]}, "as many weights as adapters, got 1 and 2"),
    ({"adapters": [], "weights": []}, "as many weights"),
    ({"combination_type": "mean"}, "Invalid combination_type: 'mean'"),
    ({"combination_type": "linear"}, "must have the same r value"),
    ({"combination_type": "ties_svd"}, r"needs a density in \[0, 1\], got None"),
    ({"svd_rank": 0}, "svd_rank must be >= 1, got 0"),
])
def test_refused(change, message):
    adapted, i = pair()
    y = adapted(i)
    with pytest.raises(ValueError, match=message):
        adapted.add_weighted_adapter(**{"adapters": ["one", "two"], "weights": W, "adapter_name": "new"} | change)
    assert list(adapted.peft_config) == ["one", "two"] and torch.equal(adapted(i), y)
    assert not any("new" in m.tucker_parts for m in layers(adapted).values())


def test_heads_of_both_are_refused():
    model, _ = net()
    config = TuckerConfig(r=2, target_modules=["lin"], modules_to_save=["head"])
    adapted = peft.get_peft_model(model, config, "one")
    adapted.add_adapter("two", config)
    with pytest.raises(ValueError, match="same module with modules_to_save"):
        adapted.add_weighted_adapter(["one", "two"], W, "new")
