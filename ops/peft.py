"""The method `tucker` in Hugging Face's peft; importing this module registers it.

    from torch_subspace.peft import TuckerConfig
    model = peft.get_peft_model(model, TuckerConfig(r=16, target_modules="all-linear"))
    model.save_pretrained(path)                        # import torch_subspace.peft before from_pretrained

The layers, starts, ranks and scales are those of `torch_subspace.adapt`, on the same kernels: Linear, transformers'
Conv1D, Embedding, convolutions of every kind and padding. `unmerge_adapter` is exact to the bit, merging rounds once,
and a parent that reads a layer's `weight` itself sees the adapter.

peft's list of methods (PeftType) is a closed enum, so it is extended through the members that every enum has. That and
the rest is tested with peft 0.18 to 0.21; older ones are refused, newer ones warn. Not for this method: PeftMixedModel,
hot-swap and `adapter_names` in a forward, which peft keeps for methods of its own.
"""
from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

try:
    import peft
except ImportError as error:
    raise ImportError("torch_subspace.peft needs peft: pip install peft") from error

from .adapters.peft_type import TESTED, add_peft_type, drop_peft_type, tested  # noqa: E402


def _check_version(text: str) -> None:
    version = tuple(int(n) for n in re.findall(r"\d+", text)[:2])
    if version < TESTED[0]:
        raise ImportError(f"torch_subspace.peft is tested with peft {tested}; {text} is too old")
    if version > TESTED[1]:
        warnings.warn(f"torch_subspace.peft is tested with peft {tested}, this is {text}", stacklevel=3)


_check_version(peft.__version__)

from accelerate import init_empty_weights  # noqa: E402
from peft.tuners import tuners_utils  # noqa: E402
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, register_peft_method  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

from .adapters import config as adapter_config  # noqa: E402
from .adapters.adapted import CONVS, TRANSPOSED  # noqa: E402
from .adapters.config import WORDS  # noqa: E402
from .adapters.lora import import_lora  # noqa: E402
from .adapters.lora_export import export_lora  # noqa: E402
from .adapters.parameters import full_name  # noqa: E402
from .adapters.peft_attention import TuckerAttention, has_adapted_output  # noqa: E402
from .adapters.peft_checks import all_or_nothing, check_merge, check_names, warn_of_limits, warn_of_loss  # noqa: E402
from .adapters.peft_layer import TuckerConv, TuckerLayer, layer_kind  # noqa: E402
from .adapters.peft_parameters import (  # noqa: E402
    UNTIED,
    TuckerParameters,
    find_peft_parameters,
    is_layer_place,
)
from .adapters.peft_weighted import Recipe, check_adapters, combine, config_of, fill  # noqa: E402
from .adapters.placed import refuse_blocks  # noqa: E402
from .adapters.targets import has_kind, refusal, weights_of  # noqa: E402
from .common import check_word, whole  # noqa: E402

__all__ = ["TuckerConfig", "TuckerLayer", "TuckerModel", "export_lora", "import_lora"]

BIASES = ("none", "all", "tucker_only")
_WHOLE = sys.maxsize  # stands for "full": a rank above any size


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
        init: "lecun", "kaiming", "svd" or "lora", as in `torch_subspace.TuckerConfig`; the change starts at zero.
        train: "all", or "core" for the cores alone, as there.
        target_modules: in peft's language, a regular expression or names and ends of names; or "all-linear" or
            "all-conv", alone or among the names. None takes what peft's LoRA takes for this architecture.
        target_parameters: names or ends of names of parameters that are no layer's weight, as in peft.LoraConfig:
            matrices, and stacks of experts, (experts, out, in) or (experts, in, out), which share the channel factors
            and have a core each. With it target_modules may be empty or None.
        exclude_modules, layers_to_transform, layers_pattern, rank_pattern, alpha_pattern, modules_to_save: as in
            peft.LoraConfig.
        bias: biases to train and to save beside the adapter: "none"; "all" of the model; "tucker_only", those of the
            adapted layers. One adapter of a model may have some, and they stay when it is disabled. Needs peft 0.21.
        trainable_token_indices: rows of the embedding to train, or {name of an embedding: rows}, as in peft.LoraConfig.

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
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    train: str = "all"

    kind: ClassVar[str] = "tucker"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.TUCKER
        for key in ("target_modules", "target_parameters", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, key)
            adapter_config.names_of("TuckerConfig", key, value)
            if isinstance(value, str):  # several are no regular expressions
                adapter_config.check_patterns("TuckerConfig", key, [value])
        several = self.layers_to_transform
        if several is not None:
            for i in several if isinstance(several, Iterable) else [several]:
                whole("TuckerConfig", "layers_to_transform", i)
        check_word("TuckerConfig", "bias", self.bias, BIASES)
        if self.bias != "none" and not hasattr(tuners_utils.BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(f"TuckerConfig: bias={self.bias!r} needs peft 0.21, {peft.__version__} would not save it")
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            setattr(self, key, set(value) if isinstance(value, (list, tuple)) else value)
        if isinstance(self.target_parameters, str):
            raise TypeError("TuckerConfig: target_parameters must be a list of strings or None, got "
                            f"{self.target_parameters!r}")
        words = isinstance(self.target_modules, str) or set(WORDS) & set(self.target_modules or ())
        for key in ("layers_to_transform", "layers_pattern") if words else ():
            if getattr(self, key) not in (None, []):
                raise ValueError(f"TuckerConfig: `{key}` cannot be used when `target_modules` is a str. Nor with "
                                 "all-linear or all-conv: it needs a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("TuckerConfig: When `layers_pattern` is specified, `layers_to_transform` must also be "
                             "specified.")
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
                                           init=self.init, dropout=self.dropout, train=self.train)

    def layer(self, key: str | Sequence[str], shape: Sequence[int],
              stacked: bool = False) -> tuple[list[int | None], float]:
        """Ranks of the modes of layer `key`, or of what has several names, None for no factor, and the scale."""
        keys = [key] if isinstance(key, str) else key
        r = next((self.rank_pattern[p] for k in keys if (p := get_pattern_key(self.rank_pattern, k)) in
                  self.rank_pattern), self.r)
        alpha = next((self.alpha_pattern[p] for k in keys if (p := get_pattern_key(self.alpha_pattern, k)) in
                      self.alpha_pattern), self.alpha)
        core = self._core(r, alpha)
        ranks = core.ranks(key, shape, stacked)
        first = len(shape) - 2 if stacked and isinstance(r, (list, tuple)) and len(r) == 2 else 0
        whole = [first + i for i, n in enumerate(r) if n == "full"] if isinstance(r, (list, tuple)) else []
        if whole and len(shape) == 2:
            raise ValueError(f'TuckerConfig: r={r} for {keys[0]!r}: "full" is for convolutions')
        return [None if i in whole else n for i, n in enumerate(ranks)], core.scale(key, stacked)


add_peft_type("TUCKER")


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

    def _prepare_adapter_config(self, config: TuckerConfig, model_config: dict) -> TuckerConfig:
        known = self.target_module_mapping.get(model_config["model_type"])
        if config.target_modules is None and config.target_parameters and known is None:
            config.target_modules = set()  # the parameters alone
        return super()._prepare_adapter_config(config, model_config)

    def _prepare_model(self, config: TuckerConfig, model: nn.Module) -> None:
        """Spell "all-linear" and "all-conv" out, and refuse what can't be adapted before anything is changed."""
        refuse_blocks("tucker", model)
        parameters = find_peft_parameters(model, config.target_parameters)
        modules = dict(model.named_modules())
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
            config.target_modules = {n for n in names if n not in modules or isinstance(modules[n], TuckerLayer)
                                     or _refusal(n, modules[n]) is None and len(places[modules[n]]) == 1}
        within = [n + "." for n, m in modules.items() if isinstance(m, TuckerParameters) and not (
            isinstance(m, TuckerAttention) and self._check_target_module_exists(config, n))]
        inside = tuple(n + "." for n, m in model.named_modules() if isinstance(m, tuners_utils.BaseTunerLayer))
        for module, names in places.items():
            meant = [n for n in names if n and not n.startswith(inside)
                     and self._check_target_module_exists(config, n)] if not isinstance(module, TuckerLayer) else []
            if meant and len(names) > 1:
                raise ValueError(f"tucker: {', '.join(map(repr, names))} are one module, and peft adapts one place")
            if meant and _refusal(meant[0], module) is not None:
                raise ValueError(f"tucker: {_refusal(meant[0], module)}")
            plain = [n.replace(".base_layer", "") for n in names]
            outer = next((o for o in within if (names[0] + ".").startswith(o)), None)
            if outer is not None and (module is modules[outer[:-1]] or has_kind(module)) and any(
                    self._check_target_module_exists(config, n) for n in plain):
                raise ValueError(f"tucker: {plain[0]!r} is or lies in {outer[:-1]!r}, whose parameters are adapted, "
                                 "and peft adapts no layer there; torch_subspace.adapt takes it")
        names = [n for names in places.values() for n in names if n and not n.startswith(inside)]
        more = [n for plain, own in parameters.values() for n in (plain, *(full_name(plain, p) for p in own))]
        for n, m in modules.items():
            m = getattr(m, "base_layer", m)
            if isinstance(m, nn.MultiheadAttention) and self._check_target_module_exists(config, n):
                more += [f"{n}.{p}" for p in (*weights_of(m), "out_proj")]
        check_names(config, asked, names, more, lambda n: self._check_target_module_exists(config, n))

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **_) -> None:
        if isinstance(target, TuckerLayer):
            target.update_layer(adapter_name, config, current_key)
            return
        why = _refusal(current_key, target)
        if why is not None:
            raise ValueError(f"tucker: {why}")
        self._put(_kind(target)(target, adapter_name, config, current_key), adapter_name, target, target_name, parent)

    def _inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage) -> list[str]:
        done = []
        for key, (plain, parameters) in find_peft_parameters(model, peft_config.target_parameters).items():
            parent, _, target_name = key.rpartition(".")
            parent, target = model.get_submodule(parent), model.get_submodule(key)
            with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
                if is_layer_place(target, parameters):
                    if not isinstance(target, TuckerLayer) or adapter_name not in target.tucker_parts:
                        self._create_and_replace(peft_config, adapter_name, target, target_name, parent, plain)
                elif isinstance(target, TuckerParameters):
                    target.update_layer(adapter_name, peft_config, plain, parameters)
                else:
                    layer = TuckerParameters(target, adapter_name, peft_config, plain, parameters)
                    self._put(layer, adapter_name, target, target_name, parent)
            done += [f"{plain}.{parameter}" for parameter in parameters]
        return done

    def _put(self, layer, adapter_name, target, target_name, parent) -> None:
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is chosen
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)  # weights and devices are those of the layer inside

    def inject_adapter(self, model, adapter_name, *args, **kwargs) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        warn_of_limits(model, self.peft_config[adapter_name], adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        if any(adapter_name in m.merged_adapters for m in self.model.modules() if isinstance(m, TuckerLayer)):
            raise ValueError(f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them "
                             "first.")
        super().delete_adapter(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.model.modules() if not autocast_adapter_dtype else ():
            if isinstance(layer, TuckerLayer) and adapter_name in layer.tucker_parts:
                layer.narrow(adapter_name)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
                             combination_type: str = "svd", svd_rank: int | None = None,
                             svd_clamp: float | None = None, svd_full_matrices: bool = True,
                             svd_driver: str | None = None, density: float | None = None,
                             majority_sign_method: str = "total") -> None:
        """Make a new adapter, not yet active, of the weighted sum of others; arguments as those of peft's LoRA.

        "cat" is exact, its ranks being the sums of the others'. The rest cut the sum of the changes to rank `svd_rank`,
        by default the largest of theirs; without "svd" in the name ("linear", "ties", ...), which needs equal ranks, to
        that. One adapter alone is only scaled. An adapter that exists already is left as it is.

        Raises:
            ValueError: an adapter is unknown, several have the same module in `modules_to_save`, ranks differ where
                they may not, a `density` is missing, or the type is unknown. Nothing is changed then.
        """
        if isinstance(adapter_name, str) and adapter_name in self.peft_config:
            return
        check_adapters(self.model, self.peft_config, adapters, weights, adapter_name)
        recipe = Recipe("linear" if len(adapters) == 1 else combination_type, svd_rank, svd_clamp, svd_driver, density,
                        majority_sign_method)
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, TuckerLayer)}
        made = combine(layers, adapters, weights, recipe)
        self.peft_config[adapter_name] = config_of([self.peft_config[name] for name in adapters], made)
        self.inject_adapter(self.model, adapter_name)
        fill(layers, adapter_name, made)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        check_merge("merge_adapter", self.peft_config, adapter_names, safe_merge)
        with all_or_nothing(self.model):
            super().merge_adapter(adapter_names, safe_merge)
        warn_of_loss(self.model)

    def _unload_and_optionally_merge(self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
                                     adapter_names: list[str] | None = None) -> nn.Module:
        check_merge("merge_and_unload", self.peft_config, adapter_names, safe_merge)
        found = [m for m in self.model.modules() if isinstance(m, TuckerLayer)]
        with all_or_nothing(self.model):
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        warn_of_loss(nn.ModuleList(found))
        return model

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError("tucker: adapter_names in a forward is not supported; set_adapter chooses for all of it")
        yield


def _kind(module: nn.Module) -> type[TuckerLayer] | None:
    return TuckerAttention if isinstance(module, nn.MultiheadAttention) else layer_kind(module)


def _refusal(name: str, module: nn.Module) -> str | None:
    """Why peft can't adapt this module with the method; None when it can."""
    if isinstance(module, tuners_utils.BaseTunerLayer):
        return f"{name!r} is adapted by another method already ({type(module).__name__})"
    if has_adapted_output(module):
        return f"the output projection of {name!r} has an adapter already: name the whole there too, or it alone here"
    if not has_kind(module) or _kind(module) is None:
        return f"{name!r} is a {type(module).__name__}, which has no Tucker adapter in peft"
    return refusal(name, module, UNTIED)


try:
    register_peft_method(name="tucker", config_cls=TuckerConfig, model_cls=TuckerModel)
except BaseException:
    drop_peft_type("TUCKER")
    raise
