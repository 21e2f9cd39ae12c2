"""`torch_subspace.isotropy`: features that spread like a standard normal distribution in every direction."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .losses import LeJEPALoss as LeJEPALoss
    from .losses import SIGRegLoss as SIGRegLoss
    from .sigreg import sigreg as sigreg

_FILES = {"LeJEPALoss": "losses", "SIGRegLoss": "losses", "sigreg": "sigreg"}
__all__ = ["LeJEPALoss", "SIGRegLoss", "sigreg"]


class _Family(types.ModuleType):
    """An op's file bears the name of its function: to users the name is the function, whatever was imported first."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _FILES or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Family


def __getattr__(name: str) -> Any:
    if name in _FILES:  # on first use
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
