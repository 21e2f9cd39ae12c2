"""Tucker composition: a weight's change from a small core and one factor for every dimension.

    out = base + scale * core x_0 factors[0] x_1 factors[1] ...         (x_i F: F times the tensor along dimension i)

FLoRA, arXiv 2405.14739. A chain of small products in the cheapest order, whose last one reads base and writes out
once; see cpu/tucker/tucker.c.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..common import (
    check_floating,
    check_number,
    exporting,
    second_derivative,
    shares_memory,
    told,
    transformed,
    wide_dtype,
)

_op = torch.ops.torch_subspace
_NAME = "tucker_compose"


def tucker_compose(core: Tensor, factors: Sequence[Tensor | None], *, scale: float = 1.0, base: Tensor | None = None,
                   out: Tensor | None = None) -> Tensor:
    """The tensor of a Tucker decomposition, times ``scale``, on top of ``base``.

    Args:
        core: (r_0, ..., r_{N-1}), of 2 to 6 dimensions.
        factors: N of (d_i, r_i), in the order of the weight's dimensions as torch stores them; None is the identity
            (d_i = r_i). Any sizes above 0, r_i > d_i too.
        scale: a number on the composed tensor.
        base: (d_0, ..., d_{N-1}), zero by default.
        out: where to write the result, base itself for instance; of base's dtype. Not for autograd.

    Returns:
        base + scale * composed, (d_0, ..., d_{N-1}), of base's dtype, or core's without a base; contiguous, or ``out``.
        Computed in float32, or float64 when core, a factor or base is of that, and rounded once.

    Differentiable in ``core``, ``factors`` and ``base`` any number of times; in forward mode and under torch.func by
    the plain formula. Gradients have the dtype of what they belong to. Autocast changes nothing here.

    Raises:
        TypeError: core, a factor, base or out is no floating tensor, or out's dtype is not base's.
        ValueError: shapes, devices or ``scale`` do not fit, or ``out`` is given where a gradient is wanted.

    Source: arXiv 2405.14739, section 3.

    Example:
        >>> core, u, v = torch.randn(2, 3), torch.randn(8, 2), torch.randn(6, 3)
        >>> torch.allclose(ts.tucker_compose(core, [u, v], scale=0.5), 0.5 * u @ core @ v.T, atol=1e-5)
        True
    """
    factors = as_factors(_NAME, factors)
    shape, wide = _check(core, factors, scale, base)
    if out is not None:
        return _into(core, factors, scale, base, out, shape, wide)
    if transformed() or exporting():
        return _eager(core, factors, scale, base, wide)
    if base is not None and wide == torch.float64 != base.dtype:  # a base that the kernel would not widen so far
        return (base.double() + tucker_compose(core, factors, scale=scale)).to(base.dtype)
    core_, factors = _widen(core, factors, wide)
    result = _op.tucker_compose(core_, factors, [] if base is None else [base], float(scale))
    return result if base is not None or core.dtype == wide else result.to(core.dtype)


def as_factors(name: str, factors: Sequence[Tensor | None]) -> list[Tensor | None]:
    if not isinstance(factors, Iterable) or isinstance(factors, (Tensor, str, set, Mapping)):
        raise TypeError(f"{name}: factors must be a sequence of tensors or None, got {told(factors)}")
    return list(factors)


def _into(core, factors, scale, base, out, shape, wide):
    _check_tensor("out", out, core)
    if out.shape != shape:
        raise ValueError(f"{_NAME}: out has shape {tuple(out.shape)}, the result {tuple(shape)}")
    if base is not None and out.dtype != base.dtype:
        raise TypeError(f"{_NAME}: out must have base's dtype, got {out.dtype} and {base.dtype}")
    given = [t for t in (core, base, *factors) if t is not None]
    if torch.is_grad_enabled() and (out.requires_grad or any(t.requires_grad for t in given)):
        raise ValueError(f"{_NAME}: out= does not record gradients; call it under torch.no_grad()")
    if shares_memory(out):
        raise ValueError(f"{_NAME}: out of strides {out.stride()} has elements that share memory")
    narrower = wide == torch.float64 != out.dtype
    if transformed() or narrower or not out.is_contiguous() or _overlaps(out, given, base):
        if base is None:  # one rounding, in out
            core = core.to(wide)
        return out.copy_(tucker_compose(core, factors, scale=scale, base=base))
    core, factors = _widen(core, factors, wide_dtype(out.dtype))
    _op.tucker_compose_out(core, factors, [] if base is None else [base], float(scale), out)
    if not torch.compiler.is_compiling():  # a kernel of the stable ABI does not count versions itself
        torch.autograd.graph.increment_version(out)
    return out


def _overlaps(out: Tensor, given: list[Tensor], base: Tensor | None) -> bool:
    """Does out share memory with what is read after it is written, or is it negative by a bit? base may be out itself,
    element by element."""
    if out.is_meta or torch.compiler.is_compiling():
        return False
    if out.is_neg():
        return True
    storage = out.untyped_storage().data_ptr()
    return any(t.untyped_storage().data_ptr() == storage and
               not (t is base and t.is_contiguous() and t.storage_offset() == out.storage_offset()) for t in given)


def _check(core: Tensor, factors: list[Tensor | None], scale: float,
           base: Tensor | None) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape of the result and the dtype to compute in."""
    _check_tensor("core", core, core)
    sizes = core.shape
    if not 2 <= len(sizes) <= 6:
        raise ValueError(f"{_NAME}: core must have 2 to 6 dimensions, got shape {tuple(sizes)}")
    if len(factors) != len(sizes):
        raise ValueError(f"{_NAME}: a core of {len(sizes)} dimensions needs as many factors, got {len(factors)}")
    check_number(_NAME, "scale", scale)
    double, shape = core.dtype == torch.float64, []
    for i, (f, r) in enumerate(zip(factors, sizes)):
        if f is None:
            d = r
        else:
            _check_tensor(f"factors[{i}]", f, core)
            if f.dim() != 2 or f.shape[1] != r:
                raise ValueError(f"{_NAME}: factors[{i}] must be (d, {r}) for core {tuple(sizes)}, "
                                 f"got {tuple(f.shape)}")
            d, double = f.shape[0], double or f.dtype == torch.float64
        if d == 0 or r == 0:
            raise ValueError(f"{_NAME}: dimension {i}: sizes must be above 0, got d={d}, r={r}")
        shape.append(d)
    if base is not None:
        _check_tensor("base", base, core)
        if base.shape != (shape := tuple(shape)):
            raise ValueError(f"{_NAME}: base has shape {tuple(base.shape)}, core and factors compose {shape}")
        double = double or base.dtype == torch.float64
    return tuple(shape), torch.float64 if double else torch.float32


def _check_tensor(what: str, t: Tensor, core: Tensor) -> None:
    check_floating(_NAME, what, t)
    if t.device != core.device:
        raise ValueError(f"{_NAME}: {what} is on {t.device}, core on {core.device}")


def _widen(core: Tensor, factors: list[Tensor | None], wide: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """What the op takes: all of the dtype to compute in, and a tensor without entries for the identity."""
    none = core.new_empty(0, dtype=wide) if any(f is None for f in factors) else None
    return (core if core.dtype == wide else core.to(wide),
            [none if f is None else f if f.dtype == wide else f.to(wide) for f in factors])


def _eager(core: Tensor, factors: Sequence[Tensor | None], scale: float, base: Tensor | None,
           wide: torch.dtype) -> Tensor:
    """The same in plain torch operations: for `transformed()`, and the second derivative."""
    result = core.to(wide)
    for i in reversed(range(len(factors))):
        if factors[i] is not None and factors[i].dim() == 2:
            result = torch.tensordot(factors[i].to(wide), result, dims=([1], [i])).movedim(0, i)
    result = scale * result
    if base is None:
        return result.to(core.dtype)
    return (base.to(wide) + result).to(base.dtype)


@torch.library.register_fake("torch_subspace::tucker_compose")
def _(core, factors, base, scale):
    shape = [f.shape[0] if f.dim() == 2 else r for f, r in zip(factors, core.shape)]
    return core.new_empty(shape, dtype=(base[0] if base else core).dtype)


@torch.library.register_fake("torch_subspace::tucker_compose_out")
def _(core, factors, base, scale, out):
    return None


@torch.library.register_fake("torch_subspace::tucker_compose_backward")
def _(dout, core, factors, scale, need):
    return core.new_empty(sum(t.numel() for i, t in enumerate((core, *factors)) if need >> i & 1))


def _setup(ctx, inputs, output):
    core, factors, base, ctx.scale = inputs
    ctx.save_for_backward(core, *factors)


def _backward(ctx, dout):
    needs_core, needs_factors, needs_base, _ = ctx.needs_input_grad
    core, *factors = ctx.saved_tensors
    wanted = [needs_core, *(n and f.dim() == 2 for n, f in zip(needs_factors, factors))]
    found = [None] * len(wanted)
    if any(wanted):
        need = sum(1 << i for i, w in enumerate(wanted) if w)
        flat = _op.tucker_compose_backward(dout, core, factors, ctx.scale, need)
        at = 0
        for i, t in enumerate((core, *factors)):
            if wanted[i]:
                found[i] = flat[at:at + t.numel()].view(t.shape)
                at += t.numel()
    return found[0], found[1:], [dout if n else None for n in needs_base], None


torch.library.register_autograd("torch_subspace::tucker_compose", _backward, setup_context=_setup)


def _setup_backward(ctx, inputs, output):
    dout, core, factors, ctx.scale, ctx.need = inputs
    ctx.save_for_backward(dout, core, *factors)


def _double_backward(ctx, dflat):
    dout, *inputs = ctx.saved_tensors
    wanted = [bool(ctx.need >> i & 1) for i in range(len(inputs))]
    parts = iter(dflat.split([t.numel() for t, w in zip(inputs, wanted) if w]))
    weights = [next(parts).view(t.shape) if w else None for t, w in zip(inputs, wanted)]
    dout, core, *factors = second_derivative(
        lambda core, *factors: _eager(core, factors, ctx.scale, None, core.dtype).to(dout.dtype), dout, inputs, weights)
    return dout, core, factors, None, None


torch.library.register_autograd("torch_subspace::tucker_compose_backward", _double_backward,
                                setup_context=_setup_backward)
