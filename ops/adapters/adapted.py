"""What an adapted layer is: the layer itself, in a subclass of its own class made on the fly.

The module object, its parameters and its state_dict keys stay where they were; it gains a child `tucker` with the
factors, a fast forward for the standard layers, and a property in place of each adapted parameter. Whoever reads
`layer.weight`, be it nn.MultiheadAttention, a layer with a forward of its own or torch's fast paths, gets base + ΔW,
differentiable in the factors; so an adapter can't be ignored by accident. Removing the last adapter gives the module
its old class back.
"""
from __future__ import annotations

import contextlib
import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import FLOATS
from ..tucker.tucker_conv import tucker_conv
from ..tucker.tucker_linear import tucker_linear
from .factors import TuckerFactors, combined
from .forms import composed_linear, is_composed
from .placed import is_sharded, read_by_a_mover, still_unchecked
from .weight import EffectiveWeight, check_assigned, effective_weight

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# not of a layer: see state.py
MODEL_NOTES = ("tucker_configs", "tucker_trainable", "tucker_places", "tucker_saved", "tucker_live")
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def own(layer, name: str) -> Tensor | None:
    """The layer's parameter itself; DataParallel's replicas have plain tensors instead, as attributes."""
    found = layer._parameters.get(name)
    return layer.__dict__.get(name) if found is None else found


# ---------------------------------------------------------------------------------------------------------------------
# Fast forwards of the standard layers, each (layer, scale, core, factors, dropout, the layer's own arguments)
# ---------------------------------------------------------------------------------------------------------------------


def _linear(layer, scale, core, factors, dropout, input):
    (u, v), weight = factors, own(layer, "weight")
    if is_composed(input, weight, core, factors, dropout and layer.training):
        return composed_linear(input, weight, layer.bias, core, factors, scale)
    return tucker_linear(input, weight, layer.bias, core, u, v.t(), scale=scale, dropout=dropout,
                         training=layer.training)


def _conv1d_of_transformers(layer, scale, core, factors, dropout, x):
    v, u = factors  # its weight is (in, out)
    return tucker_linear(x, own(layer, "weight").t(), layer.bias, core.t(), u, v.t(), scale=scale, dropout=dropout,
                         training=layer.training)


def _packed_linear(layer, scale, core, factors, dropout, input):
    u, v = factors  # its own forward, which may have been replaced on the object, and the change beside it
    with packed_as_it_is(layer):
        y = super(Adapted, layer).forward(input) if layer.tucker_forward is None else layer.tucker_forward(input)
    with torch.autocast(input.device.type, enabled=False):
        return y + tucker_linear(input, None, None, core, u, v.t(), scale=scale, dropout=dropout,
                                 training=layer.training).to(y.dtype)


def form_of(layer) -> str:
    """The form of a convolution's change that is asked for, if one is."""
    return getattr(layer, "tucker_form", "auto")


def _conv(layer, scale, core, factors, dropout, input):
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input, padding = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return tucker_conv(input, own(layer, "weight"), layer.bias, core, factors, scale=scale, stride=layer.stride,
                       padding=padding, dilation=layer.dilation, groups=layer.groups, form=form_of(layer),
                       dropout=dropout, training=layer.training)


def _transposed(layer, scale, core, factors, dropout, input, output_size=None):
    output_padding = layer._output_padding(input, output_size, layer.stride, layer.padding, layer.kernel_size,
                                           len(layer.kernel_size), layer.dilation)
    return tucker_conv(input, own(layer, "weight"), layer.bias, core, factors, scale=scale, stride=layer.stride,
                       padding=layer.padding, dilation=layer.dilation, groups=layer.groups, transposed=True,
                       output_padding=output_padding, form=form_of(layer), dropout=dropout,
                       training=layer.training)


def _embedding(layer, scale, core, factors, dropout, input):
    u, v = factors  # rows of the change: picked from u, then through the core
    y = F.embedding(input, own(layer, "weight"), layer.padding_idx)
    rows = F.embedding(input, u, layer.padding_idx)
    with torch.autocast(y.device.type, enabled=False):
        change = scale * rows @ (core @ v.t())
    if layer.scale_grad_by_freq:  # the gradient of a row is divided by how often it was picked
        share = torch.bincount(input.flatten(), minlength=len(u))[input].reciprocal()[..., None].to(change.dtype)
        change = share * change + ((1 - share) * change).detach()
    return y + change.to(y.dtype)


def _is_their_conv1d(cls) -> bool:
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def is_conv1d_of_transformers(module) -> bool:
    return any(map(_is_their_conv1d, type(module).__mro__))


@contextlib.contextmanager
def packed_as_it_is(layer):
    """The layer's own methods see its parameters as they are, packed ones say; everyone else base + change."""
    before, layer.tucker_inside = layer.tucker_inside, True
    try:
        yield
    finally:
        layer.tucker_inside = before


def unpacked(weight) -> Tensor:
    """A packed weight as a matrix of floats, by the library that packed it."""
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes, 4 bits
        import bitsandbytes.functional

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if getattr(weight, "SCB", None) is not None:  # bitsandbytes, 8 bits: rows of int8 and their largest values
        return weight.data.to(torch.float32) * (weight.SCB / 127)[:, None]
    if type(weight.data) is Tensor and weight.is_floating_point():  # float8
        return weight.float()
    try:
        return weight.dequantize()
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise RuntimeError(f"adapt: a parent reads a packed weight ({type(weight).__name__}) that can't be unpacked; "
                           "exclude its layer") from error


def is_packed(weight) -> bool:
    """A quantised weight: a tensor subclass or a parameter of integers or of float8, which only its own layer can
    multiply by."""
    plain = type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor
    return not plain or not weight.is_floating_point() or weight.dtype not in FLOATS


def _own(module, base) -> bool:
    """Does the module compute by the methods of `base`, not by a forward of its own?"""
    cls = original_class(module)
    names = ("forward", "_conv_forward") if base in CONVS else ("forward",)
    return issubclass(cls, base) and all(getattr(cls, n) is getattr(base, n) for n in names)


def _is_of_class(module, method) -> bool:
    return getattr(method, "__func__", None) in (type(module).forward, Adapted.forward)


def _is_wrapped(module) -> bool:
    """Is the forward on the object that of its class, or accelerate's around it?"""
    inner = module.__dict__.get("_old_forward") if "_hf_hook" in module.__dict__ else module.__dict__["forward"]
    return _is_of_class(module, inner)


def fast_forward(module):
    """The fast forward of a standard layer; None for one that computes in its own way, through its `weight`."""
    if isinstance(module, nn.Linear) and is_packed(module._parameters["weight"]):
        return _packed_linear
    if "forward" in module.__dict__ and not _is_wrapped(module):  # replaced on the object
        return None
    kinds = ((_linear, (nn.Linear,)), (_conv, CONVS), (_transposed, TRANSPOSED), (_embedding, (nn.Embedding,)))
    for fast, bases in kinds:
        if any(_own(module, b) for b in bases):
            return fast
    theirs = next((c for c in original_class(module).__mro__ if _is_their_conv1d(c)), None)
    if theirs and _own(module, theirs) and module._parameters.get("bias") is not None:
        return _conv1d_of_transformers
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The class an adapted layer has
# ---------------------------------------------------------------------------------------------------------------------


class _Kept(threading.local):
    """What this thread has composed for the layers whose forward it is in, {id(layer): (saving, {key: weight})}."""

    def __init__(self):
        self.of = {}


_kept = _Kept()


def _saving():
    """Who takes what autograd saves: a checkpointed region runs again by itself, so it has to compose for itself."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@contextlib.contextmanager
def _composed_once(layer):
    """A parameter that the layer's own forward reads several times, as a loop over experts does, is composed once."""
    if id(layer) in _kept.of:
        yield
        return
    _kept.of[id(layer)] = _saving(), {}
    try:
        yield
    finally:
        del _kept.of[id(layer)]


class Adapted:
    """Mixed into the class of an adapted layer. `tucker[name][parameter]` are its `TuckerFactors`.

    While an adapter is active, `layer.weight` can be neither written into nor assigned to: write inside `disabled`.
    What replaces a weight by one made of it (quantising, pruning, fusing) belongs before `adapt` or after a merge:
    else it would take the change in. `model.get_parameter` meets the property; `named_parameters()` has the parameters.
    """

    tucker_form = "auto"  # of convolutions: "chain" or "composed" force one

    def tucker_terms(self, parameter: str) -> list[tuple[float, TuckerFactors]]:
        """The changes that are to be seen now, with their weights."""
        if self.tucker_unchecked and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.tucker_unchecked = still_unchecked("set_adapter", self.tucker_active, self.tucker.parameters())
        if not self.tucker_enabled or self.tucker_merged is not None:
            return []
        return [(weight, self.tucker[name][parameter]) for name, weight in self.tucker_active.items()
                if name in self.tucker and parameter in self.tucker[name]]

    def forward(self, *args, **kwargs):
        if not isinstance(self, Adapted):  # a hook has kept the method of a layer that is plain again
            return type(self).forward(self, *args, **kwargs)
        fast = self.tucker_fast
        terms = self.tucker_terms("weight") if fast is not None else []
        if not terms:
            if torch.compiler.is_compiling():  # equal nodes of a graph are one
                return super().forward(*args, **kwargs)
            with _composed_once(self):
                return super().forward(*args, **kwargs)
        return fast(self, *combined(terms), *args, **kwargs)

    def register_parameter(self, name, param):
        if isinstance(param, EffectiveWeight):
            raise RuntimeError(f"adapted layer: {name} = base + change, which is no parameter: prune and the like "
                               "belong before `adapt` or after merge_and_unload")
        if name in adapted_names(self) and is_sharded(param) and not is_sharded(own(self, name)):
            raise RuntimeError(f"adapted layer: {name} = a DTensor: parallelize_module and distribute_module can't "
                               "have a layer with an adapter: fully_shard can, or merge_and_unload first")
        if name in adapted_names(self) and not self.tucker_inside and not read_by_a_mover(3):  # past __setattr__
            check_assigned(self, name, param)
        super().register_parameter(name, param)

    def __delattr__(self, name):
        if name in adapted_names(self) and name in self._parameters and not read_by_a_mover():
            raise RuntimeError(f"adapted layer: del {name}, the base of its adapters: spectral_norm and the like "
                               "belong before `adapt` or after merge_and_unload")
        super().__delattr__(name)

    def _save_to_state_dict(self, *args, **kwargs):
        with packed_as_it_is(self):
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        with packed_as_it_is(self):
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs):
        with packed_as_it_is(self):
            return super()._apply(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _rebuild, (original_class(self), adapted_names(self)), self.__getstate__()


def _kept_by(layer, name) -> tuple[dict, tuple]:
    """Where what is composed for this read may be kept, and under which key."""
    if torch.compiler.is_compiling() or id(layer) not in _kept.of:
        return {}, ()
    saving, weights = _kept.of[id(layer)]
    key = name, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return weights if saving == _saving() else {}, key


def _effective(name: str) -> property:
    def read(self):
        base = own(self, name)
        if base is None:
            raise AttributeError(f"{type(self).__name__!r} has no {name!r}")
        if not torch.compiler.is_compiling() and read_by_a_mover():
            return base
        terms = self.tucker_terms(name) if not self.tucker_inside else []
        if not terms:
            return base
        if is_sharded(base) and all(is_sharded(t.core) for _, t in terms):
            return base  # fully_shard's storage between two forwards; in a forward the tensors are whole
        try:
            kept, key = _kept_by(self, name)
            if key not in kept:
                scale, core, factors, _ = combined(terms)
                whole = unpacked(base) if self.tucker_packed or base.dtype not in FLOATS else base
                kept[key] = effective_weight(scale, core, factors, whole)
            return kept[key]
        except AttributeError as error:  # nn.Module would look further, and hand out the bare base
            raise RuntimeError(f"adapted layer: {error}") from error

    def write(self, value):  # of DataParallel's replicas and FullyShardedDataParallel, which have no parameters here
        self.__dict__[name] = value

    def delete(self):
        del self.__dict__[name]

    return property(read, write, delete, doc=f"The base `{name}` plus the change of the active adapters.")


def _on_the_base(name: str):
    """The layer's own method that fills its parameters, which fills those themselves, whatever adapter is active."""

    def method(self, *args, **kwargs):
        with packed_as_it_is(self):
            return getattr(super(Adapted, self), name)(*args, **kwargs)

    return method


@functools.cache
def _adapted_class(cls: type, names: tuple[str, ...]) -> type:
    members = {name: _effective(name) for name in names}
    members |= {n: _on_the_base(n) for n in ("reset_parameters", "_reset_parameters") if hasattr(cls, n)}
    members |= {"__module__": cls.__module__, "__doc__": cls.__doc__, "tucker_original": cls, "tucker_names": names}
    return type(f"Tucker{cls.__name__}", (Adapted, cls), members)


def _rebuild(cls: type, names: tuple[str, ...]):
    new = _adapted_class(cls, names)
    return new.__new__(new)


def original_class(module) -> type:
    return getattr(type(module), "tucker_original", type(module))


def adapted_names(module) -> tuple[str, ...]:
    return type(module).tucker_names


def become_adapted(module: nn.Module, names: tuple[str, ...]) -> None:
    """Give a plain layer the adapted class and no adapter yet; of an adapted one, let further parameters be adapted."""
    if isinstance(module, Adapted):
        module.__class__ = _adapted_class(original_class(module), tuple(dict.fromkeys(adapted_names(module) + names)))
        return
    module.tucker_packed = any(is_packed(module._parameters[name]) for name in names)  # once: export swaps tensors
    module.tucker_fast = fast_forward(module) if "weight" in names else None
    module.tucker_forward = module.__dict__.pop("forward", None) if module.tucker_packed else None
    kept = [k for k in ("forward", "_old_forward") if _is_of_class(module, module.__dict__.get(k))]
    module.__class__ = _adapted_class(type(module), names)
    for key in () if module.tucker_packed else kept:  # accelerate has these, also after its hook has gone
        setattr(module, key, module.__class__.forward.__get__(module))
    module.tucker = nn.ModuleDict()
    module.tucker_active, module.tucker_enabled, module.tucker_merged, module.tucker_inside = {}, True, None, False
    module.tucker_unchecked = False


def become_plain(module: nn.Module) -> None:
    """Undo `become_adapted`."""
    module.__class__ = original_class(module)
    if module.tucker_forward is not None:
        module.__dict__["forward"] = module.tucker_forward
    del module.tucker
    for key in [k for k in module.__dict__ if k.startswith("tucker_") and k not in MODEL_NOTES]:
        del module.__dict__[key]
