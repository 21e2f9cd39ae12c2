"""The calls of bad_calls.py that patch, probe and share an embedding out."""

import math
from functools import partial

import bad_values as bad
import torch
from bad_input import call, method
from helpers import normal

from torch_subspace import grassmann

INF = math.inf


def x(*shape):
    return lambda: normal(*shape, seed=1, dtype=torch.float32)


def add_calls(add, w):
    """`w` makes frames (4, 2, 6)."""
    add("grassmann.subspace_patch", call(grassmann.subspace_patch, base=x(5, 6), source=x(5, 6), basis=lambda: w()[0]),
        base=bad.tensor, source=bad.tensor, basis=bad.tensor,
        fine="base: dimensions more, a dimension less; source: dimensions more, a dimension less; "
             "basis: a dimension less, dimensions more")
    basis = {"in_features": bad.whole(0, -1, 1, 2**70), "dim": bad.whole(0, -1, 7, 2**70),
             "device": bad.optional(bad.device), "dtype": bad.optional(bad.dtype), "generator": bad.generator}
    made = {"in_features": 6, "dim": 2, "device": None, "dtype": torch.float32, "generator": None}
    add("grassmann.SubspacePatch", call(grassmann.SubspacePatch, **made), **basis)
    add("grassmann.SubspacePatch.forward", method(lambda: grassmann.SubspacePatch(6, 2), "forward", base=x(5, 6),
                                                  source=x(5, 6)), ("subspace_patch",),
        base=bad.tensor, source=bad.tensor,
        fine="base: dimensions more, a dimension less; source: dimensions more, a dimension less")
    add("grassmann.rowspace_split", call(grassmann.rowspace_split, v=x(5, 6), weight=x(3, 6)), v=bad.tensor,
        weight=bad.tensor, fine="v: dimensions more, a dimension less, no rows; weight: no rows")

    trees = {"distance": x(3, 4), "pair": torch.zeros(3, 4, dtype=torch.int64),
             "token": torch.ones(3, 5, dtype=torch.int64)}
    probe = partial(grassmann.OrthogonalProbe, 6, 2, 2, 3)
    add("grassmann.OrthogonalProbe", call(grassmann.OrthogonalProbe, pair_labels=2, token_labels=3, **made),
        pair_labels=bad.whole(-1, 2**70), token_labels=bad.whole(-1, 2**70), **basis)
    sequences = "x: dimensions more, a dimension less, no rows"
    add("grassmann.OrthogonalProbe.forward", method(probe, "forward", x=x(3, 5, 6)), ("OrthogonalProbe",), x=bad.tensor,
        fine=sequences)
    add("grassmann.OrthogonalProbe.distances", method(probe, "distances", x=x(3, 5, 6)), x=bad.tensor, fine=sequences)
    add("grassmann.OrthogonalProbe.loss", method(probe, "loss", x=x(3, 5, 6), **trees), x=bad.tensor,
        distance=bad.tensor, pair=bad.optional(bad.labels), token=bad.optional(bad.labels),
        fine="distance: another float")
    add("grassmann.grouped_normalize", call(grassmann.grouped_normalize, x=x(5, 6), dims=(4, 2)), x=bad.tensor,
        dims=bad.dims, fine="x: dimensions more, a dimension less, no rows, another float, meta")
    learners = partial(grassmann.DynamicSubspaceLearners, 6, 12)
    add("grassmann.DynamicSubspaceLearners", call(
        grassmann.DynamicSubspaceLearners, in_features=6, dim=12, beta=1.2, margin=0.2, threshold=0.5, least=5,
        device=None, dtype=torch.float32),
        in_features=bad.whole(0, -1, 2**70), dim=bad.whole(0, -1, 4, 2**70), beta=bad.number(-0.1, 2.1, INF),
        margin=bad.number(-0.1, 2.1, INF), threshold=bad.number(-0.1, 1.1, INF), least=bad.whole(0, -1, 13, 2**70),
        device=bad.optional(bad.device), dtype=bad.optional(bad.dtype))
    add("grassmann.DynamicSubspaceLearners.forward", method(learners, "forward", features=x(5, 6)),
        ("DynamicSubspaceLearners",), features=bad.tensor,
        fine="features: dimensions more, a dimension less, no rows")
    add("grassmann.DynamicSubspaceLearners.loss", method(
        learners, "loss", features=x(5, 6), target=torch.tensor([0, 1, 1, 2, 0]), learner=0),
        features=bad.tensor, target=bad.labels, learner=bad.optional(bad.whole(-1, 1, 2**70)),
        fine="target: negative, large")
    add("grassmann.DynamicSubspaceLearners.assign", method(
        learners, "assign", features=x(5, 6), previous=torch.tensor([0, 0, 0, 0, 0]), seed=0),
        features=bad.tensor, previous=bad.optional(bad.labels), seed=bad.whole(-1, 2**32))
    add("grassmann.DynamicSubspaceLearners.split", method(learners, "split", process_group=None),
        process_group=bad.optional(bad.those()))
