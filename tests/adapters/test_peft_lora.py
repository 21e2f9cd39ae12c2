"""peft's LoRA checkpoints: in as Tucker adapters, trained, and out again."""
import copy
import json

import pytest
import torch
from adapter_cases import relative
from peft_cases import ALL, holder, net, peft, quiet, stir
from torch import nn

import torch_subspace as ts
from torch_subspace.adapters.state import layers
from torch_subspace.peft import TuckerConfig, export_lora, import_lora

pytestmark = quiet


def lora(model, **more):
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["emb", "lin", "conv"], "modules_to_save": ["head"]} | more
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    torch.manual_seed(5)
    for n, p in adapted.named_parameters():
        if "lora_" in n or "modules_to_save" in n:
            p.data.normal_(0, 0.3)
        if "lora_embedding_A" in n:
            p.data[:, 0] = 0  # as training leaves the padding row
    return adapted


CHECKPOINTS = {
    "plain": {}, "rslora": {"use_rslora": True}, "dropout": {"lora_dropout": 0.1}, "above the size": {"r": 9},
    "patterns": {"rank_pattern": {"lin": 3, "blocks.1.conv": 2}, "alpha_pattern": {"lin": 5}},
    "Conv1D": {"target_modules": ["up"], "fan_in_fan_out": True},
    "one of several": {"target_modules": ["blocks.0.conv", "lin"]},
    "head alone": {"target_modules": ["lin", "head"], "modules_to_save": None},
}


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_import_lora(tmp_path, kind, standalone):
    model, i = net()
    original = lora(model, **CHECKPOINTS[kind]).eval()
    y = original(i)
    original.save_pretrained(tmp_path)
    ours = import_lora(net()[0], tmp_path, standalone=standalone).eval()
    assert relative(ours(i), y) < 3e-6
    assert isinstance(ours, nn.Module) and hasattr(ours, "peft_config") != standalone
    trainable = [p for p in ours.parameters() if p.requires_grad]
    assert trainable
    plain = ts.merge_and_unload(ours) if standalone else ours.merge_and_unload()
    assert relative(plain(i), y) < 3e-6


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_lora_out_again(tmp_path, kind, standalone):
    model, i = net()
    original = lora(model, **CHECKPOINTS[kind]).eval()
    y = original(i)
    original.save_pretrained(tmp_path / "in")
    ours = import_lora(net()[0], tmp_path / "in", "other", standalone=standalone)
    export_lora(ours, tmp_path / "out", "other")
    back = peft.PeftModel.from_pretrained(net()[0], tmp_path / "out").eval()
    assert isinstance(back.peft_config["default"], peft.LoraConfig) and relative(back(i), y) < 3e-6
    if kind in ("plain", "rslora", "patterns"):
        for key, t in peft.get_peft_model_state_dict(original).items():
            torch.testing.assert_close(peft.get_peft_model_state_dict(back)[key], t, rtol=0, atol=0)


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("rank", [3, [4, 2]])
def test_export_lora(tmp_path, standalone, rank):
    model, i = net()
    if standalone:
        model.up = nn.Linear(8, 8)
        plain = copy.deepcopy(model)
        config = ts.TuckerConfig(rank=rank, kernel_rank=2, alpha=0.7, target_modules=("all-linear", "all-conv", "emb"),
                                 save_modules="head")
        ts.adapt(model, config)
        for layer in layers(model).values():
            for p in layer.tucker.parameters():
                p.data.normal_(0, 0.3)
        adapted = model
    else:
        plain = net()[0]
        adapted = stir(peft.get_peft_model(model, TuckerConfig(r=rank, kernel_rank=2, alpha=0.7, target_modules=ALL)))
    y = adapted.eval()(i)
    export_lora(adapted, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (rank if rank == 3 else 2)
    back = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert relative(back(i), y) < 2e-6


def test_an_imported_lora_trains_as_one_more_adapter(tmp_path):
    lora(net()[0]).save_pretrained(tmp_path)
    model, i = net()
    adapted = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["lin"]), "first")
    assert import_lora(adapted, tmp_path, "second") is adapted
    adapted.set_adapter("second")
    assert torch.equal(adapted.base_model.model.lin(input=torch.eye(6)), model.lin(torch.eye(6)))
    adapted(i).sum().backward()
    assert model.lin.tucker_parts["second"].core.grad.abs().sum() > 0
    assert torch.equal(model.lin.tucker_parts["second"].core, torch.eye(4))
    state = peft.get_peft_model_state_dict(lora(net()[0]))
    other = import_lora(net()[0], (state, peft.LoraConfig(r=4, lora_alpha=6, modules_to_save=["head"])))
    assert torch.equal(other.base_model.model.lin.tucker_parts["default"].core, torch.eye(4))


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("change, word", [
    ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"target_modules": ["grouped"]}, "grouped"),
    ({"init_lora_weights": "pissa", "target_modules": ["lin"]}, "pissa"),
    ({"lora_bias": True, "target_modules": ["lin"]}, "lora_bias"),
])
def test_lora_that_is_refused(tmp_path, change, word, standalone):
    model, _ = net()
    model.grouped = nn.Conv1d(4, 4, 3, groups=2)
    lora(model, **change).save_pretrained(tmp_path)
    target, _ = net()
    target.grouped = nn.Conv1d(4, 4, 3, groups=2)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=word):
        import_lora(target, tmp_path, standalone=standalone)
    assert list(target.state_dict()) == list(before)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        import_lora(net()[0], tmp_path)
    peft.get_peft_model(net()[0], TuckerConfig(r=2, target_modules=["lin"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type TUCKER"):
        import_lora(net()[0], tmp_path)
    lora(net()[0]).save_pretrained(tmp_path)
    small, _ = net()
    small.lin = nn.Linear(6, 9)
    with pytest.raises(ValueError, match="'lin' is \\(9, 6\\) in the model"):
        import_lora(small, tmp_path)
    small, _ = net()
    small.head = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="saved module 'head'"):
        import_lora(small, tmp_path)
    del small.lin
    with pytest.raises(ValueError, match="no such layer"):
        import_lora(small, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="truncated"):
        import_lora(net()[0], tmp_path)


@pytest.mark.parametrize("kind", ["conv2d grouped", "conv2d reflect", "conv2d dilated strided", "conv_transpose1d"])
def test_what_lora_cannot_say(tmp_path, kind):
    model, _ = holder(kind)
    adapted = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match="'layer' is a .* peft's LoRA computes something else"):
        export_lora(adapted, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="no adapter 'other'; there are \\['default'\\]"):
        export_lora(adapted, tmp_path, "other")


def llama(vocabulary=64, tied=False, rows=None):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied)).eval()
    if rows:
        torch.manual_seed(7)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


IDS = torch.tensor([[1, 5, 7, 3]])


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("targets, rows, tied, saved", [
    (["q_proj", "lm_head"], None, False, None), (["embed_tokens", "lm_head"], None, False, None),
    (["q_proj"], 70, False, None), (["q_proj"], 70, True, None), (["q_proj", "lm_head"], 70, False, None),
    (["embed_tokens", "lm_head"], 70, False, None), (["q_proj"], 70, False, ["embed_tokens", "lm_head"]),
])
def test_heads_embeddings_and_vocabularies(tmp_path, targets, rows, tied, saved, standalone):
    original = lora(llama(tied=tied, rows=rows), target_modules=targets, modules_to_save=saved).eval()
    y = original(IDS).logits
    original.save_pretrained(tmp_path / "lora", save_embedding_layers=bool(rows) or "auto")
    for before in (None, rows):
        ours = import_lora(llama(tied=tied, rows=before), tmp_path / "lora", standalone=standalone).eval()
        assert relative(ours(IDS).logits, y) < 1e-5
    if standalone:
        ts.save_adapter(ours, tmp_path / "ours.safetensors")
        if "lm_head" not in targets:  # its base is the checkpoint's too, and no part of the adapter
            back = ts.load_adapter(llama(tied=tied, rows=rows), tmp_path / "ours.safetensors")
            assert relative(back(IDS).logits, y) < 1e-5
            assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("standalone", [False, True])
def test_a_vocabulary_is_as_before_where_the_rest_does_not_fit(tmp_path, standalone):
    lora(llama(rows=70), target_modules=["q_proj", "lm_head"], modules_to_save=None).save_pretrained(
        tmp_path, save_embedding_layers=True)
    model = llama()
    model.model.layers[0].self_attn.q_proj = nn.Linear(16, 20)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.q_proj' is \\(20, 16\\) in the model"):
        import_lora(model, tmp_path, standalone=standalone)
    assert model.config.vocab_size == 64 and list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("standalone", [False, True])
def test_a_bare_base_takes_the_lora_of_a_whole_model(tmp_path, standalone):
    original = lora(llama(), target_modules=["q_proj"], modules_to_save=None, alpha_pattern={"self_attn.q_proj": 3})
    original.save_pretrained(tmp_path)
    ours = import_lora(llama().model, tmp_path, standalone=standalone)
    want = original.base_model.model.model(IDS).last_hidden_state
    assert relative(ours(IDS).last_hidden_state, want) < 1e-5
    with pytest.raises(ValueError, match="no such layer in the model"):
        import_lora(nn.ModuleDict({"q": nn.Linear(16, 16)}), tmp_path, standalone=standalone)
