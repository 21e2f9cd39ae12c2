"""Files of Tucker adapters that are refused, and the model that stays as it was."""

import json
import os

import pytest
import torch
from adapter_cases import assert_same_state, disturb, metadata_of, net, state_of, written
from safetensors.torch import load_file, save_file
from torch import nn

import torch_subspace as ts


def snapshot(model):
    """What must not change when a call fails."""
    return (state_of(model), [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()],
            [p.requires_grad for p in model.parameters()], ts.active_adapters(model))


def assert_snapshot(model, before):
    now = snapshot(model)
    assert_same_state(now[0], before[0])
    assert now[1:] == before[1:]


def tied_to(layer):
    other = nn.Linear(layer.in_features, layer.out_features)
    other.weight = layer.weight
    return other


class TestRefusedFiles:
    @pytest.fixture(params=["plain", "same", "other"])
    def model(self, request):
        """Models that a file may meet: without adapter, with the very one, with another one."""
        model, _ = net()
        if request.param != "plain":
            config = ts.TuckerConfig(2, alpha=3.0, save_modules="head")
            ts.adapt(model, config if request.param == "same" else ts.TuckerConfig(4, target_modules="fc"))
            disturb(model)
        return model

    def check(self, model, path, match, error=ValueError):
        before = snapshot(model)
        with pytest.raises(error, match=f"(?s)^load_adapter: .*{match}"):
            ts.load_adapter(model, path)
        assert_snapshot(model, before)

    @pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999])
    def test_truncated(self, model, path, part):
        written(path)
        data = path.read_bytes()
        path.write_bytes(data[:int(part * len(data))])
        self.check(model, path, "truncated")

    def test_not_a_file_of_tensors(self, model, path):
        path.write_bytes(os.urandom(1000))
        self.check(model, path, "truncated or not")
        torch.save({"a": torch.ones(2)}, path)
        self.check(model, path, "truncated or not")

    def test_missing_and_a_folder(self, model, path):
        self.check(model, path, "no file", FileNotFoundError)
        path.mkdir()
        self.check(model, path, "no file", FileNotFoundError)

    def test_foreign(self, model, path):
        low = {f"base_model.model.fc.lora_{k}.weight": torch.ones(8, 8) for k in "AB"}
        for metadata in (None, {"format": "pt"}):
            save_file(low, path, metadata)
            self.check(model, path, "not an adapter of torch_subspace")

    def test_another_version(self, model, path):
        written(path)
        save_file(load_file(path), path, metadata_of(path) | {"version": "2"})
        self.check(model, path, "version")

    def rewrite(self, path, tensors=None, **changes):
        about = json.loads(metadata_of(path)["config"])
        for keys, value in changes.items():
            place, *keys = keys.split("__")
            at = about[place] if keys else about
            for key in keys[:-1]:
                at = at[key.replace("_", ".")] if key.replace("_", ".") in at else at[key]
            if value is None:
                del at[keys[-1] if keys else place]
            else:
                at[keys[-1] if keys else place] = value
        metadata = metadata_of(path) | {"config": json.dumps(about)}
        save_file(tensors or load_file(path), path, metadata)

    @pytest.mark.parametrize("changes", [
        {"layers": None}, {"layers": []}, {"layers": 3}, {"saved": None}, {"config": None},
        {"layers__body_fc__weight__scale": None}, {"layers__body_fc__weight__scale": "much"},
        {"layers__body_fc__weight__shape": None}, {"layers__body_fc__weight__ranks": None},
        {"layers__body_fc__weight__ranks": 2}, {"layers__body_fc__weight__shape": [8]},
        {"layers__body_fc__weight__dropout": None}, {"layers__body_fc__weight__dropout": 2.0},
    ])
    def test_a_description_that_is_broken(self, model, path, changes):
        written(path)
        self.rewrite(path, **changes)
        self.check(model, path, "")

    def test_tensors_that_are_missing_or_too_many(self, model, path):
        written(path)
        tensors = load_file(path)
        for other in ({k: t for k, t in tensors.items() if k != "body.fc.weight.core"},
                      {k: t for k, t in tensors.items() if k != "head.bias"}, tensors | {"more": torch.ones(1)}):
            save_file(other, path, metadata_of(path))
            self.check(model, path, "contradicts itself")

    @pytest.mark.parametrize("key, shape", [
        ("body.fc.weight.core", (3, 2)), ("body.fc.weight.factor0", (8, 3)), ("body.fc.weight.factor1", (9, 2)),
        ("stem.weight.core", (2, 2, 3)), ("head.weight", (4, 8)), ("head.bias", ()),
    ])
    def test_tensors_of_other_shapes(self, model, path, key, shape):
        written(path)
        save_file(load_file(path) | {key: torch.zeros(shape)}, path, metadata_of(path))
        self.check(model, path, f"does not fit the model: .*{key}")

    def test_other_models(self, path):
        written(path)
        changes = {
            r"body\.fc\.weight": lambda m: m.body.update({"fc": nn.Linear(8, 9)}),
            r"no layer 'body\.fc'": lambda m: m.body.pop("fc"),
            r"'body\.fc' is a LayerNorm": lambda m: m.body.update({"fc": nn.LayerNorm(8)}),
            r"'body\.conv'|body\.conv\.weight": lambda m: m.body.update({"conv": nn.Conv1d(8, 8, 3)}),
            r"head\.weight is": lambda m: setattr(m, "head", nn.Linear(8, 5)),
            "'head' has": lambda m: setattr(m, "head", nn.Linear(8, 3, bias=False)),
            "no module 'head'": lambda m: delattr(m, "head"),
            "tied": lambda m: m.body.update({"again": tied_to(m.body["fc"])}),
            "parametrised": lambda m: nn.utils.parametrizations.weight_norm(m.body["fc"]),
        }
        for match, change in changes.items():
            model, _ = net()
            change(model)
            self.check(model, path, match)
        model, _ = net()
        model.stem, model.body["fc"] = nn.Conv2d(3, 8, 5), nn.Linear(8, 9)
        self.check(model, path, "1 more")

    def test_heads_and_layers_of_other_adapters(self, path):
        written(path)
        model = ts.adapt(net()[0], ts.TuckerConfig(2, target_modules="head"), "mine")
        self.check(model, path, "'head' has another adapter")
        written(path, save_modules=())
        model = ts.adapt(net()[0], ts.TuckerConfig(2, save_modules="head"), "mine")
        self.check(model, path, "'head' is trained whole")

    def test_merged_models_and_bad_names(self, path):
        model, _ = written(path)
        ts.merge(model)
        self.check(model, path, "merged")
        with pytest.raises(ValueError, match="^load_adapter: .*name"):
            ts.load_adapter(net()[0], path, "a.b")
        with pytest.raises(TypeError, match="^load_adapter: model"):
            ts.load_adapter({}, path)
