"""Adapters on a model: put on, choose among, take off, and what there is to train.

    ts.adapt(model, ts.TuckerConfig(rank=16, save_modules="fc"))
    opt = torch.optim.AdamW(ts.adapter_parameters(model), lr=3e-3)
    ...
    ts.save_adapter(model, "digits.safetensors")
    ts.merge_and_unload(model)

adapted.py has what happens to a layer, targets.py which layers, state.py what is kept on the model.
"""
from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..common import HALF, NOT_NEGATIVE, check_module, check_number, told
from ..grassmann.groups import param_groups
from .adapted import Adapted, become_adapted, become_plain
from .config import TuckerConfig, check_patterns, close_names, matches
from .factors import TuckerFactors
from .merge import others
from .parameters import find_parameters, full_name, is_stacked, out_of_reach
from .placed import is_sharded, offload_hook, refuse_blocks, refuse_fully_sharded, settle, several_processes
from .replaced import watch
from .spectral import SpectralConfig, SpectralFactors
from .start import padding_row, started
from .state import (
    active_adapters,
    adapter_names,
    check_known,
    check_new_name,
    drop_saved,
    forget,
    keep_saved,
    known_layers,
    layers,
    live_name,
    note,
    put_live,
    refuse_merged,
    refuse_replaced,
    saved_modules,
    unwrapped,
)
from .targets import find_targets, has_kind, is_uninitialised, weights_of

Factors = TuckerFactors | SpectralFactors


def adapt(model: nn.Module, config: TuckerConfig | SpectralConfig | None = None, name: str = "default") -> nn.Module:
    """Put an adapter on the layers of `model` that `config` names, in place, and make it the active one.

    All other parameters are frozen, but for those of `config.save_modules`. At first the outputs are those of before,
    bit for bit. Factors are float32 where the base is of half precision or quantised, and float64 where it is.

    Args:
        model: any `nn.Module`; before DistributedDataParallel or fully_shard take its parameters.
        config: a `TuckerConfig`, or a `SpectralConfig`; None for a `TuckerConfig`'s defaults (rank 16 on every linear
            and convolutional layer).
        name: of this adapter; a model may have several, see `set_adapter`.

    Returns:
        model

    Raises:
        TypeError: `model` or `config` is of the wrong kind.
        ValueError: nothing matches (the message has candidates), the name is taken, or a layer that is meant can't be
            adapted (the message names it: tied, parametrised, sharded or packed weights, kinds of layers without an
            adapter). The model is then as it was.

    Source: arXiv 2405.14739.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x = torch.randn(4, 6)
        >>> before = model(x)
        >>> model = ts.adapt(model, ts.TuckerConfig(rank=2, target_modules="0", save_modules="2"))
        >>> torch.equal(model(x), before)
        True
        >>> [name for name, p in model.named_parameters() if p.requires_grad and "2." in name]
        ['2.weight', '2.bias']
    """
    check_module("adapt", model)
    config = TuckerConfig() if config is None else config
    if not isinstance(config, (TuckerConfig, SpectralConfig)):
        raise TypeError(f"adapt: config must be a TuckerConfig, a SpectralConfig or None, got {told(config)}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError("adapt: adapt the model before DistributedDataParallel takes its parameters")
    given, model = model, unwrapped(model)
    settle("adapt", model)
    refuse_fully_sharded("adapt", model, "adapt the model before fully_shard")
    refuse_blocks("adapt", model)
    check_new_name("adapt", name)
    if name in adapter_names(model):
        raise ValueError(f"adapt: the model has an adapter {name!r} already; there are {adapter_names(model)}")
    refuse_merged("adapt", model)
    targets = {key: weights_of(module) for key, module in find_targets(model, config).items()}
    for key, shapes in find_parameters(model, config).items():
        targets[key] = targets.get(key, {}) | shapes
    names = [n for key, shapes in targets.items() for n in (key, *(full_name(key, p) for p in shapes))]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, ()):
            if not any(matches(pattern, n) for n in names):
                raise ValueError(f"adapt: {field} {pattern!r} matches none of the adapted layers"
                                 f"{close_names([pattern], names)}")
    made = {}
    for key, shapes in targets.items():
        module, made[key] = model.get_submodule(key), {}
        for parameter, shape in shapes.items():
            names, stacked = (full_name(key, parameter), key), is_stacked(module, parameter)
            made[key][parameter] = started("adapt", key, module, parameter, config.ranks(names, shape, stacked),
                                           config.scale(names, stacked), config)
    attach(model, name, made, _modules_to_save(model, config, made), config.to_dict())
    _warn_of_limits(model, made)
    return given


def _modules_to_save(model, config, made) -> list[nn.Module]:
    saved = {}
    for pattern in config.save_modules:
        found = {n: m for n, m in model.named_modules() if n and matches(pattern, n)}
        if not found:
            names = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
            raise ValueError(f"adapt: save_modules {pattern!r} matches nothing{close_names([pattern], names)}")
        for n, m in found.items():
            if any(isinstance(inner, Adapted) for inner in m.modules()):
                raise ValueError(f"adapt: save_modules {n!r} has layers with another adapter")
        saved |= found
    return [m for n, m in saved.items() if not any(n.startswith(other + ".") for other in saved)]


def attach(model: nn.Module, name: str, made: Mapping[str, Mapping[str, Factors]], saved: list[nn.Module],
           config: dict) -> None:
    """Hang finished factors on the layers, give the adapter its copy of the saved modules, and activate it."""
    put_live("adapt", model, "")  # what is to be saved may share tensors with what is live
    watch()
    note(model, name, config, [*made, *(n for n, m in model.named_modules() if any(m is other for other in saved))])
    for key, parts in made.items():
        module = model.get_submodule(key)
        become_adapted(module, tuple(dict.fromkeys([*(weights_of(module) if has_kind(module) else ()), *parts])))
        row = padding_row(module)
        if row is not None and "weight" in parts and parts["weight"].factor0 is not None:
            with torch.no_grad():
                parts["weight"].factor0[row] = 0
        module.tucker[name] = by_parameter(parts).train(module.training)
    for module in saved:
        keep_saved(module, name)
    set_adapter(model, name)


def by_parameter(parts: Mapping[str, Factors]) -> nn.ModuleDict:
    """A ModuleDict whose keys may be words of its own: product-key memories call parameters `keys` and `values`."""
    result = nn.ModuleDict()
    result._modules.update(parts)
    return result


def _warn_of_limits(model, made) -> None:
    """What a user should know about layers that compute in their own way, once."""
    modules = {key: model.get_submodule(key) for key in made}
    heads = {id(m.out_proj) for m in modules.values() if isinstance(m, nn.MultiheadAttention)}  # read by their parent
    own = [k for k, m in modules.items() if m.tucker_fast is None or id(m) in heads]
    half = [k for k in own if any(modules[k]._parameters[p].dtype in HALF for p in made[k])]
    drop = [k for k, m in modules.items() if (k in own or isinstance(m, nn.Embedding))
            and any(part.dropout for part in made[k].values())]
    if half:
        warnings.warn(f"adapt: {half[0]!r}{others(half)} computes with its weight in its own way, in half precision: "
                      "base + change is rounded at every forward, which loses most of a small change", stacklevel=3)
    if drop:
        warnings.warn(f"adapt: dropout has no effect on {drop[0]!r}{others(drop)}", stacklevel=3)


def set_adapter(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Choose the adapters that are seen and trained: one name, a weighted sum {name: weight}, or None for none.

    Saved modules (heads) are those of the first name that has some. Only the chosen adapters and saved modules require
    gradients afterwards.

    Raises:
        ValueError: a name is unknown, a weight isn't finite, or the model is merged. Nothing is changed then.

    Example:
        >>> model = ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2))
        >>> model = ts.adapt(model, ts.TuckerConfig(rank=4), name="other")
        >>> ts.set_adapter(model, {"default": 0.5, "other": 0.5})
        >>> ts.active_adapters(model)
        {'default': 0.5, 'other': 0.5}
    """
    known_layers("set_adapter", model)
    refuse_merged("set_adapter", model)
    chosen = {} if which is None else {which: 1.0} if isinstance(which, str) else which
    if not isinstance(chosen, Mapping):
        raise TypeError(f"set_adapter: which must be a name, {{name: weight}} or None, got {told(which)}")
    for name, weight in chosen.items():
        check_known("set_adapter", model, name)
        check_number("set_adapter", f"which: the weight of {name!r}", weight)
    saved = saved_modules(model).values()
    put_live("set_adapter", model, next((n for n in chosen if any(n in m.tucker_saved for m in saved)), ""))
    for layer in layers(model).values():
        layer.tucker_active = {name: float(weight) for name, weight in chosen.items()}
        layer.tucker_unchecked = several_processes()
    for p in unwrapped(model).parameters():
        if not is_uninitialised(p):  # of a lazy layer that has not run
            p.requires_grad_(False)
    for layer in layers(model).values():
        for name, parts in layer.tucker.items():
            for part in parts.values():
                part.requires_grad_(name in chosen)
    for module in saved:
        for p in module.parameters() if module.tucker_live else ():
            p.requires_grad_(p.is_floating_point())


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside `with disabled(model):` the model is as it was before its adapters, saved modules included.

    The switch is on the model: other threads that run it see it too.

    Raises:
        ValueError: there is no adapter, or the model is merged.

    Example:
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 8)), torch.randn(4, 6)
        >>> before = model(x)
        >>> model = ts.adapt(model, ts.TuckerConfig(rank=2))
        >>> with ts.disabled(model):
        ...     print(torch.equal(model(x), before))
        True
    """
    found = known_layers("disabled", model)
    refuse_merged("disabled", model)
    refuse_replaced("disabled", model)
    before, live = {layer: layer.tucker_enabled for layer in found.values()}, live_name(model)
    # The saved modules come back to the bit: a backward through a forward from before may run afterwards.
    versions = {t: t._version for m in saved_modules(model).values() for t in m.state_dict(keep_vars=True).values()
                if isinstance(t, torch.Tensor) and not t.is_inference() and not is_sharded(t)}
    try:
        for layer in before:
            layer.tucker_enabled = False
        put_live("disabled", model, "")
        yield model
    finally:
        for layer, enabled in before.items():
            if isinstance(layer, Adapted):
                layer.tucker_enabled = enabled
        put_live("disabled", model, live)
        if versions:
            torch._C._autograd._unsafe_set_version_counter(tuple(versions), tuple(versions.values()))


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter and its saved modules.

    With the last one gone, the model has the modules, keys, saved weights and trainable parameters of before. Without
    the only active one of several, none is active.

    Raises:
        ValueError: the name is unknown, or the model is merged or sharded.

    Example:
        >>> model = ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2))
        >>> ts.delete_adapter(model, "default")
        >>> list(model.state_dict()), type(model[0]).__name__
        (['0.weight', '0.bias'], 'Linear')
    """
    found = known_layers("delete_adapter", model)
    check_known("delete_adapter", model, name)
    refuse_merged("delete_adapter", model)
    refuse_fully_sharded("delete_adapter", model, "save the others, and load them into a plain model")
    set_adapter(model, {n: w for n, w in active_adapters(model).items() if n != name} or None)
    for layer in found.values():
        if name in layer.tucker:
            del layer.tucker[name]
        if not layer.tucker:
            become_plain(layer)
    drop_saved(model, name)
    forget(model, name)


def adapter_parameters(model: nn.Module, *, lr: float | None = None,
                       lr_multipliers: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: the active adapters' cores and factors, then the saved modules.

    Frames of a saved `GrassmannLinear` come in a group of their own with `manifold="grassmann"`, for `RiemannianSGD`
    and `RiemannianAdamW`; torch's optimisers would take them off the manifold.

    Args:
        lr: base learning rate to write into the groups; needed with multipliers. Best in validation with AdamW, as
            peaks of a one-cycle schedule: 3e-3 to 1e-2 for a text encoder, below linear and Grassmann heads, and 1e-2
            for small convolutional networks; LoRA's were in that range too. Cores alone: see `TuckerConfig`.
        lr_multipliers: {name or regular expression: multiplier of lr}, tried on a parameter's place ("encoder.fc.core",
            "encoder.fc.factor0", "encoder.experts.down_proj.core", ...), then on its layer's name. The first that
            matches counts.

    Raises:
        ValueError: no adapter is active, a pattern matches nothing, `lr` is missing, or factors are offloaded.

    Example:
        >>> model = ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2))
        >>> opt = torch.optim.AdamW(ts.adapter_parameters(model, lr=1e-3, lr_multipliers={"0.core": 10}))
        >>> sorted(group["lr"] for group in opt.param_groups)
        [0.001, 0.01]
    """
    found = known_layers("adapter_parameters", model)
    refuse_replaced("adapter_parameters", model)
    if lr is not None:
        check_number("adapter_parameters", "lr", lr, NOT_NEGATIVE)
    if lr_multipliers is not None and not isinstance(lr_multipliers, Mapping):
        raise TypeError(f"adapter_parameters: lr_multipliers must be {{name: multiplier}}, got {told(lr_multipliers)}")
    multipliers, used, groups = dict(lr_multipliers or {}), set(), {}
    check_patterns("adapter_parameters", "lr_multipliers", multipliers)
    for pattern, value in multipliers.items():
        check_number("adapter_parameters", f"lr_multipliers[{pattern!r}]", value, NOT_NEGATIVE)
    if multipliers and lr is None:
        raise ValueError("adapter_parameters: lr_multipliers need lr")

    def multiplier(*names):
        pattern = next((p for p in multipliers if any(matches(p, n) for n in names)), None)
        used.add(pattern)
        return 1.0 if pattern is None else float(multipliers[pattern])

    for key, layer in found.items():
        for name in layer.tucker_active:
            for parameter, part in layer.tucker[name].items() if name in layer.tucker else ():
                own = full_name(key, parameter)
                if offload_hook(part) is not None:
                    raise ValueError(f"adapter_parameters: the factors of {own!r} are offloaded, and no step would "
                                     "reach them: offload the model before `adapt`, which then keeps them at hand")
                for local, p in part.trained().items():
                    at = multiplier(f"{own}.{local}", full_name(key, local), own, key)
                    groups.setdefault(at, []).append(p)
    result = [({"params": params}, m) for m, params in groups.items()]
    seen = set()  # of saved modules that share tensors each once
    for key, module in saved_modules(model).items():
        for group in param_groups(module) if module.tucker_live else ():
            group["params"] = [p for p in group["params"] if id(p) not in seen]
            seen.update(map(id, group["params"]))
            m = multiplier(key)
            result += [(group, m)] if group["params"] else []
    if not result:
        raise ValueError(f"adapter_parameters: no adapter is active; there are {adapter_names(model)}")
    unused = [p for p in multipliers if p not in used]
    if unused:
        near = close_names(unused, found)
        raise ValueError(f"adapter_parameters: lr_multipliers {unused[0]!r} matches nothing{near}")
    return [group if lr is None else group | {"lr": lr * m} for group, m in result]


def adapter_summary(model: nn.Module) -> str:
    """A table to print: adapted layers with shapes, ranks and trainable parameters, saved modules, the share of all.

    Where a tenth of the weights or more are frozen matrices of no layer (experts in stacks), which only
    `TuckerConfig.target_parameters` adapts, a last line says how many and names them.

    Example:
        >>> model = ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2))
        >>> print(ts.adapter_summary(model))
        layer  parameter  shape  ranks  adapter  trainable
        0      weight     8 x 6  2 x 2  default  32
        active: default; trainable 32 of 88 parameters (36.36%)
    """
    found = known_layers("adapter_summary", model)
    rows = [("layer", "parameter", "shape", "ranks", "adapter", "trainable")]
    for key, layer in found.items():
        for name, parts in layer.tucker.items():
            for parameter, t in parts.items():
                shape = " x ".join(map(str, t.shape))
                rows.append((key, parameter, shape, t.told_ranks(), name, f"{_trainable(t):,}"))
    for key, module in saved_modules(model).items():
        rows.append((key, "(whole)", "", "", module.tucker_live or "-", f"{_trainable(module):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    total = sum(p.numel() for p in unwrapped(model).parameters() if not is_uninitialised(p))
    trainable = _trainable(unwrapped(model))
    active = ", ".join(n if w == 1 else f"{w:g} x {n}" for n, w in active_adapters(model).items()) or "none"
    merged = " (merged)" if any(layer.tucker_merged is not None for layer in found.values()) else ""
    lines.append(f"active: {active}{merged}; trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    bases = {id(layer._parameters[p]) for layer in found.values() for parts in layer.tucker.values() for p in parts}
    share, names = out_of_reach(unwrapped(model), bases)
    if share >= 0.1:
        more = f" and {len(names) - 4} others" if len(names) > 4 else ""
        lines.append(f"{share:.2%} of the weights are in parameters of no layer, which only target_parameters adapts: "
                     f"{', '.join(names[:4])}{more}")
    return "\n".join(lines)


def _trainable(module) -> int:
    return sum(p.numel() for p in module.parameters() if not is_uninitialised(p) and p.requires_grad)
