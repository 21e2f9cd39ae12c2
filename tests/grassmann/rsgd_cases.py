"""Frames to take Riemannian steps with, and how a step is held against the reference."""

import reference as ref
import torch

RETRACTIONS = ["geodesic", "polar", "qr", "cayley"]
TRANSPORTS = ["project", "parallel"]
DTYPES = [torch.float32, torch.float64]


def generator(*seed):
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def unit(tensor):
    """Each class scaled to norm 1, so that a step of size lr turns by about lr."""
    return tensor / torch.linalg.vector_norm(tensor, dim=(-2, -1), keepdim=True).clamp(min=1e-30)


def problem(classes, k, n, dtype=torch.float64):
    """A frame, a gradient and a buffer."""
    g = generator(classes, k, n)
    weight, grad, buffer = torch.randn(3, classes, k, n, dtype=torch.float64, generator=g)
    return ref.orthonormal(weight).to(dtype), unit(grad).to(dtype), unit(buffer).to(dtype)
