"""What reads and writes of an adapted layer's `weight` do: dtype and sizes for nothing, gradients whoever computes with
it, and no write that is lost."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import Box, adapted, disturb, parts_of, relative
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint

import torch_subspace as ts
from torch_subspace.adapters import weight as of_weights


def of_ours():
    return disturb(ts.adapt(Box(nn.Linear(6, 5)), ts.TuckerConfig(2, target_modules="layer")))


def of_peft():
    peft = pytest.importorskip("peft")
    from torch_subspace.peft import TuckerConfig

    model = peft.get_peft_model(Box(nn.Linear(6, 5)), TuckerConfig(r=2, target_modules=["layer"]))
    part = model.base_model.model.layer.tucker_parts["default"]
    nn.init.normal_(part.core)
    return model.base_model.model


both = pytest.mark.parametrize("make", [of_ours, of_peft])


def factors(model):
    return [p for n, p in model.named_parameters() if "core" in n or "factor" in n]


def bases(model):
    return [p.clone() for n, p in model.named_parameters() if n.endswith(("layer.weight", "base_layer.weight"))]


@both
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_forward_asks_of_a_weight_composes_nothing(make, grad, monkeypatch):
    layer = make().layer
    monkeypatch.setattr(of_weights, "tucker_compose", None)  # whoever called it would fail
    with torch.set_grad_enabled(grad):
        w = layer.weight
        assert isinstance(w, torch.Tensor) and not isinstance(w, nn.Parameter) and w.requires_grad == grad
        assert (w.dtype, w.device.type, w.shape, w.size(0), w.ndim, w.dim(), w.numel(), len(w), w.is_floating_point(),
                w.element_size(), w.is_cuda) == (torch.float32, "cpu", (5, 6), 5, 2, 2, 30, 5, True, 4, False)


@both
def test_t5_reads_the_dtype_of_its_weights(make, monkeypatch):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(d_model=6, d_ff=5, num_layers=1, num_heads=1, vocab_size=9, dropout_rate=0.0)
    model, x = nn.ModuleDict({"layer": t5.T5DenseActDense(config)}), torch.randn(2, 6)
    if make is of_ours:
        ts.adapt(model, ts.TuckerConfig(2))
    else:
        import peft

        from torch_subspace.peft import TuckerConfig

        model = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["wo"])).base_model.model
    want = model["layer"](x)
    monkeypatch.setattr(of_weights, "tucker_compose", None)
    assert torch.equal(model["layer"](x), want)


class Product(torch.autograd.Function):
    """Takes tensors past __torch_function__, as fused layers do."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.mT

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy @ w, dy.mT @ x


USES = {
    "product": lambda x, w: x @ w.mT,
    "function": Product.apply,
    "both": lambda x, w: (Product.apply(x, w) + F.linear(x, w)) / 2,
    "no_grad_first": lambda x, w: F.linear(x, w) + 0 * torch.no_grad()(w.sum)(),
    "checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
    "checkpoint_reentrant": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=True),
    "vmap": lambda x, w: torch.func.vmap(lambda a, w: w @ a, (0, None))(x, w),
    "compiled": lambda x, w: torch.compile(F.linear, backend="aot_eager")(x, w),
    "rows": lambda x, w: torch.stack([x @ row for row in w], -1),
}


@both
@pytest.mark.parametrize("use", USES)
def test_gradients_whoever_computes_with_it(make, use):
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 6, requires_grad=True)
    inputs = [x, *factors(model)]
    want = torch.autograd.grad(model(x).square().sum(), inputs)
    (USES[use](x, model.layer.weight) + model.layer.bias).square().sum().backward()
    for t, dt in zip(inputs, want, strict=True):
        assert relative(t.grad, dt) < 1e-5


def test_second_derivatives():
    torch.manual_seed(0)
    model, x = of_ours(), torch.randn(3, 6)
    got, want = (torch.autograd.grad(torch.autograd.grad(
        use(x, model.layer.weight).square().sum(), factors(model)[0], create_graph=True)[0].square().sum(),
        factors(model)) for use in (lambda x, w: Product.apply(x * 1, w), lambda x, w: (x @ w.mT)))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-4


WRITES = {
    "zero_": lambda w: w.zero_(),
    "data": lambda w: w.data.normal_(),
    "data =": lambda w: setattr(w, "data", torch.ones(5, 6)),
    "detach": lambda w: w.detach().fill_(1),
    "row": lambda w: w[0].zero_(),
    "item": lambda w: w.__setitem__((0, 0), 1.0),
    "transposed": lambda w: w.mT.copy_(torch.ones(6, 5)),
    "out": lambda w: torch.add(torch.ones(5, 6), 1, out=w),
    "foreach": lambda w: torch._foreach_zero_([w]),
    "xavier": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
    "trunc_normal": nn.init.trunc_normal_,
    "aten": lambda w: torch.ops.aten.mul_.Tensor(w, 2),
    "functional": lambda w: F.relu_(w),
}


@both
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_refused(make, write, grad):
    model = make()
    before = bases(model)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="adapted layer: .* would write into base"):
        WRITES[write](model.layer.weight)
    assert all(torch.equal(a, b) for a, b in zip(bases(model), before, strict=True))


@both
def test_what_reads_it_is_not_refused(make):
    w = make().layer.weight
    assert torch.equal(torch.empty(5, 6).copy_(w), w) and torch.equal(w.clone().mul_(2), 2 * w)
    assert torch.equal(copy.deepcopy(w.detach()), pickle.loads(pickle.dumps(w.detach())))
    assert torch.equal(torch.from_numpy(w.detach().numpy()), w) and "grad_fn" in repr(w)
    assert type(nn.Parameter(w.detach().clone())) is nn.Parameter


def test_a_layer_resets_its_base():
    model = of_ours()
    before, part = bases(model)[0], copy.deepcopy(parts_of(model)["layer.weight"].state_dict())
    torch.manual_seed(3)
    model.layer.reset_parameters()
    torch.manual_seed(3)
    assert torch.equal(model.layer._parameters["weight"], nn.Linear(6, 5).weight) and not torch.equal(
        model.layer._parameters["weight"], before)
    assert all(torch.equal(t, part[n]) for n, t in parts_of(model)["layer.weight"].state_dict().items())
    attention, _, _ = adapted("attention")
    attention.layer._reset_parameters()


def test_writing_inside_disabled():
    model = of_ours()
    with ts.disabled(model):
        nn.init.zeros_(model.layer.weight)
        model.layer.weight = nn.Parameter(model.layer.weight + 1)
    assert (model.layer._parameters["weight"] == 1).all() and parts_of(model)["layer.weight"].core.any()


@pytest.mark.parametrize("fuse, layers", [
    (fuse_conv_bn_eval, lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
    (fuse_linear_bn_eval, lambda: (nn.Linear(3, 4), nn.BatchNorm1d(4))),
])
def test_fusion_with_a_norm(fuse, layers):
    model = nn.Sequential(*layers()).eval()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, *[6] * (2 * isinstance(model[0], nn.Conv2d)))
    disturb(ts.adapt(model, ts.TuckerConfig(2)))
    y = model(x)
    with pytest.raises(RuntimeError, match=r"adapted layer: weight = … while an adapter is active"):
        fuse(model[0], model[1])
    assert torch.equal(model(x), y)
    ts.merge(model)
    assert relative(fuse(model[0], model[1])(x), y) < 1e-5
    ts.merge_and_unload(model)
    assert relative(fuse(model[0], model[1])(x), y) < 1e-5


def test_assignments():
    model = of_ours()
    layer = model.layer
    for new in (nn.Parameter(torch.ones(5, 6)), None):
        with pytest.raises(RuntimeError, match="weight = … while an adapter is active"):
            layer.weight = new
    layer.weight = layer._parameters["weight"]  # as tie_weights does
    layer.bias = nn.Parameter(torch.ones(5))
    with ts.disabled(model), pytest.raises(ValueError, match=r"weight must stay \(5, 6\), got \(7, 6\)"):
        layer.weight = nn.Parameter(torch.ones(7, 6))
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state, assign=True)
    assert torch.equal(layer._parameters["weight"], state["layer.weight"])
    ts.merge(model)
    layer.weight = nn.Parameter(torch.ones(5, 6))
    with pytest.raises(ValueError, match="unmerge: the weight of 'layer' was replaced or resized while it was merged"):
        ts.unmerge(model)
    assert torch.equal(ts.merge_and_unload(model).layer.weight, torch.ones(5, 6))


@pytest.mark.parametrize("change, error", [
    (lambda layer: prune.l1_unstructured(layer, "weight", 2), "weight_orig = base . change, which is no parameter"),
    (nn.utils.spectral_norm, "del weight, the base of its adapters"),
    (lambda layer: delattr(layer, "weight"), "del weight, the base of its adapters"),
], ids=["prune", "spectral_norm", "del"])
def test_what_takes_the_parameter_away(change, error):
    model, (x,), _ = adapted("linear")
    disturb(model)
    y, names = model(x), [n for n, _ in model.named_parameters()]
    with pytest.raises(RuntimeError, match=f"^adapted layer: {error}"):
        change(model.layer)
    assert torch.equal(model(x), y) and [n for n, _ in model.named_parameters()] == names


def test_peft_assignments():
    model = of_peft()
    with pytest.raises(KeyError, match="'weight' already exists"):
        model.layer.weight = nn.Parameter(torch.ones(5, 6))


def test_a_read_from_before():
    model = of_ours()
    before, kept = model.layer.weight, model.layer.weight.clone()
    ts.merge(model)
    assert torch.equal(before, kept)
    ts.unmerge(model)
    before = model.layer.weight
    with ts.disabled(model):
        assert torch.equal(before, kept) and not torch.equal(before, model.layer.weight)
    stale = model.layer.weight
    with torch.no_grad():
        parts_of(model)["layer.weight"].core.mul_(2)
    with pytest.raises(RuntimeError, match="adapted layer: its weight has changed since this was read"):
        stale.sum()
    assert stale.shape == (5, 6)
    del before, stale
    assert not of_weights._waiting


def test_inference_mode():
    model, (x,), _ = adapted("linear_own_forward")
    disturb(model)
    with torch.inference_mode():
        y, w = model(x), model.layer.weight
        assert w.sum().is_inference()
    assert torch.equal(y, model(x))
    with torch.no_grad():
        w = model.layer.weight
    with torch.inference_mode():
        w = w + 0 * w.sum()
    assert relative(w, model.layer.weight) < 1e-6
