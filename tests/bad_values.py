"""What users may pass by mistake in place of an argument, by the kind of the argument: {what it is: value}.

Each kind is a function of a good value.
"""

import math

import numpy as np
import torch
from torch import nn


class Thing:
    """An object of no known kind."""

    def __repr__(self):
        return "Thing()"


NOTHING_LIKE_IT = {"None": None, "a string": "word", "an object": Thing(), "a class": nn.Linear, "a dict": {}}
NO_SEQUENCE = NOTHING_LIKE_IT | {"a number": 3}
OTHER_FLOAT = {torch.float32: torch.float64, torch.float64: torch.float32}


def tensor(good):
    """A floating tensor."""
    t = good.detach()
    wrong = NO_SEQUENCE | {
        "a list": t.tolist(), "an array": t.numpy(), "a module": nn.Identity(), "sparse": t.to_sparse(),
        "meta": t.to("meta"), "complex": t.to(torch.complex64), "bool": t > 0, "int": t.long(),
        "another float": t.to(OTHER_FLOAT[t.dtype]), "float8": t.to(torch.float8_e4m3fn), "a scalar": t.reshape(-1)[0],
        "no columns": t[..., :0], "no rows": t[:0], "a dimension less": t[0],
        "dimensions more": t.expand(2, 1, *t.shape), "nested": torch.nested.nested_tensor([t, t]),
        "jagged": torch.nested.nested_tensor([t, t], layout=torch.jagged),
    }
    if t.dim() == 2:
        wrong["csr"] = t.to_sparse_csr()
    if t.dtype == torch.float32:
        wrong["mkldnn"], wrong["quantised"] = t.to_mkldnn(), torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)
    return wrong


def tensors(good):
    """A sequence of floating tensors or None."""
    each = [{} if t is None else tensor(t) for t in good]
    kinds = ("a list", "sparse", "meta", "complex", "int", "no columns", "nested")
    return NO_SEQUENCE | {f"holds {kind}": [e.get(kind) for e in each] for kind in kinds} | {
        "one less": good[:-1], "one more": [*good, good[0]], "holds strings": ["word"] * len(good), "lists": [[good]],
        "a set": set(good),
    }


def labels(t):
    """int64 labels."""
    return NO_SEQUENCE | {
        "a list": t.tolist(), "an array": t.numpy(), "sparse": t.to_sparse(), "meta": t.to("meta"), "bool": t > 0,
        "complex": t.to(torch.complex64), "int32": t.int(), "uint8": t.byte(), "float": t.float(), "a scalar": t[0],
        "no rows": t[:0], "dimensions more": t[None, None], "negative": t - 9, "large": t + 2**40,
        "nested": torch.nested.nested_tensor([t, t]),
    }


def number(*outside):
    """A number; these are out of range."""
    wrong = NOTHING_LIKE_IT | {
        "digits": "0.5", "a list": [0.5], "an array": np.array([0.5, 0.25]), "a tensor": torch.tensor([0.5, 0.25]),
        "complex": 1j, "a bool": True, "nan": math.nan, **{repr(n): n for n in outside},
    }
    return lambda good: wrong


def whole(*outside):
    """An int; these are out of range."""
    wrong = NOTHING_LIKE_IT | {
        "digits": "3", "a float": 2.0, "a fraction": 2.5, "nan": math.nan, "complex": 1j, "a bool": True,
        "a list": [3] * 7, "a tensor": torch.full((7,), 3), "an array": np.full(7, 3), **{repr(n): n for n in outside},
    }
    return lambda good: wrong


def geometry(*outside):
    """What a convolution takes for each of its dimensions: an int or several."""
    wrong = NOTHING_LIKE_IT | {
        "a float": 1.5, "floats": [1.0, 1.0], "too many": [1] * 5, "a bool": True, "strings": ["1", "1"],
        "a tensor": torch.ones(2), **{repr(n): n for n in outside},
    }
    return lambda good: wrong


def flag(good):
    return {"None": None, "a string": "False", "an object": Thing(), "a list": [], "a float": 0.5,
            "a tensor": torch.tensor([True, False]), "an array": np.array([True, False])}


def word(good):
    """One of a few words."""
    return {"None": None, "another": "word", "a list": [], "an array": np.array(["a", "b"]), "a number": 3,
            "a bool": True, "a class": nn.Linear, "an object": Thing(), "bytes": good.encode(),
            "a tensor": torch.ones(2)}


def dims(good):
    """The dimensions of ragged frames."""
    n = sum(good)
    return {"None": None, "an int": n, "a string": "21", "negative": (-1, n + 1), "zero": (0, n), "a bool": True,
            "bools": (True,) * n, "floats": [float(k) for k in good], "strings": tuple(map(str, good)), "a dict": {},
            "a tensor of floats": torch.tensor(good, dtype=torch.float32), "too few": good[:-1], "an object": Thing(),
            "a class": nn.Linear, "nested": [list(good)], "huge": (2**70, *good[1:]), "a set": set(good)}


def betas(good):
    return NO_SEQUENCE | {
        "one": (0.9,), "three": (0.9, 0.9, 0.9), "strings": ("a", "b"), "nan": (math.nan, 0.9), "bools": (True, False),
        "nan after": (0.9, math.nan), "negative": (-0.1, 0.9), "too large": (0.9, 1.0), "Nones": (None, None),
        "lists": ([0.9], [0.9]),
    }


def module(good):
    return NO_SEQUENCE | {"a list": [good], "a function": len, "a tensor": torch.ones(2), "its class": type(good),
                          "its parameters": good.parameters()}


def generator(good):
    return {"a seed": 3, "a string": "word", "an object": Thing(), "its class": torch.Generator,
            "numpy's": np.random.RandomState(0)}


def dtype(good):
    return {"a string": "float32", "an int's": torch.int64, "a complex one": torch.complex64, "a bool's": torch.bool,
            "a number": 32, "numpy's": np.float32, "an object": Thing(), "float8": torch.float8_e4m3fn}


def device(good):
    return {"a string": "nowhere", "a float": 1.5, "an object": Thing(), "a list": ["cpu"]}


def patterns(good):
    """A name or several."""
    return {"a number": 3, "numbers": [3], "an object": Thing(), "a class": nn.Linear, "Nones": [None],
            "a tensor": torch.ones(2), "bytes": b"fc", "a bool": True, "broken": "("}


def ranks(good):
    return NOTHING_LIKE_IT | {
        "a float": 2.0, "a bool": True, "zero": 0, "negative": -1, "nan": math.nan, "floats": (2.0, 2.0), "empty": (),
        "digits": "2", "a tensor": torch.ones(2), "an array": np.ones(2), "a generator": (i for i in (2, 2)),
    }


def by_pattern(*values):
    """{pattern: value}; these values are wrong."""
    wrong = {key: value for key, value in NO_SEQUENCE.items() if key != "a dict"} | {
        "a list": ["0"], "int keys": {0: 2}, "broken": {"(": 2}, **{f"holds {v!r}": {"0": v} for v in values},
    }
    return lambda good: wrong


def name(good):
    """The name of an adapter."""
    return {"None": None, "a number": 3, "a list": ["default"], "empty": "", "bytes": b"default", "an object": Thing(),
            "dotted": "a.b"}


def path(good):
    return {"None": None, "a number": 3, "a list": ["a"], "an object": Thing(), "a float": 2.5, "empty": "",
            "a folder": str(good.parent), "in no folder": str(good / "a.safetensors"), "of a zero": "a\0b"}


def classes(good):
    """Integers in a row, as metrics take them."""
    return NO_SEQUENCE | {
        "floats": [0.5, 1.5, 1, 2], "strings": list("abcd"), "Nones": [None] * 4, "bools": [True, False] * 2,
        "rows": [[0, 1], [1, 0]], "uneven": [[0, 1], [1]], "one less": good[:-1], "empty": [],
        "an iterator": iter(good),
        "sparse": torch.tensor(good).to_sparse(), "meta": torch.tensor(good, device="meta"),
        "complex": torch.ones(4, dtype=torch.complex64), "nested": torch.nested.nested_tensor([torch.ones(2)] * 2),
    }


def optional(kind):
    """None is as good."""
    return lambda good: {key: value for key, value in kind(good).items() if key != "None"}


def those(**wrong):
    """These and what is nothing like it."""
    return lambda good: NO_SEQUENCE | wrong


def function(good):
    return {key: value for key, value in NO_SEQUENCE.items() if key != "a class"}
