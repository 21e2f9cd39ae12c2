"""Adapters in safetensors files: tensors by layer, and in the metadata all it takes to rebuild them.

    <layer>.<parameter>.core, <layer>.<parameter>.factor0, ...      the adapter
    <layer>.<parameter>.probe                                       of a spectral one in place of its factors
    <module>.<key of its state_dict>                                modules saved whole
    metadata: format, version, config (JSON: the config, the adapted layers, the saved modules; which tensors are
    another's, being tied; a few values of the weights that are adapted)
"""
from __future__ import annotations

import json
import os
import warnings

import torch
from torch import Tensor, nn

from ..common import check_module
from ..files import check_path, write_whole
from .adapt import attach, delete_adapter, set_adapter
from .adapted import Adapted
from .fingerprint import differs, fingerprint, weight_at_hand
from .kinds import FORMATS, check_description, filled, format_of, shapes_of
from .merge import others
from .names import canonical, places
from .parameters import full_name, parameter_refusal, shape_of
from .placed import offload_hook, put, refuse_blocks, refuse_fully_sharded, settle, whole, writes
from .state import (
    adapter_names,
    check_known,
    check_new_name,
    check_shapes,
    fill,
    known_layers,
    layers,
    noted_config,
    refuse_merged,
    refuse_replaced,
    saved_modules,
    saved_tensors,
    unwrapped,
)
from .targets import owners_of

VERSION = 1


def save_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> None:
    """Write an adapter and its saved modules to a safetensors file, with all it takes to load it on a plain model.

    The file appears whole or not at all: it is written beside `path` and then moved there. Under fully_shard all
    processes call this, and the first of them writes. A `SpectralConfig`'s file has no singular vectors that the base
    weights give again, unless that asks for them.

    Raises:
        ValueError: there is no such adapter, or a tensor of it is on the meta device.
        OSError: the file can't be written.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
        >>> model = ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2))
        >>> ts.save_adapter(model, path)
        >>> os.path.exists(path)
        True
    """
    found = known_layers("save_adapter", model)
    check_known("save_adapter", model, name)
    check_path("save_adapter", path)
    check_shapes("save_adapter", found)
    refuse_replaced("save_adapter", model)
    tensors, described, bases, live_at, noted = {}, {}, {}, {}, noted_config(model, name)
    for place, layer in found.items():
        key = canonical(place)
        for parameter, part in layer.tucker[name].items() if name in layer.tucker else ():
            described.setdefault(key, {})[parameter] = part.described()
            named = part.for_file(weight_at_hand(layer, parameter), noted)
            tensors |= {f"{key}.{parameter}.{n}": p for n, p in named.items()}
            live_at |= {f"{key}.{parameter}.{n}": full_name(place, f"tucker.{name}.{parameter}.{n}") for n in named}
            bases.setdefault(key, {})[parameter] = fingerprint(layer, parameter)
    saved, seen, tied = {}, {}, {}
    for place, state in saved_tensors(model, name).items():
        live = unwrapped(model).get_submodule(place).state_dict(keep_vars=True)
        key = canonical(place)
        saved[key] = list(state)
        for n, t in state.items():
            first = seen.setdefault(id(live[n]), f"{key}.{n}")
            live_at[f"{key}.{n}"] = f"{place}.{n}"
            if first == f"{key}.{n}":
                tensors[first] = t
            else:
                tied[f"{key}.{n}"] = first
    config = {"config": noted, "layers": described, "saved": saved, "tied": tied, "base": bases}
    metadata = {"format": format_of(described), "version": str(VERSION), "config": json.dumps(config)}
    mine = writes(tensors.values())
    tensors = {key: whole("save_adapter", unwrapped(model), live_at[key], t) for key, t in tensors.items()}
    if mine:
        write_whole(path, tensors, metadata)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> nn.Module:
    """Load an adapter that `save_adapter` wrote, put it on the layers it was on, and make it the active one.

    The model may be plain: ranks, scales and layers are in the file. Where the model has an adapter of this name with
    the same layers, ranks and scales, its tensors are filled in place: a compiled model needn't be compiled again.
    Otherwise the old one is replaced. Names in the file may have a prefix more or fewer than the model's, if all fit
    so: it may have been saved from a wrapper, or from the whole of which this is a part.

    Warns when the weights that are adapted are not those that the file was saved with; of the same weights in another
    precision it doesn't.

    Returns:
        model

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or not ours, or a layer is missing, has another shape or can't be adapted; or
            the file leaves out singular vectors, and the weights here have others. The model is then as it was.

    Example:
        >>> import copy, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
        >>> plain = torch.nn.Sequential(torch.nn.Linear(6, 8))
        >>> model = ts.adapt(copy.deepcopy(plain), ts.TuckerConfig(rank=2))
        >>> ts.save_adapter(model, path)
        >>> ts.adapter_names(ts.load_adapter(plain, path))    # nothing but the file is needed
        ['default']
    """
    check_module("load_adapter", model)
    check_path("load_adapter", path)
    given, model = model, unwrapped(model)
    check_new_name("load_adapter", name)
    settle("load_adapter", model)
    refuse_merged("load_adapter", model)
    put_adapter(model, name, *read_adapter(path), f"load_adapter: {os.fspath(path)!r}")
    return given


def put_adapter(model: nn.Module, name: str, tensors: dict[str, Tensor], about: dict, what: str) -> None:
    """Put what `read_adapter` gives on a model; `what` begins the error message."""
    at, hint = places([*about["layers"], *about["saved"]], [n for n, _ in model.named_modules()])
    tensors, about = _renamed(tensors, about, at)
    problems = _problems(model, name, tensors, about)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{what} does not fit the model: {problems[0]}{more}{hint}")
    made = {key: {parameter: filled(what, model.get_submodule(key), key, parameter, d, about["config"],
                                    _named(tensors, key, parameter, d)) for parameter, d in parts.items()}
            for key, parts in about["layers"].items()}
    others_base = [key for key, parts in about.get("base", {}).items() for parameter, noted in parts.items()
                   if differs(noted, fingerprint(model.get_submodule(key), parameter))]
    if others_base:
        where = f"{others_base[0]!r}{others(others_base)}"
        warnings.warn(f"{what} was saved with another base model: {where} had other weights than here", stacklevel=3)
    saved = [model.get_submodule(key) for key in about["saved"]]
    if not _filled(model, name, made, saved):
        function = what.partition(":")[0]
        refuse_fully_sharded(function, model, "load before fully_shard, or into an adapter of the same ranks")
        refuse_blocks(function, model)
        if name in adapter_names(model):
            delete_adapter(model, name)
        attach(model, name, made, saved, about["config"])
    for key, keys in about["saved"].items():
        fill(model.get_submodule(key), {k: tensors[f"{key}.{k}"] for k in keys})


def _renamed(tensors, about, at) -> tuple[dict[str, Tensor], dict]:
    """The same by the model's names, {the file's: the model's}."""
    if all(key == n for key, n in at.items()):
        return tensors, about
    new = {}
    for key in [*about["layers"], *about["saved"]]:
        starts = [f"{key}.{n}" for n in about["layers"].get(key, about["saved"].get(key))]
        for k, t in tensors.items():
            if any(k == s or k.startswith(s + ".") for s in starts):
                new[at.get(key, key) + k.removeprefix(key)] = t
    return new, about | {kind: {at.get(key, key): value for key, value in about.get(kind, {}).items()}
                         for kind in ("layers", "saved", "base")}


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of an adapter file; ValueError when it is not one, or broken."""
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"load_adapter: no file {path!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in FORMATS:
                raise ValueError(f"load_adapter: {path!r} is not an adapter of torch_subspace: its format is "
                                 f"{metadata.get('format')!r}")
            if metadata.get("version") != str(VERSION):
                version = metadata.get("version")
                raise ValueError(f"load_adapter: {path!r} is of version {version}, this reads {VERSION}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        about = json.loads(metadata["config"])
        FORMATS[metadata["format"]](**about["config"])
        named = set()
        for key, parts in about["layers"].items():
            for parameter, d in parts.items():
                check_description(d, metadata["format"])
                named |= {f"{key}.{parameter}.{n}" for n in _shapes(tensors, key, parameter, d)}
        named |= {f"{key}.{n}" for key, names in about["saved"].items() for n in names}
        _check_notes(about)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if str(error).startswith("load_adapter"):
            raise
        raise ValueError(f"load_adapter: {path!r} is truncated or not a safetensors file of ours: {error!r}") from error
    tied = {k: first for k, first in about.get("tied", {}).items() if k in named and first in tensors}
    tensors |= {k: tensors[first] for k, first in tied.items()}
    if named != set(tensors):
        odd = sorted(named ^ set(tensors))
        raise ValueError(f"load_adapter: {path!r} contradicts itself: {odd[0]!r} is " + (
            "missing" if odd[0] in named else "not described"))
    return tensors, about


def _shapes(tensors, key, parameter, d) -> dict[str, tuple[int, ...]]:
    return shapes_of(d, f"{key}.{parameter}.probe" in tensors)


def _named(tensors, key, parameter, d) -> dict[str, Tensor]:
    """The tensors of one parameter by their own names."""
    return {n: tensors[f"{key}.{parameter}.{n}"] for n in _shapes(tensors, key, parameter, d)}


def _check_notes(about) -> None:
    """Of what is tied and of the base, which files of before don't have."""
    if not all(isinstance(k, str) and isinstance(first, str) for k, first in about.get("tied", {}).items()):
        raise ValueError(f"tied {about['tied']!r}")
    for key, parts in about.get("base", {}).items():
        for parameter, noted in parts.items():
            if parameter not in about["layers"][key]:
                raise ValueError(f"base of {key}.{parameter}")
            if noted is not None and not (hasattr(torch, noted["dtype"])
                                          and all(isinstance(v, (int, float)) for v in noted["values"])):
                raise ValueError(f"base {noted!r}")


def _problems(model, name, tensors, about) -> list[str]:
    """Why the file doesn't fit the model, layer by layer."""
    owners, modules, found = owners_of(model), dict(model.named_modules()), []
    for key, parts in about["layers"].items():
        module = modules.get(key)
        if module is None:
            found.append(f"the model has no layer {key!r}")
        elif whys := [why for p in parts if (why := parameter_refusal(key, module, p, owners))]:
            found += dict.fromkeys(whys)
        elif set(module.__dict__.get("tucker_saved", ())) - {"", name}:
            found.append(f"{key!r} is trained whole by another adapter")
        else:
            for parameter, d in parts.items():
                has = shape_of(module, parameter)
                has = None if has is None else tuple(has)
                if has != tuple(d["shape"]):
                    found.append(f"{key}.{parameter} is {tuple(d['shape'])} in the file and {has} in the model")
                want = _shapes(tensors, key, parameter, d)
                found += [f"{key}.{parameter}.{n} is {tuple(t.shape)}, not {want[n]}"
                          for n, t in _named(tensors, key, parameter, d).items() if tuple(t.shape) != want[n]]
    for key, names in about["saved"].items():
        module = modules.get(key)
        if module is None or any(isinstance(m, Adapted) and set(m.tucker) - {name} for m in module.modules()):
            found.append(f"the model has no module {key!r}" if module is None else f"{key!r} has another adapter")
            continue
        if any(offload_hook(m) for m in module.modules()):
            found.append(f"{key!r}, which is saved whole, is offloaded: load before accelerate takes the parameters")
            continue
        state = {k: t for k, t in module.state_dict().items() if isinstance(t, Tensor) and ".tucker." not in f".{k}"}
        if set(state) != set(names):
            found.append(f"{key!r} has {sorted(state)} in the model and {sorted(names)} in the file")
            continue
        found += [f"{key}.{n} is {tuple(tensors[f'{key}.{n}'].shape)} in the file and {tuple(t.shape)} in the model"
                  for n, t in state.items() if t.shape != tensors[f"{key}.{n}"].shape]
    return found


def _filled(model, name, made, saved) -> bool:
    """Fill the adapter in place if the model has this very one but for the numbers."""
    now = {key: layer.tucker[name] for key, layer in layers(model).items() if name in layer.tucker}
    kept = {id(m) for m in saved_modules(model).values() if name in m.tucker_saved}

    def alike(a, b):
        keys = ("shape", "ranks", "scale", "dropout", "core_only")
        return type(a) is type(b) and all(getattr(a, key) == getattr(b, key) for key in keys)

    if any(p.is_meta for parts in now.values() for p in parts.parameters()):
        return False
    if set(now) != set(made) or kept != {id(m) for m in saved} or any(
            set(now[key]) != set(made[key]) or not all(alike(now[key][p], made[key][p]) for p in made[key])
            for key in made):
        return False
    set_adapter(model, name)
    for key, parts in made.items():
        for parameter, part in parts.items():
            for n, p in now[key][parameter].named_parameters():
                put(p, part.get_parameter(n))
    return True
