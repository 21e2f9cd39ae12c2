"""A module whose parameters have Tucker adapters, in peft's manner, by `target_parameters`. See parameters.py."""
from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence

import torch
from peft.tuners import tuners_utils
from torch import Tensor, nn

from ..common import HALF
from ..tucker.tucker import tucker_compose
from .adapted import own
from .config import close_names
from .factors import TuckerFactors, WideFactors, combined, restart
from .hooks import inside_accelerate, is_hooked_by_accelerate
from .merge import lost_in_rounding
from .parameters import full_name, is_stacked, parameter_refusal, shape_of
from .peft_layer import TuckerLayer, check_finite, check_mergeable, layer_kind, moved_along
from .placed import home, is_sharded
from .start import started
from .weight import effective_weight


@dataclasses.dataclass
class Change:
    """What `combined` takes: the core and the factors of one parameter's change; called, it gives both."""

    shape: tuple[int, ...]
    scale: float
    dropout: float
    core: Tensor
    factors: list[Tensor | None]

    def __call__(self) -> tuple[Tensor, list[Tensor | None]]:
        return self.core, self.factors


class ParameterFactors(WideFactors):
    """Cores and factors of several parameters, `<parameter>_core` and so on: peft's file format has one level of names
    below an adapter's."""

    def __init__(self, parts: dict[str, TuckerFactors]):
        super().__init__()
        self.about = {name: (part.shape, part.scale, part.dropout) for name, part in parts.items()}
        self.starts = {name: part.start for name, part in parts.items()}
        self.kinds = {name: type(part) for name, part in parts.items()}
        self.core_only = all(part.core_only for part in parts.values())
        for name, part in parts.items():
            for local, p in part._parameters.items():
                self.register_parameter(f"{name}_{local}", p)

    def changes(self) -> dict[str, Change]:
        return {name: Change(*about, *self.kinds[name].assembled(*self.tensors_of(name), about[0]))
                for name, about in self.about.items()}

    def tensors_of(self, name: str) -> tuple[Tensor, list[Tensor | None]]:
        """Core and factors as they are kept."""
        count = max(2, len(self.about[name][0]) if self.kinds[name] is TuckerFactors else 2)
        return own(self, f"{name}_core"), [own(self, f"{name}_factor{i}") for i in range(count)]

    def forward(self) -> dict[str, Change]:
        return self.changes()

    def reset_parameters(self) -> None:
        for name, start in self.starts.items():
            restart(*self.tensors_of(name), start)

    def extra_repr(self) -> str:
        return "\n".join(f"{n}: {c.shape}, ranks={[None if f is None else f.shape[1] for f in c.factors]}"
                         for n, c in self.changes().items())


class TuckerParameters(TuckerLayer):
    """A module with adapted parameters of its own; `tucker_parts[adapter]` has their cores and factors.

    Its forward runs with base + change in their place, composed once each, and whoever reads them here sees the same.
    `scaling[adapter]` is the scale where all its parameters have one, else a factor on the scales of each.
    """

    def update_layer(self, adapter_name: str, config, key: str, parameters: Sequence[str]) -> None:
        base, parts, scales = self.base_layer, {}, {}
        for name in parameters:
            names = full_name(key, name), key
            ranks, scales[name] = config.layer(names, shape_of(base, name), is_stacked(base, name))
            parts[name] = started("tucker", key, base, name, ranks, scales[name], config)
        one = len(set(scales.values())) == 1
        for part in parts.values():
            part.scale = 1.0 if one else part.scale
        self.tucker_parts[adapter_name] = ParameterFactors(parts).train(self.training)
        self.scaling[adapter_name] = self.config_scaling[adapter_name] = next(iter(scales.values())) if one else 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def changes(self, adapter_name: str) -> dict:
        return self.tucker_parts[adapter_name].changes()

    def before(self, parameter: str) -> Tensor:
        return dict(self._original).get(parameter, self.base_layer._parameters[parameter])

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None) -> None:
        part, base = self.tucker_parts[adapter_name], self.base_layer
        if device is None:
            device = home(base, base._parameters[next(iter(part.about))])
        if not any(p.is_meta for p in part.parameters()) and torch.device(device).type != "meta":
            part.to(device)

    def _parameter_terms(self, parameter: str, adapter_names=None) -> list:
        found = [(scale, part()) for scale, part in self._terms(adapter_names)]
        return [(scale, changes[parameter]) for scale, changes in found if parameter in changes]

    def _adapted(self, adapter_names=None) -> list[str]:
        """Parameters with a change in these adapters, the active ones by default."""
        return list(dict.fromkeys(p for _, part in self._terms(adapter_names) for p in part.about))

    def _value(self, parameter: str, adapter_names=None, base: Tensor | None = None) -> Tensor:
        scale, core, factors, _ = combined(self._parameter_terms(parameter, adapter_names))
        return tucker_compose(core, factors, scale=scale, base=base)

    def _changed(self, *args, **kwargs):
        base = self.base_layer
        if is_hooked_by_accelerate(base):
            return inside_accelerate(base, self._composed, args, kwargs)
        return self._composed(*args, **kwargs)

    def __getattr__(self, name: str):
        modules = self.__dict__.get("_modules", {})
        base = modules.get("base_layer")
        weight = own(base, name) if "tucker_parts" in modules and base is not None else None
        if isinstance(weight, Tensor):
            if self._disable_adapters and self.merged:  # merged while disabled
                return self.before(name)
            terms = self._parameter_terms(name)
            if not terms or is_sharded(weight):  # fully_shard's storage between two forwards
                return weight
            scale, core, factors, _ = combined(terms)
            return effective_weight(scale, core, factors, weight)
        return super().__getattr__(name)

    weight = property(lambda self: self.__getattr__("weight"))  # peft's layers have these two of their own
    bias = property(lambda self: self.__getattr__("bias"))
    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)

    def get_delta_weight(self, adapter_name: str, parameter: str | None = None) -> Tensor:
        """The change of a parameter; it need not be named where the adapter has but one."""
        self._check_known("get_delta_weight", adapter_name)
        found = list(self.changes(adapter_name))
        if parameter is None and len(found) == 1:
            parameter = found[0]
        if parameter not in found:
            raise ValueError(f"get_delta_weight: parameter must be one of {', '.join(found)}, got {parameter!r}")
        return self._value(parameter, [adapter_name])

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names) -> nn.Module:
        """The module without its adapters, and without those of layers in it."""
        for layer in [self, *(m for m in self.base_layer.modules() if isinstance(m, TuckerLayer))] if merge else []:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for parent in list(self.base_layer.modules()):
            for name, child in parent.named_children():
                if isinstance(child, TuckerLayer):
                    setattr(parent, name, child.get_base_layer())
        return self.get_base_layer()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put base + change in place of the parameters: one rounding, whatever the number of adapters."""
        names = [n for n in tuners_utils.check_adapters_to_merge(self, adapter_names) if n in self.tucker_parts]
        if not names:
            return
        base, before, changed, lost = self.base_layer, dict(self._original), {}, [0.0]
        for name in self._adapted([*self.merged_adapters, *names]):
            merged, weight = [*self.merged_adapters, *names], before.get(name, base._parameters[name])
            check_mergeable(base, name, weight)
            changed[name] = self._value(name, merged, weight)
            check_finite(names, weight, changed[name], safe_merge)
            before[name] = weight
            if weight.dtype in HALF:
                lost.append(lost_in_rounding(weight, changed[name], self._value(name, merged)))
        self._lost = max(lost)
        for name, weight in changed.items():
            setattr(base, name, nn.Parameter(weight, requires_grad=before[name].requires_grad))
        self._original[:] = before.items()
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the parameters of before back: the very same, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, before in self._original:
            setattr(self.base_layer, name, moved_along(before, self.base_layer._parameters[name]))
        self._original.clear()
        self.merged_adapters.clear()


class _Untied(dict):
    """For refusals: a shared parameter is no reason here, as nothing is ever written into it."""

    def __missing__(self, key):
        return []


UNTIED = _Untied()


def find_peft_parameters(model: nn.Module, targets: Iterable[str] | None) -> dict[str, tuple[str, list[str]]]:
    """{module: (its name without peft's wrappers, parameters)} that `target_parameters` means; ValueError where a name
    matches none, or one can't be adapted."""
    wrapped = [m for m in model.modules() if isinstance(m, TuckerLayer)]
    inner = {id(m) for layer in wrapped for m in (layer.base_layer, *layer.tucker_parts.modules())}
    found, used, names, places = {}, set(), [], {}
    for key, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(key)
    for key, module in model.named_modules():
        if id(module) in inner:
            continue
        plain = ".".join(part for part in key.split(".") if part != "base_layer")
        base = module.base_layer if isinstance(module, TuckerLayer) else module
        own = [n for n, p in base._parameters.items() if p is not None]
        for name in (*own, *getattr(base, "parametrizations", ())):
            full = full_name(plain, name)
            names.append(full)
            asked = [t for t in targets or () if full == t or full.endswith("." + t)]
            if asked:
                _check_place(key, module, base, name, full, places[id(module)])
                found.setdefault(key, (plain, []))[1].append(name)
            used.update(asked)
    unmatched = sorted(t for t in targets or () if t not in used)
    if unmatched:
        raise ValueError(f"tucker: no parameter matches target_parameters {', '.join(map(repr, unmatched))}"
                         f"{close_names(unmatched, names)}")
    for key, (plain, parameters) in found.items():
        module = model.get_submodule(key)
        if isinstance(module, TuckerLayer) and not isinstance(module, TuckerParameters) and parameters != ["weight"]:
            raise ValueError(f"tucker: {plain!r} is adapted as a layer already, so its parameters "
                             f"{', '.join(parameters)} can't be; leave it out of target_modules")
    return found


def _check_place(key, module, base, name, full, places) -> None:
    why = parameter_refusal(key, base, name, UNTIED)
    if not key:
        why = f"Targeting an nn.Parameter on the top-level module is not supported (parameter {name!r})"
    elif isinstance(module, tuners_utils.BaseTunerLayer) and not isinstance(module, TuckerLayer):
        why = f"{full!r} is adapted by another method already ({type(module).__name__})"
    elif isinstance(base, (nn.ParameterList, nn.ParameterDict, nn.MultiheadAttention)):
        why = (f"{full!r} is of a {type(base).__name__}, which its parent takes apart, so that peft can't wrap it; "
               "torch_subspace.adapt takes it")
    elif len(places) > 1:
        why = f"{', '.join(map(repr, places))} are one module, and peft adapts one place"
    if why is not None:
        raise ValueError(f"tucker: {why}")


def is_layer_place(module: nn.Module, parameters: Sequence[str]) -> bool:
    """Is it the weight of a layer that has a kind, and nothing more? Then it is adapted as that layer."""
    base = module.base_layer if isinstance(module, TuckerLayer) else module
    return (list(parameters) == ["weight"] and not is_stacked(base, "weight") and layer_kind(base) is not None
            and not isinstance(module, TuckerParameters))
