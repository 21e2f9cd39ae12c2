"""Memory of the GPU: none left is an error and nothing worse, none is lost, more than 2^31 entries. Never run
so far."""

import functools
import gc
import math

import helpers
import pytest
import torch
from cases import CASES, DEVICE, ON_GPU, PRESENT, cast, run, synchronise
from cases import both as both_of

import torch_subspace as ts
from torch_subspace.rates.coding_rate_soft import soft_rate
from torch_subspace.tucker.depthwise import depthwise_weight_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason=f"needs {DEVICE}"),
              pytest.mark.xdist_group("memory")]  # one after the other: several processes share the GPU
only_gpu = pytest.mark.skipif(not ON_GPU, reason="a GPU's own")

MIB = 1 << 20
close = functools.partial(helpers.close, floor=1e-2, device=None)


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


HUNGRY = {  # what is given fits, what the op needs beside it does not
    "logits": lambda d: ts.subspace_logits(torch.ones(1 << 14, 8, device=d), torch.ones(1 << 14, 2, 8, device=d)),
    "cross_entropy": lambda d: ts.subspace_cross_entropy(
        torch.ones(8, 1 << 16, device=d, requires_grad=True), torch.ones(1400, 1, 1 << 16, device=d,
                                                                         requires_grad=True),
        torch.zeros(8, dtype=torch.int64, device=d)).backward(),
    "tucker_compose": lambda d: ts.tucker_compose(torch.ones(2, 2, device=d), [torch.ones(1 << 14, 2, device=d)] * 2),
    "tucker_linear": lambda d: ts.tucker_linear(
        torch.ones(1 << 14, 8, device=d), None, None, torch.ones(2, 2, device=d), torch.ones(1 << 14, 2, device=d),
        torch.ones(2, 8, device=d)),
    "coding_rate": lambda d: ts.coding_rate(torch.ones(1, 1 << 14, device=d).expand(1 << 14, -1)),
    "coding_rate_soft": lambda d: soft_rate(torch.ones(1, 400, 300, device=d, requires_grad=True),
                                            torch.ones(1, 400, 4000, device=d), 0.5).sum().backward(),
    "sinkhorn": lambda d: ts.sinkhorn(torch.ones(1, 1 << 14, device=d).expand(1 << 14, -1)),
}


@only_gpu
@pytest.mark.parametrize("name", HUNGRY)
def test_out_of_memory(name):
    """An error that says so, and everything works afterwards. The shim's own allocations come through torch's C ABI,
    which knows one kind of error: RuntimeError."""
    torch.zeros(1, device=DEVICE)
    gc.collect()
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved() + 640 * MIB
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, used / total))
    try:
        with pytest.raises(RuntimeError, match="memory|refused"):
            HUNGRY[name](DEVICE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.synchronize()
    for case in CASES[::4]:
        close(run(case), run(case, torch.float64, "cpu"), 2e-3)


@only_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_lost(case):
    def rounds(count):
        for _ in range(count):
            run(case)
        gc.collect()
        synchronise()
        return torch.cuda.memory_allocated()

    rounds(3)  # tables of ragged classes, and torch's own, are kept
    assert rounds(20) == rounds(2)


# ------------------------------------------------------------------------------------------------- beyond 2^31 entries

MANY = (1 << 31) + (1 << 20)


def room(gib):
    """Skip where the GPU hasn't got it free, other processes' share left to them."""
    if not ON_GPU:
        pytest.skip("a GPU's own")
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib + 2:
        pytest.skip(f"needs {gib} GiB of free memory, there are {free:.0f}")


def filled(*shape, dtype=torch.bfloat16):
    """Numbers that differ along every dimension, and need no second copy to be made."""
    t = torch.empty(shape, dtype=dtype, device=DEVICE)
    return t.uniform_(-1, 1)


def split(t, dim=0):
    """The last part, a tensor of its own."""
    return t.narrow(dim, t.shape[dim] - 8, 8).clone()


def test_many_rows_of_logits():
    room(10)
    x, w = filled(MANY // 512, 512), filled(4, 2, 512)
    with torch.no_grad():
        y = ts.subspace_logits(x, w)
        close([y[-8:]], [ts.subspace_logits(split(x), w)], 2e-2)


def test_many_classes():
    room(30)
    x, w, target = filled(4, 1024), filled(MANY // 4096, 4, 1024), torch.tensor([0, 1, -1, -2], device=DEVICE)
    target = target % w.shape[0]
    w.requires_grad_()
    with torch.no_grad():
        y = ts.subspace_logits(x, w)
        close([y[:, -8:]], [ts.subspace_logits(x, split(w))], 2e-2)
    loss = ts.subspace_cross_entropy(x, w, target)
    expected = torch.nn.functional.cross_entropy(y.float(), target)
    close([loss], [expected], 2e-2)
    (dw,) = torch.autograd.grad(loss, w)
    assert dw[-1].isfinite().all() and dw[-1].any()


def test_many_frames():
    room(40)
    c = MANY // (4 * 2048)
    w, g, m = (torch.zeros(c, 4, 2048, device=DEVICE) for _ in range(3))
    w[:, torch.arange(4), torch.arange(4)] = 1
    g.uniform_(-1e-2, 1e-2), m.uniform_(-1e-2, 1e-2)
    few = [split(t) for t in (w, g, m)]
    ts.grassmann_step_(w, g, m, lr=0.5, momentum=0.9)
    ts.grassmann_step_(*few, lr=0.5, momentum=0.9)
    close([split(w), split(m)], [few[0], few[2]], 1e-6)


def test_a_large_weight_is_composed():
    room(20)
    base = filled(MANY // 32768, 32768)
    core, u, v = filled(4, 4, dtype=torch.float32), filled(base.shape[0], 4, dtype=torch.float32), filled(
        32768, 4, dtype=torch.float32)
    out = ts.tucker_compose(core, [u, v], base=base)
    close([split(out)], [ts.tucker_compose(core, [split(u), v], base=split(base))], 2e-2)


def test_many_rows_of_a_linear_layer():
    room(25)
    x, w = filled(MANY // 2048, 2048), filled(16, 2048)
    core, u, v = (filled(*s, dtype=torch.float32).requires_grad_() for s in ((4, 4), (16, 4), (4, 2048)))
    x.requires_grad_()
    y = ts.tucker_linear(x, w, None, core, u, v)
    dy = torch.zeros_like(y)
    dy[-8:] = 1
    dx, dcore = torch.autograd.grad(y, (x, core), dy)
    few = split(x.detach()).requires_grad_()
    small = ts.tucker_linear(few, w, None, core, u, v)
    close([y[-8:], dx[-8:], dcore], [small, *torch.autograd.grad(small, (few, core), torch.ones_like(small))], 2e-2)


def test_many_images():
    room(20)
    x = filled(MANY // (64 * 128 * 128), 64, 128, 128)
    dy = torch.zeros(x.shape[0], 64, 126, 126, dtype=x.dtype, device=DEVICE)
    dy[-8:].uniform_(-1, 1)
    how = (3, 3), (1, 1), (0, 0), (1, 1)
    close([depthwise_weight_gradient(x, dy, *how)], [depthwise_weight_gradient(split(x), split(dy), *how)], 2e-2)


def test_many_points():
    room(40)
    n = MANY // 32
    z = torch.zeros(n, 32, device=DEVICE, requires_grad=True)
    with torch.no_grad():
        z.uniform_(-1, 1)
    rate = ts.coding_rate(z)
    (dz,) = torch.autograd.grad(rate, z)
    part = z.detach()[: 1 << 22].double()
    gram = part.mT @ part / part.shape[0]  # what it is for all, but for 1e-3
    expected = 0.5 * torch.logdet(torch.eye(32, device=DEVICE) + gram * (32 / 0.5)).item()
    assert abs(rate.item() - expected) < 1e-2 * expected and dz[-1].isfinite().all() and dz[-1].any()


def test_a_large_plan():
    room(45)
    n = math.isqrt(MANY) + 1
    s = torch.empty(n, n, device=DEVICE).uniform_(0, 1)
    with torch.no_grad():
        plan = ts.sinkhorn(s, eta=1.0, tol=1e-4)
    assert (plan.sum(1) - 1).abs().max() < 1e-2 and (plan.sum(0) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.name)
def test_these_tests_see_the_end(case):
    """`split` is the last part of what it is given."""
    leaves = cast(case, case.make(), torch.float32, DEVICE)
    assert torch.equal(split(leaves[0].detach()), leaves[0][-8:]) and both_of(case, leaves)
