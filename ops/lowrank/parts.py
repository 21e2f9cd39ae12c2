"""The parameters theta_0 of a random subspace: their parametrizations, what may be one, and what each is known by.

A parameter is known by two numbers. A sum of its entries, with weights from 1 to 2, is nearly the same after rounding
to another precision: a base that is loaded onto is compared by it. A sum of their bits, with odd weights modulo 2^64,
is the same for the same numbers alone, wherever and in whichever type they lie: it says what has changed since.
"""
from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..common import FLOATS, told

if TYPE_CHECKING:
    from .random_subspace import RandomSubspace

CHUNK = 1 << 20  # entries at a time


class Part(nn.Module):
    """A parameter's parametrization: theta_0's part as it stands there, and its part of P theta."""

    def __init__(self, of: RandomSubspace, name: str, begin: int) -> None:
        super().__init__()
        object.__setattr__(self, "of", of)  # which holds this one, and is no part of it
        self.name, self.begin = name, begin

    def forward(self, base: Tensor) -> Tensor:
        return self.moved(base, self.of._current())

    def moved(self, base: Tensor, step: Tensor) -> Tensor:
        part = step[self.begin : self.begin + base.numel()].view_as(base)
        return (base + part.to(base.device)).to(base.dtype)


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no copy of it has: torch puts the properties that read its tensors on
    the class, and takes them off there, for all that are of it."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls)(cls.__name__, cls.__bases__, members)


def parametrized(of: RandomSubspace, module: nn.Module, trained: dict[str, nn.Parameter]) -> list[str]:
    """Every use of each parameter, and the parameters frozen. Returns their names."""
    places = [(owner, key, p) for owner in module.modules() for key, p in owner._parameters.items()]
    begin = 0
    for name, p in trained.items():
        part = Part(of, name, begin)
        begin += p.numel()
        p.requires_grad_(False)
        for owner, key, q in places:
            if q is p:
                own_class(owner)
                parametrize.register_parametrization(owner, key, part, unsafe=True)
    return list(trained)


def own_chains(of: RandomSubspace, module: nn.Module) -> list[tuple[nn.Module, str, parametrize.ParametrizationList]]:
    """Where a module has parametrizations of this subspace: the owner, the parameter's key there, the chain."""
    return [(owner, key, chain) for owner in module.modules()
            for key, chain in getattr(owner, "parametrizations", {}).items()
            if any(isinstance(part, Part) and part.of is of for part in chain)]


def check_parameter(name: str, what: str, p: nn.Parameter) -> None:
    """Raises in `name`'s voice unless it can be moved."""
    if is_lazy(p):
        raise TypeError(f"{name}: {what} has no shape yet: run the module once before")
    if p.is_meta:
        raise TypeError(f"{name}: {what} is on the meta device: give the module its values before")
    if isinstance(p, DTensor):
        raise TypeError(f"{name}: {what} is sharded: wrap the module before it is")
    if p.layout is not torch.strided or p.dtype not in FLOATS:
        raise TypeError(f"{name}: {what} must be dense and float32, float64, float16 or bfloat16, got {told(p)}")


def check_memory(name: str, module: nn.Module) -> None:
    """Raises in `name`'s voice where a parameter to be moved has its numbers in another's memory: moved apart, they
    could not be merged."""
    begins: dict[int, tuple[str, nn.Parameter]] = {}
    for what, p in module.named_parameters():
        if type(p) is nn.Parameter and p.layout is torch.strided and p.numel() and not p.is_meta:
            other, q = begins.setdefault(p.data_ptr(), (what, p))
            if q is not p and (p.requires_grad or q.requires_grad):
                raise ValueError(f"{name}: {other} and {what} are two parameters in the same memory: make them one")


def check_dense_gradients(name: str, module: nn.Module) -> None:
    """Raises in `name`'s voice where a part makes sparse gradients, which no view of P theta takes."""
    for what, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad:
            raise TypeError(f"{name}: {what or type(part).__name__} makes sparse gradients: set its sparse=False")


class Running(threading.local):
    """Of this thread, P theta of the modules whose forward it is in, by their ids."""

    def __init__(self) -> None:
        self.steps: dict[int, Tensor | None] = {}


running = Running()


class Kept:
    """P theta, and what it was computed of. A copy has none: it has a graph, and can be made again."""

    at: tuple[nn.Parameter, tuple[Any, ...], Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: object) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


# ------------------------------------------------------------------------------------------------- what is known of it


class Known(NamedTuple):
    """A parameter's bits, None where they can't be read; the sum of its entries, and their length."""

    bits: int | None
    sum: float = math.nan
    length: float = math.nan


@torch.no_grad()
def known(p: Tensor) -> Known:
    p = p.full_tensor() if isinstance(p, DTensor) else p.detach()
    if p.is_meta or p.layout is not torch.strided or is_traceable_wrapper_subclass(p):
        return Known(None)
    numbers = (torch.view_as_real(p) if p.is_complex() else p).flatten()
    mixed, total, squares = 0, 0.0, 0.0
    for begin in range(0, len(numbers), CHUNK):
        part = numbers[begin : begin + CHUNK].double()
        place = torch.arange(begin, begin + len(part), device=part.device)
        mixed += int((part.view(torch.int64) * (2 * place + 1)).sum())
        total += float(part @ (1 + (place.double() * 0.6180339887498949).frac_()))
        squares += float(part @ part)
    return Known(mixed % (1 << 64), total, math.sqrt(squares))


CHANGED = -1  # among the dtypes of a state: the parameter is in the state itself


def code(dtype: torch.dtype) -> int:
    return FLOATS.index(dtype) if dtype in FLOATS else len(FLOATS)


def coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype in FLOATS else 0.0


def rounding(mark: int, dtype: torch.dtype) -> float:
    """How far two sums of one parameter may be apart, by its length: in the same precision it was perhaps drawn by
    other instructions, in another it was rounded."""
    there = FLOATS[mark] if 0 <= mark < len(FLOATS) else dtype
    if there != dtype:
        return 8 * max(coarseness(there), coarseness(dtype))
    return 1e-12 if dtype == torch.float64 else 1e-6
