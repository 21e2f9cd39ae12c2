"""Modules that an adapter changes or keeps stay where they are: a new one in their place would be left out of its
files, of merges and of `disabled`, without a word. So putting one there is refused, by torch's hook on registration.
"""
from __future__ import annotations

import functools
from collections import Counter

from torch.nn.modules.module import register_module_module_registration_hook

from .adapted import Adapted


@functools.cache
def watch() -> None:
    """Begin to refuse, in this process; called with the first adapter."""
    register_module_module_registration_hook(_refuse)


def _is_kept(module) -> bool:
    return isinstance(module, Adapted) or "tucker_saved" in module.__dict__ or "tucker_parts" in module._modules


def _is_root(module) -> bool:
    """What `adapt` or peft was given: it may be replaced as a whole."""
    return "tucker_configs" in module.__dict__ or "peft_config" in module.__dict__


def _refuse(parent, name, new) -> None:
    old = parent._modules.get(name)
    if old is None or new is None or old is new:
        return
    kept = {n: m for n, m in old.named_modules() if _is_kept(m)}
    if not kept or any(map(_is_root, old.modules())):
        return
    if "tucker_parts" in old._modules and any(m is new for m in old.modules()):
        return  # peft unloads
    inside = set(new.modules())
    alike = Counter(type(m) for m in inside - set(old.modules()) if _is_kept(m))  # a copy
    lost = [n for n, m in kept.items() if m not in inside]
    lost = [] if Counter(type(kept[n]) for n in lost) <= alike else lost
    if lost:
        where = ".".join(filter(None, (name, lost[0])))
        what = "is trained whole with an adapter" if "tucker_saved" in kept[lost[0]].__dict__ else "has an adapter"
        raise ValueError(f"{type(parent).__name__}: {where!r} {what}, which would not see the {type(new).__name__} in "
                         "its place: replace it before `adapt`, or after delete_adapter or merge_and_unload")
