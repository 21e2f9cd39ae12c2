"""Steps of the classes that a sparse gradient names: the dense optimiser's, once those left out have caught up."""

import copy
import math

import pytest
import torch
from helpers import close, frame_error
from optim_cases import ADAM, OPTIMISERS, SGD, frame, marked, noise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torch_subspace as ts
from torch_subspace.grassmann.frames import moved_by_others

SUBSETS = [[0, 2], [2], [], [1, 2, 3], [0], [3], [0, 1, 2, 3], [2]]
MOMENTUM = {"lr": 0.05, "momentum": 0.9, "transport": "parallel"}


def named(p, classes, seed, scale=1.0):
    """(sparse, dense) gradients of the same numbers."""
    dense = torch.zeros_like(p)
    dense[classes] = scale * noise(p, seed)[classes]
    index = torch.tensor(classes, dtype=torch.int64)
    return torch.sparse_coo_tensor(index[None], dense[classes], p.shape, check_invariants=True), dense


def both(kind, subsets=SUBSETS, change=None, scale=1.0, **options):
    """A weight and its optimiser, under sparse and under dense gradients."""
    params = frame(), frame()
    opts = [kind(marked(p), **options) for p in params]
    for step, classes in enumerate(subsets):
        for p, opt, grad in zip(params, opts, named(params[0], classes, step, scale)):
            p.grad = grad
            opt.step()
        if change:
            change(step, *opts)
    return params, opts


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"dampening": 0.3, "maximize": True}, {"momentum": 1.0}, {"lr": torch.tensor(0.05)}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_parallel_momentum_catches_up_in_one_step_to_where_the_dense_one_went(options):
    (p, q), (lazy, dense) = both(SGD, **MOMENTUM | options)
    assert (p[3] - q[3]).abs().max() > 1e-3  # two steps behind
    close(p[2], q[2], 1e-13, absolute=True)
    lazy.catch_up()
    close(p, q, 1e-13, absolute=True)
    close(lazy.state[p]["momentum_buffer"], dense.state[q]["momentum_buffer"], 1e-12, absolute=True)
    assert lazy.state[p].keys() == dense.state[q].keys()
    assert frame_error(p) <= 1e-13
    lazy.catch_up()  # nothing is left
    close(p, q, 1e-13, absolute=True)


def test_a_long_absence_costs_one_step():
    (p, q), (lazy, _) = both(SGD, [[0, 1, 2, 3], *([0],) * 300, [1]], **MOMENTUM)
    close(p[1], q[1], 1e-12, absolute=True)
    lazy.catch_up()
    close(p, q, 1e-12, absolute=True)


@pytest.mark.parametrize(
    "retraction, transport", [("geodesic", "project"), ("polar", "project"), ("qr", "project"), ("cayley", "project")]
)
def test_other_momentum_meets_the_dense_one_to_first_order(retraction, transport):
    gaps = []
    for lr in (0.02, 0.01):
        options = {"lr": lr, "momentum": 0.9, "retraction": retraction, "transport": transport}
        (p, q), (lazy, dense) = both(SGD, **options)
        lazy.catch_up()
        # only the path differs
        close(lazy.state[p]["momentum_buffer"], dense.state[q]["momentum_buffer"], 1e-13, absolute=True)
        gaps.append((p.mT @ p - q.mT @ q).abs().max().item())
    assert 3.5 < gaps[0] / gaps[1] < 4.7, gaps


def test_a_rate_that_changes_is_that_of_the_moment():
    def drop(step, lazy, dense):
        if step == 4:
            lazy.catch_up()
        for opt in (lazy, dense) if step == 4 else ():
            opt.param_groups[0]["lr"] *= 0.1

    (p, q), (lazy, _) = both(SGD, change=drop, **MOMENTUM)
    lazy.catch_up()
    close(p, q, 1e-13, absolute=True)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_where_all_classes_are_named_it_is_the_dense_step(name):
    kind, options = OPTIMISERS[name]
    (p, q), opts = both(kind, [[0, 1, 2, 3]] * 4, **options)
    close(p, q, 1e-15 if options.get("transport") == "parallel" else 0, absolute=True)
    for key, value in opts[1].state[q].items():
        close(opts[0].state[p][key], value, 1e-14, absolute=True)


def test_without_momentum_there_is_nothing_to_catch_up():
    (p, q), (lazy, _) = both(SGD, lr=0.1)
    close(p, q, 1e-14, absolute=True)
    assert not lazy.state
    lazy.catch_up()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_takes_a_class_through_its_own_steps_alone(amsgrad):
    """As torch.optim.SparseAdam: moments of a class that is not named stay, and bias is corrected by its own steps."""
    (p, _), (lazy, _) = both(ADAM, lr=0.05, amsgrad=amsgrad)
    for c in range(4):
        alone = torch.nn.Parameter(frame().detach()[c : c + 1])
        opt = ADAM(marked(alone), lr=0.05, amsgrad=amsgrad)
        for step, classes in enumerate(SUBSETS):
            if c in classes:
                alone.grad = noise(p, step)[c : c + 1]
                opt.step()
        assert torch.equal(p[c], alone[0])
        for key, value in opt.state[alone].items():
            assert torch.equal(lazy.state[p][key][c], value[0]), key


def test_dense_and_sparse_gradients_in_turn():
    params = frame(), frame()
    opts = [SGD(marked(p), **MOMENTUM) for p in params]
    for step, classes in enumerate(SUBSETS):
        grads = named(params[0], classes, step)
        for p, opt, grad in zip(params, opts, grads if step % 3 else grads[1:] * 2):
            p.grad = grad
            opt.step()
    opts[0].catch_up()
    close(*params, 1e-13, absolute=True)


def test_gradients_that_name_a_class_twice_add_up():
    p, q = frame(), frame()
    values, index = noise(p, 0), torch.tensor([[3, 1, 3, 1]])
    p.grad = torch.sparse_coo_tensor(index, values, p.shape, check_invariants=True)
    q.grad = p.grad.to_dense()
    for param in (p, q):
        SGD(marked(param), lr=0.1).step()
    close(p, q, 1e-14, absolute=True)
    assert torch.equal(p[[0, 2]], frame()[[0, 2]]) and p.grad.is_sparse and not p.grad.is_coalesced()


@pytest.mark.parametrize("name", ["parallel", "amsgrad"])
def test_the_state_is_saved_and_loaded_with_what_is_still_to_come(name):
    kind, options = OPTIMISERS[name]
    (p, _), (opt, _) = both(kind, **options)
    q = torch.nn.Parameter(p.detach().clone())
    again = kind(marked(q), **options)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for param, optimiser in ((p, opt), (q, again)):
        param.grad = named(p, [0, 3], 20)[0]
        optimiser.step()
        getattr(optimiser, "catch_up", bool)()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_class_with_a_bad_gradient_waits(name, bad):
    kind, options = OPTIMISERS[name]
    params = frame(), frame()
    opts = [kind(marked(p), **options) for p in params]
    for step, classes in enumerate(SUBSETS[3:6]):
        for p, opt, grad in zip(params, opts, named(params[0], classes, step)):
            p.grad = grad
            opt.step()
    before = [p[1].clone() for p in params]
    sparse, dense = named(params[0], [1, 3], 9)
    sparse._values()[0, 1, 4] = dense[1, 1, 4] = bad
    for p, opt, grad, frames in zip(params, opts, (sparse, dense), before):
        p.grad = grad
        with pytest.warns(RuntimeWarning, match="1 class"):
            opt.step()
        assert opt.skipped_frames == 1 and p.isfinite().all()
        assert torch.equal(p[1], frames) or (opt is opts[0] and "momentum" in options)  # which has caught up
    if kind is ADAM:
        assert opts[0].state[params[0]]["step"].tolist() == [1, 1, 1, 3]
    elif name != "momentum":
        opts[0].catch_up()
        close(*params, 1e-13, absolute=True)


def test_what_gradscaler_does_to_it():
    p, q = frame(dtype=torch.float32), frame(dtype=torch.float32)
    sparse, dense = named(p, [1, 3], 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt, fused = SGD(marked(p), lr=0.1), SGD(marked(q), fused=True, **MOMENTUM | {"lr": 0.1})
    scaler.scale(torch.zeros(()))
    p.grad = sparse * 8
    scaler.step(opt)
    q.grad = sparse * 8
    scaler.step(fused)
    close(p, q, 1e-6, absolute=True)
    before = q.detach().clone()
    q.grad = sparse * math.inf
    scaler.update()
    scaler.step(fused)
    assert torch.equal(q[[0, 2]], before[[0, 2]]) and fused.skipped_frames == 0
    assert fused.state[q]["steps"] == 1  # an overflow is no step


class Seen(TorchDispatchMode):
    """The ops that read or make a tensor of all classes, but for views."""

    def __init__(self, classes):
        self.classes, self.ops = classes, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if not op.is_view and any(t.layout is torch.strided and t.shape[:1] == (self.classes,)
                                  for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)):
            self.ops.add(op.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_operation_of_a_step_goes_through_all_classes(name):
    kind, options = OPTIMISERS[name]
    p = frame(classes=50)
    opt = kind(marked(p), **options)
    for step in range(2):
        p.grad = named(p, [3, 7, 11], step)[0]
        with Seen(50) as seen:
            opt.step()
        if step:  # the first one makes the state
            assert seen.ops <= {"index_select", "index_copy_", "index_fill_"}, seen.ops


def out_of_range(p):
    return torch.sparse_coo_tensor(torch.tensor([[1, 4]]), noise(p, 0)[:2], p.shape, check_invariants=False)


REFUSED = {
    "all dimensions sparse": ("classes alone, got one of sparse_dim=3", lambda p: noise(p, 0).to_sparse(), {}),
    "no such class": (r"must name classes in \[0, 4\), got 1 to 4", out_of_range, {}),
    "ragged": ("names rows, not classes", lambda p: noise(p, 0).to_sparse(1), {"dims": (2, 1, 1)}),
    "weight decay": ("need weight_decay=0, got 0.1", lambda p: noise(p, 0).to_sparse(1), {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_refused_before_anything_moves(kind, case):
    message, grad, options = REFUSED[case]
    p, q = frame(), torch.nn.Parameter(torch.ones(3))
    if "dims" in options:
        p = torch.nn.Parameter(torch.cat([frame(1, k, 9)[0] for k in options["dims"]]).detach())
    groups = [{"params": [q]}, *marked(p, **options)]
    if case == "weight decay" and kind is ADAM:
        pytest.raises(ValueError, kind, groups)
        return
    opt = kind(groups)
    p.grad, q.grad, before = grad(p), torch.ones(3), p.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert torch.equal(q, torch.ones(3)) and torch.equal(p, before)


def test_a_layers_frames_are_still_known_for_frames():
    """The layer's watch for those who move frames off stays quiet."""
    head = ts.GrassmannLinear(8, 5, 2)
    opt = SGD(head.parameters(), **MOMENTUM)
    for step in range(9):
        head.weight.grad = named(head.weight, [step % 5], step)[0]
        opt.step()
        head(torch.ones(1, 8))
    opt.catch_up()
    assert not moved_by_others(head.weight) and head.frame_error() < 1e-6


@pytest.mark.parametrize("by", ["catch_up", "a dense step"])
def test_whole_ragged_heads_take_over_what_is_still_to_come(by):
    """The state of ragged classes that were shared out is a stack, and counts the steps that each has missed."""
    dims, missed = (2, 1, 2), (0, 3, 2)
    head = ts.GrassmannLinear(8, 3, dims).double().orthonormalize_()
    opt = ts.RiemannianSGD(head.parameters(), **MOMENTUM)
    starts, stack, alone = [0, 2, 3, 5], torch.zeros(3, 2, 8, dtype=torch.float64), []
    for c, k in enumerate(dims):
        p = head.weight[starts[c] : starts[c + 1]].detach().clone()[None].requires_grad_()
        w = p.detach()[0]
        stack[c, :k] = noise(p, c)[0] - noise(p, c)[0] @ w.T @ w
        one = ts.RiemannianSGD(marked(p), **MOMENTUM)
        one.state[p] = {"momentum_buffer": stack[None, c, :k].clone()}
        for _ in range(missed[c] + (by == "a dense step")):
            p.grad = torch.zeros_like(p)
            one.step()
        alone.append((p.detach()[0], one.state[p]["momentum_buffer"][0]))
    opt.state[head.weight] = {"momentum_buffer": stack, "steps": 4, "step": 4 - torch.tensor(missed)}
    if by == "catch_up":
        opt.catch_up()
    else:
        head.weight.grad = torch.zeros_like(head.weight)
        opt.step()
    for held, expected in zip((head.weight.detach(), opt.state[head.weight]["momentum_buffer"]), zip(*alone)):
        assert torch.allclose(held, torch.cat(expected), rtol=0, atol=1e-12)
