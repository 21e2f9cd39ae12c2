"""The public calls of lowrank for tests/bad_calls.py."""

import functools
import math

import bad_input as table
import bad_values as bad
import torch
from bad_input import Call, call, method
from helpers import normal
from torch import nn

from torch_subspace import lowrank

INF = math.inf

CALLS: dict[str, Call] = {}
add = functools.partial(table.add, CALLS)


def x(*shape):
    return lambda: normal(*shape, seed=1, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------- random subspaces

def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def one(model):
    return 1.0


add("lowrank.RandomSubspace", call(lowrank.RandomSubspace, module=lambda: linear(), dim=5, kind="fastfood", seed=1),
    module=bad.module, dim=bad.whole(0, -1, 16, 2**63), kind=bad.word, seed=bad.whole(-1, 2**63))
add("lowrank.RandomSubspace.parameters_at", method(lambda: lowrank.RandomSubspace(linear(), 2), "parameters_at",
                                                   theta=x(2)),
    ("theta",), theta=bad.optional(bad.those(**{"another length": torch.ones(3), "a scalar": torch.ones(())})))
add("lowrank.intrinsic_dimension",
    call(lowrank.intrinsic_dimension, make=linear, fit=one, threshold=0.9,
         kind="dense", seeds=(0,), start=1, most=2, tolerance=0.1, verbose=False),
    make=bad.function, fit=bad.function, threshold=bad.number(0, -1, 1.1, INF), kind=bad.word,
    seeds=bad.those(empty=(), negative=(-1,), floats=(0.5,)), start=bad.whole(0, -1),
    most=bad.optional(bad.whole(0, -1)), tolerance=bad.number(0, -1, INF), verbose=bad.flag)
