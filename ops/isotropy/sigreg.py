"""SIGReg: how far points are from a standard normal distribution, by their characteristic function along directions.

    p       = z A                                             A (d, slices), columns of length one
    c(t)    = mean_i exp(i t p_i)                             along each direction; exp(-t²/2) of a standard normal
    loss    = n mean_l sum_j w_j |c_l(t_j) - exp(-t_j²/2)|²   t_j from 0 to t_max in even steps, w_j the trapezoidal
                                                              rule's, times exp(-t_j²/2), for both signs of t

LeJEPA, arXiv 2511.08544: the Epps-Pulley statistic of random projections. Of the n × slices × knots cosines and sines
none is ever stored: an entry takes one of each, the other knots are powers of it; see cpu/isotropy/sigreg.c.
"""
from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import (
    FLOATS,
    POSITIVE,
    all_reduce,
    check_dense,
    check_floating,
    check_group,
    check_number,
    check_word,
    full_precision,
    second_derivative,
    told,
    transformed,
    whole,
    wide_dtype,
)
from ..draws import seeded_normal

_op = torch.ops.torch_subspace
VIEWS = ("each", "pooled")
MOST_KNOTS = 1 << 12  # the contract's SUBSPACE_KNOTS


def sigreg(z: Tensor, *, num_slices: int = 256, knots: int = 17, t_max: float = 3.0, directions: Tensor | None = None,
           seed: int | None = None, views: str = "each",
           process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Sketched isotropic Gaussian regularisation: about 1 for standard normal points, 0.4 n for collapsed ones.

    Args:
        z: points, (..., n, d), n and d above 0; leading dimensions are views, each with a loss of its own.
        num_slices: random directions to look along; 256, the papers' code up to 1024.
        knots: values of t at which characteristic functions are compared, 0 and t_max among them; 2 to 4096.
        t_max: the largest t.
        directions: (d, slices) to look along instead of random ones, usually of length one, on z's device; a constant,
            without a gradient. Makes num_slices and seed superfluous.
        seed: an int of at least 0 that fixes the random directions: the same ones on every process and device, and in
            what is compiled. None: new ones in every call, from torch's generator of z's device.
        views: "each": every view has its own statistic. "pooled": all views are points of one distribution, and the
            loss is a scalar.
        process_group: a torch.distributed group whose processes each hold a part of the points, some perhaps none, or
            None. All of them look along the directions of the first one.

    Returns:
        losses, (...,), of z's dtype; float32 for half types, which are widened first (also under autocast).

    Differentiable in ``z`` any number of times; second derivatives, forward mode and torch.func go by the plain
    formula. NaN or infinity in z, or in its projections, which sum d products, makes the loss NaN. In a process group
    the gradient is that of the sum of all processes' (equal) losses, as torch.distributed.nn's collectives define it:
    after DistributedDataParallel's mean it is the gradient of the loss of the whole batch.

    Raises:
        TypeError: z or directions is no dense floating tensor, or another argument is of a wrong kind.
        ValueError: shapes, devices or values do not fit.

    Source: arXiv 2511.08544; the weights are those of the authors' code.

    Example:
        >>> z = torch.randn(512, 16)
        >>> spread, collapsed = ts.isotropy.sigreg(z, seed=0), ts.isotropy.sigreg(0.01 * z, seed=0)
        >>> bool(spread < 3 < 100 < collapsed)
        True
    """
    num_slices, knots = check("sigreg", num_slices, knots, t_max, views, process_group)
    check_floating("sigreg", "z", z)
    nowhere = z.shape[:-1].numel() == 0 if views == "pooled" else z.dim() > 1 and z.shape[-2] == 0
    if z.dim() < 2 or z.shape[-1] == 0 or (nowhere and process_group is None):
        raise ValueError(f"sigreg: z must be (..., n, d) with {'n > 0 and ' * (process_group is None)}d > 0, got "
                         f"{tuple(z.shape)}{', pooled' * (views == 'pooled')}")
    if directions is not None:
        _check_directions(z, directions, seed)
        directions = directions.to(wide_dtype(z.dtype))
    else:
        seed = None if seed is None else whole("sigreg", "seed", seed)
        directions = draw(z, num_slices, seed, process_group)
    *leading, n, d = z.shape
    if views == "pooled":
        leading, n = [], n * math.prod(leading)
    step = float(t_max) / (knots - 1)
    flat = z.reshape(math.prod(leading), n, d)
    off = _plain(flat, directions, knots, step) if transformed() else _op.sigreg(flat, directions, knots, step)
    count: Tensor | int = n
    if process_group is not None:  # sums over the points of all processes, and how many points those are
        packed = all_reduce(torch.cat((off.flatten(), off.new_full((1,), n))), process_group)
        off, count = packed[:-1].view(off.shape), packed[-1]
        if not z.is_cuda and not count:
            raise ValueError(f"sigreg: z must have points in one process at least, got {tuple(z.shape)} in each")
    loss = off.square().sum((1, 2, 3)) / (count * off.shape[3])
    return loss.reshape(leading).to(wide_dtype(z.dtype))


def check(name, num_slices, knots, t_max, views, process_group) -> tuple[int, int]:
    """Of the arguments that losses share: num_slices and knots as ints."""
    num_slices, knots = whole(name, "num_slices", num_slices, 1), whole(name, "knots", knots, 2)
    if knots > MOST_KNOTS:
        raise ValueError(f"{name}: knots must be <= {MOST_KNOTS}, got {knots}")
    check_number(name, "t_max", t_max, POSITIVE)
    check_word(name, "views", views, VIEWS)
    check_group(name, process_group)
    return num_slices, knots


def _check_directions(z: Tensor, directions: Tensor, seed: int | None) -> None:
    check_dense("sigreg", "directions", directions)
    if directions.dtype not in FLOATS:
        raise TypeError(f"sigreg: directions must be float32, float64, float16 or bfloat16, got {directions.dtype}")
    if directions.dim() != 2 or directions.shape[0] != z.shape[-1] or directions.shape[1] == 0:
        raise ValueError(f"sigreg: directions must be ({z.shape[-1]}, slices) with slices > 0, got "
                         f"{tuple(directions.shape)}")
    if directions.device != z.device:
        raise ValueError(f"sigreg: z and directions must be on one device, got {z.device} and {directions.device}")
    if directions.requires_grad and torch.is_grad_enabled():
        raise ValueError("sigreg: directions have no gradient: pass directions.detach()")
    if seed is not None:
        raise ValueError(f"sigreg: seed and directions exclude one another, got seed {told(seed)}")


# -------------------------------------------------------------------------------------------------------- directions


@torch.no_grad()
def draw(z: Tensor, num_slices: int, seed: int | None, group: dist.ProcessGroup | None) -> Tensor:
    """Random directions (d, num_slices) of length one, the same in all processes of a group."""
    shape, dtype = (z.shape[-1], num_slices), wide_dtype(z.dtype)
    if seed is None:
        normal = torch.randn(shape, dtype=dtype, device=z.device)
        if group is not None:
            dist.broadcast(normal, dist.get_global_rank(group, 0), group=group)
    else:
        normal = seeded_normal(shape, seed, z.device).to(dtype)
    return normal / torch.linalg.vector_norm(normal, dim=0)


# ------------------------------------------------------------------------------------------------------------ the op


@torch.library.register_fake("torch_subspace::sigreg")
def _(z, directions, knots, step):
    return z.new_empty((z.shape[0], 2, knots - 1, directions.shape[1]), dtype=torch.float64)


@torch.library.register_fake("torch_subspace::sigreg_backward")
def _(doff, z, directions, step):
    return z.new_empty(z.shape)


def _setup(ctx, inputs, output):
    z, directions, _, ctx.step = inputs
    ctx.save_for_backward(z, directions)


def _backward(ctx, doff):
    return _op.sigreg_backward(doff, *ctx.saved_tensors, ctx.step), None, None, None


torch.library.register_autograd("torch_subspace::sigreg", _backward, setup_context=_setup)


# The same in plain torch operations: for the second derivative and for `transformed()`.
def _plain(z: Tensor, directions: Tensor, knots: int, step: float) -> Tensor:
    with full_precision(z):
        p = z.to(directions.dtype) @ directions
    t = step * torch.arange(1, knots, dtype=p.dtype, device=p.device)[:, None, None]
    normal = torch.exp(-t * t / 2)
    root = (step * normal * (2 - (t >= t[-1]).to(t))).sqrt()[..., 0].double()  # half a step at the end
    angle = t * p[:, None]
    cosine, sine = ((part.sum(2, dtype=torch.float64)) for part in (angle.cos() - normal, angle.sin()))
    return torch.stack((root * cosine, root * sine), 1)


def _setup_backward(ctx, inputs, output):
    doff, z, directions, ctx.step = inputs
    ctx.save_for_backward(doff, z, directions)


def _double_backward(ctx, ddz):
    doff, z, directions = ctx.saved_tensors
    knots = doff.shape[2] + 1
    return *second_derivative(lambda z: _plain(z, directions, knots, ctx.step), doff, (z,), (ddz,)), None, None


torch.library.register_autograd("torch_subspace::sigreg_backward", _double_backward, setup_context=_setup_backward)
