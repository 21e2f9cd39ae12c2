"""What tests of every family ask: is it close, is it the same, for any number of threads, on which random numbers."""

import math
import multiprocessing

import pytest
import torch


def close(actual, expected, tolerance, *, floor=0.0, absolute=False, device="cpu"):
    """A tensor, or each of several, is as expected: its shape, and its entries up to a part of the largest.

    tolerance: the part of the largest expected entry, taken as `floor` where it is smaller; absolute: of 1 instead.
    device: where what is tested must be; None for anywhere.
    """
    if isinstance(expected, torch.Tensor):
        actual, expected = [actual], [expected]
    for a, e in zip(actual, expected, strict=True):
        assert device in (None, a.device.type)
        a, e = a.cpu().double(), e.cpu().double()
        largest = 1.0 if absolute else max(floor, e.abs().max().item() if e.numel() else 0.0)
        assert math.isfinite(largest)
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * largest)


def same(first, second):
    """Pairs of tensors, equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def frame_error(weight):
    """The largest entry of W W' - 1, of all frames W (..., k, n)."""
    weight = weight.detach().double()
    eye = torch.eye(weight.shape[-2], dtype=weight.dtype, device=weight.device)
    return (weight @ weight.mT - eye).abs().max().item()


def normal(*shape, seed=0, dtype=torch.float64):
    """Normal numbers drawn in float64, the same in every dtype."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype)


def threads(*counts):
    """Let torch have each number of threads in turn, and at the end as many as before."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


def in_two_processes(function, *args):
    """function(rank, *args), by forks of a process that has imported torch once for all."""
    in_processes(2, function, *args)


def in_processes(count, function, *args):
    """The same in so many."""
    loaded = ["torch", "torch_subspace", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo"]
    multiprocessing.set_forkserver_preload(loaded)
    torch.multiprocessing.start_processes(function, args, nprocs=count, start_method="forkserver")


def optional(name):
    """A module that is not installed everywhere; the test is skipped where it is not."""
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed")
