"""The optimisers in training: a falling loss, resuming, copies, AMP, torch.compile and several processes."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from helpers import frame_error, same
from optim_cases import ADAM, SGD, build, every_optimiser, frame, marked, noise, separable, small_model, train

import torch_subspace as ts


def frame_errors(model):
    for block in model[-1].weight.split(1 if model[-1].dims is None else model[-1].dims):
        yield frame_error(block.reshape(-1, block.shape[-1]))


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
    assert same(straight.parameters(), second.parameters())


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


@pytest.mark.parametrize("make", [lambda p: ts.RiemannianSGD(p, lr=0.1, momentum=0.9),
                                  lambda p: ts.RiemannianAdamW(p, lr=0.1, amsgrad=True)], ids=["sgd", "adam"])
def test_a_model_that_is_moved_after_a_step(make):
    def step(head, optimiser, x):
        optimiser.zero_grad()
        head.loss(x, torch.arange(4)).backward()
        optimiser.step()

    torch.manual_seed(0)
    head, x = ts.GrassmannLinear(6, 4, 2), torch.randn(4, 6)
    optimiser = make(head.parameters())
    step(head, optimiser, x)
    other = copy.deepcopy((head, optimiser))
    step(head, optimiser, x)
    other[0].double()
    step(*other, x.double())
    assert frame_error(other[0].weight) < 1e-12
    torch.testing.assert_close(other[0].weight.float(), head.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, theirs", [(SGD, torch.optim.SGD), (ADAM, torch.optim.AdamW)])
def test_a_checkpoint_of_torchs_optimiser_does_not_make_frames_euclidean(kind, theirs):
    p = frame()
    optimiser = kind(marked(p), lr=0.5)
    optimiser.load_state_dict(theirs([p], lr=0.125, weight_decay=0.0).state_dict())
    group = optimiser.param_groups[0]
    assert (group["manifold"], group["lr"], group["retraction"]) == ("grassmann", 0.125, "geodesic")
    p.grad = noise(p, 0)
    optimiser.step()
    assert frame_error(p) <= 1e-12


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
    assert same(model.parameters(), other.parameters())
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
    assert same(plain.parameters(), scaled.parameters())


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
    assert same(plain.parameters(), wrapped.parameters())
