"""How large the logits of a head are to be: γ by rule of the number of classes, their dimension and the feature's.

A logit is γ l, l in [0, 1] the length of a unit feature's projection onto a class. Of a subspace and a feature at
random l² is Beta(k/2, (n - k)/2) distributed: l is about l₀ = √(k/n), give or take √((1 - k/n) / 2n). The logits of a
new head have the mean γ √(k/n) and the spread γ √((1 - k/n) / 2n), which is chance. Of C classes, one at l and the
others still at l₀, that one has the probability

    p(l) = 1 / (1 + (C - 1) exp(-γ (l - l₀)))

Too large a γ makes much of chance: a few examples are told apart by directions that they happen to have, and then give
no gradient. Too small a one never lets a class reach a probability to speak of. So the spread of logits at the start is
SPREAD (but for 1 - k/n), and γ is larger only where p(1) would stay below REACHED:

    γ = max(SPREAD √(2n), log((C - 1) REACHED / (1 - REACHED)) / (1 - l₀))

The first is 25.6 for the paper's n = 2048, which found 25. Where k is a large part of n, l₀ is near 1, but classes
other than the right one can get shorter: 1 - l₀ counts as 1/2 at least. examples/gamma.py has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..common import POSITIVE, check_number

SPREAD, REACHED = 0.4, 0.75
PAPERS = 25.0  # of arXiv 2308.01547: C = 1000, k = 8, n = 2048


def check_gamma(name: str, gamma: object) -> None:
    """Raises in `name`'s voice unless it is "auto" or a positive number."""
    if isinstance(gamma, str) and gamma != "auto":
        raise ValueError(f'{name}: gamma must be "auto" or a number, positive and finite, got {gamma!r}')
    if not isinstance(gamma, str):
        check_number(name, "gamma", gamma, POSITIVE)


def auto_gamma(layer: Any) -> float:
    """By the rule, to a tenth; 1 where features are not scaled to unit length, since theirs is a scale then."""
    if not layer.normalize or not layer.in_features:
        return 1.0
    n, dims = layer.in_features, layer.dims if layer.dims is not None else (layer.subspace_dim,)
    random = math.sqrt(sum(dims) / max(len(dims), 1) / n)
    reach = math.log(max(layer.num_classes - 1, 1) * REACHED / (1 - REACHED)) / max(1 - random, 0.5)
    return round(max(SPREAD * math.sqrt(2 * n), reach), 1)


def keep_gamma(layer: Any, destination: Mapping[str, Any], prefix: str) -> None:
    """A state_dict says it beside torch's version of the layer, in what `torch.save` keeps with the weights."""
    metadata = getattr(destination, "_metadata", {})
    if prefix[:-1] in metadata:
        metadata[prefix[:-1]]["gamma"] = layer.gamma


def loaded_gamma(layer: Any, metadata: Mapping[str, Any], papers: bool) -> float:
    """That of the weights that are loaded, as far as it is known: a state_dict without one is from before the rule,
    plain tensors (safetensors, sharded checkpoints) say nothing."""
    before = "version" in metadata and "gamma" not in metadata
    return PAPERS if papers or before else metadata.get("gamma", layer.gamma)
