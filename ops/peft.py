"""The methods `tucker` and `spectral` in Hugging Face's peft; importing this module registers them.

    from torch_subspace.peft import SpectralConfig, TuckerConfig
    model = peft.get_peft_model(model, TuckerConfig(r=16, target_modules="all-linear"))
    model.save_pretrained(path)                        # import torch_subspace.peft before from_pretrained

The layers, starts, ranks and scales are those of `torch_subspace.adapt`, on the same kernels: Linear, transformers'
Conv1D, Embedding, convolutions of every kind and padding. `unmerge_adapter` is exact to the bit, merging rounds once,
and a parent that reads a layer's `weight` itself sees the adapter.

peft's list of methods (PeftType) is a closed enum, so it is extended through the members that every enum has. That and
the rest is tested with peft 0.18 to 0.21; older ones are refused, newer ones warn. Not for these methods:
PeftMixedModel, hot-swap and `adapter_names` in a forward, which peft keeps for methods of its own.
"""
from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Sequence
from typing import Any

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
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method  # noqa: E402

from .adapters.adapted import CONVS, TRANSPOSED  # noqa: E402
from .adapters.config import WORDS  # noqa: E402
from .adapters.lora import import_lora  # noqa: E402
from .adapters.lora_export import export_lora  # noqa: E402
from .adapters.parameters import full_name  # noqa: E402
from .adapters.peft_attention import TuckerAttention, has_adapted_output  # noqa: E402
from .adapters.peft_checks import all_or_nothing, check_merge, check_names, warn_of_limits, warn_of_loss  # noqa: E402
from .adapters.peft_config import SpectralConfig, TuckerConfig  # noqa: E402
from .adapters.peft_layer import TuckerConv, TuckerLayer, layer_kind  # noqa: E402
from .adapters.peft_parameters import (  # noqa: E402
    UNTIED,
    TuckerParameters,
    find_peft_parameters,
    is_layer_place,
)
from .adapters.peft_spectral import put, sum_of  # noqa: E402
from .adapters.peft_weighted import Recipe, check_adapters, combine, config_of, fill  # noqa: E402
from .adapters.placed import refuse_blocks  # noqa: E402
from .adapters.targets import has_kind, refusal, weights_of  # noqa: E402

__all__ = [
    "SpectralConfig", "SpectralModel", "TuckerConfig", "TuckerLayer", "TuckerModel", "export_lora", "import_lora",
]


KINDS = ("TUCKER", "SPECTRAL")
for kind in KINDS:
    add_peft_type(kind)


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

    def _prepare_adapter_config(self, config: TuckerConfig | SpectralConfig, model_config: dict) -> Any:
        known = self.target_module_mapping.get(model_config["model_type"])
        if config.target_modules is None and config.target_parameters and known is None:
            config.target_modules = set()  # the parameters alone
        return super()._prepare_adapter_config(config, model_config)

    def _prepare_model(self, config: TuckerConfig | SpectralConfig, model: nn.Module) -> None:
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


class SpectralModel(TuckerModel):
    """A model with spectral adapters, as peft makes it from a `SpectralConfig`.

    `add_weighted_adapter` is exact, and makes an adapter of the same kind: "cat", "linear" and "svd" all mean the sum
    of the singular values' changes.

    Example:
        >>> import peft
        >>> from torch_subspace.peft import SpectralConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> model = peft.get_peft_model(model, SpectralConfig(r=2, target_modules=["0"]))
        >>> type(model.base_model).__name__
        'SpectralModel'
    """

    prefix = "tucker_parts"  # where the layers have them; peft wants a prefix for each method

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
                             combination_type: str = "linear", **_) -> None:
        if isinstance(adapter_name, str) and adapter_name in self.peft_config:
            return
        check_adapters(self.model, self.peft_config, adapters, weights, adapter_name)
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, TuckerLayer)}
        config, made = sum_of(layers, [self.peft_config[name] for name in adapters], adapters, weights,
                              combination_type)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        put(layers, adapter_name, made)


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
    register_peft_method(name="spectral", config_cls=SpectralConfig, model_cls=SpectralModel, prefix="tucker_parts")
except BaseException:
    for kind in KINDS:
        drop_peft_type(kind)
    raise
