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


DRAWN = {"size": bad.whole(0, 2**26 + 1), "seed": bad.whole(-1, 2**63)}
add("lowrank.hadamard", call(lowrank.hadamard, x=x(3, 8), normalize=True), x=bad.tensor, normalize=bad.flag,
    fine="x: another float, dimensions more, no rows, a dimension less, meta")
add("lowrank.fastfood", call(lowrank.fastfood, theta=x(3, 5), size=20, seed=0), theta=bad.tensor, **DRAWN,
    fine="theta: another float, dimensions more, no rows, a dimension less, meta")
add("lowrank.fastfood_adjoint", call(lowrank.fastfood_adjoint, x=x(3, 5), size=20, seed=0), x=bad.tensor, **DRAWN,
    fine="x: another float, dimensions more, no rows, a dimension less, meta")
