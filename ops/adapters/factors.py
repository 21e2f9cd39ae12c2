"""Cores and factors of changes, and sums of them.

A change of a parameter is scale * core x_0 factor0 x_1 factor1 ..., the modes in the order of its dimensions.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import WIDE
from .config import init_change


class WideFactors(nn.Module):
    """Parameters of changes, wide also beside a half-precision base."""

    def _apply(self, fn, recurse=True):
        """model.half() and the like move them, and leave them wide; what leaves the meta device starts anew."""

        def wide(t):
            new = fn(t)
            return new if new.dtype in WIDE or not new.is_floating_point() else t.to(new.device)

        was_meta = any(p.is_meta for p in self._parameters.values() if p is not None)
        super()._apply(wide, recurse)
        if was_meta and not any(p.is_meta for p in self._parameters.values() if p is not None):
            self.reset_parameters()
        return self

    core_only = False  # whether the factors stay as they are

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that an optimiser is to get."""
        return {n: p for n, p in self.named_parameters() if not self.core_only or n.endswith("core")}

    def requires_grad_(self, requires_grad: bool = True):
        trained = self.trained()
        for name, p in self.named_parameters():
            p.requires_grad_(requires_grad and name in trained)
        return self


# init, modes of input and output, the row that stays zero; None for what starts from the weight
Start = tuple[str, tuple[int | None, int], int | None] | None


@torch.no_grad()
def restart(core: Tensor, factors: list[Tensor | None], start: Start) -> None:
    """No change, and factors as they start. "svd", which needs the base, as "lecun"."""
    if start is None:
        raise RuntimeError("adapted layer: singular vectors can't start anew off the meta device: put the adapter on "
                           "when the weights have values")
    init, modes, zero_row = start
    init_change(core, factors, "lecun" if init == "svd" else init, core, modes)
    if zero_row is not None:
        factors[0][zero_row] = 0


class TuckerFactors(WideFactors):
    """Core and factors of one parameter's change, scale * core x_0 factor0 x_1 factor1 ...

    A mode whose rank is None has the identity for a factor. `start` is how it begins, the change being zero. Calling it
    gives core and factors, so that hooks which bring and take parameters have their turn.
    """

    start: Start = ("lecun", (1, 0), None)

    def __init__(self, shape, ranks, scale: float, dropout: float, device, dtype):
        super().__init__()
        self.shape, self.scale, self.dropout = tuple(shape), float(scale), float(dropout)
        sizes = [d if r is None else r for d, r in zip(shape, ranks, strict=True)]
        self.core = nn.Parameter(torch.zeros(sizes, device=device, dtype=dtype))
        for i, (d, r) in enumerate(zip(shape, ranks, strict=True)):
            factor = None if r is None else nn.Parameter(torch.empty(d, r, device=device, dtype=dtype))
            self.register_parameter(f"factor{i}", factor)

    def forward(self) -> tuple[Tensor, list[Tensor | None]]:
        return self.core, self.factors

    @staticmethod
    def assembled(core: Tensor, factors: list[Tensor | None], shape) -> tuple[Tensor, list[Tensor | None]]:
        """Its tensors as a Tucker core and factors, which they are."""
        return core, factors

    def reset_parameters(self) -> None:
        restart(self.core, self.factors, self.start)

    @property
    def ranks(self) -> list[int | None]:
        return [None if f is None else f.shape[1] for f in self.factors]

    @property
    def factors(self) -> list[Tensor | None]:
        return [getattr(self, f"factor{i}") for i in range(len(self.shape))]

    def told_ranks(self) -> str:
        return " x ".join("full" if r is None else str(r) for r in self.ranks)

    def described(self) -> dict:
        """What a file says of it beside its tensors."""
        return {"shape": self.shape, "ranks": self.ranks, "scale": self.scale, "dropout": self.dropout}

    def for_file(self, weight: Tensor | None, config: Mapping) -> dict[str, Tensor]:
        """The tensors that a file needs."""
        return {n: p for n, p in self._parameters.items() if p is not None}

    def extra_repr(self) -> str:
        text = f"{self.shape}, ranks={self.ranks}, scale={self.scale:g}"
        return text + (f", dropout={self.dropout:g}" if self.dropout else "")


def combined(terms: list[tuple[float, TuckerFactors]]):
    """A weighted sum of changes as one: (scale, core, factors, dropout).

    Factors stand side by side and the cores on the diagonal of a larger one; modes that are the identity in every term
    stay so. The inputs see one dropout mask, at the largest rate of the terms.
    """
    cores, lists = zip(*(_wide(*t()) for _, t in terms))
    if len(terms) == 1:
        weight, t = terms[0]
        return weight * t.scale, cores[0], lists[0], t.dropout
    modes = range(len(terms[0][1].shape))
    shared = [all(factors[i] is None for factors in lists) for i in modes]
    factors = [None if shared[i] else torch.cat([core.new_ones(core.shape[i]).diag() if own[i] is None else own[i]
                                                 for core, own in zip(cores, lists)], 1) for i in modes]
    sizes = [cores[0].shape[i] if shared[i] else factors[i].shape[1] for i in modes]
    core, before = 0, [0] * len(sizes)
    for (weight, t), own in zip(terms, cores):
        pads = [0 if s else (b, size - b - r) for s, b, size, r in zip(shared, before, sizes, own.shape)]
        pads = [n for p in reversed(pads) for n in (p or (0, 0))]
        core = core + F.pad(weight * t.scale * own, pads)
        before = [b + r for b, r in zip(before, own.shape)]
    return 1.0, core, factors, max(t.dropout for _, t in terms)


def _wide(core: Tensor, factors: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """What is kept narrow, or made so for a forward by fully_shard, is computed with in float32 all the same."""
    if core.dtype in WIDE:
        return core, factors
    return core.float(), [None if f is None else f.float() for f in factors]
