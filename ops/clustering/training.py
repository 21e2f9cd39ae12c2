"""The training of `ManifoldClustering`: its losses, its epochs, their seed and their progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..rates.losses import CodingRateLoss, MLCLoss
from .network import Network


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


def train(network: Network, points: Tensor, view: Callable | None, loss_of: Callable, *, views: int, epochs: int,
          batch_size: int, lr: float, weight_decay: float) -> Iterator[tuple[float, Tensor]]:
    """One epoch after the other; yields the loss of each and the last batch's features (V, n, dim)."""
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr, weight_decay=weight_decay)
    batches = -(-len(points) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * batches))
    views = views if view else 1
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(points)).tensor_split(batches):
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
def seeded(seed: int, device: str | torch.device):
    """torch's generators start from `seed` inside, and go on as before after it."""
    device = torch.device(device)
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def progress(epochs: int, verbose: bool):
    """A progress bar; a silent one unless `verbose`."""
    if not verbose:
        return _NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("verbose=True needs tqdm: pip install tqdm") from None
    return tqdm(total=epochs, unit="epoch", dynamic_ncols=True)


class _NoBar:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self):
        pass

    def set_description(self, _):
        pass
