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


SEED = bad.optional(bad.whole(-1, 2**63))
WIDENED = "g: another float, dimensions more, meta"
add("lowrank.range_finder", call(lowrank.range_finder, g=x(5, 3), rank=2, power=1, seed=0), g=bad.tensor,
    rank=bad.whole(0, 4), power=bad.whole(0), seed=SEED, fine=WIDENED)
add("lowrank.cosine_columns", call(lowrank.cosine_columns, g=x(5, 3), rank=2), g=bad.tensor, rank=bad.whole(0, 4),
    fine=WIDENED)
add("lowrank.cosine_basis", call(lowrank.cosine_basis, size=8, dtype=torch.float32, device="cpu"), size=bad.whole(0),
    dtype=bad.optional(bad.dtype), device=bad.device)
add("lowrank.cosine_basis of some", call(lowrank.cosine_basis, size=8, index=torch.tensor([0, 2, 5])),
    index=bad.optional(bad.labels), fine="index: no rows, dimensions more, meta")
