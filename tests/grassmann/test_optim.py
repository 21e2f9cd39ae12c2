"""The optimisers: torch's own bit for bit on Euclidean groups, the Riemannian rule on frames, torch's habits."""

import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import reference as ref
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import torch_subspace as ts

SGD, ADAM = ts.RiemannianSGD, ts.RiemannianAdamW
OPTIMISERS = {
    "sgd": (SGD, {"lr": 0.05}),
    "momentum": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "parallel": (SGD, {"lr": 0.05, "momentum": 0.9, "transport": "parallel"}),
    "adamw": (ADAM, {"lr": 0.01}),
    "amsgrad": (ADAM, {"lr": 0.01, "amsgrad": True}),
}
every_optimiser = pytest.mark.parametrize("name", OPTIMISERS)


def build(name, model, **options):
    kind, defaults = OPTIMISERS[name]
    return kind(ts.param_groups(model, weight_decay=0.01, frame_lr_factor=0.5), **(defaults | options))


def small_model(subspace_dim=3, seed=0):
    torch.manual_seed(seed)
    head = ts.GrassmannLinear(16, 5, subspace_dim)
    return torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), head)


def separable(count=100):
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(count) % 5
    return torch.randn(5, 8, generator=generator)[y] + 0.1 * torch.randn(count, 8, generator=generator), y


def train(model, optimiser, steps, scheduler=None):
    x, y = separable()
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def frame(classes=4, k=3, n=9, dtype=torch.float64, seed=0):
    weight = torch.randn(classes, k, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(ref.orthonormal(weight).to(dtype))


def noise(p, seed):
    return torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1000 + seed))


def marked(*params, **options):
    return [{"params": list(params), "manifold": "grassmann"} | options]


def frame_errors(model):
    for block in model[-1].weight.detach().double().split(1 if model[-1].dims is None else model[-1].dims):
        block = block.reshape(-1, block.shape[-1])
        yield (block @ block.T - torch.eye(len(block), dtype=torch.float64)).abs().max().item()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------- Euclidean half


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
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), options
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


# ------------------------------------------------------------------------------------------------------- frames: SGD


@pytest.mark.parametrize("weight_decay", [0.0, 0.1, torch.tensor(0.1)])
@pytest.mark.parametrize(
    "retraction, transport",
    [("geodesic", "parallel"), ("geodesic", "project"), ("polar", "project"), ("qr", "project"), ("cayley", "project")],
)
def test_sgd_follows_the_reference(retraction, transport, weight_decay):
    p = frame()
    weight, buffer = p.detach().clone(), None
    rule = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "maximize": True}
    group = marked(p, weight_decay=weight_decay, retraction=retraction)
    optimiser = SGD(group, transport=transport, **rule)
    for step in range(4):
        grad = p.grad = noise(p, step)
        optimiser.step()
        started = rule if buffer is not None else rule | {"dampening": 0.0}  # as in torch, a buffer starts undampened
        buffer = torch.zeros_like(weight) if buffer is None else buffer
        started = started | {"weight_decay": float(weight_decay), "transport_by": transport}
        weight, buffer = ref.rsgd_step(weight, grad, buffer, retraction=retraction, **started)
        torch.testing.assert_close(p.detach(), weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(optimiser.state[p]["momentum_buffer"], buffer, rtol=0, atol=1e-11)


def test_sgd_with_nesterov_follows_the_reference():
    p = frame()
    weight, buffer = p.detach().clone(), torch.zeros_like(p)
    optimiser = SGD(marked(p), lr=0.1, momentum=0.9, nesterov=True)
    for step in range(3):
        grad = p.grad = noise(p, step)
        optimiser.step()
        weight, buffer = ref.rsgd_step(weight, grad, buffer, lr=0.1, momentum=0.9, nesterov=True)
        torch.testing.assert_close(p.detach(), weight, rtol=0, atol=1e-12)


def test_frames_of_one_group_may_start_at_different_steps_and_have_different_dtypes():
    params = [frame(seed=i, dtype=dtype) for i, dtype in enumerate([torch.float32, torch.float64, torch.float64])]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    rule = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimisers = [SGD(marked(*params), **rule)] + [SGD(marked(p), **rule) for p in alone]
    for step in range(4):
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            p.grad = q.grad = noise(p, 10 * step + i) if step >= i else None
        for optimiser in optimisers:
            optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))
    assert [optimisers[0].state[p]["momentum_buffer"].dtype for p in params] == [p.dtype for p in params]


def test_sgd_without_momentum_keeps_no_state():
    p = frame()
    p.grad = noise(p, 0)
    optimiser = SGD(marked(p), lr=0.1)
    optimiser.step()
    assert not optimiser.state_dict()["state"]


@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)])
@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_lr_as_a_tensor(kind, lr):
    p, q = frame(), frame()
    p.grad = q.grad = noise(p, 0)
    kind(marked(p), lr=lr).step()
    kind(marked(q), lr=float(lr)).step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------------------------ frames: AdamW


def adam_reference(weight, grads, *, lr, beta1, beta2, eps, amsgrad, maximize):
    """Riemannian AdamW of one frame (k, n) by the book, in float64."""
    weight = weight.detach().double()[None]
    mean, square, peak = torch.zeros_like(weight), 0.0, 0.0
    for step, grad in enumerate(grads, 1):
        grad = grad.double()[None]
        grad = horizontal = ref.horizontal(ref.orthonormal(weight), grad)
        square = beta2 * square + (1 - beta2) * horizontal.square().mean().item()
        peak = max(peak, square)
        root = math.sqrt((peak if amsgrad else square) / (1 - beta2**step))
        rate = lr / ((1 - beta1**step) * (root + eps))
        weight, mean = ref.rsgd_step(weight, grad, mean, lr=rate, momentum=beta1, dampening=beta1, maximize=maximize)
    return weight[0]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_follows_the_reference_class_by_class(maximize, amsgrad):
    p = frame()
    start, grads = p.detach().clone(), [noise(p, step) / (1 + step) for step in range(5)]
    optimiser = ADAM(marked(p), lr=0.02, betas=(0.8, 0.95), eps=1e-3, amsgrad=amsgrad, maximize=maximize)
    for grad in grads:
        p.grad = grad
        optimiser.step()
    rule = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "amsgrad": amsgrad, "maximize": maximize}
    for c in range(len(start)):
        expected = adam_reference(start[c], [grad[c] for grad in grads], **rule)
        torch.testing.assert_close(p[c].detach(), expected, rtol=0, atol=1e-7)  # the second moment is kept in p's dtype


def test_adamw_does_not_see_the_basis():
    p = frame()
    rotation = torch.linalg.qr(torch.randn(4, 3, 3, dtype=torch.float64))[0]
    q = torch.nn.Parameter(rotation @ p.detach())
    optimisers = ADAM(marked(p), lr=0.05), ADAM(marked(q), lr=0.05)
    for step in range(5):
        p.grad = noise(p, step)
        q.grad = rotation @ p.grad
        for optimiser in optimisers:
            optimiser.step()
    torch.testing.assert_close(q.detach(), rotation @ p.detach(), rtol=0, atol=1e-12)


def test_adamw_does_not_see_the_scale_of_a_class():
    p, q = frame(), frame()
    scale = torch.tensor([1e-3, 1.0, 1e3, 1e6], dtype=torch.float64)[:, None, None]
    optimisers = ADAM(marked(p), lr=0.05, eps=0.0), ADAM(marked(q), lr=0.05, eps=0.0)
    for step in range(3):
        p.grad = noise(p, step)
        q.grad = scale * p.grad
        for optimiser in optimisers:
            optimiser.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_does_not_amplify_the_rounding_of_a_vertical_gradient(dtype):
    p, square = frame(dtype=dtype), frame(2, 3, 3, dtype=dtype)  # with k = n there is nowhere to go at all
    start = p.detach().clone(), square.detach().clone()
    optimiser = ADAM(marked(p, square), lr=0.1)
    for step in range(5):
        p.grad = torch.randn(4, 3, 3, dtype=dtype) @ p.detach()
        square.grad = noise(square, step)
        optimiser.step()
    for param, before in zip((p, square), start, strict=True):
        torch.testing.assert_close(param.detach(), before, rtol=0, atol=2e-3 if dtype == torch.float32 else 1e-7)
        gram = (param @ param.mT).detach()
        torch.testing.assert_close(gram, torch.eye(3, dtype=dtype).expand_as(gram), rtol=0, atol=1e-6)


def test_a_ragged_frame_is_stepped_class_by_class():
    dims = (3, 1, 3, 5)
    parts = [frame(1, k, 9, seed=i) for i, k in enumerate(dims)]
    whole = torch.nn.Parameter(torch.cat([p.detach()[0] for p in parts]))
    for kind, options in ((SGD, {"momentum": 0.9}), (ADAM, {})):
        ragged = kind(marked(whole, dims=dims), lr=0.05, **options)
        uniform = kind(marked(*parts), lr=0.05, **options)
        for step in range(3):
            whole.grad = noise(whole, step)
            for p, grad in zip(parts, whole.grad.split(dims), strict=True):
                p.grad = grad[None].clone()
            ragged.step()
            uniform.step()
        torch.testing.assert_close(whole.detach(), torch.cat([p.detach()[0] for p in parts]), rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------ training


@every_optimiser
@pytest.mark.parametrize("subspace_dim", [3, (1, 2, 3, 4, 5)], ids=["uniform", "ragged"])
def test_training_lowers_the_loss_and_keeps_the_frames(subspace_dim, name):
    model = small_model(subspace_dim)
    start = model[-1].weight.detach().clone()
    losses = train(model, build(name, model), 60)
    assert losses[-1] < 0.5 * losses[0]
    assert max(frame_errors(model)) < 5e-7
    assert (model[-1].weight - start).abs().max() > 0.01


@every_optimiser
def test_resume_is_bitwise(name):
    straight, first, second = (small_model(seed=s) for s in (0, 0, 1))
    optimiser = build(name, straight)
    train(straight, optimiser, 10, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10))

    optimiser = build(name, first)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10)
    train(first, optimiser, 4, scheduler)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (first, optimiser, scheduler)], file)
    file.seek(0)
    optimiser = build(name, second, lr=7.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10)
    for part, state in zip((second, optimiser, scheduler), torch.load(file), strict=True):
        part.load_state_dict(state)
    train(second, optimiser, 6, scheduler)
    assert same(straight, second)


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_resume_keeps_the_dtype_of_state(default):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        p, q = frame(dtype=torch.float32), frame(seed=1)
        p.grad, q.grad = noise(p, 0), noise(q, 0)
        optimiser = ADAM(marked(p, q))
        optimiser.step()
        state = optimiser.state_dict()["state"]
        loaded = ADAM(marked(p, q))
        loaded.load_state_dict(optimiser.state_dict())
        for i, saved in state.items():
            for key, value in saved.items():
                other = loaded.state_dict()["state"][i][key]
                assert torch.equal(value, other) and value.dtype == other.dtype
    finally:
        torch.set_default_dtype(previous)


@pytest.mark.parametrize("kind, theirs", [(SGD, torch.optim.SGD), (ADAM, torch.optim.AdamW)])
def test_a_checkpoint_of_torchs_optimiser_does_not_make_frames_euclidean(kind, theirs):
    p = frame()
    optimiser = kind(marked(p), lr=0.5)
    optimiser.load_state_dict(theirs([p], lr=0.125, weight_decay=0.0).state_dict())
    group = optimiser.param_groups[0]
    assert (group["manifold"], group["lr"], group["retraction"]) == ("grassmann", 0.125, "geodesic")
    p.grad = noise(p, 0)
    optimiser.step()
    gram = (p @ p.mT).detach()
    torch.testing.assert_close(gram, torch.eye(3, dtype=gram.dtype).expand_as(gram), rtol=0, atol=1e-12)


@every_optimiser
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_as_the_original(clone, name):
    model = small_model()
    optimiser = build(name, model)
    train(model, optimiser, 2)
    other, other_optimiser = clone((model, optimiser))
    train(model, optimiser, 2)
    train(other, other_optimiser, 2)
    assert same(model, other)
    assert other_optimiser.skipped_frames == 0


# -------------------------------------------------------------------------------------------------------- AMP, compile


@every_optimiser
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler(clip, fused, name):
    plain, scaled = small_model(), small_model()
    optimiser, other = build(name, plain, fused=fused), build(name, scaled, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = separable()
    for step in range(5):
        optimiser.zero_grad(), other.zero_grad()
        torch.nn.functional.cross_entropy(plain(x), y).backward()
        scaler.scale(torch.nn.functional.cross_entropy(scaled(x), y)).backward()
        before = copy.deepcopy((scaled.state_dict(), other.state_dict()))
        overflow = step in (1, 3)
        if overflow:
            scaled[-1].weight.grad[1, 0, 0] = math.inf
        if clip:
            scaler.unscale_(other)
            torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        scaled_grad = scaled[-1].weight.grad.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            scaler.step(other)
        if overflow:  # the whole step is left out, buffers included
            after = other.state_dict()["state"]
            assert torch.equal(scaled[-1].weight, before[0]["3.weight"])
            for index, state in before[1]["state"].items():
                for key in state.keys() - {"step"}:
                    assert torch.equal(state[key], after[index][key])
        else:
            optimiser.step()
        if fused and not clip:
            torch.testing.assert_close(scaled[-1].weight.grad, scaled_grad, rtol=0, atol=0, equal_nan=True)
        scaler.update()
    assert scaler.get_scale() == 2.0**8
    assert int(other.skipped_frames) == 0
    assert same(plain, scaled)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_step_compiles(name):
    eager, compiled = small_model(), small_model()
    optimiser, other = build(name, eager), build(name, compiled)
    step = torch.compile(other.step, backend="aot_eager")
    x, y = separable()
    for _ in range(4):
        for model, opt, advance in ((eager, optimiser, optimiser.step), (compiled, other, step)):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            advance()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_under_autocast_the_step_keeps_its_precision(kind):
    p, q = frame(dtype=torch.float32), frame(dtype=torch.float32)
    p.grad = q.grad = noise(p, 0)
    kind(marked(p), lr=0.1).step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kind(marked(q), lr=0.1).step()
    assert torch.equal(p, q)


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
    assert same(model, before)
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
    "unknown manifold": (ValueError, "manifold", lambda: [{"params": [frame()], "manifold": "stiefel"}], {}),
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


@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_a_sparse_gradient_is_refused_before_anything_moves(kind):
    p, q = frame(dtype=torch.float32), torch.nn.Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(4, 3, 9).to_sparse(), torch.ones(3)
    with pytest.raises(RuntimeError, match="dense"):
        kind([{"params": [q]}] + marked(p)).step()
    assert torch.equal(q, torch.ones(3))


# ------------------------------------------------------------------------------------------------- non-finite classes


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_class_with_a_bad_gradient_waits_while_the_others_move(bad, name):
    kind, options = OPTIMISERS[name]
    p, q = frame(), frame()
    optimiser, clean = kind(marked(p), **options), kind(marked(q), **options)
    for opt, param in ((optimiser, p), (clean, q)):
        param.grad = noise(param, 0)
        opt.step()
    before, state = p.detach().clone(), copy.deepcopy(optimiser.state_dict()["state"])
    p.grad, q.grad = noise(p, 1), noise(q, 1)
    p.grad[2, 1, 4] = bad
    clean.step()
    with pytest.warns(RuntimeWarning, match="1 class.*parameter group 0") as record:
        optimiser.step()
    assert record[0].filename == __file__
    others = [0, 1, 3]
    assert torch.equal(p[others], q[others]) and torch.equal(p[2], before[2])
    for key, value in optimiser.state_dict()["state"].get(0, {}).items():
        assert torch.equal(value[2], state[0][key][2]), key
        assert torch.equal(value[others], clean.state_dict()["state"][0][key][others]), key
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimiser.step()  # once is enough
    assert optimiser.skipped_frames == 2


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


def test_zero_redundancy_optimiser_and_ddp():
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed.optim import ZeroRedundancyOptimizer

    plain, wrapped = small_model(), small_model()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(wrapped)
        options = {"lr": 0.05, "momentum": 0.9}
        groups = ts.param_groups(model, lr=0.05, weight_decay=0.01, frame_lr_factor=0.5)
        sharded = ZeroRedundancyOptimizer(groups, SGD, **options)
        train(model, sharded, 4)
        train(plain, SGD(ts.param_groups(plain, weight_decay=0.01, frame_lr_factor=0.5), **options), 4)
    finally:
        distributed.destroy_process_group()
    assert same(plain, wrapped)
