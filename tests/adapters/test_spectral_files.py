"""Files of spectral adapters: a few numbers a layer, with the vectors where the base weight does not give them."""

import copy
import json

import pytest
import torch
from adapter_cases import Net, disturb, metadata_of, net, parts_of, relative, state_of
from safetensors.torch import load_file, save_file
from test_adapter_quantised import PACKED
from torch import nn

import torch_subspace as ts
from torch_subspace.adapters import spectral


def written(path, rank=3, model=None, **config):
    model, x = (net()[0] if model is None else model), net()[1]
    config = {"target_modules": ["stem", "conv", "fc"], "save_modules": "head"} | config
    disturb(ts.adapt(model, ts.SpectralConfig(rank, **config)))
    with torch.no_grad():
        model.head.bias += 1
    ts.save_adapter(model, path)
    return model, x


def leaves(path):
    return {key.rpartition(".")[2] for key in load_file(path) if not key.startswith("head")}


def same_file(a, b):
    one, two = load_file(a), load_file(b)
    return metadata_of(a) == metadata_of(b) and one.keys() == two.keys() and all(
        torch.equal(t, two[key]) for key, t in one.items())


def test_a_file_has_a_few_numbers_and_restores_onto_a_plain_model(tmp_path):
    path = tmp_path / "a.safetensors"
    model, x = written(path)
    assert leaves(path) == {"core", "probe"} and metadata_of(path)["format"] == "torch_subspace.spectral"
    assert sum(t.numel() for key, t in load_file(path).items() if not key.startswith("head")) == 3 * 2 * 3
    for plain in (net()[0], net()[0].double()):
        ts.load_adapter(plain, path)
        want = copy.deepcopy(model).to(plain.head.weight.dtype)(x.to(plain.head.weight.dtype))
        assert relative(plain(x.to(want.dtype)), want) < 1e-6
        assert want.dtype == torch.double or torch.equal(plain(x), want)
        assert [n for n, p in plain.named_parameters() if p.requires_grad] == [
            n for n, p in model.named_parameters() if p.requires_grad]
    again = tmp_path / "b.safetensors"
    ts.save_adapter(ts.load_adapter(net()[0], path), again)
    assert same_file(path, again)
    outer = nn.Sequential(net()[0], nn.ReLU())  # a prefix more
    assert torch.equal(ts.load_adapter(outer, path)[0](x), model(x))
    merged = copy.deepcopy(model)
    ts.save_adapter(ts.merge(merged), again)
    assert same_file(path, again)
    ts.merge_and_unload(model)
    assert type(model.stem) is nn.Conv2d


def test_with_vectors_it_does_not_ask_for_the_base(tmp_path):
    path = tmp_path / "a.safetensors"
    model, x = written(path, save_vectors=True)
    assert leaves(path) == {"core", "factor0", "factor1"}
    other, _ = net(seed=5)
    with pytest.warns(UserWarning, match="saved with another base model"):
        ts.load_adapter(other, path)
    for a, b in zip(parts_of(model).values(), parts_of(other).values(), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    meta = torch.device("meta")
    with meta:
        bare = Net().eval()
    ts.load_adapter(bare, path)
    assert all(not p.is_meta for part in parts_of(bare).values() for p in part.parameters())


def test_another_base_is_refused_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    written(path)
    rounded = net()[0]
    rounded.body["fc"].bfloat16()
    for other, first in ((net(seed=5)[0], "stem.weight"), (rounded, "body.fc.weight")):
        before, state = [type(m) for m in other.modules()], state_of(other)
        with pytest.raises(ValueError, match=f"does not fit the model: the singular vectors of {first} are others"):
            ts.load_adapter(other, path)
        assert [type(m) for m in other.modules()] == before
        assert all(torch.equal(t, state[k]) for k, t in other.state_dict().items())
    with torch.device("meta"):
        bare = Net().eval()
    with pytest.raises(ValueError, match="singular vectors need the weight of 'stem', which is on the meta device"):
        ts.load_adapter(bare, path)


@pytest.mark.parametrize("fill", [nn.init.eye_, nn.init.zeros_, nn.init.ones_])
def test_vectors_that_the_weight_leaves_open_are_in_the_file(fill, tmp_path):
    path, model = tmp_path / "a.safetensors", net()[0]
    fill(model.body["fc"].weight)
    model, x = written(path, 2, model)
    found = load_file(path)
    assert {"body.fc.weight.factor0", "body.fc.weight.factor1", "stem.weight.probe"} <= set(found)
    plain = net()[0]
    with torch.no_grad():
        plain.body["fc"].weight.copy_(model.body["fc"]._parameters["weight"])
    assert torch.equal(ts.load_adapter(plain, path)(x), model(x))


def test_a_base_that_has_moved_on(tmp_path):
    """What the file is of is what was trained, whatever became of the weight since."""
    path = tmp_path / "a.safetensors"
    model, x = net()
    disturb(ts.adapt(model, ts.SpectralConfig(3)))
    with ts.disabled(model), torch.no_grad():
        model.body["fc"].weight += 0.1 * torch.eye(8)
    ts.save_adapter(model, path)
    assert "body.fc.weight.factor0" in load_file(path) and "stem.weight.probe" in load_file(path)
    plain = net()[0]
    with torch.no_grad():
        plain.body["fc"].weight += 0.1 * torch.eye(8)
    assert torch.equal(ts.load_adapter(plain, path)(x), model(x))


def test_a_further_file_for_the_same_base_decomposes_nothing(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    models = [written(path)[0] for path in paths]
    disturb(models[1], seed=7)
    ts.save_adapter(models[1], paths[1])
    x, model = net()[1], ts.load_adapter(net()[0], paths[0])
    vectors = [p.factor0 for p in parts_of(model).values()]
    monkeypatch.setattr(spectral, "singular_pairs", None)
    ts.load_adapter(model, paths[1])
    assert torch.equal(model(x), models[1](x))
    assert all(a is p.factor0 for a, p in zip(vectors, parts_of(model).values(), strict=True))  # filled in place
    ts.load_adapter(model, paths[0], "again")
    assert torch.equal(model(x), models[0](x))


@pytest.mark.parametrize("first", ["adapt", "offload"])
def test_offloaded_weights(first, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    plain, x = written(path, save_modules=())
    model = net()[0]
    if first == "adapt":
        ts.load_adapter(model, path)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if first == "offload":
        ts.load_adapter(model, path)  # by what the offloader has of the weights
    with torch.no_grad():
        plain.head.bias -= 1
    assert relative(model(x), plain(x)) < 1e-6
    ts.save_adapter(model, again)
    assert leaves(again) == {"core", "factor0", "factor1"}
    assert relative(ts.load_adapter(net()[0], again)(x), plain(x)) < 1e-6


@pytest.mark.parametrize("kind", PACKED)
def test_quantised_layers(kind, tmp_path):
    torch.manual_seed(0)
    model, path, x = PACKED[kind]().eval(), tmp_path / "a.safetensors", torch.randn(3, 5, 64)
    base, plain = model(x).detach(), copy.deepcopy(model)
    ts.adapt(model, ts.SpectralConfig(4))
    assert torch.equal(model(x), base)
    disturb(model)
    y = model(x)
    assert relative(y, base) > 1e-3
    y.sum().backward()
    ts.save_adapter(model, path)
    assert leaves(path) == {"core", "factor0", "factor1"}
    assert torch.equal(ts.load_adapter(plain, path)(x), y)


def change_config(path, edit):
    about = json.loads(metadata_of(path)["config"])
    edit(about)
    save_file(load_file(path), path, metadata_of(path) | {"config": json.dumps(about)})


def of_stem(about):
    return about["layers"]["stem"]["weight"]


@pytest.mark.parametrize("edit, match", [
    (lambda a: of_stem(a).update(rank=0), "of rank 0"), (lambda a: of_stem(a).update(rank=9), "of rank 9"),
    (lambda a: of_stem(a).update(rank=2.0), "of rank 2.0"), (lambda a: of_stem(a).update(stacked=1), "of rank 3"),
    (lambda a: of_stem(a).pop("determined"), "determined"), (lambda a: of_stem(a).pop("stacked"), "spectral of"),
    (lambda a: of_stem(a).update(shape=[8]), "shape"), (lambda a: a["config"].update(rank=0), "rank"),
    (lambda a: of_stem(a).update(rank=2), r"stem.weight.core is \(3,\), not \(2,\)"),
    (lambda a: of_stem(a).update(shape=[8, 27]), "in the file and"),
])
def test_broken_files_are_refused(edit, match, tmp_path):
    path = tmp_path / "a.safetensors"
    written(path)
    change_config(path, edit)
    plain, x = net()
    want = plain(x)
    with pytest.raises(ValueError, match=f"load_adapter: .*{match}"):
        ts.load_adapter(plain, path)
    assert torch.equal(plain(x), want) and type(plain.stem) is nn.Conv2d


def test_a_tensor_too_few(tmp_path):
    path = tmp_path / "a.safetensors"
    written(path)
    tensors = load_file(path)
    del tensors["stem.weight.probe"]
    save_file(tensors, path, metadata_of(path))
    with pytest.raises(ValueError, match="contradicts itself: 'stem.weight.factor0' is missing|'stem.weight.factor0'"):
        ts.load_adapter(net()[0], path)


def test_not_finite(tmp_path):
    model, x = net()
    disturb(ts.adapt(model, ts.SpectralConfig(2)))
    with torch.no_grad():
        parts_of(model)["stem.weight"].core[0] = torch.inf
    with pytest.raises(ValueError, match="merge: the change of 'stem' by 'default' is not finite"):
        ts.merge(model)
