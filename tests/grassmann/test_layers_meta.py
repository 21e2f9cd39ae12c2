"""Layers that begin without values, on the meta device: whatever puts memory there, it holds frames."""

import pytest
import torch
from helpers import optional
from layers_cases import assert_frames
from torch import nn

import torch_subspace as ts
from torch_subspace.grassmann.head import PointwiseGrassmannLinear

KINDS = pytest.mark.parametrize("kind", [(ts.GrassmannLinear, 3), (ts.GrassmannLinear, (1, 2, 3, 4, 5)),
                                         (PointwiseGrassmannLinear, 2)], ids=["uniform", "ragged", "pointwise"])


def litter(value=7.0):
    """Memory that was used before: what is left uninitialised is no frame by chance."""
    torch.full((64, 5, 3, 16), value)


@KINDS
@pytest.mark.parametrize("way", [
    lambda cls, k: nn.utils.skip_init(cls, 16, 5, k),
    lambda cls, k: cls(16, 5, k, device="meta").to_empty(device="cpu"),
    lambda cls, k: nn.Sequential(nn.Sequential(cls(16, 5, k, device="meta"))).to_empty(device="cpu")[0][0],
    lambda cls, k: cls(16, 5, k).to("meta").to_empty(device="cpu"),
], ids=["skip_init", "to_empty", "of a parent", "there and back"])
def test_memory_that_is_given_is_drawn(kind, way):
    litter()
    assert_frames(way(*kind))


def test_values_that_are_loaded_stay():
    state = ts.GrassmannLinear(16, 5, 3).state_dict()
    with torch.device("meta"):
        layer = ts.GrassmannLinear(16, 5, 3)
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer.weight, state["weight"])
    empty = nn.utils.skip_init(ts.GrassmannLinear, 16, 5, 3)
    empty.load_state_dict(state)
    assert torch.equal(empty.weight, state["weight"])


def test_frames_are_float32_where_half_is_the_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = ts.GrassmannLinear(16, 5, 3)
        half = ts.GrassmannLinear(16, 5, 3, dtype=torch.bfloat16)
        assert layer(torch.randn(2, 16)).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
    assert layer.weight.dtype == torch.float32 and half.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ transformers, accelerate


@pytest.fixture(scope="module")
def classes():
    """A backbone and a model with a head of ours on it, as a user of transformers would write them."""
    transformers = optional("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "backbone"

        def __init__(self, classes=5, dim=2, **options):
            self.classes, self.dim = classes, dim
            super().__init__(**options)

    class Backbone(transformers.PreTrainedModel):
        config_class, base_model_prefix = Config, "body"

        def __init__(self, config):
            super().__init__(config)
            self.linear = nn.Linear(16, 16)
            self.post_init()

    class Classifier(transformers.PreTrainedModel):
        config_class, base_model_prefix = Config, "body"

        def __init__(self, config, layer=ts.GrassmannLinear):
            super().__init__(config)
            self.body = Backbone(config)
            self.head = layer(16, config.classes, config.dim)
            self.post_init()

    return Config, Backbone, Classifier


def read(made, folder, **options):
    litter()
    return made[2].from_pretrained(folder, **options)


@pytest.mark.parametrize("dim", [2, (1, 2, 3, 4, 5)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_pretrained_draws_a_head_that_the_file_lacks(classes, tmp_path, dim, dtype):
    config, backbone, _ = classes
    backbone(config()).save_pretrained(tmp_path)
    torch.manual_seed(0)
    models = [read(classes, tmp_path, dim=dim, dtype=dtype) for _ in range(2)]
    for model in models:
        assert model.body.linear.weight.dtype == dtype and model.head.weight.dtype == torch.float32
        assert_frames(model.head)
    assert not torch.equal(models[0].head.weight, models[1].head.weight)
    ts.RiemannianAdamW(models[0].parameters(), lr=0.1)
    torch.manual_seed(0)
    assert torch.equal(read(classes, tmp_path, dim=dim, dtype=dtype).head.weight, models[0].head.weight)
    assert_frames(read(classes, tmp_path, layer=PointwiseGrassmannLinear).head)


@pytest.mark.parametrize("factor", [1, 3], ids=["frames", "no frames"])
def test_from_pretrained_keeps_a_head_that_the_file_has(classes, tmp_path, factor):
    model = classes[2](classes[0]())
    with torch.no_grad():
        model.head.weight *= factor
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        found = read(classes, tmp_path, dtype=dtype)
        assert torch.equal(found.head.weight, model.head.weight)
    other = read(classes, tmp_path, classes=4, ignore_mismatched_sizes=True)  # the file's is of another size
    assert other.head.weight.shape[0] == 4
    assert_frames(other.head)


def test_a_head_that_was_started_is_not_drawn_again(classes):
    vectors = torch.randn(5, 16)

    class Started(ts.GrassmannLinear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.init_from_vectors(vectors)

    model = classes[2](classes[0](), layer=Started)  # post_init goes through all modules
    torch.testing.assert_close(model.head.weight[:, 0], nn.functional.normalize(vectors))


def test_accelerate_puts_weights_in_place(tmp_path):
    accelerate = optional("accelerate")
    from safetensors.torch import save_file

    source = nn.Sequential(nn.Linear(16, 16), ts.GrassmannLinear(16, 5, 3))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with accelerate.init_empty_weights():
        model = nn.Sequential(nn.Linear(16, 16), ts.GrassmannLinear(16, 5, 3))
    assert model[1].weight.is_meta
    with pytest.raises(ValueError, match="one device"):
        model[1](torch.randn(2, 16))
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert torch.equal(model[1].weight, source[1].weight)
    opt = ts.RiemannianSGD(model.parameters(), lr=10.0)  # knows the frames, though it was not told
    nn.functional.cross_entropy(model(torch.randn(8, 16)), torch.arange(8) % 5).backward()
    opt.step()
    assert not torch.equal(model[1].weight, source[1].weight)
    assert_frames(model[1])


# ------------------------------------------------------------------------------------------------------------- timm


def test_timm_initialises_and_checkpoints():
    timm = optional("timm")
    model = ts.swap_head(timm.create_model("test_vit", num_classes=4), subspace_dim=3)
    before = model.head.weight.detach().clone()
    model.init_weights()
    assert not torch.equal(before, model.head.weight)
    assert_frames(model.head)
    with torch.device("meta"):
        empty = ts.swap_head(timm.create_model("test_vit", num_classes=4), subspace_dim=3)
    assert_frames(empty.to_empty(device="cpu").head)
    x = torch.randn(3, 16, requires_grad=True)
    parts = [nn.Linear(16, 16), nn.ReLU(), ts.GrassmannLinear(16, 5, 3)]
    plain = torch.autograd.grad(nn.Sequential(*parts)(x).sum(), [x, parts[2].weight])
    again = timm.models.checkpoint_seq(parts, x, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(again.sum(), [x, parts[2].weight])))
