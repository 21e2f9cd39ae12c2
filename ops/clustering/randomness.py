"""The random numbers of one fit: generators of its own, so that fits in other threads, and torch's, are left alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_lending = threading.RLock()


class Randomness:
    """A generator on the CPU, for rows and weights, and one on `device`, for what is done to points there."""

    def __init__(self, seed: int, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.host = torch.Generator().manual_seed(seed)
        on_host = self.device.type == "cpu"
        self.there = self.host if on_host else torch.Generator(self.device).manual_seed(seed)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """torch's own generators go on from these inside, and these from them after it; one fit at a time.

        For modules and callables, which know no other generators.
        """
        module = None if self.there is self.host else torch.get_device_module(self.device)
        with _lending:
            before = torch.get_rng_state(), module and module.get_rng_state(self.device)
            torch.set_rng_state(self.host.get_state())
            if module:
                module.set_rng_state(self.there.get_state(), self.device)
            try:
                yield
            finally:
                self.host.set_state(torch.get_rng_state())
                torch.set_rng_state(before[0])
                if module:
                    self.there.set_state(module.get_rng_state(self.device))
                    module.set_rng_state(before[1], self.device)

    def lend_to(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`function`, drawing from these generators."""

        def drawing(x: Tensor) -> Tensor:
            with self.lent():
                return function(x)

        return drawing
