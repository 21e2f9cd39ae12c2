"""Kill processes of examples/distributed.py at random, by kill -9, and hold its weights against an uninterrupted run's.

    python examples/kill_loop.py                                     # a few characters, minutes
    python examples/kill_loop.py --characters 3755 --epochs 16       # all; what examples/kill_loop.json tells of

torchrun starts all processes again whenever one has ended, up to `--max-restarts` times, and they go on from the last
checkpoint that is whole. One kill in four comes while they start, the others in what would be the next two epochs:
between steps, in them, and while a checkpoint is written. It needs the fonts that distributed.py names.
"""

import argparse
import json
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

PROGRAM = Path(__file__).with_name("distributed.py")
# torchrun's own store outlives a restart, and with it addresses of processes that are gone: gloo, which may read one of
# them, then fails to connect, and a restart is lost. So each start has a store of its own.
STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(processes, restarts, options, errors):
    """torchrun, and a queue of the lines that it prints, None after the last one. Errors go to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "--max-restarts", str(restarts), PROGRAM, *options]
    with errors.open("w") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=os.environ | STORE)
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put((time.monotonic(), line.strip()))
        lines.put((time.monotonic(), None))

    threading.Thread(target=read, daemon=True).start()
    return process, lines


def workers(process):
    """Those that torchrun has started and that live, by rank."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        rank = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
        if rank and state != "Z":
            found[rank[0]] = int(pid)
    return found


def bits(lines, said=""):
    """The sum of the weights, when all is done; and the moments at which epochs ended."""
    moments = []
    while said is not None:
        moment, said = lines.get()
        if said and said.startswith("epoch"):
            moments.append(moment)
        if said and said.startswith("weights"):
            return said.split()[1], moments
    sys.exit("it ended without weights: run examples/distributed.py by itself to see why")


def killed(process, lines, count, processes, startup, epoch, rng):
    """Kill so many, and write down which, when, and what had been reached."""
    log, reached, before = [], "", set()

    def heard(**options):
        said = lines.get(**options)[1]
        if said is None or said.startswith("weights"):
            sys.exit(f"it ended after {len(log)} kills: give it more --epochs")
        return said

    for _ in range(count):
        while len(alive := workers(process)) < processes or before & set(alive.values()):
            if process.poll() is not None:
                sys.exit(f"torchrun ended with {process.returncode} after {len(log)} kills")
            time.sleep(0.05)
        while not lines.empty():  # what those before have said
            reached = heard()
        begun, before, phase = time.monotonic(), set(alive.values()), "starting"
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, startup))
        else:
            reached, phase = heard(timeout=300), "training"  # it goes on, or an epoch is done
            time.sleep(rng.uniform(0, 2 * epoch))
        while not lines.empty():
            reached, phase = heard(), "training"
        rank = rng.choice(sorted(alive))
        os.kill(alive[rank], signal.SIGKILL)
        log.append({"rank": rank, "seconds": round(time.monotonic() - begun, 2), "phase": phase, "last line": reached})
        print(log[-1], flush=True)
    return log


def main():
    """Both runs, and the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--characters", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=30, help="more than the kills leave time for (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="the log")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    print(f"torchrun's messages: {folder}/*.log", flush=True)
    options = ["--characters", str(args.characters), "--epochs", str(args.epochs), "--batch", "128"]

    begun = time.monotonic()
    _, lines = start(args.processes, 0, [*options, "--folder", str(folder / "whole")], folder / "whole.log")
    expected, moments = bits(lines)
    epoch = (moments[-1] - moments[0]) / (len(moments) - 1)
    startup = moments[0] - epoch - begun
    print(f"uninterrupted: {expected}, {startup:.1f} s to start, {epoch:.2f} s an epoch", flush=True)

    options += ["--folder", str(folder / "killed")]
    process, lines = start(args.processes, args.kills, options, folder / "killed.log")
    log = killed(process, lines, args.kills, args.processes, startup, epoch, random.Random(args.seed))
    found, _ = bits(lines)
    process.wait()
    shutil.rmtree(folder)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    args.output.write_text(json.dumps({
        "torch": torch.__version__, "processes": args.processes, "characters": args.characters, "epochs": args.epochs,
        "weights": expected, "weights after kills": found, "same": found == expected,
        "processor seconds": round(used.ru_utime + used.ru_stime), "kills": log}, indent=1) + "\n")
    print(f"after {len(log)} kills: {found}, {'the same' if found == expected else 'NOT the same'} bits")
    sys.exit(found != expected)


if __name__ == "__main__":
    main()
