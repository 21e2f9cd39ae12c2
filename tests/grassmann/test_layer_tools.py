"""The layer under other people's tools: tracing, feature extraction, pruning."""

import helpers
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_subspace as ts


def head(**options):
    torch.manual_seed(0)
    return ts.GrassmannLinear(8, 5, 2, **options).eval()


def test_features_of_a_model_with_our_head():
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = ts.swap_head(torchvision.models.resnet18(num_classes=10)).eval()
    x = torch.randn(1, 3, 32, 32)
    found = create_feature_extractor(model, {"layer4": "f", "fc": "logits"})(x)
    assert found["f"].shape == (1, 512, 1, 1) and torch.equal(found["logits"], model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fx_sees_one_call(dtype):
    graph = torch.fx.symbolic_trace(head())
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]
    x = torch.randn(4, 8, dtype=dtype)
    assert torch.equal(graph(x), head()(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_runs_without_us(grad, tmp_path):
    layer, x = head(), torch.randn(4, 8)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, x)
    assert "torch_subspace::" not in str(traced.inlined_graph)
    more = torch.randn(7, 8)
    torch.testing.assert_close(traced(more), layer(more))
    traced.save(tmp_path / "head.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "head.pt")(more), layer(more))


LENGTHS = 1e-30, 1e-20, 1.0, 1e19, 1e30


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2)], ids=str)
def test_programs_for_others_take_features_of_any_length(dtype, tolerance):
    """As the op does, which sums squares in double and computes halves in float32."""
    layer, x = head(), torch.randn(7, 8).to(dtype)
    x[3] = 0
    if dtype == torch.float16:
        x[0], x[1] = 6e4, 1e-7
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for call in (program, torch.jit.trace(layer, x, check_trace=False), torch.vmap(layer)):
        for length in LENGTHS if dtype == torch.float32 else (1.0,):
            given = length * x
            torch.testing.assert_close(call(given), layer(given), rtol=tolerance, atol=0)


def test_plain_derivatives_of_features_of_any_length():
    """Under torch.func as by the op; second ones, of a gradient penalty on directions, as of any other length."""
    layer, x, dlogits = head(), torch.randn(7, 8), torch.randn(7, 5)

    def loss(x):
        return (dlogits * layer(x)).sum()

    def penalty(length):
        leaf = (length * x).requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad((length * slope).square().sum(), layer.weight)

    for length in LENGTHS:
        leaf = (length * x).requires_grad_()
        helpers.close([torch.func.grad(loss)(leaf.detach())], torch.autograd.grad(loss(leaf), leaf), 1e-5)
        if length > 1:
            helpers.close(penalty(length), penalty(1.0), 1e-5)


def test_there_is_no_bias():
    assert head().bias is None and list(head().state_dict()) == ["weight"]


@pytest.mark.parametrize("change", [lambda m: prune.l1_unstructured(m, "weight", 0.3), parametrizations.weight_norm],
                         ids=["prune", "weight_norm"])
def test_a_weight_made_of_others_is_named(change):
    model = nn.Sequential(nn.Linear(8, 8), head())
    change(model[1])
    with pytest.raises(ValueError, match="param_groups: the weight of '1'.*GrassmannLinear.*remove that first"):
        ts.param_groups(model)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_heads_whose_logits_have_signs_are_refused(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=16, patch_size=8, num_labels=4)
    model = transformers.ViTForImageClassification(config)
    model.config.problem_type = kind
    with pytest.raises(ValueError, match=f"problem_type='{kind}'.*never negative"):
        ts.swap_head(model)
    assert isinstance(model.classifier, nn.Linear)
    model.config.problem_type = "single_label_classification"
    assert isinstance(ts.swap_head(model).classifier, ts.GrassmannLinear)


def test_one_logit_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    for count in (None, 1):
        with pytest.raises(ValueError, match="one class has one logit.*num_classes=2"):
            ts.swap_head(model, count)
    assert isinstance(ts.swap_head(model, 2)[1], ts.GrassmannLinear)


@pytest.mark.slow
def test_trainer_takes_our_optimiser_in_one_line(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=16, patch_size=8, num_labels=4)
    model = ts.swap_head(transformers.ViTForImageClassification(config), subspace_dim=2)
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 4} for i in range(32)]
    arguments = transformers.TrainingArguments(tmp_path, max_steps=6, use_cpu=True, report_to="none", weight_decay=0.1,
                                               disable_tqdm=True, save_strategy="no")
    trainer = transformers.Trainer(model, arguments, train_dataset=data,
                                   optimizer_cls_and_kwargs=(ts.RiemannianAdamW, {"lr": 0.1}))
    before = model.classifier.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, model.classifier.weight) and model.classifier.frame_error() < 1e-6
