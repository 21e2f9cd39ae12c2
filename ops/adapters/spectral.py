"""Spectral adapters: the singular values of a frozen weight are what is trained.

    W = sum_i sigma_i u_i v_i',     dW = U diag(delta) V' = sum_{i <= r} delta_i u_i v_i',     delta = 0 at the start

W is the weight as a matrix, (first dimension) x (all others); of a stack of matrices each has its own. SVFit trains
sigma_i = Sigma_i + delta_i, the same function with the same gradient, and Adam's steps don't see the offset; here the
weight stays as it is, so that nothing changes to the bit at the start, and weight decay pulls towards it.

Costs one decomposition per weight, in double: the eigenproblem of the smaller Gram matrix, or an SVD where singular
values are wanted that are too small for it. A step costs two products at the rank's width forward, and four backward;
SVFit, arXiv 2409.05926.
"""
from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common import check_flag, told, whole
from .config import WORDS, check_names, first_of
from .factors import WideFactors, restart
from .placed import is_sharded

SMALL = 1e-4  # sigma_r / sigma_1 from which on the Gram matrix gives U to single precision
GAP = 1e-8  # between singular values, or their squares where these are found, as a part of the largest
PROBED = 1e-4  # by how much probes of equal pairs may differ


@dataclasses.dataclass
class SpectralConfig:
    """A spectral adapter (SVFit): the leading singular values of each weight are trained, its singular vectors stay.

    ΔW = U diag(δ) Vᵀ with the singular vectors of the weight, of a convolution's as the matrix (first dimension) ×
    (all others), and one number per direction to train: rank numbers a layer. Everything else is as with
    `TuckerConfig`. The vectors are computed when the adapter is put on, and kept beside the weight in float32: as much
    memory as rank · (rows + columns) numbers, which a merge gives back. A learning rate fits that is of the size of
    a useful change of a singular value: larger than LoRA's.

    Args:
        rank: singular values to train of every weight, the largest; clamped to what there are. Or a share below 1: as
            many as hold this share of the squared singular values, a weight each (the paper keeps more than 0.99).
        target_modules: layers to adapt, as in `TuckerConfig`: names, a regular expression, "all-linear", "all-conv".
        rank_pattern: rank by module, {name or regular expression: as `rank`}; the first that matches counts.
        save_modules: modules to train whole and to keep with the adapter, such as a new head.
        exclude_modules: layers to leave alone.
        target_parameters: parameters to adapt that are no layer's weight; every matrix of a stack has singular values
            of its own.
        save_vectors: whether files hold the singular vectors. Without them a file has a few numbers per direction; it
            is loaded by decomposing the base weight again, and refused where that does not give the vectors that were
            trained with: another base model, or another precision of it. Vectors that the weight does not determine
            (equal singular values), and those of quantised or sharded weights, are in the file in any case.

    Raises:
        ValueError, TypeError: a value is out of range or of a wrong kind.

    Source: SVFit, arXiv 2409.05926.

    Example:
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 8)), torch.randn(4, 6)
        >>> before = model(x)
        >>> model = ts.adapt(model, ts.SpectralConfig(rank=4))
        >>> torch.equal(model(x), before), [p.shape for group in ts.adapter_parameters(model) for p in group["params"]]
        (True, [torch.Size([4])])
    """

    rank: int | float = 0.99
    target_modules: str | Sequence[str] = WORDS
    rank_pattern: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    save_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] = ()
    target_parameters: str | Sequence[str] = ()
    save_vectors: bool = False

    kind: ClassVar[str] = "spectral"

    def __post_init__(self) -> None:
        check_names(self)
        self.rank = rank_of("SpectralConfig", "rank", self.rank)
        self.rank_pattern = {k: rank_of("SpectralConfig", f"rank_pattern[{k!r}]", r)
                             for k, r in self.rank_pattern.items()}
        check_flag("SpectralConfig", "save_vectors", self.save_vectors)
        self.save_vectors = bool(self.save_vectors)

    def ranks(self, name: str | Sequence[str], shape: Sequence[int], stacked: bool = False) -> int | float:
        """Singular values to train of module `name`, or one of several names; or their share."""
        return first_of(self.rank_pattern, name, self.rank)

    def scale(self, name: str | Sequence[str], stacked: bool = False) -> float:
        """1: the learning rate decides how far a singular value goes."""
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def rank_of(function: str, key: str, rank: Any) -> int | float:
    """The rank as an int, or a share of the squared singular values as a float."""
    if isinstance(rank, numbers.Real) and not isinstance(rank, (numbers.Integral, bool)):
        if not 0 < rank < 1:
            raise ValueError(f"{function}: {key} must be a positive int, or a share in (0, 1), got {told(rank)}")
        return float(rank)
    return whole(function, key, rank, 1)


def matrices(shape: Sequence[int], stacked: bool) -> tuple[int, ...]:
    """The shape of a weight as a matrix, or as a stack of them."""
    return tuple(shape) if stacked else (shape[0], math.prod(shape[1:]))


@torch.no_grad()
def singular_pairs(weight: Tensor, rank: int | float, exact: bool = False) -> tuple[Tensor, Tensor, bool]:
    """The leading left and right singular vectors of (..., m, n), (..., m, r) and (..., n, r) in double, and whether
    the matrix determines u_i v_i' for each i <= r: no singular value is zero or equal to the next. `exact`: orthonormal
    to double precision, not only to single."""
    w = weight.double()
    if exact:
        return _by_svd(w, rank)
    tall = w.shape[-2] >= w.shape[-1]
    values, vectors = torch.linalg.eigh(w.mT @ w if tall else w @ w.mT)
    values, vectors = values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)
    count = counted(values, rank)
    sigma, known = values[..., :count], vectors[..., :count]
    if not (sigma[..., -1] > SMALL * sigma[..., 0]).all():
        return _by_svd(w, count)
    other = (w @ known if tall else w.mT @ known) / sigma[..., None, :]
    return *((other, known) if tall else (known, other)), determined(values.square(), count)  # what eigh tells apart


def _by_svd(w: Tensor, rank: int | float) -> tuple[Tensor, Tensor, bool]:
    u, values, vh = torch.linalg.svd(w, full_matrices=False)
    count = counted(values, rank)
    return u[..., :count], vh[..., :count, :].mT, determined(values, count)


def counted(values: Tensor, rank: int | float) -> int:
    """How many of descending singular values (..., k) a rank means; of a stack the most that one needs."""
    if isinstance(rank, int):
        return min(rank, values.shape[-1])
    energy = values.square().cumsum(-1)
    return min(int((energy < rank * energy[..., -1:]).sum(-1).max()) + 1, values.shape[-1])


def determined(values: Tensor, count: int) -> bool:
    """Is each of the first ones of descending numbers apart from the next, and from zero?"""
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    return bool((values - following > GAP * values[..., :1])[..., :count].all())


def probe_vector(n: int, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers in [-1, 1) that are the same everywhere, (n,) of float64."""
    j = torch.arange(1, n + 1, device=device) + (stream << 24)
    h = (j * 2654435761) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 2246822519) & 0xFFFFFFFF
    return (h ^ (h >> 13)).double() / 2.0**31 - 1


class SpectralFactors(WideFactors):
    """Singular vectors of a parameter and the change of their singular values: `core` (r,), `factor0` (m, r) and
    `factor1` (n, r), each with the dimensions of a stack before. Called, it gives a core and factors as
    `TuckerFactors` does, of the same change."""

    core_only, scale, dropout, start = True, 1.0, 0.0, None

    def __init__(self, shape: Sequence[int], stacked: bool, rank: int, device, dtype, determined: bool = False):
        super().__init__()
        self.shape, self.stacked, self.determined = tuple(shape), stacked, determined
        *stack, m, n = matrices(shape, stacked)
        self.core = nn.Parameter(torch.zeros(*stack, rank, device=device, dtype=dtype))
        self.factor0 = nn.Parameter(torch.empty(*stack, m, rank, device=device, dtype=dtype), requires_grad=False)
        self.factor1 = nn.Parameter(torch.empty(*stack, n, rank, device=device, dtype=dtype), requires_grad=False)

    def forward(self) -> tuple[Tensor, list[Tensor | None]]:
        return self.assembled(self.core, (self.factor0, self.factor1), self.shape)

    @staticmethod
    def assembled(core: Tensor, factors: Sequence[Tensor], shape: Sequence[int]) -> tuple[Tensor, list[Tensor | None]]:
        """U diag(core) V' as a Tucker core and factors, the cheapest way for each kind.

        A matrix has diag(core) between U and V, whose gradient is a product at the rank's width. A convolution has V'
        for its core, a kernel into the rank, and U diag(core) for a factor: no gradient of a kernel is taken. A stack
        is composed here: its factors differ from one matrix to the next.
        """
        u, v = factors
        if core.dim() > 1:
            return (u * core[..., None, :]) @ v.mT, [None] * len(shape)
        if len(shape) == 2:
            return core.diag(), [u, v]
        return v.mT.reshape(-1, *shape[1:]), [u * core, *[None] * (len(shape) - 1)]

    def reset_parameters(self) -> None:
        restart(self.core, [], self.start)

    @property
    def rank(self) -> int:
        return self.core.shape[-1]

    @property
    def ranks(self) -> list[int | None]:
        """Of the modes, as those of a Tucker adapter."""
        if self.core.dim() > 1:
            return [None] * len(self.shape)
        return [self.rank] * 2 if len(self.shape) == 2 else [self.rank, *[None] * (len(self.shape) - 1)]

    @property
    def factors(self) -> list[Tensor | None]:
        return self()[1]

    def told_ranks(self) -> str:
        return str(self.rank)

    def described(self) -> dict[str, Any]:
        return {"shape": self.shape, "rank": self.rank, "stacked": self.stacked, "determined": self.determined}

    def probe(self) -> Tensor:
        """(a'u_i)(v_i'b) with fixed a and b, (..., r): what tells one set of pairs from another, whatever their
        signs."""
        sides = [probe_vector(f.shape[-2], i, f.device) @ f.detach().double()
                 for i, f in enumerate((self.factor0, self.factor1))]
        return (sides[0] * sides[1]).float()

    @torch.no_grad()
    def fits(self, weight: Tensor) -> bool:
        """Are these still singular pairs of the weight: W v_i = sigma_i u_i?"""
        w = weight.detach().reshape(matrices(self.shape, self.stacked)).double()
        u, v = self.factor0.double(), self.factor1.double()
        image = w @ v
        return bool((image - u * (u * image).sum(-2, keepdim=True)).norm() <= 1e-5 * image.norm())

    def for_file(self, weight: Tensor | None, config: Mapping) -> dict[str, Tensor]:
        """The tensors that a file needs: without the vectors where `weight`, at hand, gives them again."""
        at_hand = weight is not None and not any(is_sharded(p) or p.is_meta for p in self.parameters())
        if not at_hand or config["save_vectors"] or not self.determined or not self.fits(weight):
            return dict(self._parameters)
        return {"core": self.core, "probe": self.probe()}

    def extra_repr(self) -> str:
        return f"{self.shape}, rank={self.rank}"


@torch.no_grad()
def spectral_factors(weight: Tensor, shape: Sequence[int], stacked: bool, rank: int | float, device, dtype,
                     zero_row: int | None = None) -> SpectralFactors:
    """Factors of the weight's own singular vectors, of a change of zero."""
    w = weight.detach().reshape(matrices(shape, stacked)).double()
    if zero_row is not None:  # of an embedding, which stays as it is
        w = w.clone()
        w[zero_row] = 0
    u, v, known = singular_pairs(w, rank, dtype == torch.float64)
    part = SpectralFactors(shape, stacked, u.shape[-1], device, dtype, known)
    part.factor0.copy_(u)
    part.factor1.copy_(v)
    return part
