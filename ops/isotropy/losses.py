"""Losses that spread features like a standard normal distribution, to be minimised.

    SIGRegLoss    SIGReg(z)                                                        arXiv 2511.08544
    LeJEPALoss    weight SIGReg(z) + (1 - weight) mean_v ||mean_v z_v - z_v||²     views of the same things agree

With a `process_group` every process passes its own part of the batch and gets the loss of the whole.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common import UP_TO_1, all_reduce, check_floating, check_number, check_word, wide_dtype
from .sigreg import check, sigreg

REDUCTIONS = ("mean", "sum", "none")
DISTANCES = ("squared", "mean")


class SIGRegLoss(nn.Module):
    """`sigreg` as a module, averaged over views.

    Args:
        num_slices, knots, t_max, views, process_group: as for `sigreg`.
        reduction: over views: "mean" (default), "sum" or "none".

    Shape: z (n, d) or views (V, n, d); a scalar, or (V,) with reduction "none". float32 for half inputs.

    Directions are drawn anew in every call. ``loss(z, seed=step)`` fixes them without a message between processes.

    Raises: TypeError, ValueError as `sigreg`.

    Example:
        >>> z = torch.randn(2, 64, 8, requires_grad=True)
        >>> loss = ts.isotropy.SIGRegLoss(num_slices=64)(z, seed=0)
        >>> torch.equal(loss, ts.isotropy.sigreg(z, num_slices=64, seed=0).mean())
        True
        >>> loss.backward()
    """

    def __init__(self, num_slices: int = 256, knots: int = 17, t_max: float = 3.0, *, views: str = "each",
                 reduction: str = "mean", process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.num_slices, self.knots = check("SIGRegLoss", num_slices, knots, t_max, views, process_group)
        check_word("SIGRegLoss", "reduction", reduction, REDUCTIONS)
        self.t_max, self.views = t_max, views
        self.reduction, self.process_group = reduction, process_group

    def forward(self, z: Tensor, *, seed: int | None = None) -> Tensor:
        loss = sigreg(z, num_slices=self.num_slices, knots=self.knots, t_max=self.t_max, seed=seed, views=self.views,
                      process_group=self.process_group)
        return loss.mean() if self.reduction == "mean" else loss.sum() if self.reduction == "sum" else loss

    def extra_repr(self) -> str:
        return (f"num_slices={self.num_slices}, knots={self.knots}, t_max={self.t_max}, views={self.views!r}, "
                f"reduction={self.reduction!r}")


class LeJEPALoss(nn.Module):
    """SIGReg and the distance of views from their mean: joint embedding that can't collapse, without a teacher.

    Args:
        weight: of SIGReg, in [0, 1]; the distance has the rest. 0.02, the authors' minimal code; 0.05 elsewhere.
        num_slices, knots, t_max, views, process_group: as for `sigreg`.
        distance: "squared": the squared length of the difference, the paper's. "mean": the mean over its d entries,
            as the authors' code and lightly's have it.

    Shape: z (V, n, d), the same n things in V views. A scalar; float32 for half inputs.

    ``loss(z, centre)`` takes the mean of other views, (W, n, d), to be near to: lightly's global ones.
    ``seed=`` fixes the directions of a call.

    Raises: TypeError, ValueError as `sigreg`, or where the views do not fit.

    Source: arXiv 2511.08544.

    Example:
        >>> z = torch.randn(4, 64, 8, requires_grad=True)
        >>> loss = ts.isotropy.LeJEPALoss()(z, seed=0)
        >>> distance = (z - z.mean(0)).square().sum(-1).mean()
        >>> torch.allclose(loss, 0.02 * ts.isotropy.sigreg(z, seed=0).mean() + 0.98 * distance)
        True
        >>> loss.backward()
    """

    def __init__(self, weight: float = 0.02, *, num_slices: int = 256, knots: int = 17, t_max: float = 3.0,
                 views: str = "each", distance: str = "squared",
                 process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        check_number("LeJEPALoss", "weight", weight, UP_TO_1)
        self.num_slices, self.knots = check("LeJEPALoss", num_slices, knots, t_max, views, process_group)
        check_word("LeJEPALoss", "distance", distance, DISTANCES)
        self.weight, self.distance, self.process_group = weight, distance, process_group
        self.t_max, self.views = t_max, views

    def forward(self, z: Tensor, centre: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        for what, t in (("z", z), ("centre", z if centre is None else centre)):
            check_floating("LeJEPALoss", what, t)
            if t.dim() != 3 or t.shape[0] == 0:
                raise ValueError(f"LeJEPALoss: {what} must be (V, n, d) with V > 0, got {tuple(t.shape)}")
            if t.shape[1:] != z.shape[1:] or t.device != z.device:
                raise ValueError(f"LeJEPALoss: z and centre must be of the same points, on one device, got "
                                 f"{tuple(z.shape)} on {z.device} and {tuple(t.shape)} on {t.device}")
        spread = sigreg(z, num_slices=self.num_slices, knots=self.knots, t_max=self.t_max, seed=seed, views=self.views,
                        process_group=self.process_group).mean()
        wide = z.to(wide_dtype(z.dtype))
        middle = (wide if centre is None else centre.to(wide.dtype)).mean(0)
        apart = (wide - middle).square()
        apart = apart.sum(-1) if self.distance == "squared" else apart.mean(-1)
        if self.process_group is None:
            distance = apart.mean()
        else:
            total = apart.sum(dtype=torch.float64)
            total, count = all_reduce(torch.stack((total, torch.full_like(total, apart.numel()))), self.process_group)
            distance = (total / count).to(apart.dtype)
        return self.weight * spread + (1 - self.weight) * distance

    def extra_repr(self) -> str:
        return (f"weight={self.weight}, num_slices={self.num_slices}, knots={self.knots}, t_max={self.t_max}, "
                f"views={self.views!r}, distance={self.distance!r}")
