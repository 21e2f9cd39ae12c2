"""What the adapters of a model keep on it, and the modules that are trained whole beside them.

An adapter hangs on its layers (adapted.py). A saved module has a copy of its tensors per adapter, and one of before;
the module itself holds the live ones. The module that `adapt` was given also notes the configs and what was trainable.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..common import check_module
from .adapted import Adapted, adapted_names
from .parameters import shape_of
from .placed import check_at_hand, offload_hook, put, settle


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DataParallel, DistributedDataParallel and AveragedModel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers by name."""
    return {name: m for name, m in unwrapped(model).named_modules() if isinstance(m, Adapted)}


def known_layers(function: str, model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers; raises in `function`'s voice when there are none."""
    check_module(function, model)
    found = layers(model)
    if not found:
        raise ValueError(f"{function}: the model has no adapter; `adapt` puts one on")
    settle(function, model)
    return found


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, the oldest first.

    Example:
        >>> model = ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2))
        >>> model = ts.adapt(model, ts.TuckerConfig(rank=4), name="other")
        >>> ts.adapter_names(model)
        ['default', 'other']
    """
    check_module("adapter_names", model)
    return list(dict.fromkeys(name for layer in layers(model).values() for name in layer.tucker))


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The adapters whose changes are seen, with their weights.

    Example:
        >>> model = ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2))
        >>> ts.active_adapters(model)
        {'default': 1.0}
    """
    check_module("active_adapters", model)
    return next((dict(layer.tucker_active) for layer in layers(model).values()), {})


def check_known(function: str, model: nn.Module, name) -> None:
    if name not in adapter_names(model):
        raise ValueError(f"{function}: no adapter {name!r}; there are {adapter_names(model)}")


def check_new_name(function: str, name) -> None:
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{function}: an adapter's name is an identifier other than nn.ModuleDict's own, got {name!r}")


def refuse_merged(function: str, model: nn.Module) -> None:
    if any(layer.tucker_merged is not None for layer in layers(model).values()):
        raise ValueError(f"{function}: the adapters are merged; `unmerge` first")


def check_shapes(function: str, found: Mapping[str, Adapted]) -> None:
    """ValueError where a weight has been given another shape since `adapt`."""
    for key, layer in found.items():
        for parameter in adapted_names(layer):
            shape = shape_of(layer, parameter)
            shapes = {parts[parameter].shape for parts in layer.tucker.values() if parameter in parts}
            if shapes - {tuple(shape)}:
                raise ValueError(f"{function}: the {parameter} of {key!r} is {tuple(shape)} and was {shapes.pop()}: it "
                                 "was resized after `adapt`, and its adapter doesn't fit it")


# ---------------------------------------------------------------------------------------------------------------------
# The notes on the model
# ---------------------------------------------------------------------------------------------------------------------


def _noted(model) -> list[nn.Module]:
    return [m for m in unwrapped(model).modules() if "tucker_configs" in m.__dict__]


def note(model: nn.Module, name: str, config: dict, places: list[str]) -> None:
    """`places` are those of the modules that the adapter changes or keeps."""
    if "tucker_configs" not in model.__dict__:
        model.__dict__["tucker_configs"] = {}
        model.__dict__["tucker_trainable"] = [n for n, p in model.named_parameters() if p.requires_grad]
    model.__dict__["tucker_configs"][name] = config
    model.__dict__.setdefault("tucker_places", {})[name] = places


def refuse_replaced(function: str, model: nn.Module) -> None:
    """Raises where a module was deleted after `adapt` and another stands in its place: replaced.py sees only what is
    put on top of it."""
    for root in _noted(model):
        kept = {m: {*m.__dict__.get("tucker_saved", ()), *(m.tucker if isinstance(m, Adapted) else ())}
                for m in root.modules() if isinstance(m, Adapted) or "tucker_saved" in m.__dict__}
        modules = dict(root.named_modules(remove_duplicate=False))
        for name, places in root.__dict__.get("tucker_places", {}).items():
            gone = sum(name in names for names in kept.values()) < len(places)
            new = [p for p in places if p in modules and not any(m in kept for m in modules[p].modules())
                   and any(True for _ in modules[p].parameters())] if gone else []
            if new:
                raise ValueError(f"{function}: {new[0]!r} was replaced by a {type(modules[new[0]]).__name__} that "
                                 f"adapter {name!r} does not see: replace it before `adapt`, or after delete_adapter "
                                 "or merge_and_unload")


def noted_config(model: nn.Module, name: str) -> dict:
    """What adapter `name` was made of."""
    return next((m.__dict__["tucker_configs"][name] for m in _noted(model) if name in m.__dict__["tucker_configs"]), {})


def forget(model: nn.Module, name: str | None = None) -> None:
    """Forget an adapter (None: all); with the last one gone, what was trainable before is so again."""
    for m in _noted(model):
        m.__dict__["tucker_configs"].pop(name, None)
        m.__dict__.get("tucker_places", {}).pop(name, None)
        if name is None or not layers(m):
            trainable = set(m.__dict__["tucker_trainable"])
            del m.__dict__["tucker_configs"], m.__dict__["tucker_trainable"]
            m.__dict__.pop("tucker_places", None)
            for n, p in m.named_parameters():
                if not isinstance(p, nn.parameter.UninitializedTensorMixin):
                    p.requires_grad_(n in trainable)


# ---------------------------------------------------------------------------------------------------------------------
# Modules that are trained whole
# ---------------------------------------------------------------------------------------------------------------------


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in unwrapped(model).named_modules() if "tucker_saved" in m.__dict__}


def keep_saved(module: nn.Module, name: str) -> None:
    """Give the adapter `name` a copy of the module's tensors as they were before any adapter."""
    copies = module.__dict__.setdefault("tucker_saved", {"": tensors_of(module)})
    before = tensors_of(module) if not module.__dict__.get("tucker_live") else copies[""]
    copies[name] = {key: t.clone() for key, t in before.items()}
    module.__dict__.setdefault("tucker_live", "")


def drop_saved(model: nn.Module, name: str | None = None) -> None:
    """Forget an adapter's copies; None: all but what is live."""
    for module in saved_modules(model).values():
        module.tucker_saved.pop(name, None)
        if name is None or len(module.tucker_saved) == 1:
            del module.__dict__["tucker_saved"], module.__dict__["tucker_live"]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: t.detach().clone() for key, t in module.state_dict().items() if isinstance(t, Tensor)}


def saved_tensors(model: nn.Module, name: str) -> dict[str, Mapping[str, Tensor]]:
    """Tensors of the modules that adapter `name` keeps, by module."""
    return {n: tensors_of(m) if m.tucker_live == name else m.tucker_saved[name]
            for n, m in saved_modules(model).items() if name in m.tucker_saved}


def live_name(model: nn.Module) -> str:
    """The adapter whose saved modules are in place; "" for those of before."""
    return next((m.tucker_live for m in saved_modules(model).values() if m.tucker_live), "")


@torch.no_grad()
def put_live(function: str, model: nn.Module, name: str) -> None:
    """Put the saved modules of adapter `name` in place, and those of before where it has none.

    Raises in `function`'s voice where a module has another shape than it had, or no values.
    """
    targets = {}
    for key, module in saved_modules(model).items():
        target = name if name in module.tucker_saved else ""
        if target == module.tucker_live:
            continue
        targets[module] = target
        now, then = ({n: t for n, t in d.items() if isinstance(t, Tensor)}
                     for d in (module.state_dict(), module.tucker_saved[target]))
        shapes, before = ({n: tuple(t.shape) for n, t in d.items()} for d in (now, then))
        if shapes != before:
            raise ValueError(f"{function}: {key!r} is {shapes} now and was {before}: it was resized after `adapt`, so "
                             "that what it was can't be put in its place")
        offloaded = any(map(offload_hook, module.modules()))
        check_at_hand(function, ((f"{key}.{n}", t) for n, t in now.items() if offloaded))
        check_at_hand(function, ((f"{key}.{n}", t) for n, t in then.items() if not now[n].is_meta))
    live = {id(t) for m in saved_modules(model).values() if m.tucker_live
            for t in m.state_dict(keep_vars=True).values()}
    for module in targets:  # all before one is filled: they may share tensors, also with what is live
        if module.tucker_live or not any(id(t) in live for t in module.state_dict(keep_vars=True).values()):
            module.tucker_saved[module.tucker_live] = tensors_of(module)
    for module, target in sorted(targets.items(), key=lambda item: bool(item[1])):
        fill(module, module.tucker_saved[target])
        module.__dict__["tucker_live"] = target


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    places = {key: t for key, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if any(t.is_meta for t in places.values()):
        module.load_state_dict({key: tensors[key].to(t.dtype) for key, t in places.items()}, strict=False, assign=True)
        return
    for key, place in places.items():
        put(place, tensors[key])
