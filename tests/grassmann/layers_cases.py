"""What the tests of GrassmannLinear ask of its frames."""

import torch

DOUBLE = {"dtype": torch.float64}


def rows(layer):
    """The frames, one (k, n) matrix a class."""
    return list(layer.weight.detach()) if layer.dims is None else list(layer.weight.detach().split(layer.dims))


def assert_frames(layer, tol=1e-6):
    for w in rows(layer):
        w = w.double()
        assert (w @ w.mT - torch.eye(len(w), dtype=w.dtype)).abs().max() <= tol
