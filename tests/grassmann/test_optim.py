"""The optimisers: learning rates, torch's habits, what is refused, and the groups of a model's parameters."""

import copy

import pytest
import torch
from helpers import same
from optim_cases import ADAM, SGD, build, every_optimiser, frame, marked, noise, separable, small_model, train
from torch.optim.optimizer import register_optimizer_step_post_hook

import torch_subspace as ts

# ------------------------------------------------------------------------------------------------- learning rates


def test_lr_factor_is_applied_once():
    p, q = frame(), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [q]}, {"params": [p], "manifold": "grassmann", "lr_factor": 0.1}]
    optimiser = SGD(groups, lr=0.5)
    assert [group["lr"] for group in optimiser.param_groups] == [0.5, 0.05]
    again = SGD(optimiser.param_groups, **optimiser.defaults)
    assert [group["lr"] for group in again.param_groups] == [0.5, 0.05]
    again.load_state_dict(optimiser.state_dict())
    assert [group["lr"] for group in again.param_groups] == [0.5, 0.05]


def test_a_tensor_lr_is_scaled_without_changing_the_users():
    lr = torch.tensor(0.5)
    optimiser = SGD([{"params": [frame()], "manifold": "grassmann", "lr_factor": 0.5}], lr=lr)
    assert float(optimiser.param_groups[0]["lr"]) == 0.25 and float(lr) == 0.5


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch),
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8),
        lambda opt: torch.optim.lr_scheduler.LinearLR(opt),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, [0.5, 0.05], total_steps=9),
    ],
    ids=["lambda", "step", "cosine", "linear", "one-cycle"],
)
def test_schedulers_keep_the_ratio(schedule, lr):
    p, q = frame(), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    groups = [{"params": [q]}, {"params": [p], "manifold": "grassmann", "lr_factor": 0.1}]
    optimiser = SGD(groups, lr=lr, momentum=0.9)
    scheduler = schedule(optimiser)
    for step in range(8):
        p.grad, q.grad = noise(p, step), noise(q, step)
        optimiser.step()
        scheduler.step()
        rates = [float(group["lr"]) for group in optimiser.param_groups]
        assert rates[1] == pytest.approx(0.1 * rates[0], rel=1e-5)


# ---------------------------------------------------------------------------------------------------- torch's habits


@every_optimiser
def test_closure_and_hooks_run_once(name):
    model = small_model()
    torch.optim.SGD(model.parameters())  # torch wraps a class's step when the class is first used
    torch.optim.AdamW(model.parameters())
    optimiser = build(name, model)
    x, y = separable()
    calls = []

    def closure():
        calls.append("closure")
        assert torch.is_grad_enabled()
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimiser.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimiser.register_step_post_hook(lambda *_: calls.append("post"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    try:
        first = optimiser.step(closure)
        assert optimiser.step(closure) < first
    finally:
        handle.remove()
    assert calls == ["pre", "closure", "post", "global"] * 2


@every_optimiser
def test_gradients_are_left_alone_and_none_is_skipped(name):
    model = small_model()
    optimiser = build(name, model, maximize=True)
    train(model, optimiser, 1)
    gradients = [p.grad.clone() for p in model.parameters()]
    optimiser.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))

    before = copy.deepcopy(model)
    optimiser.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimiser.step()
    assert same(model.parameters(), before.parameters())
    optimiser.zero_grad(set_to_none=False)


@every_optimiser
def test_a_frozen_head_stays(name):
    model = small_model()
    model[-1].weight.requires_grad_(False)
    start = model[-1].weight.clone()
    train(model, build(name, model), 2)
    assert torch.equal(model[-1].weight, start)


def test_add_param_group():
    p, q = frame(), frame(seed=1)
    optimiser = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    optimiser.add_param_group({"params": p, "manifold": "grassmann", "lr_factor": 0.5, "retraction": "qr"})
    assert optimiser.param_groups[1]["lr"] == 0.25
    with pytest.raises(ValueError, match="retraction"):
        optimiser.add_param_group({"params": q, "manifold": "grassmann", "retraction": "exp"})
    assert len(optimiser.param_groups) == 2
    optimiser.add_param_group({"params": q, "manifold": "grassmann"})  # what was refused may come again, put right
    p.grad, q.grad = noise(p, 0), noise(q, 0)
    optimiser.step()


def test_named_parameters():
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    groups = [
        {"params": list(model.named_parameters())[:-1]},
        {"params": [("head", model[-1].weight)], "manifold": "grassmann"},
    ]
    optimiser = SGD(groups, lr=0.1)
    assert [group["param_names"] for group in optimiser.param_groups] == [names[:-1], ["head"]]
    train(model, optimiser, 1)


REFUSED = {
    "unknown manifold": (ValueError, "manifold", lambda: [{"params": [frame()], "manifold": "sphere"}], {}),
    "unknown retraction": (ValueError, "retraction", lambda: marked(frame()), {"retraction": "exp"}),
    "parallel transport but no geodesic": (
        ValueError,
        "follows geodesics",
        lambda: marked(frame(), retraction="qr"),
        {"transport": "parallel"},
    ),
    "unknown transport": (ValueError, "transport", lambda: marked(frame()), {"transport": "vector"}),
    "k > n": (ValueError, r"k <= n.*\(1, 4, 3\)", lambda: marked(torch.ones(1, 4, 3)), {}),
    "a matrix without dims": (ValueError, "C, k, n", lambda: marked(torch.ones(4, 8)), {}),
    "dims that do not add up": (ValueError, "sum of dims", lambda: marked(torch.ones(4, 8), dims=(1, 2)), {}),
    "dims above n": (ValueError, "dims <= n", lambda: marked(torch.ones(4, 3), dims=(4,)), {}),
    "k of zero": (ValueError, "0 < k", lambda: marked(torch.ones(4, 0, 3)), {}),
    "dims of zero": (ValueError, "0 < dims", lambda: marked(torch.ones(4, 8), dims=(4, 0)), {}),
    "dims of three dimensions": (ValueError, "sum of dims", lambda: marked(frame(), dims=(4, 4, 4)), {}),
    "half precision": (TypeError, "float32 master", lambda: marked(frame(dtype=torch.bfloat16)), {}),
    "differentiable": (ValueError, "differentiable", lambda: marked(frame()), {"differentiable": True}),
}


@pytest.mark.parametrize("kind", [SGD, ADAM])
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_is_not_a_frame(case, kind):
    error, message, groups, options = REFUSED[case]
    with pytest.raises(error, match=message):
        kind(groups(), **options)


def test_weight_decay_of_frames():
    assert SGD(marked(frame()), weight_decay=0.1).param_groups[0]["weight_decay"] == 0
    assert ADAM(marked(frame())).param_groups[0]["weight_decay"] == 0
    with pytest.raises(ValueError, match="weight_decay=0"):
        ADAM(marked(frame(), weight_decay=0.1))


# -------------------------------------------------------------------------------------------------------- param_groups


def test_param_groups():
    model = torch.nn.ModuleDict(
        {
            "body": torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)),
            "a": ts.GrassmannLinear(6, 5, 2),
            "b": ts.GrassmannLinear(6, 3, 4),
            "ragged": ts.GrassmannLinear(6, 2, (1, 3)),
            "twin": ts.GrassmannLinear(6, 2, (1, 3)),
            "other": ts.GrassmannLinear(6, 2, (2, 2)),
        }
    )
    model["again"] = model["a"]
    model["tied"] = torch.nn.Linear(4, 6)
    model["tied"].weight = model["body"][0].weight
    model["b"].weight.requires_grad_(False)
    body, tied = model["body"], model["tied"]

    def check(groups, expected):
        assert [[id(p) for p in group["params"]] for group in groups] == [[id(p) for p in part] for part in expected]

    heads = (
        [model["a"].weight, model["b"].weight],
        [model["ragged"].weight, model["twin"].weight],
        [model["other"].weight],
    )
    groups = ts.param_groups(model, weight_decay=0.1, frame_lr_factor=0.3)
    check(groups, [[*body.parameters(), tied.bias], *heads])
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0, 0]
    assert [group.get("manifold") for group in groups] == [None] + ["grassmann"] * 3
    assert [group.get("lr_factor") for group in groups] == [None, 0.3, 0.3, 0.3]
    assert [group.get("dims") for group in groups] == [None, None, (1, 3), (2, 2)]
    optimiser = SGD(groups, lr=0.1)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.1, 0.03, 0.03, 0.03])

    groups = ts.param_groups(model, weight_decay=0.1, no_decay=("*.bias", "body.1.*"))
    check(groups, [[body[0].weight], [body[0].bias, *body[1].parameters(), tied.bias], *heads])
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0, 0, 0]
    assert len(ts.param_groups(model, no_decay="*")) == 4

    groups = ts.param_groups(model, lr=0.5, frame_lr_factor=0.5)
    for _ in range(2):  # rates in the groups are final
        assert [group["lr"] for group in groups] == [0.5, 0.25, 0.25, 0.25]
        SGD(groups, lr=7.0)

    check(ts.param_groups(model["a"]), [[model["a"].weight]])
    check(ts.param_groups(body), [list(body.parameters())])
    assert ts.param_groups(torch.nn.ReLU()) == []
    with pytest.raises(ValueError, match="frame_lr_factor"):
        ts.param_groups(model, frame_lr_factor=-1.0)
