"""Several adapters of a model made into a new one, in peft's manner: `add_weighted_adapter`. See peft.py.

    cat: Σ w ΔW itself, its ranks the sums of those of the parts;
    the others: Σ w ΔW, or what peft's ties, dare and magnitude_prune make of the ΔW, cut to the rank asked for by the
    leading singular vectors of each unfolding, which for matrices is the nearest of that rank.
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch
from peft.utils import ModulesToSaveWrapper, merge_utils
from torch import Tensor, nn

from ..common import UP_TO_1, check_number, check_word, told, whole
from ..tucker.tucker import tucker_compose
from .factors import combined
from .peft_layer import TuckerLayer

SUMS = {"svd": merge_utils.task_arithmetic, "linear": merge_utils.task_arithmetic, "ties": merge_utils.ties,
        "dare_linear": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties,
        "magnitude_prune": merge_utils.magnitude_prune}
KINDS = ("cat", *SUMS, *(f"{kind}_svd" for kind in SUMS if kind not in ("svd", "linear")))
SAME = ("layers_to_transform", "layers_pattern", "exclude_modules")

Parts = tuple[Tensor, list[Tensor | None]]  # a core and its factors
Place = tuple[str, str]  # a layer's name and a parameter of it


@dataclasses.dataclass
class Recipe:
    """How to combine: peft's `combination_type` and what goes with it."""

    kind: str
    rank: int | None
    clamp: float | None
    driver: str | None
    density: float | None
    majority: str

    def __post_init__(self):
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"add_weighted_adapter: Invalid combination_type: {self.kind!r}; there are "
                             f"{', '.join(KINDS)}")
        self.sum = self.kind.removesuffix("_svd")
        self.prunes = self.sum not in ("cat", "svd", "linear")
        name = "add_weighted_adapter"
        if self.prunes and self.density is None:
            raise ValueError(f"{name}: {self.kind} needs a density in [0, 1], got None")
        if self.prunes:
            check_number(name, "density", self.density, UP_TO_1)
        if self.rank is not None:
            self.rank = whole(name, "svd_rank", self.rank, 1)
        if self.clamp is not None:
            check_number(name, "svd_clamp", self.clamp, UP_TO_1)
        check_word(name, "majority_sign_method", self.majority, ("total", "frequency"))


def check_adapters(model: nn.Module, configs: dict, names: Sequence[str], weights: Sequence[float], new: str) -> None:
    """Before anything is changed: are these adapters of the model, and can they be combined?"""
    for what, several in (("adapters", names), ("weights", weights)):
        if not isinstance(several, Sequence) or isinstance(several, str):
            raise TypeError(f"add_weighted_adapter: {what} must be a list, got {told(several)}")
    if not isinstance(new, str) or not new or "." in new:
        raise ValueError(f"add_weighted_adapter: adapter_name must be a name without dots, got {told(new)}")
    for weight in weights:
        check_number("add_weighted_adapter", "each of weights", weight)
    if not names or len(names) != len(weights):
        raise ValueError(f"add_weighted_adapter: need as many weights as adapters, got {len(weights)} and {len(names)}")
    for name in names:
        if name not in configs:
            raise ValueError(f"Adapter {name} does not exist, of adapters={names}; there are {', '.join(configs)}")
        if getattr(configs[name], "target_parameters", None):
            raise ValueError("add_weighted_adapter does not support targeting nn.Parameter (problematic adapter "
                             f"{name!r})")
    heads = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    shared = [m for m in heads if sum(name in m.modules_to_save for name in names) > 1]
    if shared:
        raise ValueError("Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                         f"{len(shared)} such instance(s).")


@torch.no_grad()
def combine(layers: dict[str, TuckerLayer], names: Sequence[str], weights: Sequence[float],
            recipe: Recipe) -> dict[Place, Parts]:
    """Core and factors of the new adapter for every layer that has one of these."""
    result = {}
    places = {(key, p): layer for key, layer in layers.items() for name in names if name in layer.tucker_parts
              for p in layer.changes(name)}
    for place, layer in places.items():
        here = [(float(w), layer.scaling[name], layer.changes(name)[place[1]])
                for name, w in zip(names, weights, strict=True) if name in layer.tucker_parts]
        terms = [(w * scale, change) for w, scale, change in here]
        if recipe.sum in ("linear", "cat") and len(here) == 1:
            scale, core, factors, _ = combined(terms)
            core, factors = scale * core, [None if f is None else f.clone() for f in factors]
        elif recipe.kind == "cat":
            core, factors = _folded(*combined(terms)[1:3])
        else:
            ranks = _ranks(place[0], [[_rank(f) for f in change.factors] for _, _, change in here], recipe)
            core, factors = _truncated(_change(terms, here, recipe), ranks, recipe)
        padding = getattr(layer.base_layer, "padding_idx", None)
        if padding is not None and factors[0] is not None:
            factors[0][padding] = 0  # the padding row never changes
        result[place] = core, factors
    return result


def _rank(factor: Tensor | None) -> int | None:
    return None if factor is None else factor.shape[1]


def _ranks(key, of_parts, recipe) -> list[int | None]:
    if not recipe.kind.endswith("svd") and len({tuple(r) for r in of_parts}) > 1:
        raise ValueError("All adapters must have the same r value when using combination_type linear, ties, dare_ties "
                         f"or dare_linear: those of {key!r} are {', '.join(map(str, of_parts))}")
    ranks = [None if None in modes else max(modes) for modes in zip(*of_parts)]
    return [recipe.rank if i < 2 and r is not None and recipe.rank else r for i, r in enumerate(ranks)]


def _composed(terms) -> Tensor:
    scale, core, factors, _ = combined(terms)
    return tucker_compose(core, factors, scale=scale)


def _change(terms, here, recipe) -> Tensor:
    if not recipe.prunes:
        return _composed(terms)
    changes = [_composed([(scale, change)]) for _, scale, change in here]
    weights = torch.tensor([w for w, _, _ in here], device=changes[0].device, dtype=changes[0].dtype)
    majority = (recipe.majority,) if recipe.sum.endswith("ties") else ()
    return SUMS[recipe.sum](changes, weights, recipe.density, *majority)


def _truncated(change, ranks, recipe) -> Parts:
    factors, core = [], change
    for mode, rank in enumerate(ranks):
        u = None
        if rank is not None:
            unfolding = change.movedim(mode, 0).flatten(1)
            u = torch.linalg.svd(unfolding, full_matrices=False, driver=recipe.driver)[0][:, :rank]
            u = torch.cat([u, u.new_zeros(len(u), min(rank, len(u)) - u.shape[1])], 1)
            core = torch.tensordot(u, core, dims=([0], [mode])).movedim(0, mode)
        factors.append(u)
    if recipe.clamp is not None:
        limit = torch.quantile(torch.cat([t.flatten() for t in (core, *factors) if t is not None]), recipe.clamp)
        core, factors = core.clamp(-limit, limit), [None if f is None else f.clamp(-limit, limit) for f in factors]
    return core, factors


def _folded(core, factors) -> Parts:
    """No rank above its mode's size: such a factor goes into the core, and the identity takes its place."""
    result = []
    for mode, factor in enumerate(factors):
        if factor is not None and factor.shape[1] > len(factor):
            core = torch.tensordot(factor, core, dims=([1], [mode])).movedim(0, mode)
            factor = torch.eye(len(factor), device=factor.device, dtype=factor.dtype)
        result.append(factor)
    return core, result


def config_of(configs: Sequence, made: dict[Place, Parts]):
    """The new adapter's config: the first one's, with scale 1, these layers and these ranks."""
    targets = [config.target_modules for config in configs]
    same = all(getattr(c, key) == getattr(configs[0], key) for c in configs for key in SAME)
    changed = {"target_modules": set().union(*targets)}
    plain = {place: place[0].replace(".base_layer", "") for place in made}
    if not same or not all(isinstance(t, set) for t in targets):
        changed = {"target_modules": "|".join(map(re.escape, dict.fromkeys(plain.values()))), **dict.fromkeys(SAME)}
    ranks = {place: ["full" if f is None else f.shape[1] for f in factors] for place, (_, factors) in made.items()}
    highest = max(n for r in ranks.values() for n in r[:2] if n != "full")
    config = dataclasses.replace(configs[0], r=highest, alpha=None, scaling="constant", rank_pattern={},
                                 alpha_pattern={}, init="lecun", **changed)
    for place, (core, factors) in made.items():
        name = plain[place] if place[1] == "weight" else f"{plain[place]}.{place[1]}"
        shape = [n if f is None else len(f) for n, f in zip(core.shape, factors)]
        if config.layer(name, shape)[0] != [_rank(f) for f in factors]:
            config.rank_pattern["^" + re.escape(name)] = ranks[place]
    return config


@torch.no_grad()
def fill(layers: dict[str, TuckerLayer], name: str, made: dict[Place, Parts]) -> None:
    for (key, parameter), (core, factors) in made.items():
        part = layers[key].changes(name)[parameter]
        for own, value in zip((part.core, *part.factors), (core, *factors), strict=True):
            if own is not None:
                own.copy_(value)
