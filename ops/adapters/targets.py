"""Which layers a `TuckerConfig` means, which of them can be adapted, and why not."""
from __future__ import annotations

import torch
from torch import nn

from .adapted import CONVS, PROJECTIONS, TRANSPOSED, Adapted, is_conv1d_of_transformers, is_packed
from .config import WORDS, TuckerConfig, close_names, is_bare, matches
from .placed import is_sharded


def _is_linear(module) -> bool:
    return isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_conv1d_of_transformers(module)


def has_kind(module) -> bool:
    return _is_linear(module) or isinstance(module, (*CONVS, *TRANSPOSED, nn.Embedding))


def weights_of(module) -> dict[str, torch.Size]:
    """The parameters that an adapter of this layer changes, with the shapes that they stand for."""
    if isinstance(module, nn.MultiheadAttention):
        return {n: module._parameters[n].shape for n in PROJECTIONS if module._parameters.get(n) is not None}
    weight = module._parameters["weight"]
    if isinstance(module, nn.Linear) and is_packed(weight):
        return {"weight": torch.Size((module.out_features, module.in_features))}
    return {"weight": weight.shape}


def input_mode(module) -> int | None:
    """The dimension of the weight that the layer's input meets; None where rows are picked."""
    if isinstance(module, nn.Embedding):
        return None
    return 0 if isinstance(module, TRANSPOSED) or is_conv1d_of_transformers(module) else 1


def owners_of(model) -> dict[tuple, list[str]]:
    """Names of the modules that hold each parameter, told apart by memory: two parameters may share it."""
    owners = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(place(p), []).append(name)
    return owners


def place(p) -> tuple:
    if is_uninitialised(p) or type(p.data) is not torch.Tensor or p.is_meta or p.numel() == 0:
        return (id(p),)
    return (p.data_ptr(), p.device)


def is_uninitialised(p) -> bool:
    return isinstance(p, nn.parameter.UninitializedTensorMixin)


def refusal(name, module, owners) -> str | None:
    """Why this layer can't be adapted; None when it can."""
    kind = type(module).__name__
    if not has_kind(module):
        stacks = [n for n, p in module._parameters.items() if p is not None and not is_uninitialised(p) and p.dim() > 1]
        hint = f"; its parameters {', '.join(map(repr, stacks))} are for target_parameters" if stacks else ""
        return f"{name!r} is a {kind}, which has no Tucker adapter{hint}"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{name!r} is a {kind}: run it once, so that its weight has a shape"
    keys = [k for k in ("weight", *PROJECTIONS) if module._parameters.get(k) is not None]
    if not keys or (isinstance(module, nn.MultiheadAttention) and nn.utils.parametrize.is_parametrized(module)):
        return f"the weight of {name!r} is parametrised, as by weight_norm; remove that first"
    for key in keys:
        weight, sharers = module._parameters[key], owners[place(module._parameters[key])]
        if weight.numel() == 0:
            return f"the weight of {name!r} has no entries: shape {tuple(weight.shape)}"
        if weight.is_complex():
            return f"the weight of {name!r} is complex ({weight.dtype})"
        if len(sharers) > 1:
            return f"the weight of {name!r} is tied: {', '.join(map(repr, sharers))} share it"
        if is_sharded(weight) and not isinstance(module, Adapted):
            return f"the weight of {name!r} is sharded: adapt the model before fully_shard"
        if is_packed(weight) and not is_sharded(weight) and not isinstance(module, nn.Linear):
            return f"the weight of {name!r} is packed ({type(weight).__name__}), which only works for Linear"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"{name!r} renormalises its weight (max_norm={module.max_norm}) whenever it is read"
    return None


def find_targets(model: nn.Module, config: TuckerConfig) -> dict[str, nn.Module]:
    """The layers that the config means by name; ValueError when there are none, or one can't be adapted."""
    if has_kind(model):
        raise ValueError(f"adapt: the model is itself a {type(model).__name__}; put it in a module, nn.Sequential say")
    ours = {id(m) for layer in model.modules() if isinstance(layer, Adapted) for m in layer.tucker.modules()}
    modules, names = {}, {}  # a module may have several names; the first is its own
    for name, module in model.named_modules(remove_duplicate=False):
        if name and id(module) not in ours:
            modules.setdefault(id(module), module)
            names.setdefault(id(module), []).append(name)
    owners = owners_of(model)
    saved = [n for ns in names.values() for n in ns if any(matches(p, n) for p in config.save_modules)]
    kept = {k for k, ns in names.items() if any(n == s or n.startswith(s + ".") for s in saved for n in ns)}

    taken = {id(inner) for m in model.modules() if "tucker_saved" in m.__dict__ for inner in m.modules()}

    def why_not(key):
        if key in taken:
            return f"{names[key][0]!r} is trained whole by another adapter"
        return refusal(names[key][0], modules[key], owners)

    def can(key):
        return key not in kept and why_not(key) is None

    def meant(pattern, key):
        if pattern == "all-linear":
            return _is_linear(modules[key]) and can(key)
        if pattern == "all-conv":
            return isinstance(modules[key], (*CONVS, *TRANSPOSED)) and can(key)
        return any(matches(pattern, n) for n in names[key])

    every = [n for ns in names.values() for n in ns]
    if config.target_parameters:
        every += [n for n, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in config.exclude_modules:
        if pattern not in WORDS and not any(matches(pattern, n) for n in every):
            raise ValueError(f"adapt: exclude_modules {pattern!r} matches nothing{close_names([pattern], every)}")
    excluded = {key for key in modules if any(meant(p, key) for p in config.exclude_modules)} | kept
    found, refused, unmatched = {}, [], []
    for pattern in config.target_modules:
        keys = [key for key in modules if meant(pattern, key)]
        if not keys and pattern not in WORDS:
            unmatched.append(pattern)
        for key in keys:
            parts = [key]
            if isinstance(modules[key], nn.MultiheadAttention):  # its output projection is a layer of its own
                parts.append(id(modules[key].out_proj))
            for part in () if key in excluded else parts:
                asked = pattern not in WORDS and _is_asked_for(modules[part], pattern)
                if part not in excluded and (can(part) or asked):
                    why = why_not(part)
                    found[names[part][0]] = modules[part]
                    refused += [why] if why else []
    if refused:
        raise ValueError(f"adapt: {'; '.join(dict.fromkeys(refused))}")
    if unmatched or not (found or config.target_parameters):
        known = [n for key, ns in names.items() for n in ns if has_kind(modules[key]) and key not in kept]
        what = ", ".join(map(repr, unmatched or config.target_modules))
        whys = [why for key in modules if key not in excluded and has_kind(modules[key])
                and (why := why_not(key))]
        if not unmatched and whys:
            raise ValueError(f"adapt: no layer of {type(model).__name__} can be adapted: {'; '.join(whys[:3])}")
        raise ValueError(f"adapt: no layer of {type(model).__name__} matches target_modules {what}"
                         f"{close_names(unmatched or known, known)}{_parameters_named(model, unmatched)}")
    order = {names[key][0]: i for i, key in enumerate(modules)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _parameters_named(model, patterns) -> str:
    """What to add for names that are no module's, but a parameter's."""
    found = [p for p in patterns if any(matches(p, n) for n, _ in model.named_parameters())]
    return f"; {', '.join(map(repr, found))} names parameters: that is for target_parameters" if found else ""


def _is_asked_for(module, pattern) -> bool:
    """Is a module that can't be adapted an error, or does a wide pattern just meet it? Containers, norms and
    activations are met; a layer with a weight is meant, and so is what a bare name names and what holds no layer."""
    matrix = any(not is_uninitialised(p) and p.dim() > 1 for p in module.parameters(recurse=False))
    if has_kind(module) or (matrix and not any(True for _ in module.children())):
        return True
    inside = any(has_kind(m) for m in module.modules())
    return is_bare(pattern) and not inside and (matrix or callable(getattr(module, "weight", None)))
