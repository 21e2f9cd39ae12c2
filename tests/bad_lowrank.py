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

RATE = bad.number(INF, -INF, -0.1)
RULE = {"lr": RATE, "rank": bad.whole(0), "projector": bad.word, "every": bad.whole(0), "betas": bad.betas,
        "eps": bad.number(-1.0, INF), "weight_decay": RATE, "error_feedback": bad.optional(bad.word),
        "scale": bad.number(0.0, -1.0, INF), "side": bad.word, "seed": bad.whole(-1), "maximize": bad.flag,
        "foreach": bad.optional(bad.flag)}
GOOD = {"lr": 0.1, "rank": 2, "projector": "range", "every": 2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1,
        "error_feedback": "int8", "scale": 0.5, "side": "rows", "seed": 3, "maximize": True, "foreach": None}
PARAMS = bad.those(tensor=torch.ones(2), module=nn.Linear(2, 2), empty=[], numbers=[3], strings=["a"],
                   nothing=[{"lr": 1.0}], nones=[{"params": None}], product=[nn.Parameter(torch.ones(2)) * 2])
TORCHS = ("optimize", "params", "None")  # torch's own words, which users know


def low_rank():
    return lowrank.LowRankAdamW([nn.Parameter(torch.ones(5, 4))], rank=2)


def added():
    group = {"params": [nn.Parameter(torch.ones(5, 4))], **GOOD}
    return lambda **options: low_rank().add_param_group(options), group


add("lowrank.LowRankAdamW", call(lowrank.LowRankAdamW, params=lambda: [nn.Parameter(torch.ones(5, 4))], **GOOD), TORCHS,
    params=PARAMS, **RULE)
add("lowrank.LowRankAdamW.add_param_group",
    method(low_rank, "add_param_group", param_group={"params": [nn.Parameter(torch.ones(5, 4))]}), ("LowRankAdamW",),
    param_group=bad.those(list=[1]))
add("lowrank.LowRankAdamW.add_param_group of options", added, ("LowRankAdamW",), **RULE)
add("lowrank.LowRankAdamW.step", method(low_rank, "step", closure=None), ("LowRankAdamW",), closure=bad.function,
    fine="closure: None")
add("lowrank.LowRankAdamW.load_state_dict",
    method(low_rank, "load_state_dict", state_dict=lambda: low_rank().state_dict()), ("LowRankAdamW",),
    state_dict=bad.those(list=[1], state={"state": {}}))

DRAWN = {"size": bad.whole(0, 2**26 + 1), "seed": bad.whole(-1, 2**63)}
add("lowrank.hadamard", call(lowrank.hadamard, x=x(3, 8), normalize=True), x=bad.tensor, normalize=bad.flag,
    fine="x: another float, dimensions more, no rows, a dimension less, meta")
add("lowrank.fastfood", call(lowrank.fastfood, theta=x(3, 5), size=20, seed=0), theta=bad.tensor, **DRAWN,
    fine="theta: another float, dimensions more, no rows, a dimension less, meta")
add("lowrank.fastfood_adjoint", call(lowrank.fastfood_adjoint, x=x(3, 5), size=20, seed=0), x=bad.tensor, **DRAWN,
    fine="x: another float, dimensions more, no rows, a dimension less, meta")
