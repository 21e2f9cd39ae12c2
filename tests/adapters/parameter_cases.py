"""Modules that hold parameters of their own, matrices and stacks of experts, and what they compute, by hand."""

import torch
import torch.nn.functional as F
from helpers import normal
from torch import nn

import torch_subspace as ts

ALL = ("up", "down", "out")


class Experts(nn.Module):
    """Two stacks, (experts, out, in) or (experts, in, out), in a loop that reads them once per expert."""

    def __init__(self, experts=3, width=5, inner=7, transposed=False):
        super().__init__()
        up, down = (experts, inner, width), (experts, width, inner)
        self.is_transposed = transposed
        self.up = nn.Parameter(normal(*(down if transposed else up), seed=1, dtype=torch.float32))
        self.down = nn.Parameter(normal(*(up if transposed else down), seed=2, dtype=torch.float32))

    def expert(self, x, e):
        up, down = self.up[e], self.down[e]
        if self.is_transposed:
            up, down = up.mT, down.mT
        return F.linear(F.linear(x, up).tanh(), down)

    def forward(self, x):
        return sum(self.expert(x, e) for e in range(len(self.up)))


class Batched(Experts):
    """The same, read once, in batched products."""

    def forward(self, x):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return ((x @ up).tanh() @ down).sum(0)


class Mixture(nn.Module):
    """Experts, a layer, and a matrix that is no layer's, on the model itself."""

    def __init__(self, kind=Experts, **kwargs):
        super().__init__()
        self.experts, self.fc = kind(**kwargs), nn.Linear(5, 5)
        self.out = nn.Parameter(normal(5, 4, seed=3, dtype=torch.float32))

    def forward(self, x):
        return self.fc(x + self.experts(x)) @ self.out


def mixture(kind=Experts, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return Mixture(kind, **kwargs).to(dtype).eval(), normal(6, 5, dtype=dtype)


def adapted(kind=Experts, dtype=torch.float32, config=(), **kwargs):
    model, x = mixture(kind, dtype, **kwargs)
    config = {"rank": 2, "alpha": 1.5, "target_modules": (), "target_parameters": ALL} | dict(config)
    return ts.adapt(model, ts.TuckerConfig(**config)), x
