"""What tests of LowRankAdamW share."""

import torch
from helpers import normal
from torch import nn

from torch_subspace.lowrank import cosine_basis
from torch_subspace.lowrank.projectors import PROJECTORS, columns

__all__ = ["FEEDBACKS", "PROJECTORS", "Reference", "data", "fixed", "matrix", "net", "singular", "stepped", "train"]
FEEDBACKS = (None, "int8", "dense")


def matrix(*shape, seed=0, dtype=torch.float32):
    return nn.Parameter(normal(*shape, seed=seed, dtype=dtype))


def stepped(p, optimizer, steps=4):
    """A gradient of its own in each step; the parameter then."""
    for i in range(steps):
        p.grad = normal(*p.shape, seed=50 + i, dtype=p.dtype)
        optimizer.step()
    return p.detach().clone()


def net(dtype=torch.float32):
    """A convolution, matrices of either orientation, and what has one dimension."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.Flatten(), nn.BatchNorm1d(108), nn.Linear(108, 16), nn.ReLU(),
                         nn.Linear(16, 40)).to(dtype)


def data(step=0, dtype=torch.float32):
    return normal(8, 3, 5, 5, seed=step, dtype=dtype)


def train(model, optimizer, steps, first=0):
    """On a loss that has another gradient in each step; the parameters then."""
    for i in range(first, first + steps):
        optimizer.zero_grad()
        model(data(i, next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


class Reference:
    """The formula for one matrix (m, n) whose columns are projected; `basis(g)` is Q (n, r)."""

    def __init__(self, weight, basis, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, every=1, feedback=False,
                 scale=1.0):
        self.weight, self.basis, self.every, self.feedback = weight.double().clone(), basis, every, feedback
        self.lr, self.betas, self.eps, self.decay, self.scale = lr, betas, eps, weight_decay, scale
        self.q, self.error, self.count = None, 0, 0

    def step(self, grad):
        g = grad.double() + self.error
        if self.count % self.every == 0:
            q = self.basis(g)
            turn = q.new_zeros(q.shape[1], q.shape[1]) if self.q is None else self.q.mT @ q
            self.mean = self.mean @ turn if self.count else g.new_zeros(g.shape[0], q.shape[1])
            self.square = self.square @ turn.square() if self.count else torch.zeros_like(self.mean)
            self.q = q
        self.count += 1
        low = g @ self.q
        if self.feedback:
            self.error = g - low @ self.q.mT
        beta1, beta2 = self.betas
        self.mean = beta1 * self.mean + (1 - beta1) * low
        self.square = beta2 * self.square + (1 - beta2) * low.square()
        u = self.mean / (1 - beta1**self.count) / ((self.square / (1 - beta2**self.count)).sqrt() + self.eps)
        self.weight = (1 - self.lr * self.decay) * self.weight - self.lr * self.scale * u @ self.q.mT
        return self.weight


def fixed(projector, rank):
    """The r columns of largest ℓ1 norm of a fixed basis."""

    def basis(g):
        n = g.shape[1]
        q = (cosine_basis(n, dtype=torch.float64) if projector == "cosine" else
             columns("hadamard", torch.arange(n), n, torch.float64))
        return q[:, (g @ q).abs().sum(0).topk(rank).indices.sort().values]

    return basis


def singular(rank):
    """Leading right singular vectors, which a sign more or less does not change."""
    return lambda g: torch.linalg.svd(g, full_matrices=False).Vh[:rank].mT
