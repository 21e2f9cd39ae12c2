"""Sinkhorn on a GPU against the CPU kernels in float64. Never run so far: no GPU was at hand."""

import functools
import math

import helpers
import pytest
import torch

from torch_subspace.transport.sinkhorn import sinkhorn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OP, BACKWARD = torch.ops.torch_subspace.sinkhorn, torch.ops.torch_subspace.sinkhorn_backward
TIGHT = {torch.float64: 1e-13, torch.float32: 1e-6}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}
SIZES = [((), 1, 1), ((), 1, 7), ((), 7, 1), ((2,), 5, 9), ((3,), 64, 64), ((), 257, 300), ((), 1024, 1024)]
MANY = [((), 3000, 2501), ((), 9, 20000), ((), 5000, 33), ((40,), 200, 181), ((700,), 24, 24)]  # more than fits at once
each_dtype = pytest.mark.parametrize("dtype", TIGHT, ids=str)
close = functools.partial(helpers.close, floor=1e-1, device="cuda")


def problem(batch, m, n, dtype):
    g = torch.Generator().manual_seed(m + n)
    scores = torch.rand(*batch, m, n, generator=g, dtype=torch.float64)
    row, col = (torch.rand(*batch, k, generator=g, dtype=torch.float64) + 0.2 for k in (m, n))
    col = col * (row.sum(-1) / col.sum(-1))[..., None]
    return tuple(t.to(dtype).double() for t in (scores, row, col))


def run(inputs, dtype, device, **options):
    scores, row, col = inputs
    if col is not None:  # rounded to float32 the sums differ by more than float64 may
        col = col * (row.sum(-1) / col.sum(-1))[..., None]
    inputs = scores, row, col
    scores, row, col = (None if t is None else t.to(device, dtype).detach().requires_grad_() for t in inputs)
    tol = TIGHT[dtype] if device == "cuda" else 1e-13
    plan = sinkhorn(scores, row=row, col=col, tol=tol, max_iter=2000, **options)
    dplan = helpers.normal(*plan.shape, seed=1)
    plan.backward(dplan.to(device, dtype))
    return [plan.detach(), *(t.grad for t in (scores, row, col) if t is not None and t.grad is not None)]


@each_dtype
@pytest.mark.parametrize("mode", ["implicit", "cpp"])
@pytest.mark.parametrize("eta", [0.5, 0.1])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_general(size, eta, mode, dtype):
    inputs = problem(*size, dtype)
    options = {"eta": eta, "mode": mode, "symmetric": False}
    close(run(inputs, dtype, "cuda", **options), run(inputs, torch.float64, "cpu", **options), TOLERANCE[dtype])


@each_dtype
@pytest.mark.parametrize("n", [1, 30, 257, 1024])
def test_symmetric(n, dtype):
    z = torch.nn.functional.normalize(torch.randn(2, n, 8, dtype=torch.float64), dim=-1)
    s = (z @ z.mT).abs().to(dtype).double()
    inputs = (s + s.mT) / 2, torch.rand(2, n, dtype=torch.float64).to(dtype).double() + 0.5, None
    ours, theirs = (run(inputs, t, d, symmetric=True) for t, d in ((dtype, "cuda"), (torch.float64, "cpu")))
    close(ours, theirs, TOLERANCE[dtype])
    assert torch.equal(ours[0], ours[0].mT)


@each_dtype
def test_any_range_and_masked_entries(dtype):
    scores, row, col = problem((), 90, 70, dtype)
    scores = scores + torch.linspace(0, 64, 90, dtype=torch.float64)[:, None]
    scores[3, ::2] = -math.inf
    ours = run((scores, row, col), dtype, "cuda")
    close(ours, run((scores, row, col), torch.float64, "cpu"), 20 * TOLERANCE[dtype])
    assert not ours[0][3, ::2].any() and not ours[1][3, ::2].any()


@each_dtype
@pytest.mark.parametrize("size", MANY, ids=str)
def test_large_plans_and_many(size, dtype):
    inputs, options = problem(*size, dtype), {"eta": 0.5, "symmetric": False}
    close(run(inputs, dtype, "cuda", **options), run(inputs, torch.float64, "cpu", **options), TOLERANCE[dtype])


@each_dtype
def test_symmetry_is_found_out_plan_by_plan(dtype):
    scores, *_ = problem((3,), 130, 130, dtype)
    scores[0], scores[2] = scores[0] + scores[0].mT, scores[2] + scores[2].mT
    ours, theirs = (run((scores, None, None), t, d) for t, d in ((dtype, "cuda"), (torch.float64, "cpu")))
    close(ours, theirs, TOLERANCE[dtype])
    assert [torch.equal(p, p.mT) for p in ours[0]] == [True, False, True]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [24, 150, 700])
def test_batches_are_their_plans_to_the_bit(n, symmetric):
    scores, *_ = problem((9,), n, n, torch.float32)
    scores = scores + scores.mT
    together = run((scores, None, None), torch.float32, "cuda", symmetric=symmetric)
    dplan = helpers.normal(*scores.shape, seed=1)
    for v, one in enumerate(scores):
        leaf = one.to("cuda", torch.float32).requires_grad_()
        plan = sinkhorn(leaf, tol=1e-6, max_iter=2000, symmetric=symmetric)
        plan.backward(dplan[v].to("cuda", torch.float32))
        assert torch.equal(plan, together[0][v]) and torch.equal(leaf.grad, together[1][v])


def test_no_iterations():
    scores, row, col = (t.cuda() for t in problem((), 6, 5, torch.float64))
    plan = sinkhorn(scores, row=row, col=col, max_iter=0)
    assert torch.allclose(plan, torch.exp((scores - scores.max()) / 0.1))


def test_what_does_not_exist_is_nan():
    scores = torch.rand(2, 9, 9, device="cuda")
    scores[0, 4] = -math.inf
    assert sinkhorn(scores).isnan().all(2).all(1).tolist() == [True, False]
    scores[0, 4], scores[1, :, 3] = 0.5, -math.inf
    assert sinkhorn(scores, symmetric=False).isnan().all(2).all(1).tolist() == [False, True]
    scores[1], scores[0, 2, 2] = 0.5, math.nan
    for symmetric in (True, False, None):
        plan = sinkhorn((scores + scores.mT) / 2, symmetric=symmetric)
        assert plan[0].isnan().all() and plan[1].isfinite().all()


def test_gradcheck():
    scores, row, col = (t.cuda().requires_grad_() for t in problem((), 5, 4, torch.float64))

    def function(scores, row, col):
        return sinkhorn(scores, eta=0.5, tol=1e-13, row=row, col=col * (row.sum() / col.sum()))

    assert torch.autograd.gradcheck(function, (scores, row, col), atol=1e-6)


def test_same_bits_every_time():
    inputs = problem((3,), 200, 150, torch.float32)
    first, second = (run(inputs, torch.float32, "cuda") for _ in range(2))
    assert helpers.same(first, second)


def test_nothing_waits_for_the_device():
    scores = torch.rand(100, 100, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sinkhorn(scores).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("symmetric", [True, None, False])
@pytest.mark.parametrize("n", [20, 500])
def test_a_graph_of_forward_and_backward(n, symmetric):
    def step(scores, dplan):
        plan = sinkhorn(scores, symmetric=symmetric, max_iter=1000)
        return plan, *torch.autograd.grad(plan, scores, dplan)

    def fresh(seed):
        s = torch.rand(2, n, n, generator=torch.Generator().manual_seed(seed))
        return (s + s.mT if symmetric is not False else s).cuda()

    scores, dplan = fresh(0).requires_grad_(), torch.randn(2, n, n, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(scores, dplan)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(scores, dplan)
    for seed in (1, 2):
        with torch.no_grad():
            scores.copy_(fresh(seed))
        graph.replay()
        for ours, theirs in zip(captured, step(scores, dplan), strict=True):
            assert torch.equal(ours, theirs)


def test_streams_do_not_disturb_one_another():
    scores = torch.rand(6, 300, 300, device="cuda")
    expected = [sinkhorn(s, max_iter=1000) for s in scores]
    streams = [torch.cuda.Stream() for _ in scores]
    torch.cuda.synchronize()
    plans = []
    for s, stream in zip(scores, streams, strict=True):
        with torch.cuda.stream(stream):
            plans.append(sinkhorn(s, max_iter=1000))
    torch.cuda.synchronize()
    assert helpers.same(plans, expected)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric, mode", [*((s, "implicit") for s in (True, None, False)), (None, "cpp")])
def test_compile_without_graph_breaks(symmetric, mode):
    def step(scores):
        return sinkhorn(scores, eta=0.3, symmetric=symmetric, mode=mode).square().sum()

    compiled = torch.compile(step, fullgraph=True)
    scores = torch.rand(2, 40, 40, device="cuda")
    scores = scores + scores.mT
    ours, theirs = (scores.clone().requires_grad_() for _ in range(2))
    compiled(ours).backward()
    step(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)


def test_empty_batch():
    scores = torch.rand(0, 4, 4, device="cuda", requires_grad=True)
    sinkhorn(scores).sum().backward()
    assert scores.grad.shape == (0, 4, 4)


@pytest.mark.parametrize("symmetric, half_steps", [(0, 0), (0, 5), (1, 0), (2, 0)])
def test_opcheck(symmetric, half_steps):
    scores, row, col = (t[None].cuda() for t in problem((), 6, 9, torch.float64))
    if symmetric:
        scores, row, col = scores[..., :6] + scores[..., :6].mT, *(torch.empty(0).double().cuda() for _ in range(2))
    options = symmetric, half_steps
    leaves = [t.requires_grad_(t.numel() > 0) for t in (scores, row, col)]
    torch.library.opcheck(OP, (*leaves, 0.3, 1e-6, 20, *options))
    scores, row, col = (t.detach() for t in leaves)
    plan, *_ = OP(scores, row, col, 0.3, 1e-6, 20, *options)
    for need in ((True, True, True), (True, False, False), (False, True, False)):
        need = need if row.numel() else (need[0], False, False)
        torch.library.opcheck(BACKWARD, (torch.randn_like(plan), plan, row, col, 0.3, *options, *need))
