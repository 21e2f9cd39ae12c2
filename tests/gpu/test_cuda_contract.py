"""What every op keeps on a GPU: the CPU's values, derivatives, bits, streams, graphs, no waiting. Never run so far."""

import functools

import helpers
import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    DEVICE,
    DROPOUT,
    HALVES,
    ON_GPU,
    PRESENT,
    Case,
    both,
    cast,
    exact_products,
    gradient_of,
    product,
    run,
    synchronise,
    without_waiting,
)

import torch_subspace as ts
from torch_subspace.rates.coding_rate_soft import soft_rate
from torch_subspace.tucker.depthwise import depthwise_weight_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason=f"needs {DEVICE}")]

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
trained = [case for case in CASES if case.trained]
each_trained = pytest.mark.parametrize("case", trained, ids=lambda case: case.name)
only_gpu = pytest.mark.skipif(not ON_GPU, reason="a GPU's own")
close = functools.partial(helpers.close, floor=1e-2, device=None)


@pytest.mark.parametrize("case, dtype", [(case, dtype) for case in CASES
                                         for dtype in (torch.float64, torch.float32, *case.halves)],
                         ids=lambda value: getattr(value, "name", str(value)))
def test_values_and_gradients(case, dtype):
    inputs = case.make()
    rounded = [t.detach().cpu().double() if t.is_floating_point() else t for t in cast(case, inputs, dtype, "cpu")]
    with exact_products():
        ours = both(case, cast(case, inputs, dtype, DEVICE))
        truth = both(case, cast(case, rounded, torch.float64, "cpu"))
    assert all(t.device.type == torch.device(DEVICE).type for t in ours)
    close(ours, truth, TOLERANCE[dtype] * (case.scale if dtype in (torch.float32, torch.float64) else 1))


@each_trained
def test_gradcheck(case):
    leaves = cast(case, case.make(), torch.float64, DEVICE)
    fixed = leaves[case.trained:]
    if case.name == "sinkhorn symmetric":  # the gradient of a symmetric argument

        def function(s):
            return case.call((s + s.mT) / 2)

    else:

        def function(*t):
            return case.call(*t, *fixed)

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        assert torch.autograd.gradcheck(function, leaves[: case.trained], fast_mode=True, atol=1e-5, nondet_tol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_same_bits_every_time(case, dtype):
    if dtype != torch.float32 and dtype not in case.halves:
        pytest.skip("float32 and float64 only")
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuDNN's part of the convolutions
    try:
        first = run(case, dtype)
        synchronise()
        junk = torch.full((1 << 22,), float("nan"), device=DEVICE)  # memory that is not what it was
        del junk
        assert helpers.same(first, run(case, dtype))
    finally:
        torch.use_deterministic_algorithms(False)


@each_case
def test_other_layouts(case):
    """Every second entry of something larger, and a transposed matrix."""
    inputs = case.make()
    leaves = cast(case, inputs, torch.float32, DEVICE)
    with exact_products():
        expected = both(case, leaves)
    if not case.trained:  # what is written to
        leaves = [leaves[0], *(torch.stack((t, t), -1)[..., 0] for t in leaves[1:])]
        return close(both(case, leaves), expected, 1e-5)
    for view in (lambda t: torch.stack((t, t), -1)[..., 0], lambda t: t.mT.contiguous().mT if t.dim() > 1 else t):
        strange = [view(t.detach()).requires_grad_(t.requires_grad) for t in leaves]
        assert any(not t.is_contiguous() for t in strange)
        with exact_products():
            close(both(case, strange), expected, 1e-5 * case.scale)


@each_trained
def test_a_gradient_that_is_not_contiguous(case):
    leaves = cast(case, case.make(), torch.float32, DEVICE)
    dy = gradient_of(case, leaves)
    for strange in (torch.stack((dy, dy), -1)[..., 0], torch.ones((), device=DEVICE).expand(dy.shape)):
        with exact_products():
            results = [torch.autograd.grad(case.call(*leaves), leaves[: case.trained], g, allow_unused=True)
                       for g in (strange.contiguous(), strange)]
        close(*([g for g in r if g is not None] for r in results[::-1]), 1e-5 * case.scale)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each_case
def test_autocast(case, dtype):
    """Results near the truth, gradients in the dtype of what they belong to."""
    if not case.halves:
        pytest.skip("float32 and float64 only")
    inputs = case.make()
    leaves = cast(case, inputs, torch.float32, DEVICE)
    with torch.autocast(torch.device(DEVICE).type, dtype):
        ours = both(case, leaves)
    assert ours[0].dtype in (torch.float32, dtype) and all(t.dtype == torch.float32 for t in ours[1:])
    close(ours, both(case, cast(case, inputs, torch.float64, "cpu")), TOLERANCE[dtype])


@pytest.mark.parametrize("case", [case for case in CASES if not case.tf32], ids=lambda case: case.name)
def test_frames_and_grams_never_round_to_tf32(case):
    with exact_products():
        expected = run(case)
    with exact_products(allowed=True):
        assert helpers.same(run(case), expected)


def large(name):
    """Sizes at which cuBLAS takes the tensor cores when it may."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).float().double()

    frames = torch.linalg.qr(draw(100, 512, 8)).Q.mT.contiguous()
    if name == "cross_entropy":
        return [draw(256, 512), frames, torch.arange(256) % 100]
    if name == "logits":
        return [draw(256, 512), frames]
    if name == "tucker_compose":
        return [draw(512, 512), draw(32, 32), draw(512, 32), draw(512, 32)]
    return [draw(256, 512), draw(384, 512), draw(384), draw(16, 16), draw(384, 16), draw(16, 512)]


@only_gpu
@pytest.mark.parametrize("name", ["logits", "cross_entropy", "tucker_linear", "tucker_linear alone", "tucker_compose"])
def test_products_obey_the_switch_of_tf32(name):
    case = BY_NAME[name]
    if name == "tucker_compose":
        case = Case(name, None, lambda b, c, u, v: ts.tucker_compose(c, [u, v], base=b), 4, tf32=True)
    inputs = large(name)
    truth = both(case, cast(case, inputs, torch.float64, "cpu"))
    with exact_products():
        exact = both(case, cast(case, inputs, torch.float32, DEVICE))
    with exact_products(allowed=True):
        rounded = both(case, cast(case, inputs, torch.float32, DEVICE))
    close(exact, truth, 3e-5)
    close(rounded, truth, 1e-2)
    if torch.cuda.get_device_capability() >= (8, 0) and name in ("logits", "cross_entropy"):
        assert not helpers.same(exact, rounded)  # the small products of an adapter may be exact at no cost


@pytest.mark.parametrize("case", [*CASES, *DROPOUT], ids=lambda case: case.name)
def test_nothing_waits_for_the_device(case):
    for dtype in (torch.float32, *case.halves[:1]):
        leaves = cast(case, case.make(), dtype, DEVICE)
        dy = gradient_of(case, leaves)
        for _ in range(2):  # the first call may load libraries and look for algorithms
            y = case.call(*leaves)
            if case.trained:
                torch.autograd.grad(y, leaves[: case.trained], dy, allow_unused=True)
        with without_waiting():
            y = case.call(*leaves)
            if case.trained:
                torch.autograd.grad(y, leaves[: case.trained], dy, allow_unused=True)


@only_gpu
@each_case
def test_the_current_stream_is_used(case):
    """The inputs get their values late, on a side stream: whoever reads them on another one reads zeros."""
    inputs = cast(case, case.make(), torch.float32, DEVICE)
    expected = both(case, inputs)
    late = [torch.zeros_like(t).requires_grad_(t.requires_grad) for t in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for target, source in zip(late, inputs, strict=True):
                target.copy_(source)
        results = both(case, late)
    stream.synchronize()
    close(results, expected, 1e-5 * case.scale)


@only_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_case
def test_a_device_that_is_not_the_current_one(case):
    expected = run(case, device="cuda:0")
    results = run(case, device="cuda:1")
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in results)
    close(results, expected, 1e-6 * case.scale)


def backend():
    return "inductor" if ON_GPU else "aot_eager"


@each_case
def test_compiles_to_one_graph(case):
    torch._dynamo.reset()
    inputs = case.make()
    with exact_products():
        expected = both(case, cast(case, inputs, torch.float32, DEVICE))
        compiled = torch.compile(case.call, fullgraph=True, dynamic=False, backend=backend())
        leaves = cast(case, inputs, torch.float32, DEVICE)
        close(both(Case(case.name, None, compiled, case.trained), leaves), expected, 1e-5 * case.scale)


EMPTY = [
    ("logits, no rows", lambda d: ts.subspace_logits(torch.ones(0, 8, device=d), torch.ones(3, 2, 8, device=d))),
    ("logits, no classes", lambda d: ts.subspace_logits(torch.ones(4, 8, device=d), torch.ones(0, 2, 8, device=d))),
    ("cross_entropy, no rows", lambda d: ts.subspace_cross_entropy(
        torch.ones(0, 8, device=d), torch.ones(3, 2, 8, device=d), torch.empty(0, dtype=torch.int64, device=d))),
    ("rsgd, no classes", lambda d: ts.grassmann_step_(*torch.ones(2, 0, 3, 8, device=d).unbind(), lr=0.1)),
    ("rsgd, no frames of the Stiefel manifold", lambda d: ts.grassmann_step_(
        *torch.ones(2, 0, 3, 8, device=d).unbind(), lr=0.1, manifold="stiefel")),
    ("rsgd, no parameters", lambda d: ts.grassmann_step_([], [], lr=0.1)),
    ("tucker, no factors", lambda d: ts.tucker_compose(torch.ones(3, 4, device=d), [None, None], scale=2.0)),
    ("tucker_linear, no rows", lambda d: ts.tucker_linear(
        torch.ones(2, 0, 8, device=d), torch.ones(5, 8, device=d), None, torch.ones(2, 3, device=d),
        torch.ones(5, 2, device=d), torch.ones(3, 8, device=d))),
    ("tucker_conv, no images", lambda d: ts.tucker_conv(
        torch.ones(0, 4, 6, 6, device=d), torch.ones(5, 4, 3, 3, device=d), None, torch.ones(2, 2, 3, 3, device=d),
        [torch.ones(5, 2, device=d), torch.ones(4, 2, device=d), None, None], form="chain")),
    ("depthwise, no images", lambda d: depthwise_weight_gradient(
        torch.ones(0, 3, 9, device=d), torch.ones(0, 3, 7, device=d), (3,), (1,), (0,), (1,))),
    ("coding_rate, no views", lambda d: ts.coding_rate(torch.ones(0, 5, 3, device=d))),
    ("coding_rate, no columns", lambda d: ts.coding_rate(torch.ones(5, 3, device=d), torch.ones(5, 0, device=d))),
    ("coding_rate_soft, empty column", lambda d: soft_rate(
        torch.ones(1, 5, 3, device=d), torch.eye(5, 4, device=d)[None] * (torch.arange(4, device=d) < 2), 0.5)),
    ("sinkhorn, no views", lambda d: ts.sinkhorn(torch.ones(0, 4, 4, device=d))),
    ("sigreg, no views", lambda d: ts.isotropy.sigreg(torch.ones(0, 5, 3, device=d), seed=0)),
    ("gated_cosine, no gates", lambda d: ts.isotropy.gated_cosine(*(torch.ones(n, 3, device=d) for n in (0, 4, 0)))),
    ("gated_cosine, no points", lambda d: ts.isotropy.gated_cosine(*(torch.ones(n, 3, device=d) for n in (4, 0, 4)))),
    ("newton_schulz, no matrices", lambda d: ts.lowrank.newton_schulz(torch.ones(0, 5, 3, device=d))),
    ("newton_schulz, no rows", lambda d: ts.lowrank.newton_schulz(torch.ones(2, 0, 3, device=d))),
    ("sigreg, no points", lambda d: OP.sigreg(torch.ones(2, 0, 3, device=d), torch.ones(3, 4, device=d), 5, 0.5)),
    ("hadamard, no rows", lambda d: ts.lowrank.hadamard(torch.ones(0, 8, device=d))),
    ("fastfood, no rows", lambda d: ts.lowrank.fastfood(torch.ones(0, 8, device=d), 20, seed=0)),
    ("product, nothing to sum", lambda d: product(*(torch.ones(1, *s, device=d) for s in ((3, 4), (0, 3), (0, 4))))),
]


@pytest.mark.parametrize("call", [call for _, call in EMPTY], ids=[name for name, _ in EMPTY])
def test_nothing_to_do(call):
    ours, expected = call(DEVICE), call("cpu")
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    close([ours], [expected], 1e-5)


def ones(*shape):
    return torch.ones(shape, device=DEVICE)


def integers(*shape):
    return torch.zeros(shape, dtype=torch.int64, device=DEVICE)


REFUSED = {  # calls of the ops themselves, past the checks in Python
    "logits": lambda: OP.logits(ones(3, 5), ones(2, 2, 4), integers(0), 1.0, True, False),
    "logits k > n": lambda: OP.logits(ones(3, 2), ones(2, 5, 2), integers(0), 1.0, True, False),
    "cross_entropy": lambda: OP.cross_entropy(ones(3, 4), ones(2, 2, 4), integers(0), integers(4), ones(0), 25.0, True,
                                              -100, 0.0, 0),
    "rsgd": lambda: OP.rsgd_([ones(2, 5, 4)], [ones(2, 5, 4)], [], integers(0), torch.tensor(0.1, dtype=torch.float64),
                             0.0, 0.0, 0.0, False, False, 0, False, False),
    "rsgd transport on the Stiefel manifold": lambda: OP.rsgd_(
        [ones(2, 3, 4)], [ones(2, 3, 4)], [], integers(0), torch.tensor(0.1, dtype=torch.float64), 0.0, 0.0, 0.0, False,
        False, 0, True, True),
    "tucker": lambda: OP.tucker_compose(ones(2, 2), [ones(4, 3), ones(5, 2)], [], 1.0),
    "tucker_conv": lambda: OP.tucker_project(ones(2, 6, 9), ones(5, 3), ones(2, 3, 9), integers(0), 0.0, False, True,
                                             True),
    "coding_rate": lambda: OP.coding_rate(ones(1, 6, 4), integers(0), integers(0), -1.0, False),
    "coding_rate_soft": lambda: OP.coding_rate_soft(ones(1, 6, 4), ones(1, 5, 3), 0.5, False),
    "sinkhorn": lambda: OP.sinkhorn(ones(1, 4, 4), ones(1, 0), ones(1, 0), 0.0, 1e-6, 9, 0, 0),
    "tucker_linear": lambda: OP.tucker_linear_(ones(3, 4), ones(3, 5), ones(2, 2), ones(4, 3), ones(2, 5), integers(0),
                                               1.0, 0.0, False),
    "sigreg": lambda: OP.sigreg(ones(1, 6, 4), ones(3, 2), 5, 0.5),
    "gated_cosine": lambda: OP.gated_cosine(ones(1, 6, 4), ones(1, 5, 3), ones(1, 6, 4)),
    "newton_schulz": lambda: OP.newton_schulz(ones(1, 6, 4), [1.0, 2.0], 1e-7),
    "hadamard": lambda: OP.hadamard(ones(2, 12), 1.0),
    "fastfood": lambda: OP.fastfood(ones(2, 12), 0, 3),
    "product": lambda: OP.product_(ones(1, 3, 4), ones(1, 3, 2), ones(1, 3, 4), False, False, 1.0, 0.0),
    "depthwise": lambda: OP.depthwise(ones(1, 2, 9), ones(1, 3, 7), [3], [1], [0], [1], 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_raises_and_does_no_harm(name):
    with pytest.raises((RuntimeError, ValueError)):
        REFUSED[name]()
    synchronise()
    close(run(CASES[0]), run(CASES[0], torch.float64, "cpu"), 2e-3)


@only_gpu
@pytest.mark.parametrize("case", [BY_NAME["logits"], BY_NAME["tucker_linear"]], ids=lambda case: case.name)
def test_tensors_on_two_devices_are_refused(case):
    leaves = cast(case, case.make(), torch.float32, DEVICE)
    leaves[1] = leaves[1].detach().cpu()
    with pytest.raises((RuntimeError, ValueError)):
        case.call(*leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_ends_of_a_convolution(dtype):
    x, f, w = torch.randn(2, 6, 9).to(DEVICE, dtype), torch.randn(6, 3).to(DEVICE), torch.randn(2, 3, 9).to(DEVICE)
    seed, none = torch.tensor([7]).to(DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    for last in (False, True):
        a, b = (t.mT.contiguous() if last else t for t in (x, w))
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(OP.tucker_project, (a, f, b, seed, 0.3, last, *needs))
        torch.library.opcheck(OP.tucker_expand_, (a, b, f, none, 0.0, last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_depthwise(dtype):
    x, dy = torch.randn(2, 4, 9).to(DEVICE, dtype), torch.randn(2, 4, 4).to(DEVICE, dtype)
    for groups in (4, 2):
        torch.library.opcheck(OP.depthwise, (x.requires_grad_(), dy.requires_grad_(), [3], [2], [0], [1], groups))


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_of_soft_rates(keep):
    z, w = (t[None].float().to(DEVICE).requires_grad_() for t in BY_NAME["coding_rate_soft"].make())
    torch.library.opcheck(OP.coding_rate_soft, (z, w, 0.5, keep))
    _, inverse, stats = OP.coding_rate_soft(z, w, 0.5, keep)
    arguments = torch.ones(1, device=DEVICE), z.detach(), w.detach(), inverse.detach(), stats.detach(), 0.5, True, True
    torch.library.opcheck(OP.coding_rate_soft_backward, arguments)
