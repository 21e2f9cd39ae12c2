"""A layer with Tucker adapters in peft's manner: a wrapper with the layer inside as `base_layer`. See peft.py."""
from __future__ import annotations

import warnings

import torch
from peft.tuners import tuners_utils
from torch import Tensor, nn

from ..common import HALF
from ..tucker.tucker import tucker_compose
from ..tucker.tucker_linear import tucker_linear
from .adapt import new_factors
from .adapted import CONVS, TRANSPOSED, combined, fast_forward, is_conv1d_of_transformers, is_packed, unpacked
from .config import init_factors
from .targets import input_mode, weights_of


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
        self._disable_adapters, self._active_adapter = False, adapter_name
        self._fast = fast_forward(base_layer)
        self.update_layer(adapter_name, config, key, *parameters)

    def update_layer(self, adapter_name: str, config, key: str) -> None:
        base = self.base_layer
        weight, shape = base._parameters["weight"], weights_of(base)["weight"]
        if config.init == "svd" and is_packed(weight):
            raise ValueError(f'tucker: init="svd" needs the weight of {key!r}, which is packed')
        ranks, scale = config.layer(key, shape)
        part = new_factors(shape, ranks, 1.0, config.dropout, weight)
        init_factors(part.factors, config.init, weight, input_mode(base))
        if isinstance(base, nn.Embedding) and base.padding_idx is not None and part.factors[0] is not None:
            with torch.no_grad():
                part.factors[0][base.padding_idx] = 0  # the padding row never changes
        self.tucker_parts[adapter_name] = part.train(self.training)
        self.scaling[adapter_name] = self.config_scaling[adapter_name] = scale
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def changes(self, adapter_name: str) -> dict:
        """Core and factors of an adapter by the parameter that they change."""
        return {"weight": self.tucker_parts[adapter_name]}

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None) -> None:
        part, weight = self.tucker_parts[adapter_name], self.base_layer._parameters["weight"]
        if not any(p.is_meta for p in part.parameters()):  # core and factors stay wide beside a half-precision base
            part.to(weight.device if device is None else device)

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
        terms, base = self._terms(), self.base_layer
        if not terms:
            return base(*args, **kwargs)
        scale, core, factors, dropout = combined(terms)
        weight, linear = base._parameters["weight"], "Linear" in type(self).__name__
        if linear and (is_packed(weight) or hasattr(base, "_hf_hook")):
            return self._beside(scale, core, factors, dropout, *args, **kwargs)
        if self._fast is not None and not hasattr(base, "_hf_hook"):
            return self._fast(base, scale, core, factors, dropout, *args, **kwargs)
        changed = tucker_compose(core, factors, scale=scale, base=weight)
        return torch.func.functional_call(base, {"weight": changed}, args, kwargs)

    def _beside(self, scale, core, factors, dropout, input):
        """A linear layer whose weight is packed or elsewhere: its own forward, and the change beside it."""
        u, v = factors
        if is_conv1d_of_transformers(self.base_layer):
            (v, u), core = factors, core.mT
        y = self.base_layer(input)
        with torch.autocast(input.device.type, enabled=False):
            return y + tucker_linear(input, None, None, core, u, v.mT, scale=scale, dropout=dropout,
                                     training=self.training).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        base, terms = self.base_layer._parameters["weight"], self._terms()
        if self._disable_adapters and self.merged:  # merged while disabled
            return self._original[0]
        if not terms:
            return base
        try:
            scale, core, factors, _ = combined(terms)
            return tucker_compose(core, factors, scale=scale, base=unpacked(base) if is_packed(base) else base)
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
        scale, core, factors, _ = combined(self._terms([adapter_name]))
        return tucker_compose(core, factors, scale=scale)

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
        if is_packed(before):
            raise ValueError("tucker: a quantised weight can't take a change: merge into a model that is not quantised")
        scale, core, factors, _ = combined(self._terms([*self.merged_adapters, *names]))
        changed = tucker_compose(core, factors, scale=scale, base=before)
        if safe_merge and not torch.isfinite(changed).all():
            raise ValueError(f"tucker: merging {', '.join(names)} gives weights that are not finite; nothing is merged")
        self._lost = lost_in_rounding(before, changed, tucker_compose(core, factors, scale=scale))
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
        if (before.device, before.dtype) != (now.device, now.dtype):  # moved meanwhile
            before.data = before.data.to(now.device, now.dtype)
        self.base_layer.weight = before
        self.merged_adapters.clear()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the change of an adapter `scale` times what its config says."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.config_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.config_scaling[name] if scale is None else self.scaling[name] / scale


def lost_in_rounding(before, after, change) -> float:
    if before.dtype not in HALF:
        return 0.0
    size = torch.linalg.vector_norm(change)
    return float(torch.linalg.vector_norm(after.float() - before.float() - change) / size) if size > 0 else 0.0


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
