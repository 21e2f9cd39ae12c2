"""Optimisers, small models and frames to try them on."""

import pytest
import reference as ref
import torch
from helpers import normal

import torch_subspace as ts

SGD, ADAM = ts.RiemannianSGD, ts.RiemannianAdamW
OPTIMISERS = {
    "sgd": (SGD, {"lr": 0.05}),
    "momentum": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "parallel": (SGD, {"lr": 0.05, "momentum": 0.9, "transport": "parallel"}),
    "adamw": (ADAM, {"lr": 0.01}),
    "amsgrad": (ADAM, {"lr": 0.01, "amsgrad": True}),
}
every_optimiser = pytest.mark.parametrize("name", OPTIMISERS)


def build(name, model, **options):
    kind, defaults = OPTIMISERS[name]
    return kind(ts.param_groups(model, weight_decay=0.01, frame_lr_factor=0.5), **(defaults | options))


def small_model(subspace_dim=3, seed=0):
    torch.manual_seed(seed)
    head = ts.GrassmannLinear(16, 5, subspace_dim)
    return torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), head)


def separable(count=100):
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(count) % 5
    return torch.randn(5, 8, generator=generator)[y] + 0.1 * torch.randn(count, 8, generator=generator), y


def train(model, optimiser, steps, scheduler=None):
    x, y = separable()
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def frame(classes=4, k=3, n=9, dtype=torch.float64, seed=0):
    return torch.nn.Parameter(ref.orthonormal(normal(classes, k, n, seed=seed)).to(dtype))


def noise(p, seed):
    return torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1000 + seed))


def marked(*params, **options):
    return [{"params": list(params), "manifold": "grassmann"} | options]
