"""The optimisers' Euclidean groups: torch's own, bit for bit."""

import itertools

import pytest
import torch
from helpers import same
from optim_cases import ADAM, SGD, frame, marked, noise


def outcome(kind, params, options, with_frames):
    """The parameters after four steps with fixed gradients, or the error."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "weight_decay": 0.2}]
    if with_frames:
        groups[1:1] = marked(frame(), lr=0.1, weight_decay=0.0)
    try:
        optimiser = kind(groups, **options)
        for step in range(4):
            for group in optimiser.param_groups:
                for i, p in enumerate(group["params"]):
                    p.grad = None if step == i == 1 else noise(p, step + 10 * i)
            optimiser.step()
    except Exception as error:
        return type(error), str(error)
    return params


def check_against(ours, theirs, grid, extra):
    start = [noise(torch.empty(shape), 99) for shape in ((3, 4), (7,), (2, 3, 3))]
    compared = 0
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values, strict=True)) | extra
        expected = outcome(theirs, start, options, False)
        actual = outcome(ours, start, options, True)
        if isinstance(expected, tuple):  # what torch refuses is refused in torch's words
            assert actual == expected, options
            continue
        assert not isinstance(actual, tuple), (options, actual)
        assert same(actual, expected), options
        compared += 1
    return compared


IMPLEMENTATIONS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"foreach": True, "fused": True}]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_euclidean_sgd_is_torchs_bit_for_bit(lr, implementation):
    grid = {
        "momentum": [0.0, 0.9],
        "dampening": [0.0, 0.3],
        "weight_decay": [0.0, 0.1],
        "nesterov": [False, True],
        "maximize": [False, True],
    }
    compared = check_against(SGD, torch.optim.SGD, grid, {"lr": lr} | implementation)
    assert compared or len(implementation) == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_euclidean_adamw_is_torchs_bit_for_bit(lr, implementation):
    grid = {
        "betas": [(0.9, 0.999), (0.0, 0.5)],
        "eps": [1e-8, 1e-3],
        "weight_decay": [0.0, 0.1],
        "amsgrad": [False, True],
        "maximize": [False, True],
    }
    compared = check_against(ADAM, torch.optim.AdamW, grid, {"lr": lr} | implementation)
    assert compared or implementation.get("foreach")


@pytest.mark.parametrize(
    "kind, theirs, options",
    [
        (SGD, torch.optim.SGD, {"lr": -1.0}),
        (SGD, torch.optim.SGD, {"momentum": -1.0}),
        (SGD, torch.optim.SGD, {"weight_decay": -1.0}),
        (SGD, torch.optim.SGD, {"nesterov": True}),
        (SGD, torch.optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        (SGD, torch.optim.SGD, {"lr": torch.ones(2)}),
        (SGD, torch.optim.SGD, {"fused": True, "differentiable": True}),
        (ADAM, torch.optim.AdamW, {"lr": -1.0}),
        (ADAM, torch.optim.AdamW, {"betas": (1.0, 0.9)}),
        (ADAM, torch.optim.AdamW, {"eps": -1.0}),
        (ADAM, torch.optim.AdamW, {"weight_decay": -1.0}),
    ],
)
def test_a_bad_option_gives_torchs_error(kind, theirs, options):
    with pytest.raises((ValueError, RuntimeError)) as expected:
        theirs([frame()], **options)
    with pytest.raises(expected.type) as actual:
        kind([frame()], **options)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_bad_parameters(kind):
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
    with pytest.raises(TypeError):
        kind(frame())
    with pytest.raises(TypeError):
        kind([1.0])


def test_without_a_manifold_a_frame_is_an_ordinary_parameter():
    a, b = frame(), frame()
    a.grad = b.grad = noise(a, 1)
    SGD([a], lr=0.1).step()
    torch.optim.SGD([b], lr=0.1).step()
    assert torch.equal(a, b)
