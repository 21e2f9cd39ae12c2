"""Augmentations for clustering: callables that turn a batch into another view of it, one view a call.

They draw from torch's generators, or from one they are given, so a seed repeats them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def _normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


class Noise:
    """x + `scale` · e with standard normal e; for features whose spread is about one."""

    def __init__(self, scale: float = 0.1):
        self.scale = scale

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x + self.scale * _normal(x, generator)

    def __repr__(self):
        return f"Noise(scale={self.scale:g})"


class ImageAugment:
    """A random affine map of every image, bilinear, edges continued outside, then noise.

    Args:
        shape: of an image, (height, width) or (channels, height, width); batches are (n, *shape) or (n, its product).
        rotation, shear: at most so many radians either way.
        scale: factors from 1 - scale to 1 + scale, one for each axis.
        shift: at most so many pixels either way, a fraction is fine.
        noise: standard deviation, in the images' units.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        rotation: float = 0.25,
        scale: float = 0.15,
        shear: float = 0.2,
        shift: float = 0.8,
        noise: float = 0.1,
    ):
        self.shape = tuple(shape)
        if len(self.shape) not in (2, 3) or not all(isinstance(s, int) and s > 0 for s in self.shape):
            raise ValueError(f"ImageAugment: shape must be (height, width) or (channels, height, width), got {shape!r}")
        self.rotation, self.scale, self.shear, self.shift, self.noise = rotation, scale, shear, shift, noise

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        images = x.reshape(len(x), *(1,) * (3 - len(self.shape)), *self.shape)
        maps = self.maps(len(x), x.dtype, x.device, generator)
        grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
        images = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return (images + self.noise * _normal(images, generator)).reshape(x.shape)

    def maps(self, n: int, dtype: torch.dtype, device: torch.device,
             generator: torch.Generator | None = None) -> Tensor:
        """Affine maps (n, 2, 3) from an output pixel to where it is read, in affine_grid's coordinates."""
        angle, shear, sx, sy, tx, ty = 2 * torch.rand(6, n, dtype=dtype, device=device, generator=generator) - 1
        angle, shear = self.rotation * angle, self.shear * shear
        sx, sy = 1 + self.scale * sx, 1 + self.scale * sy
        height, width = self.shape[-2:]
        cos, sin = angle.cos(), angle.sin()
        rows = (
            torch.stack([sx * cos, sx * (shear * cos - sin) * height / width, 2 * self.shift / width * tx], 1),
            torch.stack([sy * sin * width / height, sy * (shear * sin + cos), 2 * self.shift / height * ty], 1),
        )
        return torch.stack(rows, 1)

    def __repr__(self):
        names = ("rotation", "scale", "shear", "shift", "noise")
        return f"ImageAugment({self.shape}, " + ", ".join(f"{n}={getattr(self, n):g}" for n in names) + ")"
