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

add("lowrank.frequent_directions_", call(lowrank.frequent_directions_, sketch=x(3, 5), block=x(4, 5), decay=0.5),
    sketch=bad.tensor, block=bad.tensor, decay=bad.number(-0.1, 1.1, INF), fine="block: no rows")
RATE = bad.number(INF, -INF, -0.1)
COSO = {"lr": RATE, "rank": bad.whole(0), "sketch_rank": bad.whole(0), "every": bad.whole(0), "betas": bad.betas,
        "eps": RATE, "weight_decay": RATE, "threshold": bad.number(-0.1, 1.1), "decay": bad.number(-0.1, 1.1),
        "protect": bad.flag, "seed": bad.whole(-1), "maximize": bad.flag, "foreach": bad.optional(bad.flag)}
OPTIONS = {"lr": 0.1, "rank": 2, "sketch_rank": 3, "every": 1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1,
           "threshold": 0.9, "decay": 0.9, "protect": True, "seed": 0, "maximize": False, "foreach": None}


def weights():
    return [torch.nn.Parameter(normal(4, 5, dtype=torch.float32))]


def coso():
    opt = lowrank.CoSO(weights(), rank=2, sketch_rank=3)
    opt.param_groups[0]["params"][0].grad = normal(4, 5, dtype=torch.float32)
    return opt


add("lowrank.CoSO", call(lowrank.CoSO, params=lambda: weights(), **OPTIONS), **COSO)
