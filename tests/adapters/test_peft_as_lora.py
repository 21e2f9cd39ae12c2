"""What users of peft's LoRA are used to: biases, sizes, dtypes, single tokens, adapters that are off while merged."""
import contextlib
import copy
import json

import pytest
import torch
from adapter_cases import relative
from peft_cases import LAYERS, Holder, composed, conv1d, holder, net, peft, quiet, stir
from torch import nn

from torch_subspace.peft import TuckerConfig, TuckerLayer

pytestmark = quiet


class Reads(nn.Module):
    """A parent that computes with the weight of a layer, and never calls it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x.flatten()[:4].sum() * self.layer.weight


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x)[0]


class Tied(nn.Module):
    """Embedding and head with one weight."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return nn.functional.linear(self.emb(x.abs().long().flatten() % 7), self.head.weight)


PARENTS = {kind: lambda kind=kind: (Reads(LAYERS[kind][0]()), ["layer"]) for kind in (
    "linear", "Conv1D", "embedding", "conv2d grouped", "conv_transpose1d", "own forward")}
PARENTS |= {"out_proj": lambda: (Attends(), ["out_proj"]), "tied head": lambda: (Tied(), ["head"]),
            "tied embedding": lambda: (Tied(), ["emb"])}


@pytest.mark.parametrize("parent", PARENTS)
def test_merged_and_disabled_is_the_base(parent):
    torch.manual_seed(0)
    model, targets = PARENTS[parent]()
    for layer in (m for m in model.modules() if type(m).__name__ == "Conv1D"):
        nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, 8)
    base = model.eval().requires_grad_(False)(x)  # as peft leaves it: torch takes another path for attention then
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=2, target_modules=targets))).eval()
    y = adapted(x)
    assert relative(y, base) > 1e-3
    adapted.merge_adapter()
    assert relative(adapted(x), y) < 1e-5
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), base)
        adapted.merge_adapter()  # while it is off
        assert torch.equal(adapted(x), base)
    assert relative(adapted(x), y) < 1e-5
    adapted.unmerge_adapter()
    adapted.unload()
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("layer,sizes", [
    (nn.Linear(3, 5), (3, 5)), (conv1d(5, 3), (3, 5)), (nn.Embedding(7, 5), (7, 5)), (nn.Conv1d(3, 5, 2), (3, 5)),
    (nn.Conv2d(4, 6, 3, groups=2), (4, 6)), (nn.Conv3d(3, 5, 1), (3, 5)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 6))])
def test_sizes_of_a_layer(layer, sizes):
    own = {n: getattr(layer, n) for n in ("in_channels", "kernel_size", "embedding_dim", "nf") if hasattr(layer, n)}
    adapted = peft.get_peft_model(Holder(layer), TuckerConfig(r=2, target_modules=["layer"])).base_model.model.layer
    assert (adapted.in_features, adapted.out_features) == sizes
    assert own == {n: getattr(adapted, n) for n in own}


@pytest.mark.parametrize("bias", ["all", "tucker_only"])
def test_biases_are_trained_saved_and_loaded(bias, tmp_path):
    if not hasattr(peft.tuners.tuners_utils.BaseTuner, "_get_learnable_bias_state_dict"):
        with pytest.raises(ValueError, match=f"bias='{bias}' needs peft 0.21"):
            TuckerConfig(bias=bias)
        return
    model, i = net()
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["lin", "conv"], bias=bias)))
    trained = {n.removeprefix("base_model.model.") for n, p in adapted.named_parameters() if p.requires_grad}
    biases = {n for n in trained if n.endswith("bias")}
    ours = {"lin.base_layer.bias", *(f"blocks.{b}.conv.base_layer.bias" for b in range(3))}
    assert biases == (ours if bias == "tucker_only" else ours | {"up.bias", "norm.bias", "head.bias"})
    adapted(i).square().sum().backward()
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if n.endswith("bias") and p.requires_grad:
                assert p.grad.abs().sum() > 0
                p += 0.1
    y = adapted(i)
    adapted.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == bias
    assert torch.equal(peft.PeftModel.from_pretrained(net()[0], tmp_path)(i), y)
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        adapted.add_adapter("other", TuckerConfig(r=2, target_modules=["lin"], bias="all"))
    with pytest.warns(UserWarning, match="does not produce the same output"), adapted.disable_adapter():
        pass


def test_a_bias_that_there_is_not():
    with pytest.raises(ValueError, match="bias must be one of none, all, tucker_only, got 'lora_only'"):
        TuckerConfig(bias="lora_only")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_factors_is_asked_for(dtype, tmp_path):
    """autocast_adapter_dtype=False keeps them in the base's; they are computed with in float32 all the same."""
    config = TuckerConfig(r=2, target_modules=["layer"])
    for kind in ("linear", "conv1d circular", "embedding", "own forward"):
        model, x = holder(kind, dtype)
        before = model(x)
        with warnings_of(kind, dtype):
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
            assert torch.equal(adapted(x), before)
            adapted.add_adapter("other", config, autocast_adapter_dtype=False)
            stir(adapted)
            tensors = {n: p for n, p in adapted.named_parameters() if "tucker_" in n}
            assert len(tensors) > 4 and {p.dtype for p in tensors.values()} == {dtype}
            y = adapted(x)
            y.float().sum().backward()
            assert y.dtype == dtype and all(p.grad.dtype == dtype for n, p in tensors.items() if "default" in n)
            weight = composed(model.layer)
            assert relative(model.layer.weight, weight) < {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-12)
            adapted.save_pretrained(tmp_path / kind)
            plain = holder(kind, dtype)[0]
            again = peft.PeftModel.from_pretrained(plain, tmp_path / kind, autocast_adapter_dtype=False)
        assert {p.dtype for n, p in again.named_parameters() if "tucker_" in n} == {dtype}
        assert torch.equal(again(x), y)


def warnings_of(kind, dtype):
    half = kind == "own forward" and dtype != torch.float64
    return pytest.warns(UserWarning, match="in its own way") if half else contextlib.nullcontext()


def test_single_tokens_beside_the_adapter(tmp_path):
    model, i = net()
    before = model(i)
    config = TuckerConfig(r=2, target_modules=["lin"], trainable_token_indices={"emb": [3, 5]})
    adapted = stir(peft.get_peft_model(model, config))
    (delta,) = [p for n, p in adapted.named_parameters() if "trainable_tokens_delta" in n and p.requires_grad]
    with torch.no_grad():
        delta += 1
    y = adapted(i)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(net()[0], tmp_path)(i), y)
    with adapted.disable_adapter():
        assert torch.equal(adapted(i), before)
    plain = adapted.merge_and_unload()
    assert relative(plain(i), y) < 1e-5 and type(plain.emb) is nn.Embedding
    assert not any(isinstance(m, TuckerLayer) for m in plain.modules())


def test_what_is_merged_cannot_be_deleted():
    """In the words of peft 0.21, also with older ones."""
    model, i = net()
    adapted = stir(peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["lin"])))
    adapted.merge_adapter()
    y = adapted(i)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        adapted.delete_adapter("default")
    assert list(adapted.peft_config) == ["default"] and torch.equal(adapted(i), y)


def test_factors_are_no_weights_out_of_reach(recwarn):
    """Those of another adapter, frozen, are not what target_parameters is for."""
    adapted = peft.get_peft_model(net()[0], TuckerConfig(r=8, target_modules="all-conv"))
    for name in "abcd":
        adapted.add_adapter(name, TuckerConfig(r=8, target_modules="all-conv"))
    assert not [w for w in recwarn if "in parameters of no layer" in str(w.message)]


class Sizes(nn.Module):
    """Attention to keys and values of other sizes."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True, add_bias_kv=True)

    def forward(self, x):
        return self.mha(x, x[..., :4], x[..., :6])[0]


class Encodes(nn.Module):
    """A parent that reads what is in the attention, and takes torch's fast path where that may be."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("make,target", [(Attends, "mha"), (Sizes, "mha"), (Encodes, "self_attn")])
def test_attention_as_a_whole(make, target, tmp_path):
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3, 8)
    plain = copy.deepcopy(model)
    base = model(x)
    adapted = peft.get_peft_model(model, TuckerConfig(r=2, alpha=3.0, target_modules=[target]))
    assert torch.equal(adapted(x), base)
    for n, p in adapted.named_parameters():
        if n.endswith("core"):
            nn.init.normal_(p, std=0.3)
    y = adapted(x)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    with torch.no_grad():
        assert relative(adapted(x), y) < 1e-5  # torch's fast path
    name = "encoder.layers.0.self_attn" if make is Encodes else target
    whole = model.get_submodule(name)
    assert whole.in_proj_bias is whole.base_layer.in_proj_bias and whole.in_features == 8
    merged = copy.deepcopy(adapted).merge_and_unload()
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    inside = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if make is Sizes else ["in_proj_weight"]
    layers = range(2 if make is Encodes else 1)
    assert changed == {f"{name.replace('0', str(i))}.{n}" for i in layers for n in (*inside, "out_proj.weight")}
    adapted.merge_adapter()
    assert relative(adapted(x), y) < 1e-5
    with adapted.disable_adapter():
        assert relative(adapted(x), base) < 1e-6 and torch.equal(model(x), adapted(x))
    assert relative(adapted(x), y) < 1e-5
    adapted.save_pretrained(tmp_path)
    assert relative(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(x), y) < 1e-5
    adapted.add_weighted_adapter(["default"], [-1.0], "minus")
    adapted.base_model.set_adapter(["default", "minus"])
    assert relative(adapted(x), base) < 1e-5
    adapted.set_adapter("default")
    assert relative(adapted.merge_and_unload()(x), y) < 1e-5
    assert type(model.get_submodule(name)) is nn.MultiheadAttention
    assert set(model.state_dict()) == set(plain.state_dict())


def test_attention_as_a_whole_or_its_output():
    """Each in an adapter of its own would write files that don't fit a plain model."""
    adapted = peft.get_peft_model(Attends(), TuckerConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(ValueError, match="output projection of 'mha' has an adapter already"):
        adapted.add_adapter("other", TuckerConfig(r=2, target_modules=["mha"]))
    adapted = peft.get_peft_model(Attends(), TuckerConfig(r=2, target_modules=["mha", "out_proj"]))
    assert sum(isinstance(m, TuckerLayer) for m in adapted.modules()) == 2
    adapted.add_adapter("other", TuckerConfig(r=3, target_modules=["mha"]))
    with pytest.raises(ValueError, match="lies in 'mha'"):
        adapted.add_adapter("third", TuckerConfig(r=3, target_modules=["out_proj"]))
