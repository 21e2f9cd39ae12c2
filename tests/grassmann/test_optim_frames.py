"""The optimisers' frames: the Riemannian rules against the reference, and classes that are not finite."""

import copy
import math
import warnings

import pytest
import reference as ref
import torch
from helpers import frame_error, optional, same
from optim_cases import ADAM, OPTIMISERS, SGD, frame, marked, noise

import torch_subspace as ts
from torch_subspace.grassmann import groups
from torch_subspace.grassmann.frames import moved_by_others

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
    assert same(params, alone)
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


@pytest.mark.parametrize("dims", [3, (2, 3, 1, 3, 2)])
def test_adamw_takes_many_classes_by_pieces_to_the_bit(dims, monkeypatch):
    results = []
    for entries in (groups.PIECE, 40):
        monkeypatch.setattr(groups, "PIECE", entries)
        torch.manual_seed(0)
        head = ts.GrassmannLinear(16, 5, dims)
        optimiser = ADAM(head.parameters(), lr=0.1, amsgrad=True)
        for seed in range(3):
            head.weight.grad = noise(head.weight, seed)
            optimiser.step()
        assert not moved_by_others(head.weight)
        results.append([head.weight, *optimiser.state[head.weight].values()])
    assert same(*results)


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
        assert frame_error(param) <= 1e-6


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


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_rates_of_geoopt_convert_by_the_root_of_kn(k, eps):
    """Its second moment is a sum over k n entries, ours their mean; retractions differ in the third order of a step."""
    geoopt = optional("geoopt")
    n, lr = 9, 1e-3
    w = torch.linalg.qr(noise(torch.empty(5, n, k).double(), 0)).Q
    x, ours = noise(torch.empty(7, n).double(), 1), w.mT.clone(memory_format=torch.contiguous_format).requires_grad_()
    theirs = geoopt.ManifoldParameter(w.clone(), manifold=geoopt.EuclideanStiefel())
    mine = ADAM([{"params": [ours], "manifold": "grassmann"}], lr=lr / math.sqrt(k * n), eps=eps / math.sqrt(k * n))
    other = geoopt.optim.RiemannianAdam([theirs], lr=lr, eps=eps)
    for _ in range(5):
        for opt, frames in ((mine, ours), (other, theirs.mT)):
            opt.zero_grad()
            torch.einsum("bn,ckn->bck", x, frames).square().sum(-1).cos().sum().backward()
            opt.step()
    moved = (ours.mT @ ours - w @ w.mT).abs().max().detach()
    assert moved > 5e-4
    torch.testing.assert_close(ours.mT @ ours, theirs @ theirs.mT, rtol=0, atol=1e-4 * float(moved))
