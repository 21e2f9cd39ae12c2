"""What every op's wrapper asks for: dtypes, autocast, transforms. Importing it registers torch.ops.torch_subspace."""

from __future__ import annotations

import contextlib
import importlib
import math
import numbers
import operator
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import library  # noqa: F401  (registers torch.ops.torch_subspace)

WIDE = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*WIDE, *HALF)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in: float64 for itself, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def over_largest(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """x over its largest entry along `dim`, so that its squares neither overflow nor vanish; zeros stay zeros. For what
    does not depend on the unit: the divisor is a constant to all derivatives."""
    largest = x.detach().abs().amax(dim, keepdim=True)
    return x / torch.where(largest == 0, 1, largest)


def unit(x: Tensor) -> Tensor:
    """Rows over their lengths, whatever their unit. Rows of zeros stay, and so does their gradient, where
    torch.nn.functional.normalize has one of 1e12 and leaves rows shorter than 1e-12 short."""
    x = over_largest(x)
    square = x.square().sum(-1, keepdim=True)
    return x * square.masked_fill(square == 0, torch.inf).rsqrt()


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast the tensors as a linear layer or a convolution would get them; the first one's device decides.

    float64 is left alone, as everywhere in torch; None stays None, and what is no tensor is for the caller's checks.
    """
    x = tensors[0]
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
                 for t in tensors)


def weight_for(x: Tensor, weight: Tensor) -> Tensor:
    """Frames of float32 meet a batch of halves as under autocast."""
    halves = isinstance(x, Tensor) and x.dtype in HALF and weight.dtype == torch.float32
    return weight.to(x.dtype) if halves else weight


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast on x's device, for products whose digits matter."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def transformed() -> bool:
    """Where an op registered from outside torch cannot take part, and the plain formula serves: inside torch.func's
    transforms and forward-mode AD (its tangent would silently be zero), and in a trace or an ONNX graph, which others
    are to run."""
    if torch.compiler.is_compiling():
        return exporting() and torch.onnx.is_in_onnx_export()
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return torch.autograd.forward_ad._current_level >= 0


def exporting() -> bool:
    """In torch.export, whose programs others are to run too: heads and adapters, which predict, are plain formulas."""
    return torch.compiler._is_exporting_flag  # is_exporting() is true in all that torch 2.11 compiles


# What numbers may be: from, to, in words.
_LARGEST, _SMALLEST = sys.float_info.max, math.ulp(0.0)
FINITE = (-_LARGEST, _LARGEST, "a finite number")
POSITIVE = (_SMALLEST, _LARGEST, "positive and finite")
NOT_NEGATIVE = (0, _LARGEST, "finite and >= 0")
UP_TO_1 = (0, 1, "in [0, 1]")
BELOW_1 = (0, math.nextafter(1, 0), "in [0, 1)")


def told(value: object) -> str:
    """What a message says of a value of the wrong kind."""
    if isinstance(value, Tensor):
        kind = f"{value.layout}".removeprefix("torch.") + " " if value.layout is not torch.strided else ""
        return f"a {kind}tensor of {value.dtype}" if value.is_nested else (
            f"a {kind}tensor of {value.dtype} and shape {tuple(value.shape)}")
    words = " ".join(repr(value).split())
    words = words if len(words) <= 60 else words[:57] + "..."
    kind = type(value).__name__
    return words if value is None or isinstance(value, type) or words.startswith(kind) else f"{kind} {words}"


def check_number(name: str, what: str, value: object, interval: tuple[float, float, str] = FINITE) -> None:
    """Raises in `name`'s voice unless `what` is a real number in the interval; a bool or a tensor is none."""
    low, high, rule = interval
    if not isinstance(value, float) and (isinstance(value, bool) or not isinstance(value, _NUMBERS)):
        rule = rule if "number" in rule else f"a number, {rule}"
        error = ValueError if isinstance(value, Tensor) else TypeError  # a number, but not one of Python's
        raise error(f"{name}: {what} must be {rule}, got {told(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name}: {what} must be {rule}, got {value}")


_NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)


def check_rate(name: str, what: str, value: object, interval: tuple[float, float, str] = NOT_NEGATIVE) -> None:
    """Of an optimiser: a number, or a tensor with one."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TypeError(f"{name}: {what} must be a number or a tensor of one, got {told(value)}")
        if value.device.type != "cpu":
            return  # a look would wait for the device
        value = value.item()
    check_number(name, what, value, interval)


def check_betas(name: str, betas: object) -> None:
    """Of an optimiser: two rates below 1."""
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"{name}: betas must be two numbers, got {told(betas)}")
    for i, beta in enumerate(betas):
        check_rate(name, f"betas[{i}]", beta, BELOW_1)


def whole(name: str, what: str, value: Any, least: int = 0) -> int:
    """The value as an int; raises in `name`'s voice unless it is one of at least `least`. A bool or a float is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {what} must be an int, got {told(value)}") from None
    if not least <= number < 1 << 63:
        rule = f"must be >= {least}" if number < least else "is too large"
        raise ValueError(f"{name}: {what} {rule}, got {number}")
    return number


def check_flag(name: str, what: str, value: object) -> None:
    """Raises in `name`'s voice unless `what` is true or false, as a bool (numpy's too), 0 or 1: "False" is neither."""
    if value is True or value is False or isinstance(value, int):
        return
    if str(getattr(value, "dtype", None)) != "bool" or getattr(value, "ndim", 1) > 0:
        raise TypeError(f"{name}: {what} must be a bool, got {told(value)}")


def check_word(name: str, what: str, value: object, words: Iterable[str]) -> None:
    """Raises in `name`'s voice unless `what` is one of the words."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name}: {what} must be one of {', '.join(words)}, got {value!r}")


def check_module(name: str, model: object, what: str = "model") -> None:
    """Raises in `name`'s voice unless `what` is a module."""
    if not isinstance(model, torch.nn.Module):
        hint = ", a class: make one of it" if isinstance(model, type) else ""
        raise TypeError(f"{name}: {what} must be an nn.Module, got {told(model)}{hint}")


def reshard(module: torch.nn.Module) -> None:
    """fully_shard's parameters as they are between two forwards, whatever ran last; a forward may leave them gathered,
    and what is done to those is forgotten."""
    if "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized():
        module.state_dict()  # reshards, also what belongs to a module above this one


def check_device(name: str, device: torch.device | str | int | None) -> None:
    try:
        if device is not None:
            torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"{name}: device must be one of torch's, got {told(device)}") from error


def check_generator(name: str, generator: object) -> None:
    """Raises in `name`'s voice unless it is None or a generator of torch."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{name}: generator must be a torch.Generator or None, got {told(generator)}")


def check_group(name: str, group: object) -> None:
    """Raises in `name`'s voice unless it is None or a group of torch.distributed's processes."""
    if group is not None and not isinstance(group, getattr(torch.distributed, "ProcessGroup", ())):
        raise TypeError(f"{name}: process_group must be one of torch.distributed, or None, got {told(group)}")


def all_reduce(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The sum over a group's processes, of gradients too: the derivative of the sum of all processes' losses."""
    return _AllReduce.apply(x, group)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, dx):
        dx = dx.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(dx, group=ctx.group)
        return dx, None


def gather_rows(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """(..., n, d), or labels (n,), of a group's processes, in the order of their ranks; n may differ between them. The
    gradient is the derivative of the sum of all processes' losses."""
    return _Gather.apply(x, group) if x.dim() < 2 else _Gather.apply(x.movedim(-2, 0), group).movedim(0, -2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        dist = torch.distributed
        ctx.group, rank, world = group, dist.get_rank(group), dist.get_world_size(group)
        counts = x.new_zeros(world, dtype=torch.int64)
        counts[rank] = x.shape[0]
        dist.all_reduce(counts, group=group)
        counts = counts.tolist()
        ctx.begin, ctx.count = sum(counts[:rank]), counts[rank]
        whole = x.new_zeros(sum(counts), *x.shape[1:])  # parts may differ in size, which all_gather does not take
        whole[ctx.begin : ctx.begin + ctx.count] = x
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, dx):
        dx = dx.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(dx, group=ctx.group)
        return dx[ctx.begin : ctx.begin + ctx.count], None


def check_dense(name: str, what: str, t: object) -> None:
    """Raises in `name`'s voice unless `what` is a tensor with an entry in every place."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: {what} must be a tensor, got {told(t)}")
    if t.layout is not _STRIDED or t.is_nested:
        raise TypeError(f"{name}: {what} must be dense, got {'a nested tensor' if t.is_nested else t.layout}")


_STRIDED = torch.strided


def shares_memory(x: Tensor) -> bool:
    """Whether two elements are one. They aren't where each stride is larger than all that smaller ones reach together;
    of other strides, such as (3, 2), the places are counted. torch.compile can't sort: it looks for strides of 0."""
    if x.is_contiguous():
        return False
    if torch.compiler.is_compiling():
        return any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape))
    strides, reach = sorted((s, n) for s, n in zip(x.stride(), x.shape) if n > 1), 0
    if x.numel() == 0 or not strides:
        return False
    if strides[0][0] == 0:
        return True
    for s, n in strides:
        if s <= reach:
            break
        reach += s * (n - 1)
    else:
        return False
    places = sum(s * torch.arange(n, device="cpu").view(-1, *[1] * i) for i, (s, n) in enumerate(strides))
    return places.unique().numel() < places.numel()


def check_floating(name: str, what: str, t: object) -> None:
    """Raises in `name`'s voice unless `what` is a dense tensor of a dtype that the kernels read."""
    compiling = torch.compiler.is_compiling()  # a strict export asks no layouts in a backward
    if not isinstance(t, Tensor) or (not compiling and (t.layout is not _STRIDED or t.is_nested)):
        check_dense(name, what, t)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: {what} must be float32, float64, float16 or bfloat16, got {t.dtype}")


def plain_gradients(function, inputs: Sequence[Tensor | None], need: Sequence[bool], dy: Tensor) -> list[Tensor | None]:
    """Gradients of <dy, function(inputs)>, a plain formula, in the inputs that need them, as part of the graph."""
    inputs = [t if t is None else t.view_as(t) for t in inputs]  # a name each, should one depend on another
    asked = [t for t, wanted in zip(inputs, need) if wanted]
    grads = iter(torch.autograd.grad(function(*inputs), asked, dy, create_graph=True))
    return [next(grads) if wanted else None for wanted in need]


def second_derivative(function, dy: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]):
    """Gradients in dy and the inputs of <weights, the gradient of <dy, function(inputs)> in the inputs>.

    `function` is the op's plain formula. A weight of None, or of another shape (what an op returns for a gradient that
    was not asked for is empty), counts as zero. Where a graph is asked for, the gradients are part of it: third
    derivatives and all further ones are the plain formula's own.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: what dy or a weight owes to an input is no part of the derivative in that input
        leaves = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in (dy, *inputs)]
        first = torch.autograd.grad(function(*leaves[1:]), leaves[1:], leaves[0], create_graph=True, allow_unused=True)
        inner = sum((w * g).sum() for w, g in zip(weights, first)
                    if w is not None and g is not None and w.shape == g.shape)
        return torch.autograd.grad(inner, leaves, allow_unused=True, create_graph=again)


def lazy(family: str, files: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A family's `__getattr__` and `__dir__`: {name: its file}, imported on first use.

    A file may bear the name of a function: to users the name is the function, whatever was imported first.
    """
    module = sys.modules[family]

    class Family(types.ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            if name not in files or not isinstance(value, types.ModuleType):
                super().__setattr__(name, value)

    def getattribute(name: str) -> Any:
        if name in files:
            return getattr(importlib.import_module(f"{family}.{files[name]}"), name)
        raise AttributeError(f"module {family!r} has no attribute {name!r}")

    module.__class__ = Family
    return getattribute, lambda: sorted({*vars(module), *files})
