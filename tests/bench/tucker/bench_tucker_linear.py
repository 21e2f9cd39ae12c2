"""Linear layers with a Tucker adapter: see adapted_layers.py."""

import torch
from adapted_layers import case
from harness import multiplies_bfloat16
from torch import nn


def cases(device):
    """Two layers; on a GPU a batch of halves first."""
    found = [] if device == "cpu" else [
        case("linear 4096 to 4096, T=8192", (nn.Linear, 4096, 4096), (8192, 4096), device, dtype=torch.bfloat16),
    ]
    if device == "cpu" and multiplies_bfloat16():
        found = [case("linear 768 to 3072, T=2048", (nn.Linear, 768, 3072), (2048, 768), device, dtype=torch.bfloat16,
                      beside=torch.float32)]
    return found + [
        case("linear 4096 to 4096, T=512", (nn.Linear, 4096, 4096), (512, 4096), device, (1.05, 1.02, 1.05)),
        case("linear 768 to 3072, T=512", (nn.Linear, 768, 3072), (512, 768), device),
    ]
