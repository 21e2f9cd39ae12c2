"""compute-sanitizer over a small case of every op, forward and backward.

    python tests/gpu/sanitize.py                                 # memcheck, racecheck, synccheck, then initcheck
    python tests/gpu/sanitize.py --tool racecheck --case sinkhorn   # one tool, the cases with this in their name
    python tests/gpu/sanitize.py --small --seconds 60            # only the smallest cases, as many as there is time for

Fails where a report names one of our kernels or, from memcheck, a call of our library; reports on others' kernels
(cuBLAS, torch) are counted and the first is shown. initcheck only informs. Where there is no GPU or no sanitizer, or it
refuses the device, that is said and nothing fails. For source lines in the reports build with
CMAKE_ARGS=-DCMAKE_CUDA_FLAGS=-lineinfo.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "cuda" / "resources.txt"
TOOLS = "memcheck", "racecheck", "synccheck", "initcheck"
INFORMS = ("initcheck",)  # what torch and cuBLAS leave unwritten on purpose can't be told apart
OTHERS = re.compile(r"\bat::|cublas|cutlass|cudnn|cusolver|cub::|thrust|sm\d\d_xmma|Host Frame|Frame:", re.I)
NO_REPORT = re.compile("COMPUTE-SANITIZER|SUMMARY|Target application returned|was not displayed")
REFUSED = r"Device not supported|LibraryNotLoaded|Failed to initialize|injection library|Unable to (find|load|create)"


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=TOOLS, action="append")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--small", action="store_true", help="without those beyond a block or a multiprocessor")
    parser.add_argument("--seconds", type=float, default=570, help="for all tools together")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def planned(part, small):
    """(name, case, dtype) of what runs: all ops in float32 first."""
    import torch
    from cases import CASES, DROPOUT, LARGER

    chosen = [case for case in (*CASES, *DROPOUT, *(() if small else LARGER)) if part in case.name]
    pairs = [(case, torch.float32) for case in chosen]
    pairs += [(case, torch.bfloat16 if case.halves and case not in LARGER else torch.float64) for case in chosen]
    return [(f"{case.name} {str(dtype).removeprefix('torch.')}", case, dtype) for case, dtype in pairs]


def inside(part, small):
    """Run the cases; the sanitizer looks on."""
    from cases import run, synchronise

    for name, case, dtype in planned(part, small):
        print(f"case: {name}", flush=True)
        run(case, dtype)
        synchronise()
    print("case: done", flush=True)


def our_kernels():
    """Names of all __global__ functions in cuda/, which are those of cuda/resources.txt."""
    bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?"  # one parenthesis within another
    kernel = re.compile(rf"__global__\s+{bounds}(?:static\s+)?void\s+{bounds}(\w+)")
    found = {name for path in (ROOT / "cuda").rglob("*.cu*") for name in kernel.findall(path.read_text())}
    if unseen := set(re.findall(r"^\w+\.(\w+)", KEPT.read_text(), re.M)) - found:
        sys.exit(f"sanitize: found no source of the kernels {', '.join(sorted(unseen))} of {KEPT.name}")
    return found


def reports(lines):
    """The sanitizer's reports, each the text between two of its empty lines."""
    found = [[]]
    for line in lines:
        if not line.startswith("=========") or NO_REPORT.search(line):
            continue
        text = line[9:].rstrip()
        if text.strip():
            found[-1].append(text)
        elif found[-1]:
            found.append([])
    return ["\n".join(block) for block in found if block]


def is_ours(report, tool, kernels):
    """Does it name one of our kernels, where the fault lies, or for memcheck our library on the host's stack?"""
    device = [line for line in report.splitlines() if not OTHERS.search(line)]
    return any(re.search(rf"\b{name}\b", line) for line in device for name in kernels) or (
        tool == "memcheck" and "torch_subspace" in report)


def check(program, tool, args, seconds, kernels):
    """One tool: passed, skipped, failed, or stopped before it has found anything; and why."""
    command = [program, "--tool", tool, "--target-processes", "application-only", "--print-limit", "200"]
    command += [sys.executable, "-u", str(Path(__file__).resolve()), "--inside", "--case", args.case]
    command += ["--small"] * args.small
    names = [name for name, *_ in planned(args.case, args.small)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else None
    start, lines, at = time.monotonic(), [], ""
    process = subprocess.Popen(command, env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    clock = threading.Timer(max(seconds, 1), os.killpg, (process.pid, signal.SIGKILL))
    clock.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("case: "):
                at = line[6:].strip()
                print(f"{time.monotonic() - start:6.0f} s  {at}", flush=True)
        code = process.wait()
    except KeyboardInterrupt:  # the program has a session of its own
        os.killpg(process.pid, signal.SIGKILL)
        raise
    stopped = not clock.is_alive()
    clock.cancel()
    text = "".join(lines)
    refusal = re.search(rf".*(?:{REFUSED}).*", text)
    if refusal and at in ("", first_case(lines)):
        return "skipped", f"compute-sanitizer can't work here: {refusal[0].strip('= ')}"
    found = reports(lines)
    ours = [report for report in found if is_ours(report, tool, kernels)]
    others = [report for report in found if report not in ours]
    for report in ours[:10]:
        print(report, "\n")
    if others:
        print(f"{len(others)} reports on other libraries; the first:\n{others[0]}\n")
    if ours:
        return "failed", f"{len(ours)} reports"
    if stopped:
        left = names[names.index(at):] if at in names else names
        return "stopped", f"nothing found in {seconds:.0f} s, not done: {', '.join(left)}"
    if at != "done":
        print("".join(lines[-40:]))
        return "failed", f"the program ended with {code} in the case {at!r}"
    return "passed", "nothing found" if not others else f"nothing of ours, {len(others)} of others"


def first_case(lines):
    """The case that is named first."""
    return next((line[6:].strip() for line in lines if line.startswith("case: ")), "")


def main():
    """Run what the command line asks for."""
    args = arguments()
    if args.inside:
        return inside(args.case, args.small)
    kernels = our_kernels()
    folders = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"])
    program = shutil.which("compute-sanitizer", path=folders)
    if not program:
        return print("skipped: there is no compute-sanitizer on PATH")
    from cases import PRESENT

    if not PRESENT:
        return print("skipped: there is no GPU")
    results, end = {}, time.monotonic() + args.seconds
    tools = args.tool or list(TOOLS)
    for i, tool in enumerate(tools):
        later = sum(other not in INFORMS for other in tools[i + 1:])
        left = end - time.monotonic() - 100 * later  # something is left for those to come
        if tool in INFORMS and left < 60 and not args.tool:
            results[tool] = "skipped", "no time was left"
            continue
        print(f"\n{tool}", flush=True)
        results[tool] = check(program, tool, args, left, kernels)
        print(f"{tool}: {': '.join(results[tool])}", flush=True)
    print("\n" + "\n".join(f"{tool}: {': '.join(result)}" for tool, result in results.items()))
    if any(result[0] in ("failed", "stopped") and tool not in INFORMS for tool, result in results.items()):
        sys.exit(1)


if __name__ == "__main__":
    main()
