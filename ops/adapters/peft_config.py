"""What an adapter is to be, in peft's manner. See peft.py."""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import peft
from peft.tuners import tuners_utils
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from ..common import check_word, whole
from . import config as adapter_config
from .config import WORDS
from .spectral import rank_of

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
        check_config(self)
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


@dataclasses.dataclass
class SpectralConfig(peft.PeftConfig):
    """A spectral adapter for peft (SVFit): ΔW = U diag(δ) Vᵀ with the weight's singular vectors; δ alone is trained.

    peft's files hold the singular vectors too; those of `torch_subspace.save_adapter` need not.

    Args:
        r: singular values of every weight to train, the largest; or a share below 1 of the squared ones, as in
            `torch_subspace.SpectralConfig`.
        target_modules, target_parameters, exclude_modules: as in `TuckerConfig`; every matrix of a stack has singular
            values of its own.
        layers_to_transform, layers_pattern, rank_pattern, modules_to_save, trainable_token_indices: as there.
        bias: "none", "all" or "spectral_only", as there.

    Raises:
        ValueError, TypeError: a value is out of range or of a wrong kind.

    Source: SVFit, arXiv 2409.05926.

    Example:
        >>> import peft
        >>> from torch_subspace.peft import SpectralConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> model = peft.get_peft_model(model, SpectralConfig(r=2, target_modules=["0"]))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        2
    """

    r: int | float = 0.99
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] = dataclasses.field(default_factory=dict)
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fingerprint: dict | None = dataclasses.field(default=None, repr=False)  # of the base, by layer; peft writes it out
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    kind: ClassVar[str] = "spectral"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SPECTRAL
        check_config(self)
        self.r = rank_of("SpectralConfig", "r", self.r)
        self.rank_pattern = {k: rank_of("SpectralConfig", f"rank_pattern[{k!r}]", r)
                             for k, r in self.rank_pattern.items()}

    def layer(self, key: str | Sequence[str], shape: Sequence[int], stacked: bool = False) -> tuple[int | float, float]:
        """Rank of layer `key`, or of what has several names, and the scale."""
        keys = [key] if isinstance(key, str) else key
        return next((self.rank_pattern[p] for k in keys if (p := get_pattern_key(self.rank_pattern, k)) in
                     self.rank_pattern), self.r), 1.0


def check_config(config: Any) -> None:
    """What the configs of both methods have in common; raises in the voice of one."""
    function = type(config).__name__
    for key in ("target_modules", "target_parameters", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = getattr(config, key)
        adapter_config.names_of(function, key, value)
        if isinstance(value, str):  # several are no regular expressions
            adapter_config.check_patterns(function, key, [value])
    several = config.layers_to_transform
    if several is not None:
        for i in several if isinstance(several, Iterable) else [several]:
            whole(function, "layers_to_transform", i)
    check_word(function, "bias", config.bias, ("none", "all", f"{config.kind}_only"))
    if config.bias != "none" and not hasattr(tuners_utils.BaseTuner, "_get_learnable_bias_state_dict"):
        raise ValueError(f"{function}: bias={config.bias!r} needs peft 0.21, {peft.__version__} would not save it")
    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key)
        setattr(config, key, set(value) if isinstance(value, (list, tuple)) else value)
    if isinstance(config.target_parameters, str):
        raise TypeError(f"{function}: target_parameters must be a list of strings or None, got "
                        f"{config.target_parameters!r}")
    words = isinstance(config.target_modules, str) or set(WORDS) & set(config.target_modules or ())
    for key in ("layers_to_transform", "layers_pattern") if words else ():
        if getattr(config, key) not in (None, []):
            raise ValueError(f"{function}: `{key}` cannot be used when `target_modules` is a str. Nor with "
                             "all-linear or all-conv: it needs a list of names")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(f"{function}: When `layers_pattern` is specified, `layers_to_transform` must also be "
                         "specified.")
    for key in ("rank_pattern", "alpha_pattern")[: 2 if hasattr(config, "alpha_pattern") else 1]:
        if not isinstance(getattr(config, key) or {}, Mapping):
            raise TypeError(f"{function}: {key} must be a dict, got {type(getattr(config, key)).__name__}")
        setattr(config, key, dict(getattr(config, key) or {}))
        adapter_config.check_patterns(function, key, getattr(config, key))
