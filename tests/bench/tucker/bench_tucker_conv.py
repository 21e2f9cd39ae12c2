"""Convolutions with a Tucker adapter: see adapted_layers.py."""

from adapted_layers import case
from torch import nn


def cases(device):
    """Dense, depthwise, grouped, and patches."""
    return [
        case("conv 3x3, 256 to 256, 56x56, B=8", (nn.Conv2d, 256, 256, 3, ("padding", 1)), (8, 256, 56, 56), device,
             (1.15, 1.1, 1.1)),
        case("depthwise 7x7 (ConvNeXt), C=96, 56x56, B=8", (nn.Conv2d, 96, 96, 7, ("padding", 3), ("groups", 96)),
             (8, 96, 56, 56), device),
        case("grouped 3x3 (ResNeXt), 32 groups of 4, 28x28, B=8",
             (nn.Conv2d, 128, 128, 3, ("padding", 1), ("groups", 32)), (8, 128, 28, 28), device),
        case("patches 16x16 (ViT), 3 to 768, 224x224, B=8", (nn.Conv2d, 3, 768, 16, ("stride", 16)), (8, 3, 224, 224),
             device),
    ]
