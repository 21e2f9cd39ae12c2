"""The method `tucker` in Hugging Face's peft; importing this module registers it.

    from torch_subspace.peft import TuckerConfig
    model = peft.get_peft_model(model, TuckerConfig(r=16, target_modules="all-linear"))
    model.save_pretrained(path)                        # import torch_subspace.peft before from_pretrained

The layers, starts, ranks and scales are those of `torch_subspace.adapt`, on the same kernels: Linear, transformers'
Conv1D, Embedding, convolutions of every kind and padding. `unmerge_adapter` is exact to the bit, merging rounds once,
and a parent that reads a layer's `weight` itself sees the adapter.

peft's list of methods (PeftType) is a closed enum, so it is extended through the members that every enum has. That and
the rest is tested with peft 0.18 to 0.21; older ones are refused, newer ones warn. Not for this method: PeftMixedModel,
hot-swap and `adapter_names` in a forward, which peft keeps for methods of its own; biases; nn.MultiheadAttention as a
whole (its `out_proj` is a layer of its own; `torch_subspace.adapt` takes all of it).
"""
from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

try:
    import peft
except ImportError as error:
    raise ImportError("torch_subspace.peft needs peft: pip install peft") from error

TESTED = ((0, 18), (0, 21))
_tested = " to ".join(".".join(map(str, v)) for v in TESTED)


def _check_version(text: str) -> None:
    version = tuple(int(n) for n in re.findall(r"\d+", text)[:2])
    if version < TESTED[0]:
        raise ImportError(f"torch_subspace.peft is tested with peft {_tested}; {text} is too old")
    if version > TESTED[1]:
        warnings.warn(f"torch_subspace.peft is tested with peft {_tested}, this is {text}", stacklevel=3)


_check_version(peft.__version__)

from peft.tuners import tuners_utils  # noqa: E402
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, register_peft_method  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

from .adapters import config as adapter_config  # noqa: E402
from .adapters.adapted import CONVS, TRANSPOSED  # noqa: E402
from .adapters.config import WORDS, close_names  # noqa: E402
from .adapters.fingerprint import differs, fingerprint  # noqa: E402
from .adapters.lora import import_lora  # noqa: E402
from .adapters.lora_export import export_lora  # noqa: E402
from .adapters.merge import LOST, others  # noqa: E402
from .adapters.peft_layer import TuckerConv, TuckerEmbedding, TuckerLayer, TuckerLinear, layer_kind  # noqa: E402
from .adapters.placed import offload_hook, refuse_blocks  # noqa: E402
from .adapters.targets import has_kind, refusal  # noqa: E402
from .common import HALF, whole  # noqa: E402

__all__ = ["TuckerConfig", "TuckerLayer", "TuckerModel", "export_lora", "import_lora"]

_HEADS = ("classifier", "score", "qa_outputs")  # what peft saves of whatever model its task types meet
_WHOLE = sys.maxsize  # stands for "full": a rank above any size


def _add_peft_type(name: str) -> PeftType:
    """A new member of a closed enum; undone if the enum doesn't take it as one of its own."""
    if name in PeftType.__members__:
        config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
        if config is not None and config.__module__ != __name__:
            raise ImportError(f"peft {peft.__version__} has a method {name} of its own: {config.__module__}")
        for table in (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
                      peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING):  # this module is being reloaded
            table.pop(name, None)
        return PeftType(name)
    try:
        member = str.__new__(PeftType, name)
        member._name_, member._value_, member.__objclass__ = name, name, PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)  # the enum's own __setattr__ refuses
        if not (PeftType(name) is PeftType[name] is getattr(PeftType, name) is member and member in list(PeftType)):
            raise TypeError("the new member is not found")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _drop_peft_type(name)
        raise ImportError(f"torch_subspace.peft can't extend PeftType of peft {peft.__version__}, being tested with "
                          f"{_tested}: {error}") from error
    return member


def _drop_peft_type(name: str) -> None:
    with contextlib.suppress(AttributeError, ValueError):
        PeftType._member_names_.remove(name)
    for table in ("_member_map_", "_value2member_map_"):
        getattr(PeftType, table, {}).pop(name, None)
    with contextlib.suppress(AttributeError):
        type.__delattr__(PeftType, name)


@dataclasses.dataclass
class TuckerConfig(peft.PeftConfig):
    """A Tucker adapter for peft: ΔW = scale · core ×₀ U₀ ×₁ U₁ …, modes in the order of the weight's dimensions.

    Args:
        r: rank of both channel modes; or [out, in] in the order of the weight's dimensions, where "full" stands for a
            mode without a factor; or one for every dimension of the weight. Clamped to the mode's size.
        kernel_rank: of a convolution's kernel modes: "full" for no factor, an int, or one per mode.
        alpha: numerator of the scale; None for scale 1.
        scaling: "constant", the default: scale = alpha. "lora": alpha / r, as peft's lora_alpha. "rslora": alpha / √r.
            r is the smaller channel rank. An alpha of r or more without a scaling warns.
        dropout: on the layer's input on the adapter's way; of linear and convolutional layers.
        init: of the factors, "lecun", "kaiming" or "svd", as in `torch_subspace.TuckerConfig`; the core is zero.
        target_modules: in peft's language, a regular expression or names and ends of names; or "all-linear" or
            "all-conv", alone or among the names. None takes what peft's LoRA takes for this architecture.
        exclude_modules, layers_to_transform, layers_pattern, rank_pattern, alpha_pattern, modules_to_save: as in
            peft.LoraConfig.
        bias: "none"; nothing else is supported.

    Raises:
        ValueError, TypeError: a value is out of range or of a wrong kind.

    Example:
        >>> import peft
        >>> from torch_subspace.peft import TuckerConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> model = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["0"]))
        >>> model.peft_type.value
        'TUCKER'
    """

    r: Any = 16
    kernel_rank: Any = "full"
    alpha: float | None = None
    scaling: str | None = None
    dropout: float = 0.0
    init: str = "lecun"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, Any] = dataclasses.field(default_factory=dict)
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fingerprint: dict | None = dataclasses.field(default=None, repr=False)  # of the base, by layer; peft writes it out

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.TUCKER
        for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, key)
            adapter_config.names_of("TuckerConfig", key, value)
            if isinstance(value, str):  # several are no regular expressions
                adapter_config.check_patterns("TuckerConfig", key, [value])
        several = self.layers_to_transform
        if several is not None:
            for i in several if isinstance(several, Iterable) else [several]:
                whole("TuckerConfig", "layers_to_transform", i)
        if not isinstance(self.bias, str) or self.bias != "none":
            raise ValueError(f'TuckerConfig: bias must be "none", got {self.bias!r}: biases are not adapted')
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            setattr(self, key, set(value) if isinstance(value, (list, tuple)) else value)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("TuckerConfig: layers_pattern needs layers_to_transform")
        words = isinstance(self.target_modules, str) or set(WORDS) & set(self.target_modules or ())
        if words and self.layers_to_transform is not None:
            raise ValueError("TuckerConfig: layers_to_transform needs target_modules to be a list of names")
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, key) or {}, Mapping):
                raise TypeError(f"TuckerConfig: {key} must be a dict, got {type(getattr(self, key)).__name__}")
            setattr(self, key, dict(getattr(self, key) or {}))
            adapter_config.check_patterns("TuckerConfig", key, getattr(self, key))
        asked, self.scaling = self.scaling, "constant" if self.scaling is None else self.scaling
        self._core(self.r, self.alpha)
        for key, r, alpha in [*((f"rank_pattern[{k!r}]", r, self.alpha) for k, r in self.rank_pattern.items()),
                              *((f"alpha_pattern[{k!r}]", self.r, a) for k, a in self.alpha_pattern.items())]:
            try:
                self._core(r, alpha)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{error} as {key}") from None
        numbers = [n for n in (self.r if isinstance(self.r, (list, tuple)) else [self.r]) if n != "full"]
        adapter_config.default_scaling(asked, self.alpha, numbers)

    def _core(self, r, alpha) -> adapter_config.TuckerConfig:
        """These ranks and this alpha as the config of `torch_subspace.adapt`, which checks them."""
        if isinstance(r, (list, tuple)):
            r = [_WHOLE if n == "full" else n for n in r]
            if len(r) > 1 and r[0] == r[1] == _WHOLE:
                raise ValueError('TuckerConfig: r needs a rank for one of the channel modes, both are "full"')
        return adapter_config.TuckerConfig(rank=r, kernel_rank=self.kernel_rank, alpha=alpha, scaling=self.scaling,
                                           init=self.init, dropout=self.dropout)

    def layer(self, key: str, shape: Sequence[int]) -> tuple[list[int | None], float]:
        """Ranks of the modes of layer `key`, None for no factor, and the scale."""
        r = self.rank_pattern.get(get_pattern_key(self.rank_pattern, key), self.r)
        core = self._core(r, self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, key), self.alpha))
        ranks = core.ranks(key, shape)
        whole = [i for i, n in enumerate(r) if n == "full"] if isinstance(r, (list, tuple)) else []
        if whole and len(shape) == 2:
            raise ValueError(f'TuckerConfig: r={r} for {key!r}: "full" is for convolutions')
        return [None if i in whole else n for i, n in enumerate(ranks)], core.scale(key)


_add_peft_type("TUCKER")


class TuckerModel(tuners_utils.BaseTuner):
    """A model with Tucker adapters, as peft makes it from a `TuckerConfig`.

    Example:
        >>> import peft
        >>> from torch_subspace.peft import TuckerConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> model = peft.get_peft_model(model, TuckerConfig(r=2, target_modules=["0"]))
        >>> type(model.base_model).__name__
        'TuckerModel'
    """

    prefix = "tucker_"
    tuner_layer_cls = TuckerLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, config: TuckerConfig, model: nn.Module) -> None:
        """Spell "all-linear" and "all-conv" out, and refuse what can't be adapted before anything is changed."""
        refuse_blocks("tucker", model)
        asked = config.target_modules
        found = config.target_modules
        words = {found} & set(WORDS) if isinstance(found, str) else set(found or ()) & set(WORDS)
        places = {}
        for name, module in model.named_modules(remove_duplicate=False):
            places.setdefault(module, []).append(name)
        if words:
            names = set() if isinstance(found, str) else found - words
            if "all-linear" in words:
                linear = dataclasses.replace(config, target_modules="all-linear", layers_to_transform=None,
                                             layers_pattern=None)
                names |= tuners_utils._maybe_include_all_linear_layers(linear, model).target_modules
            if "all-conv" in words:
                names |= {n for n, m in model.named_modules() if isinstance(m, (*CONVS, *TRANSPOSED, TuckerConv))
                          and not n.endswith(".base_layer")}
            modules = dict(model.named_modules())
            config.target_modules = {n for n in names if n not in modules or isinstance(modules[n], TuckerLayer)
                                     or _refusal(n, modules[n]) is None and len(places[modules[n]]) == 1}
        inside = tuple(n + "." for n, m in model.named_modules() if isinstance(m, tuners_utils.BaseTunerLayer))
        for module, names in places.items():
            meant = [n for n in names if n and not n.startswith(inside)
                     and self._check_target_module_exists(config, n)] if not isinstance(module, TuckerLayer) else []
            if meant and len(names) > 1:
                raise ValueError(f"tucker: {', '.join(map(repr, names))} are one module, and peft adapts one place")
            if meant and _refusal(meant[0], module) is not None:
                raise ValueError(f"tucker: {_refusal(meant[0], module)}")
        names = [n for names in places.values() for n in names if n and not n.startswith(inside)]
        self._check_names(config, asked, names)

    def _check_names(self, config, asked, names) -> None:
        """ValueError for names in the config that match nothing; a warning for targets, as lists of them are shared
        between architectures."""
        targeted = [n for n in names if self._check_target_module_exists(config, n)]
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, key) if targeted else ():
                if not any(get_pattern_key([pattern], n) == pattern for n in targeted):
                    raise ValueError(f"tucker: {key} {pattern!r} matches none of the adapted layers"
                                     f"{close_names([pattern], targeted)}")
        lost = {key: _unmatched(value, names) for key, value in (
            ("exclude_modules", config.exclude_modules), ("target_modules", asked),
            ("modules_to_save", config.modules_to_save))}
        for key, patterns in lost.items():
            text = patterns and f"tucker: {key} {patterns[0]!r} matches nothing{close_names(patterns[:1], names)}"
            if text and key == "target_modules":
                warnings.warn(text, stacklevel=2)
            elif text:
                raise ValueError(text)

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **_) -> None:
        if isinstance(target, TuckerLayer):
            target.update_layer(adapter_name, config, current_key)
            return
        why = _refusal(current_key, target)
        if why is not None:
            raise ValueError(f"tucker: {why}")
        layer = layer_kind(target)(target, adapter_name, config, current_key)
        self._replace_module(parent, target_name, layer, target)
        if offload_hook(target) is not None:  # peft has sent the factors after the weight, to the meta device
            layer.update_layer(adapter_name, config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is chosen

    def inject_adapter(self, model, adapter_name, *args, **kwargs) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        found = {n: m for n, m in model.named_modules() if isinstance(m, TuckerLayer)}
        found = {n: m for n, m in found.items() if adapter_name in m.tucker_parts}
        own = [n for n, m in found.items() if m._fast is None and not isinstance(m, TuckerLinear)]
        half = [n for n in own if found[n].base_layer._parameters["weight"].dtype in HALF]
        drop = [n for n, m in found.items() if (n in own or isinstance(m, TuckerEmbedding))
                and m.tucker_parts[adapter_name].dropout]
        self._compare_bases(adapter_name, found)
        if half:
            warnings.warn(f"tucker: {half[0]!r}{others(half)} computes with its weight in its own way, in half "
                          "precision: base + change is rounded at every forward, which loses most of a small change",
                          stacklevel=4)
        if drop:
            warnings.warn(f"tucker: dropout has no effect on {drop[0]!r}{others(drop)}", stacklevel=4)

    def _compare_bases(self, adapter_name, found) -> None:
        """Note what base the adapter is on, and warn where its config comes from a file and says another."""
        config = self.peft_config[adapter_name]
        bases = {n: fingerprint(m, "weight") for n, m in found.items()}
        noted = {} if config.__dict__.get("_has_met_a_base") else config.fingerprint or {}
        other = [n for n, base in bases.items() if differs(noted.get(n), base)]
        if other:
            warnings.warn(f"tucker: adapter {adapter_name!r} was saved with another base model: "
                          f"{other[0]!r}{others(other)} had other weights than here", stacklevel=5)
        config.fingerprint, config._has_met_a_base = bases, True

    def delete_adapter(self, adapter_name: str) -> None:
        if any(adapter_name in m.merged_adapters for m in self.model.modules() if isinstance(m, TuckerLayer)):
            raise ValueError(f"tucker: adapter {adapter_name!r} is merged; unmerge first")
        super().delete_adapter(adapter_name)

    def merge_adapter(self, *args, **kwargs) -> None:
        with self._all_or_nothing():
            super().merge_adapter(*args, **kwargs)
        _warn_of_loss(self.model)

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        found = [m for m in self.model.modules() if isinstance(m, TuckerLayer)]
        with self._all_or_nothing():
            model = super()._unload_and_optionally_merge(*args, **kwargs)
        _warn_of_loss(nn.ModuleList(found))
        return model

    @contextlib.contextmanager
    def _all_or_nothing(self):
        """peft merges and unloads layer by layer: where one can't be, those before it are as they were."""
        children = {m: dict(m._modules) for m in self.model.modules()}
        merged = {m: list(m.merged_adapters) for m in children if isinstance(m, TuckerLayer)}
        try:
            yield
        except BaseException:
            for module, before in children.items():
                module._modules.update(before)
            for layer, names in merged.items():
                layer.__dict__.pop("_lost", None)
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError("tucker: adapter_names in a forward is not supported; set_adapter chooses for all of it")
        yield


def _refusal(name: str, module: nn.Module) -> str | None:
    """Why peft can't adapt this module with the method; None when it can."""
    if isinstance(module, tuners_utils.BaseTunerLayer):
        return f"{name!r} is adapted by another method already ({type(module).__name__})"
    if not has_kind(module) or layer_kind(module) is None:
        return f"{name!r} is a {type(module).__name__}, which has no Tucker adapter in peft"
    return refusal(name, module, _Untied())


def _unmatched(patterns, names) -> list[str]:
    """Those of the names, or the regular expression, that no module has."""
    if isinstance(patterns, str):
        return [] if patterns in WORDS or any(re.fullmatch(patterns, n) for n in names) else [patterns]
    return sorted(p for p in patterns or () if p not in (*WORDS, *_HEADS)
                  and not any(n == p or n.endswith("." + p) for n in names))


class _Untied(dict):
    """For `refusal`: a shared weight is no reason here, as nothing is ever written into it."""

    def __missing__(self, key):
        return []


def _warn_of_loss(model: nn.Module) -> None:
    lost = {n: m.__dict__.pop("_lost") for n, m in model.named_modules() if "_lost" in m.__dict__}
    lost = {n: part for n, part in lost.items() if part > LOST}
    if lost:
        worst = max(lost, key=lost.get)
        warnings.warn(f"tucker: half precision swallows {lost[worst]:.0%} of the change of {worst!r}{others(lost)}; "
                      "merge into a float32 model to keep it", stacklevel=3)


try:
    register_peft_method(name="tucker", config_cls=TuckerConfig, model_cls=TuckerModel)
except BaseException:
    _drop_peft_type("TUCKER")
    raise
