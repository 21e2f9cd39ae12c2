"""The training of `ManifoldClustering`: its losses and its epochs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..rates.losses import CodingRateLoss, MLCLoss
from .randomness import Randomness


def rate_loss(eps: float, invariance: float) -> Callable:
    """Of the first phase: the features' coding rate, as large as it can be."""
    rate = CodingRateLoss(eps)
    return lambda z, c: rate(z) + invariance * variance(z)


def cluster_loss(mlc: MLCLoss, invariance: float) -> Callable:
    """Of the second phase: MLC's, of the mean over each point's views."""

    def loss(z, c):
        mean = mlc(normalize(z.mean(0), dim=-1), normalize(c.mean(0), dim=-1))
        return mean + invariance * (variance(z) + variance(c))

    return loss


def variance(z: Tensor) -> Tensor:
    """1 - cos between the views (V, n, d) and their mean, averaged; 0 for one view."""
    return 1 - cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean() if len(z) > 1 else z.new_zeros(())


def train(network: Callable, points: Tensor, view: Callable | None, loss_of: Callable, random: Randomness, *,
          parameters: Iterable[Tensor], views: int, epochs: int, batch_size: int, lr: float,
          weight_decay: float) -> Iterator[tuple[float, Tensor]]:
    """One epoch after the other; yields the loss of each and the last batch's features (V, n, dim)."""
    trained = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr, weight_decay=weight_decay)
    batches = max(1, min(-(-len(points) // batch_size), len(points) // 2))  # no point is alone in one
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * batches))
    views = views if view else 1
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(points), generator=random.host).tensor_split(batches):
            x = torch.cat([view(rows) for _ in range(views)]) if view else points[rows]
            if len(x) != views * len(rows):
                raise ValueError(f"augment must return as many points as it is given, {len(rows)}, "
                                 f"got {len(x) / views:g}")
            z, c = (t.unflatten(0, (views, -1)) for t in network(x))
            loss = loss_of(z, c)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows) / len(points)
        yield total, z


@contextlib.contextmanager
def ordinary(device: torch.device, gradients: bool):
    """torch as it is when nobody has turned anything: no autocast, no default device, gradients or none of them."""
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        yield
