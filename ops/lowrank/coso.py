"""Continual learning in subspaces: what earlier tasks have used of a layer's inputs is left alone by later ones.

    G'     = G - (G M) M'                     M (n, k) orthonormal: what earlier tasks used of the inputs of W (m, n)
    P      = r1 leading right singular vectors of G'
    W      <- W - lr adam(G' P) P'            moments (m, r1), turned with P: m <- m R, v <- v (R ∘ R), R = P_before' P
    S      <- frequent directions of [decay S; G'], r2 rows
    M      <- [M, leading directions of S]    at a task's end: those that hold `threshold` of its energy

As P'M = 0, ΔW M = 0: what a layer answers to an input in the span of M is what it was when that task ended. CoSO, Cheng
et al., NeurIPS 2025; their code projects on the outputs' side, and two SVDs are most of its step. tasks.py has what is
done instead.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..common import (
    UP_TO_1,
    check_flag,
    check_number,
    full_precision,
    told,
    whole,
    wide_dtype,
)
from .frequent_directions import merged
from .optimiser import MatrixOptimizer, check_torchs
from .product import add_product_, product
from .shards import all_finite, local, owners, placed, sharing, total
from .tasks import directions, matrix_of, off, remembered, resized

OWN = ("basis", "sketch", "memory")


class CoSO(MatrixOptimizer):
    """AdamW for tasks one after another, that keeps what was learned: gradients are projected off the directions of
    the inputs that earlier tasks have used, and steps are taken in a few dimensions.

    Call `consolidate` at each task's end. Until the first one it is AdamW in `rank` dimensions of every matrix, and
    AdamW itself for what has fewer, and for vectors. From then on

    * matrices move only where no earlier task's gradients were: ΔW M = 0, to rounding, weight decay included;
    * other parameters that were trained before (biases, scales of norms) stay as they are: a bias answers to all inputs
      alike, so that any step of it would change earlier tasks;
    * a group with ``protect=False`` is AdamW throughout, as for heads that each belong to one task. Parameters that
      join later, by `add_param_group`, are trained as in a first task.

    A matrix's inputs are its last dimension: that of torch's linear layers (out, in), and (in/groups times the kernel)
    of convolutions. A parameter of three dimensions whose last two are above `rank` is that many matrices.

    Args:
        params: parameters, named ones, or dicts, as for torch's optimisers; every option below may be a group's own.
        lr: learning rate, a number or a 1-element tensor.
        rank: dimensions of a step, r1.
        sketch_rank: rows of the sketch of a task's gradients, r2, from which its memory is taken: at most so many
            directions a task.
        every: steps after which directions are found anew, and the sketch is fed.
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`, without weight decay by default.
        threshold: share of the sketch's energy that is remembered of a task, in the fewest directions that hold it.
        decay: what the sketch is multiplied by when it is fed: below 1, late gradients count more.
        protect: whether `consolidate` protects the group's parameters.
        seed: an int of at least 0: the range finder's start is a function of it and of the step.
        foreach: torch's implementation for what takes AdamW's own step.

    A matrix whose gradient is not finite is left as it is, its state too, with a RuntimeWarning the first time;
    `skipped` counts them. What takes AdamW's own step does as in torch, where such entries become NaN. State is float32
    beside float32 and half types, float64 beside float64. `state_dict` has all of it, memories included.

    Parameters of FSDP2 (DTensors), sharded along their first dimension, train as one process does, up to rounding: each
    process has the moments of its rows, and all have directions, sketch and memory. Where directions are found anew
    they exchange a sum of n c numbers and one of c², c = max(rank, sketch_rank), n the inputs; n² where n <= c, and the
    gradient where it has no more than c rows. Matrices of a stack are whole where they are, with all that belongs to
    them: nothing is exchanged but whether all is finite.

    Raises:
        ValueError, TypeError: a bad value, or one of a wrong kind, by name.
        RuntimeError: a sparse gradient; a parameter sharded in another way.

    Source: Cheng, Wan, Wu, Hou and Zhang, Continuous Subspace Optimization for Continual Learning, NeurIPS 2025, which
    projects on the outputs' side of torch's weights and keeps one direction fewer a task.

    Example:
        >>> layer = torch.nn.Linear(64, 32)
        >>> opt = ts.lowrank.CoSO(layer.parameters(), lr=1e-2, rank=4, sketch_rank=8)
        >>> first = torch.randn(50, 3) @ torch.randn(3, 64)
        >>> layer(first).square().mean().backward()
        >>> opt.step()
        >>> opt.consolidate()
        >>> before = layer(first)
        >>> layer(torch.randn(50, 64)).square().mean().backward()    # a second task
        >>> opt.step()
        >>> torch.allclose(layer(first), before, atol=1e-4)
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 4e-4,
        rank: int = 50,
        sketch_rank: int = 120,
        every: int = 1,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        *,
        threshold: float = 0.98,
        decay: float = 1.0,
        protect: bool = True,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        own = {"rank": rank, "sketch_rank": sketch_rank, "every": every, "threshold": threshold, "decay": decay,
               "protect": protect, "seed": seed}
        super().__init__(params, own, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize,
                         foreach=foreach)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        return _checked(type(self).__name__, options)

    def _misfit(self, group: dict[str, Any], p: Tensor, loaded: Mapping[str, Any]) -> Sequence[int] | None:
        shape = matrix_of(group, p)
        if shape is None or not loaded.keys() & set(OWN):
            return super()._misfit(group, p, loaded)
        expected = {"basis": shape[:-2] + shape[-1:], "memory": shape[:-2] + shape[-1:],
                    "exp_avg": shape[:-1], "exp_avg_sq": shape[:-1]}
        found = {key: tuple(loaded[key].shape) for key in expected.keys() & loaded.keys()}
        if "sketch" in loaded and tuple(loaded["sketch"].mT.shape[:-1]) != expected["basis"]:
            return loaded["sketch"].shape
        return next((own for key, own in found.items() if own[:-1] != expected[key] and
                     not (key.startswith("exp") and own == tuple(p.shape))), None)

    def _steps(self, group: dict[str, Any], p: Tensor) -> bool:
        return not self._is_projected(group, p) and "frozen" not in self.state.get(p, ())

    def _is_projected(self, group: dict[str, Any], p: Tensor) -> bool:
        shape = matrix_of(group, p)
        state = self.state.get(p, {})
        if shape is not None and any(tuple(state[key].shape[:-1]) != (*shape[:-2], shape[-1])
                                     for key in ("basis", "memory") if key in state):
            raise ValueError(f"{type(self).__name__}: rank must leave what has been projected the same matrices, got "
                             f"{group['rank']} for a parameter of shape {tuple(p.shape)}")
        if shape is not None and (shape[-1] > group["rank"] or "memory" in state):
            return True
        if shape is None and state.keys() & {"memory", "basis"}:
            raise ValueError(f"{type(self).__name__}: protect must stay True for what has been protected, got "
                             f"{group['protect']} for a parameter of shape {tuple(p.shape)}")
        if "basis" in state:  # and rank has grown to all inputs
            raise ValueError(f"{type(self).__name__}: rank must stay below the inputs of what has been projected, got "
                             f"{group['rank']} for a parameter of shape {tuple(p.shape)}")
        return False

    def _matrix_steps(self) -> None:
        work = [(i, group, p) for i, group in enumerate(self.param_groups) for p in group["params"]
                if p.grad is not None and matrix_of(group, p) is not None]
        for _, group, p in work:
            if p.grad.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__}: gradients must be dense, got one of {p.grad.layout} for a "
                                   f"parameter of shape {tuple(p.shape)}")
            sharing(type(self).__name__, p, len(matrix_of(group, p)))
        projected = [self._is_projected(group, p) for _, group, p in work]
        self._adamw_step()
        for (i, group, p), moves in zip(work, projected, strict=True):
            with full_precision(p):
                self._count(i, self._matrix_step(group, p, moves), f"a matrix of shape {tuple(p.shape)}")

    def _matrix_step(self, group: dict[str, Any], p: Tensor, moves: bool) -> int:
        """Feed the sketch, and where it `moves`, take the step; nothing, and 1, where the gradient is not finite."""
        state, shape, own = self.state[p], matrix_of(group, p), local(p)
        processes, _ = sharing(type(self).__name__, p, len(shape))
        shape = own.shape[0], *shape[1:]
        grad = local(p.grad).reshape(shape).to(wide_dtype(p.dtype))
        finite = grad.sum().isfinite()
        if not all_finite(finite if finite else grad.isfinite().all(), owners(p)):
            return 1
        held = {key: local(state[key]).to(own.device) for key in OWN if key in state}
        memory, basis, count = held.get("memory"), held.get("basis"), int(state.get("step", 0)) - (not moves)
        turn = low = None
        if count % group["every"] == 0 or (moves and basis is None):
            before, (basis, low, block) = basis, directions(grad, memory, group, count, p, processes)
            sketch = held.get("sketch")
            if sketch is None or sketch.shape[-2] != min(group["sketch_rank"], shape[-1]):
                sketch = resized(sketch, block, min(group["sketch_rank"], shape[-1]))
            state["sketch"] = _kept(merged(sketch, block, group["decay"]).to(grad.dtype), p)
            turn = None if before is None else product(before.mT, basis)
        if not moves:
            return 0
        low = product(grad, basis) if low is None else low
        low = -low if group["maximize"] else low
        mean, square = (local(state[key]) if key in state else None for key in ("exp_avg", "exp_avg_sq"))
        if mean is not None and turn is None and mean.shape == own.shape and own.shape != low.shape:  # AdamW's
            mean, square = mean.reshape(shape).to(low) @ basis, square.reshape(shape).to(low) @ basis.square()
        if mean is None or (turn is None and mean.shape != low.shape):
            mean, square, count = torch.zeros_like(low), torch.zeros_like(low), 0
        elif turn is not None:
            mean, square = mean @ turn, square @ turn.square()
        beta1, beta2 = map(float, group["betas"])
        mean.lerp_(low, 1 - beta1)
        square.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        count += 1
        root = (square.sqrt() / math.sqrt(1 - beta2**count)).add_(group["eps"])
        rate, decay = float(group["lr"]), float(group["lr"]) * float(group["weight_decay"])
        update = (mean / root).mul_(-rate / (1 - beta1**count))
        if decay:
            weight = own.reshape(shape).to(grad.dtype).mT
            own.sub_((decay * off(weight, memory).mT).reshape(own.shape).to(own.dtype))
        if own.is_contiguous() and own.dtype == grad.dtype:
            add_product_(own.view(shape), update, basis.mT, 1.0)
        else:
            own.add_(product(update, basis.mT).reshape(own.shape).to(own.dtype))
        moments = {key: placed(t, p) if own is not p else t for key, t in (("exp_avg", mean), ("exp_avg_sq", square))}
        state.update(step=torch.tensor(float(count)), basis=_kept(basis, p), **moments)
        return 0

    @torch.no_grad()
    def consolidate(self) -> None:
        """End a task: protect what it has learned, and begin the next one with fresh moments.

        Of each matrix the fewest directions of its sketch that hold `threshold` of the energy join the memory; other
        parameters that were stepped are kept from now on. Groups with ``protect=False`` are left alone.
        """
        for group in self.param_groups:
            for p in group["params"] if group["protect"] else ():
                state, shape = self.state.get(p, {}), matrix_of(group, p)
                if shape is None and "step" in state:  # torch asks for a step in every state
                    self.state[p] = {"step": torch.zeros(()), "frozen": True}
                elif "sketch" in state:
                    found = remembered(*(local(state[key]) if key in state else None for key in ("sketch", "memory")),
                                       group["threshold"])
                    if found.dim() == 3:  # as many columns in each process
                        most = total(torch.tensor(found.shape[-1], device=found.device), owners(p), "MAX")
                        found = torch.nn.functional.pad(found, (0, int(most) - found.shape[-1]))
                    self.state[p] = {"step": torch.zeros(()), "memory": _kept(found, p)}

    def memory(self, parameter: Tensor) -> Tensor:
        """The directions of a matrix's inputs that are protected, orthonormal columns (n, k); k is 0 before the first
        `consolidate`. Of a stack of matrices (..., n, k), with columns of zeros where one has fewer.

        Args:
            parameter: one of the optimiser's, with two dimensions or more.
        """
        name = type(self).__name__
        group = next((g for g in self.param_groups if any(p is parameter for p in g["params"])), None)
        shape = None if group is None else matrix_of(group, parameter)
        if shape is None:
            raise ValueError(f"{name}: parameter must be a protected matrix of this optimiser, got {told(parameter)}")
        found = self.state.get(parameter, {}).get("memory")
        dtype = wide_dtype(parameter.dtype)
        if found is None:
            return local(parameter).new_zeros((*shape[:-2], shape[-1], 0), dtype=dtype)
        return found.full_tensor() if hasattr(found, "placements") else found.clone()


def _kept(t: Tensor, p: Tensor) -> Tensor:
    """What belongs to each matrix of a stack is where that is; of one matrix all processes have it."""
    return placed(t, p) if t.dim() == 3 and hasattr(p, "placements") else t


def _checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of a group's options or an optimiser's arguments the ints, as such; raises in `name`'s voice."""
    check_torchs(name, options)
    if "protect" in options:
        check_flag(name, "protect", options["protect"])
    for key in options.keys() & {"threshold", "decay"}:
        check_number(name, key, options[key], UP_TO_1)
    least = {"rank": 1, "sketch_rank": 1, "every": 1, "seed": 0}
    return {key: whole(name, key, options[key], n) for key, n in least.items() if key in options}
