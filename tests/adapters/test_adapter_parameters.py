"""`target_parameters`: matrices and stacks of experts that are no layer's weight."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from adapter_cases import assert_same_state, change, disturb, gradients, parts_of, relative, state_of
from helpers import close, normal, optional, same
from parameter_cases import ALL, Batched, Experts, Mixture, adapted, mixture
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_subspace as ts
import torch_subspace.adapters.adapted as machinery
import torch_subspace.adapters.weight as weights


def by_hand(model, name="default"):
    """The plain model with base + change for parameters, in float64; the changes are differentiable."""
    plain = copy.deepcopy(model)
    ts.delete_adapter(plain, name)
    plain = plain.double()
    changed = {k: p.detach() for k, p in plain.named_parameters()}
    for key, part in parts_of(model, name).items():
        key = key.removeprefix(".")
        changed[key] = changed[key] + change(part)
    return lambda x: torch.func.functional_call(plain, changed, (x.double(),))


@pytest.fixture
def composed(monkeypatch):
    """Counts what is composed."""
    calls, compose = [], weights.tucker_compose
    monkeypatch.setattr(weights, "tucker_compose", lambda *a, **k: calls.append(1) or compose(*a, **k))
    return calls


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", [Experts, Batched])
def test_values_and_gradients(kind, transposed):
    plain, x = mixture(kind, torch.float64, transposed=transposed)
    before = plain(x)
    model, x = adapted(kind, torch.float64, transposed=transposed)
    assert torch.equal(model(x), before)
    disturb(model)
    y, found = gradients(model, [x])
    close(y, by_hand(model)(x), 1e-12)
    close(model.experts.up, model.experts._parameters["up"] + change(parts_of(model)["experts.up"]), 1e-12)
    draw = torch.Generator().manual_seed(0)
    by_hand(model)(x).backward(torch.randn(y.shape, generator=draw))
    parts = {f"{n}.{k}": p for n, part in parts_of(model).items() for k, p in part.named_parameters()}
    assert len(parts) == len(found) == 9
    for n, p in model.named_parameters():
        if n in found:
            close(p.grad / 2, found[n], 1e-10)  # both backwards add up
    with ts.disabled(model):
        assert torch.equal(model(x), before)


def test_experts_have_a_core_each_between_shared_factors():
    model, _ = adapted(config={"target_parameters": "experts.up", "rank": (3, 2)})
    part, = parts_of(model).values()
    assert part.ranks == [None, 3, 2] and part.core.shape == (3, 3, 2)
    assert part.factor0 is None and part.factor1.shape == (7, 3) and part.factor2.shape == (5, 2)


def test_a_parameter_is_composed_once_in_a_forward(composed):
    model, x = adapted()
    disturb(model)
    expected = by_hand(model)(x)
    model(x)
    assert len(composed) == 3
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    assert len(composed) == 9
    assert machinery._kept.of == {}

    def forward(x):  # a read without gradients must not serve one with
        with torch.no_grad():
            scale = model.experts.up.abs().mean()
        return Experts.forward(model.experts, x) / scale

    with machinery._composed_once(model.experts):
        forward(x).sum().backward()
    assert model.experts.tucker["default"]["up"].core.grad.abs().sum() > 0
    close(model(x), expected, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_gradient_checkpointing(inside, reentrant):
    class Checkpointed(Experts):
        def forward(self, x):
            first = self.expert(x, 0)  # read outside of what is run again, too
            return first + sum(checkpoint(self.expert, x, e, use_reentrant=reentrant) for e in range(1, len(self.up)))

    model, x = adapted(Checkpointed if inside else Experts)
    plain, _ = adapted()
    x.requires_grad_()
    _, expected = gradients(disturb(plain), [x])
    if inside:
        _, found = gradients(disturb(model), [x])
    else:
        disturb(model)
        _, found = _checkpointed_gradients(model, x, reentrant)
    for n in expected:
        close(found[n], expected[n], 1e-5)


def _checkpointed_gradients(model, x, reentrant):
    model.zero_grad()
    y = checkpoint(model, x, use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)))
    return y, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_merged_unmerged_unloaded():
    model, x = adapted()
    before = {n: p.clone() for n, p in model.named_parameters() if "tucker" not in n}
    y = disturb(model)(x)
    ts.merge(model)
    close(model(x), y, 1e-5)
    assert not torch.equal(model.experts.up, before["experts.up"])
    ts.unmerge(model)
    assert same([p for n, p in model.named_parameters() if n in before], before.values()) and torch.equal(model(x), y)
    plain = ts.merge_and_unload(model)
    assert type(plain) is Mixture and type(plain.experts) is Experts and list(plain.state_dict()) == list(before)
    close(plain(x), y, 1e-5)
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(k.startswith("tucker") for m in plain.modules() for k in m.__dict__)


def test_adapters_of_different_parameters_of_a_module():
    model, x = adapted(config={"target_parameters": "up"})
    plain = mixture()[0](x)
    one = disturb(model)(x)
    ts.adapt(model, ts.TuckerConfig(rank=3, target_modules=(), target_parameters=["experts.down", "up"]), "two")
    assert torch.equal(model(x), plain)
    two = disturb(model, "two", seed=2)(x)
    ts.set_adapter(model, {"default": 1.0, "two": 0.5})
    up = change(parts_of(model)["experts.up"]) + 0.5 * change(parts_of(model, "two")["experts.up"])
    close(model.experts.up, model.experts._parameters["up"] + up, 1e-6)
    for name, y in (("default", one), ("two", two), (None, plain)):
        ts.set_adapter(model, name)
        close(model(x), y, 1e-6)
    ts.delete_adapter(model, "default")
    ts.set_adapter(model, "two")
    close(model(x), two, 1e-6)
    ts.delete_adapter(model, "two")
    assert type(model.experts) is Experts and torch.equal(model(x), plain)


def test_files(path):
    model, x = adapted(config={"rank_pattern": {"up": (2, 3, 1)}})
    disturb(model)
    ts.save_adapter(model, path)
    plain, _ = mixture()
    loaded = ts.load_adapter(plain, path)
    assert torch.equal(loaded(x), model(x)) and parts_of(loaded)["experts.up"].ranks == [2, 3, 1]
    assert_same_state(loaded.state_dict(), model.state_dict())
    again, _ = adapted(config={"rank_pattern": {"up": (2, 3, 1)}})
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    ts.load_adapter(disturb(again, seed=5), path)
    assert torch.equal(again(x), model(x))


def test_files_that_do_not_fit(path):
    ts.save_adapter(adapted()[0], path)
    wide, _ = mixture(inner=8)
    state = state_of(wide)
    with pytest.raises(ValueError, match=r"experts.up is \(3, 7, 5\) in the file and \(3, 8, 5\) in the model"):
        ts.load_adapter(wide, path)
    del wide.experts.down
    with pytest.raises(ValueError, match="'experts' has no parameter 'down'"):
        ts.load_adapter(wide, path)
    assert type(wide.experts) is Experts and torch.equal(wide.experts.up, state["experts.up"])


def test_copies():
    model, x = adapted()
    y = disturb(model)(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), y)
        ts.set_adapter(other, None)
        assert torch.equal(model(x), y) and not torch.equal(other(x), y)


def test_half_precision_base():
    plain, x = mixture(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="computes with its weight in its own way, in half precision"):
        model = ts.adapt(plain, ts.TuckerConfig(rank=2, target_modules=(), target_parameters=ALL))
    disturb(model)
    assert {p.dtype for part in parts_of(model).values() for p in part.parameters()} == {torch.float32}
    base = model.experts._parameters["up"]
    assert torch.equal(model.experts.up, (base.double() + change(parts_of(model)["experts.up"])).bfloat16())
    y, found = gradients(model, [x])
    assert y.dtype == torch.bfloat16 and all(g.abs().sum() > 0 for g in found.values())


@pytest.mark.parametrize("init", ["lecun", "kaiming", "svd"])
@pytest.mark.parametrize("transposed", [False, True])
def test_starts(init, transposed):
    model, _ = mixture(transposed=transposed, inner=400, width=300)
    with torch.no_grad():  # a stack whose leading directions stand out
        model.experts.up += 50 * normal(*model.experts.up.shape[:2], 2, dtype=torch.float32) @ normal(
            3, 2, model.experts.up.shape[2], dtype=torch.float32)
    ts.adapt(model, ts.TuckerConfig(rank=2, init=init, target_modules=(), target_parameters="up"))
    part, = parts_of(model).values()
    u, v = (part.factor2, part.factor1) if transposed else (part.factor1, part.factor2)
    if init == "svd":
        stack = model.experts._parameters["up"]
        for mode, factor in ((1, part.factor1), (2, part.factor2)):
            best = torch.linalg.svd(stack.detach().movedim(mode, 0).flatten(1), full_matrices=False)[0][:, :2]
            assert torch.linalg.svdvals(best.mT @ factor.detach()).min() > 0.99
    elif init == "lecun":
        assert abs(u.std() * 2 ** 0.5 - 1) < 0.2 and abs(v.std() * 300 ** 0.5 - 1) < 0.2
    assert all(f.isfinite().all() and f.abs().sum() > 0 for f in (u, v))


def test_ranks_and_scales():
    config = ts.TuckerConfig(rank=2, alpha=3.0, scaling="lora", rank_pattern={"experts": (3, 1), "experts.down": 4},
                             alpha_pattern={"up": 5.0}, target_modules=(), target_parameters=ALL)
    model = ts.adapt(mixture()[0], config)
    parts = parts_of(model)
    assert parts["experts.up"].ranks == [None, 3, 1] and parts["experts.up"].scale == 5
    assert parts["experts.down"].ranks == [None, 3, 1] and parts["experts.down"].scale == 3  # the first that matches
    assert parts[".out"].ranks == [2, 2] and parts[".out"].scale == 1.5
    config = ts.TuckerConfig(rank=(1, 3, 2), alpha=4.0, scaling="lora", target_modules=(), target_parameters="up")
    part, = parts_of(ts.adapt(mixture()[0], config)).values()
    assert part.ranks == [1, 3, 2] and part.scale == 2
    box = nn.Sequential()
    box.stack = nn.Parameter(torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match="'stack' has a weight of 4 dimensions .* but 2 ranks are given"):
        ts.adapt(box, ts.TuckerConfig(target_parameters="stack"))
    part, = parts_of(ts.adapt(box, ts.TuckerConfig(rank=(1, 2, 3, 9), target_parameters="stack"))).values()
    assert part.ranks == [1, 2, 3, 5]
    close(box.stack, box._parameters["stack"], 0)


def test_a_layers_weight_is_the_layer():
    model, x = adapted(config={"target_parameters": "fc.weight"})
    other, _ = mixture()
    torch.manual_seed(0)
    ts.adapt(other, ts.TuckerConfig(rank=2, alpha=1.5, target_modules="fc"))
    other.load_state_dict(disturb(model).state_dict())
    assert torch.equal(model(x), other(x)) and type(model.fc) is type(other.fc)
    both = ts.adapt(mixture()[0], ts.TuckerConfig(rank=2, target_parameters=["fc.weight", "up"]))
    assert list(parts_of(both)) == ["experts.up", "fc.weight"]
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    ts.adapt(attention, ts.TuckerConfig(rank=2, target_modules=(), target_parameters="in_proj_weight"))
    assert list(parts_of(attention)) == ["0.in_proj_weight"]


def test_lists_memories_and_layers_without_a_kind():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = (nn.Parameter(normal(6, 5, seed=i, dtype=torch.float32)) for i in (1, 2))
            self.items = nn.ParameterList([normal(5, 5, seed=3, dtype=torch.float32)])
            self.pair = nn.Bilinear(5, 5, 5)

        def forward(self, x):
            return self.pair(x, (x @ self.keys.mT).softmax(-1) @ self.values @ self.items[0])

    torch.manual_seed(0)
    plain, x = Memory(), normal(4, 5, dtype=torch.float32)
    y = plain(x)
    names = ["keys", "values", "items.0", "pair.weight"]
    model = ts.adapt(copy.deepcopy(plain), ts.TuckerConfig(rank=2, target_parameters=names))
    assert torch.equal(model(x), y)
    y = disturb(model)(x)
    changes = {n.removeprefix("."): change(part).float() for n, part in parts_of(model).items()}
    assert set(changes) == set(names)
    with torch.no_grad():
        for n, p in plain.named_parameters():
            p += changes.get(n, 0)
    close(y, plain(x), 1e-5)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), y) and len(list(other.parameters())) == len(list(model.parameters()))
    close(ts.merge_and_unload(model)(x), y, 1e-5)


def test_compiled():
    model, x = adapted()
    y, expected = gradients(disturb(model), [x])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    y2, found = gradients(compiled, [x])
    close(y2, y, 1e-6)
    for n in expected:
        close(found[n], expected[n], 1e-5)
    with torch.no_grad():
        close(compiled(x), y, 1e-6)


def test_threads_do_not_share_what_they_compose():
    import threading

    model, x = adapted()
    _, expected = gradients(disturb(model), [x])
    errors = []

    def run(grad):
        with torch.set_grad_enabled(grad):
            for _ in range(20):
                y = model(x)
                if y.requires_grad is not grad:
                    errors.append(grad)

    workers = [threading.Thread(target=run, args=(grad,)) for grad in (True, False, True)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not errors and machinery._kept.of == {}


MODELS = {"mixtral": ("MixtralConfig", "MixtralForCausalLM"), "gpt_oss": ("GptOssConfig", "GptOssForCausalLM"),
          "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM")}


@pytest.mark.parametrize("kind", MODELS)
def test_every_implementation_of_transformers(kind):
    transformers = optional("transformers")
    config, cls = (getattr(transformers, n, None) for n in MODELS[kind])
    if not hasattr(transformers.PreTrainedModel, "set_experts_implementation"):
        pytest.skip("experts are no stacks in this version of transformers")
    torch.manual_seed(0)
    model = cls(config(vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=24, head_dim=8,
                       shared_expert_intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, num_local_experts=4, num_experts=4, num_experts_per_tok=2)).eval()
    x = torch.randint(32, (2, 5))
    before, found = {}, {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        before[name] = model(x).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ts.adapt(model, ts.TuckerConfig(rank=3, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    assert "only target_parameters" not in ts.adapter_summary(model)
    for name in before:
        model.set_experts_implementation(name)
        assert torch.equal(model(x).logits, before[name])
    disturb(model)
    for name in before:
        model.set_experts_implementation(name)
        model.zero_grad()
        y = model(x).logits
        y.backward(normal(*y.shape, dtype=torch.float32))
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert relative(y, before[name]) > 1e-3
        found = found or {"y": y.detach(), **grads}
        close(y, found["y"], 1e-5)
        for n, g in grads.items():
            close(g, found[n], 1e-4, floor=1e-6)
    merged = ts.merge_and_unload(model)
    close(merged(x).logits, found["y"], 1e-5)
