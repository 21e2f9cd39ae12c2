"""Tucker adapters on layers: the facts of arXiv 2405.14739 on every kind."""

import math
import warnings

import pytest
import torch
from adapter_cases import (
    KINDS,
    Box,
    adapted,
    assert_same_state,
    boxed,
    change,
    conv1d_of_transformers,
    disturb,
    parts_of,
    relative,
    state_of,
)
from torch import nn

import torch_subspace as ts

every_kind = pytest.mark.parametrize("kind", KINDS)
RANKS = {  # per weight dimension count
    "one": {"rank": 2},
    "two": {"rank": (2, 3), "kernel_rank": 2},
    "clamped": {"rank": 1000, "kernel_rank": 1000},
}


class TestFacts:
    @every_kind
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_new_adapter_changes_no_bit(self, kind, dtype):
        model, inputs, more = boxed(kind, dtype)
        for grad in (False, True):
            plain = boxed(kind, dtype)[0].requires_grad_(grad)  # torch's attention takes other ways when frozen
            with torch.set_grad_enabled(grad):
                want = plain(*inputs, **more)
                ts.adapt(plain, ts.TuckerConfig(rank=3, kernel_rank=2, target_modules=r"layer.*"))
                assert parts_of(plain)
                assert torch.equal(plain(*inputs, **more), want)
        plain.train(), model.train()  # no dropout in these
        assert torch.equal(plain(*inputs, **more), model(*inputs, **more))

    @every_kind
    def test_the_change_reaches_the_output(self, kind):
        model, inputs, more = adapted(kind)
        before = model(*inputs, **more)
        disturb(model)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert relative(model(*inputs, **more), before) > 1e-3

    @every_kind
    @pytest.mark.parametrize("ranks", RANKS)
    def test_merged_equals_adapted(self, kind, ranks):
        model, inputs, more = adapted(kind, alpha=0.5, **RANKS[ranks])
        before, state = model(*inputs, **more), state_of(model)
        disturb(model)
        with torch.no_grad():
            want = model(*inputs, **more)
        want_with_grad = model(*inputs, **more)
        assert relative(want_with_grad, want) <= 1e-6
        ts.merge(model)
        assert relative(model(*inputs, **more), want) <= 1e-6
        ts.unmerge(model)
        assert torch.equal(model(*inputs, **more), want_with_grad)
        ts.delete_adapter(model, "default")
        assert torch.equal(model(*inputs, **more), before)
        assert_same_state(model.state_dict(), {k: v for k, v in state.items() if ".tucker." not in k})

    @every_kind
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_unmerge_is_exact_to_the_bit(self, kind, dtype):
        model, *_ = adapted(kind, dtype)
        disturb(model, size=1e-2)
        state = state_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ts.merge(model)
        changed = [k for k in parts_of(model) if not torch.equal(model.state_dict()[k], state[k])]
        assert changed == list(parts_of(model))
        ts.unmerge(model)
        assert_same_state(model.state_dict(), state)

    @every_kind
    def test_gradients_are_those_of_the_composed_form(self, kind):
        model, inputs, more = adapted(kind, torch.float64, kernel_rank=2, alpha=0.7)
        plain = boxed(kind, torch.float64)[0]
        disturb(model)
        inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
        parts, torch_seed = parts_of(model), torch.Generator().manual_seed(3)
        wanted = [p for part in parts.values() for p in part.parameters()]
        wanted += [x for x in inputs if x.requires_grad]
        y = model(*inputs, **more)
        dy = torch.randn(y.shape, generator=torch_seed, dtype=y.dtype)
        got = torch.autograd.grad(y, wanted, dy)

        base = dict(plain.named_parameters())
        weights = {key: base[key] + change(part) for key, part in parts.items()}
        y = torch.func.functional_call(plain, weights, tuple(inputs), more)
        assert relative(model(*inputs, **more), y) <= 1e-12
        for a, b in zip(got, torch.autograd.grad(y, wanted, dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

    @every_kind
    def test_the_base_gets_no_gradient_and_single_precision_is_near(self, kind):
        model, inputs, more = adapted(kind)
        disturb(model)
        y = model(*inputs, **more)
        dy = torch.randn_like(y)
        y.backward(dy)
        for name, p in model.named_parameters():
            assert (p.grad is not None) == (".tucker." in name), name
        double, inputs64, _ = adapted(kind, torch.float64)
        double.load_state_dict(model.state_dict())
        inputs64 = [x.double() if x.is_floating_point() else x for x in inputs]
        double(*inputs64, **more).backward(dy.double())
        for p, q in zip(model.parameters(), double.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5 * float(q.grad.abs().max()))

    @every_kind
    def test_unfoldings_have_at_most_the_ranks(self, kind):
        model, *_ = adapted(kind, torch.float64, rank=2, kernel_rank=2)
        disturb(model, size=1.0)
        for key, part in parts_of(model).items():
            layer, parameter = model.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
            delta = (getattr(layer, parameter) - layer._parameters[parameter]).detach()
            torch.testing.assert_close(delta, change(part).detach())
            for i, rank in enumerate(part.ranks):
                assert rank == min(2, delta.shape[i])
                others = [r for j, r in enumerate(part.ranks) if j != i]
                found = torch.linalg.matrix_rank(delta.movedim(i, 0).flatten(1))
                assert found <= min(rank, math.prod(others))

    @every_kind
    def test_padding_rows_and_layer_attributes_stay(self, kind):
        model, inputs, more = adapted(kind)
        plain = boxed(kind)[0]
        for key, m in plain.named_modules():
            twin = model.get_submodule(key)
            assert isinstance(twin, type(m)) and twin.training == m.training
            if isinstance(m, nn.Embedding) and m.padding_idx is not None:
                opt = torch.optim.SGD(ts.adapter_parameters(model), lr=0.5, momentum=0.9)
                for _ in range(3):
                    opt.zero_grad()
                    (model(*inputs, **more) - 1).square().sum().backward()
                    opt.step()
                assert torch.equal(twin.weight[m.padding_idx], m.weight[m.padding_idx])
                assert not torch.equal(twin.weight, m.weight)

    def test_an_identity_core_is_lora(self):
        model, (x,), _ = adapted("linear", torch.float64, alpha=3.0, scaling="lora", rank=2)
        part, layer = parts_of(model)["layer.weight"], model.layer
        with torch.no_grad():
            part.core.copy_(torch.eye(2))
        low, up = part.factor1.mT, part.factor0  # LoRA's A and B
        want = nn.functional.linear(x, layer._parameters["weight"], layer.bias) + 3 / 2 * (x @ low.mT @ up.mT)
        torch.testing.assert_close(model(x), want, rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith(("conv2d", "conv1d_s", "conv3d", "transposed"))])
    @pytest.mark.parametrize("form", ["chain", "composed"])
    def test_both_forms_of_a_convolution_are_one_function(self, kind, form):
        model, inputs, more = adapted(kind, torch.float64, kernel_rank=2)
        if form == "chain" and model.layer.groups > 1:
            model.layer.tucker_form = form
            with pytest.raises(ValueError, match="groups"):
                disturb(model)(*inputs, **more)
            return
        disturb(model)
        inputs[0].requires_grad_()
        wanted = [inputs[0], *parts_of(model)["layer.weight"].parameters()]
        outs, grads = [], []
        for f in ("auto", form):
            model.layer.tucker_form = f
            outs.append(model(*inputs, **more))
            grads.append(torch.autograd.grad(outs[-1].sin().sum(), wanted))
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*grads)

    def test_dropout_acts_on_the_way_of_the_adapter_only(self):
        for kind in ("linear", "conv2d", "transposed2d", "conv2d_grouped"):
            model, inputs, more = adapted(kind, dropout=0.5)
            plain = boxed(kind)[0]
            model.train()
            assert torch.equal(model(*inputs, **more), plain(*inputs, **more))
            disturb(model)
            torch.manual_seed(0)
            a, b = model(*inputs, **more), model(*inputs, **more)
            torch.manual_seed(0)
            assert not torch.equal(a, b) and torch.equal(model(*inputs, **more), a)
            model.eval()
            assert torch.equal(model(*inputs, **more), model(*inputs, **more))

    def test_a_subclass_of_transformers_layer_keeps_its_forward(self):
        base, inputs, _ = conv1d_of_transformers()

        class Doubled(type(base)):
            def forward(self, x):
                return 2 * super().forward(x)

        model = Box(Doubled(5, 6))
        want = model(*inputs)
        ts.adapt(model, ts.TuckerConfig(rank=2, target_modules="layer"))
        assert torch.equal(model(*inputs), want)
        disturb(model)
        want = model(*inputs)
        ts.merge(model)
        assert relative(model(*inputs), want) <= 1e-6

    def test_other_readers_of_the_weight_see_the_change(self):
        model, (x,), _ = adapted("linear")
        disturb(model)
        layer, delta = model.layer, change(parts_of(model)["layer.weight"])
        torch.testing.assert_close(layer.weight, (layer._parameters["weight"] + delta).float())
        torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
        layer.weight.sum().backward()
        assert parts_of(model)["layer.weight"].core.grad.abs().sum() > 0
        fresh = torch.func.functional_call(model, {"layer.weight": torch.zeros(5, 6)}, (x,))
        torch.testing.assert_close(fresh, nn.functional.linear(x, delta.float(), layer.bias))

    def test_a_fake_weight_does_not_hide_the_adapter(self):
        """Tracers put tensors of other classes in a parameter's place; a reader of `weight` must still get the sum."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        model, *_ = adapted("linear_own_forward")
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake = {k: mode.from_tensor(p) for k, p in model.named_parameters()}
        with mode, torch.nn.utils.stateless._reparametrize_module(model, fake):
            assert model.layer.weight is not model.layer._parameters["weight"]
