"""AdamW whose moments live in a few directions of each gradient.

    Q        (n, r), orthonormal: a basis of the gradient's dominant row space, or r of a fixed basis's columns
    g        = G Q
    m, v     = AdamW's moments of g, turned with Q: m <- m R, v <- v (R ∘ R), R = Q_beforeᵀ Q
    W        <- (1 - lr wd) W - lr scale (m / (sqrt v + eps)) Qᵀ

Four products of m n r each where Q is found anew, two where it stays, and one pass over W; of Hadamard's basis
transforms take their place on a CPU. The state of a matrix is r (2m + n) numbers, n the shorter side, where AdamW has
2 m n.

GaLore: arXiv 2403.03507. Bases and their turns: DCT-AdamW, arXiv 2505.17967, and LDAdam, arXiv 2410.16103.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..common import (
    FLOATS,
    POSITIVE,
    check_number,
    check_word,
    full_precision,
    whole,
)
from .feedback import FEEDBACKS
from .matrices import SIDES, Matrix, is_turned, matrix_shape, on_host
from .optimiser import MatrixOptimizer, check_torchs
from .projectors import KINDS, PROJECTORS
from .shards import local


class LowRankAdamW(MatrixOptimizer):
    """AdamW with moments in ``rank`` dimensions: for matrices 2 r (m + n) numbers of state at most instead of 2 m n.

    A matrix whose shorter side is above ``rank`` is projected along that side; all other parameters take the step of
    `torch.optim.AdamW`, bit for bit. Weights of convolutions are (out, in/groups times the kernel); parameters of three
    dimensions whose last two are both above rank are that many matrices, as of experts, each with a projector of its
    own. Embeddings are matrices.

    Args:
        params: parameters, named ones, or dicts, as for torch's optimisers; every option below may be a group's own.
        lr: learning rate, a number or a 1-element tensor.
        rank: dimensions kept of each matrix, at least 1. It may change between steps, below shorter sides.
        projector: "range" finds the gradient's dominant directions by `range_finder`, "svd" as singular vectors, much
            slower; "cosine" (`cosine_columns`) and "hadamard" choose among the columns of a fixed basis, and store the
            choice alone. docs/lowrank.md has what they were measured to do.
        every: steps after which directions are found, or chosen, anew; 1 for each.
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        error_feedback: what projections left out is added to the next gradient: None for not, "int8" for 8 bits an
            entry, with a scale for each 256 or so of a row, or "dense" for all digits. As large as the weights: it
            costs an eighth, or a half, of what AdamW's state does.
        scale: factor of the projected parameters' updates.
        side: which side of a matrix is projected: "shorter", "rows" or "columns", the first or the last one. It stays
            what it was in a group's first step.
        seed: an int of at least 0, of which all that "range" draws is a function, with the parameter's step. Equal on
            all devices and processes; kept, as every option is, in `state_dict`.
        foreach: torch's implementation for the parameters that are not projected.

    Moments, bases and scales are float32 for float32 and half types, and float64 for float64.

    A matrix whose gradient is not finite is left as it is, its state too, and is counted in `skipped` (an int, or a
    tensor where parameters are not on a CPU); on a CPU the first gives a RuntimeWarning. Others are not disturbed.
    Parameters that are not projected do as in torch, where such entries become NaN.

    Parameters of FSDP2 (DTensors), sharded along their first dimension, train as one process does, up to rounding: by
    sums of n r numbers over the processes where columns are projected, and where rows are by gathering the gradient,
    whose moments each process then has.

    Raises:
        ValueError, TypeError: a bad value, or one of a wrong kind, by name.
        RuntimeError: a sparse gradient; a parameter sharded in another way.

    Source: GaLore, arXiv 2403.03507; DCT-AdamW, arXiv 2505.17967.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 96))
        >>> opt = ts.lowrank.LowRankAdamW(model.parameters(), lr=1e-3, rank=8)
        >>> model(torch.randn(10, 64)).square().mean().backward()
        >>> opt.step()
        >>> full = 2 * 4 * sum(p.numel() for p in model.parameters())    # AdamW's moments, in bytes
        >>> opt.state_bytes() < full / 3
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rank: int = 128,
        projector: str = "range",
        every: int = 1,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        *,
        error_feedback: str | None = None,
        scale: float = 1.0,
        side: str = "shorter",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        own = {"rank": rank, "projector": projector, "every": every, "error_feedback": error_feedback,
               "scale": scale, "side": side, "seed": seed}
        super().__init__(params, own, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize,
                         foreach=foreach)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        return _checked(type(self).__name__, options)

    def _keeps(self, loaded: Mapping[str, Any]) -> bool:
        return any(kind in loaded for kind in KINDS)

    def _misfit(self, group: dict[str, Any], p: Tensor, loaded: Mapping[str, Any]) -> Sequence[int] | None:
        kind = next((key for key in KINDS if key in loaded), None)
        shape = matrix_shape(p.shape, group["rank"])
        if kind is None:
            return super()._misfit(group, p, loaded)
        if shape is None:
            return loaded["exp_avg"].shape
        moments, basis = _projected(shape, group)
        expected, n = {"exp_avg": moments, "exp_avg_sq": moments, "error": tuple(shape)[:-1]}, basis[-1]
        if kind == "basis":
            expected[kind] = basis
        elif not hasattr(loaded[kind], "placements") and int(loaded[kind].max()) >= n:
            return loaded[kind].shape
        return next((t.shape for key, t in loaded.items()
                     if key in expected and tuple(t.shape[:-1]) != expected[key]), None)

    def _steps(self, group: dict[str, Any], p: Tensor) -> bool:
        return not self._is_projected(group, p)

    def _is_projected(self, group: dict[str, Any], p: Tensor) -> bool:
        name, state = type(self).__name__, self.state.get(p, {})
        shape = matrix_shape(p.shape, group["rank"]) if p.dtype in FLOATS else None
        if not any(key in state for key in KINDS):
            return shape is not None
        if shape is None:
            raise ValueError(f"{name}: rank must stay below a side of what has been projected, got "
                             f"{group['rank']} for a parameter of shape {tuple(p.shape)}")
        if tuple(state["exp_avg"].shape[:-1]) != _projected(shape, group)[0]:
            raise ValueError(f"{name}: rank and side must leave what has been projected the same matrices, got "
                             f"rank={group['rank']}, side={group['side']!r} for a parameter of shape {tuple(p.shape)}")
        return True

    def _matrix_steps(self) -> None:
        name = type(self).__name__
        for group in self.param_groups:
            first = group.setdefault("first_side", group["side"])  # square matrices do not tell
            if group["side"] != first:
                raise ValueError(f"{name}: side must stay {first!r}, with which the group was first stepped, got "
                                 f"{group['side']!r}")
        work = [(i, Matrix(name, p, group)) for i, group in enumerate(self.param_groups)
                for p in group["params"] if p.grad is not None and self._is_projected(group, p)]
        starts: dict[Any, Tensor] = {}
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if len(work) < len(given) or not all(map(on_host, given)):  # elsewhere it also looks for a graph's capture
            self._adamw_step()
        for i, matrix in work:
            with full_precision(matrix.weight):
                self._count(i, matrix.step(self.state[matrix.weight], starts))

    def state_bytes(self) -> int:
        """The memory of all tensors of the state that this process holds, in bytes: what a first step makes stays."""
        tensors = [t for state in self.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(local(t).numel() * t.element_size() for t in tensors)


def _projected(shape: tuple[int, ...], group: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of moments and of a basis but for their columns: (..., m) and (..., n)."""
    *stack, m, n = (*shape[:-2], *reversed(shape[-2:])) if is_turned(shape, group["side"]) else shape
    return (*stack, m), (*stack, n)


WORDS = {"projector": PROJECTORS, "side": SIDES}


def _checked(name: str, options: dict[str, Any]) -> dict[str, int]:
    """Of a group's options or an optimiser's arguments those that are ints; raises in `name`'s voice."""
    check_torchs(name, options)
    for key in WORDS.keys() & options.keys():
        check_word(name, key, options[key], WORDS[key])
    if options.get("error_feedback") is not None:
        check_word(name, "error_feedback", options["error_feedback"], FEEDBACKS)
    if "scale" in options:
        check_number(name, "scale", options["scale"], POSITIVE)
    return {key: whole(name, key, options[key], least) for key, least in (("rank", 1), ("every", 1), ("seed", 0))
            if key in options}
