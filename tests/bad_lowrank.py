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
add("lowrank.newton_schulz", call(lowrank.newton_schulz, x=x(3, 5), steps=5, coefficients="muon", eps=1e-7),
    x=bad.tensor, steps=bad.whole(0, 101), coefficients=bad.word, eps=bad.number(0, -1, INF),
    fine="x: another float, dimensions more, no columns, no rows, meta")


TRION = {key: RULE[key] for key in ("lr", "rank", "betas", "eps", "weight_decay", "maximize", "foreach")} | {
    "momentum": bad.number(-0.1, 1.0), "ns_steps": bad.whole(0, 101), "ns_coefficients": bad.word,
    "adjust_lr_fn": bad.optional(bad.word), "algorithm": bad.word, "stacked": bad.optional(bad.flag),
    "adamw_factor": bad.optional(bad.number(0, -1, INF))}
WELL = {"lr": 0.1, "rank": 2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": True, "foreach": None,
        "momentum": 0.9, "ns_steps": 3, "ns_coefficients": "cubic", "adjust_lr_fn": "original", "algorithm": "trion",
        "stacked": False, "adamw_factor": 0.1}


def trion():
    return lowrank.Trion([nn.Parameter(torch.ones(5, 4))], rank=2)


def added_to_trion():
    return lambda **options: trion().add_param_group(options), {"params": [nn.Parameter(torch.ones(5, 4))], **WELL}


add("lowrank.Trion", call(lowrank.Trion, params=lambda: [nn.Parameter(torch.ones(5, 4))], **WELL), TORCHS,
    params=PARAMS, **TRION)
add("lowrank.Trion.add_param_group",
    method(trion, "add_param_group", param_group={"params": [nn.Parameter(torch.ones(5, 4))]}), ("Trion",),
    param_group=bad.those(list=[1]))
add("lowrank.Trion.add_param_group of options", added_to_trion, ("Trion",), **TRION)
add("lowrank.Trion.step", method(trion, "step", closure=None), ("Trion",), closure=bad.function, fine="closure: None")
add("lowrank.Trion.load_state_dict", method(trion, "load_state_dict", state_dict=lambda: trion().state_dict()),
    ("Trion",), state_dict=bad.those(list=[1], state={"state": {}}))
add("lowrank.trion_groups", call(lowrank.trion_groups, model=lambda: nn.Linear(4, 3), adamw="bias"), model=bad.module,
    adamw=lambda good: {key: value for key, value in bad.patterns(good).items() if key != "broken"} | {"other": "fc"})



add("lowrank.frequent_directions_", call(lowrank.frequent_directions_, sketch=x(3, 5), block=x(4, 5), decay=0.5),
    sketch=bad.tensor, block=bad.tensor, decay=bad.number(-0.1, 1.1, INF),
    fine="block: no rows")
add("lowrank.StreamingPCA", call(
    lambda **parameters: lowrank.StreamingPCA(**parameters).fit(normal(9, 6, seed=1)), n_components=2, method="oja",
    batch_size=4, n_oversamples=1, n_aside=2, random_state=0), ("StreamingPCA",),
    n_components=bad.whole(0, -1, 7, 2**70), method=bad.word, batch_size=bad.optional(bad.whole(0, -1)),
    n_oversamples=bad.whole(-1), n_aside=bad.whole(-1), random_state=bad.optional(bad.whole(-1, 2**32)))

COSO = {**{key: RULE[key] for key in ("lr", "rank", "every", "betas", "eps", "weight_decay", "seed", "maximize")},
        "sketch_rank": bad.whole(0), "threshold": bad.number(-0.1, 1.1), "decay": bad.number(-0.1, 1.1),
        "protect": bad.flag, "foreach": bad.optional(bad.flag)}
FINE = {**{key: GOOD[key] for key in ("lr", "rank", "every", "betas", "eps", "weight_decay", "seed", "maximize")},
        "sketch_rank": 3, "threshold": 0.9, "decay": 0.9, "protect": True, "foreach": None}


def coso():
    return lowrank.CoSO([nn.Parameter(torch.ones(5, 4))], rank=2, sketch_rank=3)


def joined():
    group = {"params": [nn.Parameter(torch.ones(5, 4))], **FINE}
    return lambda **options: coso().add_param_group(options), group


def remembered():
    opt = coso()
    return opt.memory, {"parameter": opt.param_groups[0]["params"][0]}


add("lowrank.CoSO", call(lowrank.CoSO, params=lambda: [nn.Parameter(torch.ones(5, 4))], **FINE), TORCHS, params=PARAMS,
    **COSO)
add("lowrank.CoSO.add_param_group",
    method(coso, "add_param_group", param_group={"params": [nn.Parameter(torch.ones(5, 4))]}), ("CoSO",),
    param_group=bad.those(list=[1]))
add("lowrank.CoSO.add_param_group of options", joined, ("CoSO",), **COSO)
add("lowrank.CoSO.step", method(coso, "step", closure=None), ("CoSO",), closure=bad.function, fine="closure: None")
add("lowrank.CoSO.load_state_dict", method(coso, "load_state_dict", state_dict=lambda: coso().state_dict()), ("CoSO",),
    state_dict=bad.those(list=[1], state={"state": {}}))
add("lowrank.CoSO.memory", remembered, ("CoSO",), parameter=bad.those(another=nn.Parameter(torch.ones(5, 4))))


DRAWN = {"size": bad.whole(0, 2**26 + 1), "seed": bad.whole(-1, 2**63)}
add("lowrank.hadamard", call(lowrank.hadamard, x=x(3, 8), normalize=True), x=bad.tensor, normalize=bad.flag,
    fine="x: another float, dimensions more, no rows, a dimension less, meta")
add("lowrank.fastfood", call(lowrank.fastfood, theta=x(3, 5), size=20, seed=0), theta=bad.tensor, **DRAWN,
    fine="theta: another float, dimensions more, no rows, a dimension less, meta")
add("lowrank.fastfood_adjoint", call(lowrank.fastfood_adjoint, x=x(3, 5), size=20, seed=0), x=bad.tensor, **DRAWN,
    fine="x: another float, dimensions more, no rows, a dimension less, meta")
