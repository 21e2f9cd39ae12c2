"""Tucker adapters: their configuration, the language of targets, and what is refused before anything is changed."""

import warnings

import pytest
import torch
from adapter_cases import Box, boxed, disturb, net, parts_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import torch_subspace as ts


class TestInit:
    @pytest.mark.parametrize("init", ["lecun", "kaiming", "svd"])
    def test_factors_are_filled_and_cores_zero(self, init):
        torch.manual_seed(0)
        model = ts.adapt(Box(nn.Conv2d(64, 48, 3)), ts.TuckerConfig(16, 2, target_modules="layer", init=init))
        part = parts_of(model)["layer.weight"]
        assert not part.core.any() and part.core.shape == (16, 16, 2, 2)
        stds = {"lecun": [16**-0.5, 64**-0.5], "kaiming": [(2 / (1 + 3) / 16) ** 0.5] * 2}  # gain^2 / fan in
        for i, f in enumerate(part.factors[:2]):
            unfolding = model.layer._parameters["weight"].movedim(i, 0).flatten(1)
            if init == "svd":
                best = torch.linalg.svd(unfolding)[0][:, :16]
                assert (f.mT @ f - torch.eye(16)).abs().max() < 1e-5
                assert (f.mT @ unfolding).norm() > 0.97 * (best.mT @ unfolding).norm()
            else:
                assert abs(f.std() / stds[init][i] - 1) < 0.15

    @pytest.mark.parametrize("scaling, want", [("constant", 8.0), ("lora", 2.0), ("rslora", 4.0)])
    def test_scale(self, scaling, want):
        config = ts.TuckerConfig((4, 6), alpha=8, scaling=scaling, target_modules="layer")
        model = ts.adapt(Box(nn.Linear(9, 9)), config)
        assert parts_of(model)["layer.weight"].scale == want

    @pytest.mark.parametrize("config, scale", [({"rank": 8, "alpha": 16}, "2"), ({"rank": (9, 4), "alpha": 4}, "1")])
    def test_an_alpha_as_of_lora_warns_where_nothing_says_how_it_scales(self, config, scale):
        with pytest.warns(UserWarning, match=f"LoRA's alpha / rank, {scale} here") as caught:
            made = ts.TuckerConfig(**config)
        assert caught[0].filename == __file__ and made.scaling == "constant"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ts.TuckerConfig(**made.to_dict())
            ts.TuckerConfig(rank=8, alpha=2)
            for scaling in ("constant", "lora", "rslora"):
                ts.TuckerConfig(**config, scaling=scaling)

    def test_ranks(self):
        model, x = net()
        config = ts.TuckerConfig(4, kernel_rank=(2, 1), rank_pattern={"stem": (2, 3), r".*conv": 5, "fc": (1, 2)},
                                 alpha_pattern={r".*fc": 0.5})
        ts.adapt(model, config)
        parts = parts_of(model)
        assert parts["stem.weight"].ranks == [2, 3, 2, 1]
        assert parts["body.conv.weight"].ranks == [5, 4, 2, 1]
        assert parts["body.fc.weight"].ranks == [1, 2] and parts["body.fc.weight"].scale == 0.5
        assert parts["head.weight"].ranks == [3, 4] and parts["head.weight"].scale == 1

    def test_one_rank_for_every_dimension(self):
        model = ts.adapt(net()[0], ts.TuckerConfig((2, 3, 1, 2), target_modules="all-conv"))
        assert [p.ranks for p in parts_of(model).values()] == [[2, 3, 1, 2]] * 2


class TestConfig:
    @pytest.mark.parametrize("error, match, kwargs", [
        (ValueError, "rank", {"rank": 0}),
        (ValueError, "rank", {"rank": (4, -1)}),
        (ValueError, "rank", {"rank": ()}),
        (TypeError, "rank", {"rank": 2.5}),
        (TypeError, "rank", {"rank": "full"}),
        (TypeError, "rank", {"rank": True}),
        (TypeError, "kernel_rank", {"kernel_rank": "half"}),
        (ValueError, "kernel_rank", {"kernel_rank": 0}),
        (ValueError, "alpha", {"alpha": float("nan")}),
        (ValueError, "alpha", {"alpha": "8"}),
        (ValueError, "alpha_pattern", {"alpha_pattern": {"fc": float("inf")}}),
        (TypeError, "rank_pattern", {"rank_pattern": ["fc"]}),
        (ValueError, "rank_pattern", {"rank_pattern": {"fc": 0}}),
        (ValueError, "rank_pattern", {"rank_pattern": {"fc(": 2}}),
        (ValueError, "target_modules", {"target_modules": ()}),
        (TypeError, "target_modules", {"target_modules": [3]}),
        (ValueError, "regular expression", {"target_modules": "layer[.*"}),
        (ValueError, "init", {"init": "zeros"}),
        (ValueError, "scaling", {"scaling": "dora"}),
        (ValueError, "dropout", {"dropout": 1.0}),
        (ValueError, "dropout", {"dropout": -0.1}),
        (ValueError, "dropout", {"dropout": "much"}),
    ])
    def test_bad_values(self, error, match, kwargs):
        with pytest.raises(error, match=match):
            ts.TuckerConfig(**kwargs)

    def test_numbers_of_numpy_are_numbers(self, tmp_path):
        np = pytest.importorskip("numpy")
        config = ts.TuckerConfig(rank=np.int64(2), alpha=np.float32(2), dropout=np.float32(0.25),
                                 rank_pattern={"fc": np.int32(3)}, target_modules="all-linear")
        model = ts.adapt(net()[0], config)
        ts.save_adapter(model, tmp_path / "a.safetensors")
        ts.load_adapter(net()[0], tmp_path / "a.safetensors")

    def test_kernel_ranks_say_nothing_of_linear_layers(self):
        model = ts.adapt(net()[0], ts.TuckerConfig(4, kernel_rank=(2, 2)))
        assert parts_of(model)["body.fc.weight"].ranks == [4, 4]

    @pytest.mark.parametrize("kwargs", [
        {"rank": (2, 2, 2)}, {"rank": (2, 2, 2, 2), "target_modules": "fc"},
        {"kernel_rank": (1, 2, 3), "target_modules": "conv"},
    ])
    def test_ranks_that_do_not_fit_the_weight(self, kwargs):
        assert_refused(net()[0], ts.TuckerConfig(**kwargs), r"'(stem|body\.fc|body\.conv)'.*(2|4) dimensions")


def targets(model):
    return [key.removesuffix(".weight") for key in parts_of(model)]


class TestTargets:
    @pytest.mark.parametrize("language, want", [
        ("all-linear", ["body.fc", "head"]),
        ("all-conv", ["stem", "body.conv"]),
        (("all-linear", "stem"), ["stem", "body.fc", "head"]),
        ("fc", ["body.fc"]),
        ("body.fc", ["body.fc"]),
        (["conv", "head"], ["body.conv", "head"]),
        (r"body\..*", ["body.conv", "body.fc"]),
        (r".*(stem|fc)", ["stem", "body.fc"]),
        (r".*", ["stem", "body.conv", "body.fc", "head"]),
    ])
    def test_language(self, language, want):
        assert targets(ts.adapt(net()[0], ts.TuckerConfig(2, target_modules=language))) == want

    @pytest.mark.parametrize("exclude, want", [
        ("fc", ["stem", "body.conv", "head"]),
        ("all-linear", ["stem", "body.conv"]),
        ((r"body.*", "head"), ["stem"]),
    ])
    def test_exclude(self, exclude, want):
        assert targets(ts.adapt(net()[0], ts.TuckerConfig(2, exclude_modules=exclude))) == want

    def test_a_bare_name_is_whole_parts(self):
        model = Box(nn.ModuleDict({"fc": nn.Linear(3, 3), "old_fc": nn.Linear(3, 3), "fc2": nn.Linear(3, 3)}))
        assert targets(ts.adapt(model, ts.TuckerConfig(2, target_modules="fc"))) == ["layer.fc"]

    @pytest.mark.parametrize("language", ["fcc", "hea", "body", r"bodi\..*", ("fc", "headd"), "norm"])
    def test_a_target_that_matches_nothing(self, language):
        wanted = "head" if "hea" in language or "headd" in language else "body"
        assert_refused(net()[0], ts.TuckerConfig(2, target_modules=language), wanted)

    def test_saved_modules_are_no_targets(self):
        model = ts.adapt(net()[0], ts.TuckerConfig(2, save_modules=("head", "norm")))
        assert targets(model) == ["stem", "body.conv", "body.fc"]

    def test_save_modules_that_match_nothing(self):
        assert_refused(net()[0], ts.TuckerConfig(2, save_modules="haed"), "save_modules 'haed' matches nothing.*head")

    @pytest.mark.parametrize("config, match", [
        ({"exclude_modules": ("stem", "hed")}, "exclude_modules 'hed' matches nothing; candidates: 'head'"),
        ({"exclude_modules": r"bodi.*"}, "exclude_modules 'bodi"),
        ({"rank_pattern": {"fcc": 4}}, "rank_pattern 'fcc' matches none of the adapted layers; candidates: 'body.fc'"),
        ({"rank_pattern": {"fc": 4, r"steem.*": 4}}, "rank_pattern 'steem"),
        ({"rank_pattern": {"norm": 4}}, "rank_pattern 'norm'"),
        ({"alpha_pattern": {"head": 2.0}, "save_modules": "head"}, "alpha_pattern 'head' matches none"),
    ])
    def test_other_names_that_match_nothing(self, config, match):
        assert_refused(net()[0], ts.TuckerConfig(2, **config), match)

    def test_attention_has_its_output_projection_too(self):
        model = ts.adapt(boxed("attention")[0], ts.TuckerConfig(2, target_modules="layer"))
        assert list(parts_of(model)) == ["layer.in_proj_weight", "layer.out_proj.weight"]
        model = ts.adapt(boxed("attention_kdim")[0], ts.TuckerConfig(2, target_modules="layer",
                                                                      exclude_modules="out_proj"))
        assert list(parts_of(model)) == [f"layer.{p}_proj_weight" for p in "qkv"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(self.fc(self.embedding(index)))


def assert_refused(model, config, match, **kwargs):
    """`adapt` raises a ValueError and leaves the model as it was."""
    keys = [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()]
    grads = [p.requires_grad for p in model.parameters()]
    parameters = [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=f"(?s){match}") as error:
        ts.adapt(model, config, **kwargs)
    assert str(error.value).startswith(("adapt: ", "TuckerConfig: "))
    assert keys == [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()]
    assert grads == [p.requires_grad for p in model.parameters()]
    assert parameters == [id(p) for p in model.parameters()]


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


class Rescaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrised_attention():
    layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
    parametrize.register_parametrization(layer, "q_proj_weight", Rescaled())
    return layer


class TestRefused:
    @pytest.mark.parametrize("make, match", [
        (old_weight_norm, "parametrised"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrised"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "parametrised"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "parametrised"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "parametrised"),
        (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 2), "parametrised"),
        (parametrised_attention, "parametrised"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (lambda: nn.LazyLinear(4), "Lazy"),
        (lambda: nn.LazyConv2d(4, 3), "Lazy"),
        (lambda: nn.EmbeddingBag(4, 4), "EmbeddingBag"),
        (lambda: nn.LSTM(4, 4), "LSTM"),
        (lambda: nn.GRUCell(4, 4), "GRUCell"),
        (lambda: nn.Bilinear(4, 4, 4), "Bilinear"),
        (lambda: ts.GrassmannLinear(4, 3, 2), "GrassmannLinear"),
        (lambda: nn.Linear(0, 4), r"no entries: shape \(4, 0\)"),
        (lambda: nn.Embedding(0, 4), "no entries"),
        (lambda: nn.Conv2d(4, 4, 3, dtype=torch.complex64), "complex"),
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "complex"),
    ])
    def test_layers(self, make, match):
        for pattern in ("layer", r"lay.*"):
            model = Box(nn.ModuleDict({"good": nn.Linear(4, 4), "layer": make()}))
            assert_refused(model, ts.TuckerConfig(2, target_modules=("good", rf".*{pattern}")), match)

    def test_singular_vectors_of_what_is_not_finite(self):
        model = Box(nn.Linear(4, 4))
        model.layer.weight.data[0, 0] = float("nan")
        assert_refused(model, ts.TuckerConfig(2, init="svd"), "'layer' finite, and it holds NaN or infinity")

    def test_tied_weights(self):
        for name, other in (("head", "embedding"), ("embedding", "head"), (r".*", "head")):
            assert_refused(Tied(), ts.TuckerConfig(2, target_modules=name), f"tied.*{other}")
        assert targets(ts.adapt(Tied(), ts.TuckerConfig(2))) == ["fc"]

    def test_all_linear_leaves_alone_what_it_cannot_adapt(self):
        model = Box(nn.ModuleDict({"a": old_weight_norm(), "b": nn.Linear(4, 4), "c": nn.LSTM(4, 4)}))
        assert targets(ts.adapt(model, ts.TuckerConfig(2))) == ["layer.b"]
        attention = nn.MultiheadAttention(4, 2)
        attention.out_proj = old_weight_norm()
        assert list(parts_of(ts.adapt(Box(attention), ts.TuckerConfig(2)))) == ["layer.in_proj_weight"]

    def test_lazy_norms_in_the_way_of_a_pattern(self):
        model = nn.ModuleDict({"a": nn.LazyBatchNorm1d(), "b": nn.Linear(4, 4)})
        assert targets(ts.adapt(model, ts.TuckerConfig(2, target_modules=r".*"))) == ["b"]

    def test_wrappers(self):
        assert_refused(nn.DataParallel(net()[0]), ts.TuckerConfig(2), "DistributedDataParallel|DataParallel")

    @pytest.mark.parametrize("name", ["", "a.b", "1a", "keys", "training", "_modules", 3, None])
    def test_names(self, name):
        assert_refused(net()[0], ts.TuckerConfig(2), "name", name=name)

    def test_a_taken_name(self):
        model = ts.adapt(net()[0], ts.TuckerConfig(2))
        assert_refused(model, ts.TuckerConfig(2), "default")
        ts.merge(disturb(model))
        assert_refused(model, ts.TuckerConfig(2), "merged", name="other")

    def test_another_adapters_head(self):
        model = ts.adapt(net()[0], ts.TuckerConfig(2, save_modules="head"), "a")
        assert_refused(model, ts.TuckerConfig(2, target_modules="head"), "head", name="b")
        model = ts.adapt(net()[0], ts.TuckerConfig(2), "a")
        assert_refused(model, ts.TuckerConfig(2, target_modules="fc", save_modules="head"), "head", name="b")

    def test_types(self):
        with pytest.raises(TypeError, match="^set_adapter: "):
            ts.set_adapter(ts.adapt(net()[0], ts.TuckerConfig(2)), 3)
        with pytest.raises(TypeError, match="adapt: model"):
            ts.adapt("model")
        with pytest.raises(TypeError, match="adapt: config"):
            ts.adapt(net()[0], {"rank": 2})

    @pytest.mark.parametrize("call", [
        lambda m: ts.set_adapter(m, "default"), lambda m: ts.delete_adapter(m, "default"), lambda m: ts.merge(m),
        lambda m: ts.unmerge(m), lambda m: ts.merge_and_unload(m), lambda m: ts.adapter_parameters(m),
        lambda m: ts.disabled(m).__enter__(), lambda m: ts.adapter_summary(m),
        lambda m: ts.save_adapter(m, "never.safetensors"),
    ])
    def test_a_model_without_adapter(self, call):
        with pytest.raises(ValueError, match=r"^\w+: the model has no adapter"):
            call(net()[0])

    @pytest.mark.parametrize("call, match", [
        (lambda m: ts.set_adapter(m, "other"), "'other'.*'default'"),
        (lambda m: ts.set_adapter(m, {"default": 1, "other": 1}), "'other'"),
        (lambda m: ts.set_adapter(m, {"default": float("nan")}), "finite"),
        (lambda m: ts.delete_adapter(m, "other"), "'other'"),
        (lambda m: ts.save_adapter(m, "never.safetensors", "other"), "'other'"),
        (lambda m: ts.unmerge(m), "merged"),
        (lambda m: ts.adapter_parameters(m, lr_multipliers={"fc": 2}), "lr"),
        (lambda m: ts.adapter_parameters(m, lr=1, lr_multipliers={"fcc": 2}), "'fcc'.*body.fc"),
        (lambda m: ts.adapter_parameters(m, lr=1, lr_multipliers={"fc(": 2}), "^adapter_parameters: .*fc"),
    ])
    def test_wrong_words(self, call, match):
        model, x = net()
        disturb(ts.adapt(model, ts.TuckerConfig(2)))
        before = model(x)
        with pytest.raises(ValueError, match=match):
            call(model)
        assert torch.equal(model(x), before) and ts.active_adapters(model) == {"default": 1.0}
