"""The public calls of isotropy for tests/bad_calls.py."""

import functools
import math

import bad_input as table
import bad_values as bad
import torch
from bad_input import Call, call
from helpers import normal
from torch import nn

from torch_subspace import isotropy

INF = math.inf

CALLS: dict[str, Call] = {}
add = functools.partial(table.add, CALLS)


def x(*shape):
    return lambda: normal(*shape, seed=1, dtype=torch.float32)


POSITIVE, GAMMA, WEIGHT = bad.number(0, -1, INF), bad.number(INF, -INF), bad.number(-0.1, INF)
WIDENED, POINTS, MATRIX, SERIES = "z: another float, dimensions more", x(5, 3), x(4, 4), x(2, 9, 3)
KNOTS = {"num_slices": bad.whole(0), "knots": bad.whole(1, 5000), "t_max": POSITIVE, "views": bad.word,
         "process_group": bad.optional(bad.those())}
GRID = {"num_slices": 8, "knots": 5, "t_max": 3.0, "views": "each", "process_group": None}
SEED = bad.optional(bad.whole(-1, 2**63))
add("isotropy.sigreg", call(isotropy.sigreg, z=POINTS, seed=0, **GRID), z=bad.tensor, seed=SEED, **KNOTS,
    fine=f"{WIDENED}, meta")
add("isotropy.sigreg along given directions", call(isotropy.sigreg, z=POINTS, directions=x(3, 4)),
    directions=bad.optional(bad.tensor), fine="directions: another float")
add("isotropy.SIGRegLoss", call(isotropy.SIGRegLoss, reduction="mean", **GRID), reduction=bad.word, **KNOTS)
add("isotropy.SIGRegLoss.forward", call(isotropy.SIGRegLoss(), z=POINTS, seed=0), ("sigreg",), z=bad.tensor, seed=SEED,
    fine=f"{WIDENED}, meta")
add("isotropy.LeJEPALoss", call(isotropy.LeJEPALoss, weight=0.02, distance="mean", **GRID),
    weight=bad.number(-0.1, 1.1), distance=bad.word, **KNOTS)
add("isotropy.LeJEPALoss.forward", call(isotropy.LeJEPALoss(), z=x(2, 5, 3), centre=x(4, 5, 3), seed=0),
    ("LeJEPALoss", "sigreg"), z=bad.tensor, centre=bad.optional(bad.tensor), seed=SEED,
    fine="z: another float; centre: another float")

GROUP = {"process_group": bad.optional(bad.those())}
add("isotropy.von_neumann_entropy", call(isotropy.von_neumann_entropy, z=POINTS, of="points", process_group=None),
    z=bad.tensor, of=bad.word, fine=f"{WIDENED}, meta", **GROUP)
add("isotropy.ridge_transition", call(isotropy.ridge_transition, z=POINTS, z_next=x(5, 2), eta=0.1, process_group=None),
    z=bad.tensor, z_next=bad.tensor, eta=POSITIVE, fine="z: another float; z_next: another float", **GROUP)
KOOPMAN = {"alpha": 2.0, "beta": 0.1, "lam": 0.1, "k": 3, "tau": 0.1, "eta": 0.1, "entropy": "maximise",
           "detach": False, "process_group": None}
KOOPMAN_BAD = {"alpha": WEIGHT, "beta": WEIGHT, "lam": WEIGHT, "k": bad.whole(0), "tau": POSITIVE, "eta": POSITIVE,
               "entropy": bad.word, "detach": bad.flag, **GROUP}
STATES = {"z": SERIES, "z_next": SERIES, "decode": nn.Identity(), "states": SERIES, "next_states": SERIES}
STATES_BAD = {what: bad.function if what == "decode" else bad.tensor for what in STATES}
STATES_FINE = "; ".join(f"{what}: another float" for what in STATES if what != "decode")
add("isotropy.koopman_information_loss", call(isotropy.koopman_information_loss, **STATES, **KOOPMAN), **STATES_BAD,
    **KOOPMAN_BAD, fine=STATES_FINE)
add("isotropy.KoopmanInformationLoss", call(isotropy.KoopmanInformationLoss, **KOOPMAN), **KOOPMAN_BAD)
add("isotropy.KoopmanInformationLoss.forward", call(isotropy.KoopmanInformationLoss(), **STATES),
    ("KoopmanInformationLoss",), **STATES_BAD, fine=STATES_FINE)
add("isotropy.procrustes", call(isotropy.procrustes, x=POINTS, y=POINTS), x=bad.tensor, y=bad.tensor,
    fine="x: another float; y: another float")
add("isotropy.OrthogonalAdapter", call(isotropy.OrthogonalAdapter, d=4, device="cpu", dtype=torch.float32),
    d=bad.whole(0), device=bad.device, dtype=bad.dtype)
add("isotropy.OrthogonalAdapter.forward", call(isotropy.OrthogonalAdapter(3), x=POINTS), ("OrthogonalAdapter",),
    x=bad.tensor, fine="x: dimensions more, a dimension less, no rows, another float")
add("isotropy.OrthogonalAdapter.merge", call(isotropy.OrthogonalAdapter(3).merge, linear=nn.Linear(2, 3)),
    linear=bad.optional(bad.module))
add("isotropy.lambda_orthogonality", call(isotropy.lambda_orthogonality, weight=POINTS, lam=1.0, alpha=1.0),
    weight=bad.tensor, lam=GAMMA, alpha=POSITIVE, fine="weight: another float, dimensions more, meta")
add("isotropy.lambda_orthogonality of several", call(isotropy.lambda_orthogonality, lam=1.0,
                                                     weight=lambda: [x(5, 3)(), x(2, 7)()]),
    weight=bad.tensors, fine="weight: one less, one more, holds meta")
add("isotropy.LambdaOrthogonalityLoss", call(isotropy.LambdaOrthogonalityLoss, lam=1.0, alpha=1.0, reduction="mean"),
    lam=GAMMA, alpha=POSITIVE, reduction=bad.word)
add("isotropy.LambdaOrthogonalityLoss.forward", call(isotropy.LambdaOrthogonalityLoss(1.0), weight=POINTS),
    ("lambda_orthogonality",), weight=bad.tensor, fine="weight: another float, dimensions more, meta")
add("isotropy.gated_cosine", call(isotropy.gated_cosine, z1=POINTS, z2=x(4, 3), gate=POINTS), z1=bad.tensor,
    z2=bad.tensor, gate=bad.tensor, fine="z1: another float; z2: another float, no rows; gate: another float")
add("isotropy.SimLAPLoss", call(isotropy.SimLAPLoss, num_classes=4, features=3, tau=0.1, width=5, process_group=None,
                                device="cpu", dtype=torch.float32),
    num_classes=bad.whole(0), features=bad.whole(0), tau=POSITIVE, width=bad.whole(0), device=bad.device,
    dtype=bad.dtype, **GROUP)
LABELS = {"y1": torch.tensor([0, 1, 3, 2, 0]), "y2": torch.tensor([1, 1, 2, 0, 3])}
add("isotropy.simlap_loss", call(isotropy.simlap_loss, z1=POINTS, z2=POINTS, gate=POINTS, tau=0.1, process_group=None,
                                 **LABELS),
    z1=bad.tensor, z2=bad.tensor, gate=bad.tensor, y1=bad.labels, y2=bad.labels, tau=POSITIVE, **GROUP,
    fine="z1: another float; z2: another float; gate: another float; y1: negative, large; y2: negative, large")
SIMLAP = isotropy.SimLAPLoss(4, 3, width=5)
add("isotropy.SimLAPLoss.gate", call(SIMLAP.gate, **LABELS), ("SimLAPLoss",), y1=bad.labels, y2=bad.labels)
add("isotropy.SimLAPLoss.forward", call(SIMLAP, z1=POINTS, z2=POINTS, **LABELS), ("SimLAPLoss",), z1=bad.tensor,
    z2=bad.tensor, y1=bad.labels, y2=bad.labels, fine="z1: another float; z2: another float")
DISTILLATION = {"tau": 0.1, "alpha": 1.0, "rows": "all", "diagonal": True, "symmetric": True, "divergence_tau": 1.0}
DISTILLATION_BAD = {"tau": POSITIVE, "alpha": WEIGHT, "rows": bad.word, "diagonal": bad.flag, "symmetric": bad.flag,
                    "divergence_tau": bad.optional(POSITIVE)}
add("isotropy.similarity_distillation", call(isotropy.similarity_distillation, old=MATRIX, new=MATRIX, **DISTILLATION),
    old=bad.tensor, new=bad.tensor, **DISTILLATION_BAD, fine="old: another float; new: another float")
add("isotropy.SimilarityDistillationLoss", call(isotropy.SimilarityDistillationLoss, reduction="mean", **DISTILLATION),
    reduction=bad.word, **DISTILLATION_BAD)
add("isotropy.SimilarityDistillationLoss.forward",
    call(isotropy.SimilarityDistillationLoss(**DISTILLATION), old=MATRIX, new=MATRIX), ("similarity_distillation",),
    old=bad.tensor, new=bad.tensor, fine="old: another float; new: another float")


def in_place(t):
    """A floating tensor with room for each element."""
    return bad.tensor(t) | {"expanded": t[:1].expand_as(t), "overlapping": t.flatten().as_strided(t.shape, (1, 1))}


for shrink, weight, extra, good in ((isotropy.group_lasso, bad.tensor, {}, {}),
                                    (isotropy.prox_group_lasso_, in_place, {"step": WEIGHT}, {"step": 0.1})):
    add(f"isotropy.{shrink.__name__}", call(shrink, weight=POINTS, groups=(2, 3), **good), weight=weight,
        groups=bad.dims, fine="weight: another float, no columns, meta", **extra)
add("isotropy.GroupLassoLoss", call(isotropy.GroupLassoLoss, groups=(2, 3)), groups=bad.dims, fine="groups: too few")
add("isotropy.GroupLassoLoss.forward", call(isotropy.GroupLassoLoss((2, 3)), weight=POINTS), ("group_lasso",),
    weight=bad.tensor, fine="weight: another float, no columns, meta")
