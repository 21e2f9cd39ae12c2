"""A member more in peft's list of methods, PeftType, which is a closed enum. See peft.py."""
from __future__ import annotations

import contextlib

import peft
from peft.utils import PeftType

TESTED = ((0, 18), (0, 21))
tested = " to ".join(".".join(map(str, v)) for v in TESTED)
HOME = "torch_subspace.adapters.peft_config"  # the module of our configs


def add_peft_type(name: str) -> PeftType:
    """A new member of a closed enum; undone if the enum doesn't take it as one of its own."""
    if name in PeftType.__members__:
        config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
        if config is not None and config.__module__ != HOME:
            raise ImportError(f"peft {peft.__version__} has a method {name} of its own: {config.__module__}")
        for table in (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
                      peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING):  # this module is being reloaded
            table.pop(name, None)
        return PeftType(name)
    try:
        member = str.__new__(PeftType, name)
        member._name_, member._value_, member.__objclass__ = name, name, PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)  # the enum's own __setattr__ refuses
        if not (PeftType(name) is PeftType[name] is getattr(PeftType, name) is member and member in list(PeftType)):
            raise TypeError("the new member is not found")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        drop_peft_type(name)
        raise ImportError(f"torch_subspace.peft can't extend PeftType of peft {peft.__version__}, being tested with "
                          f"{tested}: {error}") from error
    return member


def drop_peft_type(name: str) -> None:
    with contextlib.suppress(AttributeError, ValueError):
        PeftType._member_names_.remove(name)
    for table in ("_member_map_", "_value2member_map_"):
        getattr(PeftType, table, {}).pop(name, None)
    with contextlib.suppress(AttributeError):
        type.__delattr__(PeftType, name)
