"""Averages of frames that are frames: of subspaces by their projectors, of bases by the nearest frame of the mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..common import BELOW_1, WIDE, check_dense, check_floating, check_number, check_word, told, whole
from .frames import check_dims, dims_at
from .groups import class_blocks

OF = ("subspaces", "bases")


def average_frames(frames: Sequence[Tensor] | Tensor, weights: Sequence[float] | Tensor | None = None, *,
                   of: str = "subspaces", dims: Sequence[int] | None = None) -> Tensor:
    """The mean of m stacks of frames, a stack of frames again.

    Args:
        frames: m tensors (C, k, n), or (sum(dims), n) with ``dims``, or one with m in front; float32 or float64.
        weights: m numbers of at least 0, not all 0; by default all the same. They need not sum to 1.
        of: "subspaces": per class the span that is nearest to all (the k leading eigenvectors of the mean of the
            projectors WᵀW), whatever bases they are given in: for soups of models that were trained apart. "bases": the
            polar factor of the mean of the W, the frame nearest to it: for averages along one training.
        dims: subspace dimension of each class, for ragged frames.

    Returns:
        The mean, shaped like one of the stacks; with "subspaces" in the basis that is nearest to the first one's.

    Raises:
        TypeError: not tensors, or dtypes other than one of float32 and float64.
        ValueError: shapes, weights or ``of`` do not fit, or frames cancel, so that there is no nearest one.

    Example:
        >>> one, two = (ts.GrassmannLinear(8, 3, 2).weight.detach() for _ in range(2))
        >>> mean = ts.grassmann.average_frames([one, two])
        >>> bool((mean @ mean.mT - torch.eye(2)).abs().max() < 1e-5)
        True

    Source: Karcher's mean in the chordal distance (Edelman, Arias and Smith, 1998); the projectors' form needs one
    eigenproblem of m k x m k a class.
    """
    name = "average_frames"
    if not isinstance(frames, Iterable) or isinstance(frames, (str, set, Mapping)) or (
            isinstance(frames, Tensor) and frames.dim() == 0):
        raise TypeError(f"{name}: frames must be a sequence of tensors or one of all, got {told(frames)}")
    stacks = list(frames)
    if not stacks:
        raise ValueError(f"{name}: frames are empty, need at least one stack")
    for i, t in enumerate(stacks):
        check_floating(name, f"frames[{i}]", t)
        if t.dtype not in WIDE or t.dtype != stacks[0].dtype:
            raise TypeError(f"{name}: frames must share float32 or float64, got {stacks[0].dtype} and {t.dtype}")
        if t.shape != stacks[0].shape or t.device != stacks[0].device:
            raise ValueError(f"{name}: frames[{i}] is {tuple(t.shape)} on {t.device}, frames[0] "
                             f"{tuple(stacks[0].shape)} on {stacks[0].device}")
    dims = check_dims(name, stacks[0], dims)
    if stacks[0].is_meta:
        raise ValueError(f"{name}: frames must hold numbers, got tensors on the meta device")
    for i, t in enumerate(stacks):
        if not t.isfinite().all():
            raise ValueError(f"{name}: frames[{i}] are not finite")
    check_word(name, "of", of, OF)
    rule = f"{name}: weights must be {len(stacks)} numbers of at least 0, not all 0"
    try:
        share = torch.ones(len(stacks)) if weights is None else torch.as_tensor(weights)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{rule}, got {told(weights)}") from None
    if share.layout is not torch.strided or share.is_nested or share.is_meta or share.is_complex():
        raise TypeError(f"{rule}, got {told(weights)}")
    share = share.to(stacks[0].device, torch.float64)
    if share.shape != (len(stacks),) or not (share >= 0).all() or not 0 < share.sum() < torch.inf:
        raise ValueError(f"{rule}, got {weights!r}")
    mean = _of_subspaces if of == "subspaces" else _of_bases
    with torch.no_grad(), torch.autocast(stacks[0].device.type, enabled=False):
        blocks = [class_blocks(t, dims) for t in stacks]
        made = [(part[0][0], mean(torch.stack([t for _, t in part]).double(), share / share.sum()))
                for part in zip(*blocks)]
    if dims is None:
        return made[0][1].to(stacks[0].dtype)
    by_class = {c: t for classes, block in made for c, t in zip(classes, block)}
    return torch.cat([by_class[c] for c in range(len(dims))]).to(stacks[0].dtype)


def _polar(a: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    if (s[..., -1] <= 1e-9 * s[..., 0]).any():
        raise ValueError("average_frames: the frames of a class cancel: no frame is nearest to their mean")
    return u @ vh


def _of_bases(w: Tensor, share: Tensor) -> Tensor:
    return _polar(torch.einsum("m,mckn->ckn", share, w))


def _of_subspaces(w: Tensor, share: Tensor) -> Tensor:
    m, c, k, n = w.shape
    rows = (w * share.sqrt()[:, None, None, None]).movedim(0, 1).reshape(c, m * k, n)  # rows' rows: mean projector
    energy, u = torch.linalg.eigh(rows @ rows.mT)  # ascending
    if m * k > k and (energy[:, -k] - energy[:, -k - 1] <= 1e-9 * energy[:, -1]).any():
        raise ValueError("average_frames: the frames of a class cancel: no span is nearest to all of them")
    leading = torch.linalg.qr((u[:, :, -k:].mT @ rows).mT).Q.mT
    return _polar(w[0] @ leading.mT) @ leading


class FrameAverage:
    """An ``avg_fn`` for `torch.optim.swa_utils.AveragedModel`: frames of our layers stay frames.

    Args:
        decay: of an exponential moving average, in [0, 1); None for the mean of all models so far (SWA).
        of: as for `average_frames`; "bases", which is cheaper, by default: along one training bases turn little.

    All other parameters are averaged as torch does; buffers of integers take the current value.

    Raises:
        ValueError: ``decay`` or ``of`` is out of range.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), ts.GrassmannLinear(8, 3, 2))
        >>> ema = AveragedModel(model, avg_fn=ts.grassmann.FrameAverage(decay=0.9))
        >>> for _ in range(3):
        ...     ema.update_parameters(model)
        >>> bool(ema.module[1].frame_error() < 1e-5)
        True
    """

    def __init__(self, decay: float | None = None, *, of: str = "bases") -> None:
        if decay is not None:
            check_number("FrameAverage", "decay", decay, BELOW_1)
        check_word("FrameAverage", "of", of, OF)
        self.decay, self.of = decay, of

    def __call__(self, averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        check_dense("FrameAverage", "averaged", averaged)
        check_dense("FrameAverage", "current", current)
        alike = [(t.shape, t.is_meta, t.is_floating_point()) for t in (averaged, current)]
        if alike[0] != alike[1]:
            raise ValueError(f"FrameAverage: averaged and current must be alike, got {told(averaged)} on "
                             f"{averaged.device} and {told(current)} on {current.device}")
        if not averaged.is_floating_point():
            return current  # a buffer that counts
        check_floating("FrameAverage", "averaged", averaged)
        if self.decay is None:
            share = 1 / (whole("FrameAverage", "num_averaged", num_averaged) + 1)
        else:
            share = 1 - self.decay
        found = dims_at(averaged)
        if found is None:
            return averaged.lerp(current.to(averaged.dtype), share)
        return average_frames([averaged, current.to(averaged)], [1 - share, share], of=self.of, dims=found[0])
