"""Models that are changed after `adapt`: layers and heads replaced, resized, tied."""

import copy

import pytest
import torch
from adapter_cases import Net, disturb, net, relative
from helpers import optional
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import torch_subspace as ts


def saved(seed=0):
    model, x = net(seed)
    return disturb(ts.adapt(model, ts.TuckerConfig(2, save_modules="head"))), x


class TestReplaced:
    @pytest.mark.parametrize("key, replace, message", [
        ("head", lambda m, new: setattr(m, "head", new), "Net: 'head' is trained whole with an adapter"),
        ("stem", lambda m, new: setattr(m, "stem", new), "Net: 'stem' has an adapter"),
        ("body.fc", lambda m, new: m.body.update({"fc": new}), "ModuleDict: 'fc' has an adapter"),
        ("body.fc", lambda m, new: setattr(m, "body", nn.ModuleDict({"fc": new})), "Net: 'body.conv' has an adapter"),
        ("head", lambda m, new: m.add_module("head", new), "'head' is trained whole"),
    ])
    def test_what_an_adapter_has_cannot_be_replaced(self, key, replace, message):
        model, x = saved()
        y, before = model(x), model.get_submodule(key)
        with pytest.raises(ValueError, match=message + ".*replace it before `adapt`"):
            replace(model, nn.Linear(8, 5))
        assert model.get_submodule(key) is before and torch.equal(model(x), y)
        ts.merge_and_unload(model)
        replace(model, nn.Linear(8, 5))

    def test_in_a_sequence_and_by_swap_head(self):
        model = ts.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ts.TuckerConfig(2, save_modules="1"))
        with pytest.raises(ValueError, match="Sequential: '0' has an adapter"):
            model[0] = nn.Linear(4, 4)
        with pytest.raises(ValueError, match="Sequential: '1' is trained whole"):
            ts.swap_head(model, 3, 1)
        ts.delete_adapter(model, "default")
        model[0] = nn.Linear(4, 4)

    def test_wrappers_copies_and_whole_models_may_take_its_place(self):
        class Wrapper(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x)

        model, x = saved()
        y, fc = model(x), model.body["fc"]
        model.body["fc"] = Wrapper(fc)
        assert torch.equal(model(x), y)
        model.body["fc"] = copy.deepcopy(model.body["fc"])
        assert torch.equal(model(x), y)
        model.body["fc"] = fc
        model.head = torch.compile(model.head, backend="eager")
        holder = Wrapper(model)
        holder.inner = saved(1)[0]
        holder.inner = nn.Linear(3, 3)
        del model.head
        model.norm = nn.Identity()

    @pytest.mark.parametrize("key", ["head", "stem", "body.fc"])
    def test_deleted_first(self, key, path):
        model, _ = saved()
        parent, _, name = key.rpartition(".")
        parent = model.get_submodule(parent)
        delattr(parent, name)
        ts.save_adapter(model, path)  # what is gone is gone
        setattr(parent, name, nn.Linear(8, 5))

        def enter(model):
            with ts.disabled(model):
                pass

        def export(model, path):
            optional("peft")
            from torch_subspace.peft import export_lora

            export_lora(model, path)

        for use in (lambda m: ts.save_adapter(m, path), ts.merge, enter, ts.adapter_parameters, ts.merge_and_unload,
                    lambda m: ts.save_adapter(copy.deepcopy(m), path), lambda m: export(m, path)):
            with pytest.raises(ValueError, match=f"^[a-z_]+: '{key}' was replaced by a Linear that adapter 'default'"):
                use(model)
        ts.delete_adapter(model, "default")
        assert not any(k.startswith("tucker") for m in model.modules() for k in m.__dict__)

    def test_blocks_that_are_dropped_or_shifted(self, path):
        model = ts.adapt(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), ts.TuckerConfig(2))
        model.insert(0, nn.Linear(4, 4))
        ts.save_adapter(model, path)
        del model[0], model[1]
        ts.save_adapter(model, path)
        ts.merge(model)

    def test_by_peft(self):
        peft = optional("peft")
        from torch_subspace.peft import TuckerConfig

        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        adapted = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["0"]))
        with pytest.raises(ValueError, match="Sequential: '0' has an adapter"):
            model[0] = nn.Linear(4, 4)
        plain = adapted.merge_and_unload()
        plain[0] = nn.Linear(4, 4)


def llama(tied=False, vocabulary=64):
    transformers = optional("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied)).eval()


IDS = torch.tensor([[1, 5, 7, 3]])


class TestResized:
    @pytest.mark.parametrize("config, error, match", [
        ({"target_modules": ("q_proj", "embed_tokens")}, RuntimeError, "data = … would write"),
        ({"target_modules": ("q_proj", "lm_head")}, ValueError, "'lm_head' has an adapter"),
        ({"target_modules": "q_proj", "save_modules": "lm_head"}, ValueError, "'lm_head' is trained whole"),
    ])
    def test_a_vocabulary(self, config, error, match):
        model = ts.adapt(llama(), ts.TuckerConfig(2, **config))
        with pytest.raises(error, match=match):
            model.resize_token_embeddings(70, mean_resizing=False)

    def test_saved_embeddings(self, path):
        model = ts.adapt(llama(), ts.TuckerConfig(2, target_modules="q_proj", save_modules="embed_tokens"))
        model.resize_token_embeddings(70, mean_resizing=False)  # its parameter stays, and takes the new tensor
        for use in (lambda: ts.disabled(model).__enter__(), lambda: ts.set_adapter(model, None)):
            with pytest.raises(ValueError, match=r"'model.embed_tokens' is {.*: \(70, 16\)} now and was .*64"):
                use()
        y = model(IDS).logits
        assert ts.active_adapters(model) == {"default": 1.0}
        ts.save_adapter(model, path)
        other = llama()
        other.resize_token_embeddings(70, mean_resizing=False)
        other.lm_head.load_state_dict(model.lm_head.state_dict())
        assert torch.equal(ts.load_adapter(other, path)(IDS).logits, y)

    @pytest.mark.parametrize("use", [ts.merge, ts.merge_and_unload, lambda m: ts.save_adapter(m, "unwritten")])
    def test_weights_of_another_shape(self, use, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model, _ = saved()
        with ts.disabled(model):
            model.body["fc"].weight.data = torch.ones(9, 8)
        with pytest.raises(ValueError, match=r"the weight of 'body.fc' is \(9, 8\) and was \(8, 8\)"):
            use(model)
        assert not list(tmp_path.iterdir())

    def test_resized_while_merged(self):
        model, _ = saved()
        ts.merge(model).body["fc"].weight.data = torch.ones(9, 8)
        stem = model.stem.weight.clone()
        with pytest.raises(ValueError, match="unmerge: the weight of 'body.fc' was replaced or resized"):
            ts.unmerge(model)
        assert torch.equal(model.stem.weight, stem)


class TestTied:
    def test_embedding_and_head(self, path):
        model = ts.adapt(llama(True), ts.TuckerConfig(2, target_modules="q_proj",
                                                      save_modules=("embed_tokens", "lm_head")))
        disturb(model)
        base = llama(True)(IDS).logits
        groups = ts.adapter_parameters(model, lr=0.1)
        assert sum(p is model.lm_head.weight for g in groups for p in g["params"]) == 1
        optimizer = torch.optim.SGD(groups)
        model(IDS).logits.square().sum().backward()
        optimizer.step()
        y = model(IDS).logits
        with ts.disabled(model):
            assert torch.equal(model(IDS).logits, base)
        assert torch.equal(model(IDS).logits, y) and model.lm_head.weight is model.model.embed_tokens.weight
        ts.save_adapter(model, path)
        assert [k for k in load_file(path) if k.endswith(("embed_tokens.weight", "lm_head.weight"))] == [
            "model.embed_tokens.weight"]
        other = ts.load_adapter(llama(True), path)
        assert torch.equal(other(IDS).logits, y) and other.lm_head.weight is other.model.embed_tokens.weight
        assert relative(ts.load_adapter(llama(False), path)(IDS).logits, y) < 1e-6  # untied: the same numbers twice
        assert torch.equal(ts.merge_and_unload(other).lm_head.weight, model.lm_head.weight)

    def test_several_adapters(self):
        """Each has its own, whichever of the tied modules it keeps."""
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
        model["b"].weight = model["a"].weight
        plain = model["a"].weight.clone()
        for value, (name, keep) in enumerate({"both": ("a", "b"), "first": "a", "last": "b"}.items(), 1):
            ts.adapt(model, ts.TuckerConfig(2, target_modules="c", save_modules=keep), name)
            model["a"].weight.data.fill_(value)
        for value, name in enumerate(("both", "first", "last"), 1):
            ts.set_adapter(model, name)
            assert (model["a"].weight == value).all() and model["b"].weight is model["a"].weight
            with ts.disabled(model):
                assert torch.equal(model["b"].weight, plain)


class TestWrappers:
    def test_averages(self, path):
        model, x = saved()
        average = AveragedModel(model)
        ts.save_adapter(average, path)
        assert "stem.weight.core" in load_file(path)
        plain, _ = net()
        assert torch.equal(ts.load_adapter(plain, path)(x), model(x))
        assert torch.equal(ts.load_adapter(AveragedModel(net()[0]), path)(x), model(x))
        with ts.disabled(average):
            assert torch.equal(average(x), net()[0](x))

    @pytest.mark.parametrize("wrap", [
        lambda m: nn.ModuleDict({"model": m}), lambda m: nn.ModuleDict({"a": nn.ModuleDict({"b": m})}),
        lambda m: nn.ModuleDict({"model": m, "loss": nn.Linear(2, 2)}),
    ])
    def test_a_prefix_more_or_fewer(self, wrap, path):
        model, x = saved()
        y = model(x)
        ts.save_adapter(wrap(model), path)
        assert torch.equal(ts.load_adapter(net()[0], path)(x), y)
        plain, _ = net()
        ts.load_adapter(nn.ModuleDict({"other": wrap(plain)}), path)
        assert torch.equal(plain(x), y)
        ts.save_adapter(model, path)
        plain, _ = net()
        ts.load_adapter(wrap(plain), path)
        assert torch.equal(plain(x), y)

    def test_parts_compiled_inside(self, path):
        model, x = saved()
        y = model(x)
        model.body["fc"] = torch.compile(model.body["fc"], backend="eager")
        ts.save_adapter(model, path)
        assert "body.fc.weight.core" in load_file(path)
        assert torch.equal(ts.load_adapter(net()[0], path)(x), y)
        other, _ = net()
        other.body["fc"] = torch.compile(other.body["fc"], backend="eager")
        assert torch.equal(ts.load_adapter(other, path)(x), y)

    def test_a_bare_base_in_place_of_a_language_model(self, path):
        model = disturb(ts.adapt(llama(), ts.TuckerConfig(2, target_modules="q_proj")))
        ts.save_adapter(model, path)
        bare = ts.load_adapter(llama().model, path)
        assert torch.equal(bare(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
        ts.save_adapter(bare, path)
        assert torch.equal(ts.load_adapter(llama(), path)(IDS).logits, model(IDS).logits)

    def test_where_it_does_not_fit_the_error_names_the_prefix(self, path):
        ts.save_adapter(disturb(ts.adapt(llama(), ts.TuckerConfig(2, target_modules="q_proj", save_modules="lm_head"))),
                        path)
        with pytest.raises(ValueError, match="no layer 'model.layers.*without 'model.' 1 of the file's 2 modules"):
            ts.load_adapter(llama().model, path)
        model, _ = saved()
        ts.save_adapter(model, path)
        twins = nn.ModuleDict({"one": Net(), "two": Net()})
        with pytest.raises(ValueError, match="'stem'.*under 'one.' 4 of .* 4 modules would fit, as in 1 other"):
            ts.load_adapter(twins, path)
