"""Tucker adapters beside the rest of torch: compile, export, autocast, checkpointing, DDP and half weights."""

import copy
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
    disturb,
    gradients,
    net,
    parts_of,
    relative,
    state_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_subspace as ts

SLOW = ["conv2d_same_reflect", "conv1d_same", "transposed2d_size", "conv1d_of_transformers", "attention_kdim",
        "encoder_layer", "timm_std_conv2d", "swin"]
SOME = ["linear", "linear_own_forward", "embedding_padding", "conv2d", "conv2d_depthwise", *[
    pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW]]


def assert_near(got, want, tol=1e-5):
    assert relative(got[0], want[0]) <= tol and got[1].keys() == want[1].keys()
    for key, g in want[1].items():
        assert (got[1][key].double() - g.double()).norm() <= tol * g.double().norm() + 1e-6, key


class TestCompile:
    @pytest.mark.parametrize("kind", SOME)
    def test_fullgraph_forward_and_backward(self, kind):
        torch._dynamo.reset()
        model, inputs, more = adapted(kind, kernel_rank=2)
        inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
        want = gradients(disturb(model), inputs, more)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        assert_near(gradients(compiled, inputs, more), want)
        with torch.no_grad():
            assert relative(compiled(*inputs, **more), model(*inputs, **more)) <= 1e-5

    def test_several_adapters_and_dropout(self):
        torch._dynamo.reset()
        model, x = net()
        ts.adapt(model, ts.TuckerConfig(2, dropout=0.5), "a")
        ts.adapt(model, ts.TuckerConfig((1, 2), 2), "b")
        disturb(model, "a"), disturb(model, "b")
        ts.set_adapter(model, {"a": 0.5, "b": 2})
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_near(gradients(compiled, [x]), gradients(compiled, [x]))
        assert relative(compiled(x), model(x)) <= 1e-5
        model.train()
        torch.manual_seed(0)
        first = compiled(x)
        assert not torch.equal(compiled(x), first)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(x), first)

    @pytest.mark.slow
    def test_inductor(self):
        torch._dynamo.reset()
        model, x = net()
        disturb(ts.adapt(model, ts.TuckerConfig(2)))
        want = gradients(model, [x])
        assert_near(gradients(torch.compile(model, fullgraph=True), [x]), want, 1e-4)

    @pytest.mark.parametrize("grad", [False, True])
    def test_a_hot_swap_compiles_nothing(self, tmp_path, grad):
        torch._dynamo.reset()
        files, outs = [tmp_path / f"{i}.safetensors" for i in range(3)], []
        for i, file in enumerate(files):
            model, x = net()
            disturb(ts.adapt(model, ts.TuckerConfig(2, save_modules="head")), seed=i)
            with torch.no_grad():
                model.head.bias += i
            ts.save_adapter(model, file)
            outs.append(model(x))
        model, x = net()
        ts.load_adapter(model, files[0])
        compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=compiles)
        with torch.set_grad_enabled(grad):
            for i in (0, 1, 2, 0):
                ts.load_adapter(model, files[i])
                assert relative(compiled(x), outs[i]) <= 1e-5
                assert compiles.frame_count == 1
        grads = [p.requires_grad for p in model.parameters()]
        with ts.disabled(model):
            pass
        compiled(x)
        assert [p.requires_grad for p in model.parameters()] == grads

    def test_switching_recompiles_and_is_never_stale(self):
        torch._dynamo.reset()
        model, x = net()
        base = model(x)
        for name in "ab":
            disturb(ts.adapt(model, ts.TuckerConfig(2), name), name, seed=ord(name))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for which in ("a", "b", {"a": 2, "b": -1}, {"a": 3, "b": -1}, None, "a"):
            ts.set_adapter(model, which)
            assert relative(compiled(x), model(x)) <= 1e-5
            with ts.disabled(model):
                assert relative(compiled(x), base) <= 1e-5
        want = model(x)
        ts.merge(model)
        assert relative(compiled(x), want) <= 1e-5
        ts.unmerge(model)
        ts.delete_adapter(model, "a")
        assert relative(compiled(x), base) <= 1e-5


class TestExport:
    @pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("kind", SOME[:5] + [k for k in SLOW if k != "encoder_layer"])
    def test_the_adapter_is_in_the_program(self, kind, strict):
        model, inputs, more = adapted(kind, kernel_rank=2)
        disturb(model)
        program = torch.export.export(model, tuple(inputs), more, strict=strict)
        assert relative(program.module()(*inputs, **more), model(*inputs, **more)) <= 1e-5
        assert relative(program.module()(*inputs, **more), boxed(kind)[0](*inputs, **more)) > 1e-3

    def test_dynamic_shapes(self):
        model, x = net()
        disturb(ts.adapt(model, ts.TuckerConfig(2)))
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
        x = torch.randn(7, *x.shape[1:])
        assert relative(program.module()(x), model(x)) <= 1e-5

    def test_functional_transforms(self):
        model, inputs, _ = adapted("linear_own_forward")
        disturb(model)
        params = {n: p.detach() for n, p in model.named_parameters()}

        def loss(params, x):
            return torch.func.functional_call(model, params, (x,)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, inputs[0])
        loss(dict(model.named_parameters()), inputs[0]).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-4, atol=1e-5)


class TestPrecision:
    @pytest.mark.parametrize("kind", [k for k in KINDS if "embedding" not in k])
    def test_autocast(self, kind):
        model, inputs, more = adapted(kind, kernel_rank=2)
        want = gradients(disturb(model), inputs, more)
        plain = boxed(kind)[0]
        with torch.autocast("cpu", torch.bfloat16):
            dtype = plain(*inputs, **more).dtype
            got = gradients(model, inputs, more)
        assert got[0].dtype == dtype
        assert_near(got, want, 0.1)
        assert all(g.dtype == torch.float32 for g in got[1].values())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d_depthwise", "transposed2d", "embedding",
                                      "conv1d_of_transformers"])
    def test_half_bases_have_wide_factors(self, kind, dtype):
        """The change is taken in float32: one thousandth of the weight, which a sum in bfloat16 would mostly lose."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, inputs, more = boxed(kind, dtype)
            ts.adapt(model, ts.TuckerConfig(3, target_modules="layer"))
        if getattr(model.layer, "bias", None) is not None:
            nn.init.zeros_(model.layer.bias)  # it would hide a small change
        base = model(*inputs, **more)
        part = parts_of(disturb(model))["layer.weight"]
        assert all(p.dtype == torch.float32 for p in part.parameters())
        weight = model.layer._parameters["weight"]
        with torch.no_grad():
            part.core.mul_(0.01 * weight.float().norm() / change(part).norm())
        got = gradients(model, inputs, more)
        assert got[0].dtype == dtype and all(g.dtype == torch.float32 for g in got[1].values())
        assert relative(got[0], base) > 1e-3
        wide = copy.deepcopy(model)
        for p in wide.parameters():
            p.data = p.data.float()
        inputs32 = [x.float() if x.is_floating_point() else x for x in inputs]
        want = gradients(wide, inputs32, more)
        with ts.disabled(wide):
            true = want[0] - wide(*inputs32, **more)
        assert relative(got[0].float() - base.float(), true) < (0.6 if dtype == torch.bfloat16 else 0.1)  # y is rounded
        assert_near(got, want, 0.02)

    def test_a_merge_that_loses_the_change_warns(self):
        model, _, _ = boxed("linear", torch.bfloat16)
        ts.adapt(model, ts.TuckerConfig(3, target_modules="layer"))
        part = parts_of(disturb(model))["layer.weight"]
        with torch.no_grad():
            part.core.mul_(1e-3 * model.layer._parameters["weight"].float().norm() / change(part).norm())
        state = state_of(model)
        with pytest.warns(UserWarning, match=r"merge: half precision swallows \d+% of the change of 'layer'"):
            ts.merge(model)
        assert_same_state(ts.unmerge(model).state_dict(), state)
        with torch.no_grad():
            part.core.mul_(1e3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ts.merge(model)
            want = (state["layer.weight"].float() + change(part, torch.float32)).bfloat16()
        differs = (model.layer._parameters["weight"].float() - want.float()).abs()
        assert (differs <= 2**-7 * want.float().abs()).all()  # the last bit, where the sum was near a half

    def test_merging_nothing_is_silent(self):
        model = ts.adapt(boxed("linear", torch.bfloat16)[0], ts.TuckerConfig(3, target_modules="layer"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ts.merge(model)

    def test_layers_that_compose_in_half_precision_warn(self):
        for kind in ("linear_own_forward", "attention"):
            with pytest.warns(UserWarning, match="adapt: 'layer'.*half precision"):
                ts.adapt(boxed(kind, torch.bfloat16)[0], ts.TuckerConfig(3, target_modules="layer"))
        with pytest.warns(UserWarning, match="dropout has no effect on 'layer'"):
            ts.adapt(boxed("embedding")[0], ts.TuckerConfig(3, target_modules="layer", dropout=0.5))


class TestMemory:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d_depthwise", "attention", "linear_own_forward"])
    def test_checkpointing(self, kind, reentrant):
        model, inputs, more = adapted(kind, dropout=0.5 if kind in ("linear", "conv2d") else 0.0)
        disturb(model).train()
        inputs = [x.requires_grad_() for x in inputs]

        class Again(Box):
            def forward(self, *inputs):
                return checkpoint(self.layer, *inputs, use_reentrant=reentrant)

        torch.manual_seed(0)
        want = gradients(model, inputs, more)
        torch.manual_seed(0)
        got = gradients(Again(model), inputs)
        assert_near((got[0], {k.removeprefix("layer."): g for k, g in got[1].items()}), want)

    @pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d_depthwise", "transposed2d", "conv1d_of_transformers"])
    def test_only_the_input_is_kept(self, kind):
        model, inputs, more = adapted(kind)
        disturb(model)
        inputs[0].requires_grad_()
        kept = {}

        def pack(t):
            kept[t.data_ptr()] = t.numel() * t.element_size()
            return t

        own = {p.data_ptr() for p in model.parameters()} | {inputs[0].data_ptr()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(*inputs, **more)
        assert sum(size for at, size in kept.items() if at not in own) <= 64


class TestDistributed:
    @pytest.fixture
    def group(self, tmp_path):
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
    def test_ddp(self, group, tmp_path):
        model, x = net()
        with pytest.raises(ValueError, match="^adapt: .*before DistributedDataParallel"):
            ts.adapt(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), ts.TuckerConfig(2))
        disturb(ts.adapt(model, ts.TuckerConfig(2, save_modules="head", dropout=0.0)))
        want = gradients(copy.deepcopy(model), [x])
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert_near(gradients(wrapped, [x]), want)
        torch.optim.AdamW(ts.adapter_parameters(wrapped), lr=0.1).step()
        assert relative(wrapped(x), want[0]) > 1e-3
        ts.save_adapter(wrapped, tmp_path / "a")
        fresh = ts.load_adapter(net()[0], tmp_path / "a")
        assert relative(fresh(x), wrapped(x)) <= 1e-6
        with ts.disabled(wrapped):
            assert torch.equal(wrapped(x), net()[0](x))
        ts.merge_and_unload(wrapped)
        assert relative(model(x), fresh(x)) <= 1e-6


    @pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
    def test_fully_shard(self, group):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        model, x = net()
        disturb(ts.adapt(model, ts.TuckerConfig(2)))
        want = gradients(copy.deepcopy(model), [x])
        for part in (model.stem, *model.body.values(), model):
            fully_shard(part, mesh=mesh)
        got = gradients(model, [x])
        assert_near((got[0], {k: g.full_tensor() for k, g in got[1].items()}), want)
        with pytest.raises(ValueError, match="^adapt: .*sharded.*before fully_shard"):
            plain = net()[0]
            fully_shard(plain, mesh=mesh)
            ts.adapt(plain, ts.TuckerConfig(2, target_modules="fc"))


def test_inference_mode():
    for kind in ("linear", "attention", "conv2d_depthwise", "embedding_padding"):
        model, inputs, more = adapted(kind)
        want = disturb(model)(*inputs, **more)
        with torch.inference_mode():
            assert relative(model(*inputs, **more), want) <= 1e-5
