"""A public call, good arguments, and what is said of wrong ones: whose, which, what, and that nothing has changed."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError, OSError)


@dataclasses.dataclass
class Call:
    """`make` gives a function and good arguments; a message is to have one of `voices`, and the argument's name.

    fine: "argument: value, value; ..." that are taken as well.
    """

    make: Callable[[], tuple[Callable[..., Any], dict[str, Any]]]
    kinds: dict[str, Callable[[Any], dict[str, Any]]]
    voices: tuple[str, ...]
    fine: set[tuple[str, str]]


def add(calls, key, make, /, voices=None, fine="", **kinds):
    """`key` is a public name, perhaps with words after a space: another call of the same."""
    parts = [part.split(":") for part in fine.split(";") if part]
    fine = {(argument.strip(), value.strip()) for argument, values in parts for value in values.split(",")}
    calls[key] = Call(make, kinds, (key.split()[0].split(".")[-1], *(voices or ())), fine)


def call(function, **arguments):
    """For `make`: the arguments are made anew each time where they are functions without a name."""
    return lambda: (function, {k: v() if getattr(v, "__name__", "") == "<lambda>" else v for k, v in arguments.items()})


def method(make, name, **arguments):
    return lambda: (getattr(make(), name), call(None, **arguments)()[1])


def is_plain(t):
    return t.layout is torch.strided and not t.is_nested and t.is_cpu and not t.is_quantized


def picture(thing):
    """What must not change."""
    if isinstance(thing, torch.Tensor):
        return thing.detach().clone() if is_plain(thing) else None
    if isinstance(thing, nn.Module):
        return ([(n, type(m), m.training) for n, m in thing.named_modules()], picture(thing.state_dict()),
                [p.requires_grad for p in thing.parameters()])
    if isinstance(thing, torch.optim.Optimizer):
        return [{k: len(v) if k == "params" else v for k, v in group.items()} for group in thing.param_groups]
    if isinstance(thing, dict):
        return {k: picture(v) for k, v in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [picture(t) for t in thing]
    return None


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def tells(value, message):
    """Does the message say what was passed?"""
    words = [repr(value)[:40], type(value).__name__]
    if value is None:
        words += ["needs a", "dims"]
    if isinstance(value, torch.Tensor):
        words += [str(t) for t in (value.dtype, value.layout, value.device)]
        words += ["nested"] if value.is_nested else ["no features", *map(str, value.shape)]
        words += [] if value.is_nested else [str(tuple(shape)) for shape in (value.shape, value.shape[:-1])]
        words += [str(value.min().item())] if value.dtype == torch.int64 and is_plain(value) and value.numel() else []
        words += ["scalar", "tensor"] if not value.is_nested and value.dim() < 2 else []
    elif isinstance(value, (list, tuple, set, dict)):
        words += [str(len(value)), "empty", "[]", "twice"]
        held = [*value, *value.values()] if isinstance(value, dict) else value
        return any(word in message for word in words) or any(tells(v, message) for v in held)
    elif isinstance(value, nn.Module):
        words += ["no adapter", "aren't merged"]
    elif isinstance(value, np.ndarray):
        words += [str(value.dtype)]
    return any(word in message for word in words) or (isinstance(value, int) and "shape ()" in message)


def wrong(call, argument, label):
    """What is wrong with what is said of a wrong value; None when nothing is."""
    function, good = call.make()
    value = call.kinds[argument](good[argument])[label]
    held = [getattr(function, "__self__", None), {k: v for k, v in good.items() if k != argument}]
    before = picture(held)
    try:
        function(**good | {argument: value})
    except Exception as error:
        if (argument, label) in call.fine:
            return f"refused: {error}"
        message = str(error)
        faults = ["type"] if not isinstance(error, ERRORS) or isinstance(error, UnboundLocalError) else []
        faults += [] if any(voice in message for voice in call.voices) else ["voice"]
        faults += [] if argument in message or any(v in message for v in call.voices[1:]) else ["argument"]
        faults += [] if tells(value, message) else ["value"]
        faults += [] if same(before, picture(held)) else ["changed something"]
        return f"{', '.join(faults)}: {type(error).__name__}: {message[:200]}" if faults else None
    return None if (argument, label) in call.fine else "not refused"


def faults(call):
    """{(argument, value): what is wrong with what is said of it}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about nested, quantised, sparse and complex tensors
        function, good = call.make()
        function(**good)
        found = {(argument, label): wrong(call, argument, label) for argument, kind in call.kinds.items()
                 for label in kind(good[argument])}
    return {what: fault for what, fault in found.items() if fault}
