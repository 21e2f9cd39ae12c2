"""The Walsh-Hadamard transform: ours, chunks and concatenations, a product with the matrix.

The floor is a copy of the array, which any transform makes as well. `fast-hadamard-transform` is for CUDA alone.
"""

import functools
import importlib

import reference
import torch
import work
from harness import Case, Contender, Target, compiled, relative

from torch_subspace.lowrank import hadamard

OURS, FLOOR, CHUNKS = "ours", "floor: a copy", "chunks and concatenations"
PEER = "fast-hadamard-transform"


def inputs(v, n, device):
    """Normal numbers."""
    return torch.randn(v, n, generator=torch.Generator().manual_seed(0)).to(device)


def chunk(x):
    """As public code for intrinsic dimensions has it: two halves and a concatenation for each bit of a place."""
    n, width = x.shape[-1], 1
    while width < n:
        a, b = x.view(-1, n // (2 * width), 2, width).chunk(2, 2)
        x, width = torch.cat((a + b, a - b), 2), 2 * width
    return x.view(-1, n)


def product(matrix, x):
    """Rows times the matrix, which is made beforehand."""
    return x @ matrix


def peer():
    """The kernels of PyPI, or why they are not there."""
    try:
        return importlib.import_module("fast_hadamard_transform").hadamard_transform, ""
    except ImportError:
        return None, "not installed: it is built for CUDA alone"


def contender(name, function, v, n, device, missing=""):
    """A transform of all rows. Long ones are checked by their first transform's transform."""

    def build():
        x = inputs(v, n, device)
        return lambda: function(x)

    def check():
        x = inputs(min(v, 3), n, device)
        if n <= 8192:
            return relative(function(x).cpu(), reference.hadamard(x.cpu().double()))
        return relative(function(function(x)).cpu() / n, x.cpu().double())

    return Contender(name, build, None if name == FLOOR else check, peak=True, kept=4 * v * n, missing=missing)


def case(v, n, device, targets=(), with_product=False, with_chunks=False):
    """All contenders at one size."""
    theirs, missing = (None, "for CUDA alone") if device == "cpu" else peer()
    if theirs and n > 1 << 15:
        theirs, missing = None, "rows up to 2^15"
    contenders = [contender(FLOOR, torch.clone, v, n, device), contender(OURS, hadamard, v, n, device),
                  contender(PEER, theirs, v, n, device, missing)]
    if with_chunks:  # seconds where there are many rows
        contenders += [contender(CHUNKS, chunk, v, n, device),
                       contender("torch.compile of it", compiled(chunk), v, n, device)]
    if with_product:
        matrix = reference.hadamard(torch.eye(n)).to(device)
        contenders.append(contender("a product", functools.partial(product, matrix), v, n, device))
    return Case(f"{v} rows of {n} float32", contenders, list(targets), **work.hadamard(v, n), seconds=4)


def cases(device):
    """One long row, and arrays that no cache holds, of rows of an activation's size up to 8192."""
    copies = [Target(OURS, (FLOOR,), "<=", 1.5, 1.2)]
    return [case(1, 1 << 20, device, [Target(OURS, (FLOOR,), "<=", 4, 3), Target(OURS, (CHUNKS,), ">=", 10, 16)],
                 with_chunks=True),
            case(1 << 16, 256, device, copies, with_product=True), case(1 << 14, 1024, device, copies),
            case(1 << 11, 8192, device, copies)]
