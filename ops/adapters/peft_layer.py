"""A layer with Tucker adapters in peft's manner: a wrapper with the layer inside as `base_layer`. See peft.py."""
from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from peft.tuners import tuners_utils
from torch import Tensor, nn

from ..common import HALF, check_number
from ..tucker.tucker import tucker_compose
from ..tucker.tucker_linear import tucker_linear
from .adapted import (
    CONVS,
    TRANSPOSED,
    fast_forward,
    is_conv1d_of_transformers,
    is_packed,
    own,
    unpacked,
)
from .factors import combined
from .hooks import has_hooks, inside_accelerate, inside_hooks, is_hooked_by_accelerate
from .merge import lost_in_rounding, stays_finite
from .placed import home, is_sharded, settle, several_processes, still_unchecked
from .replaced import watch
from .start import started
from .targets import weights_of
from .weight import effective_weight


class TuckerLayer(nn.Module, tuners_utils.BaseTunerLayer):
    """A layer with Tucker adapters. `tucker_parts[adapter]` has the core and the factors, `scaling[adapter]` the scale.

    Reads of what the wrapper lacks go to the layer inside; `weight` has the active adapters' change in it.

    Example:
        >>> import peft
        >>> from torch_subspace.peft import TuckerConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> model = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["0"]))
        >>> from torch_subspace.peft import TuckerLayer
        >>> layer = model.base_model.model[0]
        >>> isinstance(layer, TuckerLayer), layer.scaling
        (True, {'default': 1.0})
    """

    adapter_layer_names = ("tucker_parts",)
    other_param_names = ("scaling", "config_scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, key: str, *parameters):
        super().__init__()
        self.base_layer = base_layer
        self.tucker_parts = nn.ModuleDict()
        self.scaling, self.config_scaling = {}, {}
        self.merged_adapters, self._original = [], []  # the weight of before a merge; in a list, as it is no parameter
        self._disable_adapters, self._active_adapter, self._unchecked = False, adapter_name, False
        self.cast_input_dtype_enabled = True  # peft's switch; the input is never cast here
        self._fast = fast_forward(base_layer)
        watch()
        self.update_layer(adapter_name, config, key, *parameters)

    def update_layer(self, adapter_name: str, config, key: str) -> None:
        ranks, scale = config.layer(key, weights_of(self.base_layer)["weight"])
        part = started("tucker", key, self.base_layer, "weight", ranks, 1.0, config)
        self.tucker_parts[adapter_name] = part.train(self.training)
        self.scaling[adapter_name] = self.config_scaling[adapter_name] = scale
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def changes(self, adapter_name: str) -> dict:
        """Core and factors of an adapter by the parameter that they change."""
        return {"weight": self.tucker_parts[adapter_name]}

    def before(self, parameter: str) -> Tensor:
        """The parameter as it is without adapters."""
        return self._original[0] if self._original else self.base_layer._parameters[parameter]

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None) -> None:
        part, weight = self.tucker_parts[adapter_name], self.base_layer._parameters["weight"]
        if device is None:
            device = home(self.base_layer, weight)
        if not any(p.is_meta for p in part.parameters()) and torch.device(device).type != "meta":
            part.to(device)  # core and factors stay wide beside a half-precision base

    def narrow(self, adapter_name: str) -> None:
        """Keep an adapter's tensors in the dtype of a half-precision base; they are computed with in float32 anyway."""
        dtype = self.base_layer._parameters[next(iter(self.changes(adapter_name)))].dtype
        for p in self.tucker_parts[adapter_name].parameters() if dtype in HALF else ():
            p.data = p.data.to(dtype)

    # The forward -----------------------------------------------------------------------------------------------------

    def _terms(self, adapter_names=None) -> list:
        if adapter_names is None:
            adapter_names = [] if self._disable_adapters or self.merged else self.active_adapters
        return [(self.scaling[name], self.tucker_parts[name]) for name in adapter_names if name in self.tucker_parts]

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:  # here and not in the forward: a parent may read the weight instead
            self.unmerge()
        super().enable_adapters(enabled)

    def forward(self, *args, **kwargs):
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self._unchecked and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._unchecked = still_unchecked("tucker", self.active_adapters, self.tucker_parts.parameters())
        base = self.base_layer
        if not self._terms():
            return base(*args, **kwargs)
        if has_hooks(base):
            return inside_hooks(base, self._changed, args, kwargs)
        return self._changed(*args, **kwargs)

    def _changed(self, *args, **kwargs):
        """What the base layer computes with base + change for a weight, but for its hooks."""
        base = self.base_layer
        compute = self._composed if self._fast is None else self._by_kernel
        if "Linear" in type(self).__name__ and is_packed(own(base, "weight")):
            compute = self._beside
        elif is_hooked_by_accelerate(base):
            return inside_accelerate(base, compute, args, kwargs)
        elif self._fast is not None and "forward" in base.__dict__:  # replaced after the adapter came
            compute = self._beside if isinstance(self, TuckerLinear) or isinstance(base, CONVS) else self._composed
        return compute(*args, **kwargs)

    def _by_kernel(self, *args, **kwargs):
        return self._fast(self.base_layer, *combined(self._terms()), *args, **kwargs)

    def _composed(self, *args, **kwargs):
        base = self.base_layer
        before = _put(base, {name: self._value(name, base=own(base, name)) for name in self._adapted()})
        try:
            return base.__dict__.get("_old_forward", base.forward)(*args, **kwargs)
        finally:
            for place, name, weight in before:
                place[name] = weight

    def _adapted(self) -> list[str]:
        """Parameters that have a change now."""
        return ["weight"]

    def _value(self, parameter: str, adapter_names=None, base: Tensor | None = None) -> Tensor:
        """The change of a parameter by these adapters, the active ones by default; on top of `base`."""
        scale, core, factors, _ = combined(self._terms(adapter_names))
        return tucker_compose(core, factors, scale=scale, base=base)

    def _beside(self, input):
        """The layer's own forward, where its weight is packed or comes within, and the change beside it."""
        scale, core, factors, dropout = combined(self._terms())
        y = self.base_layer.forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return y + self._change(input, scale, core, factors, dropout).to(y.dtype)

    def _change(self, input, scale, core, factors, dropout):
        if isinstance(self, TuckerConv):
            delta = tucker_compose(core, factors, scale=scale).to(input.dtype)
            return self.base_layer._conv_forward(F.dropout(input, dropout, self.training), delta, None)
        u, v = factors
        if is_conv1d_of_transformers(self.base_layer):
            (v, u), core = factors, core.t()
        return tucker_linear(input, None, None, core, u, v.t(), scale=scale, dropout=dropout, training=self.training)

    def set_adapter(self, *args, **kwargs) -> None:
        super().set_adapter(*args, **kwargs)
        self._freeze_factors()
        self._unchecked = several_processes()

    def set_requires_grad(self, *args, **kwargs) -> None:
        super().set_requires_grad(*args, **kwargs)
        self._freeze_factors()

    def _freeze_factors(self) -> None:
        """Those of adapters whose cores alone are trained: peft switches whatever parameters there are."""
        for part in self.tucker_parts.values():
            for name, p in part.named_parameters():
                if p.requires_grad and name not in part.trained():
                    p.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        base, terms = own(self.base_layer, "weight"), self._terms()
        if self._disable_adapters and self.merged:  # merged while disabled
            return self.before("weight")
        if not terms or is_sharded(base):  # fully_shard's storage between two forwards
            return base
        try:
            scale, core, factors, _ = combined(terms)
            whole = unpacked(base) if is_packed(base) else base
            return effective_weight(scale, core, factors, whole)
        except AttributeError as error:  # nn.Module would look further, and hand out the bare base
            raise RuntimeError(f"adapted layer: {error}") from error

    @property
    def in_features(self) -> int:
        """Channels that come in, of every kind of layer, as peft's layers say it; an embedding's are its rows."""
        return self._features()[0]

    @property
    def out_features(self) -> int:
        """Channels that go out, of every kind of layer."""
        return self._features()[1]

    def _features(self) -> tuple[int, int]:
        base = self.base_layer
        if isinstance(base, nn.Embedding):
            return base.num_embeddings, base.embedding_dim
        if isinstance(base, (*CONVS, *TRANSPOSED)):
            return base.in_channels, base.out_channels
        shape = weights_of(base)["weight"]
        return tuple(shape) if is_conv1d_of_transformers(base) else (shape[1], shape[0])

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_") or name == "weight":
                raise
            value = getattr(base, name, None)
            if value is None and not hasattr(base, name) or callable(value):
                raise
            return value

    def __repr__(self) -> str:
        return "tucker." + super().__repr__()

    # Into the weight and out again ------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        self._check_known("get_delta_weight", adapter_name)
        return self._value("weight", [adapter_name])

    def _check_known(self, function: str, adapter_name) -> None:
        if not isinstance(adapter_name, str) or adapter_name not in self.tucker_parts:
            raise ValueError(f"{function}: adapter_name: the layer has no adapter {adapter_name!r}, but "
                             f"{', '.join(self.tucker_parts)}")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return "Linear" in type(self).__name__

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put base + change in place of the weight: one rounding, whatever the number of adapters.

        The weight itself is kept for `unmerge`, and whoever shares it (tied embeddings) doesn't see the change.
        """
        names = [n for n in tuners_utils.check_adapters_to_merge(self, adapter_names) if n in self.tucker_parts]
        if not names:
            return
        before = self._original[0] if self._original else self.base_layer._parameters["weight"]
        check_mergeable(self.base_layer, "weight", before)
        merged = [*self.merged_adapters, *names]
        changed = self._value("weight", merged, before)
        check_finite(names, before, changed, safe_merge)
        half = before.dtype in HALF
        self._lost = lost_in_rounding(before, changed, self._value("weight", merged)) if half else 0.0
        self.base_layer.weight = nn.Parameter(changed, requires_grad=before.requires_grad)
        self._original[:] = [before]
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight of before back: the very same, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        before, now = self._original.pop(), self.base_layer._parameters["weight"]
        self.base_layer.weight = moved_along(before, now)
        self.merged_adapters.clear()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the change of an adapter `scale` times what its config says."""
        check_number("set_scale", "scale", scale)
        if isinstance(adapter, str) and adapter in self.scaling:
            self.scaling[adapter] = scale * self.config_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        check_number("scale_layer", "scale", scale)
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        if scale is not None:
            check_number("unscale_layer", "scale", scale)
            if scale == 0:
                raise ValueError("unscale_layer: scale must not be 0, which has no inverse, got 0")
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.config_scaling[name] if scale is None else self.scaling[name] / scale


def _put(module, tensors) -> list:
    """These in place of its parameters, and of the attributes that DataParallel's replicas have instead of them and
    FullyShardedDataParallel's modules on top; returns [(place, name, what was there)]."""
    before = [(place, name, place[name]) for name in tensors for place in (module._parameters, module.__dict__)
              if name in place]
    for place, name, _ in before:
        place[name] = tensors[name]
    return before


def check_mergeable(module, parameter: str, before: Tensor) -> None:
    settle("tucker", module)
    now = module._parameters[parameter]
    if is_sharded(now):
        raise ValueError("tucker: a weight under fully_shard can't be merged: it would be forgotten at the next "
                         "forward; save the adapter, and merge it into a plain model")
    if now.is_meta:
        raise ValueError("tucker: the weight is on the meta device, without values or offloaded, and can't take a "
                         "change; model.merge_adapter() brings offloaded ones")
    if is_packed(before):
        raise ValueError("tucker: a quantised weight can't take a change: merge into a model that is not quantised")


def check_finite(names, before: Tensor, changed: Tensor, safe_merge: bool) -> None:
    if not stays_finite(before, changed) or (safe_merge and not torch.isfinite(changed).all()):
        broken = ", ".join(names)  # in peft's words, for infinities too
        raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken")


def moved_along(before: nn.Parameter, now: Tensor) -> nn.Parameter:
    """What was kept beside `now`, where the model has been moved to meanwhile."""
    if (before.device, before.dtype) != (now.device, now.dtype):
        before.data = before.data.to(now.device, now.dtype)
    return before


class TuckerLinear(TuckerLayer):
    """Linear or transformers' Conv1D. peft finds adapted linear layers by the word in the class's name."""


class TuckerConv(TuckerLayer):
    """A convolution or transposed convolution."""


class TuckerEmbedding(TuckerLayer):
    """An embedding."""


def layer_kind(module) -> type[TuckerLayer] | None:
    if isinstance(module, nn.Linear) or is_conv1d_of_transformers(module):
        return TuckerLinear
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return TuckerConv
    return TuckerEmbedding if isinstance(module, nn.Embedding) else None
