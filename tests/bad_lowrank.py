"""The public calls of lowrank for tests/bad_calls.py."""

import functools
import math

import bad_input as table
import bad_values as bad
import torch
from bad_input import Call, call
from helpers import normal

from torch_subspace import lowrank

INF = math.inf

CALLS: dict[str, Call] = {}
add = functools.partial(table.add, CALLS)


def x(*shape):
    return lambda: normal(*shape, seed=1, dtype=torch.float32)


add("lowrank.newton_schulz", call(lowrank.newton_schulz, x=x(3, 5), steps=5, coefficients="muon", eps=1e-7),
    x=bad.tensor, steps=bad.whole(0, 101), coefficients=bad.word, eps=bad.number(0, -1, INF),
    fine="x: another float, dimensions more, no columns, no rows, meta")
