"""Steps on the Stiefel manifold, where the rows of a frame count: values against the reference, and their facts."""

import copy

import helpers
import pytest
import reference as ref
import torch
from helpers import frame_error, normal
from optim_cases import ADAM, SGD
from rsgd_cases import DTYPES, RETRACTIONS, generator, problem

import torch_subspace as ts
from torch_subspace.grassmann.frames import moved_by_others

TOLERANCE = {torch.float32: 5e-7, torch.float64: 1e-12}
FLAGS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5,
         "weight_decay": 0.05, "maximize": True}]
each_retraction = pytest.mark.parametrize("retraction", RETRACTIONS)


def step(weight, grad, buffer=None, **rule):
    return ts.grassmann_step_(weight, grad, buffer, manifold="stiefel", **rule)


def check_step(weight, grad, buffer, **rule):
    expected, expected_buffer = ref.rsgd_step(weight, grad, buffer, manifold="stiefel", **rule)
    assert int(step(weight, grad, buffer, **rule)) == 0
    helpers.close(weight, expected, TOLERANCE[weight.dtype], absolute=True)
    if buffer is not None:
        helpers.close(buffer, expected_buffer, TOLERANCE[weight.dtype], absolute=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_retraction
@pytest.mark.parametrize("k, n", [(1, 1), (1, 9), (2, 2), (3, 17), (5, 100), (8, 8), (8, 100), (16, 40), (33, 60)])
def test_matches_the_reference_over_shapes(k, n, retraction, dtype):
    weight, grad, buffer = problem(5, k, n, dtype)
    check_step(weight, grad, buffer, lr=0.6, momentum=0.8, dampening=0.1, retraction=retraction)


@each_retraction
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags) or "plain")
@pytest.mark.parametrize("lr", [1e-6, 0.8, 2.5])
def test_matches_the_reference_over_flags(lr, flags, retraction):
    weight, grad, buffer = problem(4, 5, 33)
    check_step(weight, grad, buffer if "momentum" in flags else None, lr=lr, retraction=retraction, **flags)


@each_retraction
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_careful_path_is_the_same_step(dtype, retraction):
    """Steps long enough to take it, and frames far from orthonormal."""
    weight, grad, _ = problem(4, 5, 33, dtype)
    expected, _ = ref.rsgd_step(weight, grad, lr=4.0, manifold="stiefel", retraction=retraction)
    step(weight, grad, lr=4.0, retraction=retraction)
    helpers.close(weight, expected, TOLERANCE[dtype], absolute=True)
    weight, grad, _ = problem(4, 5, 33, dtype)
    check_step(weight + 0.1 * grad, grad, None, lr=0.5, retraction=retraction)
    for lr in (1e3, 1e12):
        weight, grad, _ = problem(4, 5, 33, dtype)
        step(weight, grad, lr=lr, retraction=retraction)
        assert frame_error(weight) < (1e-6 if dtype == torch.float32 else 1e-12)


@each_retraction
def test_the_derivative_along_the_retraction_is_the_tangent(retraction):
    start, grad, _ = problem(3, 4, 11)
    tangent, h = ref.tangential(start, grad), 1e-4
    ends = []
    for maximize in (True, False):
        weight = start.clone()
        step(weight, grad, lr=h, retraction=retraction, maximize=maximize)
        ends.append(weight)
    helpers.close((ends[0] - ends[1]) / (2 * h), tangent, 1e-8, absolute=True)
    inner = tangent @ start.mT
    helpers.close(inner, -inner.mT, 1e-15, absolute=True)
    loss = [(grad * end).sum((1, 2)) for end in ends]  # falls at the rate of the squared gradient
    helpers.close((loss[0] - loss[1]) / (2 * h), tangent.square().sum((1, 2)), 1e-7, absolute=True)


@each_retraction
def test_a_gradient_that_turns_no_row_among_the_others_is_a_grassmann_step(retraction):
    start, grad, _ = problem(3, 4, 20)
    one, two, level = start.clone(), start.clone(), ref.horizontal(start, grad)
    step(one, level, lr=0.7, retraction=retraction)
    ts.grassmann_step_(two, level, lr=0.7, retraction=retraction)
    helpers.close(one, two, 1e-14, absolute=True)


def test_geodesics_go_on_and_sum_up():
    """exp(2 Z) is exp(Z) exp(Z), where the direction is carried along: of a linear cost tr(C W'), Z W W' C..."""
    w = torch.eye(3, dtype=torch.float64)[None]
    turn = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 0]], dtype=torch.float64)
    half, whole = w.clone(), w.clone()
    step(whole, -2.0 * turn @ w, lr=0.6)
    for _ in range(2):
        step(half, -turn @ half, lr=0.6)
    helpers.close(half, whole, 1e-14, absolute=True)
    assert half[0, 0, 0].item() == pytest.approx(torch.tensor(1.2).cos().item())


def cost(w, a, order):
    """Brockett's: at its minimum the rows are the eigenvectors of a, in the order asked."""
    return (order * ((w @ a) * w).sum(-1)).sum()


def planted(k=3, n=8, dtype=torch.float64):
    vectors = torch.linalg.qr(normal(n, n, seed=3))[0].mT
    values = torch.arange(1, n + 1, dtype=torch.float64)
    return (vectors.mT * values @ vectors).to(dtype), vectors[:k].to(dtype)


@pytest.mark.parametrize("retraction, options", [
    *((retraction, {"momentum": 0.8}) for retraction in RETRACTIONS), ("geodesic", {"momentum": 0.8, "nesterov": True}),
])
def test_brocketts_cost_finds_an_ordered_eigenbasis(retraction, options):
    a, vectors = planted()
    order = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    found = {}
    for manifold in ("stiefel", "grassmann"):
        w = torch.nn.Parameter(ref.orthonormal(normal(3, 8, seed=4))[None])
        optimiser = SGD([{"params": [w], "manifold": manifold}], lr=0.02, retraction=retraction, **options)
        for _ in range(400):
            optimiser.zero_grad()
            cost(w, a, order).backward()
            optimiser.step()
        found[manifold] = (w.detach()[0] @ vectors.mT).abs()
        assert frame_error(w) < 1e-12
    helpers.close(found["stiefel"], torch.eye(3, dtype=torch.float64), 1e-6, absolute=True)
    off = found["grassmann"] - torch.eye(3, dtype=torch.float64)
    assert off.abs().max() > 0.1  # its directions never turn rows among themselves


def test_the_optimum_is_that_of_torchs_parametrization():
    a, _ = planted()
    order = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(8, 3, bias=False, dtype=torch.float64))
    theirs = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=300, line_search_fn="strong_wolfe",
                               tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        theirs.zero_grad()
        loss = cost(layer.weight, a, order)
        loss.backward()
        return loss

    theirs.step(closure)
    w = torch.nn.Parameter(layer.weight.detach().roll(1, -1))
    ours = SGD([{"params": [w], "manifold": "stiefel"}], lr=0.02, momentum=0.8)
    for _ in range(400):
        ours.zero_grad()
        cost(w, a, order).backward()
        ours.step()
    best = torch.tensor(3.0 * 1 + 2 * 2 + 1 * 3)
    assert cost(w, a, order).item() == pytest.approx(best.item(), abs=1e-9)
    assert cost(layer.weight, a, order).item() == pytest.approx(best.item(), abs=1e-6)
    helpers.close(w.detach().abs(), layer.weight.detach().abs(), 1e-3, absolute=True)


@each_retraction
def test_a_thousand_steps_leave_rows_orthonormal(retraction):
    w = torch.nn.Parameter(ref.orthonormal(normal(2, 4, 12, seed=5)).float())
    optimiser = SGD([{"params": [w], "manifold": "stiefel"}], lr=0.1, momentum=0.9, retraction=retraction)
    g = generator(7)
    for _ in range(1000):
        w.grad = torch.randn(w.shape, generator=g)
        optimiser.step()
    assert frame_error(w) < 1e-6


@pytest.mark.parametrize("kind", [SGD, ADAM], ids=lambda kind: kind.__name__)
def test_a_frame_alone_and_stacks_of_them(kind):
    """(k, n) and (..., k, n) go as (C, k, n); state_dict and a copy go on with the same bits."""
    start, options = ref.orthonormal(normal(6, 3, 8, seed=6)), {"lr": 0.05}
    if kind is SGD:
        options["momentum"] = 0.9
    results = []
    for shape in [(6, 3, 8), (2, 3, 3, 8)]:
        w = torch.nn.Parameter(start.clone().view(shape))
        optimiser = kind([{"params": [w], "manifold": "stiefel"}], **options)
        for i in range(6):
            w.grad = normal(*start.shape, seed=i).view(shape)
            optimiser.step()
            if i == 2:
                state = copy.deepcopy(optimiser.state_dict())
                optimiser = kind([{"params": [w], "manifold": "stiefel"}], **options)
                optimiser.load_state_dict(state)
        results.append(w.detach().view(6, 3, 8))
    alone = [torch.nn.Parameter(each.clone()) for each in start]
    optimiser = kind([{"params": alone, "manifold": "stiefel"}], **options)
    for i in range(6):
        for w, grad in zip(alone, normal(*start.shape, seed=i)):
            w.grad = grad
        optimiser.step()
    assert torch.equal(results[0], results[1]) and frame_error(results[0]) < 1e-13
    helpers.close(torch.stack([w.detach() for w in alone]), results[0], 1e-13, absolute=True)


def test_adam_finds_the_eigenbasis_too():
    a, vectors = planted()
    order = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    w = torch.nn.Parameter(ref.orthonormal(normal(3, 8, seed=4)))
    optimiser = ADAM([{"params": [w], "manifold": "stiefel"}], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 400)
    for _ in range(400):
        optimiser.zero_grad()
        cost(w, a, order).backward()
        optimiser.step()
        schedule.step()
    helpers.close((w.detach() @ vectors.mT).abs(), torch.eye(3, dtype=torch.float64), 1e-4, absolute=True)


def test_a_rotten_gradient_spoils_no_other_frame():
    w = [torch.nn.Parameter(ref.orthonormal(normal(3, 8, seed=i))) for i in range(2)]
    before = [p.detach().clone() for p in w]
    optimiser = SGD([{"params": w, "manifold": "stiefel"}], lr=0.1)
    w[0].grad, w[1].grad = torch.full_like(w[0], torch.nan), normal(3, 8, seed=9)
    with pytest.warns(RuntimeWarning, match="1 class"):
        optimiser.step()
    assert optimiser.skipped_frames == 1
    assert torch.equal(w[0], before[0]) and not torch.equal(w[1], before[1])


def test_ragged_frames():
    dims, weight = (2, 3), torch.cat([ref.orthonormal(normal(k, 7, seed=k)) for k in (2, 3)])
    grad = normal(5, 7, seed=1)
    expected = [ref.rsgd_step(w[None], g[None], lr=0.3, manifold="stiefel")[0][0]
                for w, g in zip(weight.split(dims), grad.split(dims))]
    step(weight, grad, lr=0.3, dims=dims)
    helpers.close(weight, torch.cat(expected), 1e-13, absolute=True)


def test_it_compiles_and_counts_versions():
    weight, grad, buffer = problem(2, 3, 8)
    expected = weight.clone()
    step(expected, grad, buffer.clone(), lr=0.1, momentum=0.9)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(weight, grad, buffer, lr=0.1, momentum=0.9)
    assert torch.equal(weight, expected)
    p = torch.nn.Parameter(expected[0].clone())
    version = p._version
    step(p, grad[0], lr=0.1)
    assert p._version == version + 1 and p.shape == (3, 8)


@pytest.mark.parametrize("call, message", [
    (lambda w, g: step(w, g, lr=0.1, transport="parallel"), 'transport="parallel" has no closed form for manifold="st'),
    (lambda w, g: step(w[0, 0], g[0, 0], lr=0.1), r"weight on the Stiefel manifold must be \(..., k, n\) with 0 < k"),
    (lambda w, g: step(w.mT, g.mT, lr=0.1), r"with 0 < k <= n, got shape \(2, 8, 3\)"),
    (lambda w, g: ts.grassmann_step_(w, g, lr=0.1, manifold="sphere"), "manifold must be one of"),
    (lambda w, g: ts.grassmann_step_(w[0], g[0], lr=0.1), r"must be \(C, k, n\)"),
    (lambda w, g: SGD([{"params": [w.mT], "manifold": "stiefel"}], lr=0.1), "frames in params on the Stiefel manifold"),
    (lambda w, g: SGD([{"params": [w], "manifold": "stiefel"}], lr=0.1, transport="parallel"), "no closed form"),
    (lambda w, g: ADAM([{"params": [w.half()], "manifold": "stiefel"}], lr=0.1), "must be float32 or float64"),
])
def test_wrong_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(*problem(2, 3, 8)[:2])


def test_steps_of_ours_are_known():
    module = ts.grassmann.SubspacePatch(8, 3)
    for optimiser in (SGD(module.parameters(), lr=0.1), SGD(ts.param_groups(module), lr=0.1)):
        module.basis.grad = torch.randn(3, 8)
        optimiser.step()
        assert module.basis_error() < 1e-6 and not moved_by_others(module.basis)


@pytest.mark.parametrize("momentum, lr", [(0.8, 0.01), (0.8, 0.05), (0.9, 0.01), (0.9, 0.05)])
def test_tangent_momentum_takes_rates_that_ambient_momentum_does_not(momentum, lr):
    """Decision 29, three matrices and starts: Brockett's cost by the op, and with momentum in the ambient space."""
    order = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    for seed in range(3):
        vectors = torch.linalg.qr(normal(8, 8, seed=3 + 10 * seed))[0].mT
        a = vectors.mT * torch.arange(1, 9, dtype=torch.float64) @ vectors
        start, errors = ref.orthonormal(normal(3, 8, seed=4 + 10 * seed))[None], {}
        for kind in ("tangent", "ambient"):
            w, buffer = start.clone(), torch.zeros_like(start)
            for _ in range(400):
                grad = 2 * order[:, None] * (w @ a)
                if kind == "tangent":
                    step(w, grad, buffer, lr=lr, momentum=momentum, retraction="polar")
                else:
                    buffer = momentum * buffer + grad
                    step(w, buffer, lr=lr, retraction="polar")
            errors[kind] = ((w[0] @ vectors[:3].mT).abs() - torch.eye(3, dtype=torch.float64)).abs().max().item()
        assert errors["tangent"] < 1e-8 and errors["ambient"] > 0.5
