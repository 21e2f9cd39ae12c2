"""Adapters into the weights, and out again to the bit."""
from __future__ import annotations

import warnings

import torch
from torch import nn

from ..common import FLOATS, HALF
from ..tucker.tucker import tucker_compose
from .adapted import adapted_names, become_plain
from .factors import combined
from .placed import check_at_hand, gathered, like, put, refuse_fully_sharded
from .state import check_shapes, drop_saved, forget, known_layers, refuse_merged, refuse_replaced
from .weight import compose_waiting

LOST = 0.1  # warn when a merge loses more than this part of a change to rounding

@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add the active adapters' changes to the weights; the layers then cost what they did before.

    Sums are taken in float32 (float64 for float64 weights) and rounded once. The weights of before are kept beside, so
    that `unmerge` is exact to the bit. A state_dict taken meanwhile has the changed weights and the adapter: load it
    into a merged model, or not at all. A model under fully_shard is merged by all its processes together.

    Warns when a half-precision weight swallows more than a tenth of its change.

    Raises:
        ValueError: nothing to merge, merged already, a change that is not finite, or a weight that is packed
            (quantised), offloaded or was resized after `adapt`. Nothing is changed then.

    Example:
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 8)), torch.randn(4, 6)
        >>> model = ts.adapt(model, ts.TuckerConfig(rank=2))
        >>> core = next(p for name, p in model.named_parameters() if "core" in name)
        >>> torch.nn.init.normal_(core).shape                   # in place of training
        torch.Size([2, 2])
        >>> y = model(x)
        >>> torch.allclose(ts.merge(model)(x), y, atol=1e-5)
        True
    """
    found = {key: layer for key, layer in known_layers("merge", model).items() if _active_parameters(layer)}
    refuse_merged("merge", model)
    refuse_replaced("merge", model)
    if not found:
        raise ValueError("merge: no adapter is active")
    check_shapes("merge", found)
    compose_waiting()
    packed = [key for key, layer in found.items() if layer.tucker_packed or
              any(layer._parameters[p].dtype not in FLOATS for p in _active_parameters(layer))]
    if packed:
        raise ValueError(f"merge: the weight of {packed[0]!r}{others(packed)} is quantised and can't take a change")
    check_at_hand("merge", ((f"{key}.{n}", p) for key, layer in found.items() for n, p in layer.named_parameters()))
    lost, done = {}, {}
    try:
        for key, layer in found.items():
            done[layer] = {p: layer._parameters[p].detach().clone() for p in _active_parameters(layer)}
            for p in done[layer]:
                part = _merge_weight(key, layer, p)
                if part > LOST:
                    lost[key] = part
    except BaseException:
        _restore(done)
        raise
    for layer, snapshot in done.items():
        layer.tucker_merged = snapshot
    if lost:
        worst = max(lost, key=lost.get)
        where = f"{worst!r}{others(lost)}"
        warnings.warn(f"merge: half precision swallows {lost[worst]:.0%} of the change of {where}; merge into a "
                      "float32 model to keep it", stacklevel=3)  # beyond no_grad's own frame
    return model


def stays_finite(before, after) -> bool:
    """Are the entries finite that were so before?"""
    finite = torch.isfinite(after)
    return bool(finite.all()) or not bool((torch.isfinite(before) & ~finite).any())


def lost_in_rounding(before, after, change) -> float:
    """The part of a change that is not in `after`."""
    size = torch.linalg.vector_norm(change)
    return float(torch.linalg.vector_norm(after.float() - before.float() - change) / size) if size > 0 else 0.0


def others(names) -> str:
    """What to add to the name of the first."""
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def _active_parameters(layer) -> list[str]:
    return [p for p in adapted_names(layer)
            if any(name in layer.tucker and p in layer.tucker[name] for name in layer.tucker_active)]


def _merge_weight(key, layer, parameter) -> float:
    """Add the change in place; returns the part of it that rounding has lost."""
    base = layer._parameters[parameter]
    enabled, layer.tucker_enabled = layer.tucker_enabled, True
    terms = [(weight, gathered(part)) for weight, part in layer.tucker_terms(parameter)]
    layer.tucker_enabled = enabled
    scale, core, factors, _ = combined(terms)
    before = like(base, core)
    after = tucker_compose(core, factors, scale=scale, base=before)
    if not stays_finite(before, after):
        active = ", ".join(map(repr, layer.tucker_active))
        raise ValueError(f"merge: the change of {key!r} by {active} is not finite (NaN or infinity); nothing is merged")
    lost = lost_in_rounding(before, after, tucker_compose(core, factors, scale=scale)) if base.dtype in HALF else 0.0
    put(base, after)
    return lost


def _restore(snapshots) -> None:
    for layer, snapshot in snapshots.items():
        for parameter, before in snapshot.items():
            layer._parameters[parameter].copy_(before)


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, bit for bit.

    Raises:
        ValueError: nothing is merged, or a weight was replaced meanwhile. Nothing is changed then.

    Example:
        >>> model = ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2, init="svd"))
        >>> before = model[0].weight.clone()
        >>> torch.equal(ts.unmerge(ts.merge(model))[0].weight, before)
        True
    """
    found = known_layers("unmerge", model).values()
    found = {layer: layer.tucker_merged for layer in found if layer.tucker_merged is not None}
    if not found:
        raise ValueError("unmerge: the model's adapters aren't merged")
    for key, layer in known_layers("unmerge", model).items():
        for p, before in (layer.tucker_merged or {}).items():
            if before is None or before.shape != layer._parameters[p].shape:
                raise ValueError(f"unmerge: the {p} of {key!r} was replaced or resized while it was merged")
    _restore(found)
    for layer in found:
        layer.tucker_merged = None
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the active adapters and remove every trace of them: a plain model with the changed weights and the active
    adapter's saved modules. Raises as `merge` does.

    Example:
        >>> model = ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2))
        >>> type(ts.merge_and_unload(model)[0]).__name__, ts.adapter_names(model)
        ('Linear', [])
    """
    found = known_layers("merge_and_unload", model)
    refuse_fully_sharded("merge_and_unload", model, "merge it, or save the adapter and merge it into a plain model")
    if not any(layer.tucker_merged is not None for layer in found.values()):
        merge(model)
    for layer in found.values():
        become_plain(layer)
    drop_saved(model)
    forget(model)
    return model
