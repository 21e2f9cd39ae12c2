"""Wrong arguments of every public call: an error that says whose, which and what, and nothing is changed."""

import inspect
import warnings

import bad_calls
import numpy as np
import pytest
import torch
from bad_calls import CALLS
from torch import nn

import torch_subspace as ts
from torch_subspace import grassmann, metrics

ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError, OSError)


def public():
    """{name: function} of all that is public and takes arguments, methods of public classes included."""
    found = {name: getattr(ts, name) for name in ts.__all__}
    for module, names in ((grassmann, grassmann.__all__), (metrics, metrics.__all__)):
        found |= {f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name) for name in names}
    for name, cls in [(n, c) for n, c in found.items() if inspect.isclass(c)]:
        found |= {f"{name}.{n}": getattr(cls, n) for n, f in vars(cls).items()
                  if not n.startswith("_") and (inspect.isfunction(f) or isinstance(f, classmethod))}
    return found


def parameters(name, function):
    kinds = inspect.signature(function).parameters.values()
    return {p.name for p in kinds} - {"self"}


NOT_ASKED = {  # what torch or we ourselves call
    "GrassmannLinear.register_parameter", "GrassmannLinear.extra_repr", "TuckerConfig.ranks", "TuckerConfig.scale",
}


def test_every_argument_of_every_public_call_is_tried():
    tried = {}
    for key, call in CALLS.items():
        tried.setdefault(key.split()[0], set()).update(call.kinds)
    forgotten = {name: sorted(missing) for name, function in public().items() if name not in NOT_ASKED
                 and (missing := parameters(name, function) - tried.get(name, set()))}
    assert not forgotten, "give these a line in bad_calls.py"


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


def wrong(key, argument, label):
    """What is wrong with what is said of a wrong value; None when nothing is."""
    call = CALLS[key]
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


@pytest.mark.parametrize("key", CALLS)
def test_wrong_arguments_are_named(key):
    call = CALLS[key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about nested, quantised, sparse and complex tensors
        function, good = call.make()
        function(**good)
        found = {(argument, label): wrong(key, argument, label) for argument, kind in call.kinds.items()
                 for label in kind(good[argument])}
    assert not {what: fault for what, fault in found.items() if fault}


HEAD = ts.GrassmannLinear(6, 3, (2, 1, 1))
X = torch.randn(4, 6)


@pytest.mark.parametrize("dims", [[2, 1, 1], range(2, 3), torch.Size([2, 1, 1]), np.array([2, 1, 1]),
                                  torch.tensor([2, 1, 1]), (k for k in (2, 1, 1)), (np.int64(2), 1, 1)], ids=repr)
def test_integers_of_any_kind_are_dims(dims):
    if isinstance(dims, range):
        weight, dims, expected = HEAD.weight[:2], dims, ts.subspace_logits(X, HEAD.weight[:2], dims=(2,))
    else:
        weight, expected = HEAD.weight, HEAD(X)
    assert torch.equal(ts.subspace_logits(X, weight, dims=dims), expected)


@pytest.mark.parametrize("make", [
    lambda n: ts.GrassmannLinear(n(6), n(3), n(2), gamma=np.float32(2), normalize=np.bool_(True)),
    lambda n: ts.GrassmannLinear(n(6), n(2), np.array([2, 1]), gamma=n(2), normalize=1),
    lambda n: ts.TuckerConfig(rank=n(2), alpha=n(2), dropout=np.float32(0.1)),
    lambda n: ts.RiemannianSGD([nn.Parameter(X)], lr=np.float32(0.1), momentum=n(0), nesterov=np.bool_(False)),
    lambda n: ts.RiemannianAdamW([nn.Parameter(X)], lr=torch.tensor(0.1), betas=[np.float64(0.9), 0.99]),
    lambda n: ts.MLCLoss(eps=np.float32(0.5), eta=n(1), reg=n(0)),
    lambda n: ts.param_groups(HEAD, lr=np.float32(0.1), weight_decay=torch.tensor(0.1), no_decay=["*.bias"]),
    lambda n: ts.swap_head(bad_calls.plain(), n(5), n(2)),
    lambda n: ts.grassmann_step_(HEAD.weight.detach().clone(), torch.zeros(4, 6), lr=n(1), dims=[n(2), n(1), n(1)]),
    lambda n: metrics.principal_angles(X, [0, 0, 1, 1], n(1)),
])
def test_numbers_of_numpy_are_numbers(make):
    for number in (np.int64, np.int32, int):
        make(number)
