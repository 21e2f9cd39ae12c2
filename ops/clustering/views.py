"""Views of points, for features that vary little where the points do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .augment import ImageAugment, Noise
from .network import ROWS
from .randomness import Randomness


def viewer(points: Tensor, augment: str | Callable | None, image_shape: Sequence[int] | None, neighbors: int,
           random: Randomness):
    """A function from rows to a view of these points each; None where there is nothing to vary."""
    if isinstance(augment, str):
        augment = Noise() if augment == "noise" else ImageAugment(image_shape)
    count = min(neighbors, len(points) - 1)
    searches = 0 if augment is None or isinstance(augment, Noise) else 30
    if isinstance(augment, (Noise, ImageAugment)):
        vary = functools.partial(augment, generator=random.there)
    else:
        vary = augment and random.lend_to(augment)
    if not count:
        return vary and (lambda rows: vary(points[rows]))
    near = nearest(points, count, vary, searches)

    def view(rows):
        other = near[rows, torch.randint(count, rows.shape, generator=random.host)]
        chosen = torch.rand(rows.shape, generator=random.host, dtype=torch.float32) < 0.5
        x = points[torch.where(chosen, other, rows)]
        return vary(x) if vary else x

    return view


def nearest(points: Tensor, count: int, vary: Callable | None = None, searches: int = 0) -> Tensor:
    """Rows (n, count) of the points nearest to each, or to any of `searches` views of it, itself left out."""
    flat, found = points.flatten(1), []
    for rows in torch.arange(len(points)).split(ROWS):
        distance = torch.cdist(points[rows].flatten(1), flat)
        for _ in range(searches):
            distance = torch.minimum(distance, torch.cdist(vary(points[rows]).flatten(1), flat))
        distance[torch.arange(len(rows)), rows] = torch.inf
        found.append(distance.topk(count, largest=False).indices.cpu())
    return torch.cat(found)
