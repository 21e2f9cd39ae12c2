"""Adapters on models of torchvision, timm and transformers: trained, saved, loaded, merged, exported."""

import copy
import pickle

import pytest
import torch
from adapter_cases import assert_same_state
from model_cases import MODELS, adapted, build, classes, clip, flat, move, outputs, parts_of, see, transformers
from torch import nn

import torch_subspace as ts

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SLOW = ("r3d", "fcn")
EACH = [key for key in MODELS if key not in ("r3d", "fcn", "regnet", "efficientnet", "lraspp", "deeplabv3")]


def layers_agree(model, fresh, inputs):
    """Gives each adapted layer what the layer of `fresh` gives for the same input, bit for bit?

    Torch takes other products for weights that are frozen than for those that are trained, and on some processors these
    differ in the last bit; so a model with both kinds may agree with neither of the two whole models.
    """
    agree, own = [], dict(fresh.named_modules())

    def compare(name, args, kwargs, y):
        layers = [copy.deepcopy(own[name]).requires_grad_(trained) for trained in (True, False)]
        agree.append(any(torch.equal(flat(y), flat(layer(*args, **kwargs))) for layer in layers))

    hooks = [m.register_forward_hook(lambda m, args, kwargs, y, name=name: compare(name, args, kwargs, y),
                                     with_kwargs=True) for name, m in adapted(model).items()]
    y = outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return y.isfinite().all() and len(agree) > 0 and all(agree)


def bases(model):
    """Parameters and buffers that are not an adapter's."""
    return {k: v.clone() for k, v in model.state_dict().items() if "tucker" not in k.split(".")}


@pytest.mark.parametrize("key", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in MODELS])
def test_adapt_train_save_load_merge(key, tmp_path):
    model, inputs, config, unused, plain = build(key)
    fresh, before, kinds = copy.deepcopy(model), bases(model), classes(model)
    start = outputs(model, inputs).detach()
    fast = [see(model, inputs)]  # some layers have another path without gradients
    frozen = outputs(copy.deepcopy(model).requires_grad_(False), inputs)  # and choose another kernel for frozen parts
    fast.append(see(copy.deepcopy(model).requires_grad_(False), inputs))
    assert start.isfinite().all() and start.std() > 0

    assert ts.adapt(model, config) is model
    found = adapted(model)
    if config.target_modules == ("all-linear", "all-conv"):
        assert {n for n, m in model.named_modules() if isinstance(m, KINDS)} - set(found) == plain
    with torch.no_grad():
        same = any(torch.equal(outputs(model, inputs), y) for y in fast) or layers_agree(model, fresh, inputs)
    assert same, "an adapter that starts at zero changed the output"
    y = outputs(model, inputs).detach()
    same = torch.equal(y, start) or torch.equal(y, frozen) or layers_agree(model, fresh, inputs)
    assert same, "an adapter that starts at zero changed the output"
    assert_same_state(bases(model), before)

    optimizer = torch.optim.SGD(ts.adapter_parameters(model), lr=1.0)
    y = outputs(model, inputs)
    (y * torch.randn_like(y)).sum().backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, layer in found.items():
        for part in parts_of(layer):
            if name in unused:
                assert part.core.grad is None or not part.core.grad.any()
                continue
            for n, p in part.named_parameters():
                assert p.grad is not None and p.grad.isfinite().all(), f"{name}.{n}"
            assert part.core.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    assert_same_state(bases(model), before)
    assert not torch.equal(outputs(model, inputs).detach(), start)

    for layer in found.values():
        move(layer)
    y = outputs(model, inputs).detach()
    assert y.isfinite().all()
    ts.save_adapter(model, tmp_path / "adapter.safetensors")
    loaded = ts.load_adapter(copy.deepcopy(fresh), tmp_path / "adapter.safetensors")
    assert torch.equal(outputs(loaded, inputs).detach(), y)
    assert torch.equal(outputs(copy.deepcopy(model), inputs).detach(), y)
    if MODELS[key][0] not in (transformers, clip):  # whose hooks don't go into a pickle
        assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), inputs).detach(), y)
    with ts.disabled(model):
        assert any(torch.equal(see(model, inputs), y) for y in fast)
        assert torch.equal(outputs(model, inputs), frozen)

    ts.merge(model)
    bound = 1e-5 * y.abs().max()
    assert (outputs(model, inputs).detach() - y).abs().max() <= bound
    assert (see(model, inputs) - y).abs().max() <= bound
    ts.unmerge(model)
    assert_same_state(bases(model), before)
    assert torch.equal(outputs(model, inputs).detach(), y)

    ts.merge_and_unload(model)
    assert classes(model) == kinds and list(model.state_dict()) == list(before)
    assert not any(k.startswith("tucker") for m in model.modules() for k in m.__dict__)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, inputs).detach(), outputs(model, inputs).detach())
    assert (outputs(fresh, inputs).detach() - y).abs().max() <= bound


@pytest.mark.parametrize("key", EACH)
def test_each_layer_is_seen(key):
    """A change of one layer alone changes the output, with and without gradients; float64, where no gate hides it."""
    model, inputs, config, unused, _ = build(key)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    ts.adapt(model.double(), config)
    start, fast = outputs(model, inputs).detach(), see(model, inputs)
    found = list(adapted(model).items())
    for name, layer in found[:: len(found) // 16 + 1]:  # some have hundreds
        for part in parts_of(layer):
            with torch.no_grad():
                part.core.normal_()
            assert torch.equal(outputs(model, inputs).detach(), start) == (name in unused), name
            assert torch.equal(see(model, inputs), fast) == (name in unused), f"{name} without gradients"
            nn.init.zeros_(part.core)
    assert torch.equal(outputs(model, inputs).detach(), start)


@pytest.mark.parametrize("key", ["vit", "swin", "timm_conv2d_same", "timm_beit", "torch_encoder", "unet", "bert"])
def test_export_keeps_the_adapter(key):
    model, inputs, config, _, _ = build(key)
    ts.adapt(model, config)
    for layer in adapted(model).values():
        move(layer, 0.5)
    y = see(model, inputs)
    named = MODELS[key][0] is transformers
    with torch.no_grad():
        program = torch.export.export(model, () if named else (*inputs.values(),), inputs if named else {})
    got = see(program.module(), inputs)
    assert (got - y).abs().max() <= 1e-5 * y.abs().max()
