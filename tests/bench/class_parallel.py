"""A class-parallel head of ImageNet-21k's number of classes on 1, 2 and 4 gloo processes, by turns in one run.

    python tests/bench/class_parallel.py          # writes tests/bench/results/class_parallel.json and .png

Times are medians of what the first process waits for the loss and its backward, and for the optimiser's step, from a
barrier to a barrier, a thread a process. Memory is what torch's allocator has counted in that process, and its highest
resident size during a training step less that before it, frames and state added. Bytes that are sent are counted at the
collectives. Beside them stands what `distributed.plan` says.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import ROOT, environment, peak_memory

import torch_subspace as ts

RESULTS = Path(__file__).resolve().parent / "results"
CLASSES, FEATURES, K, BATCH = 21841, 512, 8, 256
PROCESSES = (1, 2, 4)


def built(mesh, classes):
    """A training step's two parts, the head and its optimiser."""
    torch.manual_seed(0)
    with torch.device("meta"):
        head = ts.GrassmannLinear(FEATURES, classes, K)
    ts.distributed.shard_head(head, mesh).to_empty(device="cpu")
    head.reset_parameters()
    opt = ts.RiemannianSGD(head.parameters(), lr=0.1, momentum=0.9)
    x, labels = torch.randn(BATCH, FEATURES, requires_grad=True), torch.randint(classes, (BATCH,))

    def loss():
        opt.zero_grad()
        x.grad = None
        head.loss(x, labels).backward()

    return loss, opt.step, head, opt


def work(rank, store, classes, rounds, out):
    """What each process does; the first one writes."""
    import torch.distributed as dist
    from plan_checks import memory, sent

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(PROCESSES))
    ways = {}
    for count in PROCESSES:
        mesh = dist.device_mesh.DeviceMesh("cpu", list(range(count)))
        if rank < count:
            ways[count] = built(mesh, classes)
    times = {count: ([], []) for count in PROCESSES}
    for turn in range(rounds + 1):
        for count in PROCESSES:
            for part in (0, 1):
                dist.barrier()
                start = time.perf_counter()
                if count in ways:
                    ways[count][part]()
                dist.barrier()
                if turn:  # the first is for warming up
                    times[count][part].append(time.perf_counter() - start)
    rows = []
    for count in PROCESSES:
        dist.barrier()
        if count not in ways:
            continue
        loss, step, head, opt = ways[count]

        def both(loss=loss, step=step):
            loss()
            step()

        bytes_sent = sent(both)
        opt.zero_grad()
        held = head.weight.to_local().nbytes + opt.state[head.weight]["momentum_buffer"].to_local().nbytes
        counted, _ = memory(both)
        opt.zero_grad()
        resident = peak_memory(both, "cpu") + head.weight.grad.to_local().nbytes  # there before the call
        opt.zero_grad()
        planned = ts.distributed.plan(classes, FEATURES, K, BATCH, count, device="cpu")
        rows.append({
            "processes": count, "sent_bytes": bytes_sent, "planned_sent_bytes": planned.sent,
            "peak_mb": (held + counted) / 1e6, "resident_mb": (held + resident) / 1e6, "planned_mb": planned.peak / 1e6,
        })
        if rounds:
            rows[-1] |= {f"{name}_ms": 1e3 * statistics.median(taken)
                         for name, taken in zip(("loss", "step"), times[count])}
    if rank == 0:
        found = {"environment": environment("cpu", 1) | {"cores": len(os.sched_getaffinity(0))},
                 "case": f"B={BATCH} n={FEATURES} C={classes} k={K} float32, SGD with momentum", "rows": rows}
        out.write_text(json.dumps(found, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def draw(found, path):
    """Times and memory by the number of processes, beside an even share of one process's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5})
    rows = found["rows"]
    count, cores = [row["processes"] for row in rows], found["environment"]["cores"]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    lines = {axes[0]: {"loss and gradients": "loss_ms", "step": "step_ms"},
             axes[1]: {"peak of a process": "peak_mb", "planned": "planned_mb"}}
    for axis, named in lines.items():
        for (label, key), color in zip(named.items(), ("#1f6fb2", "#c2410c")):
            axis.plot(count, [row[key] for row in rows], color=color, marker="o", markersize=4, label=label)
        key = next(iter(named.values()))
        share = [rows[0][key] / (min(n, cores) if axis is axes[0] else n) for n in count]
        axis.plot(count, share, color="0.6", linewidth=0.9, linestyle="--", zorder=0, label="even shares of the first")
        axis.set(xscale="log", yscale="log", xticks=count, xticklabels=count, xlabel="processes")
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.legend(frameon=False)
    for axis, unit in zip(axes, ("ms", "MB")):
        low, high = axis.get_ylim()
        ticks = [t for t in (m * 10**e for e in range(5) for m in (1, 2, 5)) if low <= t <= high]
        axis.set(yticks=ticks, yticklabels=[f"{t} {unit}" for t in ticks])
    axes[0].set_title(f"{found['case'].split(',')[0]}, cores: {cores}")
    axes[1].set_title("memory")
    figure.savefig(path, dpi=100)


def main():
    """Measure, write, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--rounds", type=int, default=7, help="0 where the machine is busy: no times then")
    parser.add_argument("--out", type=Path, default=RESULTS / "class_parallel.json")
    args = parser.parse_args()
    # memory that is freed goes back to the system at once, or it would hide what the next call takes
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1",
                   "OMP_NUM_THREADS": "1"}
    sys.path.append(str(ROOT / "tests/distributed"))  # the processes have it too
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"{folder}/store", args.classes, args.rounds, args.out), max(PROCESSES))
    print(args.out.read_text())
    if args.rounds:
        draw(json.loads(args.out.read_text()), args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
