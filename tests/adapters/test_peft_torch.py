"""The method `tucker` in peft beside the rest of torch: parents, half types, compile, packed and hooked bases."""
import warnings

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import relative
from peft_cases import Holder, holder, peft, quiet, reference, stir
from torch import nn

from torch_subspace.peft import TuckerConfig

pytestmark = quiet


@pytest.mark.parametrize("training", [True, False])
def test_parents_that_read_weights_see_the_adapter(training):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 8)
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["out_proj", "linear1", "linear2"])))
    with torch.set_grad_enabled(training):
        y = adapted(x)
        plain = adapted.merge_and_unload()
        assert relative(y, plain(x)) < 1e-5  # in eval mode torch's fast path reads the weights


def test_dropout():
    model, _ = holder("linear")
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, dropout=0.5, target_modules=["layer"])))
    x = torch.randn(64, 7)
    torch.manual_seed(1)
    one = adapted(x)
    torch.manual_seed(1)
    assert torch.equal(adapted(x), one) and not torch.equal(adapted(x), one)
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x)) and relative(adapted(x), reference(model.layer, x)) < 1e-6
    with pytest.warns(UserWarning, match="dropout has no effect on 'layer'"):
        peft.get_peft_model(holder("embedding")[0], TuckerConfig(r=3, dropout=0.5, target_modules=["layer"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "Conv1D"])
def test_half_precision_base(kind, dtype):
    model, x = holder(kind, dtype)
    before = model(x)
    adapted = peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"]))
    assert all(p.dtype == torch.float32 for p in model.layer.tucker_parts.parameters())
    assert torch.equal(adapted(x), before)
    y = stir(adapted)(x)
    assert y.dtype == dtype and relative(y, reference(model.layer, x)) < 0.02
    y.float().sum().backward()
    weight = model.layer.base_layer.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert torch.equal(model.layer.base_layer.weight, weight)
    assert model.layer.tucker_parts.to(dtype)["default"].core.dtype == torch.float32  # model.half() leaves them wide
    stir(adapted, size=0.01)
    with pytest.warns(UserWarning, match="half precision swallows"):
        adapted.merge_adapter()


@pytest.mark.parametrize("kind", ["linear", "conv2d reflect"])
def test_autocast(kind):
    model, x = holder(kind)
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"])))
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and relative(y, reference(model.layer, x)) < 0.02
    assert model.layer.tucker_parts["default"].core.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "own forward"])
def test_compile(kind):
    model, x = holder(kind)
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"])))
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert relative(y, adapted(x)) < 1e-6


def test_packed_base():
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = Holder(nn.Linear(64, 32))
    torchao.quantize_(model.layer, torchao.Int8WeightOnlyConfig())
    x = torch.randn(3, 64)
    before = model(x)
    adapted = peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"]))
    assert torch.equal(adapted(x), before)
    stir(adapted)
    y = adapted(x)
    assert relative(y, before.double() + x.double() @ model.layer.get_delta_weight("default").double().mT) < 1e-6
    y.sum().backward()
    assert model.layer.tucker_parts["default"].core.grad.abs().sum() > 0
    assert relative(F.linear(x, model.layer.weight, model.layer.bias), y) < 1e-5  # what a parent reads
    with pytest.raises(ValueError, match="quantised"):
        adapted.merge_adapter()


def test_hooked_base():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, x = holder("linear")
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=3, target_modules=["layer"])))
    y = adapted(x)
    add_hook_to_module(model.layer.base_layer, ModelHook())
    assert relative(adapted(x), y) < 1e-6
