"""The network that `ManifoldClustering` trains: an encoder and two heads, in float32."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

ROWS = 4096  # that are embedded, or searched for, at a time when no gradients are needed


class Network(nn.Module):
    """An encoder and two linear heads on it: unit features z for the geometry and c for who belongs together."""

    def __init__(self, encoder: nn.Module, width: int, dim: int, generator: torch.Generator | None = None):
        super().__init__()
        self.encoder = encoder
        self.features = linear(width, dim, generator=generator)
        self.clusters = linear(width, dim, generator=generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x).flatten(1)
        return normalize(self.features(h)), normalize(self.clusters(h))

    def copy_head(self) -> None:
        """Let the cluster head start where the feature head has arrived."""
        self.clusters.load_state_dict(self.features.state_dict())


def linear(inputs: int, outputs: int, bias: bool = True, generator: torch.Generator | None = None) -> nn.Linear:
    """torch's linear layer in float32, with its own initial values, from a generator of ours."""
    layer = nn.Linear(inputs, outputs, bias, device="meta", dtype=torch.float32).to_empty(device="cpu")
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if bias:
        nn.init.uniform_(layer.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
    return layer


def perceptron(inputs: int, hidden: Sequence[int], generator: torch.Generator | None = None) -> nn.Sequential:
    """Linear layers of the given widths, each with batch normalisation and ReLU."""
    layers = nn.Sequential()
    for width, outputs in zip((inputs, *hidden), hidden):
        norm = nn.BatchNorm1d(outputs, device="cpu", dtype=torch.float32)
        layers.extend([linear(width, outputs, False, generator), norm, nn.ReLU()])
    return layers


def build(points: Tensor, encoder: nn.Module | None, hidden: Sequence[int], dim: int,
          generator: torch.Generator | None = None) -> Network:
    """A network for such points: on a float32 copy of the encoder, or on a perceptron with layers `hidden`."""
    if encoder is None:
        points = points.flatten(1)
        encoder = nn.Sequential(nn.Flatten(), *perceptron(points.shape[1], hidden, generator))
    else:
        encoder = copy.deepcopy(encoder)
    encoder.to(points.device, torch.float32).eval()
    with torch.no_grad():
        h = encoder(points[:2])
    if not isinstance(h, Tensor) or len(h) != 2 or h.dim() < 2:
        got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"encoder must turn a batch of two points into features (2, ...), got {got}")
    return Network(encoder, h[0].numel(), dim, generator).to(points.device)
