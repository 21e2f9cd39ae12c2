"""What is asked of all optimisers of few dimensions: no autocast in a step, and states of others."""

import copy

import pytest
import torch
from helpers import close, normal, same
from torch import nn

from torch_subspace.lowrank import CoSO, LowRankAdamW, Trion

MAKE = {
    "LowRankAdamW": lambda p: LowRankAdamW(p, lr=1e-2, rank=4),
    "LowRankAdamW, svd": lambda p: LowRankAdamW(p, lr=1e-2, rank=4, projector="svd"),
    "LowRankAdamW, cosine": lambda p: LowRankAdamW(p, lr=1e-2, rank=4, projector="cosine", error_feedback="int8"),
    "LowRankAdamW, hadamard": lambda p: LowRankAdamW(p, lr=1e-2, rank=4, projector="hadamard"),
    "Trion": lambda p: Trion(p, lr=1e-2, rank=4),
    "CoSO": lambda p: CoSO(p, lr=1e-2, rank=4, sketch_rank=8),
}


def weights(*shape, seed=0):
    return nn.Parameter(normal(*shape, seed=seed, dtype=torch.float32))


def steps(p, opt, count, begin=0):
    """How long each is."""
    found = []
    for i in range(begin, begin + count):
        before, p.grad = p.detach().clone(), normal(*p.shape, seed=10 + i, dtype=torch.float32)
        opt.step()
        found.append((p.detach() - before).norm().item())
    return found


@pytest.mark.parametrize("name", MAKE)
def test_a_step_under_autocast_is_the_same(name):
    found = []
    for enabled in (False, True):
        p = weights(12, 20)
        opt = MAKE[name]([p])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            steps(p, opt, 3)
        if name == "CoSO":
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                opt.consolidate()
                steps(p, opt, 2, 3)
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["LowRankAdamW", "CoSO"])
def test_steps_after_a_state_of_adamw_are_no_longer(name):
    p = weights(12, 20)
    adamw = torch.optim.AdamW([p], 1e-2, weight_decay=0.0)
    longest = max(steps(p, adamw, 30)[5:])
    opt = MAKE[name]([p])
    opt.load_state_dict(adamw.state_dict())
    assert max(steps(p, opt, 10, 30)) < 1.6 * longest


def test_a_rank_from_all_inputs_down_and_none_up():
    p = weights(12, 20)
    opt = CoSO([p], lr=1e-2, rank=20, sketch_rank=20)
    before = steps(p, opt, 10)
    opt.param_groups[0]["rank"] = 4
    assert max(steps(p, opt, 10, 10)) < 1.5 * max(before)
    state = opt.state_dict()
    opt.param_groups[0]["rank"] = 20
    with pytest.raises(ValueError, match=r"CoSO: rank must stay below the inputs .* got 20 for a parameter of"):
        opt.step()
    assert opt.state[p]["step"] == state["state"][0]["step"]


def test_what_is_protected_stays_so():
    p = weights(12, 20)
    opt = CoSO([p], lr=1e-2, rank=4, sketch_rank=8)
    steps(p, opt, 3)
    opt.consolidate()
    opt.param_groups[0]["protect"] = False
    with pytest.raises(ValueError, match="CoSO: protect must stay True for what has been protected, got False"):
        opt.step()


def test_a_state_of_another_shape_is_refused():
    p, q = weights(8, 8), weights(4, 16)
    first, second = MAKE["Trion"]([p]), MAKE["Trion"]([q])
    steps(p, first, 1)
    with pytest.raises(ValueError, match=r"Trion: state_dict must be of parameters of the same shapes, got \(8"):
        second.load_state_dict(first.state_dict())
    assert not second.state[q]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("there, here", [((12, 9), (13, 9)), ((20, 9), (9, 9)), ((12, 40), (12, 9)), ((9,), (8,)),
                                         ((3, 8, 9), (2, 8, 9)), ((12, 9), (8,)), ((9,), (12, 9))])
def test_states_of_other_shapes_are_refused_before_anything_changes(name, there, here):
    """As they come of parameters in another order, or of another model."""
    first, second = weights(*there), weights(*here, seed=1)
    saved, opt = MAKE[name]([first]), MAKE[name]([second])
    steps(first, saved, 1)
    steps(second, opt, 1)
    with pytest.raises(ValueError, match="state_dict must be of parameters of the same shapes, got .* for"):
        opt.load_state_dict(saved.state_dict())
    assert steps(second, opt, 1, begin=1)[0] > 0 and second.isfinite().all()
    saved.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("there, here", [((12, 9), (9, 12)), ((3, 8, 9), (3, 9, 8)), ((9, 12), (9, 14))])
def test_a_state_of_the_transpose_is_refused(name, there, here, tmp_path):
    """In few dimensions it is as large; and an index into a basis does not tell how many columns that has."""
    first, second, other = weights(*there), weights(*here, seed=1), weights(5, 6)
    saved, opt = MAKE[name]([other, first]), MAKE[name]([other, second])
    for p, of in ((first, saved), (second, opt)):
        steps(other, of, 1)
        steps(p, of, 1)
    torch.save(saved.state_dict(), tmp_path / "opt.pt")
    state, before = torch.load(tmp_path / "opt.pt"), copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="state_dict must be of parameters of the same shapes, got .* for"):
        opt.load_state_dict(state)
    left = opt.state_dict()
    assert left["param_groups"] == before["param_groups"] and left["state"].keys() == before["state"].keys()
    for i, own in left["state"].items():
        assert same(own.values(), before["state"][i].values())


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("there, here", [((12, 9), (12, 9)), ((12, 8), (12, 2, 2, 2))])
def test_states_that_do_not_tell_shapes_are_taken(name, there, here):
    """Those of before; and a convolution goes on with what its matrix had."""
    if name == "Trion" and there != here:
        pytest.skip("momentum has the parameter's own shape")
    first, second = weights(*there), nn.Parameter(weights(*there).detach().reshape(here))
    saved, opt = MAKE[name]([first]), MAKE[name]([second])
    steps(first, saved, 2)
    second.data.copy_(first.detach().reshape(here))
    state = copy.deepcopy(saved.state_dict())
    for keys in (state.keys(), ("state", "param_groups")):
        opt.load_state_dict({key: state[key] for key in keys})
    first.grad = normal(*there, seed=5, dtype=torch.float32)
    second.grad = first.grad.reshape(here)
    saved.step()
    opt.step()
    assert torch.equal(second.detach().view(there), first.detach())


@pytest.mark.parametrize("name", MAKE)
def test_a_state_of_float32_goes_on_in_a_model_of_float64(name):
    p, opt = weights(12, 20), None
    opt = MAKE[name]([p])
    steps(p, opt, 2)
    wide = nn.Parameter(p.detach().double())
    other = MAKE[name]([wide])
    other.load_state_dict(opt.state_dict())
    for i in range(2):
        p.grad = normal(12, 20, seed=20 + i, dtype=torch.float32)
        wide.grad = p.grad.double()
        opt.step()
        other.step()
    close(wide.detach(), p.detach().double(), 1e-4)
    moments = [t for t in other.state[wide].values() if t.is_floating_point() and t.dim() > 1]
    assert moments and all(t.dtype == torch.float64 for t in moments)


@pytest.mark.parametrize("name", MAKE)
def test_a_state_with_amsgrad_is_refused(name):
    p = weights(12, 20)
    adamw = torch.optim.AdamW([p], amsgrad=True)
    steps(p, adamw, 1)
    opt = MAKE[name]([p])
    with pytest.raises(ValueError, match=f"{name.partition(',')[0]}: amsgrad must be False"):
        opt.load_state_dict(adamw.state_dict())
    assert not opt.state and "amsgrad" not in [key for key, value in opt.param_groups[0].items() if value is True]


def other_side(group):
    group["side"] = "rows"


def larger_rank(group):
    group["rank"] = 6


def adamw_now(group):
    group["algorithm"] = "adamw"


def unprotected(group):
    group["protect"] = False


STACK = (20, 9, 5)


@pytest.mark.parametrize("name, shape, change, words", [
    ("LowRankAdamW", (9, 9), other_side, "side must stay 'shorter', .* got 'rows'"),
    ("LowRankAdamW", STACK, larger_rank, r"rank and side must leave .* the same matrices, got rank=6, .*\(20, 9, 5\)"),
    ("CoSO", STACK, larger_rank, r"rank must leave what has been projected the same matrices, got 6 .*\(20, 9, 5\)"),
    ("CoSO", (9, 9), unprotected, "protect must stay True for what has been protected, got False"),
    ("Trion", (9, 9), adamw_now, "algorithm must stay 'trion' for what was stepped by it, got 'adamw'"),
])
def test_what_may_not_change_between_steps(name, shape, change, words):
    """And nothing is stepped before that is said."""
    p, first = weights(*shape), weights(3)
    opt = MAKE[name]([first, p])
    for i in range(2):
        first.grad, p.grad = torch.ones(3), normal(*shape, seed=i, dtype=torch.float32)
        opt.step() if not i else change(opt.param_groups[0])
    before = first.detach().clone(), p.detach().clone()
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        opt.step()
    assert torch.equal(first, before[0]) and torch.equal(p, before[1])


def test_trion_lets_go_of_what_adamw_kept():
    p = weights(12, 20)
    adamw, opt = torch.optim.AdamW([p]), MAKE["Trion"]([p])
    steps(p, adamw, 1)
    opt.load_state_dict(adamw.state_dict())
    steps(p, opt, 1)
    assert set(opt.state[p]) == {"momentum_buffer", "step"}
