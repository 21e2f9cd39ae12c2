"""Spectral adapters (SVFit): singular values of frozen weights are trained, on every kind of layer."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from adapter_cases import KINDS, assert_same_state, boxed, disturb, net, parts_of, relative, state_of
from helpers import normal, optional
from parameter_cases import ALL, Batched, Experts, mixture
from torch import nn

import torch_subspace as ts
from torch_subspace.adapters import forms
from torch_subspace.adapters.spectral import SpectralFactors, counted, probe_vector, singular_pairs

every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(kind, dtype=torch.float32, rank=3, **config):
    model, inputs, more = boxed(kind, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of half precision
        ts.adapt(model, ts.SpectralConfig(rank, target_modules=r"layer.*", **config))
    return model, inputs, more


def change(part):
    """sum_i delta_i u_i v_i', in the parameter's shape."""
    return torch.einsum("...r,...mr,...nr->...mn", part.core, part.factor0, part.factor1).reshape(part.shape)


def base_of(model, key):
    owner, _, parameter = key.rpartition(".")
    return model.get_submodule(owner)._parameters[parameter]


class TestFacts:
    @every_kind
    def test_changes_no_bit_at_the_start_and_comes_off(self, kind):
        for grad in (False, True):
            model, inputs, more = boxed(kind, torch.float64 if grad else torch.float32)
            state = state_of(model.requires_grad_(grad))  # torch's attention takes other ways when frozen
            with torch.set_grad_enabled(grad):
                want = model(*inputs, **more)
                ts.adapt(model, ts.SpectralConfig(3, target_modules=r"layer.*"))
                assert torch.equal(model(*inputs, **more), want)
                disturb(model)
                y = model(*inputs, **more)
                assert relative(y, want) > 1e-3
                assert relative(ts.merge(model)(*inputs, **more), y) < (1e-13 if grad else 1e-6)
                assert torch.equal(ts.unmerge(model)(*inputs, **more), y)
                with ts.disabled(model):
                    assert relative(model(*inputs, **more), want) < 1e-6  # attention may take torch's fast path
                ts.delete_adapter(model, "default")
                assert torch.equal(model(*inputs, **more), want)
            assert_same_state(model.state_dict(), state)

    @every_kind
    def test_is_the_composed_form_with_its_gradients(self, kind):
        model, inputs, more = adapted(kind, torch.float64)
        plain = boxed(kind, torch.float64)[0]
        disturb(model)
        inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
        parts = parts_of(model)
        assert all(p.requires_grad == n.endswith(".core") for n, p in model.named_parameters())
        wanted = [part.core for part in parts.values()] + [x for x in inputs if x.requires_grad]
        base = dict(plain.named_parameters())
        weights = {key: base[key] + change(part) for key, part in parts.items()}
        y = torch.func.functional_call(plain, weights, tuple(inputs), more)
        got = model(*inputs, **more)
        assert relative(got, y) < 1e-12
        for a, b in zip(torch.autograd.grad(got.sin().sum(), wanted), torch.autograd.grad(y.sin().sum(), wanted),
                        strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

    @every_kind
    def test_the_merged_weight_has_the_singular_values_that_were_trained(self, kind):
        model, *_ = adapted(kind, torch.float64, 2)
        for key, part in parts_of(model).items():
            weight = base_of(model, key).flatten(1).clone()
            row = getattr(model.get_submodule(key.rpartition(".")[0]), "padding_idx", None)
            if row is not None:
                weight[row] = 0
            before = torch.linalg.svdvals(weight)
            for f in (part.factor0, part.factor1):
                torch.testing.assert_close(f.mT @ f, torch.eye(part.rank, dtype=f.dtype), rtol=0, atol=1e-12)
            with torch.no_grad():
                part.core.copy_(before[: part.rank] * torch.tensor([0.5, -0.25])[: part.rank])
            after = torch.linalg.svdvals(weight + change(part).flatten(1))
            want = torch.cat([before[: part.rank] + part.core.detach(), before[part.rank :]])
            torch.testing.assert_close(after, want.sort(descending=True).values)

    @pytest.mark.parametrize("kind", [Experts, Batched])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_every_expert_has_its_own(self, kind, transposed, tmp_path):
        model, x = mixture(kind, torch.float64, transposed=transposed)
        want, plain = model(x), copy.deepcopy(model)
        ts.adapt(model, ts.SpectralConfig(2, target_modules="fc", target_parameters=ALL))
        assert torch.equal(model(x), want)
        disturb(model)
        parts = parts_of(model)
        assert parts["experts.up"].core.shape == (3, 2) and parts[".out"].core.shape == (2,)
        _, sigma, _ = torch.linalg.svd(base_of(model, "experts.up"))
        part = parts["experts.up"]
        image = torch.einsum("emr,emn,enr->er", part.factor0, base_of(model, "experts.up"), part.factor1)
        torch.testing.assert_close(image, sigma[:, :2])
        weights = {k.strip("."): base_of(model, k) + change(p) for k, p in parts.items()}
        y = torch.func.functional_call(plain, weights, (x,))
        cores = [p.core for p in parts.values()]
        torch.testing.assert_close(model(x), y)
        torch.testing.assert_close(torch.autograd.grad(model(x).sin().sum(), cores),
                                   torch.autograd.grad(y.sin().sum(), cores))
        y = model(x)
        ts.save_adapter(model, tmp_path / "a.safetensors")
        assert relative(ts.load_adapter(plain, tmp_path / "a.safetensors")(x), y) < 1e-13
        assert relative(ts.merge_and_unload(model)(x), y) < 1e-13

    def test_training_moves_the_numbers_alone(self):
        model, x = net()
        ts.adapt(model, ts.SpectralConfig(4, save_modules="head"))
        start = state_of(model)
        groups = ts.adapter_parameters(model, lr=0.1, lr_multipliers={"stem.core": 2})
        assert sorted(p.numel() for g in groups for p in g["params"]) == [3, 4, 4, 4, 24]
        opt = torch.optim.AdamW(groups)
        before = model(x).square().mean().item()
        for _ in range(5):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
        assert model(x).square().mean().item() < before
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, start[n])}
        assert moved == {n for n, p in model.named_parameters() if n.endswith("core") or n.startswith("head")}
        assert "stem       weight     8 x 3 x 3 x 3  4      default  4" in ts.adapter_summary(model)


class TestForms:
    """A change of high rank is composed with the weight where that takes fewer flops."""

    @pytest.mark.parametrize("rows", [8, 2000])
    @pytest.mark.parametrize("config", [ts.SpectralConfig(60), ts.TuckerConfig(60)])
    def test_both_are_one_function(self, rows, config, monkeypatch):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(64, 80)).double(), normal(rows, 64).requires_grad_()
        want = model(x)
        ts.adapt(model, config)
        assert torch.equal(model(x), want)
        disturb(model)
        (part,) = parts_of(model).values()
        wanted = [x, *(p for p in part.parameters() if p.requires_grad)]
        assert forms.is_composed(x, model[0]._parameters["weight"], *part(), 0.0) == (rows == 2000)
        results = []
        for form in (forms.is_composed, lambda *a: True, lambda *a: False):
            monkeypatch.setattr("torch_subspace.adapters.adapted.is_composed", form)
            y = model(x)
            first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
            results.append([y, *first, *second, *torch.autograd.grad(model(x).sin().sum(), wanted)])
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])

    def test_the_sum_is_not_kept(self):
        model, x = nn.Sequential(nn.Linear(64, 80)), normal(2000, 64, dtype=torch.float32)
        disturb(ts.adapt(model, ts.SpectralConfig(60)))
        (part,) = parts_of(model).values()
        known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            y = model(x)
        assert {tuple(t.shape) for t in found if t.untyped_storage().data_ptr() not in known} <= {(60, 60)}
        y.sum().backward()
        assert part.core.grad.isfinite().all()

    @pytest.mark.parametrize("change", [
        lambda x, w, c, f: (x[:8], w, c, f, 0.0), lambda x, w, c, f: (x, w, c, f, 0.5),
        lambda x, w, c, f: (x.bfloat16(), w.bfloat16(), c, f, 0.0),
        lambda x, w, c, f: (x, w, c[:9, :9], [t[:, :9] for t in f], 0.0)])
    def test_beside_where_composing_costs_more_or_loses_digits(self, change):
        core = torch.zeros(60, 60, requires_grad=True)
        given = torch.zeros(2000, 64), torch.zeros(80, 64), core, [torch.zeros(80, 60), torch.zeros(64, 60)]
        assert forms.is_composed(*given, 0.0) and not forms.is_composed(*change(*given))
        with torch.autocast("cpu", torch.bfloat16):
            assert not forms.is_composed(*given, 0.0)


class TestRanks:
    def test_shares_clamps_and_patterns(self):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 40), nn.Linear(40, 3))
        values = [torch.linalg.svdvals(m.weight.double()).square() for m in model]
        ts.adapt(model, ts.SpectralConfig(0.8, rank_pattern={"2": 50}))
        for value, part in zip(values, parts_of(model).values(), strict=True):
            r = part.rank
            assert r == 3 if len(value) == 3 else value[:r].sum() >= 0.8 * value.sum() > value[: r - 1].sum()

    def test_of_a_stack_the_most_that_a_matrix_needs(self):
        values = torch.tensor([[1.0, 0, 0], [1, 1, 1]])
        assert counted(values, 0.9) == 3 and counted(values[:1], 0.9) == 1 and counted(values, 2) == 2

    @pytest.mark.parametrize("rank", [0, -1, 1.0, 1.5, 0.0, True, "4", None, float("nan"), (2, 2)])
    def test_what_is_no_rank(self, rank):
        for config in ({"rank": rank}, {"rank_pattern": {"a": rank}}):
            with pytest.raises((TypeError, ValueError), match="SpectralConfig: rank"):
                ts.SpectralConfig(**config)

    @pytest.mark.parametrize("config, match", [
        ({"target_modules": ()}, "target_modules is empty"), ({"rank_pattern": [1]}, "rank_pattern must be a dict"),
        ({"save_vectors": "no"}, "save_vectors must be a bool"), ({"save_modules": 3}, "save_modules must be a name"),
        ({"target_modules": "("}, ".* is not a regular expression")])
    def test_what_a_config_refuses(self, config, match):
        with pytest.raises((TypeError, ValueError), match=f"SpectralConfig: {match}"):
            ts.SpectralConfig(**config)

    def test_what_adapt_refuses(self):
        model, x = net()
        want, state = model(x), state_of(model)
        for config, match in (({"rank_pattern": {"gone": 2}}, "rank_pattern 'gone' matches none"),
                              ({"target_modules": "gone"}, "matches target_modules 'gone'")):
            with pytest.raises(ValueError, match=match):
                ts.adapt(model, ts.SpectralConfig(**config))
        with torch.device("meta"), pytest.raises(ValueError, match="adapt: singular vectors need the weight of '0'"):
            ts.adapt(nn.Sequential(nn.Linear(2, 2)), ts.SpectralConfig(1))
        with torch.no_grad():
            model.stem.weight[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="weight of 'stem' finite"):
            ts.adapt(model, ts.SpectralConfig(1))
        with torch.no_grad():
            model.stem.weight.copy_(state["stem.weight"])
        assert torch.equal(model(x), want)
        ts.adapt(model, ts.SpectralConfig(1))
        with pytest.raises(RuntimeError, match="start anew off the meta device"):
            model.to("meta").to_empty(device="cpu")


class TestPairs:
    @pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7), (3, 6, 4), (4, 1)])
    @pytest.mark.parametrize("exact", [False, True])
    def test_are_those_of_the_svd(self, shape, exact):
        w = normal(*shape)
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        for r in range(1, s.shape[-1] + 1):
            got_u, got_v, known = singular_pairs(w, r, exact)
            want = torch.einsum("...mr,...rn->...rmn", u[..., :r], vh[..., :r, :])
            torch.testing.assert_close(torch.einsum("...mr,...nr->...rmn", got_u, got_v), want, rtol=0, atol=1e-12)
            assert known

    @pytest.mark.parametrize("w, known", [
        (torch.zeros(4, 3), 0), (torch.eye(4), 0), (torch.diag(torch.tensor([3.0, 2, 2, 1])), 1),
        (torch.ones(4, 4), 1), (torch.diag(torch.tensor([1e4, 1, 1e-3, 1e-5])), 3),
        (torch.diag(torch.tensor([1.0, 0.5, 1e-12])), 2)])
    def test_knows_what_the_matrix_determines(self, w, known):
        for r in range(1, len(w[0]) + 1):
            u, v, found = singular_pairs(w, r)
            assert found == (r <= known)
            for f in (u, v):  # orthonormal, whatever the matrix
                torch.testing.assert_close(f.mT @ f, torch.eye(f.shape[1], dtype=f.dtype), rtol=0, atol=1e-7)
            sigma = (u * (w.double() @ v)).sum(0)
            torch.testing.assert_close(sigma, torch.linalg.svdvals(w.double())[: len(sigma)], rtol=1e-9, atol=1e-9)

    def test_probes_are_the_same_everywhere(self):
        found = probe_vector(4, 0).tolist() + probe_vector(2, 1).tolist()
        assert found == [PROBES[i] for i in range(6)]
        assert abs(float(probe_vector(1 << 16, 1).mean())) < 0.01
        assert float(probe_vector(1 << 16, 0) @ probe_vector(1 << 16, 1)) / (1 << 16) < 0.01


def test_transposed_digits_by_two_hundred_numbers(monkeypatch):
    """Equal numbers of trained parameters: singular values of all layers, and LoRA of rank 1 in the best one."""
    optional("sklearn")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    import singular_values as example

    base, (_, x, y) = example.base(0), example.digits(0)
    found = {}
    for name, config, rate in (("spectral", ts.SpectralConfig(128), 0.3),
                               ("lora", ts.TuckerConfig(1, init="lora", target_modules="0"), 0.1),
                               ("core", ts.TuckerConfig(8, train="core"), 0.3)):
        torch.manual_seed(0)
        model, parameters = example.by(config)(copy.deepcopy(base))
        assert 192 <= sum(p.numel() for p in parameters) <= 202
        example.train(model, parameters, x, y, rate, 150, 0)
        found[name] = example.accuracy(model, x, y, slice(1200, None))
    assert example.accuracy(base, x, y, slice(1200, None)) < 0.2
    assert found["spectral"] > 0.75 and found["spectral"] > found["lora"] + 0.1, found


PROBES = [-0.2728395303711295, 0.6638808455318213, -0.8831179714761674, -0.6258433908224106, 0.2862123940140009,
          0.2731640753336251]


class TestManners:
    def test_beside_others(self):
        for kind in ("linear", "conv2d", "conv2d_grouped", "embedding", "attention", "transposed2d"):
            model, inputs, more = adapted(kind, torch.float64, 2)
            ts.adapt(model, ts.TuckerConfig(2, target_modules=r"layer.*"), "tucker")
            ts.adapt(model, ts.SpectralConfig(1, target_modules=r"layer.*"), "third")
            for i, name in enumerate(("default", "tucker", "third")):
                disturb(model, name, seed=i)
            outs = []
            for name in ("default", "tucker", "third"):
                ts.set_adapter(model, name)
                outs.append({k: getattr(model.get_submodule(k.rpartition(".")[0]), k.rpartition(".")[2]).detach()
                             - base_of(model, k) for k in parts_of(model)})
            weights = {"default": 0.5, "tucker": -1, "third": 2}
            ts.set_adapter(model, weights)
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            assert not any("factor" in n for n in trained if "tucker.tucker" not in n)
            y = model(*inputs, **more)
            for k in parts_of(model):
                got = getattr(model.get_submodule(k.rpartition(".")[0]), k.rpartition(".")[2]) - base_of(model, k)
                torch.testing.assert_close(got, sum(w * o[k] for w, o in zip(weights.values(), outs, strict=True)))
            assert relative(ts.merge(model)(*inputs, **more), y) < 1e-12

    def test_copies(self):
        model, x = net()
        disturb(ts.adapt(model, ts.SpectralConfig(2)))
        y = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), y)
            assert all(isinstance(p, SpectralFactors) for p in parts_of(other).values())
        other = net(seed=3)[0]
        ts.adapt(other, ts.SpectralConfig(2))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), y)

    @pytest.mark.parametrize("kind", ["linear", "linear_own_forward", "embedding", "conv2d", "conv2d_grouped",
                                      "transposed1d", "attention_batch_first"])
    def test_compiles_whole(self, kind):
        model, inputs, more = adapted(kind, torch.float64)
        disturb(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        cores = [p.core for p in parts_of(model).values()]
        y, want = compiled(*inputs, **more), model(*inputs, **more)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), cores),
                                   torch.autograd.grad(want.sin().sum(), cores))

    @pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
    def test_half_bases_and_autocast(self, kind):
        model, inputs, more = adapted(kind, torch.bfloat16)
        disturb(model)
        parts = parts_of(model)
        assert all(p.dtype == torch.float32 for part in parts.values() for p in part.parameters())
        inputs = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
        y = model(*inputs, **more)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and all(p.core.grad.dtype == torch.float32 for p in parts.values())
        model, inputs, more = adapted(kind)
        disturb(model)
        want = model(*inputs, **more)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(model(*inputs, **more), want) < 2e-2

    def test_per_sample_gradients(self):
        model, (x,), _ = adapted("linear", torch.float64)
        disturb(model)
        params = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def loss(params, x):
            return torch.func.functional_call(model, params, (x,)).sin().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
        whole = torch.autograd.grad(model(x).sin().sum(), list(params.values()))
        torch.testing.assert_close([g.sum(0) for g in each.values()], list(whole))
