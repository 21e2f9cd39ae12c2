"""Views of points, for features that vary little where the points do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .augment import ImageAugment, Noise
from .network import ROWS


def viewer(points: Tensor, augment: str | Callable | None, image_shape: Sequence[int] | None, neighbors: int):
    """A function from rows to a view of these points each; None where there is nothing to vary."""
    if isinstance(augment, str):
        augment = Noise() if augment == "noise" else ImageAugment(image_shape)
    count = min(neighbors, len(points) - 1)
    if not count:
        return augment and (lambda rows: augment(points[rows]))
    near = nearest(points, count, augment)

    def view(rows):
        other = near[rows, torch.randint(count, rows.shape)]
        x = points[torch.where(torch.rand(rows.shape) < 0.5, other, rows)]
        return augment(x) if augment else x

    return view


def nearest(points: Tensor, count: int, augment=None, searches: int = 30) -> Tensor:
    """Rows (n, count) of the points nearest to each, or to any of some views of it, itself left out."""
    flat, found = points.flatten(1), []
    for rows in torch.arange(len(points)).split(ROWS):
        distance = torch.cdist(points[rows].flatten(1), flat)
        for _ in range(searches if augment and not isinstance(augment, Noise) else 0):
            distance = torch.minimum(distance, torch.cdist(augment(points[rows]).flatten(1), flat))
        distance[torch.arange(len(rows)), rows] = torch.inf
        found.append(distance.topk(count, largest=False).indices.cpu())
    return torch.cat(found)
