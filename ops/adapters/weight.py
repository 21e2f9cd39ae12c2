"""What a read of an adapted weight hands out: base + ΔW, composed when something is computed with it.

dtype, device and sizes are known without. Nothing written into it would last, so that writing is refused; nor would
base + ΔW be what it was after a step, so that a read from before is refused unless it has been composed by then.
"""
from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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


def effective_weight(base: Tensor, parts: Sequence[Tensor], compose: Callable[[], Tensor]) -> Tensor:
    """`compose()` of base and parts, later; at once for a compiler and for torch's fast paths (the caller's caller)."""
    if torch.compiler.is_compiling() or sys._getframe(2).f_code in _FAST_PATHS:
        return compose()
    return EffectiveWeight(base, parts=(base, *parts), compose=compose)


class EffectiveWeight(Tensor):
    """A tensor of what `compose` makes of `parts`; or `value` itself, which only guards it."""

    @staticmethod
    def __new__(cls, like, parts=(), compose=None, value=None):
        self = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        self._value, self._compose, self._parts = value, compose, parts
        self._versions = [_version(t) for t in parts]
        self._modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if value is None:
            _waiting[id(self)] = self
        return self

    def composed(self) -> Tensor:
        if self._value is None:
            if self._versions != [_version(t) for t in self._parts]:
                raise RuntimeError("adapted layer: its weight has changed since this was read (a step, a load): read "
                                   "it again, or keep `weight.clone()`")
            grad, inference = self._modes
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                self._value = self._compose()
            self._compose, self._parts, self._versions = None, (), []
            _waiting.pop(id(self), None)
        return self._value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]
        if _writes(name, args, kwargs):
            what = f"{func.__self__.__name__} = …" if name == "__set__" else name
            raise RuntimeError(f"adapted layer: {what} would write into base + change, which is made anew at every "
                               "read, and be lost: write while the adapters are disabled, or after merge_and_unload")
        given = []
        args, kwargs = _plain(args, given), _plain(kwargs, given)
        return _guarded(func(*args, **kwargs), given)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"adapted layer: {func} takes its weight past __torch_function__: give it `weight.clone()`")


def settle() -> None:
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


def _plain(value, given):
    """The arguments with composed weights, which are also gathered in `given`."""
    if isinstance(value, EffectiveWeight):
        given.append(value.composed())
        return given[-1]
    if type(value) in (list, tuple):
        return type(value)(_plain(v, given) for v in value)
    return {k: _plain(v, given) for k, v in value.items()} if type(value) is dict else value


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
