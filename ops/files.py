"""Files that appear whole or not at all."""
from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .common import told


def check_path(name: str, path: object) -> None:
    """Raises in `name`'s voice unless it is a path, as str or PathLike."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: path must be a str or a PathLike, got {told(path)}")
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise ValueError(f"{name}: path must name a file, got {path!r}")


def write_whole(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all."""
    from safetensors.torch import save_file

    tensors = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=path.name[:100], suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's is for its owner alone
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
