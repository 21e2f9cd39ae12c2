"""Parameters that are no layer's weight: matrices, and stacks of them such as the experts of a mixture.

    dW[e] = scale * U core[e] V'                                    dW = scale * core x_1 U x_2 V

A core per expert between two factors that all share: E r r' + d r + d' r' numbers, composed by `tucker_compose` with
the identity for the first mode. The parameter is read as W + dW, composed once in a forward of its module.
"""
from __future__ import annotations

import re

import torch
from torch import nn

from .adapted import PROJECTIONS, Adapted, is_packed
from .config import WORDS, TuckerConfig, close_names, matches
from .placed import is_sharded
from .targets import has_kind, input_mode, is_uninitialised, owners_of, place, refusal, weights_of


def full_name(key: str, parameter: str) -> str:
    return f"{key}.{parameter}" if key else parameter


def is_stacked(module: nn.Module, parameter: str) -> bool:
    """Is it a parameter of its own, and not the weight of a layer that has a kind?"""
    return not has_kind(module) or parameter not in ("weight", *PROJECTIONS)


def shape_of(module: nn.Module, parameter: str) -> torch.Size | None:
    """The shape that an adapter of the parameter has; None where there is no such parameter."""
    if not is_stacked(module, parameter):
        return weights_of(module).get(parameter)
    p = module._parameters.get(parameter)
    return None if p is None else p.shape


def parameter_refusal(key: str, module: nn.Module, parameter: str, owners) -> str | None:
    """Why this parameter can't be adapted; None when it can."""
    if not is_stacked(module, parameter):
        return refusal(key, module, owners)
    name = full_name(key, parameter)
    if parameter in getattr(module, "parametrizations", ()):
        return f"{name!r} is parametrised, as by weight_norm; remove that first"
    if isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)):
        return f"{name!r} is of a {type(module).__name__}, which does not read its parameters by their names"
    p = module._parameters.get(parameter)
    if p is None:
        return f"{key!r} has no parameter {parameter!r}"
    if is_uninitialised(p):
        return f"{name!r} has no shape yet: run its module once"
    if is_sharded(p) and not isinstance(module, Adapted):
        return f"{name!r} is sharded: adapt the model before fully_shard"
    if is_packed(p) and not is_sharded(p):
        return f"{name!r} is packed ({type(p).__name__} of {p.dtype}), which only works for Linear"
    if not 2 <= p.dim() <= 6:
        return (f"{key!r} is a {type(module).__name__}, whose {parameter} of shape {tuple(p.shape)} is neither a "
                "matrix nor a stack of matrices")
    if 0 in p.shape:
        return f"{name!r} has no entries: shape {tuple(p.shape)}"
    if len(sharers := owners[place(p)]) > 1:
        return f"{name!r} is tied: {', '.join(map(repr, sharers))} share it"
    return None


def modes_of(module: nn.Module, parameter: str) -> tuple[int | None, int]:
    """The dimensions that an input meets, None where rows are picked, and an output has; a stack (experts, in, out)
    says so by `is_transposed`, as in transformers."""
    if not is_stacked(module, parameter):
        mode = input_mode(module)
        return mode, 0 if mode is None else 1 - mode
    dims = module._parameters[parameter].dim()
    modes = dims - 1, dims - 2
    return modes[::-1] if getattr(module, "is_transposed", False) else modes


def find_parameters(model: nn.Module, config: TuckerConfig) -> dict[str, dict[str, torch.Size]]:
    """{module: {parameter: shape}} that `target_parameters` means; ValueError when a name matches none, or one can't
    be adapted."""
    owners, known, found, refused = owners_of(model), {}, {}, []
    for key, module, names in _places(model):
        own = [n for n, p in module._parameters.items() if p is not None]
        for p in (*own, *getattr(module, "parametrizations", ())):
            known[key, p] = module, [full_name(n, p) for n in names], names
    used = set()
    for (key, parameter), (module, full, names) in known.items():
        meant = [pattern for pattern in config.target_parameters if any(matches(pattern, n) for n in full)]
        used.update(meant)
        if meant and not _is_left_alone(config, [*full, *names]):
            why = parameter_refusal(key, module, parameter, owners)
            if why is None:
                found.setdefault(key, {})[parameter] = shape_of(module, parameter)
            else:
                refused.append(why)
    unmatched = [p for p in config.target_parameters if p not in used]
    if unmatched:
        able = [(full[0], is_stacked(module, p)) for (key, p), (module, full, _) in known.items()
                if parameter_refusal(key, module, p, owners) is None]
        stacks = [name for name, stacked in able if stacked] or [name for name, _ in able]
        raise ValueError(f"adapt: no parameter of {type(model).__name__} matches target_parameters "
                         f"{', '.join(map(repr, unmatched))}{close_names(unmatched, stacks)}")
    if refused:
        raise ValueError(f"adapt: {'; '.join(refused)}")
    if config.target_parameters and not found:
        raise ValueError("adapt: exclude_modules or save_modules hold all that target_parameters "
                         f"{', '.join(map(repr, config.target_parameters))} matches")
    return found


def _places(model):
    """(name, module, all its names) of every module that is not ours, the model itself among them."""
    ours = {id(m) for layer in model.modules() if isinstance(layer, Adapted) for m in layer.tucker.modules()}
    modules, names = {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in ours:
            modules.setdefault(id(module), module)
            names.setdefault(id(module), []).append(name)
    return [(names[key][0], module, names[key]) for key, module in modules.items()]


def _is_left_alone(config, names) -> bool:
    """Do `exclude_modules` or `save_modules` name the parameter, its module, or for the latter what it lies in?"""
    inside = [n[:m.start()] for n in names for m in re.finditer(r"\.", n)] + names
    return (any(matches(p, n) for p in config.exclude_modules if p not in WORDS for n in names)
            or any(matches(p, n) for p in config.save_modules for n in inside))


def out_of_reach(model: nn.Module, adapted: set[int]) -> tuple[float, list[str]]:
    """The share of the model's weights in matrices that are no layer's, neither adapted (by id) nor trained whole, and
    their names, with * for numbers."""
    total, missed, names = 0, 0, {}
    for key, module, _ in _places(model):
        for parameter, p in module._parameters.items():
            if p is None or is_uninitialised(p):
                continue
            total += p.numel()
            own = is_stacked(module, parameter) and id(p) not in adapted
            if own and p.dim() > 1 and not p.requires_grad:
                missed += p.numel()
                name = re.sub(r"(?<![^.])\d+(?![^.])", "*", full_name(key, parameter))
                names[name] = names.get(name, 0) + p.numel()
    return missed / max(total, 1), sorted(names, key=names.get, reverse=True)
