"""What every benchmark shares: contenders are checked, warmed up, timed in turn and compared with what was promised.

A bench_<op>.py has `cases(device)`, a list of `Case`. All data of a case is made from a fixed seed.
"""

import ctypes
import dataclasses
import gc
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import gpu_timing
import numpy
import threadpoolctl
import torch

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem.removeprefix("bench_"): path for path in (ROOT / "tests/bench").glob("*/bench_*.py")}  # by op
sys.path[:0] = [str(ROOT / "tests"), *sorted({str(path.parent) for path in FILES.values()})]  # reference.py, and these
ROUNDS, FEWEST = 60, 5  # samples of a contender: as many as rounds, and of a slow one at least this many
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SIDE = 1536  # of the square products that tell a processor's rate
SLOWEST = 3.0  # seconds of a call on a GPU above which one call is all the timing a contender gets


@dataclasses.dataclass
class Contender:
    """One way to do the work of a case.

    build: makes its data and returns the function to time.
    check: returns the largest error against the float64 reference, relative to the largest value; None when a peer
        computes something else, which `note` then says.
    steps: units of work in one call of the function.
    missing: why it can't take part.
    peak: also measure the memory its function takes, less the `kept` bytes of results.
    saved: returns the bytes that a forward keeps for its backward, beside the input and the parameters.
    """

    name: str
    build: Callable[[], Callable[[], object]]
    check: Callable[[], float] | None = None
    steps: int = 1
    note: str = ""
    missing: str = ""
    peak: bool = False
    kept: int = 0
    saved: Callable[[], int] | None = None


@dataclasses.dataclass
class Target:
    """A promise: time (or peak memory) of `ours` against the best of `against`.

    With sense "<=" the ratio is ours / theirs, with ">=" theirs / ours.
    """

    ours: str
    against: tuple[str, ...]
    sense: str
    must: float
    stretch: float
    of: str = "p50"


@dataclasses.dataclass
class Case:
    """One size of a problem. `bytes` and `flops` are the least that any implementation must move and do, in products of
    `dtype`. `seconds` are those of timing on a CPU; a GPU gets a few."""

    name: str
    contenders: list[Contender]
    targets: list[Target] = dataclasses.field(default_factory=list)
    bytes: int = 0
    flops: int = 0
    seconds: float = 12.0
    dtype: torch.dtype = torch.float32
    pictured: bool = True


def relative(result, truth):
    """Largest error of tensors relative to the largest true value."""
    pairs = [(result, truth)] if isinstance(result, torch.Tensor) else list(zip(result, truth, strict=True))
    return max(((r.double() - t).abs().max() / t.abs().max()).item() for r, t in pairs)


def compiled(function):
    """`function` under torch.compile, specialised for its shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def level():
    """The instruction set of the CPU's kernels."""
    import torch_subspace.library

    return torch_subspace.library.config()["CPU"]["instruction set"]


def multiplies_bfloat16():
    """Whether the CPU's kernels multiply bfloat16 as such."""
    return level() in ("avx512_bf16", "amx_bf16")


def by_bfloat16(function):
    """`function` with float32 multiplied as the sum of two bfloat16 numbers, where there is AMX; None elsewhere."""
    import torch_subspace as ts

    if level() != "amx_bf16":
        return None

    def high(*given):
        ts.set_float32_matmul_precision("high")
        try:
            return function(*given)
        finally:
            ts.set_float32_matmul_precision("highest")

    return high


def environment(device, threads):
    """Where and with what a measurement was made."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = ["diff", "--quiet", "HEAD", "--", "cpu", "cuda", "shim", "ops", "CMakeLists.txt"]
        if subprocess.run([*git, *changed], check=False).returncode:
            commit += " with changes"
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("SUBSPACE_COMMIT", "unknown")  # a copy without its history
    import torch_subspace.library

    loaded = torch_subspace.library.config()
    cpu, family = platform.processor() or platform.machine(), None
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        key, _, value = map(str.strip, line.partition(":"))
        if key == "model name":
            cpu = value
            break
        family = value if key == "cpu family" else family
    row = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "commit": commit, "cpu": cpu,
           "family": family, "instruction set": loaded["CPU"]["instruction set"], "blas": loaded["CPU"]["BLAS"],
           "threads": threads, "torch": torch.__version__, "torch_subspace": loaded["torch_subspace"], "device": "cpu",
           "system": platform.platform()}
    if os.environ.get("MALLOC_MMAP_MAX_") == "0":
        row["pages"] = "kept"
    if device == "cuda":
        row |= gpu_timing.describe()
    if hasattr(torch, "get_num_threads") and Path("/proc/loadavg").exists():
        row["load before"] = float(Path("/proc/loadavg").read_text().split()[0])
    return row


# Else each result of more than 32 MB is new memory at every call, and to make its pages takes longer than most ops.
KEEPS_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": f"{1 << 40}"}


def as_chosen_at_load(**more):
    """Begin this script again where OpenBLAS is told which kernels to take: it is timed with its own choice. And where
    the environment lacks `more`. For scripts, not for what imports them."""
    wanted = {name: value for name, value in os.environ.items()
              if name not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")} | more
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)


def timed(function, repeats):
    """Seconds of one of `repeats` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def samples(functions, seconds):
    """Seconds per call of each function: lists of samples taken in turn, so that all see the same machine."""
    repeats, every = {}, {}
    for name, function in functions.items():
        cost = timed(function, 1)
        if cost < 2:
            cost = min(timed(function, 1) for _ in range(2))
        repeats[name] = max(1, math.ceil(2e-3 / cost))
        wanted = seconds / len(functions) / (cost * repeats[name])
        every[name] = max(1, round(ROUNDS / min(max(wanted, FEWEST), ROUNDS)))
    taken = {name: [] for name in functions}
    for turn in range(ROUNDS):
        for name, function in functions.items():
            if turn % every[name] == 0:
                taken[name].append(timed(function, repeats[name]))
    return taken


def bounds(case):
    """What is timed beside the contenders to know the machine's limits, and how much of it the case needs. What
    is moved is as large as the case, from a megabyte to what no cache holds: a small case lies in a cache."""
    found = {}
    if case.bytes:  # a sum in place: two reads, and a write of what is in the cache already
        a, b = torch.ones(2, min(max(case.bytes // 12, 1 << 17), 1 << 24))
        found["bandwidth"] = lambda: a.add_(b), case.bytes / (3 * a.nbytes)
    if case.flops:
        c, d = torch.ones(2, SIDE, SIDE, dtype=case.dtype)
        share = case.flops / (2 * SIDE**3)
        found["product"] = lambda: c @ d, share
        if case.dtype in (torch.float32, torch.float64):
            found["product, OpenBLAS"] = numpy_product(c, d), share
    return found


def numpy_product(c, d):
    """The same by numpy's OpenBLAS, with as many threads as torch: on some processors torch's library is the slower."""
    for library in threadpoolctl.ThreadpoolController().lib_controllers:
        if "numpy" in library.filepath:
            library.set_num_threads(torch.get_num_threads())
    c, d, out = c.numpy(), d.numpy(), torch.empty_like(c).numpy()
    return lambda: numpy.matmul(c, d, out=out)


def limit(seconds, limits):
    """Seconds that a case takes at least: the longest of its kinds of work, each as the best way does it here."""
    kinds = {}
    for name, (_, share) in limits.items():
        kinds.setdefault(name.partition(",")[0], []).append(seconds[name] * share)
    return max(map(min, kinds.values()), default=0)


def peak_memory(function, device):
    """Bytes that a call takes beyond what is there before, at the worst moment. On the CPU: in a fresh process."""
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(what):
    """A line of this process's memory accounts, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def run(case, scale, peak_of):
    """Rows of one case on the CPU, one per contender. `scale` shortens the timing, `peak_of(name)` measures memory."""
    functions, rows = prepared(case)
    limits = bounds(case)
    timing = samples(functions | {name: f for name, (f, _) in limits.items() if "," not in name}, case.seconds * scale)
    for name, (f, _) in limits.items():  # afterwards: threads of OpenBLAS's own keep a core busy for a while
        if name not in timing:
            timing[name] = [timed(f, 1) for _ in range(FEWEST)]
    bound = limit({name: statistics.median(timing.pop(name)) for name in limits}, limits)
    add_times(case, rows, timing, bound)
    for c in case.contenders:
        if c.name in functions and c.peak:
            add_peak(rows[c.name], c, peak_of(c.name))
    return list(rows.values())


def run_on_gpu(case, scale, top):
    """The same on a GPU, whose ceilings are `top`. Rows also have the seconds of a call in a loop on the host, and the
    rates that the case's bytes and flops come to."""
    functions, rows = prepared(case)
    timing, loop = {}, {}
    for name in list(functions):
        try:
            cost = gpu_timing.once(functions[name])  # with whatever is compiled and loaded at the first call
            if cost > SLOWEST:
                cost = gpu_timing.once(functions[name])
        except Exception as problem:
            rows[name]["missing"] = said(problem)
            del functions[name]
            continue
        if cost > SLOWEST:
            timing[name], loop[name] = [cost, cost], cost
    quick = {name: function for name, function in functions.items() if name not in timing}
    for known, new in zip((timing, loop), gpu_timing.samples(quick, min(0.4 * case.seconds, 5.0) * scale)):
        known |= new
    add_times(case, rows, timing, gpu_timing.bound(case, top))
    for c in case.contenders:
        if c.name not in functions:
            continue
        row = rows[c.name]
        row["loop_ms"] = 1e3 * loop[c.name] / c.steps
        if case.bytes:
            row["gb_s"] = case.bytes / row["p50_ms"] / 1e6
        if case.flops:
            row["tflop_s"] = case.flops / row["p50_ms"] / 1e9
        if c.peak:
            add_peak(row, c, peak_memory(functions[c.name], "cuda"))
    functions.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return list(rows.values())


def said(problem):
    """An exception in a line."""
    return f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"


def add_peak(row, contender, peak):
    """Memory of a contender."""
    row |= {"peak_mib": peak / 2**20, "beyond_results_mib": (peak - contender.kept) / 2**20}


def add_times(case, rows, timing, bound):
    """Quantiles of the samples, and the share of what the machine can do at best."""
    steps = {c.name: c.steps for c in case.contenders}
    for name, taken in timing.items():
        taken = sorted(t / steps[name] for t in taken)
        cut = statistics.quantiles(taken, n=10, method="inclusive")
        rows[name] |= {"p20_ms": 1e3 * cut[1], "p50_ms": 1e3 * cut[4], "p80_ms": 1e3 * cut[7], "samples": len(taken)}
        if bound:
            rows[name]["of_bound"] = bound / cut[4]


def prepared(case):
    """Functions of the contenders that are there and right, and a row for each."""
    functions, rows = {}, {}
    for c in case.contenders:
        rows[c.name] = row = {"case": case.name, "contender": c.name}
        if c.note:
            row["note"] = c.note
        if c.missing:
            row["missing"] = c.missing
            continue
        try:
            error = c.check() if c.check else None
            if error is not None:
                row["error"] = float(f"{error:.2e}")
            if error is not None and not error <= TOLERANCE[case.dtype]:
                row["missing"] = f"wrong: off by {error:.1e} of the reference"
                continue
            if c.saved:
                row["saved_mib"] = c.saved() / 2**20
            functions[c.name] = c.build()
        except Exception as problem:  # a peer that breaks is a result as well
            row["missing"] = said(problem)
    return functions, rows


def verdicts(case, rows):
    """What came of the case's targets."""
    by_name = {row["contender"]: row for row in rows}
    found = []
    for t in case.targets:
        key = {"p50": "p50_ms", "peak": "beyond_results_mib"}[t.of]
        theirs = {name: by_name[name][key] for name in t.against if key in by_name.get(name, {})}
        if key not in by_name.get(t.ours, {}) or not theirs:
            found.append({"case": case.name, "ours": t.ours, "against": t.against, "ratio": None})
            continue
        best = min(theirs, key=theirs.get)
        ours = max(by_name[t.ours][key], 1e-9)
        ratio = ours / theirs[best] if t.sense == "<=" else theirs[best] / ours
        reached = [ratio <= x if t.sense == "<=" else ratio >= x for x in (t.must, t.stretch)]
        found.append({"case": case.name, "of": "time" if t.of == "p50" else "memory", "ours": t.ours, "against": best,
                      "ratio": ratio, "sense": t.sense, "must": t.must, "stretch": t.stretch,
                      "reached": "stretch" if all(reached) else "must" if reached[0] else "no"})
    return found
