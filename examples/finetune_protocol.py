"""How finetune.py trains and measures every method: the same loop, schedule and batches for all.

A task has `rates` {method: learning rate}, the `grid` these are from, `data(seed, validate)`, `build(method, seed,
trained)` and the numbers `batch`, `epochs` and `evaluations`; its models have a `body` and a `head`.
"""

import ctypes
import statistics
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import torch_subspace as ts


def fit(model, parameters, data, *, epochs, batch, lr, seed=0, after=lambda epoch: None,
        ended=lambda optimiser: None):
    """Train by AdamW under torch's one-cycle schedule with the peak `lr`. Returns the seconds of each step.

    A model that has a loss(x, y) of its own is trained by that, others by cross-entropy.
    """
    x, y = data
    loss_of = getattr(model, "loss", lambda x, y: cross_entropy(model(x), y))
    opt = ts.RiemannianAdamW(parameters, lr=lr, weight_decay=0.01)  # torch's AdamW, but for frames
    steps, seconds = len(y) // batch, []
    rates = [group["lr"] * group.get("rate_factor", 1) for group in opt.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, rates, total_steps=epochs * steps, cycle_momentum=False)
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for part in torch.randperm(len(y), generator=shuffle).split(batch)[:steps]:
            start = time.perf_counter()
            loss = loss_of(x[part], y[part])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            seconds.append(time.perf_counter() - start)
        after(epoch + 1)
    ended(opt)
    return seconds


def state_bytes(optimiser):
    """What the optimiser keeps between steps."""
    return sum(t.nbytes for own in optimiser.state.values() for t in own.values() if isinstance(t, torch.Tensor))


@torch.no_grad()
def in_parts(model, x):
    """model(x), some rows at a time."""
    model.eval()
    return torch.cat([model(part) for part in x.split(100)])


def trained_part(model, *inputs):
    """The part of the model that learns, and its inputs. What a frozen body makes of them is reckoned once."""
    if any(p.requires_grad for p in model.body.parameters()):
        return model, *inputs
    return model.head, *(in_parts(model.body, x) for x in inputs)


def run(task, method, seed, lr, progress, validate=False):
    """One training. Returns the model and {"parameters", "state", "curve", "right", "seconds"}.

    `state` is what the optimiser keeps, in bytes. The curve is a list of (epoch, accuracy); `right` tells of each
    held-out example whether it is classified right.
    """
    (x, y), (held_out, label) = task.data(seed, validate)
    model, parameters = task.build(method, seed)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part, x, held_out = trained_part(model, x, held_out)
    every, curve, right, state = max(1, task.epochs // task.evaluations), [], [], []

    def after(epoch):
        if epoch == task.epochs or (epoch % every == 0 and not validate):
            right[:] = (in_parts(part, held_out).argmax(1) == label).tolist()
            curve.append((epoch, statistics.mean(right)))
        progress.set_description(f"{method}, seed {seed}" + (f": {curve[-1][1]:.1%}" if curve else ""))
        progress.update()

    seconds = fit(part, parameters, (x, y), epochs=task.epochs, batch=task.batch, lr=lr, seed=seed, after=after,
                  ended=lambda opt: state.append(state_bytes(opt)))
    return model, {"parameters": count, "state": state[0], "curve": curve, "right": right, "seconds": seconds}


def climb(grid, score):
    """Of rising rates the one from which, from the middle of the grid outward, neither neighbour is better."""
    at = (len(grid) - 1) // 2
    way = 1 if at + 1 < len(grid) and score(grid[at + 1]) > score(grid[at]) else -1
    while 0 <= at + way < len(grid) and score(grid[at + way]) > score(grid[at]):
        at += way
    return grid[at]


def validate(task, seeds):
    """Accuracy of every method at every rate of the grid, on examples that are neither trained on nor held out."""
    table = {method: [] for method in task.rates}
    with tqdm(total=len(table) * len(task.grid) * seeds * task.epochs, unit="epoch", dynamic_ncols=True) as progress:
        for method, accuracies in table.items():
            for lr in task.grid:
                runs = [run(task, method, 100 + seed, lr, progress, True)[1] for seed in range(seeds)]
                accuracies.append(statistics.mean(r["curve"][-1][1] for r in runs))
                progress.write(f"{method}, {lr:g}: {accuracies[-1]:.2%}")
    return table


def peak_memory(kind, method, threads):
    """Bytes that two steps take beyond the model: activations, gradients, optimiser. Wants a process of its own.

    The median of three times, after a first one that also loads code.
    """
    torch.set_num_threads(threads)
    task = kind()
    (x, y), _ = task.data(0, False)
    model, parameters = task.build(method, 0, trained=False)
    part, x = trained_part(model, x[: 2 * task.batch])
    peaks = []
    for _ in range(4):
        part.zero_grad()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
        before = resident("VmRSS")
        fit(part, parameters, (x, y[: len(x)]), epochs=1, batch=task.batch, lr=1e-3)
        peaks.append(resident("VmHWM") - before)
    return statistics.median(peaks[1:])


def state_of(kind, method):
    """Bytes that the optimiser keeps, after two steps."""
    task, found = kind(), []
    (x, y), _ = task.data(0, False)
    model, parameters = task.build(method, 0, trained=False)
    part, x = trained_part(model, x[: 2 * task.batch])
    fit(part, parameters, (x, y[: len(x)]), epochs=1, batch=task.batch, lr=1e-3,
        ended=lambda opt: found.append(state_bytes(opt)))
    return found[0]


def resident(what):
    """A line of this process's memory accounts, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])
