"""Trion: orthogonalised momentum of low rank. Muon's step for the r cosines that hold most of the momentum.

    M   <- M + G
    S    = M Q             Q the cosine (DCT-II) basis of the shorter side, and of S's columns the r largest: m = M Q_r
    M   <- M - (1 - mu) m Q_rᵀ         what was stepped along decays, the rest waits
    W   <- (1 - lr wd) W - lr scale O Q_rᵀ          O = newton_schulz(m), orthonormal columns

Q is known to all, so that no basis is stored, and Newton-Schulz works on r x r matrices: beside a Fourier transform of
M the step is two products of m n r each. With a rank of the whole shorter side O Q_rᵀ is newton_schulz(M) itself,
whatever Q, and the momentum decays as a whole: Muon.

arXiv 2505.17967; Dion, whose momentum this is: arXiv 2504.05295.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..common import (
    BELOW_1,
    POSITIVE,
    check_flag,
    check_number,
    check_rate,
    check_word,
    full_precision,
    whole,
)
from .newton_schulz import check_steps
from .optimiser import MatrixOptimizer, check_torchs
from .shards import local
from .trion_step import SCALES, check_gradient, matrices, step

ALGORITHMS = ("trion", "adamw")


class Trion(MatrixOptimizer):
    """Muon in ``rank`` dimensions: each step is orthogonal on the cosines that hold most of a matrix's momentum.

    Every parameter with two sides above 1 is a matrix and keeps one buffer of its own size, half of what AdamW does.
    All others (biases, norms) take the step of `torch.optim.AdamW` at ``adamw_factor`` times the rate, bit for bit; so
    does all of a group with ``algorithm="adamw"``, where embeddings and the classifier belong: `trion_groups` puts them
    there. A convolution's weight is (out, in/groups times the kernel). One of three dimensions is a stack of matrices,
    as of experts, if the shorter of the last two is above rank, else a convolution's; ``stacked`` says it outright.

    Args:
        params: parameters, named ones, or dicts, as for torch's optimisers; every option below may be a group's own.
        lr: learning rate, a number or a 1-element tensor.
        rank: cosines a step goes along, at least 1; from a matrix's shorter side on the step is Muon's.
        momentum: mu, what is kept of the momentum that was stepped along; 0 to 1.
        weight_decay: decoupled, lr times this a step, of all parameters.
        ns_steps, ns_coefficients: `newton_schulz`'s steps and coefficients.
        adjust_lr_fn: scale of a matrix (A, B), as in `torch.optim.Muon`. "original", also None: sqrt(max(1, A/B)).
            "match_rms_adamw": 0.2 sqrt(A B / r), which makes the update's root mean square 0.2, about AdamW's, at any
            rank; torch's 0.2 sqrt(max(A, B)) is that at full rank. "spectral_unclamped": sqrt(A/B).
        algorithm: "trion", or "adamw" for a group without matrices.
        stacked: of parameters of three dimensions, whether each is many matrices; None: by the rule above.
        adamw_factor: AdamW's rate by Trion's. None: 1 with "match_rms_adamw", else 0.05, 1e-3 where Trion has 0.02.
        betas, eps, foreach: AdamW's, for the parameters that are no matrices.
        maximize: as in torch.

    The momentum is float32 for float32 and half types, float64 for float64. Parameters in half types are rounded once
    a step. Equal gradients make equal steps, so that DistributedDataParallel needs nothing more.

    Parameters of FSDP2 (DTensors), sharded along their first dimension, train as one process does, up to rounding, and
    their momentum stays in shards. Of a matrix (A, B) with A >= B processes exchange B norms and the rows of the r
    columns, A r numbers; with A < B, or a rank of the whole shorter side, the momentum is gathered, and each process
    orthogonalises all of it. Matrices of a stack are whole where they are: nothing is exchanged.

    A matrix whose gradient (or its sum) is not finite is left as it is, its momentum too, and is counted in `skipped`
    (an int, or a tensor where parameters are not on a CPU); on a CPU the first gives a RuntimeWarning. Others are not
    disturbed. Parameters that are no matrices do as in torch, where such entries become NaN.

    Raises:
        ValueError, TypeError: a bad value, or one of a wrong kind, by name.
        RuntimeError: a sparse gradient of a matrix; a matrix sharded in another way.

    Source: arXiv 2505.17967; rates and their scales: torch.optim.Muon.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        >>> opt = ts.lowrank.Trion(ts.lowrank.trion_groups(model, adamw=["2"]), lr=0.02, rank=16)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(20, 64)), torch.arange(20) % 10).backward()
        >>> opt.step()
        >>> opt.state[model[0].weight]["momentum_buffer"].shape, "exp_avg" in opt.state[model[2].weight]
        (torch.Size([128, 64]), True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        rank: int = 128,
        momentum: float = 0.95,
        weight_decay: float | Tensor = 0.01,
        ns_steps: int = 5,
        *,
        ns_coefficients: str | Sequence[Any] = "muon",
        adjust_lr_fn: str | None = None,
        algorithm: str = "trion",
        stacked: bool | None = None,
        adamw_factor: float | None = None,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        own = {"rank": rank, "momentum": momentum, "ns_steps": ns_steps, "ns_coefficients": ns_coefficients,
               "adjust_lr_fn": adjust_lr_fn, "algorithm": algorithm, "stacked": stacked,
               "adamw_factor": adamw_factor}
        super().__init__(params, own, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize,
                         foreach=foreach)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        return _checked(type(self).__name__, options)

    def _misfit(self, group: dict[str, Any], p: Tensor, loaded: Mapping[str, Any]) -> Sequence[int] | None:
        buffer = loaded.get("momentum_buffer")
        if buffer is not None and buffer.shape != p.shape:
            return buffer.shape
        return super()._misfit(group, p, loaded)

    def _keeps(self, loaded: Mapping[str, Any]) -> bool:
        return "momentum_buffer" in loaded

    def _steps(self, group: dict[str, Any], p: Tensor) -> bool:
        return matrices(p, group) is None

    def _matrix_steps(self) -> None:
        work = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"]
                if p.grad is not None and matrices(p, group) is not None]
        groups = self.param_groups
        for group in groups:
            for p in group["params"]:
                if "momentum_buffer" in self.state.get(p, ()) and matrices(p, group) is None:
                    raise ValueError(f"{type(self).__name__}: algorithm must stay 'trion' for what was stepped by it, "
                                     f"got {group['algorithm']!r} for a parameter of shape {tuple(p.shape)}")
        for i, p in work:
            check_gradient(type(self).__name__, p, groups[i])
        try:
            self.param_groups = [group | {"lr": group["lr"] * _factor(group)} for group in groups]
            self._adamw_step()
        finally:
            self.param_groups = groups
        for i, p in work:
            with full_precision(p):
                self._count(i, step(p, groups[i], self.state[p]))

    def state_bytes(self) -> int:
        """The memory of all tensors of the state that this process holds, in bytes: 4 for each entry of a matrix (8 of
        float64) and 4 for its number of steps, and AdamW's of the others. What a first step makes stays."""
        tensors = [t for state in self.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(local(t).numel() * t.element_size() for t in tensors)


# ------------------------------------------------------------------------------------------------------------- options



def _factor(group: dict[str, Any]) -> float:
    if group["adamw_factor"] is not None:
        return group["adamw_factor"]
    return 1.0 if group["adjust_lr_fn"] == "match_rms_adamw" else 0.05


def _checked(name: str, options: dict[str, Any]) -> dict[str, int]:
    """Of a group's options or an optimiser's arguments those that are ints; raises in `name`'s voice."""
    check_torchs(name, options)
    if "momentum" in options:
        check_rate(name, "momentum", options["momentum"], BELOW_1)
    if options.get("stacked") is not None:
        check_flag(name, "stacked", options["stacked"])
    if "algorithm" in options:
        check_word(name, "algorithm", options["algorithm"], ALGORITHMS)
    if options.get("adjust_lr_fn") is not None:
        check_word(name, "adjust_lr_fn", options["adjust_lr_fn"], SCALES)
    if options.get("adamw_factor") is not None:
        check_number(name, "adamw_factor", options["adamw_factor"], POSITIVE)
    if "ns_steps" in options or "ns_coefficients" in options:
        check_steps(name, options.get("ns_steps", 5), options.get("ns_coefficients", "muon"), prefix="ns_")
    return {key: whole(name, key, options[key], 1) for key in ("rank", "ns_steps") if key in options}
