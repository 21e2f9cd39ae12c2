"""Sinkhorn: the plan of given row and column sums that is nearest to exp(scores / eta), with its exact gradient.

    plan[i, j] = f[i] exp(scores[i, j] / eta) g[j],    sum_j plan[i, j] = row[i],    sum_i plan[i, j] = col[j]

f and g are iterated to a tolerance, and the backward differentiates the equations instead of the iterations: one linear
system by conjugate gradients, nothing kept but the plan. See cpu/transport/sinkhorn.c.
"""
from __future__ import annotations

import math
import sys
import warnings

import torch
from torch import Tensor

from ..common import WIDE, check_floating, check_number, transformed
from ..library import raise_signal

_op = torch.ops.torch_subspace
_MODES = {"implicit": 0, "cpp": 5}  # half steps; 0: to the tolerance
_ETA = (math.ulp(0.0), sys.float_info.max, "a positive finite number")
_TOL = (0, math.inf, "a number of at least 0")
_SWEEPS = (0, (1 << 63) - 1, "an int of at least 0")
TINY, FAINT = 1e-20, 1e-16  # of the largest marginal: in place of 0; what is less needs help in the backward
_GENERAL, _SYMMETRIC, _LOOK = range(3)  # subspace_symmetry


def sinkhorn(scores: Tensor, *, eta: float = 0.1, tol: float = 1e-6, max_iter: int = 100, row: Tensor | None = None,
             col: Tensor | None = None, symmetric: bool | None = None, mode: str = "implicit") -> Tensor:
    """Plan f exp(scores / eta) g with the row sums ``row`` and column sums ``col``; doubly stochastic by default.

    Args:
        scores: (..., m, n), any number of leading batch dimensions. -inf forbids an entry: it is exactly 0 in the plan.
        eta: temperature; the smaller, the closer to a permutation, and the more sweeps. What float32's exponent cannot
            hold is done in the log domain, up to scores / eta of about 1e8; scores keep their own rounding, so that
            offsets of 1e4 eta and more cost float32 digits of the plan.
        tol: stop when no row or column sum is further than this from its marginal, relative to the marginal.
        max_iter: sweeps at most, over rows and columns; 0 gives exp((scores - max) / eta) as it is (whose gradient is
            still taken as that of a plan).
        row, col: marginals, (m,) and (n,) or batched (..., m) and (..., n), of equal sums; ones by default, then m = n.
            Rows and columns of marginal 0 are 0 in the plan, and may be all -inf in scores; the gradient of such a 0 is
            that from above. Where both the row's and the column's are 0, an entry takes no part.
        symmetric: True promises that scores equal their transpose (up to rounding: the upper half is taken) and that
            col = row. That halves the work, and the gradient is that of a symmetric argument, itself symmetric.
            None: it is found out, plan by plan, to a few units of rounding, and the gradient stays the general one; the
            symmetric sweeps suit scores like ``|cosines|``; indefinite ones can take many more than False does.
        mode: "implicit", or "cpp" for what the public code of MLC and CPP computes: from potentials of 0 five half
            steps, rows, columns, rows, columns, rows, so that only the row sums are exact; each column potential is a
            constant to the gradient, which is that of the last row normalisation. ``tol``, ``max_iter`` and
            ``symmetric`` are not used. (Their SinkhornDistance has marginals 1/n, and its caller multiplies by n: the
            same plan. It also stops early where the rows' potential moved by less than 1e-12 in sum.)

    Returns:
        plan, of scores' shape and dtype; float32 for float16 and bfloat16, which are computed in float32.

    Differentiable once, in scores, row and col. The gradients of row and col are defined along directions that keep
    both sums equal; what is returned has equal sums itself. In forward mode and under torch.func ``max_iter`` sweeps
    in the log domain serve, in plain torch operations, whatever ``tol``. Under autocast nothing is rounded to half.

    On a CPU outside of torch.compile, scores and marginals are checked, and a plan that did not reach ``tol`` in
    ``max_iter`` sweeps warns (RuntimeWarning) with the error it has. On a GPU nothing waits for the device: a plan that
    does not exist is NaN, and nothing warns.

    Raises:
        TypeError: scores, row or col is not a floating tensor.
        ValueError: shapes, devices, marginals or options do not fit; scores are not symmetric, though promised.
        RuntimeError: a score is NaN or +inf; a whole row or column is -inf.

    Source: Cuturi, arXiv 1306.0895; symmetric: arXiv 2301.01805, section 3.

    Example:
        >>> plan = ts.sinkhorn(torch.randn(6, 6), eta=0.5)
        >>> torch.allclose(plan.sum(0), torch.ones(6), atol=1e-4), torch.allclose(plan.sum(1), torch.ones(6), atol=1e-4)
        (True, True)
        >>> half = ts.sinkhorn(torch.randn(2, 4), eta=0.5, row=torch.tensor([1.0, 1.0]), col=torch.full((4,), 0.5))
        >>> torch.allclose(half.sum(0), torch.full((4,), 0.5), atol=1e-4)
        True
    """
    _check(scores, eta, tol, max_iter, symmetric, mode)
    wide = scores if scores.dtype in WIDE else scores.float()
    eager = wide.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed())
    m, n = scores.shape[-2:]
    cpp = mode == "cpp"
    if symmetric and not cpp:
        if m != n:
            raise ValueError(f"sinkhorn: symmetric scores are square, got {tuple(scores.shape)}")
        if wide is not scores:  # a product rounded to half differs from its transpose by more than float32 would
            _check_symmetric(scores, eager)
            wide = (wide + wide.mT) / 2
    row, col = (_marginal(name, t, wide, size, eager) for name, t, size in (("row", row, m), ("col", col, n)))
    if symmetric and not cpp:
        row, col = _one_marginal(row, col, eager), None
    elif (row is None or col is None) and m != n:
        raise ValueError(f"sinkhorn: marginals of ones need a square plan, got {tuple(scores.shape)}: give row and col")
    if eager and not (symmetric and not cpp):
        _check_sums(row, col, wide)
    shares = ()
    given = [t for t in (row, col) if t is not None]
    if given and not (eager and all(t.all() for t in given)):
        wide, row, col, shares = _filled(wide, row, col, bool(symmetric) and not cpp)
    if transformed():
        return _emptied(_eager(wide, row, col, eta, int(max_iter), bool(symmetric), cpp), *shares)
    how = _GENERAL if cpp or symmetric is False else _SYMMETRIC if symmetric else _LOOK
    empty = wide.new_empty(0)
    flat = [empty if t is None else t.expand(*wide.shape[:-2], t.shape[-1]).reshape(-1, t.shape[-1])
            for t in (row, col)]
    try:
        plan, error, _ = _op.sinkhorn(wide.reshape(-1, m, n), *flat, float(eta), float(tol), int(max_iter), how,
                                      _MODES[mode])
    except RuntimeError as problem:
        raise_signal(problem)
        if eager and "not symmetric" in str(problem):
            raise ValueError(str(problem).splitlines()[0]) from None
        raise
    if eager and not cpp and error.numel():
        worst = error.max().item()
        if not worst <= tol:
            warnings.warn(f"sinkhorn: after {max_iter} sweeps a row or column sum is still off by {worst:.1e} of its "
                          f"marginal, tol is {tol:g}: raise max_iter or eta", RuntimeWarning, stacklevel=2)
    return _emptied(plan.view(scores.shape), *shares)


def _check(scores, eta, tol, max_iter, symmetric, mode) -> None:
    check_floating("sinkhorn", "scores", scores)
    if scores.dim() < 2 or 0 in scores.shape[-2:]:
        raise ValueError(f"sinkhorn: scores must be (..., m, n) with rows and columns, got {tuple(scores.shape)}")
    check_number("sinkhorn", "eta", eta, _ETA)
    check_number("sinkhorn", "tol", tol, _TOL)
    check_number("sinkhorn", "max_iter", max_iter, _SWEEPS)
    if int(max_iter) != max_iter:
        raise ValueError(f"sinkhorn: max_iter must be an int of at least 0, got {max_iter!r}")
    if symmetric is not None and not (isinstance(symmetric, int) and symmetric in (True, False)):
        raise ValueError(f"sinkhorn: symmetric must be None, True or False, got {symmetric!r}")
    if not isinstance(mode, str) or mode not in _MODES:
        raise ValueError(f'sinkhorn: mode must be "implicit" or "cpp", got {mode!r}')


def _marginal(name: str, given: Tensor | None, scores: Tensor, size: int, eager: bool) -> Tensor | None:
    if given is None:
        return None
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise TypeError(f"sinkhorn: {name} must be a floating tensor, got "
                        f"{getattr(given, 'dtype', type(given).__name__)}")
    check_floating("sinkhorn", name, given)
    if given.device != scores.device:
        raise ValueError(f"sinkhorn: scores and {name} must be on one device, got {scores.device} and {given.device}")
    batch = tuple(scores.shape[:-2])
    if tuple(given.shape) not in ((size,), (*batch, size)):
        either = f" or {(*batch, size)}" if batch else ""
        raise ValueError(f"sinkhorn: {name} must be ({size},){either}, got {tuple(given.shape)}")
    if eager and not (((given >= 0) & (given < math.inf)).all() and given.any(-1).all()):
        raise ValueError(f"sinkhorn: {name} must be positive and finite, or 0 but not everywhere, got entries in "
                         f"[{given.min().item():g}, {given.max().item():g}]")
    return given.to(scores.dtype)


def _filled(scores: Tensor, row: Tensor | None, col: Tensor | None, symmetric: bool):
    """Marginals whose zeros are so small that no sum notices, scores to go with them, and what the plan's rows and
    columns are to be multiplied with: 1, or 0 with the derivative that brings the plan of a small marginal back."""
    given = (row, row) if symmetric else (row, col)
    filled, share, empty = [None, None], [None, None], [None, None]
    for i, t in enumerate(given):
        if t is None:
            continue
        least = TINY * t.detach().amax(-1, keepdim=True)
        empty[i] = t == 0
        filled[i], share[i] = torch.where(empty[i], t + least, t), torch.where(empty[i], t / least, 1)
    rows, columns = (torch.zeros_like(scores[..., 0, :1], dtype=torch.bool) if t is None else t for t in empty)
    rows, columns = rows[..., :, None], columns[..., None, :]
    top = scores.detach().amax((-2, -1), keepdim=True)
    scores = torch.where(rows | columns, scores.detach(), scores)
    scores = torch.where(rows & columns, -math.inf, scores)
    scores, before = torch.where(rows & ~columns & (scores == -math.inf).all(-1, keepdim=True), top, scores), scores
    scores = torch.where(columns & ~rows & (before == -math.inf).all(-2, keepdim=True), top, scores)
    return scores, filled[0], None if symmetric else filled[1], tuple(share)


def _emptied(plan: Tensor, row: Tensor | None = None, col: Tensor | None = None) -> Tensor:
    plan = plan if row is None else plan * row[..., :, None]
    return plan if col is None else plan * col[..., None, :]


def _one_marginal(row: Tensor | None, col: Tensor | None, eager: bool) -> Tensor | None:
    """What symmetric plans have for both; the gradient of two that were given is shared out."""
    if row is None or col is None:
        return col if row is None else row
    if eager and not torch.allclose(row, col, rtol=_rounding(row.dtype)):
        raise ValueError(f"sinkhorn: a symmetric plan has equal row and col, got a difference of up to "
                         f"{(row - col).abs().max().item():g}")
    return (row + col) / 2


def _rounding(dtype: torch.dtype) -> float:
    return math.sqrt(torch.finfo(dtype).eps)


def _check_symmetric(scores: Tensor, eager: bool) -> None:
    if not eager or not scores.numel():
        return
    finite = scores.float().nan_to_num(neginf=torch.finfo(torch.float32).min / 4)
    off = (finite - finite.mT).abs().max().item()
    if off > _rounding(scores.dtype) * finite.abs().max().item():
        raise ValueError(f"sinkhorn: scores are not symmetric: they differ from their transpose by up to {off:g}")


def _check_sums(row: Tensor | None, col: Tensor | None, scores: Tensor) -> None:
    if row is None and col is None:
        return
    sums = [torch.tensor(float(size), dtype=torch.float64) if t is None else t.detach().double().sum(-1)
            for t, size in zip((row, col), scores.shape[-2:])]
    most = 1e-5 if scores.dtype == torch.float32 else 1e-10
    off = (sums[0] - sums[1]).abs() / sums[0]
    if off.numel() and off.max() > most:
        raise ValueError(f"sinkhorn: row and col must have equal sums, got {sums[0].flatten().tolist()[:3]} and "
                         f"{sums[1].flatten().tolist()[:3]}")


@torch.library.register_fake("torch_subspace::sinkhorn")
def _(scores, row, col, eta, tol, max_iter, symmetric, half_steps):
    views = scores.shape[:-2].numel()
    return (scores.new_empty(scores.shape), scores.new_empty(views, dtype=torch.float64),
            scores.new_empty(views, dtype=torch.int64))


@torch.library.register_fake("torch_subspace::sinkhorn_backward")
def _(dplan, plan, row, col, eta, symmetric, half_steps, need_dscores, need_drow, need_dcol):
    views, (m, n) = plan.shape[:-2].numel(), plan.shape[-2:]
    return (plan.new_empty(plan.shape if need_dscores else 0), plan.new_empty(views if need_drow else 0, m),
            plan.new_empty(views if need_dcol else 0, n))


def _setup(ctx, inputs, output):
    _, row, col, ctx.eta, _, _, ctx.symmetric, ctx.half_steps = inputs
    ctx.save_for_backward(output[0], row, col)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dplan, _derror, _dsweeps):
    if dplan is None:
        return (None,) * 8
    plan, row, col = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    either = need[1] or need[2]
    gradients = _op.sinkhorn_backward(dplan, plan, row, col, ctx.eta, ctx.symmetric, ctx.half_steps, need[0], either,
                                      either)
    if either and not ctx.half_steps:
        gradients = gradients[0], *_traces(dplan, plan, *gradients[1:], ctx.symmetric == _SYMMETRIC)
    shapes = plan.shape, row.shape, col.shape
    return *(g.view(shape) if wanted else None for g, shape, wanted in zip(gradients, shapes, need)), *(None,) * 5


def _traces(dplan: Tensor, plan: Tensor, drow: Tensor, dcol: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """drow and dcol, of rows and columns with next to no mass from their own equations: x = ((P o G) 1 - P y) / R.

    Such a row weighs nothing in the residual by which the conjugate gradients stop.
    """
    plan, dplan = (t.reshape(-1, *plan.shape[-2:]) for t in (plan, dplan))
    if symmetric:
        dplan, dcol, drow = (dplan + dplan.mT) / 2, drow / 2, drow / 2
    found = []
    for own, other, p, g in ((drow, dcol, plan, dplan), (dcol, drow, plan.mT, dplan.mT)):
        mass = p.sum(-1)
        value = (p * (g - other[:, None, :])).sum(-1) / mass
        found.append(torch.where(mass < FAINT * mass.amax(-1, keepdim=True), value, own))
    return (2 * found[0], torch.zeros_like(dcol)) if symmetric else tuple(found)


torch.library.register_autograd("torch_subspace::sinkhorn", _backward, setup_context=_setup)


def _no_second(ctx, *_):
    raise RuntimeError("sinkhorn is differentiable once: there is no gradient of its gradient")


torch.library.register_autograd("torch_subspace::sinkhorn_backward", _no_second)


# The same in plain torch operations, for `transformed()`.
def _eager(scores: Tensor, row: Tensor | None, col: Tensor | None, eta: float, sweeps: int, symmetric: bool,
           cpp: bool) -> Tensor:
    log_row, log_col = (0.0 if t is None else t.log() for t in (row, col))
    s = (scores - scores.detach().amax((-2, -1), keepdim=True)) / eta
    if symmetric and not cpp:
        s, f = (s + s.mT) / 2, torch.zeros_like(s[..., 0])
        for _ in range(sweeps):
            f = (f + log_row - torch.logsumexp(s + f[..., None, :], -1)) / 2
        return torch.exp(s + f[..., :, None] + f[..., None, :])
    f, g = torch.zeros_like(s[..., 0]), torch.zeros_like(s[..., 0, :])
    for sweep in range(3 if cpp else sweeps):
        if sweep:
            g = log_col - torch.logsumexp(s + f[..., None], -2)
            g = g.detach() if cpp else g
        f = log_row - torch.logsumexp(s + g[..., None, :], -1)
    return torch.exp(s + f[..., :, None] + g[..., None, :])
