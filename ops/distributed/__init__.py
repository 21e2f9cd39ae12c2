"""`torch_subspace.distributed`: heads whose classes are shared out among processes, on torch's own DTensor."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .class_parallel import ClassParallel as ClassParallel
    from .class_parallel import shard_head as shard_head
    from .planner import plan as plan

__all__ = ["ClassParallel", "plan", "shard_head"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # on first use: DTensor takes a while to import
        from . import class_parallel, planner

        return getattr(planner if name == "plan" else class_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
