"""Several spectral adapters of a model made into a new one, in peft's manner. See peft.py.

Adapters of one base have the same singular vectors, so that the sum of their changes is that of their numbers.
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import check_word
from .peft_layer import TuckerLayer
from .peft_parameters import ParameterFactors
from .peft_weighted import Parts, Place
from .spectral import SpectralFactors

NAME, KINDS, NEAR = "add_weighted_adapter", ("linear", "cat", "svd"), 1e-5


def kept(part: SpectralFactors | ParameterFactors) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """The numbers and the singular vectors of each parameter that the part changes."""
    if isinstance(part, ParameterFactors):
        return {name: part.tensors_of(name) for name in part.about}
    return {"weight": (part.core, [part.factor0, part.factor1])}


@torch.no_grad()
def sum_of(layers: dict[str, TuckerLayer], configs: Sequence[Any], names: Sequence[str], weights: Sequence[float],
           kind: str) -> tuple[Any, dict[Place, Parts]]:
    """The new adapter's config, and core and factors for every layer that has one of these; ValueError where their
    vectors differ."""
    check_word(NAME, "combination_type", kind, KINDS)
    made: dict[Place, Parts] = {}
    for key, layer in layers.items():
        here = [(w * layer.scaling[n], kept(layer.tucker_parts[n])) for n, w in zip(names, weights, strict=True)
                if n in layer.tucker_parts]
        for parameter in dict.fromkeys(p for _, parts in here for p in parts):
            terms = [(w, *parts[parameter]) for w, parts in here if parameter in parts]
            made[key, parameter] = _summed(key, terms)
    ranks = {"^" + re.escape(key.replace(".base_layer", "")): core.shape[-1] for (key, _), (core, _) in made.items()}
    targets = [c.target_modules for c in configs]
    whole = set().union(*targets) if all(isinstance(t, set) for t in targets) else targets[0]
    return dataclasses.replace(configs[0], r=max(ranks.values()), rank_pattern=ranks, target_modules=whole), made


def _summed(key: str, terms: list[tuple[float, Tensor, list[Tensor]]]) -> Parts:
    """The longest one's vectors, and the numbers added up."""
    _, longest, vectors = max(terms, key=lambda term: term[1].shape[-1])
    core = torch.zeros_like(longest)
    for weight, own, factors in terms:
        r = own.shape[-1]
        u, v = ((f[..., :r] * g).sum(-2) for f, g in zip(vectors, factors, strict=True))  # 1, or both -1
        if ((u * v - 1).abs() > NEAR).any():
            raise ValueError(f"{NAME}: the adapters of {key!r} have other singular vectors, being trained with other "
                             "base weights")
        core[..., :r] += weight * own
    return core, [f.clone() for f in vectors]


@torch.no_grad()
def put(layers: dict[str, TuckerLayer], name: str, made: dict[Place, Parts]) -> None:
    for (key, parameter), (core, factors) in made.items():
        own, vectors = kept(layers[key].tucker_parts[name])[parameter]
        for place, value in zip((own, *vectors), (core, *factors), strict=True):
            place.copy_(value)
