"""What the tests of RandomSubspace share."""

import pytest
import torch
from helpers import normal
from torch import nn

import torch_subspace as ts

KINDS = ("fastfood", "dense", "sparse")
each_kind = pytest.mark.parametrize("kind", KINDS)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)).to(dtype)


def wrapped(kind="fastfood", dim=7, seed=3, dtype=torch.float32):
    return ts.lowrank.RandomSubspace(network(dtype), dim, kind, seed=seed)


def moved(model):
    """Away from theta_0."""
    with torch.no_grad():
        model.theta.copy_(normal(len(model.theta), seed=5))
    return model


def columns(model):
    """P, of all parameters one after another."""
    def flat(theta):
        return torch.cat([p.flatten() for p in model.parameters_at(theta).values()])

    return torch.autograd.functional.jacobian(flat, torch.zeros_like(model.theta))


X = normal(5, 6, dtype=torch.float32)
