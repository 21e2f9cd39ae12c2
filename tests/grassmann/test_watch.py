"""Frames know what they are: our optimisers take them in any group, and what others do to them is said once."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

import torch_subspace as ts

SubspacePatch, OrthogonalProbe = ts.grassmann.SubspacePatch, ts.grassmann.OrthogonalProbe
SGD, ADAM = ts.RiemannianSGD, ts.RiemannianAdamW
X, Y = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 5


def head(subspace_dim=4, **options):
    torch.manual_seed(0)
    return ts.GrassmannLinear(32, 5, subspace_dim, **options)


def train(model, optimiser, steps):
    for _ in range(steps):
        optimiser.zero_grad()
        cross_entropy(model(X), Y).backward()
        optimiser.step()


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("kind", [SGD, ADAM], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("subspace_dim", [4, (1, 2, 3, 4, 2)], ids=["uniform", "ragged"])
def test_a_step_of_plain_parameters_is_that_of_marked_ones(kind, subspace_dim, silent):
    options = {"lr": 0.1, "weight_decay": 0.05} | ({"momentum": 0.9} if kind is SGD else {})
    one = nn.Sequential(nn.Linear(32, 32), head(subspace_dim))
    two = copy.deepcopy(one)
    train(one, kind(one.parameters(), **options), 7)
    train(two, kind(ts.param_groups(two), **options), 7)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert one[1].frame_error() < 1e-6


@pytest.mark.parametrize("again", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_copies_are_known_too(again, silent):
    layer = again(head())
    train(layer, SGD(layer.parameters(), lr=0.5, momentum=0.9), 20)
    assert layer.frame_error() < 1e-6


def test_a_resumed_optimiser_goes_on_to_the_bit(silent):
    one, two = nn.Sequential(nn.Linear(32, 32), head()), nn.Sequential(nn.Linear(32, 32), head())
    two.load_state_dict(one.state_dict())
    first, second = (ADAM([{"params": m.parameters()}], lr=0.01) for m in (one, two))
    train(one, first, 3)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(one, first, 3)
    train(two, second, 3)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_assigned_and_moved_weights_are_known(silent):
    layer = head()
    layer.load_state_dict(head().state_dict(), assign=True)
    train(layer, SGD(layer.parameters(), lr=0.5), 10)
    assert layer.frame_error() < 1e-6
    layer = head().double().to("meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert SGD(layer.parameters(), lr=0.5).param_groups[0]["frames"] == [(None, [0], "grassmann")]


@pytest.mark.parametrize("kind", [SGD, ADAM], ids=lambda kind: kind.__name__)
def test_counts_survive_copies_and_checkpoints(kind):
    layer = head()
    optimiser = kind(ts.param_groups(layer), lr=0.1)
    layer.weight.grad = torch.full_like(layer.weight, torch.nan)
    with pytest.warns(RuntimeWarning, match="5 class"):
        optimiser.step()
    other = kind(ts.param_groups(head()), lr=0.1)
    other.load_state_dict(optimiser.state_dict())
    copies = copy.deepcopy(optimiser), pickle.loads(pickle.dumps(optimiser)), other
    assert [o.skipped_frames for o in (optimiser, *copies)] == [5] * 4
    optimiser.skipped_frames = 3
    assert copy.deepcopy(optimiser).skipped_frames == 3


@pytest.mark.parametrize("kind", [SGD, ADAM], ids=lambda kind: kind.__name__)
def test_a_step_of_no_length_leaves_every_bit(kind):
    """As torch.distributed.checkpoint takes one while it loads."""
    layer = head()
    optimiser = kind(layer.parameters(), lr=0.1)
    train(layer, optimiser, 20)
    before = layer.weight.detach().clone()
    optimiser.param_groups[0]["lr"] = 0.0
    layer.weight.grad.zero_()
    optimiser.step()
    assert torch.equal(before, layer.weight)


def test_errors_leave_the_optimiser_as_it_was():
    optimiser = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match="half precision"):
        optimiser.add_param_group({"params": head(dtype=torch.float16).parameters()})
    assert len(optimiser.param_groups) == 1


OTHERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.5, fused=True),  # counts no versions
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimiser_is_noticed_once(name):
    layer = head()
    with pytest.warns(RuntimeWarning, match="off from orthonormal by .*RiemannianSGD") as record:
        train(layer, OTHERS[name](layer.parameters()), 40)
    assert len(record) == 1
    assert layer.frame_error() > 1e-2


def test_it_is_noticed_at_the_next_forward():
    layer = head()
    train(layer, SGD(layer.parameters(), lr=0.1), 5)
    for p in layer.parameters():
        torch.optim.SGD([p], lr=50.0).step()
    with pytest.warns(RuntimeWarning, match="off from orthonormal"):
        layer(X)


def test_averages_and_loaded_weights_are_noticed():
    layer = head()
    swa = AveragedModel(layer)
    optimiser = SGD(layer.parameters(), lr=0.5, momentum=0.9)
    for _ in range(30):
        train(layer, optimiser, 1)
        swa.update_parameters(layer)
    with pytest.warns(RuntimeWarning, match="average_frames"):
        swa.eval()(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X)
    layer.load_state_dict({"weight": layer.weight.detach() * 1.1})
    with pytest.warns(RuntimeWarning, match="off from orthonormal"):
        layer.loss(X, Y)
    layer.orthonormalize_()
    layer.load_state_dict({"weight": layer.weight.detach()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X)


def test_rotten_frames_are_noticed():
    layer = head()
    with torch.no_grad():
        layer.weight[2, 1, 3] = torch.nan
    with pytest.warns(RuntimeWarning, match="off from orthonormal by nan"):
        layer(X)


BASES = {"SubspacePatch": (lambda: SubspacePatch(12, 3), lambda m, x: m(x, x.flip(0))),
         "OrthogonalProbe": (lambda: OrthogonalProbe(12, 3), lambda m, x: m(x)),
         "OrthogonalProbe, distances": (lambda: OrthogonalProbe(12, 3), lambda m, x: m.distances(x))}


@pytest.mark.parametrize("name", BASES)
def test_a_basis_off_its_manifold_is_noticed(name):
    make, forward = BASES[name]
    module, x = make(), torch.randn(9, 12)
    optimiser = SGD(module.parameters(), lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            forward(module, x).square().sum().backward()
            optimiser.step()
        module.load_state_dict(module.state_dict())
        forward(module, x)
    with torch.no_grad():
        module.basis *= 1.5
    with pytest.warns(RuntimeWarning, match=rf"^{name.split(',')[0]}: the rows of its basis are off from orthonormal"):
        forward(module, x).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        forward(module, x)
    optimiser.step()
    assert module.basis_error() < 1e-5
    module.load_state_dict({key: 2 * t for key, t in module.state_dict().items()})
    with pytest.warns(RuntimeWarning, match="off from orthonormal"):
        forward(module, x)


def test_what_inference_mode_makes_is_used_there(silent):
    with torch.inference_mode():
        layer = head()
        assert layer(X).shape == (200, 5) and layer.orthonormalize_()(X).isfinite().all()
    layer = head()
    train(layer, SGD(layer.parameters(), lr=0.1), 2)
    with torch.inference_mode():
        copy.deepcopy(layer)(X)


def test_a_linear_layers_checkpoint_is_no_stack_of_frames():
    layer, linear = ts.GrassmannLinear(16, 5, 1), nn.Linear(16, 5)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="linear layer's weight.*from_linear"):
        layer.load_state_dict(linear.state_dict(), strict=False)
    frames = nn.functional.normalize(linear.weight.detach(), dim=1)
    layer.load_state_dict({"weight": frames})  # the layout of the paper's code
    assert torch.equal(layer.weight[:, 0], frames) and not torch.equal(layer.weight, before)


def test_weight_decay_of_the_optimiser_is_obeyed():
    model = nn.Sequential(nn.Linear(4, 8), ts.GrassmannLinear(8, 3, 2))
    assert [g["weight_decay"] for g in ADAM(ts.param_groups(model), lr=1e-3).param_groups] == [0.01, 0]
    assert [g["weight_decay"] for g in ADAM(ts.param_groups(model), weight_decay=0.05).param_groups] == [0.05, 0]
    groups = ts.param_groups(model, weight_decay=0.2, no_decay="*.bias")
    assert [g["weight_decay"] for g in SGD(groups, weight_decay=0.05).param_groups] == [0.2, 0, 0]


@pytest.mark.parametrize("options", [{"weight_decay": -1}, {"frame_lr_factor": -0.1}, {"lr": float("nan")}])
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=f"param_groups: {next(iter(options))} must be finite and >= 0"):
        ts.param_groups(head(), **options)


@pytest.mark.parametrize("options", [{"weight_decay": "0.1"}, {"frame_lr_factor": None}, {"lr": True}])
def test_numbers_of_another_kind(options):
    with pytest.raises(TypeError, match=f"param_groups: {next(iter(options))} must be a number"):
        ts.param_groups(head(), **options)
    with pytest.raises(TypeError, match="nn.Module, got list"):
        ts.param_groups([])


def test_timms_groups_of_layer_decay():
    timm = pytest.importorskip("timm")
    pytest.importorskip("timm.optim")
    model = ts.swap_head(timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=2))
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    optimiser = ADAM(groups, lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        cross_entropy(model(torch.randn(2, 3, 224, 224)), torch.tensor([1, 2])).backward()
        optimiser.step()
    assert model.head.frame_error() < 1e-6


LABELS = torch.tensor([0, 1, -100, 3, 4, 1])
SOFT = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)).double()
WEIGHTS = torch.tensor([0.5, 1.0, 0.7, 1.4, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("subspace_dim", [2, (1, 2, 3, 1, 2)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("target, options", [
    (LABELS, {}), (LABELS, {"class_weight": WEIGHTS, "label_smoothing": 0.1}), (SOFT, {}),
    (SOFT / SOFT.sum(1, keepdim=True), {"class_weight": WEIGHTS, "reduction": "sum"})])
def test_second_derivatives_of_the_fused_loss(subspace_dim, target, options):
    """A gradient penalty."""
    torch.manual_seed(0)
    x = torch.randn(6, 8, dtype=torch.float64)
    layer = ts.GrassmannLinear(8, 5, subspace_dim).double()

    def penalty(loss):
        z = x.clone().requires_grad_()
        value = loss(z)
        (g,) = torch.autograd.grad(value, z, create_graph=True)
        return torch.autograd.grad(value + 10 * g.square().sum(), [layer.weight, z])

    names = {"weight" if k == "class_weight" else k: v for k, v in options.items()}
    ours, truth = (penalty(loss) for loss in (lambda z: layer.loss(z, target, **options),
                                              lambda z: cross_entropy(layer(z), target, **names)))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
