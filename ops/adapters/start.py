"""How the factors beside a parameter start."""
from __future__ import annotations

import torch
from torch import nn

from ..common import wide_dtype
from .adapted import is_packed, unpacked
from .config import init_change
from .factors import TuckerFactors
from .parameters import is_stacked, modes_of, shape_of
from .placed import home, is_sharded, values_of
from .spectral import SpectralFactors, spectral_factors


def new_factors(shape, ranks, scale, dropout, base, device=None, train="all") -> TuckerFactors:
    """Factors beside the parameter `base`, not yet filled; `train` as in the config."""
    part = TuckerFactors(shape, ranks, scale, dropout, device or base.device, wide_dtype(base.dtype))
    part.core_only = train == "core"
    return part


def started(function: str, key: str, module: nn.Module, parameter: str, ranks, scale: float,
            config) -> TuckerFactors | SpectralFactors:
    """Factors of one parameter of the module `key`, as `config` has them start; raises in `function`'s voice."""
    if config.kind == "spectral":
        return spectral(function, key, module, parameter, ranks)
    base, values, shape = module._parameters[parameter], values_of(module, parameter), shape_of(module, parameter)
    if config.init == "svd" and (is_packed(base) or values.is_meta):
        why = "on the meta device" if values.is_meta else "packed"
        raise ValueError(f'{function}: init="svd" needs the {parameter} of {key!r}, which is {why}')
    if config.init == "svd" and not values.isfinite().all():
        raise ValueError(f'{function}: init="svd" needs the {parameter} of {key!r} finite, and it holds NaN or '
                         "infinity")
    part = new_factors(shape, ranks, scale, config.dropout, base, home(module, base), config.train)
    row = padding_row(module) if parameter == "weight" and part.factors[0] is not None else None
    part.start = config.init, modes_of(module, parameter), row
    init_change(part.core, part.factors, config.init, values.to(part.core.device), part.start[1])
    if row is not None:
        with torch.no_grad():
            part.factor0[row] = 0
    return part


def spectral(function: str, key: str, module: nn.Module, parameter: str, rank: int | float) -> SpectralFactors:
    """Singular vectors of one parameter of the module `key`; raises in `function`'s voice."""
    base, values = module._parameters[parameter], values_of(module, parameter)
    needs = f"{function}: singular vectors need the {parameter} of {key!r}"
    if values.is_meta:
        raise ValueError(f"{needs}, which is on the meta device")
    if is_sharded(values):
        values = values.full_tensor()
    elif is_packed(values):
        values = unpacked(values)
    if not values.isfinite().all():
        raise ValueError(f"{needs} finite, and it holds NaN or infinity")
    row = padding_row(module) if parameter == "weight" else None
    stacked = is_stacked(module, parameter) and base.dim() > 2
    return spectral_factors(values, shape_of(module, parameter), stacked, rank, home(module, base),
                            wide_dtype(base.dtype), row)


def padding_row(module) -> int | None:
    """The row of an embedding's change that stays zero."""
    return module.padding_idx if isinstance(module, nn.Embedding) else None
