"""Several Tucker adapters on one model, the modules they save whole, switching, merging, training and copying."""

import copy
import sys

import pytest
import torch
from adapter_cases import adapted, assert_same_state, boxed, change, disturb, net, parts_of, relative, state_of
from torch import nn

import torch_subspace as ts


def trained(model, x, steps=3, lr=0.05, seed=0):
    """A few steps on random labels."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (len(x),), generator=draw)
    opt = torch.optim.AdamW(ts.adapter_parameters(model), lr=lr)
    model.train()
    for _ in range(steps):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        opt.step()
    return model.eval()


def trainable(model):
    return [n for n, p in model.named_parameters() if p.requires_grad]


class TestSeveral:
    def test_a_weighted_sum_is_the_sum_of_the_changes(self):
        for kind in ("linear", "conv2d", "conv2d_grouped", "embedding", "attention", "transposed2d"):
            model, inputs, more = adapted(kind, torch.float64, rank=2, kernel_rank="full")
            ts.adapt(model, ts.TuckerConfig((3, 1), 2, alpha=0.5, target_modules=r"layer.*"), "b")
            ts.adapt(model, ts.TuckerConfig(1, target_modules=r"layer.*"), "c")
            a, b = (parts_of(disturb(model, name, seed=i), name) for i, name in enumerate(("default", "b")))
            ts.set_adapter(model, {"default": 0.5, "b": -2})
            assert ts.active_adapters(model) == {"default": 0.5, "b": -2.0}
            for key in a:
                layer, parameter = model.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
                want = layer._parameters[parameter] + 0.5 * change(a[key]) - 2 * change(b[key])
                torch.testing.assert_close(getattr(layer, parameter), want)
            y = model(*inputs, **more)
            wanted = [p for parts in (a, b) for part in parts.values() for p in part.parameters()]
            got = torch.autograd.grad(y.sin().sum(), wanted)
            base = dict(model.named_parameters())
            weights = {k: base[k] + 0.5 * change(a[k]) - 2 * change(b[k]) for k in a}
            plain = torch.func.functional_call(boxed(kind, torch.float64)[0], weights, tuple(inputs), more)
            torch.testing.assert_close(y, plain)
            torch.testing.assert_close(got, torch.autograd.grad(plain.sin().sum(), wanted))
            state = state_of(model)
            assert relative(ts.merge(model)(*inputs, **more), y) <= 1e-12
            assert_same_state(ts.unmerge(model).state_dict(), state)

    def test_choosing(self):
        model, x = net()
        base = model(x)
        ts.adapt(model, ts.TuckerConfig(2), "a")
        ts.adapt(model, ts.TuckerConfig(2, target_modules="fc"), "b")
        assert ts.adapter_names(model) == ["a", "b"] and ts.active_adapters(model) == {"b": 1.0}
        disturb(model, "a"), disturb(model, "b", seed=5)
        outs = {}
        for which in ("a", "b", None, {"a": 1, "b": 1}):
            ts.set_adapter(model, which)
            names = [which] if isinstance(which, str) else list(which or {})
            outs[str(which)] = model(x)
            assert trainable(model) == [n for n in model.state_dict() if any(f".tucker.{k}." in n for k in names)]
        assert torch.equal(outs["None"], base)
        assert len({float(y.sum()) for y in outs.values()}) == 4
        with pytest.raises(ValueError, match="no adapter is active"):
            ts.set_adapter(model, None)
            ts.adapter_parameters(model)
        with pytest.raises(ValueError, match="no adapter is active"):
            ts.merge(model)
        ts.set_adapter(model, "a")
        ts.delete_adapter(model, "b")
        assert torch.equal(model(x), outs["a"]) and trainable(model)
        ts.delete_adapter(model, "a")
        assert torch.equal(model(x), base)

    def test_deleting_the_only_active_one_leaves_none(self):
        model, x = net()
        base = model(x)
        ts.adapt(ts.adapt(model, ts.TuckerConfig(2), "a"), ts.TuckerConfig(2, save_modules="norm"), "b")
        disturb(model, "a"), disturb(model, "b")
        ts.delete_adapter(model, "b")
        assert ts.active_adapters(model) == {} and not trainable(model) and torch.equal(model(x), base)

    def test_deleting_the_last_leaves_the_model_of_before(self):
        model, x = net()
        model.stem.bias.requires_grad_(False)
        before, grads, base = state_of(model), trainable(model), model(x)
        types = [type(m) for m in model.modules()]
        members = [sorted(m.__dict__) for m in model.modules()]
        ts.adapt(model, ts.TuckerConfig(2, save_modules=("head", "norm")), "a")
        trained(model, x)
        ts.adapt(model, ts.TuckerConfig(3, target_modules="all-conv"), "b")
        trained(model, x)
        norm = {k: v for k, v in before.items() if k.startswith("norm.")}
        ts.delete_adapter(model, "a")
        ts.delete_adapter(model, "b")
        model.norm.load_state_dict({k.removeprefix("norm."): v for k, v in norm.items()})  # "b" trained its statistics
        assert_same_state(model.state_dict(), before)
        assert trainable(model) == grads and torch.equal(model(x), base)
        assert [type(m) for m in model.modules()] == types
        assert [sorted(m.__dict__) for m in model.modules()] == members

    def test_merge_and_unload_leaves_no_trace(self):
        model, x = net()
        keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
        members = [sorted(m.__dict__) for m in model.modules()]
        ts.adapt(model, ts.TuckerConfig(2, target_modules=("stem", "fc")), "other")
        ts.adapt(model, ts.TuckerConfig(2, target_modules=("all-conv", "fc"), save_modules="head"), "a")
        trained(model, x)
        want, bias = model(x), model.head.bias.clone()
        assert ts.merge_and_unload(model) is model
        assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == types
        assert [sorted(m.__dict__) for m in model.modules()] == members
        assert relative(model(x), want) <= 1e-6 and torch.equal(model.head.bias, bias)
        assert len(trainable(model)) == len(list(model.parameters()))

    def test_merged_models_refuse_changes(self):
        model, x = net()
        disturb(ts.adapt(model, ts.TuckerConfig(2)))
        ts.merge(model)
        merged = model(x)
        for call in (ts.merge, lambda m: ts.set_adapter(m, None), lambda m: ts.delete_adapter(m, "default"),
                     lambda m: ts.disabled(m).__enter__(), lambda m: ts.adapt(m, ts.TuckerConfig(2), "b")):
            with pytest.raises(ValueError, match="merged"):
                call(model)
            assert torch.equal(model(x), merged)
        ts.merge_and_unload(model)
        assert torch.equal(model(x), merged)

    def test_a_failing_merge_leaves_the_weights(self, monkeypatch):
        model, x = net()
        disturb(ts.adapt(model, ts.TuckerConfig(2)))
        state, calls = state_of(model), []
        module = sys.modules["torch_subspace.adapters.merge"]

        def fail(*args, compose=module.tucker_compose, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
            return compose(*args, **kwargs)

        monkeypatch.setattr(module, "tucker_compose", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            ts.merge(model)
        assert_same_state(model.state_dict(), state)
        monkeypatch.undo()
        ts.unmerge(ts.merge(model))
        assert_same_state(model.state_dict(), state)


class TestDisabled:
    def test_is_the_model_of_before(self):
        model, x = net()
        base = model(x)
        ts.adapt(model, ts.TuckerConfig(2, save_modules=("head", "norm")))
        trained(model, x)
        want, state, grads = model(x), state_of(model), trainable(model)
        ts.set_adapter(model, {"default": 0.5})
        with pytest.raises(KeyError), ts.disabled(model) as inside:
            assert inside is model and torch.equal(model(x), base)
            with ts.disabled(model):
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), base)
            raise KeyError
        assert ts.active_adapters(model) == {"default": 0.5}
        ts.set_adapter(model, "default")
        assert torch.equal(model(x), want) and trainable(model) == grads
        assert_same_state(model.state_dict(), state)

    @pytest.mark.parametrize("save", [(), "head", ("head", "norm")])
    def test_between_forward_and_backward(self, save):
        """As a reference model in preference tuning: the same weights, disabled, after the forward that is trained."""
        model, x = net()
        disturb(ts.adapt(model, ts.TuckerConfig(2, save_modules=save)))
        model(x).square().sum().backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        y = model(x)
        with torch.no_grad(), ts.disabled(model):
            model(x)
        y.square().sum().backward()
        for n, g in want.items():
            assert torch.equal(model.get_parameter(n).grad, g)

    def test_adapters_deleted_inside_leave_no_trace(self):
        model, x = net()
        before, base = [sorted(m.__dict__) for m in model.modules()], model(x)
        disturb(ts.adapt(model, ts.TuckerConfig(2, save_modules="head")))
        with ts.disabled(model):
            ts.delete_adapter(model, "default")
        assert [sorted(m.__dict__) for m in model.modules()] == before and torch.equal(model(x), base)


class TestSavedModules:
    def test_every_adapter_has_its_head(self):
        model, x = net()
        model.norm.momentum = 0.0  # running statistics go on as in any training
        base = model(x)
        config = ts.TuckerConfig(2, target_modules="fc", save_modules="head")
        ts.adapt(model, config, "a")
        assert trainable(model) == ["body.fc.tucker.a.weight.core", "body.fc.tucker.a.weight.factor0",
                                    "body.fc.tucker.a.weight.factor1", "head.weight", "head.bias"]
        trained(model, x)
        outs = {"a": model(x)}
        ts.adapt(model, config, "b")
        assert torch.equal(model(x), base)  # not the head that "a" has trained
        trained(model, x, seed=1)
        outs["b"] = model(x)
        ts.adapt(model, ts.TuckerConfig(1, target_modules="stem"), "c")
        assert trainable(model)[0].startswith("stem.tucker.c") and "head.weight" not in trainable(model)
        assert torch.equal(model(x), base)
        for name, y in outs.items():
            ts.set_adapter(model, name)
            assert torch.equal(model(x), y) and "head.weight" in trainable(model)
        ts.set_adapter(model, {"c": 1, "a": 1})
        assert torch.equal(model(x), outs["a"])
        ts.delete_adapter(model, "a")
        assert torch.equal(model(x), base)
        ts.set_adapter(model, "b")
        assert torch.equal(model(x), outs["b"])

    @pytest.mark.parametrize("optimiser", [ts.RiemannianAdamW, ts.RiemannianSGD])
    def test_a_grassmann_head(self, optimiser):
        model, x = net()
        ts.swap_head(model, 3, 2)
        assert isinstance(model.head, ts.GrassmannLinear)
        before = model.head.weight.clone()
        ts.adapt(model, ts.TuckerConfig(2, save_modules="head"))
        groups = ts.adapter_parameters(model)
        assert [g.get("manifold", "euclidean") for g in groups] == ["euclidean", "grassmann"]
        assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
        opt, target = optimiser(groups, lr=0.05), torch.tensor([0, 1, 2, 1])
        losses = []
        for _ in range(12):
            opt.zero_grad()
            losses.append(nn.functional.cross_entropy(model(x), target))
            losses[-1].backward()
            opt.step()
        assert losses[-1] < losses[0]
        w = model.head.weight.detach().double()
        assert (w @ w.mT - torch.eye(2)).abs().max() < 1e-5 and not torch.equal(w.float(), before)
        ts.delete_adapter(model, "default")
        assert torch.equal(model.head.weight, before)

    def test_a_whole_block(self):
        model, x = net()
        ts.adapt(model, ts.TuckerConfig(2, save_modules=("body", "fc")))
        assert list(parts_of(model)) == ["stem.weight", "head.weight"]
        assert "body.conv.weight" in trainable(model) and "body.fc.bias" in trainable(model)
        assert len(ts.adapter_parameters(model)) == len({id(g["params"]) for g in ts.adapter_parameters(model)}) == 2


class TestTraining:
    def test_parameters_and_multipliers(self):
        model, x = net()
        ts.adapt(model, ts.TuckerConfig(2, save_modules="head"))
        groups = ts.adapter_parameters(model)
        assert all("lr" not in g and "weight_decay" not in g for g in groups)
        multipliers = {"body.conv.core": 4, r".*core": 2, "fc": 0.5, "head": 10}
        groups = ts.adapter_parameters(model, lr=0.1, lr_multipliers=multipliers)
        rates = {id(p): g["lr"] for g in groups for p in g["params"]}
        names = {n: rates[id(p)] for n, p in model.named_parameters() if id(p) in rates}
        assert sorted(names) == sorted(trainable(model))
        for name, rate in names.items():
            want = 4 if "conv" in name and "core" in name else 2 if "core" in name else 0.5 if "fc" in name else (
                10 if "head" in name else 1)
            assert rate == pytest.approx(0.1 * want), name
        torch.optim.AdamW(groups).step()

    def test_only_the_adapter_moves(self):
        model, x = net()
        before = state_of(model)
        ts.adapt(model, ts.TuckerConfig(2, save_modules="head"))
        model.norm.eval()
        loss = lambda: nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))  # noqa: E731
        opt, first = torch.optim.AdamW(ts.adapter_parameters(model), lr=0.05), loss().item()
        for _ in range(15):
            opt.zero_grad()
            loss().backward()
            opt.step()
        assert loss() < 0.5 * first
        for key, value in before.items():
            assert torch.equal(model.state_dict()[key], value) != key.startswith("head"), key

    def test_summary(self):
        model = ts.adapt(net()[0], ts.TuckerConfig(2, save_modules="head"))
        text = ts.adapter_summary(model)
        total = sum(p.numel() for p in model.parameters())
        share = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert f"{share:,} of {total:,}" in text and "default" in text.splitlines()[-1]
        for key in ("stem", "body.conv", "body.fc", "head"):
            assert any(line.startswith(key) for line in text.splitlines())
        assert "merged" in ts.adapter_summary(ts.merge(model))

    def test_copies_and_moves(self):
        model, x = net()
        disturb(ts.adapt(model, ts.TuckerConfig(2)))
        want = model(x)
        twin = copy.deepcopy(model)
        disturb(model, seed=9)
        assert torch.equal(twin(x), want) and not torch.equal(model(x), want)
        double = copy.deepcopy(twin).double()
        assert relative(want, double(x.double())) < 1e-6
        half = copy.deepcopy(twin).bfloat16()
        assert all(p.dtype == torch.float32 for part in parts_of(half).values() for p in part.parameters())
        assert relative(half(x.bfloat16()), want) < 0.05
        meta = copy.deepcopy(twin).to("meta")
        assert meta(x.to("meta")).shape == want.shape
