"""Timing on a GPU: what a call takes there, what the machine can do at best, and which machine it is.

A sample is one call between two events, with the second-level cache swept by a read of something larger before it, as
in training, where other layers come between. The launches of a batch of samples are queued up behind a wait, so that
the GPU never waits for Python: what is timed is the GPU's own work. What a loop of calls takes on the clock of the host
is measured apart; for small cases that is the launches, not the work.
"""

import math
import statistics
import subprocess
import time

import torch

BATCH, MOST = 10, 200  # samples of a contender at a turn, and in all
GIB = 1 << 30


class Sweeper:
    """Reads a few times what the second-level cache holds, so that nothing is left in it, and nothing to be written."""

    def __init__(self):
        size = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 1 << 28)
        self.data, self.sum = torch.zeros(size // 4, device="cuda"), torch.zeros((), device="cuda")

    def __call__(self):
        torch.sum(self.data, 0, out=self.sum)


def once(function):
    """Seconds of a call on the clock of the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def broken():
    """Does the GPU refuse all work of this process? So it does after a fault in a kernel."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def host_seconds(function, seconds=0.03):
    """Of a call in a loop that waits at its end: seconds until it is launched, and until it is done."""
    count = min(max(1, int(seconds / min(once(function), once(function)))), 200)
    start = time.perf_counter()
    for _ in range(count):
        function()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return (launched - start) / count, (time.perf_counter() - start) / count


def wait(seconds):
    """Occupies the GPU while the host goes on. The counter it goes by runs at no more than 2 GHz."""
    torch.cuda._sleep(int(min(seconds, 0.5) * 2e9))


def batch(function, count, ahead, sweep):
    """Seconds of `count` calls, each by itself, their launches queued `ahead` seconds before."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    wait(ahead)
    for start, end in events:
        sweep()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in events]


def samples(functions, seconds):
    """Seconds per call on the GPU of each function, taken in turn, and seconds per call of a loop on the host."""
    sweep, taken, loop, plan = Sweeper(), {}, {}, {}
    for name, function in functions.items():
        launch, loop[name] = host_seconds(function)
        cost = max(loop[name], 1e-4) + launch
        count = max(1, min(BATCH, int(0.1 / cost)))
        plan[name] = count, 1.5 * count * (launch + 5e-5), count * (cost + launch)
        taken[name] = []
    share = seconds / max(1, len(functions))
    turns = {name: min(max(2, int(share / each)), math.ceil(MOST / count)) for name, (count, _, each) in plan.items()}
    for turn in range(max(turns.values(), default=0)):
        for name, function in functions.items():
            if turn < turns[name]:
                taken[name] += batch(function, plan[name][0], plan[name][1], sweep)
    return taken, loop


# ------------------------------------------------------------------------------------------------------- what it can do


def ceilings(side=8192, size=GIB):
    """The most that this GPU was seen to do: bytes per second of a copy (read and written), and flops per second of
    matrix products of random numbers by dtype ("tf32": float32 with the switch on)."""
    found, sweep = {}, Sweeper()
    a, b = torch.empty(2, size // 4, device="cuda").uniform_()
    found["copy"] = 2 * a.nbytes / least(lambda: b.copy_(a), sweep)
    found["sum"] = a.nbytes / least(lambda: torch.sum(a, 0, out=sweep.sum), sweep)
    switch = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, n in (("float64", torch.float64, side // 2), ("float32", torch.float32, side),
                           ("tf32", torch.float32, side), ("float16", torch.float16, side),
                           ("bfloat16", torch.bfloat16, side)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        c, d, e = (torch.empty(n, n, device="cuda", dtype=torch.float32).normal_().to(dtype) for _ in range(3))
        found[name] = 2 * n**3 / least(lambda c=c, d=d, e=e: torch.mm(c, d, out=e), sweep)
        torch.backends.cuda.matmul.allow_tf32 = switch
    return found


def least(function, sweep):
    """The median of some calls."""
    for _ in range(3):
        function()
    return statistics.median(batch(function, 7, 1e-3, sweep))


def bound(case, top):
    """Seconds that the case takes at least, by its bytes and flops and what was measured of the GPU."""
    dtype = str(case.dtype).removeprefix("torch.")
    return max(case.bytes / top["copy"], case.flops / top[dtype])


def describe():
    """The GPU, its driver and its clocks, as far as nvidia-smi is there to tell."""
    p = torch.cuda.get_device_properties(0)
    row = {"device": p.name, "cuda": torch.version.cuda, "capability": f"{p.major}.{p.minor}",
           "multiprocessors": p.multi_processor_count, "memory_gib": p.total_memory / GIB,
           "l2_mib": p.L2_cache_size / 2**20, "tf32": torch.backends.cuda.matmul.allow_tf32}
    wanted = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu"]
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader", "--id=0"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        row |= {name.replace("_", " "): value.strip() for name, value in zip(wanted, told.strip().split(","))}
    except (OSError, subprocess.SubprocessError):
        pass
    return row
