"""The Riemannian step: values against the reference, and the facts that any right step satisfies."""

import functools
import math

import helpers
import pytest
import reference as ref
import torch
from hypothesis import given, settings, strategies
from rsgd_cases import DTYPES, RETRACTIONS, TRANSPORTS, generator, problem, unit

import torch_subspace as ts

RULES = [(retraction, "project") for retraction in RETRACTIONS] + [("geodesic", "parallel")]
TOLERANCE = {torch.float32: 5e-7, torch.float64: 1e-12}

SHAPES = [(k, n) for k in (1, 2, 3, 5, 8, 16, 33, 64) for n in sorted({k, k + 1, 17, 100, 1000}) if n >= k]

FLAGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 0.05},
    {"weight_decay": 0.05, "maximize": True},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
]
close = functools.partial(helpers.close, absolute=True)


def check_step(weight, grad, buffer, **rule):
    tolerance = TOLERANCE[weight.dtype]
    asked = rule | {"transport_by": rule.get("transport", "project")}
    asked.pop("transport", None)
    expected, expected_buffer = ref.rsgd_step(weight, grad, buffer, **asked)
    skipped = ts.grassmann_step_(weight, grad, buffer, **rule)
    assert (skipped.dtype, skipped.dim(), int(skipped)) == (torch.int64, 0, 0)
    close(weight, expected, tolerance)
    if buffer is not None:
        close(buffer, expected_buffer, tolerance)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("k, n", SHAPES)
def test_matches_the_reference_over_shapes(k, n, retraction, dtype):
    weight, grad, buffer = problem(7 if n <= 100 else 2, k, n, dtype)
    check_step(weight, grad, buffer, lr=0.6, momentum=0.8, dampening=0.1, retraction=retraction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retraction, transport", RULES)
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags) or "plain")
def test_matches_the_reference_over_flags(flags, retraction, transport, dtype):
    weight, grad, buffer = problem(7, 5, 33, dtype)
    buffer = buffer if "momentum" in flags else None
    check_step(weight, grad, buffer, lr=0.8, retraction=retraction, transport=transport, **flags)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_matches_the_reference_over_several_steps(transport):
    weight, grad, buffer = problem(3, 4, 20)
    for step in range(5):
        check_step(weight, grad.roll(step, -1), buffer, lr=0.5, momentum=0.9, transport=transport)


@pytest.mark.parametrize("classes", [0, 1])
def test_few_classes(classes):
    weight, grad, buffer = problem(classes, 3, 8)
    check_step(weight, grad, buffer, lr=0.5, momentum=0.9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lr_may_be_a_number_a_tensor_or_one_per_class(dtype):
    start, grad, _ = problem(4, 3, 10, dtype)
    results = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), torch.full((4,), 0.25, dtype=dtype)):
        weight = start.clone()
        ts.grassmann_step_(weight, grad, lr=lr)
        results.append(weight)
    assert all(torch.equal(results[0], other) for other in results[1:])
    check_step(start, grad, None, lr=torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=dtype))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    k=strategies.integers(1, 12),
    extra=strategies.integers(0, 40),
    classes=strategies.integers(0, 5),
    flags=strategies.sampled_from(FLAGS),
    rule=strategies.sampled_from(RULES),
    lr=strategies.sampled_from([0.0, 1e-6, 0.1, 1.0, 2.5]),
    dtype=strategies.sampled_from(DTYPES),
)
def test_matches_the_reference_anywhere(k, extra, classes, flags, rule, lr, dtype):
    weight, grad, buffer = problem(classes, k, k + extra, dtype)
    buffer = buffer if "momentum" in flags else None
    check_step(weight, grad, buffer, lr=lr, retraction=rule[0], transport=rule[1], **flags)


# -------------------------------------------------------------------------------------------------------------- facts


def test_distance_travelled_is_the_length_of_the_tangent():
    start, grad, _ = problem(5, 4, 30)
    weight = start.clone()
    ts.grassmann_step_(weight, grad, lr=1.2)  # no singular value of a unit gradient passes 1.2 < pi / 2
    length = 1.2 * torch.linalg.vector_norm(ref.horizontal(start, grad), dim=(1, 2))
    close(ref.principal_angles(start, weight).norm(dim=-1), length, 1e-12)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_a_rotated_frame_takes_the_rotated_step(retraction):
    weight, grad, _ = problem(5, 4, 30)
    rotation = torch.linalg.qr(torch.randn(5, 4, 4, dtype=torch.float64, generator=generator(1)))[0]
    rotated, rotated_grad = rotation @ weight, rotation @ grad
    ts.grassmann_step_(weight, grad, lr=0.9, retraction=retraction)
    ts.grassmann_step_(rotated, rotated_grad, lr=0.9, retraction=retraction)
    if retraction == "qr":  # picks its own basis of the same subspace
        close(rotated.mT @ rotated, weight.mT @ weight, 1e-12)
    else:
        close(rotated, rotation @ weight, 1e-12)


def test_forth_and_back_with_the_transported_tangent():
    start, grad, _ = problem(5, 4, 30)
    weight, velocity = start.clone(), torch.zeros_like(start)
    rule = {"lr": 0.9, "momentum": 1.0, "transport": "parallel"}
    ts.grassmann_step_(weight, grad, velocity, **rule)
    assert (weight - start).abs().max() > 0.05
    close(velocity @ weight.mT, torch.zeros(5, 4, 4), 1e-15)  # the velocity is horizontal where it has arrived
    ts.grassmann_step_(weight, torch.zeros_like(grad), velocity.neg_(), **rule)
    close(weight, start, 2e-15)
    close(-velocity, ref.horizontal(start, grad), 2e-15)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_the_loss_falls_at_the_rate_of_the_squared_horizontal_gradient(retraction):
    start, grad, _ = problem(5, 4, 30)
    step, loss = 1e-5, []
    for maximize in (True, False):
        weight = start.clone()
        ts.grassmann_step_(weight, grad, lr=step, maximize=maximize, retraction=retraction)
        loss.append((grad * weight).sum((1, 2)))
    slope = (loss[0] - loss[1]) / (2 * step)
    close(slope, ref.horizontal(start, grad).square().sum((1, 2)), 1e-9)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_ten_thousand_float32_steps_stay_on_the_manifold(retraction):
    weight, _, buffer = problem(3, 4, 24, torch.float32)
    grads = unit(torch.randn(100, 3, 4, 24, generator=generator(2)))
    for step in range(10_000):
        ts.grassmann_step_(weight, grads[step % 100], buffer, lr=0.1, momentum=0.9, retraction=retraction)
    assert helpers.frame_error(weight) <= 5e-7


@pytest.mark.parametrize("k, n", [(1, 64), (8, 128), (8, 2048), (32, 512)])
def test_one_float32_step_is_the_float64_geodesic(k, n):
    weight, grad, _ = problem(3, k, n, torch.float32)
    expected = ref.geodesic(ref.orthonormal(weight.double()), -ref.horizontal(weight.double(), grad.double()))
    ts.grassmann_step_(weight, grad, lr=1.0)
    close(weight, expected, 5e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_no_gradient_no_movement(retraction, dtype):
    start, grad, _ = problem(3, 4, 24, dtype)
    weight = start.clone()
    ts.grassmann_step_(weight, torch.zeros_like(grad), lr=0.5, retraction=retraction)
    close(weight, start, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_the_vertical_part_of_a_gradient_does_nothing(retraction):
    start, _, _ = problem(3, 4, 24)
    weight = start.clone()
    ts.grassmann_step_(weight, torch.randn(3, 4, 4, dtype=torch.float64, generator=generator(3)) @ start, lr=0.5)
    close(weight, start, 1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frame_off_by_a_thousandth_comes_back(dtype):
    frame, noise, _ = problem(3, 4, 24)
    off = frame + 1e-3 * noise
    weight = off.to(dtype)
    assert helpers.frame_error(weight) > 1e-5
    for _ in range(3):
        ts.grassmann_step_(weight, torch.zeros_like(weight), lr=0.1)
    assert helpers.frame_error(weight) <= (5e-7 if dtype == torch.float32 else 1e-14)
    close(weight, ref.orthonormal(off), 1e-6)  # to the nearest frame, of the same subspace


# ------------------------------------------------------------------------------------------------------- rough weather


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1e2, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("retraction, transport", RULES)
def test_huge_steps_stay_on_the_manifold(retraction, transport, length, dtype):
    for k, n in ((1, 5), (4, 24), (8, 100), (8, 8)):
        weight, grad, buffer = problem(3, k, n, dtype)
        rule = {"lr": 1.0, "momentum": 0.5, "retraction": retraction, "transport": transport}
        skipped = ts.grassmann_step_(weight, grad * length, buffer, **rule)
        assert int(skipped) == 0
        assert weight.isfinite().all() and buffer.isfinite().all()
        assert helpers.frame_error(weight) <= (1e-6 if dtype == torch.float32 else 1e-12), (k, n)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["grad", "buffer"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_class_that_is_not_finite_disturbs_no_other(transport, where, bad):
    start, grad, momentum = problem(5, 4, 24, torch.float32)
    rule = {"lr": 0.5, "momentum": 0.9, "transport": transport}
    clean, clean_buffer = start.clone(), momentum.clone()
    ts.grassmann_step_(clean, grad, clean_buffer, **rule)
    (grad if where == "grad" else momentum)[2, 3, 23] = bad
    weight, buffer = start.clone(), momentum.clone()
    assert int(ts.grassmann_step_(weight, grad, buffer, **rule)) == 1
    others = [0, 1, 3, 4]
    assert torch.equal(weight[others], clean[others]) and torch.equal(buffer[others], clean_buffer[others])
    assert torch.equal(weight[2], start[2])
    torch.testing.assert_close(buffer[2], momentum[2], rtol=0, atol=0, equal_nan=True)


def test_skipped_classes_are_counted_over_the_whole_list():
    weights, grads = zip(*(problem(classes, 2, 9)[:2] for classes in (3, 1, 4)), strict=True)
    grads[0][1] = math.nan
    grads[2][0, 0, 0] = math.inf
    grads[2][3, 1, 8] = -math.inf
    assert int(ts.grassmann_step_(list(weights), list(grads), lr=0.1)) == 3
