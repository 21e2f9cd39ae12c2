"""What a read of an adapted weight hands out: base + ΔW, composed when something is computed with it.

dtype, device and sizes are known without. Nothing written into it would last, so that writing is refused; nor would
base + ΔW be what it was after a step, so that a read from before is refused unless it has been composed by then.
"""
from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..common import transformed
from ..tucker.tucker import tucker_compose

_KNOWN = {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size,
          Tensor.get_device, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__, torch.numel,
          torch.is_floating_point, torch.is_complex}
_KNOWN |= {getattr(Tensor, name).__get__ for name in (
    "dtype", "device", "shape", "ndim", "itemsize", "nbytes", "layout", "is_cpu", "is_cuda", "is_meta", "is_sparse",
    "is_quantized", "is_nested")}
_IN_PLACE = {"__setitem__", "__set__", *(f"__i{n}__" for n in (
    "add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"))}
# torch's fast paths take tensors of no other class
_FAST_PATHS = {f.__code__ for f in (nn.MultiheadAttention.forward, nn.TransformerEncoderLayer.forward,
                                    nn.TransformerEncoder.forward)}
_waiting: weakref.WeakValueDictionary[int, EffectiveWeight] = weakref.WeakValueDictionary()


def effective_weight(scale: float, core: Tensor, factors: Sequence[Tensor | None], base: Tensor) -> Tensor:
    """base + scale * core x_0 factors[0] ..., later; or at once for what traces or transforms, and for torch's fast
    paths (the caller's caller)."""
    modes = [i for i, f in enumerate(factors) if f is not None]

    def compose(base, core, *some):
        whole = [None] * len(factors)
        for i, f in zip(modes, some, strict=True):
            whole[i] = f
        return tucker_compose(core, whole, scale=scale, base=base)

    parts = (base, core, *(factors[i] for i in modes))
    if torch.compiler.is_compiling() or transformed() or sys._getframe(2).f_code in _FAST_PATHS:
        return compose(*parts)
    if torch.is_grad_enabled() and any(t.requires_grad for t in parts):
        return _Read.apply(compose, *parts)
    return EffectiveWeight(base, compose=compose, parts=parts)


class _Read(torch.autograd.Function):
    """For those who take the tensor past __torch_function__, as other Functions do: the node of its gradient."""

    @staticmethod
    def forward(ctx, compose, *parts):
        ctx.compose = compose
        ctx.save_for_backward(*parts)
        return EffectiveWeight(parts[0], compose=compose, parts=parts, grad=True)

    @staticmethod
    def backward(ctx, dweight):
        wanted, create = ctx.needs_input_grad[1:], torch.is_grad_enabled()
        with torch.enable_grad():
            parts = [t.view_as(t) for t in ctx.saved_tensors]  # a name each, should one depend on another
            weight = ctx.compose(*parts)
        some = torch.autograd.grad(weight, [t for t, want in zip(parts, wanted) if want], dweight, create_graph=create)
        some = iter(some)
        return None, *(next(some) if want else None for want in wanted)


class EffectiveWeight(Tensor):
    """A tensor of what `compose` makes of `parts`; or `value` itself, which it only guards."""

    @staticmethod
    def __new__(cls, like, compose=None, parts=(), value=None, grad=False):
        self = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        self._value, self._compose, self._parts = value, compose, parts
        self._versions = [_version(t) for t in parts]
        self._modes = grad, torch.is_inference_mode_enabled()
        if value is None:
            _waiting[id(self)] = self
        return self

    def composed(self) -> Tensor:
        """With the gradients that were on when it was read."""
        if self._value is None:
            grad, inference = self._modes
            with torch.inference_mode(inference), torch.set_grad_enabled(grad), _no_hooks():
                self._value = self._made()
            self._compose, self._parts, self._versions = None, (), []
            _waiting.pop(id(self), None)
        return self._value

    def _made(self) -> Tensor:
        if self._versions != [_version(t) for t in self._parts]:
            raise RuntimeError("adapted layer: its weight has changed since this was read (a step, a load): read it "
                               "again, or keep `weight.clone()`")
        return self._compose(*self._parts)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        guard = args[0] if args and isinstance(args[0], EffectiveWeight) and args[0]._value is not None else None
        if func == Tensor.requires_grad.__set__ and guard is not None and guard._value.is_leaf:
            return func(guard._value, *args[1:])  # of what was detached, as checkpoints do
        if func in _KNOWN or (func == Tensor.requires_grad.__get__ and guard is None):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]
        if _writes(name, args, kwargs):
            what = f"{func.__self__.__name__} = …" if name == "__set__" else name
            raise RuntimeError(f"adapted layer: {what} would write into base + change, which is made anew at every "
                               "read, and be lost: write while the adapters are disabled or after merge_and_unload, or "
                               "into `weight.clone()`")
        given = []
        args, kwargs = (_plain(a, lambda w: given.append(w.composed()) or given[-1]) for a in (args, kwargs))
        return _guarded(func(*args, **kwargs), given)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Below autograd, for those who take it past __torch_function__."""
        if func._schema.is_mutable:
            raise RuntimeError(f"adapted layer: {func} would write into base + change, and be lost")
        args, kwargs = (_plain(a, lambda w: w._made() if w._value is None else w._value.detach())
                        for a in (args, kwargs or {}))
        return func(*args, **kwargs)


def _no_hooks():
    """What is saved for the backward here belongs to the read, not to a checkpoint around what computes first."""
    if not torch.compiler.is_compiling() and torch._C._autograd._saved_tensors_hooks_is_enabled():
        return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    return contextlib.nullcontext()


def compose_waiting() -> None:
    """Compose what has been read and not yet been computed with, before weights change."""
    for weight in list(_waiting.values()):
        weight.composed()


def _version(t) -> int | None:
    return None if t.is_inference() else t._version


def _writes(name, args, kwargs) -> bool:
    """Does the function write into a weight of ours? In place into its first argument, or by out=."""
    given = [kwargs.get("out")]
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        given += list(args[:1] or kwargs.values())
    return any(isinstance(t, EffectiveWeight) for g in given for t in (g if isinstance(g, (list, tuple)) else [g]))


def _plain(value, plain):
    """The arguments with `plain` of each weight of ours."""
    if isinstance(value, EffectiveWeight):
        return plain(value)
    if type(value) in (list, tuple):
        return type(value)(_plain(v, plain) for v in value)
    return {k: _plain(v, plain) for k, v in value.items()} if type(value) is dict else value


def _guarded(result, given):
    """Views of a composed weight are guarded as it is."""
    if type(result) in (list, tuple):
        return type(result)(_guarded(r, given) for r in result)
    if type(result) is Tensor and any(_share(result, t) for t in given):
        return EffectiveWeight(result, value=result)
    return result


def _share(a, b) -> bool:
    try:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # inside a transform tensors have no storage
        return False


def check_assigned(layer, name: str, param: nn.Parameter | None) -> None:
    """Raises unless `layer.name = param` can be the base of its adapters from now on."""
    base = layer._parameters.get(name)
    if param is base:
        return
    if layer.tucker_terms(name):
        raise RuntimeError(f"adapted layer: {name} = … while an adapter is active: what is made of base + change would "
                           "have the change in it twice. Assign inside `with disabled(model)`, or after "
                           "merge_and_unload")
    if base is not None and (param is None or param.shape != base.shape):
        got = None if param is None else tuple(param.shape)
        raise ValueError(f"adapted layer: {name} must stay {tuple(base.shape)}, got {got}")
    if layer.tucker_merged is not None and name in layer.tucker_merged:
        layer.tucker_merged[name] = None  # there is no way back
