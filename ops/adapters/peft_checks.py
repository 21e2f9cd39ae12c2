"""What peft's side of the adapters checks and warns of. See peft.py."""
from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence, Set

from peft.utils.other import get_pattern_key
from torch import nn

from ..common import HALF, check_flag, told
from .config import WORDS, close_names
from .fingerprint import differs, fingerprint
from .merge import LOST, others
from .parameters import out_of_reach
from .peft_layer import TuckerEmbedding, TuckerLayer, TuckerLinear

_HEADS = ("classifier", "score", "qa_outputs")  # what peft saves of whatever model its task types meet


def check_merge(function: str, known, names, safe_merge) -> None:
    """Are these adapters of the model? peft leaves out what it doesn't know."""
    check_flag(function, "safe_merge", safe_merge)
    if names is not None and (isinstance(names, str) or not isinstance(names, (Sequence, Set))):
        raise TypeError(f"{function}: adapter_names must be a list or None, got {told(names)}")
    for name in names or ():
        if name not in known:
            raise ValueError(f"{function}: adapter_names: no adapter {name!r}; there are {', '.join(known)}")


def check_names(config, asked, names, parameters, is_target: Callable[[str], bool]) -> None:
    """ValueError for names in the config that match nothing; a warning for targets, as lists of them are shared
    between architectures."""
    targeted = [n for n in names if is_target(n)] + parameters
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key, ()) if targeted else ():
            if not any(get_pattern_key([pattern], n) == pattern for n in targeted):
                raise ValueError(f"tucker: {key} {pattern!r} matches none of the adapted layers"
                                 f"{close_names([pattern], targeted)}")
    lost = {key: unmatched(value, names) for key, value in (
        ("exclude_modules", config.exclude_modules), ("target_modules", asked),
        ("modules_to_save", config.modules_to_save))}
    for key, patterns in lost.items():
        text = patterns and f"tucker: {key} {patterns[0]!r} matches nothing{close_names(patterns[:1], names)}"
        if text and key == "target_modules":
            warnings.warn(text, stacklevel=2)
        elif text:
            raise ValueError(text)


def unmatched(patterns, names) -> list[str]:
    """Those of the names, or the regular expression, that no module has."""
    if isinstance(patterns, str):
        return [] if patterns in WORDS or any(re.fullmatch(patterns, n) for n in names) else [patterns]
    return sorted(p for p in patterns or () if p not in (*WORDS, *_HEADS)
                  and not any(n == p or n.endswith("." + p) for n in names))


def warn_of_limits(model: nn.Module, config, adapter_name: str) -> None:
    """What a user should know about the adapter that was just put on, once; notes what base it is on."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, TuckerLayer)}
    found = {n: m for n, m in found.items() if adapter_name in m.tucker_parts}
    own = [n for n, m in found.items() if m._fast is None and not isinstance(m, TuckerLinear)]
    changes = {n: m.changes(adapter_name) for n, m in found.items()}
    half = [n for n in own if any(found[n].base_layer._parameters[p].dtype in HALF for p in changes[n])]
    drop = [n for n, m in found.items() if (n in own or isinstance(m, TuckerEmbedding))
            and any(part.dropout for part in changes[n].values())]
    _compare_bases(config, adapter_name, found)
    if half:
        warnings.warn(f"tucker: {half[0]!r}{others(half)} computes with its weight in its own way, in half "
                      "precision: base + change is rounded at every forward, which loses most of a small change",
                      stacklevel=5)
    if drop:
        warnings.warn(f"tucker: dropout has no effect on {drop[0]!r}{others(drop)}", stacklevel=5)
    ours = {id(p) for m in model.modules() if isinstance(m, TuckerLayer) for p in m.tucker_parts.parameters()}
    share, names = (0, []) if config.target_parameters else out_of_reach(model, ours)
    if share > 0.5:
        names = ", ".join(n.replace(".base_layer", "") for n in names[:4])
        warnings.warn(f"tucker: {share:.0%} of the weights are in parameters of no layer, which only "
                      f"target_parameters adapts: {names}", stacklevel=5)


def _compare_bases(config, adapter_name, found) -> None:
    """Note what base the adapter is on, and warn where its config comes from a file and says another."""
    bases = {n if p == "weight" else f"{n}.{p}": fingerprint(m, p) for n, m in found.items()
             for p in m.changes(adapter_name)}
    noted = {} if config.__dict__.get("_has_met_a_base") else config.fingerprint or {}
    other = [n for n, base in bases.items() if differs(noted.get(n), base)]
    if other:
        warnings.warn(f"tucker: adapter {adapter_name!r} was saved with another base model: "
                      f"{other[0]!r}{others(other)} had other weights than here", stacklevel=6)
    config.fingerprint, config._has_met_a_base = bases, True


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """peft merges and unloads layer by layer: where one can't be, those before it are as they were."""
    children = {m: dict(m._modules) for m in model.modules()}
    merged = {m: list(m.merged_adapters) for m in children if isinstance(m, TuckerLayer)}
    try:
        yield
    except BaseException:
        for module, before in children.items():
            module._modules.update(before)
        for layer, names in merged.items():
            layer.__dict__.pop("_lost", None)
            if layer.merged_adapters != names:
                layer.unmerge()
                if names:
                    layer.merge(adapter_names=names)
        raise


def warn_of_loss(model: nn.Module) -> None:
    lost = {n: m.__dict__.pop("_lost") for n, m in model.named_modules() if "_lost" in m.__dict__}
    lost = {n: part for n, part in lost.items() if part > LOST}
    if lost:
        worst = max(lost, key=lost.get)
        warnings.warn(f"tucker: half precision swallows {lost[worst]:.0%} of the change of {worst!r}{others(lost)}; "
                      "merge into a float32 model to keep it", stacklevel=3)
