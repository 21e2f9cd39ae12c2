"""`torch_subspace.distributed`: heads whose classes are shared out among processes, on torch's own DTensor."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .class_parallel import ClassParallel as ClassParallel
    from .class_parallel import shard_head as shard_head
    from .planner import plan as plan

_FILES = {"ClassParallel": "class_parallel", "plan": "planner", "shard_head": "class_parallel"}
__all__ = ["ClassParallel", "plan", "shard_head"]

__getattr__, __dir__ = lazy(__name__, _FILES)  # DTensor takes a while to import
