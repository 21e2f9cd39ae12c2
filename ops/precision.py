"""How float32 is multiplied on a CPU: as such, or by three products of bfloat16 where a processor has AMX."""

import threading

from . import library
from .common import check_word

WORDS = ("highest", "high")
_precision, _lock = "highest", threading.Lock()


def set_float32_matmul_precision(precision: str) -> None:
    """Choose how the CPU's kernels of logits and of the fused loss multiply float32.

    "highest": in float32. "high": each number as the sum of two bfloat16 numbers, some 16 bits, by three products of
    bfloat16 whose sums are float32. On processors with AMX (`ts.show_config()` says `amx_bf16`) that takes half of the
    time at best and as long at worst, from 16 points, rows of frames and features on; otherwise nothing changes.
    Errors of logits and of both gradients are then some 1e-5 of the largest value at usual gammas, where float32 has
    5e-7. Numbers below 1e-33 lose bits, those below 1.2e-38 count as 0, those beyond 3.396e38 give NaN. float16, which
    is widened to float32, is multiplied likewise, and has fewer bits than that.

    It holds for the process and all its threads (not for processes that are started later), from the next forward or
    backward on, compiled graphs included, and is ours alone: `torch.set_float32_matmul_precision` is neither read nor
    changed.

    Args:
        precision: "highest", as at first, or "high".

    Raises:
        ValueError: of another word.

    The sum of bfloat16 numbers: Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For
    Higher-Precision Computations" (2019), https://arxiv.org/abs/1904.06376.

    Example:
        >>> ts.set_float32_matmul_precision("high")
        >>> ts.get_float32_matmul_precision()
        'high'
        >>> ts.set_float32_matmul_precision("highest")
    """
    global _precision
    check_word("set_float32_matmul_precision", "precision", precision, WORDS)
    with _lock:
        library.split_float32(precision == "high")
        _precision = precision


def get_float32_matmul_precision() -> str:
    """What `set_float32_matmul_precision` was told last, or "highest".

    Example:
        >>> ts.get_float32_matmul_precision()
        'highest'
    """
    return _precision
