"""What a step of a class-parallel head takes, counted while it runs, and what was planned. Apart from the tests:
DTensor takes long to import."""

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import torch_subspace as ts

OPTIMISERS = {
    "sgd": lambda head: ts.RiemannianSGD(head.parameters(), lr=0.1, momentum=0.9),
    "plain": lambda head: ts.RiemannianSGD(head.parameters(), lr=0.1),
    "adamw": lambda head: ts.RiemannianAdamW(head.parameters(), lr=0.1, amsgrad=True),
}


class Sent(TorchDispatchMode):
    """Bytes that this process hands on in the ring of each collective."""

    passes = {f"_c10d_functional::{name}": count for name, count in (
        ("all_reduce", 2), ("all_gather_into_tensor", 1), ("reduce_scatter_tensor", 1))}
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result = function(*args, **kwargs or {})
        if function.name() in self.passes:
            size = torch.distributed.distributed_c10d._resolve_process_group(args[-1]).size()
            whole = max(args[0].nbytes, result.nbytes)
            self.total += self.passes[function.name()] * whole * (size - 1) // size
        return result


def sent(function):
    """Bytes that a call sends."""
    with Sent() as counted:
        function()
    return counted.total


def memory(function):
    """Bytes of memory at the worst moment of a call and after it, beside those before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now


def compare(mesh, classes, n, k, batch, *, optimiser="sgd", dtype=torch.float32, sample_rate=1.0, own_rows=False,
            tolerance=0.1):
    """A step's memory is that planned up to the tolerance, what it sends to the byte."""
    layout = Shard(0) if own_rows else None
    head = ts.GrassmannLinear(n, classes, k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ts.distributed.shard_head(head, mesh, sample_rate=sample_rate, input_layouts=layout)
    opt = OPTIMISERS[optimiser](head)
    rows = batch // mesh.size() if own_rows else batch
    x, labels = torch.randn(rows, n, dtype=dtype, requires_grad=True), torch.randint(classes, (rows,))
    planned = ts.distributed.plan(
        classes, n, k, batch, mesh.size(), dtype=dtype, optimizer="adamw" if optimiser == "adamw" else "sgd",
        momentum=0.9 if optimiser == "sgd" else 0.0, amsgrad=True, sample_rate=sample_rate, input_layouts=layout,
        device="cpu", threads=torch.get_num_threads())

    loss = []
    parts = (lambda: loss.append(head.loss(x, labels))), (lambda: loss.pop().backward()), opt.step
    traffic = [sent(part) for part in parts]
    assert [share.sent for share in planned.shares] == traffic, planned
    opt.zero_grad()
    x.grad = None
    forward, saved = memory(parts[0])
    backward, _ = memory(parts[1])  # the rest after it is not for sure: a collective's thread may hold a buffer yet
    step, _ = memory(parts[2])
    gradients = (head.weight.grad.to_local(), x.grad)
    found = [forward, saved + backward, sum(t.nbytes for t in gradients) + step]
    if mesh.get_local_rank() > 0:
        return  # the first one has most
    own = [t.to_local() if isinstance(t, DTensor) else t for t in opt.state[head.weight].values() if t is not None]
    frames = head.weight.to_local()
    exact = {"parameters": frames.nbytes, "state": sum(t.nbytes for t in own), "classes": frames.shape[0]}
    assert exact == {name: getattr(planned, name) for name in exact}
    shares = [share.memory for share in planned.shares]
    assert all(abs(share / most - 1) <= tolerance for share, most in zip(shares, found)), (shares, found)
    peak = frames.nbytes + exact["state"] + max(found)
    assert abs(planned.peak / peak - 1) <= tolerance
