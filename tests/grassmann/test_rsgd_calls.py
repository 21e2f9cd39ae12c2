"""The Riemannian step: lists and ragged classes, what it refuses, and what it is as an op."""

import math

import pytest
import torch
from rsgd_cases import DTYPES, RETRACTIONS, TRANSPORTS, problem

import torch_subspace as ts

# ---------------------------------------------------------------------------------------------------- lists and ragged


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_list_is_the_same_as_one_by_one(momentum):
    shapes = [(7, 8, 100), (0, 2, 5), (1, 1, 1), (3, 3, 17)]
    one, many = ([problem(*shape, torch.float32) for shape in shapes] for _ in range(2))
    for weight, grad, buffer in one:
        ts.grassmann_step_(weight, grad, buffer if momentum else None, lr=0.3, momentum=momentum)
    weights, grads, buffers = (list(column) for column in zip(*many, strict=True))
    ts.grassmann_step_(weights, grads, buffers if momentum else None, lr=0.3, momentum=momentum)
    for (weight, _, buffer), other, other_buffer in zip(one, weights, buffers, strict=True):
        assert torch.equal(weight, other) and torch.equal(buffer, other_buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ragged_is_the_same_as_class_by_class(transport, dtype):
    dims, n = (3, 1, 8, 3, 20), 20
    parts = [problem(1, k, n, dtype) for k in dims]
    weight, grad, buffer = (torch.cat([part[i][0] for part in parts]) for i in range(3))
    lr = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=dtype)
    rule = {"momentum": 0.9, "transport": transport}
    ts.grassmann_step_(weight, grad, buffer, lr=lr, dims=dims, **rule)
    blocks = zip(parts, lr, weight.split(dims), buffer.split(dims), strict=True)
    for (one, one_grad, one_buffer), one_lr, block, block_buffer in blocks:
        ts.grassmann_step_(one, one_grad, one_buffer, lr=one_lr, **rule)
        assert torch.equal(one[0], block) and torch.equal(one_buffer[0], block_buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_company_does_not_matter(retraction, dtype):
    """Alone, among a few or among many: as shards of a head are to be the head, to the bit."""
    rule = {"momentum": 0.9, "nesterov": True, "retraction": retraction}
    for k in (2, 3, 4, 5, 8):
        lr = torch.logspace(-8, 0.5, 19, dtype=dtype)
        (whole, grad, buffer), (parts, _, momentum) = problem(19, k, 40, dtype), problem(19, k, 40, dtype)
        ts.grassmann_step_(whole, grad, buffer, lr=lr, **rule)
        for part in torch.arange(19).split([1, 7, 3, 8]):
            part = slice(int(part[0]), int(part[-1]) + 1)
            ts.grassmann_step_(parts[part], grad[part], momentum[part], lr=lr[part], **rule)
        assert torch.equal(whole, parts) and torch.equal(buffer, momentum)


@pytest.mark.parametrize("dims", [None, ()], ids=["no classes", "ragged"])
def test_frames_without_classes_are_fine(dims):
    """As a process has them that got no classes of a head."""
    empty = torch.empty(0, 9) if dims == () else torch.empty(0, 0, 9)
    assert int(ts.grassmann_step_(empty, empty.clone(), empty.clone(), lr=0.1, momentum=0.9, dims=dims)) == 0


def test_a_ragged_class_that_is_not_finite_disturbs_no_other():
    dims, n = (3, 1, 2), 9
    parts = [problem(1, k, n) for k in dims]
    start, grad, _ = (torch.cat([part[i][0] for part in parts]) for i in range(3))
    grad[3, 4] = math.nan
    weight = start.clone()
    assert int(ts.grassmann_step_(weight, grad, lr=0.5, dims=dims)) == 1
    moved = (weight != start).any(-1)
    assert moved.tolist() == [True, True, True, False, True, True]


def test_strided_inputs():
    start, grad, _ = problem(3, 4, 24)
    expected = start.clone()
    ts.grassmann_step_(expected, grad, lr=0.5)
    weight = start.clone()
    ts.grassmann_step_(weight, grad.mT.contiguous().mT, lr=0.5)
    assert torch.equal(weight, expected)
    row = grad[:1, :1].expand(3, 4, 24)
    a, b = start.clone(), start.clone()
    ts.grassmann_step_(a, row, lr=0.5)
    ts.grassmann_step_(b, row.contiguous(), lr=0.5)
    assert torch.equal(a, b)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_two_runs_are_bitwise_equal(retraction):
    (a, grad, m), (b, _, o) = problem(50, 8, 100, torch.float32), problem(50, 8, 100, torch.float32)
    for _ in range(3):
        ts.grassmann_step_(a, grad, m, lr=0.5, momentum=0.9, retraction=retraction)
        ts.grassmann_step_(b, grad, o, lr=0.5, momentum=0.9, retraction=retraction)
    assert torch.equal(a, b) and torch.equal(m, o)


# ------------------------------------------------------------------------------------------------------------ refusals


def frames(*shape, **options):
    return torch.zeros(shape, **options)


REFUSED = {
    "k > n": (ValueError, lambda: (frames(2, 5, 4), frames(2, 5, 4)), {}),
    "two dimensions without dims": (ValueError, lambda: (frames(5, 8), frames(5, 8)), {}),
    "three dimensions with dims": (ValueError, lambda: (frames(2, 3, 8), frames(2, 3, 8)), {"dims": (3, 3)}),
    "dims that do not add up": (ValueError, lambda: (frames(5, 8), frames(5, 8)), {"dims": (3, 3)}),
    "dims of zero": (ValueError, lambda: (frames(3, 8), frames(3, 8)), {"dims": (3, 0)}),
    "dims below zero": (ValueError, lambda: (frames(3, 8), frames(3, 8)), {"dims": (4, -1)}),
    "dims above n": (ValueError, lambda: (frames(9, 8), frames(9, 8)), {"dims": (9,)}),
    "k of zero": (ValueError, lambda: (frames(2, 0, 4), frames(2, 0, 4)), {}),
    "another gradient shape": (ValueError, lambda: (frames(2, 3, 4), frames(2, 3, 5)), {}),
    "another buffer shape": (
        ValueError,
        lambda: (frames(2, 3, 4), frames(2, 3, 4), frames(1, 3, 4)),
        {"momentum": 0.9},
    ),
    "momentum without a buffer": (ValueError, lambda: (frames(2, 3, 4), frames(2, 3, 4)), {"momentum": 0.9}),
    "lists of different lengths": (ValueError, lambda: ([frames(2, 3, 4)], [frames(2, 3, 4)] * 2), {}),
    "one frame, a list of gradients": ((TypeError, ValueError), lambda: (frames(2, 3, 4), [frames(2, 3, 4)]), {}),
    "expanded weight": (ValueError, lambda: (frames(1, 3, 4).expand(2, 3, 4), frames(2, 3, 4)), {}),
    "overlapping weight": (
        ValueError,
        lambda: (frames(2, 3, 4).view(-1).as_strided((2, 3, 4), (4, 4, 1)), frames(2, 3, 4)),
        {},
    ),
    "expanded buffer": (
        ValueError,
        lambda: (frames(2, 3, 4), frames(2, 3, 4), frames(1, 3, 4).expand(2, 3, 4)),
        {"momentum": 0.9},
    ),
    "unknown retraction": (ValueError, lambda: (frames(2, 3, 4), frames(2, 3, 4)), {"retraction": "exp"}),
    "unknown transport": (ValueError, lambda: (frames(2, 3, 4), frames(2, 3, 4)), {"transport": "vector"}),
    "lr per class of another length": (ValueError, lambda: (frames(2, 3, 4), frames(2, 3, 4)), {"lr": torch.ones(3)}),
    "parallel transport off the geodesic": (
        ValueError,
        lambda: (frames(2, 3, 4), frames(2, 3, 4)),
        {"transport": "parallel", "retraction": "qr"},
    ),
    "negative lr": (ValueError, lambda: (frames(2, 3, 4), frames(2, 3, 4)), {"lr": -0.1}),
    "lr nan": (ValueError, lambda: (frames(2, 3, 4), frames(2, 3, 4)), {"lr": math.nan}),
    "negative momentum": (ValueError, lambda: (frames(2, 3, 4),) * 2 + (frames(2, 3, 4),), {"momentum": -0.1}),
    "half precision": (TypeError, lambda: (frames(2, 3, 4).half(), frames(2, 3, 4).half()), {}),
    "bfloat16": (TypeError, lambda: (frames(2, 3, 4).bfloat16(), frames(2, 3, 4).bfloat16()), {}),
    "integers": (TypeError, lambda: (frames(2, 3, 4).long(), frames(2, 3, 4).long()), {}),
    "complex": (TypeError, lambda: (frames(2, 3, 4).cfloat(), frames(2, 3, 4).cfloat()), {}),
    "gradient of another dtype": (TypeError, lambda: (frames(2, 3, 4), frames(2, 3, 4).double()), {}),
    "not a tensor": (TypeError, lambda: ("frames", frames(2, 3, 4)), {}),
    "gradient not a tensor": (TypeError, lambda: (frames(2, 3, 4), None), {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    error, inputs, rule = REFUSED[case]
    inputs = inputs()
    before = [t.clone() for t in inputs if isinstance(t, torch.Tensor)]
    with pytest.raises(error):
        ts.grassmann_step_(*inputs, **({"lr": 0.1} | rule))
    assert all(
        torch.equal(t, b) for t, b in zip((t for t in inputs if isinstance(t, torch.Tensor)), before, strict=True)
    )


def test_an_error_names_the_shape():
    with pytest.raises(ValueError, match=r"5.*4|k"):
        ts.grassmann_step_(frames(2, 5, 4), frames(2, 5, 4), lr=0.1)


def test_a_bad_entry_late_in_a_list_leaves_the_first_alone():
    weight, grad, _ = problem(2, 3, 8)
    start = weight.clone()
    with pytest.raises(ValueError):
        ts.grassmann_step_([weight, frames(1, 5, 4).double()], [grad, frames(1, 5, 4).double()], lr=0.1)
    assert torch.equal(weight, start)


# ------------------------------------------------------------------------------------------------------- being an op


def test_the_gradient_is_left_alone():
    weight, grad, buffer = problem(2, 3, 8)
    before = grad.clone()
    ts.grassmann_step_(weight, grad, buffer, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, maximize=True)
    assert torch.equal(grad, before)


def test_autograd_sees_the_change():
    weight, grad, _ = problem(2, 3, 8)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = (x[:, None] * weight).sum()  # keeps `weight` for the gradient of x
    ts.grassmann_step_(weight, grad, lr=0.1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("momentum, stiefel", [(0.0, False), (0.9, False), (0.9, True)])
def test_opcheck(momentum, stiefel, ragged):
    weight, grad, buffer = problem(3, 4, 24, torch.float32)
    if ragged:
        weight, grad, buffer = (t.reshape(12, 24) for t in (weight, grad, buffer))
    start = torch.tensor([0, 3, 8, 12] if ragged else [], dtype=torch.int64)
    lr = torch.tensor(0.1, dtype=torch.float64)
    arguments = ([weight], [grad], [buffer] if momentum else [], start, lr, momentum, 0.0, 0.0, False, False, 0, False,
                 stiefel)
    torch.library.opcheck(torch.ops.torch_subspace.rsgd_.default, arguments)


@pytest.mark.parametrize("as_list", [False, True])
def test_compiles_without_a_break(as_list):
    def step(weight, grad, buffer):
        if as_list:
            return ts.grassmann_step_([weight, weight * 1], [grad, grad], [buffer, buffer * 1], lr=0.3, momentum=0.9)
        return ts.grassmann_step_(weight, grad, buffer, lr=0.3, momentum=0.9, nesterov=True)

    eager, compiled = problem(3, 4, 24), problem(3, 4, 24)
    skipped = step(*eager)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled), skipped)
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[2], compiled[2])
