"""Parameters for Trion, and steps of them."""

import torch
from helpers import normal
from torch import nn


def parameter(*shape, seed=0, dtype=torch.float64):
    return nn.Parameter(normal(*shape, seed=seed).to(dtype))


def steps(opt, *params, count=3, start=10):
    """Some steps, of gradients that the number of the step decides."""
    for i in range(count):
        for j, p in enumerate(params):
            p.grad = normal(*p.shape, seed=start + 100 * j + i).to(p.dtype)
        opt.step()
