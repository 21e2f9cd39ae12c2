"""Adapters and the habits of models: shared and unused layers, replaced forwards, ties, and what is refused."""

import copy

import pytest
import torch
from helpers import optional
from model_cases import adapted, build, classes, move, outputs, parts_of, see, torchvision
from torch import nn

import torch_subspace as ts


def batchnorms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class TestHabits:
    def test_batchnorm_in_training_keeps_its_own_statistics(self):
        model, inputs, config, _, _ = build("resnet")
        plain = copy.deepcopy(model).train()
        ts.adapt(model, config)
        assert not any(layer.training for layer in adapted(model).values())
        model.train()
        assert torch.equal(outputs(model, inputs).detach(), outputs(plain, inputs).detach())
        for a, b in zip(batchnorms(model), batchnorms(plain), strict=True):
            assert torch.equal(a.running_mean, b.running_mean) and not a.weight.requires_grad

    def test_frozen_batchnorm(self):
        ops = optional("torchvision.ops")
        model, inputs = torchvision("resnet18", norm_layer=ops.FrozenBatchNorm2d)
        y = outputs(model.eval(), inputs).detach()
        ts.adapt(model, ts.TuckerConfig(rank=3))
        assert torch.equal(outputs(model, inputs).detach(), y)
        outputs(model, inputs).sum().backward()
        assert all(part.core.grad is not None for layer in adapted(model).values() for part in parts_of(layer))

    def test_a_layer_used_twice_and_a_module_of_two_names(self, tmp_path):
        layer = nn.Linear(6, 6)
        model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3))
        fresh, x = copy.deepcopy(model), torch.randn(4, 6)
        ts.adapt(model, ts.TuckerConfig(rank=2))
        assert len(adapted(model)) == 2 and model[0] is model[2]
        for adapter in adapted(model).values():
            move(adapter, 0.5)
        y = model(x)
        y.sum().backward()
        assert all(part.core.grad.abs().sum() > 0 for a in adapted(model).values() for part in parts_of(a))
        ts.save_adapter(model, tmp_path / "a.safetensors")
        assert torch.equal(ts.load_adapter(fresh, tmp_path / "a.safetensors")(x), y)
        torch.testing.assert_close(ts.merge(model)(x), y)

    def test_either_name_of_a_shared_module_counts(self):
        def make():
            layer = nn.Linear(4, 4)
            return nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(4, 4)})

        model = ts.adapt(make(), ts.TuckerConfig(target_modules="b"))
        assert hasattr(model["b"], "tucker") and not hasattr(model["c"], "tucker")
        model = ts.adapt(make(), ts.TuckerConfig(exclude_modules="b"))
        assert hasattr(model["c"], "tucker") and not hasattr(model["b"], "tucker")

    def test_layers_that_the_forward_leaves_out(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return self.used(x)

        model = ts.adapt(Net(), ts.TuckerConfig(rank=2))
        optimizer = torch.optim.SGD(ts.adapter_parameters(model), lr=0.1)
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        assert model.idle.tucker["default"]["weight"].core.grad is None
        ts.merge_and_unload(model)

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: nn.Conv1d(6, 6, 1)])
    def test_forward_replaced_on_the_object(self, make, when):
        model, x = nn.Sequential(make()), torch.randn(6, 6)

        def replace(module):
            old = module.forward
            module.forward = lambda x: old(x) + 1

        if when == "before":
            replace(model[0])
            plain = model(x).detach()
        ts.adapt(model, ts.TuckerConfig(rank=2))
        if when == "after":
            plain = model(x).detach() + 1
            replace(model[0])
        torch.testing.assert_close(model(x).detach(), plain)
        move(model[0], 0.5)
        y = model(x).detach()
        assert not torch.allclose(y, plain, atol=1e-3)
        torch.testing.assert_close(ts.merge(model)(x), y)

    @pytest.mark.parametrize(
        ("layer", "x"),
        [
            (nn.Linear(4, 5), torch.randn(2, 4)),
            (nn.Conv2d(4, 5, 3), torch.randn(2, 4, 6, 6)),
            (nn.ConvTranspose1d(4, 5, 3), torch.randn(2, 4, 6)),
            (nn.Embedding(4, 5), torch.tensor([1, 3])),
        ],
    )
    def test_input_by_its_name(self, layer, x):
        model = nn.Sequential(copy.deepcopy(layer))
        ts.adapt(model, ts.TuckerConfig(rank=2, target_modules="0"))
        assert torch.equal(model[0](input=x), layer(x))

    def test_a_weight_read_by_the_parent(self):
        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return x @ self.layer.weight.T.mul(2) + self.layer.bias

        model, x = Reader(), torch.randn(3, 4)
        ts.adapt(model, ts.TuckerConfig(rank=2))
        move(model.layer, 0.5)
        y = model(x)
        y.sum().backward()
        assert model.layer.tucker["default"]["weight"].core.grad.abs().sum() > 0
        torch.testing.assert_close(ts.merge(model)(x), y)

    def test_functional_call(self):
        model, inputs, config, _, _ = build("vit")
        ts.adapt(model, config)
        for layer in adapted(model).values():
            move(layer)
        got = torch.func.functional_call(model, dict(model.named_parameters()), (inputs["x"],))
        assert torch.equal(got, model(inputs["x"]))

    def test_fast_path_of_the_encoder_without_gradients(self):
        model, inputs, config, _, _ = build("torch_encoder")
        ts.adapt(model, config)
        for layer in adapted(model).values():
            move(layer, 0.5)
        torch.testing.assert_close(see(model, inputs), outputs(model, inputs).detach())


class TestRefusals:
    def refuse(self, model, match, *targets):
        before = classes(model)
        with pytest.raises(ValueError, match=match):
            ts.adapt(model, ts.TuckerConfig(rank=2, target_modules=targets))
        assert classes(model) == before

    def test_every_target_must_match(self):
        self.refuse(nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}), "typo", "fc1", "typo")

    def test_tied(self):
        model, *_ = build("gpt2")
        self.refuse(model, "lm_head.*tied|tied.*lm_head", "c_attn", "lm_head")
        self.refuse(model, "wte.*tied", "wte")

    def test_tied_through_the_memory(self):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        model["b"].weight = nn.Parameter(model["a"].weight.data)
        self.refuse(model, "tied", "a", "b")

    def test_weight_norm(self):
        model, *_ = build("wav2vec2")
        self.refuse(model, "pos_conv_embed.conv.*parametrised", "pos_conv_embed.conv")

    def test_kinds_without_an_adapter(self):
        self.refuse(nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.Linear(4, 4)}), "'a'.*LSTM", "a", "b")
        self.refuse(nn.ModuleDict({"a": nn.Bilinear(4, 4, 2), "b": nn.Linear(4, 4)}), "'a'.*Bilinear", "a", "b")

    @pytest.mark.filterwarnings("ignore")
    def test_torchs_own_quantised_layer(self):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        model = torch.ao.quantization.quantize_dynamic(model, {"b"}, dtype=torch.qint8)
        self.refuse(model, "'b'", "a", "b")
