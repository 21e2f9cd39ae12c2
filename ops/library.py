"""Loads the compiled libraries into torch, and says what was loaded.

The CPU library must load. The CUDA one is loaded when it fits this torch; otherwise `config()` says why not.
"""

import contextlib
import ctypes
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import torch

LIB = Path(__file__).resolve().parent / "lib"
OLDEST_TORCH = (2, 11)

__version__ = importlib.metadata.version("torch-subspace")


@contextlib.contextmanager
def _environment(name, value):
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old


def _load(device):
    """The kernels register themselves while the library is loaded, and leave a status."""
    path = LIB / f"libtorch_subspace_{device}.so"
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    status = getattr(library, f"torch_subspace_{device}_status")()
    if status:
        raise ImportError(f"torch_subspace: torch {torch.__version__} refused the {device} kernels (status {status})")
    return library


def _load_cpu():
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise ImportError(f"torch_subspace needs torch 2.11 or newer, this is torch {torch.__version__}")
    if not (LIB / "libtorch_subspace_cpu.so").exists():
        raise ImportError(f"torch_subspace is not built: run `pip install -e .` in {LIB.parent.parent}")
    # Our own copy of OpenBLAS reads this once, while it is loaded: it must not start a pool beside torch's threads.
    with _environment("OPENBLAS_NUM_THREADS", "1"):
        library = _load("cpu")
    for name in ("isa", "isa_available", "blas"):
        getattr(library, f"torch_subspace_cpu_{name}").restype = ctypes.c_char_p
    library.torch_subspace_cpu_intel.restype = ctypes.c_bool
    return library


def _load_cuda():
    """(library, None), or (None, why not). A missing driver or GPU is no reason: torch itself loads without."""
    if torch.version.cuda is None:
        return None, "this torch is built without CUDA"
    if not (LIB / "cuda_version").exists():
        return None, "torch_subspace was built without CUDA"
    ours, theirs = (LIB / "cuda_version").read_text().strip(), torch.version.cuda.split(".")[0]
    if ours != theirs:
        return None, f"torch_subspace was built for CUDA {ours}, this torch for CUDA {theirs}"
    try:
        return _load("cuda"), None
    except (ImportError, OSError) as error:
        return None, str(error)


_raised: list[BaseException] = []


def _signals():
    """Runs the handlers of pending signals whenever it is resumed; 1: one of them raised.

    A generator, because Python runs them as soon as the kernel has called back, before the first line of a function:
    here that is inside the `try`.
    """
    answer = 0
    while True:
        try:
            yield answer
            answer = 0
        except GeneratorExit:
            return
        except BaseException as error:
            _raised[:] = [error]
            answer = 1


def raise_signal(error: RuntimeError) -> None:
    """Raise what a signal's handler raised, such as KeyboardInterrupt, if it was that which ended a kernel."""
    if _raised and "interrupted" in str(error):
        raise _raised.pop() from None


_cpu = _load_cpu()
_signal_handlers = _signals()
next(_signal_handlers)
_run_signals = ctypes.CFUNCTYPE(ctypes.c_int)(_signal_handlers.__next__)  # as long as the library lives
_cpu.torch_subspace_cpu_signals(_run_signals)
_cuda, _cuda_missing = _load_cuda()


def config() -> dict[str, Any]:
    """What `show_config` prints, as a dict."""
    cuda = {"loaded": _cuda is not None}
    if _cuda is None:
        cuda["why not"] = _cuda_missing
    else:
        version = _cuda.torch_subspace_cuda_version()
        cuda["toolkit"] = f"{version // 1000}.{version % 1000 // 10}"
        cuda["devices"] = torch.cuda.device_count()
    return {
        "torch_subspace": __version__,
        "torch": torch.__version__,
        "CPU": {
            "library": str(LIB / "libtorch_subspace_cpu.so"),
            "instruction set": _cpu.torch_subspace_cpu_isa().decode(),
            "available": _cpu.torch_subspace_cpu_isa_available().decode(),
            "BLAS": _cpu.torch_subspace_cpu_blas().decode().strip(),
            "threads": torch.get_num_threads(),
        },
        "CUDA": cuda,
    }


def is_intel() -> bool:
    """Whether this machine's processor is Intel's, for which torch's products are at their best."""
    return _cpu.torch_subspace_cpu_intel()


def split_float32(may: bool) -> None:
    """Let the CPU's kernels multiply float32 by products of bfloat16, where there is AMX."""
    _cpu.torch_subspace_cpu_split(ctypes.c_bool(may))


def show_config() -> None:
    """Print which libraries, instruction set, BLAS and threads are in use, and why CUDA is not, if it is not.

    Example:
        >>> ts.show_config()                                    # doctest: +ELLIPSIS
        torch_subspace: ...
    """
    for name, value in config().items():
        if not isinstance(value, dict):
            print(f"{name}: {value}")
            continue
        print(f"{name}:")
        for key, text in value.items():
            print(f"  {key}: {text}")
