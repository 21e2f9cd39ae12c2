"""What a call of each op takes where there is next to nothing to compute, beside torch's own call of a matrix product.

    python tests/bench/overhead.py               # writes tests/bench/results/overhead.json; half a minute
    python tests/bench/overhead.py --profile logits   # where the time of one goes, by cProfile

All are timed in turn, on one thread, the least of many samples: forward alone without gradients, and forward and
backward, beside torch.mm, adapters beside the linear layer or convolution that they run themselves; an optimiser's step
beside that of torch's SGD. What an op takes beyond that is torch's way to an op of others, with the bookkeeping of its
gradient, its tiny work, and what is added here: checks, and torch's own ops around it. The last is told apart by
calling the ops alone, with the arguments that they were given; of an optimiser's step what SGD's takes where nothing
has a gradient is torch's. And what the import takes.
"""

import argparse
import cProfile
import json
import pstats
import subprocess
import sys

import harness
import torch
from cost_tables import GOAL, RESULTS, TORCH
from torch.overrides import TorchFunctionMode

import torch_subspace as ts
from torch_subspace import isotropy, lowrank
from torch_subspace.tucker.depthwise import depthwise_weight_gradient

MM, LINEAR, CONV, SGD, IDLE = TORCH
BESIDE = {"tucker_linear": LINEAR, "tucker_conv": CONV, "rsgd": SGD}  # all others: MM


def calls():
    """{op: (function, what its gradient is wanted of)}."""
    seed = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=seed)

    x, w, label = some(4, 16), torch.linalg.qr(some(3, 16, 2)).Q.mT.contiguous(), torch.tensor([0, 1, 2, 1])
    factors = [some(16, 2), some(16, 2)]
    dense, core, u, v = some(16, 16), some(2, 2), some(16, 2), some(2, 16)
    taps, small, kernel = some(16, 4, 3, 3), some(2, 2, 3, 3), [some(16, 2), some(4, 2), None, None]
    image, dy = some(1, 4, 4, 4), some(1, 4, 4, 4)
    points, groups, soft = some(16, 4), torch.arange(16) % 3, some(16, 3).softmax(1)
    low, basis = some(1, 4, 2), some(16, 2)
    lines = torch.nn.functional.normalize(some(16, 4), dim=0)
    return {
        MM: (lambda x: torch.mm(x, w[0].T), x),
        LINEAR: (lambda x: torch.nn.functional.linear(x, dense), x),
        CONV: (lambda x: torch.nn.functional.conv2d(x, taps, padding=1), image),
        "logits": (lambda x: ts.subspace_logits(x, w), x),
        "cross_entropy": (lambda x: ts.subspace_cross_entropy(x, w, label), x),
        "tucker": (lambda c: ts.tucker_compose(c, factors), some(2, 2)),
        "tucker_linear": (lambda x: ts.tucker_linear(x, dense, None, core, u, v, scale=1.0), x),
        "tucker_conv": (lambda x: ts.tucker_conv(x, taps, None, small, kernel, scale=1.0, padding=(1, 1)), image),
        "depthwise": (lambda x: depthwise_weight_gradient(x, dy, (3, 3), (1, 1), (1, 1), (1, 1)), image),
        "coding_rate": (lambda z: ts.coding_rate(z, groups), points),
        "coding_rate_soft": (lambda z: ts.coding_rate(z, soft), points),
        "sinkhorn": (lambda s: ts.sinkhorn(s, eta=1.0, symmetric=False), some(4, 4)),
        "sigreg": (lambda z: isotropy.sigreg(z, directions=lines), x),
        "gated_cosine": (lambda z: isotropy.gated_cosine(z, points, points), some(16, 4)),
        "newton_schulz": (lambda m: lowrank.newton_schulz(m), x),
        "hadamard": (lambda v: lowrank.hadamard(v), x),
        "fastfood": (lambda t: lowrank.fastfood(t, 16, seed=1), some(16)),
        "product": (lambda a: torch.ops.torch_subspace.product_(low, a[None], basis[None], False, False, 1.0, 1.0), x),
    }


def step(make):
    """An optimiser's step of three tiny frames."""
    p = torch.nn.Parameter(torch.linalg.qr(torch.randn(3, 16, 2)).Q.mT.contiguous())
    p.grad = torch.randn_like(p)
    return make([p]).step


def gradient(function, x):
    """A call and its backward."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        dy = torch.ones_like(function(x))

    def call():
        return torch.autograd.grad(function(x), x, dy)

    return call


def frames_sgd(params):
    """Ours."""
    return ts.RiemannianSGD([{"params": params, "manifold": "grassmann"}], lr=0.1, momentum=0.9)


class Calls(TorchFunctionMode):
    """Which calls of our ops a function makes, each {op, arguments}."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("torch_subspace."):
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def bare(function, with_backward=False):
    """The same calls of our ops and nothing else, as torch makes them; with its gradient bookkeeping if asked. None
    where an op has no gradient of its own, or there is more than one."""
    with Calls() as calls:
        function()
    if not with_backward:
        return torch.no_grad()(lambda: [op(*args) for op, args in calls.made])
    (op, args), *more = calls.made
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if more or not wanted or op.__name__.endswith("_"):
        return None
    alone = {id(a): a.detach().requires_grad_() for a in wanted}
    args = [alone.get(id(a), a) for a in args]

    def first():
        y = op(*args)
        return y if isinstance(y, torch.Tensor) else y[0]

    dy = torch.ones_like(first())
    return lambda: torch.autograd.grad(first(), [*alone.values()], dy)


def functions():
    """{(what, op): (a call, its ops alone or None)}."""
    found = {}
    for op, (function, x) in calls().items():
        ours = op not in TORCH
        forward = torch.no_grad()(lambda f=function, x=x: f(x))
        found["forward", op] = forward, bare(forward) if ours else None
        if op not in ("depthwise", "product"):  # they have none
            both = gradient(function, x)
            found["forward and backward", op] = both, bare(both, with_backward=True) if ours else None
    found["step", SGD] = step(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)), None
    found["step", IDLE] = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1, momentum=0.9).step, None
    ours = step(frames_sgd)
    ours()
    found["step", "rsgd"] = ours, bare(ours)
    return found


def measure(made, rounds):
    """Rows of microseconds, those beyond torch's own, and those that are added to our ops alone."""
    taken = dict.fromkeys(made, float("inf"))
    alone = {name: float("inf") for name, (_, ops) in made.items() if ops}
    for _ in range(rounds):
        for name, (function, ops) in made.items():
            taken[name] = min(taken[name], 1e6 * harness.timed(function, 10))
            if ops:
                alone[name] = min(alone[name], 1e6 * harness.timed(ops, 10))
    rows = []
    for (what, op), us in taken.items():
        base = taken[what, op if op in TORCH else BESIDE.get(op, MM)]
        row = {"what": what, "op": op, "us": us, "beyond_us": us - base}
        if op not in TORCH:  # of adapters' gradients, which are no op's, all beyond the layer counts as added
            layer = taken["step", IDLE] if op == "rsgd" else base if op in BESIDE else 0
            row |= {"added_us": us - layer - alone.get((what, op), 0)}
        rows.append(row)
    return rows


def import_seconds(rounds=5):
    """Seconds of a processor that the imports of torch, and of torch_subspace over it, take: the least of some."""
    code = ("import time; begun = time.process_time(); import torch; mid = time.process_time(); import torch_subspace; "
            "print(mid - begun, time.process_time() - mid)")
    taken = [[float(s) for s in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
              .stdout.split()] for _ in range(rounds)]
    return dict(zip(("torch", "torch_subspace"), map(min, zip(*taken, strict=True)), strict=True))


def main():
    """Measure and write; or profile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short timing, nothing is written")
    parser.add_argument("--profile", metavar="OP", help="where the time of an op's calls goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = functions()
    if args.profile:
        for (what, op), (function, _) in made.items():
            if op == args.profile:
                profile = cProfile.Profile()
                profile.runcall(lambda f=function: [f() for _ in range(2000)])
                print(what)
                pstats.Stats(profile).sort_stats("tottime").print_stats(12)
        return
    rows = measure(made, 200 if args.quick else 2000)
    for row in rows:
        added = f", added to the op's own call {row['added_us']:6.1f}" if "added_us" in row else ""
        over = "  more than wanted" if row.get("added_us", 0) > GOAL else ""
        print(f"{row['what']:<21} {row['op']:<16} {row['us']:7.1f} µs, beyond torch's {row['beyond_us']:7.1f}"
              f"{added}{over}")
    seconds = import_seconds(1 if args.quick else 5)
    print(f"import torch: {seconds['torch']:.2f} s of a processor; torch_subspace over it: "
          f"{seconds['torch_subspace']:.3f} s")
    if not args.quick:
        rounded = [{key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
        found = {"environment": harness.environment("cpu", 1), "import_s": seconds, "rows": rounded}
        (RESULTS / "overhead.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    harness.as_chosen_at_load()
    main()
