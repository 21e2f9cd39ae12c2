"""What the tests of GrassmannLinear ask of its frames."""

import torch
from helpers import frame_error

DOUBLE = {"dtype": torch.float64}


def rows(layer):
    """The frames, one (k, n) matrix a class."""
    return list(layer.weight.detach()) if layer.dims is None else list(layer.weight.detach().split(layer.dims))


def assert_frames(layer, tol=1e-6):
    assert all(frame_error(w) <= tol for w in rows(layer))
