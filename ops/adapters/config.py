"""What an adapter is to be: which layers, which ranks, which scale, how the factors start."""
from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common import check_word, told

WORDS = ("all-linear", "all-conv")
SCALINGS = ("constant", "lora", "rslora")
INITS = ("lecun", "kaiming", "svd", "lora")
TRAINED = ("all", "core")


@dataclasses.dataclass
class TuckerConfig:
    """A Tucker adapter: ΔW = scale · core ×₀ U₀ ×₁ U₁ …, the modes in the order of the weight's dimensions.

    Args:
        rank: rank of both channel modes; (out, in) in the order of the weight's dimensions; or one rank for every
            dimension of the weight. A rank above the size of its mode is clamped.
        kernel_rank: of a convolution's kernel modes. "full" keeps them whole: no factor, the core is as large as the
            kernel. An int, or one per mode, makes a factor for each.
        alpha: numerator of the scale; None for scale 1.
        target_modules: layers to adapt, as one string or several: a module's name or the end of it in whole dotted
            parts ("fc", "attn.qkv"); a regular expression for the whole name (r"stages.*conv.*"); "all-linear" or
            "all-conv", which leave alone layers whose weight is tied, and heads in `save_modules`.
        exclude_modules: layers to leave alone, in the same language.
        rank_pattern: rank by module, {name or regular expression: as `rank`}; the first that matches counts.
        alpha_pattern: alpha by module, likewise.
        init: of the factors; the core starts at zero. "lecun": N(0, 1/size) for the input mode, N(0, 1/rank) for the
            others. "kaiming": kaiming_normal with a = √3, as FLoRA's code does. "svd": the leading left singular
            vectors of the base weight's unfoldings, the directions that SVFit trains. "lora": as LoRA starts, the
            output mode's factor at zero, the input's at random as peft has it, and the identity for a core (of a
            convolution at the kernel's middle): the first steps are LoRA's, and its learning rates fit.
        scaling: "constant", the default: scale = alpha, as FLoRA's s. "lora": alpha / r, as LoRA's lora_alpha.
            "rslora": alpha / √r. r is the smaller of the two channel ranks asked for. An alpha of r or more without
            a scaling warns, as it is mostly meant as LoRA's.
        dropout: probability of zeroing an entry of a layer's input on the adapter's way. It acts on linear and
            convolutional layers with torch's own forward.
        save_modules: modules to train whole and to keep with the adapter, such as a new head, in the same language.
        target_parameters: parameters to adapt that are no layer's weight, by their own names, in the same language
            ("experts.down_proj"): matrices, and stacks of them such as the experts of a mixture, (experts, out, in) or
            (experts, in, out). Experts share the two channel factors and have a core each; `rank` is that of the last
            two dimensions, or one for every dimension. Patterns and ranks go by the parameter's name or its module's.
            With it `target_modules` may be empty.
        train: "all", or "core": the factors stay as they start, and the cores alone are trained, of rank² numbers for a
            linear layer. The file has the factors all the same. Not with init="lora", whose change would stay zero.
            Cores take larger rates: 1e-2 to 3e-2 were best for a text encoder, as peaks of a one-cycle schedule.

    Raises:
        ValueError, TypeError: a value is out of range or of a wrong kind.

    Source: FLoRA, arXiv 2405.14739; the scalings are LoRA's (arXiv 2106.09685) and rsLoRA's (arXiv 2312.03732).

    Example:
        >>> config = ts.TuckerConfig(rank=(8, 4), target_modules="all-conv", rank_pattern={"stem": 2})
        >>> config.kernel_rank, config.scaling
        ('full', 'constant')
    """

    rank: int | Sequence[int] = 16
    kernel_rank: int | str | Sequence[int] = "full"
    alpha: float | None = None
    target_modules: str | Sequence[str] = WORDS
    rank_pattern: Mapping[str, int | Sequence[int]] = dataclasses.field(default_factory=dict)
    init: str = "lecun"
    scaling: str | None = None
    dropout: float = 0.0
    save_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] = ()
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target_parameters: str | Sequence[str] = ()
    train: str = "all"

    kind: ClassVar[str] = "tucker"

    def __post_init__(self) -> None:
        self.rank = _rank("rank", self.rank)
        if not isinstance(self.kernel_rank, str) or self.kernel_rank != "full":
            self.kernel_rank = _rank("kernel_rank", self.kernel_rank)
        check_names(self)
        self.rank_pattern = {k: _rank(f"rank_pattern[{k!r}]", r) for k, r in self.rank_pattern.items()}
        alphas = {"alpha": self.alpha} | {f"alpha_pattern[{k!r}]": a for k, a in self.alpha_pattern.items()}
        for key, alpha in alphas.items():
            if alpha is not None and not (_is_number(alpha) and math.isfinite(alpha)):
                raise ValueError(f"TuckerConfig: {key} must be a finite number, got {alpha!r}")
        self.alpha = None if self.alpha is None else float(self.alpha)
        self.scaling = default_scaling(self.scaling, self.alpha, self.rank)
        self.alpha_pattern = {k: None if a is None else float(a) for k, a in self.alpha_pattern.items()}
        for key, known in (("init", INITS), ("scaling", SCALINGS), ("train", TRAINED)):
            check_word("TuckerConfig", key, getattr(self, key), known)
        if self.train == "core" and self.init == "lora":
            raise ValueError('TuckerConfig: train="core" needs an init whose factors are not zero, got init="lora": '
                             "the change would stay zero")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"TuckerConfig: dropout must be in [0, 1), got {self.dropout!r}")
        self.dropout = float(self.dropout)

    def ranks(self, name: str | Sequence[str], shape: Sequence[int], stacked: bool = False) -> list[int | None]:
        """Rank of every mode of the weight of module `name`, or one of several names; None where there is no factor.

        stacked: the weight is a stack of matrices rather than a convolution's: channels come last.
        """
        rank = first_of(self.rank_pattern, name, self.rank)
        kernels = len(shape) - 2
        ranks = [rank, rank] if isinstance(rank, int) else list(rank)
        if stacked and len(ranks) == 2 and kernels == 1:
            ranks.insert(0, "full")
        elif not stacked and len(ranks) == 2 and kernels > 0:
            kernel = self.kernel_rank
            ranks += [kernel] * kernels if isinstance(kernel, (int, str)) else list(kernel)
        if len(ranks) != len(shape):
            name = name if isinstance(name, str) else name[0] if stacked else name[-1]
            raise ValueError(f"adapt: {name!r} has a weight of {len(shape)} dimensions {tuple(shape)}, but "
                             f"{len(ranks)} ranks are given: rank={rank}, kernel_rank={self.kernel_rank}")
        return [None if r == "full" else min(r, d) for r, d in zip(ranks, shape, strict=True)]

    def scale(self, name: str | Sequence[str], stacked: bool = False) -> float:
        """Factor of the change of module `name`, or one of several names."""
        alpha, rank = first_of(self.alpha_pattern, name, self.alpha), first_of(self.rank_pattern, name, self.rank)
        if alpha is None:
            return 1.0
        r = rank if isinstance(rank, int) else min(rank[-2:] if stacked else rank[:2])
        return float(alpha) / {"constant": 1, "lora": r, "rslora": math.sqrt(r)}[self.scaling]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def default_scaling(scaling: str | None, alpha: float | None, rank) -> str:
    """The scaling asked for, or "constant"; warns in the voice of a config's __post_init__."""
    r = min(rank[:2]) if isinstance(rank, (list, tuple)) else rank
    if scaling is None and alpha is not None and alpha >= r > 1:
        warnings.warn(f"TuckerConfig: alpha={alpha:g} is the scale itself; LoRA's alpha / rank, {alpha / r:g} here, is "
                      'scaling="lora". Give scaling="constant" where the first is meant', stacklevel=4)
    return "constant" if scaling is None else scaling


def _rank(key, rank):
    """The rank as an int or a tuple of ints, once it is sure that it is one."""
    several = isinstance(rank, (list, tuple))
    for r in rank if several else [rank]:
        if not isinstance(r, numbers.Integral) or isinstance(r, bool):
            raise TypeError(f"TuckerConfig: {key} must be an int or a sequence of ints, got {rank!r}")
        if r < 1:
            raise ValueError(f"TuckerConfig: {key} must be positive, got {rank!r}")
    if several and not rank:
        raise ValueError(f"TuckerConfig: {key} is empty")
    return tuple(int(r) for r in rank) if several else int(rank)


def check_names(config: Any) -> None:
    """The names in a config as tuples, its patterns as dicts; raises in its voice where they are neither."""
    function = type(config).__name__
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key, {})
        if not isinstance(patterns, Mapping):
            raise TypeError(f"{function}: {key} must be a dict, got {type(patterns).__name__}")
        check_patterns(function, key, patterns)
        if hasattr(config, key):
            setattr(config, key, dict(patterns))
    for key in ("target_modules", "exclude_modules", "save_modules", "target_parameters"):
        names = names_of(function, key, getattr(config, key))
        setattr(config, key, names)
        check_patterns(function, key, names)
    if not config.target_modules and not config.target_parameters:
        raise ValueError(f"{function}: target_modules is empty")


def first_of(patterns: Mapping, name: str | Sequence[str], otherwise):
    """The value of the first pattern that names the module, or one of several names."""
    names = [name] if isinstance(name, str) else name
    return next((value for pattern, value in patterns.items() if any(matches(pattern, n) for n in names)), otherwise)


def names_of(function: str, key: str, value: str | Iterable[str] | None) -> tuple[str, ...]:
    """A name or several, or None, as a tuple; raises in `function`'s voice."""
    if not isinstance(value, (Iterable, type(None))) or isinstance(value, bytes):
        raise TypeError(f"{function}: {key} must be a name or several, got {told(value)}")
    names = (value,) if isinstance(value, str) else tuple(() if value is None else value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{function}: {key} must hold strings, got {told(name)}")
    return names


def check_patterns(function: str, key: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{function}: {key} must hold strings, got {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{function}: {key} {pattern!r} is not a regular expression: {error}") from None


def is_bare(pattern: str) -> bool:
    """A plain (dotted) name, not a regular expression."""
    return re.fullmatch(r"[\w.]+", pattern) is not None


def matches(pattern: str, name: str) -> bool:
    """Does the pattern name the module? A bare name stands for the whole last parts of a dotted name."""
    if is_bare(pattern):
        return name == pattern or name.endswith("." + pattern)
    return re.fullmatch(pattern, name) is not None


def close_names(patterns: Iterable[str], names: Iterable[str]) -> str:
    """`; close candidates: ...`, for an error message."""
    ends = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), name)
    found = [ends[e] for p in patterns for e in difflib.get_close_matches(p, ends, n=4, cutoff=0.5)]
    found = list(dict.fromkeys(found))[:5] or list(dict.fromkeys(ends.values()))[:5]
    return f"; candidates: {', '.join(map(repr, found))}" if found else ""


@torch.no_grad()
def init_change(core: Tensor, factors: Sequence[Tensor | None], init: str, base: Tensor,
                modes: tuple[int | None, int]) -> None:
    """Fill core and factors so that the change is zero; `modes` are the weight's dimensions that the layer's input
    meets, None where rows are picked, and that its output has."""
    if core.is_meta:
        return
    core.zero_()
    for mode, factor in enumerate(factors):
        if factor is None:
            continue
        if init == "kaiming":
            nn.init.kaiming_normal_(factor, a=math.sqrt(3))
        elif init == "svd":
            factor.copy_(_leading_vectors(base.movedim(mode, 0).flatten(1).to(factor.dtype), factor.shape[1]))
        else:
            nn.init.normal_(factor, std=1 / math.sqrt(factor.shape[0 if mode == modes[0] else 1]))
    if init == "lora":
        _as_lora(core, factors, *modes)


def _as_lora(core: Tensor, factors: Sequence[Tensor | None], given: int | None, out: int) -> None:
    """B core A, B = 0, A as peft draws it and the identity for a core; of a kernel in its middle, for each expert."""
    rows, given = given is None, 1 - out if given is None else given
    b, a = factors[out], core if factors[given] is None else factors[given]
    if b is None:  # the core is B, and zero
        return
    b.zero_()
    if rows:
        nn.init.normal_(a)
    else:
        bound = 1 / math.sqrt(core.shape[given] if a is core else len(a))
        nn.init.uniform_(a, -bound, bound)
    if a is not core:
        matrices = core.movedim((out, given), (-2, -1))
        kernel = tuple(n // 2 for n in matrices.shape[:-2]) if {out, given} == {0, 1} else ...
        matrices[kernel] = torch.eye(*matrices.shape[-2:], dtype=core.dtype, device=core.device)


def _leading_vectors(unfolding: Tensor, count: int) -> Tensor:
    """Orthonormal columns: the leading left singular vectors, filled up at random where the matrix has fewer."""
    q = min(count + 8, *unfolding.shape)
    vectors = torch.svd_lowrank(unfolding, q=q, niter=4)[0][:, :count]
    if vectors.shape[1] < count:
        more = torch.randn(unfolding.shape[0], count - vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        vectors = torch.linalg.qr(torch.cat([vectors, more], 1))[0]
    return vectors
