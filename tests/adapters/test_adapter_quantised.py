"""Tucker adapters on quantised layers: their own forward, the change beside it, and parents that read the weight."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import Box, change, disturb, gradients, parts_of, relative
from helpers import optional
from model_cases import adapted
from torch import nn

import torch_subspace as ts


def torchao_int8(model):
    quantization = optional("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def _bitsandbytes(cls, *args, **kwargs):
    module = optional("bitsandbytes").nn
    layer = nn.Linear(64, 32)
    twin = getattr(module, cls)(64, 32, *args, **kwargs)
    twin.load_state_dict(layer.state_dict())
    twin = twin.to("cpu")
    try:
        with torch.no_grad():
            twin(torch.ones(1, 64))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes' {cls} does not run here: {error}")
    return Box(twin)


PACKED = {
    "torchao_int8": lambda: torchao_int8(Box(nn.Linear(64, 32))),
    "bitsandbytes_8bit": lambda: _bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes_4bit": lambda: _bitsandbytes("Linear4bit", compute_dtype=torch.float32, quant_type="nf4"),
}


@pytest.mark.parametrize("kind", PACKED)
class TestPacked:
    """Quantised bases: their own forward, the change beside it."""

    def make(self, kind):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PACKED[kind]().eval()
        return model, torch.randn(3, 5, 64)

    def test_forward_backward_and_files(self, kind, tmp_path):
        model, x = self.make(kind)
        base = model(x).detach()
        before = model.layer.weight
        ts.adapt(model, ts.TuckerConfig(4, dropout=0.0))
        assert torch.equal(model(x), base)
        part = parts_of(disturb(model))["layer.weight"]
        assert part.shape == (32, 64) and model.layer._parameters["weight"] is before
        y, grads = gradients(model, [x])
        torch.testing.assert_close(y, base + (x.double() @ change(part).detach().mT).float(), rtol=1e-4, atol=1e-4)
        assert len(grads) == 3 and all(g.abs().sum() > 0 for g in grads.values())
        with ts.disabled(model):
            assert torch.equal(model(x), base)
        for call in (ts.merge, ts.merge_and_unload):
            with pytest.raises(ValueError, match="merge: .*'layer'.*quantised"):
                call(model)
        assert torch.equal(model(x), y)
        ts.save_adapter(model, tmp_path / "a")
        fresh, _ = self.make(kind)
        assert torch.equal(ts.load_adapter(fresh, tmp_path / "a")(x), y)
        ts.delete_adapter(model, "default")
        assert torch.equal(model(x), base) and model.layer.weight is before

    def test_gradient_of_the_input(self, kind):
        model, x = self.make(kind)
        disturb(ts.adapt(model, ts.TuckerConfig(4)))
        part, x = parts_of(model)["layer.weight"], x.requires_grad_()
        model(x).sum().backward()
        with ts.disabled(model):
            (base,) = torch.autograd.grad(model(x).sum(), x)
        torch.testing.assert_close(x.grad, base + change(part).float().sum(0), rtol=1e-4, atol=1e-4)

    def test_copies(self, kind):
        model, x = self.make(kind)
        disturb(ts.adapt(model, ts.TuckerConfig(4)))
        assert torch.equal(copy.deepcopy(model)(x), model(x))

    def test_svd_needs_the_weight(self, kind):
        model, x = self.make(kind)
        with pytest.raises(ValueError, match='adapt: init="svd".*packed'):
            ts.adapt(model, ts.TuckerConfig(4, init="svd"))
        assert type(model.layer).__name__.startswith("Linear")


def test_a_float_copy_of_a_quantised_model_takes_the_adapter(tmp_path):
    """Trained on int8, merged into float32."""
    torch.manual_seed(0)
    plain = Box(nn.Linear(64, 32))
    packed, x = torchao_int8(copy.deepcopy(plain)), torch.randn(5, 64)
    disturb(ts.adapt(packed, ts.TuckerConfig(4)))
    ts.save_adapter(packed, tmp_path / "a")
    ts.merge(ts.load_adapter(plain, tmp_path / "a"))
    assert relative(plain(x), packed(x)) < 0.02


def read_at_once(self, x):
    return F.linear(x, self.layer.weight, self.layer.bias)


def read_through_a_variable(self, x):
    layer = self.layer
    return F.linear(x, layer.weight, layer.bias)


def read_in_a_loop(self, x):
    for layer in self.children():
        x = F.linear(x, layer.weight, layer.bias)
    return x


def read_by_a_helper(self, x):
    return read_at_once(type("View", (), {"layer": self.layer}), x)


def read_by_name(self, x):
    return F.linear(x, getattr(self.layer, "weight"), self.layer.bias)  # noqa: B009


READERS = {f.__name__: f for f in (read_at_once, read_through_a_variable, read_in_a_loop, read_by_a_helper,
                                   read_by_name)}


@pytest.mark.filterwarnings("ignore")
class TestQuantised:
    def test_linear(self, tmp_path):
        model, x = torchao_int8(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))), torch.randn(3, 32)
        fresh, start = copy.deepcopy(model), model(x).detach()
        ts.adapt(model, ts.TuckerConfig(rank=4))
        assert torch.equal(model(x).detach(), start)
        model(x).sum().backward()
        for layer in adapted(model).values():
            part = layer.tucker["default"]["weight"]
            assert part.core.grad.abs().sum() > 0
            nn.init.normal_(part.core, std=0.1)
            assert not torch.equal(model(x).detach(), start)
        y = model(x).detach()
        ts.save_adapter(model, tmp_path / "a.safetensors")
        assert torch.equal(ts.load_adapter(fresh, tmp_path / "a.safetensors")(x).detach(), y)
        with pytest.raises(ValueError, match="quantised"):
            ts.merge(model)

    def changes_or_refuses(self, model, name, x):
        """The adapter is seen, or the layer is refused by its name: at `adapt`, or at the latest where it is read."""
        start = model(x).detach()
        try:
            ts.adapt(model, ts.TuckerConfig(rank=4, target_modules=name))
            nn.init.normal_(model.get_submodule(name).tucker["default"]["weight"].core, std=0.1)
            y = model(x).detach()
        except (ValueError, RuntimeError) as error:
            assert repr(name) in str(error) and "packed" in str(error)
        else:
            assert not torch.equal(y, start), "the adapter was ignored"

    def test_a_replaced_forward_never_hides_the_adapter(self):
        model = torchao_int8(nn.Sequential(nn.Linear(32, 32)))
        old = model[0].forward
        model[0].forward = lambda x: old(x)
        self.changes_or_refuses(model, "0", torch.randn(3, 32))

    @pytest.mark.parametrize("how", READERS)
    def test_a_reader_of_the_weight_never_hides_the_adapter(self, how):
        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(32, 32)

        Reader.forward = READERS[how]
        self.changes_or_refuses(torchao_int8(Reader()), "layer", torch.randn(3, 32))
