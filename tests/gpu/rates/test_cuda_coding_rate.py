"""The coding rate on a GPU against the CPU kernel in float64. Never run so far: no GPU was at hand."""

import functools

import helpers
import pytest
import torch

import torch_subspace as ts
from torch_subspace.rates.coding_rate import _groups as groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OP = torch.ops.torch_subspace.coding_rate
BACKWARD = torch.ops.torch_subspace.coding_rate_backward
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
SHAPES = [  # tiles and their borders, long groups in parts, many groups; registers, all blocks together, the library
    (1, 1, 0), (7, 5, 0), (20, 33, 3), (300, 130, 0), (130, 300, 0), (600, 64, 30), (500, 20, 400), (700, 96, 2),
    (65, 64, 1), (128, 129, 1), (177, 300, 1), (256, 256, 1), (257, 300, 1), (1500, 700, 3), (2048, 1024, 0),
    (20000, 12, 3), (9, 5000, 2), (3000, 3, 2500),
]
close = functools.partial(helpers.close, device="cuda")


def points(n, d, dtype=torch.float64):
    g = torch.Generator().manual_seed(n + d)
    return torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64, generator=g), dim=-1).to(dtype)


def labels_of(n, classes):
    g = torch.Generator().manual_seed(n)
    return torch.randint(2**40, (classes,), generator=g)[torch.randint(classes, (n,), generator=g)] if classes else None


def run(z, labels, dtype, device, eps=0.5):
    z = z.to(device, dtype).detach().requires_grad_()
    rate = ts.coding_rate(z, None if labels is None else labels.to(device), eps=eps)
    return rate.detach(), torch.autograd.grad(rate.sum(), z)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n, d, classes", SHAPES)
def test_values_and_gradients(n, d, classes, dtype):
    z, labels = points(n, d, dtype), labels_of(n, classes)
    close(run(z, labels, dtype, "cuda"), run(z, labels, torch.float64, "cpu"), TOLERANCE[dtype])


def test_views():
    z, labels = torch.stack([points(50, 12) * v for v in range(1, 5)]), labels_of(50, 6)
    for some in (None, labels, torch.stack([labels.roll(v) for v in range(4)])):
        close(run(z, some, torch.float64, "cuda"), run(z, some, torch.float64, "cpu"), 1e-11)


@pytest.mark.parametrize("size, eps", [(1e-6, 0.5), (1.0, 1e-4), (1e3, 1e-4), (1e18, 0.5)])
def test_float32_where_it_is_hard(size, eps):
    z = points(60, 40) * size
    z[:30] = z[0] + 1e-3 * z[:30]
    z, labels = z.float(), torch.arange(60) // 30
    for some in (None, labels):
        close(run(z, some, torch.float32, "cuda", eps), run(z, some, torch.float64, "cpu", eps), 1e-5)


@pytest.mark.parametrize("n, d, classes", [(50, 20, 4), (300, 270, 0), (300, 290, 1), (20, 700, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_factor_may_be_kept_or_not(n, d, classes, dtype):
    z = points(n, d, dtype)[None].cuda()
    order, start = groups(z, labels_of(n, classes)[None].cuda() if classes else None)
    rate, factor = OP(z, order, start, 0.5, True)
    again, none = OP(z, order, start, 0.5, False)
    assert torch.equal(rate, again) and none.shape == (1, 0)
    drate = torch.ones(1, dtype=dtype, device="cuda")
    kept, made = (BACKWARD(drate, z, order, start, f, 0.5) for f in (factor, none))
    assert torch.equal(kept, made)


@pytest.mark.parametrize("n, d", [(20, 512), (200, 128), (300, 310)])
def test_one_hard_class_among_easy_ones(n, d):
    z = torch.cat([points(n, d), points(n, d)[:1] + 1e-3 * points(n, d), 1e3 * points(n, d)])
    z, labels = z.float(), torch.arange(3 * n) // n
    close(run(z, labels, torch.float32, "cuda", 1e-2), run(z, labels, torch.float64, "cpu", 1e-2), 1e-5)


def test_tf32_is_never_used():
    z = points(700, 300, torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        found = []
        for torch.backends.cuda.matmul.allow_tf32 in (False, True):
            found.append(run(z, None, torch.float32, "cuda"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert helpers.same(*found)


@pytest.mark.parametrize("n, d, classes", [(300, 40, 7), (600, 320, 2), (700, 300, 0)])
def test_a_graph_finds_its_groups_itself(n, d, classes):
    """Recorded with some groups, played with others."""
    z = points(n, d, torch.float32)[None].cuda()
    some = [groups(z, labels_of(n, c)[None].cuda() if c else None) for c in (classes, (classes + 1) // 2)]
    order, start = (t.contiguous().clone() for t in some[0])
    drate = torch.ones(1, device="cuda")

    def step():
        rate, factor = OP(z, order, start, 0.5, True)
        return rate, BACKWARD(drate, z, order, start, factor, 0.5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for other in some:
        order.copy_(other[0]), start.copy_(other[1])
        z.mul_(1.25)
        graph.replay()
        assert helpers.same(recorded, step())


def test_derivatives():
    z, labels = points(9, 4).cuda().requires_grad_(), labels_of(9, 3).cuda()
    for some in (None, labels):
        assert torch.autograd.gradcheck(lambda z, s=some: ts.coding_rate(z, s), z)
        assert torch.autograd.gradgradcheck(lambda z, s=some: ts.coding_rate(z, s), z, fast_mode=True)


def test_opcheck():
    z = points(12, 4, torch.float32)[None].cuda()  # with groups of d points the whole factor is used
    for labels in (None, torch.arange(12, device="cuda")[None] // 4):
        order, start = (t.contiguous() for t in groups(z, labels))
        for keep in (False, True):
            torch.library.opcheck(OP, (z.clone().requires_grad_(), order, start, 0.5, keep))
            factor = OP(z, order, start, 0.5, keep)[1]
            torch.library.opcheck(BACKWARD, (torch.ones(1, device="cuda"), z, order, start, factor, 0.5))


def test_values_that_are_not_finite_make_the_rate_nan():
    z = torch.stack([points(20, 8), points(20, 8)])
    z[1, 3, 2] = float("inf")
    rate, dz = run(z, labels_of(20, 3), torch.float32, "cuda")
    assert rate[0].isfinite() and rate[1].isnan() and dz[0].isfinite().all()


def test_same_bits_every_time():
    z, labels = points(600, 64, torch.float32), labels_of(600, 30)
    assert helpers.same(*(run(z, labels, torch.float32, "cuda") for _ in range(2)))


def test_nothing_waits_for_the_device():
    z, labels = points(100, 20, torch.float32).cuda().requires_grad_(), labels_of(100, 4).cuda()
    ts.rate_reduction(z, labels).backward()  # libraries are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ts.rate_reduction(z, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
