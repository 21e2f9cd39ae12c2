"""How many dimensions a task needs: the least d at which a random subspace of d dimensions reaches a given share of the
whole module's score, found by doubling, then by bisection of its logarithm."""
from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import nn

from ..common import POSITIVE, check_flag, check_module, check_number, check_word, told, whole
from ..progress import progress
from .parts import check_dense_gradients, check_memory, check_parameter
from .projections import KINDS
from .random_subspace import RandomSubspace

NAME = "intrinsic_dimension"
SHARE = (math.ulp(0.0), 1.0, "above 0 and at most 1")


@dataclass
class IntrinsicDimension:
    """What `intrinsic_dimension` found.

    Attributes:
        dim: the least d that was found to reach the target, None where none up to ``most`` did.
        size: D, how many numbers the whole module trains.
        baseline: its score, the mean over seeds.
        target: threshold times the baseline.
        scores: {d: the score of each seed}, of all d that were tried, in their order.
        kind: of the projections.

    Example:
        >>> found = ts.lowrank.IntrinsicDimension(150, 17610, 0.98, 0.882, {100: [0.82], 150: [0.89]}, "dense")
        >>> print(found)
        dense: 150 of 17610 dimensions reach 0.882, of 0.98
    """

    dim: int | None
    size: int
    baseline: float
    target: float
    scores: dict[int, list[float]] = field(repr=False)
    kind: str

    def __str__(self) -> str:
        found = self.dim if self.dim is not None else f"none up to {max(self.scores)}"
        return f"{self.kind}: {found} of {self.size} dimensions reach {self.target:.4g}, of {self.baseline:.4g}"

    def plot(self, path: str | Path | None = None, axes: Any = None) -> Any:
        """Draw the scores over d, with matplotlib.

        Args:
            path: where the picture goes; default: nowhere.
            axes: matplotlib's, to draw into, default: those of a figure of its own.

        Returns:
            The axes.
        """
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(5, 3.4), layout="constrained").subplots()
        dims = sorted(self.scores)
        mean = [sum(self.scores[d]) / len(self.scores[d]) for d in dims]
        (line,) = axes.plot(dims, mean, marker="o", markersize=3.5, label=self.kind)
        axes.fill_between(dims, [min(self.scores[d]) for d in dims], [max(self.scores[d]) for d in dims], alpha=0.2,
                          color=line.get_color(), linewidth=0)
        axes.axhline(self.baseline, color="0.4", linewidth=1)
        axes.axhline(self.target, color="#c2410c", linewidth=1, linestyle="--")
        if self.dim is not None:
            axes.axvline(self.dim, color=line.get_color(), linewidth=1, linestyle=":")
        axes.set(xscale="log", xlabel="d, dimensions trained", ylabel="score")
        axes.legend(frameon=False)
        if path is not None:
            axes.figure.savefig(path, dpi=100)
        return axes


def intrinsic_dimension(
    make: Callable[[], nn.Module],
    fit: Callable[[nn.Module], SupportsFloat],
    threshold: float = 0.9,
    *,
    kind: str = "fastfood",
    seeds: Sequence[int] = (0,),
    start: int = 16,
    most: int | None = None,
    tolerance: float = 0.1,
    verbose: bool = False,
) -> IntrinsicDimension:
    """The least dimension of a random subspace in which a module trains to a share of its full score.

    Args:
        make: returns a new module, whose initial parameters are to be drawn from torch's generator: it is seeded before
            every call.
        fit: trains the module that it is given, by the parameters of it that require a gradient, and returns its score:
            the larger the better, as an accuracy, and above 0. It is given the whole module first, then
            `RandomSubspace` modules of several dimensions: they want larger learning rates.
        threshold: the share of the whole module's score that is asked for, above 0 and at most 1; 0.9 gives d90.
        kind: of projections, as in `RandomSubspace`.
        seeds: ints from 0; module, projection and `fit` are drawn from each, and scores are means over them.
        start: the d that is tried first, then doubled or halved until the target lies between two.
        most: the largest d to try, default: D.
        tolerance: bisection ends where the least d that reaches the target exceeds the largest that does not by this
            share.
        verbose: show a progress bar (tqdm), a step for each module that is trained.

    Returns:
        `IntrinsicDimension`: the dimension, and all scores on the way.

    torch's generators are left as they were. A score that is not finite reaches no target. Scores of few seeds are
    noisy where they meet the target, and so is what is found: ``scores`` shows by how much.

    Raises:
        TypeError, ValueError: arguments of a wrong kind or out of range, or make returns no module, or fit no number.
        RuntimeError: the whole module's score is not positive and finite.

    Source: Li et al., "Measuring the intrinsic dimension of objective landscapes" (2018, arXiv 1804.08838).

    Example:
        >>> x = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, :3].sum(1) > 0).long()
        >>> def fit(model):
        ...     opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
        ...     for _ in range(100):
        ...         opt.zero_grad(); torch.nn.functional.cross_entropy(model(x), y).backward(); opt.step()
        ...     return (model(x).argmax(1) == y).float().mean()
        >>> found = ts.lowrank.intrinsic_dimension(lambda: torch.nn.Linear(20, 2), fit, kind="dense")
        >>> 1 < found.dim < found.size, found.size
        (True, 42)
    """
    check_number(NAME, "threshold", threshold, SHARE)
    check_word(NAME, "kind", kind, KINDS)
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not seeds:
        raise TypeError(f"{NAME}: seeds must be a sequence of ints, one at least, got {told(seeds)}")
    seeds = [whole(NAME, "seeds", seed) for seed in seeds]
    start = whole(NAME, "start", start, 1)
    most = None if most is None else whole(NAME, "most", most, 1)
    check_number(NAME, "tolerance", tolerance, POSITIVE)
    check_flag(NAME, "verbose", verbose)
    for what, function in (("make", make), ("fit", fit)):
        if not callable(function) or isinstance(function, nn.Module):
            raise TypeError(f"{NAME}: {what} must be a function, got {told(function)}")
    with progress(None, verbose, "fit") as bar:
        search = _Search(make, fit, kind, seeds, bar)
        baseline = search.score(None)
        if not 0 < baseline < math.inf:
            raise RuntimeError(f"{NAME}: the whole module's score must be positive and finite, got {baseline}")
        search.target = threshold * baseline
        dim = search.least(min(start, most or start), min(most or search.size, search.size), tolerance)
    return IntrinsicDimension(dim, search.size, baseline, search.target, search.scores, kind)


class _Search:
    """Scores by dimension, each of them trained once."""

    def __init__(self, make, fit, kind, seeds, bar) -> None:
        self.make, self.fit, self.kind, self.seeds, self.bar = make, fit, kind, seeds, bar
        self.scores: dict[int, list[float]] = {}
        self.size, self.target = 0, math.nan
        self.last: weakref.ref[nn.Module] | None = None

    def score(self, dim: int | None) -> float:
        """The mean over seeds, of the whole module for None."""
        found = []
        for seed in self.seeds:
            self.bar.set_description("whole module" if dim is None else f"d = {dim}")
            devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                module = self.make()
                check_module(NAME, module, "what make returns")
                self._check(module)
                score = self.fit(module if dim is None else RandomSubspace(module, dim, self.kind, seed=seed))
            try:
                found.append(float(score if not isinstance(score, str) else None))
            except (TypeError, ValueError):
                raise TypeError(f"{NAME}: fit must return a number, got {told(score)}") from None
            self.bar.update()
        if dim is not None:
            self.scores[dim] = found
        return sum(found) / len(found)

    def _check(self, module: nn.Module) -> None:
        """Raises unless it is a new one with something to train."""
        if self.last is not None and self.last() is module:
            raise ValueError(f"{NAME}: make must return a new module each time, got the last {type(module).__name__}")
        self.last = weakref.ref(module)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name, p in trained.items():
            check_parameter(NAME, name, p)
        check_memory(NAME, module)
        check_dense_gradients(NAME, module)
        self.size = sum(p.numel() for p in trained.values())
        if not self.size:
            raise ValueError(f"{NAME}: make must return a module with parameters that require a gradient, got "
                             f"{type(module).__name__}")

    def reaches(self, dim: int) -> bool:
        return self.score(dim) >= self.target

    def least(self, start: int, most: int, tolerance: float) -> int | None:
        """The least dimension that reaches the target, as far as doubling, halving and bisection tell."""
        high = min(start, most)
        if self.reaches(high):
            low = high // 2
            while low > 0 and self.reaches(low):
                low, high = low // 2, low
        else:
            low, high = high, min(2 * high, most)
            while low < most and not self.reaches(high):
                low, high = high, min(2 * high, most)
            if low == most:
                return None
        while high - low > 1 and high > low * (1 + tolerance):
            middle = min(max(round(math.sqrt(max(low, 1) * high)), low + 1), high - 1)
            low, high = (low, middle) if self.reaches(middle) else (middle, high)
        return high
