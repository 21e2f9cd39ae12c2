"""The kinds of adapters in files: what is said of one, which tensors it has, and how it is made of them."""
from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..common import wide_dtype
from .adapted import Adapted
from .config import TuckerConfig
from .factors import TuckerFactors
from .placed import home, is_sharded
from .spectral import PROBED, SpectralConfig, SpectralFactors, matrices
from .start import new_factors, spectral

FORMATS = {"torch_subspace.tucker": TuckerConfig, "torch_subspace.spectral": SpectralConfig}


def format_of(layers: Mapping[str, Mapping[str, Mapping]]) -> str:
    return "torch_subspace." + ("spectral" if any(map(is_spectral, next(iter(layers.values()), {}).values()))
                                else "tucker")


def is_spectral(described: Mapping) -> bool:
    return "stacked" in described


def check_description(d: Mapping, form: str) -> None:
    """Of one parameter: raises unless factors can be made of it."""
    if is_spectral(d) != (form == "torch_subspace.spectral"):
        raise ValueError(f"{form} of {sorted(d)}")
    if is_spectral(d):
        sizes = [*d["shape"], d["rank"]]
        fit = len(d["shape"]) > 1 and all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes)
        if not fit or not isinstance(d["stacked"], bool) or not isinstance(d["determined"], bool) or (
                d["rank"] > min(matrices(d["shape"], d["stacked"])[-2:])):
            raise ValueError(f"shape {d['shape']!r} of rank {d['rank']!r}")
        return
    if not isinstance(d["scale"], (int, float)) or not math.isfinite(d["scale"]):
        raise ValueError(f"scale {d['scale']!r}")
    if not isinstance(d["dropout"], (int, float)) or not 0 <= d["dropout"] < 1:
        raise ValueError(f"dropout {d['dropout']!r}")
    sizes = [*d["shape"], *(r for r in d["ranks"] if r is not None)]
    if len(d["shape"]) != len(d["ranks"]) or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(f"shape {d['shape']!r} of ranks {d['ranks']!r}")


def shapes_of(d: Mapping, probed: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of one parameter and their shapes; of a spectral adapter with a probe in place of its vectors."""
    if not is_spectral(d):
        core = tuple(s if r is None else r for s, r in zip(d["shape"], d["ranks"]))
        return {"core": core} | {f"factor{i}": (s, r) for i, (s, r) in enumerate(zip(d["shape"], d["ranks"]))
                                 if r is not None}
    *stack, m, n = matrices(d["shape"], d["stacked"])
    numbers = (*stack, d["rank"])
    if probed:
        return {"core": numbers, "probe": numbers}
    return {"core": numbers, "factor0": (*stack, m, d["rank"]), "factor1": (*stack, n, d["rank"])}


@torch.no_grad()
def filled(what: str, module: nn.Module, key: str, parameter: str, d: Mapping, config: Mapping,
           tensors: Mapping[str, Tensor]) -> TuckerFactors | SpectralFactors:
    """The factors that a file has of one parameter; vectors that it leaves out are those of the weight. Raises in the
    voice of `what` where they can't be."""
    base = module._parameters[parameter]
    device = home(module, base)
    device = torch.device("cpu") if device.type == "meta" else device
    if not is_spectral(d):
        part = new_factors(d["shape"], d["ranks"], d["scale"], d["dropout"], base, device, config.get("train"))
    elif "probe" in tensors:
        part = _again(what, module, key, parameter, d, tensors["probe"])
    else:
        part = SpectralFactors(d["shape"], d["stacked"], d["rank"], device, wide_dtype(base.dtype), d["determined"])
    for n, p in part.named_parameters():
        if n in tensors:
            p.copy_(tensors[n])
    return part


def _again(what, module, key, parameter, d, probe) -> SpectralFactors:
    """The vectors of the layer's other adapters, or of its weight, if they are those that the probe is of."""
    for part in _others(module, parameter):
        if (part.shape, part.stacked, part.rank) == (tuple(d["shape"]), d["stacked"], d["rank"]) and _same(part, probe):
            new = SpectralFactors(part.shape, part.stacked, part.rank, part.core.device, part.core.dtype,
                                  d["determined"])
            new.factor0.copy_(part.factor0)
            new.factor1.copy_(part.factor1)
            return new
    part = spectral(what, key, module, parameter, d["rank"])
    if not _same(part, probe):
        raise ValueError(f"{what} does not fit the model: the singular vectors of {key}.{parameter} are others than "
                         "those it was trained with, being those of another base model, or of another precision of "
                         "it; a file of SpectralConfig(save_vectors=True) has its own")
    return part


def _others(module, parameter) -> list[SpectralFactors]:
    parts = [p[parameter] for p in module.tucker.values() if parameter in p] if isinstance(module, Adapted) else []
    return [p for p in parts if isinstance(p, SpectralFactors) and not is_sharded(p.factor0) and not p.factor0.is_meta]


def _same(part: SpectralFactors, probe: Tensor) -> bool:
    return bool(((part.probe().cpu() - probe.cpu().float()).abs() <= PROBED).all())
