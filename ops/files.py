"""Files that appear whole or not at all.

They are written under one name beside their own, `<name>.part`, and then moved. A process that is killed leaves at
most that one, which the next to write the file takes over; two that write it at once take turns.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
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
    from safetensors.torch import save

    tensors = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    write_bytes(path, save(tensors, metadata))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name[:100] + ".part")
    with _opened_alone(part) as handle:
        try:
            os.ftruncate(handle, 0)
            with open(handle, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(handle)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise


@contextlib.contextmanager
def _opened_alone(part: Path) -> Iterator[int]:
    """The file open for writing, by nobody else."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        handle = os.open(part, flags, 0o666)
        try:
            with contextlib.suppress(OSError):  # file systems without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, part):  # else it was moved while this waited
                yield handle
                return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
