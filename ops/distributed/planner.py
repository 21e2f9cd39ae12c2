"""What a class-parallel head takes of each process, before there is one: counted in the code, tested against a step.

With R processes the one that has most has c = ceil(C / R) classes; of these s stay in a call of the loss, all or a
sample. P = c k n and S = s k n are the numbers in their frames, w the bytes of one, h those of a number of a feature.
What grows with the batch alone is a few numbers a row, but for features and their gradient, and is left out.

Memory beside frames and the optimiser's state, with gradients that `zero_grad` has let go:

    forward     labels and features gathered; of a sample or of halves the frames that the op reads, S h. Beside what is
                kept of it for the backward, the op's workspace: tiles; before it, a random number for each class.
    backward    what is kept, dx, S h of gradient and the workspace; then the whole gradient, P w, and beside it what it
                is made of: of a sample S w, of halves S h.
    step        P w of gradient. AdamW: for a piece of the classes, the horizontal gradient and a float64 copy of it.
                Ragged: frames, gradient and momentum without the zeros of the stack, a copy of each.

Memory traffic is that of passes over frames and what is as large; for each block of the batch (256 rows on a CPU, 4096
on a GPU) there is a pass over the classes:

    forward     S h, on a GPU for each block
    backward    for each block S h of frames twice; of gradient once, twice from the second block on (read, written)
    step        SGD reads frames, gradient and momentum, writes frames and momentum: 5 P w. AdamW besides reads 4 and
                writes 1 for G Wᵀ and G - (G Wᵀ) W, 2 as a BLAS adds to a copy of G, and 5 for each of the float64
                lengths of G and of that: to read, to write and to read as float64, twice as wide.
    halves      rounding S (w + h), the gradient back S (w + h); where the op sums it in float32, on a CPU and of
                several blocks on a GPU, that is w wide, and S (w + h) more
    a sample    taken 2 S w; put back, P w of zeros and 3 S w

Flops are those of the products: 2 B S forward; 6 B S backward, where the projections are computed anew; 8 k per number
of P for a step, Gram matrices and combinations of 2 k rows, and 4 k more for AdamW's horizontal gradient.

Sent: what a process hands on in the ring of each collective, 2 (R - 1) / R of an all-reduce and (R - 1) / R of a gather
or reduce-scatter. Forward 4 numbers a row; backward dx, B n h. With rows of their own in each process features and
labels are gathered, and dx is scattered.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import Placement

from .. import library
from ..common import FLOATS, HALF, NOT_NEGATIVE, check_flag, check_number, check_word, told, whole, wide_dtype
from .class_parallel import INPUTS, RATE, layout

__all__ = ["Plan", "Share", "plan"]

# As in the kernels and the optimiser; a test compares.
PANEL_ROWS, BLOCK, ROUND_ROWS = 512, 256, 8192  # cpu/grassmann/panels.c
PACKED = 512 * 11 * 3  # vectors, for each thread
VECTORS = {"amx_bf16": 64, "avx512_bf16": 64, "avx512": 64, "avx2": 32}  # bytes; 16 elsewhere
PANEL_TILE, PANEL_BLOCK = 1 << 22, 4096  # cuda/grassmann/panels_shape.h
SCRATCH, SHARED_K = 64 << 20, 16  # cuda/grassmann/rsgd_shape.h
PIECE = 1 << 24  # ops/grassmann/groups.py


@dataclasses.dataclass(frozen=True)
class Share:
    """One process's share of a part of the work, in bytes and floating-point operations.

    memory: at the worst moment, beside frames and state. traffic: to and from memory. sent: to other processes.
    """

    memory: int
    traffic: int
    flops: int
    sent: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` returns; bytes of the process that has most. `print` shows it as a table."""

    title: str
    classes: int
    parameters: int
    gradient: int
    state: int
    forward: Share
    backward: Share
    step: Share

    @property
    def shares(self) -> tuple[Share, Share, Share]:
        """In the order of a training step."""
        return self.forward, self.backward, self.step

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a training step: frames, state, and the most that a part takes."""
        return self.parameters + self.state + max(share.memory for share in self.shares)

    @property
    def traffic(self) -> int:
        """Bytes of a training step to and from memory."""
        return sum(share.traffic for share in self.shares)

    @property
    def flops(self) -> int:
        """Of a training step."""
        return sum(share.flops for share in self.shares)

    @property
    def sent(self) -> int:
        """Bytes of a training step to other processes."""
        return sum(share.sent for share in self.shares)

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("parameters", "gradient", "state")]
        rows += [(name, *dataclasses.astuple(getattr(self, name))) for name in ("forward", "backward", "step")]
        rows += [("peak, and sums", self.peak, self.traffic, self.flops, self.sent)]
        lines = [self.title, f"{'':<15}{'memory':>12}{'traffic':>12}{'flops':>12}{'sent':>12}"]
        for name, *values in rows:
            units = ("B", "B", "", "B")
            lines.append(f"{name:<15}" + "".join(f"{_short(v, unit):>12}" for v, unit in zip(values, units)))
        return "\n".join(lines)


def _short(value: int, unit: str) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value} {unit}"


def plan(
    num_classes: int,
    features: int,
    k: int | Sequence[int],
    batch: int,
    ranks: int,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    amsgrad: bool = False,
    sample_rate: float = 1.0,
    input_layouts: Placement | None = None,
    device: str = "cuda",
    threads: int = 1,
) -> Plan:
    """Memory, traffic and flops of each process that trains a class-parallel head, without making one.

    For a head that `shard_head` shares out, one call of `loss` with labels, its backward and a step of our optimiser.
    The body, what it keeps for its backward, and the buffers of the communication library come on top.

    Args:
        num_classes, features, k: C, n and k of `GrassmannLinear`; a k of C ints is ragged, held as wide as the largest.
        batch: rows of the loss, of all processes that share classes together.
        ranks: how many processes share the classes.
        dtype: of the features in the loss, under autocast its dtype. Frames are float64 for float64, else float32.
        optimizer: "sgd" or "adamw".
        momentum: of "sgd"; 0 keeps no state.
        amsgrad: of "adamw".
        sample_rate, input_layouts: as for `ClassParallel`.
        device: "cuda" or "cpu", which cut the work in other tiles.
        threads: of each process, on a CPU.

    Returns:
        A frozen dataclass: `parameters`, `gradient`, `state` and `peak` in bytes, `classes` of the process that has
        most; `forward`, `backward` and `step`, each with the `memory` it takes beside frames and state, the `traffic`
        to and from memory, `flops`, and bytes `sent`; `traffic`, `flops` and `sent` of all three. `print` shows all.

    Traffic counts whole passes over what is as large as the frames, whatever caches hold. Sent is what a ring takes.

    Raises:
        TypeError, ValueError: sizes, numbers or words out of range, a k larger than `features`.

    Source: counted in this package's kernels; the formulas stand above the code.

    Example:
        >>> planned = ts.distributed.plan(1_000_000, 512, 8, batch=1024, ranks=8)
        >>> print(planned)
        1,000,000 classes of 8 x 512, 1024 rows, 8 processes: each
                             memory     traffic       flops        sent
        parameters          2.05 GB
        gradient            2.05 GB
        state               2.05 GB
        forward             17.8 MB     2.05 GB      1.05 T     28.7 kB
        backward            2.07 GB     6.14 GB      3.15 T     3.67 MB
        step                2.05 GB     10.2 GB      32.8 G         0 B
        peak, and sums      6.16 GB     18.4 GB      4.23 T      3.7 MB
        >>> planned.peak < 80e9
        True
    """
    names = ("num_classes", "features", "batch", "ranks", "threads")
    sizes = (num_classes, features, batch, ranks, threads)
    num_classes, features, batch, ranks, threads = (whole("plan", name, size, 1) for name, size in zip(names, sizes))
    own = -(-num_classes // ranks)
    most, rows, alike = _widths(k, num_classes, features, own)
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise TypeError(f"plan: dtype must be one of {', '.join(map(str, FLOATS))}, got {told(dtype)}")
    check_word("plan", "optimizer", optimizer, ("sgd", "adamw"))
    check_number("plan", "momentum", momentum, NOT_NEGATIVE)
    check_flag("plan", "amsgrad", amsgrad)
    check_number("plan", "sample_rate", sample_rate, RATE)
    check_word("plan", "device", device, ("cuda", "cpu"))
    own_rows = layout("plan", "input_layouts", input_layouts, INPUTS).is_shard()

    frames = _Frames(own, most, features, wide_dtype(dtype).itemsize, rows, alike)
    kept = min(own, max(math.ceil(sample_rate * own), batch)) if sample_rate < 1 else None
    forward, backward = _loss(frames, num_classes, kept, batch, dtype, device, threads, own_rows, ranks)
    state, step = _step(frames, optimizer, momentum > 0, amsgrad, device)
    return Plan(f"{num_classes:,} classes of {most} x {features}, {batch} rows, {ranks} processes: each",
                own, frames.bytes, frames.bytes, state, forward, backward, step)


class _Frames(NamedTuple):
    """Of a process: classes, of which each has k rows of n numbers. Ragged: so many `rows` are not of zeros, of which
    the share `alike` at most is of classes with one k."""

    classes: int
    k: int
    n: int
    item: int
    rows: int | None
    alike: float

    @property
    def numbers(self) -> int:
        return self.classes * self.k * self.n

    @property
    def bytes(self) -> int:
        return self.numbers * self.item


def _widths(k: int | Sequence[int], classes: int, features: int, own: int) -> tuple[int, int | None, float]:
    """The largest k; of ragged ones the rows of the process that has most, and the largest share of one k in all."""
    ragged = isinstance(k, Iterable) and getattr(k, "ndim", 1) > 0 and not isinstance(k, (str, bytes, Mapping, set))
    dims = [whole("plan", "k", dim, 1) for dim in (k if ragged else [k])]
    if ragged and len(dims) != classes:
        raise ValueError(f"plan: k must be an int or {classes} ints, got {told(k)}")
    if max(dims) > features:
        raise ValueError(f"plan: k must be at most features = {features}, got {max(dims)}")
    if not ragged:
        return dims[0], None, 1.0
    alike = max(dim * count for dim, count in Counter(dims).items()) / sum(dims)
    return max(dims), max(sum(dims[i : i + own]) for i in range(0, classes, own)), alike


def _loss(
    frames: _Frames, all_classes: int, kept: int | None, batch: int, dtype: torch.dtype, device: str, threads: int,
    own_rows: bool, ranks: int,
) -> tuple[Share, Share]:
    """Forward and backward. kept: of a sample, how many classes."""
    half, h, w = dtype in HALF, dtype.itemsize, frames.item
    classes = frames.classes if kept is None else kept
    taken = classes * frames.k * frames.n
    x, labels = batch * frames.n * h, 8 * batch
    cut = _on_cpu if device == "cpu" else _on_cuda
    blocks, forward_tiles, backward_tiles, wide = cut(batch, frames.n, classes, frames.k, dtype, threads)

    saved = x + labels if own_rows and ranks > 1 else 0
    if kept is None:
        saved += taken * h if half else 0
        forward = saved + forward_tiles
        put_back = frames.bytes + (taken * h if half else 0)  # from the gradient that the op returns
    else:
        saved += taken * h + 8 * classes
        forward = saved + max(4 * all_classes, forward_tiles, taken * w if half else 0)
        put_back = frames.bytes + taken * w
    backward = x + max(saved + taken * h + backward_tiles, put_back)

    ring = (ranks - 1) / ranks
    reads = taken * h * (1 if device == "cpu" else blocks)
    gradient = taken * ((2 * blocks - 1) * (w if wide else h) + (w + h if wide else 0))
    rounding = taken * (w + h) if half else 0
    taking, putting = (0, 0) if kept is None else (2 * taken * w, frames.bytes + 3 * taken * w)
    sums = 4 * batch * w  # the all-reduces of four numbers a row
    return (
        Share(forward, reads + rounding + taking, 2 * batch * taken,
              round(ring * (2 * sums + (x + labels if own_rows else 0)))),
        Share(backward, 2 * taken * h * blocks + gradient + rounding + putting, 6 * batch * taken,
              round(ring * x * (1 if own_rows else 2))),
    )


def _on_cpu(batch: int, n: int, classes: int, k: int, dtype: torch.dtype, threads: int) -> tuple[int, int, int, bool]:
    """Blocks of the batch, workspace of the forward and of the backward, and whether this sums halves in float32."""
    half, item, level = dtype in HALF, wide_dtype(dtype).itemsize, library.config()["CPU"]["instruction set"]
    pairs = dtype == torch.bfloat16 and level in ("avx512_bf16", "amx_bf16")  # nothing is widened
    slots = max(1, min(threads, -(-batch * classes * k // max(1, (1 << 20) // n))))
    panel = max(1, min(PANEL_ROWS // k, -(-classes // slots)))
    count, rows, block = -(-classes // panel), panel * k, min(batch, BLOCK)
    narrow = max(min(16, block), -(-block * count // slots)) if count < slots else block  # few classes
    blocks = -(-batch // block)

    def carved(block: int, alive: int) -> int:
        numbers = (1 + pairs) * batch + (slots if pairs else alive) * rows * block + 2 * slots * panel * block
        return numbers * item + 2 * batch * n * (2 if pairs else item) + slots * PACKED * VECTORS.get(level, 16)

    alive = min(max(slots, ROUND_ROWS // rows), count)
    summed = half and (blocks > 1 or not pairs)
    if pairs:
        even = rows + rows % 2
        both, turned = slots * rows * (n + 1) * 2 * (n % 2), (slots * rows * (block + 1) + alive * even * block) * 2
    else:
        both, turned = slots * rows * n * item if half else 0, 0
    sums = (classes * k * n * item if summed else 0) + (block * n * item if half else 0)
    forward = max(carved(narrow, slots) + 32 * slots * batch, carved(block, alive))  # room for either
    return blocks, forward + both, carved(block, alive) + both + turned + sums, summed


def _on_cuda(batch: int, n: int, classes: int, k: int, dtype: torch.dtype, _: int) -> tuple[int, int, int, bool]:
    """The same on a GPU."""
    half, item = dtype in HALF, wide_dtype(dtype).itemsize
    block = min(batch, PANEL_BLOCK)
    panel = min(classes, max(1, PANEL_TILE // (block * k)))
    panel = -(-classes // -(-classes // panel))
    blocks, tile = -(-batch // block), panel * k * (-(-block // 8) * 8)
    across = -(-512 // -(-block // 128))
    strip = max(16, min((-(-panel // across) + 7) // 8 * 8, 128))
    sums = -(-panel // strip) * block * 32 + batch * 32
    wide = half and blocks > 1
    both = batch * item + tile * item
    halves = (2 * tile + block * n * item if half else 0) + (classes * k * n * item if wide else 0)
    halves += batch * n * 2 if dtype == torch.float16 else 0
    return blocks, max(both + sums, both + 8 * batch), both + 8 * batch + halves, wide


def _step(frames: _Frames, optimizer: str, moving: bool, amsgrad: bool, device: str) -> tuple[int, Share]:
    """Bytes of state, and the step."""
    item, entries = frames.item, frames.numbers if frames.rows is None else frames.rows * frames.n
    memory = frames.bytes + (SCRATCH if device == "cuda" and frames.k > SHARED_K else 0)
    adam = optimizer == "adamw"
    if adam:
        state = frames.bytes + frames.classes * (4 + (2 if amsgrad else 1) * item)
        piece = -(-entries // min(64, -(-entries // PIECE)))
        double = 8 * frames.alike if item == 4 else 0
        memory += math.ceil(piece * (item + double if frames.rows is None else max(3 * item + double, 4 * item)))
    else:
        state = frames.bytes if moving else 0
    copies = 0 if frames.rows is None else 3 if adam or moving else 2
    passes = 5 + 7 + 10 if adam else 5 if moving else 3
    traffic = (passes + 2 * copies + 2 * max(copies - 1, 0)) * entries * item
    flops = (12 if adam else 8) * frames.k * entries
    return state, Share(memory + copies * entries * item, traffic, flops, 0)
